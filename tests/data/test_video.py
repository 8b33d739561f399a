"""Video files: which frames they have, what these look like, and that seeking gives what decoding in order gives."""

import struct
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import av
import numpy as np
import pytest
from helpers import slow_except
from hypothesis import given, settings
from hypothesis import strategies as st
from video_files import FORMATS, counter, numbers_of, write_video

from mplug2.data import video
from mplug2.data.frame_choice import choose_frames, segment_indices
from mplug2.data.media import VIDEO_SUFFIXES, MediaError, kind_of, read_media, read_video
from mplug2.data.video import Doubt
from mplug2.tools.bench_media import read_in_order

CASES = Path(__file__).parent / "media"


def decode_in_order(path: Path) -> np.ndarray:
    kept, starts, _ = video._decode_in_order(path, None)
    assert len(kept) == len(starts)
    return np.stack(list(kept.values()))


def decode_by_seeking(path: Path, frames: int, rng: np.random.Generator | None) -> tuple[np.ndarray, list[int]]:
    """Frames and their numbers. Raises Doubt."""
    with video._open(path) as (container, stream):
        timeline = video.read_timeline(path, container, stream)
        numbers = choose_frames(timeline.durations(), frames, rng)
        return video._decode_by_seeking(container, stream, timeline, numbers), numbers


def cut(path: Path, fraction: float) -> Path:
    """Keep the first part of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path


# ---- every format ----------------------------------------------------------------------------------------------------


@cache
def video_of_50(suffix: str) -> Path:
    """A counter of 50 frames. Some encoders ask for a size."""
    height, width = {".dv": (576, 720), ".rm": (144, 176), ".rmvb": (144, 176)}.get(suffix, (64, 96))
    return write_video(Path(mkdtemp()) / f"video{suffix}", counter(50, height, width))


@pytest.mark.parametrize("suffix", slow_except([suffixes[0] for suffixes in FORMATS.values()], VIDEO_SUFFIXES))
def test_every_format_gives_the_frames_that_are_chosen(suffix):
    path = video_of_50(suffix)
    assert kind_of(path) == "video"
    for read in (read_video, read_media):
        found = read(path, 4)
        assert found.dtype == np.uint8 and len(found) == 4 and numbers_of(found) == segment_indices(50, 4).tolist()
    drawn = segment_indices(50, 8, np.random.default_rng(3)).tolist()
    assert numbers_of(read_video(path, 8, np.random.default_rng(3))) == drawn
    assert numbers_of(read_video(path, None)) == list(range(50))
    assert numbers_of(read_video(path, 52)) == [*range(50), 49, 49]


def test_the_content_counts_and_a_file_may_have_no_suffix(tmp_path):
    for name in ("video", "video."):
        (tmp_path / name).write_bytes(video_of_50(".webm").read_bytes())
        assert kind_of(tmp_path / name) == "video" and numbers_of(read_media(tmp_path / name, 4)) == [5, 18, 30, 43]
    (tmp_path / "wrong.avi").write_bytes(video_of_50(".mp4").read_bytes())
    assert numbers_of(read_video(tmp_path / "wrong.avi", 4)) == [5, 18, 30, 43]


def test_a_file_name_is_not_taken_for_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("<video0>.mp4", "http:a.mp4", "concat:a|b.mp4", "a?b#c%20.mp4", "-i.mp4"):
        (tmp_path / name).write_bytes(video_of_50(".mp4").read_bytes())
        assert read_video(name, 4).shape == (4, 64, 96, 3)


def test_a_play_list_opens_no_address(tmp_path):
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match="list.mp4"):
        read_video(path, 4)


# ---- seeking ---------------------------------------------------------------------------------------------------------

X264 = "x264-params"
MOVING = {  # name: suffix, codec, options of the codec, options of the container
    "h264": (".mp4", "libx264", {"g": "12"}),
    "h264, one key frame": (".mp4", "libx264", {X264: "keyint=infinite:scenecut=0"}),
    "h264, key frames only": (".mp4", "libx264", {"g": "1"}),
    "h264, short groups": (".mp4", "libx264", {"g": "3", "bf": "2"}),
    "h264, no B-frames": (".mov", "libx264", {"g": "20", "bf": "0"}),
    "h264, many B-frames": (".mkv", "libx264", {"g": "30", X264: "bframes=8:b-adapt=0:b-pyramid=normal:ref=6"}),
    "h264, open groups": (".mp4", "libx264", {"g": "15", X264: "open-gop=1:scenecut=0"}),
    "h264, open groups, mkv": (".mkv", "libx264", {"g": "15", X264: "open-gop=1:scenecut=0"}),
    "h264, interlaced": (".ts", "libx264", {"g": "20", X264: "tff=1"}),
    "h264, fragments": (".mp4", "libx264", {"g": "12"}, {"movflags": "frag_keyframe"}),
    "h264, fragments, no index": (".mp4", "libx264", {"g": "12"}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264, fragments, only some are indexed":
        (".mp4", "libx264", {"g": "12"}, {"movflags": "dash+global_sidx+frag_keyframe+empty_moov"}),
    "h264, faststart": (".mp4", "libx264", {"g": "12"}, {"movflags": "faststart"}),
    "h264, no edit list": (".mp4", "libx264", {"g": "12"}, {"use_editlist": "0"}),
    "h264, mkv without cues": (".mkv", "libx264", {"g": "12"}, {"live": "1"}),
    "h264, flv": (".flv", "libx264", {"g": "12"}),
    "hevc": (".mp4", "libx265", {"x265-params": "keyint=20:open-gop=0:log-level=none"}),
    "hevc, open groups": (".mkv", "libx265", {"x265-params": "keyint=20:open-gop=1:log-level=none"}),
    "hevc, leading frames": (".mp4", "libx265", {"x265-params": "keyint=20:open-gop=0:radl=2:log-level=none"}),
    "hevc, temporal layers": (".mp4", "libx265", {"x265-params": "keyint=20:temporal-layers=3:log-level=none"}),
    "vp8": (".webm", "libvpx", {"g": "20"}),
    "vp9": (".webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "vp9, hidden frames": (".webm", "libvpx-vp9", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "25",
                                                   "cpu-used": "8"}),
    "av1": (".mp4", "libsvtav1", {"g": "20", "preset": "12"}),
    "mpeg4": (".avi", "mpeg4", {"g": "12"}),
    "mpeg4, B-frames": (".mp4", "mpeg4", {"g": "12", "bf": "2"}),
    "mpeg2, B-frames": (".ts", "mpeg2video", {"g": "12", "bf": "2"}),
    "mjpeg": (".avi", "mjpeg", {}),
}
DOUBTFUL = {  # read in order
    "h264, avi has no presentation times": (".avi", "libx264", {"g": "12"}),
    "h264, no key frames but a moving refresh": (".mp4", "libx264", {X264: "intra-refresh=1:keyint=30"}),
    "mpeg1, times for some packets only": (".mpg", "mpeg1video", {"g": "12", "bf": "2"}),
    "mpeg2, times are wrong after a seek": (".vob", "mpeg2video", {"g": "12", "bf": "2"}),
    "wmv": (".wmv", "wmv2", {"g": "12"}),
}


def moving(total: int = 90, height: int = 64, width: int = 96) -> np.ndarray:
    """A texture that moves, with cuts: a wrong reference frame cannot go unnoticed."""
    rng = np.random.default_rng(0)
    frames = []
    for number in range(total):
        if number % 17 == 0:
            texture = rng.integers(0, 256, (height // 4 + 25, width // 4 + 25, 3), dtype=np.uint8)
            texture = texture.repeat(4, 0).repeat(4, 1)
        top, left = 3 * number % 100, 5 * number % 100
        frames.append(texture[top: top + height, left: left + width])
    return np.stack(frames)


@cache
def moving_video(name: str, variable: bool = False) -> tuple[Path, np.ndarray]:
    """A file and its frames, decoded in order."""
    suffix, codec, codec_options, *options = {**MOVING, **DOUBTFUL}[name]
    times = np.random.default_rng(1).integers(10, 300, 90).cumsum().tolist() if variable else None
    path = write_video(Path(mkdtemp()) / f"video{suffix}", moving(), codec, times, codec_options=codec_options,
                       **(options[0] if options else {}))
    return path, decode_in_order(path)


QUICK = ["h264", "h264, one key frame", "h264, many B-frames", "h264, open groups", "h264, fragments, no index",
         "hevc, leading frames", "vp9, hidden frames", "mpeg4, B-frames", "mpeg2, B-frames"]


@pytest.mark.parametrize("name", slow_except(QUICK, MOVING))
@settings(max_examples=6, deadline=None)
@given(frames=st.integers(1, 12), seed=st.none() | st.integers(0, 2**16))
def test_seeking_gives_the_frames_of_decoding_in_order_bit_by_bit(name, frames, seed):
    path, expected = moving_video(name)
    assert len(expected) == 90
    rng = None if seed is None else np.random.default_rng(seed)
    found, numbers = decode_by_seeking(path, frames, rng)
    assert numbers == segment_indices(90, frames, None if seed is None else np.random.default_rng(seed)).tolist()
    assert np.array_equal(found, expected[numbers])


@pytest.mark.parametrize("name", ["h264", "h264, open groups", "h264, many B-frames", "vp9"])
@settings(max_examples=4, deadline=None)
@given(frames=st.integers(1, 12), seed=st.none() | st.integers(0, 2**16))
def test_seeking_at_a_variable_rate(name, frames, seed):
    path, expected = moving_video(name, variable=True)
    found, numbers = decode_by_seeking(path, frames, None if seed is None else np.random.default_rng(seed))
    assert np.array_equal(found, expected[numbers])


@pytest.mark.parametrize("name", DOUBTFUL)
def test_in_doubt_a_file_is_decoded_in_order(name):
    path, expected = moving_video(name)
    assert len(expected) == 90
    for frames in (1, 4, 9):
        assert np.array_equal(read_video(path, frames), expected[segment_indices(90, frames)])
    doubts = 0
    for seed in range(20):
        try:
            found, numbers = decode_by_seeking(path, 4, np.random.default_rng(seed))
            assert np.array_equal(found, expected[numbers])
        except Doubt:
            doubts += 1
    assert doubts == 20 or 0 < doubts and ("refresh" in name or "after a seek" in name)


def test_hidden_reference_frames_of_vp8_are_not_counted(tmp_path):
    """Every seventh packet is not shown: bit 4 of its first byte is 0."""
    source = write_video(tmp_path / "source.webm", moving(), codec_options={"g": "20"})
    with av.open(str(source)) as given, av.open(str(tmp_path / "a.webm"), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(video=0)):
            if packet.size:
                content = bytearray(bytes(packet))
                content[0] &= ~0x10 if number % 7 == 6 else 0xFF
                copy = av.Packet(bytes(content))
                copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
                copy.is_keyframe = packet.is_keyframe
                made.mux(copy)
    expected = decode_in_order(tmp_path / "a.webm")
    assert len(expected) == 90 - 12
    for seed in range(4):
        found, numbers = decode_by_seeking(tmp_path / "a.webm", 5, np.random.default_rng(seed))
        assert np.array_equal(found, expected[numbers])


def test_two_recordings_in_one_file_whose_times_start_twice(tmp_path):
    path = tmp_path / "both.ts"
    parts = [write_video(tmp_path / f"{total}.ts", counter(total), rate=rate, codec_options={"g": "10"})
             for total, rate in ((20, 25), (40, 24))]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    expected = decode_in_order(path)
    assert len(expected) == 60 and np.array_equal(read_video(path, 5), expected[segment_indices(60, 5)])


def test_a_recording_that_starts_between_two_key_frames(tmp_path):
    content = write_video(tmp_path / "whole.ts", moving(), codec_options={"g": "30", X264: "scenecut=0"}).read_bytes()
    path = tmp_path / "late.ts"
    path.write_bytes(content[:376] + content[len(content) // 188 // 6 * 188:])  # the tables, then from a sixth on
    expected = decode_in_order(path)
    assert 50 < len(expected) < 90
    for frames in (1, 4, 8):
        for frame in read_video(path, frames):
            assert any(np.array_equal(frame, one) for one in expected)


@pytest.mark.parametrize("name", ["h264", "h264, many B-frames", "vp9", "mpeg4"])
def test_frames_are_bit_identical_to_those_of_imageio(name):
    """imageio's plugin decodes in order. It was the reader of earlier versions."""
    path, expected = moving_video(name)
    assert np.array_equal(read_in_order(path, None), expected)
    assert np.array_equal(read_in_order(path, 5), read_video(path, 5))


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
def test_colors_are_converted_as_imageio_does(tmp_path, pixel_format):
    path = write_video(tmp_path / "a.mp4", moving(4), pixel_format=pixel_format)
    assert np.array_equal(read_video(path, None), read_in_order(path, None))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_only_what_the_chosen_frames_need_is_decoded(tmp_path, suffix):
    """All packets are erased, except those of the first group, from which FFmpeg learns the format, and those of the
    group of the chosen frame, up to its own."""
    path = write_video(tmp_path / f"long{suffix}", counter(280), codec_options={"g": "30", X264: "scenecut=0"})
    with av.open(str(path)) as container:
        packets = [(packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    shown = sorted(pts for pts, _, _ in packets)
    own = [pts for pts, _, _ in packets].index(shown[139])  # the middle one
    content = bytearray(path.read_bytes())
    for number, (_, position, size) in enumerate(packets):
        if not (number < 30 or 120 <= number <= own):
            start = content.index(bytes(content[position: position + size]), position) + 8
            content[start: position + size - 4] = bytes(max(0, position + size - 4 - start))
    path.write_bytes(content)
    assert numbers_of(read_video(path, 1)) == [139]
    assert len(video._decode_in_order(path, None)[1]) < 40


def test_an_index_of_a_constant_rate_is_enough(tmp_path, monkeypatch):
    """In an MP4 file, only the packets of the groups that are needed are read from the disk."""
    path = write_video(tmp_path / "long.mp4", counter(300), codec_options={"g": "30", X264: "scenecut=0"})
    monkeypatch.setattr(video, "_timeline_of_packets", lambda *_: pytest.fail("all packets are read"))
    assert numbers_of(read_video(path, 4)) == [37, 112, 187, 262]


@pytest.mark.parametrize("name", [
    "h264", "h264, many B-frames", "h264, open groups, mkv", "h264, fragments", "h264, no edit list", "h264, flv",
    "hevc", "mpeg2, B-frames"])
def test_a_seek_ends_at_its_key_frame(name):
    """A seek to the time at which a key frame is decoded ends a group earlier where the index holds the times at which
    frames are shown (MP4 with an edit list, MKV). Elsewhere, a seek to the time at which it is shown may end later."""
    with video._open(moving_video(name)[0]) as (container, stream):
        timeline, read = video.read_timeline(moving_video(name)[0], container, stream), []

        class Counting:
            format, seek = container.format, container.seek

            def demux(self, stream):
                for packet in container.demux(stream):
                    read.append(packet.pts)
                    yield packet

        for number, (shown, _, position) in enumerate(timeline.keys):
            found = video._packets_from_key(Counting(), stream, timeline.keys[: number + 1], shown)
            assert (found[1].pts, found[2]) == (shown, position)
        assert len(read) <= len(timeline.keys) + 1  # one of "no edit list" and of fragments takes a second try


@pytest.mark.parametrize("name", ["h264", "h264, interlaced", "hevc", "mpeg4, B-frames"])
def test_a_decoder_is_asked_for_the_frames_that_it_holds_back(name, monkeypatch):
    """This ends a group with the packet of its last chosen frame. Not if frames have two fields: the second may be in
    the next packet."""
    path, expected = moving_video(name)
    with video._open(path) as (container, stream):
        timeline, ends = video.read_timeline(path, container, stream), []

        class Context:
            skip_frame = "DEFAULT"

            def __getattr__(self, attribute):
                return getattr(stream.codec_context, attribute)

            def decode(self, packet):
                ends.append(packet is None)
                return stream.codec_context.decode(packet)

        class Stream:
            codec_context = Context()

        monkeypatch.setattr(video, "_packets_from_key", lambda *_: (container.demux(stream), first, 0))
        container.seek(0, stream=stream)
        first = next(container.demux(stream))
        time = timeline.starts[7]
        frame, = video._decode_group(container, Stream(), timeline, set(timeline.starts), 0, [time])
        assert frame.pts == time
    assert ends == [False] * (len(ends) - 1) + [name in ("h264", "hevc")]


def test_a_frame_of_two_fields_may_end_in_the_next_packet(monkeypatch):
    """If the header does not say that there are fields, the frame does."""
    monkeypatch.setattr(video, "PROGRESSIVE", 9)
    path, expected = moving_video("h264, interlaced")
    with pytest.raises(Doubt):
        decode_by_seeking(path, 4, None)
    assert np.array_equal(read_video(path, 4), expected[segment_indices(90, 4)])


# ---- how many frames -------------------------------------------------------------------------------------------------


def test_a_header_that_promises_too_few_frames(tmp_path):
    """A fragmented MP4 file lists the frames of its first fragment only."""
    path = CASES / "frag_keyframe.mp4"
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 4
    assert len(read_video(path, None)) == 20
    assert np.array_equal(read_video(path, 5), read_video(path, None)[segment_indices(20, 5)])
    written = write_video(tmp_path / "a.mp4", counter(60), codec_options={"g": "10"}, movflags="frag_keyframe")
    assert numbers_of(read_video(written, 4)) == segment_indices(60, 4).tolist()


@pytest.mark.parametrize("promised", [3, 60, 61, 10000])
def test_the_header_of_an_avi_file_is_only_a_hint(tmp_path, promised):
    """The stream header (strh) has a length, in frames."""
    path = write_video(tmp_path / "liar.avi", counter(30))
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 8 + 32
    assert struct.unpack_from("<I", content, length) == (30,)
    struct.pack_into("<I", content, length, promised)
    path.write_bytes(content)
    assert numbers_of(read_video(path, 4)) == segment_indices(30, 4).tolist()
    assert numbers_of(read_video(path, None)) == list(range(30))


def test_an_mp4_file_that_ends_early(tmp_path):
    """The index at its head lists 60 frames; the file ends before the last of them."""
    noise = np.random.default_rng(0).integers(0, 2, (60, 32, 48, 3), dtype=np.uint8) * 4  # so that all frames have size
    path = write_video(
        tmp_path / "cut.mp4", counter(60) + noise, codec_options={"preset": "ultrafast"}, movflags="faststart"
    )
    content = path.read_bytes()
    for fraction in (0.8, 0.45):
        path.write_bytes(content[: int(len(content) * fraction)])
        decoded = len(video._decode_in_order(path, None)[1])
        assert 0 < decoded < 55
        if fraction == 0.8:
            for frames in (1, 5):
                assert numbers_of(read_video(path, frames)) == segment_indices(decoded, frames).tolist()
            assert numbers_of(read_video(path, None)) == list(range(decoded))
        else:
            for frames in (40, None):
                with pytest.raises(MediaError, match=f"promises 60 frames, but only {decoded} can be decoded"):
                    read_video(path, frames)


def test_a_trimmed_video_has_the_frames_that_are_left(tmp_path):
    """The edit list of an MP4 file shows frames 23 to 32 of 60, and a key frame lies at 20."""
    path = write_video(tmp_path / "trimmed.mp4", counter(60), codec_options={"g": "10", X264: "scenecut=0"})
    content = bytearray(path.read_bytes())
    edit = content.index(b"elst") + 12
    assert struct.unpack_from(">Ii", content, edit) == (2400, 1024)  # ms, and 1/12800 s
    struct.pack_into(">Ii", content, edit, 400, 1024 + 23 * 512)
    path.write_bytes(content)
    assert numbers_of(read_video(path, None)) == list(range(23, 33))
    assert numbers_of(read_video(path, 4)) == [23 + number for number in segment_indices(10, 4)]


def test_a_webm_file_that_ends_early(tmp_path):
    path = cut(write_video(tmp_path / "cut.webm", counter(60)), 0.7)
    decoded = len(decode_in_order(path))
    assert 5 < decoded < 60
    assert numbers_of(read_video(path, 4)) == segment_indices(decoded, 4).tolist()


@pytest.mark.parametrize("garbage", [0, 900])
@pytest.mark.parametrize("suffix, start", [(".mp4", b"mdat"), (".webm", b"\x1f\x43\xb6\x75")])
def test_a_video_stream_without_a_frame_that_can_be_decoded(tmp_path, suffix, start, garbage):
    """A good header, and in MP4 an index of 10 frames, with nothing or garbage behind it."""
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    path = write_video(tmp_path / f"none{suffix}", counter(10), **options)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(start) + 4] + b"\xff" * garbage)
    for frames in (4, None):
        with pytest.raises(MediaError, match=f"none{suffix} (cannot|has no frame that can) be decoded"):
            read_video(path, frames)


def test_a_video_that_changes_its_size_has_that_of_its_first_frame(tmp_path):
    """Two raw H.264 streams in one file."""
    path = tmp_path / "grows.mp4"
    parts = [write_video(tmp_path / f"{height}.h264", counter(8, height)).read_bytes() for height in (32, 64)]
    path.write_bytes(b"".join(parts))
    assert numbers_of(read_video(path, None)) == [*range(8), *range(8)]
    found = read_video(path, 4)
    assert found.shape == (4, 32, 48, 3) and numbers_of(found) == [1, 5, 1, 5]


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov"])
def test_the_frames_of_a_variable_rate_are_spread_over_time(tmp_path, suffix):
    """40 frames in the first 2 seconds, then one every second up to second 12."""
    times = [*range(0, 2000, 50), *range(2000, 12000, 1000)]
    path = write_video(tmp_path / f"a{suffix}", counter(50), times=times)
    found = numbers_of(read_video(path, 4))
    seconds = [times[number] / 1000 for number in found]
    assert found == choose_frames(np.diff([*times, times[-1] + 50]), 4)
    for segment, second in enumerate(seconds):  # each is on the screen in its quarter of the time
        assert 2.75 * segment - 1 <= second < 2.75 * (segment + 1) + 0.1


def test_a_phone_recording_of_variable_rate():
    with av.open(str(CASES / "vfr.mp4")) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    whole = read_video(CASES / "vfr.mp4", None)
    numbers = [next(n for n, frame in enumerate(whole) if np.array_equal(frame, one))
               for one in read_video(CASES / "vfr.mp4", 4)]
    assert times[-1] == 12 and [times[number] for number in numbers] == [0.75, 4, 7, 10]


# ---- what is seen ----------------------------------------------------------------------------------------------------


def test_colors_come_in_the_order_red_green_blue(tmp_path):
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[:, :, :16], frames[:, :, 16:32], frames[:, :, 32:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    for suffix in (".mp4", ".webm", ".avi"):
        found = read_video(write_video(tmp_path / f"a{suffix}", frames), 2)
        for left, color in ((2, (250, 0, 0)), (18, (0, 250, 0)), (34, (0, 0, 250))):
            assert np.abs(found[:, 4:28, left: left + 12].astype(int) - color).mean() < 8


def test_a_video_that_a_phone_filmed_on_its_side_is_upright():
    with av.open(str(CASES / "rot90.mp4")) as container:
        stored = [(frame.rotation, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    found = read_video(CASES / "rot90.mp4", None)
    assert found.shape == (20, 64, 48, 3) and stored[0][1].shape == (48, 64, 3)
    for frame, (rotation, pixels) in zip(found, stored, strict=True):
        assert np.array_equal(frame, np.rot90(pixels, rotation // 90))
    assert np.array_equal(read_video(CASES / "rot90.mp4", 4), found[segment_indices(20, 4)])


MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("a, b, c, d", MATRICES)
def test_all_quarter_turns_and_mirrorings(tmp_path, a, b, c, d):
    """The pixel at column p and row q is shown at column a p + c q and row b p + d q, up to a shift."""
    path = write_video(tmp_path / "a.mp4", moving(3))
    stored = read_video(path, None)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", content, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, matrix, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    rows, columns = np.mgrid[:64, :96]
    to_column, to_row = a * columns + c * rows, b * columns + d * rows
    to_column, to_row = to_column - to_column.min(), to_row - to_row.min()
    expected = np.zeros((3, to_row.max() + 1, to_column.max() + 1, 3), np.uint8)
    expected[:, to_row, to_column] = stored
    assert np.array_equal(read_video(path, None), expected)


def test_transparent_parts_of_a_webm_file_are_white():
    found = read_video(CASES / "alpha_vp9.webm", None)
    assert found.shape == (20, 48, 64, 3)
    assert np.array_equal(found[:, :3, :3], np.full((20, 3, 3, 3), 255))
    assert (found[:, :, :, 0] < 200).any() or (found[:, :, :, 1] < 200).any()  # and something opaque is there


@pytest.mark.parametrize("suffix, codec, pixel_format", [
    (".mov", "qtrle", "argb"), (".mov", "png", "rgba"), (".mov", "prores_ks", "yuva444p10le"),
    (".webm", "libvpx-vp9", "yuva420p"), (".webm", "libvpx", "yuva420p"), (".mkv", "ffv1", "bgra"),
])
def test_transparency_is_blended_with_white(tmp_path, suffix, codec, pixel_format):
    frames = np.zeros((6, 32, 48, 4), np.uint8)
    frames[:] = (0, 100, 200, 255)
    frames[:, :, 16:32, 3], frames[:, :, 32:, 3] = 51, 0
    options = {"auto-alt-ref": "0"} if codec.startswith("libvpx") else {}
    path = write_video(tmp_path / f"a{suffix}", frames, codec, pixel_format=pixel_format, codec_options=options)
    for found in (read_video(path, None), read_video(path, 2)):
        for left, color in ((2, (0, 100, 200)), (18, (204, 224, 244)), (34, (255, 255, 255))):
            assert np.abs(found[:, 4:28, left: left + 12].astype(int) - color).max() <= 12


@pytest.mark.parametrize("frames", [2, None])
def test_an_alpha_layer_that_cannot_be_decoded_does_not_turn_black(tmp_path, monkeypatch, frames):
    """The header of an HEVC file has a message (SEI) of the encoder; here it becomes the one about an alpha layer.
    FFmpeg decodes the color alone (before 8.0), or nothing (some files of Apple devices)."""
    path = write_video(tmp_path / "a.mp4", counter(8, 64, 96), "libx265")  # at 32 rows, x265 writes beyond its memory
    plain, message = path.read_bytes(), b"\x4e\x01\x05"
    assert len(read_video(path, frames)) == (frames or 8) and message in plain
    path.write_bytes(plain.replace(message, b"\x4e\x01\xa5"))
    with pytest.raises(MediaError, match="a.mp4 is HEVC with an alpha layer, which this FFmpeg cannot decode; convert"):
        read_video(path, frames)
    monkeypatch.setattr(video, "_decode_in_order", lambda *_: ({}, [], 0))
    monkeypatch.setattr(video, "read_timeline", lambda *_: video.Timeline([]))
    with pytest.raises(MediaError, match="a.mp4 is HEVC with an alpha layer"):
        read_video(path, frames)


@pytest.mark.parametrize("suffix, codec, pixel_format", [
    (".mov", "prores_ks", "yuv422p10le"), (".mov", "prores_ks", "yuv444p10le"), (".mov", "v210", "yuv422p10le"),
    (".mp4", "libx264", "yuv422p10le"), (".mkv", "ffv1", "gbrp12le"), (".webm", "libvpx-vp9", "yuv444p"),
    (".avi", "utvideo", "gbrp"), (".mov", "rawvideo", "yuyv422"),
])
def test_more_bits_and_more_colors_than_phones_write(tmp_path, suffix, codec, pixel_format):
    colors = np.array([(0, 100, 200), (220, 40, 60), (255, 255, 255)])
    frames = np.broadcast_to(colors.repeat(16, 0), (6, 32, 48, 3)).astype(np.uint8)
    path = write_video(tmp_path / f"a{suffix}", frames, codec, pixel_format=pixel_format)
    for found in (read_video(path, None), read_video(path, 2)):
        # The median: now and then FFmpeg's ProRes encoder writes a wrong pixel.
        assert np.abs(np.median(found[:, 4:28, 6::16], axis=1) - colors).max() <= 5


@pytest.mark.parametrize("transfer, codes", [(16, (0.0, 0.5081, 0.5807, 0.7518)), (18, (0.0, 0.6285, 0.75, 1.0))])
def test_hdr_is_tone_mapped(tmp_path, transfer, codes):
    """Four grays: black, half of reference white (PQ: 100 cd/m², HLG: 97), reference white (203) and 1000 cd/m²."""
    path = tmp_path / "hdr.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        luma = np.repeat(np.rint(64 + 876 * np.array(codes)), 16).astype(np.uint16)
        for _ in range(3):
            frame = av.VideoFrame(64, 32, "yuv420p10le")
            for plane, row in zip(frame.planes, (luma, np.full(32, 512, np.uint16), np.full(32, 512, np.uint16))):
                lines = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                lines[:, : len(row)] = row
                plane.update(lines)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for found in (read_video(path, None), read_video(path, 2)):
        levels = found[:, 16, 8::16].astype(int)
        assert np.ptp(levels, axis=2).max() <= 2  # gray
        assert np.abs(levels[:, :, 0] - [0, 186, 240, 254]).max() <= 4


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cover", [False, True])
def test_a_preview_image_before_the_video_is_passed_over(tmp_path, cover):
    """As a cover, or as a video stream of one frame."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        preview = container.add_stream("mjpeg", rate=1)
        stream = container.add_stream("libx264", rate=25)
        for each, height, width in ((preview, 16, 16), (stream, 32, 48)):
            each.height, each.width, each.pix_fmt = height, width, "yuvj420p" if each is preview else "yuv420p"
        if cover:
            preview.disposition = av.stream.Disposition.attached_pic
        for each, frames in ((preview, counter(1, 16, 16)), (stream, counter(40))):
            for array in frames:
                container.mux(each.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(each.encode())
    assert numbers_of(read_video(path, 4)) == [4, 14, 24, 34] and len(read_video(path, None)) == 40


def write_streams(path: Path, *kinds: str) -> Path:
    """A file of streams: "audio", "cover" (an image that belongs to the audio), "video" (a counter of 10 frames)."""
    with av.open(str(path), "w", format="matroska" if path.suffix == ".mkv" else None) as container:
        streams = []
        for kind in kinds:
            codec = {"audio": "aac", "cover": "mjpeg", "video": "libx264"}[kind]
            stream = container.add_stream(codec, rate=44100 if kind == "audio" else 10)
            if kind == "audio":
                stream.layout = "mono"
            else:
                stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p" if kind == "cover" else "yuv420p"
            if kind == "cover":
                stream.disposition = av.stream.Disposition.attached_pic
            streams.append(stream)
        for kind, stream in zip(kinds, streams):
            if kind == "audio":
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.rate = 44100
                container.mux(stream.encode(frame))
            else:
                for array in counter(10)[9:] if kind == "cover" else counter(10):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode())
    return path


def test_a_file_of_audio_alone(tmp_path):
    for path in (CASES / "audio_only.mp4", write_streams(tmp_path / "sound.mp4", "audio")):
        with pytest.raises(MediaError, match=rf"{path.name} has no video stream, only audio; download it again"):
            read_video(path, 4)


def test_the_cover_of_an_audio_file_is_no_video(tmp_path):
    with pytest.raises(MediaError, match=r"song\.mp4 has no video stream, only a cover image, audio"):
        read_video(write_streams(tmp_path / "song.mp4", "audio", "cover"), 4)
    path = write_streams(tmp_path / "clip.mp4", "audio", "cover", "video")
    assert numbers_of(read_video(path, 3)) == [1, 4, 7]


def test_audio_next_to_the_video_changes_nothing(tmp_path):
    assert numbers_of(read_video(write_streams(tmp_path / "a.mkv", "audio", "video"), 3)) == [1, 4, 7]
