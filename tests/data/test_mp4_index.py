"""The index of MP4 files, read from their boxes: that of FFmpeg, or None in doubt."""

import struct
from pathlib import Path

import av
import pytest
from video_files import counter, write_video

from mplug2.data.mp4_index import read_index

PLAIN = {
    "B-frames": ({"g": "12"}, {}),
    "no B-frames": ({"g": "12", "bf": "0"}, {}),
    "only key frames": ({"g": "1"}, {}),
    "the index at the start": ({"g": "12"}, {"movflags": "faststart"}),
    "no edit list": ({"g": "12"}, {"use_editlist": "0"}),
}


def write(path: Path, name: str = "B-frames") -> Path:
    codec_options, options = PLAIN[name]
    return write_video(path, counter(60), codec_options=codec_options, **options)


def number_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return container.streams.video[0].id


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".3gp"])
@pytest.mark.parametrize("name", PLAIN)
def test_it_is_the_index_that_ffmpeg_has(tmp_path, name, suffix):
    path = write(tmp_path / f"a{suffix}", name)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        entries = [(entry.timestamp, entry.size, entry.is_keyframe) for entry in stream.index_entries]
        index = read_index(path, stream.id)
    times, sizes, key_flags = zip(*entries)
    assert len(sizes) == 60 and index.sizes == list(sizes)
    assert index.keys == [number for number, is_key in enumerate(key_flags) if is_key]
    assert {later - time for time, later in zip(times, times[1:])} == {index.step}


def test_the_track_is_found_among_others(tmp_path):
    """A file with two videos and sound between them."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=rate, options={"g": str(rate)}) for rate in (10, 30)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for number, array in enumerate(counter(40)):
            for stream in streams[number % 4 > 0:]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    with av.open(str(path)) as container:
        for stream, total in zip(container.streams.video, (10, 40), strict=True):
            index = read_index(path, stream.id)
            assert index.sizes == [entry.size for entry in stream.index_entries] and len(index.sizes) == total
    assert read_index(path, 7) is None


def box(name: bytes, content: bytes, wide: bool = False) -> bytes:
    size = len(content) + (16 if wide else 8)
    return (struct.pack(">I4sQ", 1, name, size) if wide else struct.pack(">I4s", size, name)) + content


def test_chunk_offsets_and_box_sizes_may_have_64_bits(tmp_path):
    """Written by hand: five packets of 10 bytes, in chunks of 2, 2 and 1, and a last frame of another duration."""
    packets = 60
    rows = {
        b"stts": struct.pack(">6I", 0, 2, 4, 512, 1, 40), b"stsc": struct.pack(">8I", 0, 2, 1, 2, 1, 3, 1, 1),
        b"stsz": struct.pack(">3I", 0, 10, 5), b"stss": struct.pack(">4I", 0, 2, 1, 4),
        b"co64": struct.pack(">2I3Q", 0, 3, 16, 36, packets - 4),
    }
    table = box(b"stbl", b"".join(box(name, content) for name, content in rows.items()))
    edits = box(b"edts", box(b"elst", struct.pack(">2I2qI2qI", 1 << 24, 2, 100, -1, 1 << 16, 2000, 0, 1 << 16)))
    header = box(b"tkhd", struct.pack(">I2QI", 1 << 24, 0, 0, 3))
    track = box(b"trak", header + edits + box(b"mdia", box(b"minf", table)))
    content = box(b"mdat", bytes(packets - 10), wide=True) + box(b"moov", track)
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    index = read_index(path, 3)
    assert (index.step, index.sizes, index.keys) == (512, [10] * 5, [0, 3])
    for damaged in (
        content[:-1],  # the file ends early
        content + box(b"moof", b""),  # a fragment follows
        content.replace(struct.pack(">2I3Q", 0, 3, 16, 36, 56), struct.pack(">2I3Q", 0, 3, 16, 36, 10**6)),  # no packet
        content.replace(struct.pack(">4I", 4, 512, 1, 40), struct.pack(">4I", 3, 512, 2, 40)),  # the rate varies
        content.replace(struct.pack(">4I", 4, 512, 1, 40), struct.pack(">4I", 4, 512, 2, 40)),  # six packets
        content.replace(struct.pack(">2q", 100, -1), struct.pack(">2q", 100, 0)),  # two parts of the video
        content.replace(b"stsz", b"stz2"), content.replace(b"mdia", b"cmov"),
        content.replace(struct.pack(">3I", 0, 10, 5), struct.pack(">3I", 0, 0, 2**31)),  # a table longer than its box
    ):
        assert damaged != content
        path.write_bytes(damaged)
        assert read_index(path, 3) is None


@pytest.mark.parametrize("options", [{"movflags": "frag_keyframe"}, {"movflags": "frag_keyframe+empty_moov"}])
def test_fragments_are_left_to_ffmpeg(tmp_path, options):
    path = write_video(tmp_path / "a.mp4", counter(60), codec_options={"g": "12"}, **options)
    assert read_index(path, number_of(path)) is None


def test_a_variable_rate_is_left_to_ffmpeg(tmp_path):
    path = write_video(tmp_path / "a.mp4", counter(4), times=[0, 40, 90, 120])
    assert read_index(path, number_of(path)) is None


@pytest.mark.parametrize("content", [b"", b"no box", b"\0" * 100, struct.pack(">I4s", 8, b"moov") * 3])
def test_what_is_no_mp4_has_no_index(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    assert read_index(path, 1) is None
