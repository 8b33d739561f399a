"""Media: which frames are picked, what they decode to, and the MediaError of each kind of bad file.

The videos count: frame k shows k as two gray levels, k // 20 on the left and k % 20 on the right. The levels lie far
enough apart for every codec here.
"""

import gc
import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mplug2.data import media
from mplug2.data.media import (
    CLIP_MEAN,
    CLIP_STD,
    MediaError,
    is_media,
    kind_of,
    read_image,
    read_media,
    read_video,
    segment_indices,
    to_frames,
    to_pixels,
)

CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}
STEP = 12  # gray levels between two neighboring digits; 20 digits


def counter(total: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 (total, height, width, 3)."""
    frames = np.zeros((total, height, width, 3), np.uint8)
    numbers = np.arange(total)[:, None, None, None]
    frames[:, :, : width // 2] = numbers // 20 * STEP
    frames[:, :, width // 2:] = numbers % 20 * STEP
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    """The number that each frame of a counter video shows."""
    quarter = frames.shape[2] // 4
    left = frames[:, :, :quarter].mean(axis=(1, 2, 3)) / STEP
    right = frames[:, :, -quarter:].mean(axis=(1, 2, 3)) / STEP
    return [round(a) * 20 + round(b) for a, b in zip(left, right, strict=True)]


def write_video(path: Path, frames: np.ndarray, **options: str) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(CODECS[path.suffix], rate=Fraction(10))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_animation(path: Path, frames: np.ndarray) -> Path:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(
        path, save_all=True, append_images=rest, duration=100, **({"lossless": True} if path.suffix == ".webp" else {})
    )
    return path


def cut(path: Path, fraction: float) -> Path:
    """Keep the first part of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_closing():
    """imageio collects garbage whenever it closes a video. Exclude all objects that exist already, to save time."""
    gc.freeze()
    yield
    gc.unfreeze()


# ---- which frames ----------------------------------------------------------------------------------------------------

seeds = st.none() | st.integers(0, 2**32)


def generator(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


@given(st.integers(1, 500), st.integers(1, 40), seeds)
@settings(max_examples=200, deadline=None)
def test_one_frame_of_each_equal_segment(total, frames, seed):
    numbers = segment_indices(total, frames, generator(seed))
    assert numbers.shape == (frames,)
    if total < frames:
        assert numbers.tolist() == [*range(total), *[total - 1] * (frames - total)]
    else:
        for segment, number in enumerate(numbers.tolist()):  # exact, in integers
            assert segment * total // frames <= number < (segment + 1) * total // frames


@given(st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_without_a_generator_it_is_the_middle_and_with_one_any_frame_of_the_segment(length, frames):
    """In segments of `length` frames, the middle one has as many frames before it as behind it, or one fewer."""
    starts = np.arange(frames) * length
    assert segment_indices(length * frames, frames).tolist() == (starts + (length - 1) // 2).tolist()
    rng = np.random.default_rng(0)
    drawn = {int(segment_indices(length * frames, frames, rng)[-1]) - int(starts[-1]) for _ in range(20 * length)}
    assert min(drawn) == 0 and max(drawn) == length - 1


@pytest.mark.parametrize("total, frames", [(0, 4), (4, 0), (4, -1)])
def test_no_frames_are_refused(total, frames):
    with pytest.raises(ValueError, match=f"{frames} of {total} frames: expected"):
        segment_indices(total, frames)


def test_reading_no_frames_is_the_callers_mistake_not_the_files(tmp_path):
    path = write_animation(tmp_path / "a.gif", counter(2))
    with pytest.raises(ValueError, match=r"frames=0: expected at least 1, or None") as caught:
        read_video(path, 0)
    assert not isinstance(caught.value, MediaError)


# ---- videos ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A video of 50 frames in every format, and one of 300."""
    folder = tmp_path_factory.mktemp("media")
    for suffix in media.ANIMATION_SUFFIXES:
        write_animation(folder / f"clip{suffix}", counter(50))
    for suffix in media.VIDEO_SUFFIXES:
        write_video(folder / f"clip{suffix}", counter(50))
    write_video(folder / "long.mp4", counter(300))
    return folder


@pytest.mark.parametrize("suffix", media.ANIMATION_SUFFIXES + media.VIDEO_SUFFIXES)
def test_every_format_gives_the_frames_that_are_picked(folder, suffix):
    path = folder / f"clip{suffix}"
    assert kind_of(path) == "video"
    for read in (read_video, read_media):
        clip = read(path, 4)
        assert clip.dtype == np.uint8 and clip.shape == (4, 32, 48, 3)
        assert numbers_of(clip) == segment_indices(50, 4).tolist()
        assert (
            numbers_of(read(path, 8, np.random.default_rng(3)))
            == segment_indices(50, 8, np.random.default_rng(3)).tolist()
        )
    assert numbers_of(read_video(path, None)) == list(range(50))
    assert numbers_of(read_video(path, 52)) == [*range(50), 49, 49]
    if suffix in media.ANIMATION_SUFFIXES:
        assert np.array_equal(read_video(path, None), counter(50))


def test_four_frames_of_300(folder):
    assert numbers_of(read_video(folder / "long.mp4", 4)) == [37, 112, 187, 262]


def test_decoding_stops_at_the_last_wanted_frame(tmp_path, monkeypatch):
    """It never comes to the damage behind it. And only the wanted frames become arrays."""
    path = write_video(tmp_path / "long.mp4", counter(300), movflags="faststart")
    content = path.read_bytes()
    keep = len(content) * 4 // 5
    path.write_bytes(content[:keep] + b"\xff" * (len(content) - keep))
    decode, converted = media._decode, []

    def spy(*args):
        for frame in decode(*args):
            converted.append(frame)
            yield frame

    monkeypatch.setattr(media, "_decode", spy)
    with media._open_video(path) as file:
        media._pick(file, 40, 2, None)
        assert numbers_of(np.stack(converted)) == [9, 29]
    with media._open_video(path) as file, pytest.raises(av.FFmpegError):
        media._pick(file, 300, 1, np.random.default_rng(2))  # frame 251


def test_a_promise_of_too_many_frames_is_found_out(tmp_path):
    """The index of this file, at its head, lists 60 frames; the file ends before the last of them."""
    noise = (
        np.random.default_rng(0).integers(0, 2, (60, 32, 48, 3), dtype=np.uint8) * 4
    )  # else all the weight is in front
    path = write_video(tmp_path / "cut.mp4", counter(60) + noise, movflags="faststart", preset="ultrafast")
    content = path.read_bytes()
    for fraction in (0.8, 0.45):
        path.write_bytes(content[: int(len(content) * fraction)])
        decoded = media._count(path)
        assert 0 < decoded < 55
        if fraction == 0.8:
            assert numbers_of(read_video(path, 5)) == segment_indices(decoded, 5).tolist()
            assert numbers_of(read_video(path, None)) == list(range(decoded))
        else:
            for frames in (5, None):
                with pytest.raises(
                    MediaError, match=f"cut.mp4 promises 60 frames, but only {decoded} could be decoded"
                ):
                    read_video(path, frames)


def test_a_whole_file_whose_head_promises_too_many_frames(tmp_path):
    """The stream header (strh) of AVI has a length, in frames."""
    path = write_video(tmp_path / "liar.avi", counter(30))
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 8 + 32
    assert struct.unpack_from("<I", content, length) == (30,)
    for promise in (60, 61):
        struct.pack_into("<I", content, length, promise)
        path.write_bytes(content)
        if promise == 60:
            assert numbers_of(read_video(path, 4)) == segment_indices(30, 4).tolist()
            assert numbers_of(read_video(path, None)) == list(range(30))
        else:
            with pytest.raises(MediaError, match="liar.avi promises 61 frames, but only 30 could be decoded"):
                read_video(path, 4)


def test_a_file_that_promises_nothing_is_counted_also_when_cut(tmp_path):
    path = write_video(tmp_path / "cut.webm", counter(60))
    assert numbers_of(read_video(path, 4)) == segment_indices(60, 4).tolist()
    cut(path, 0.7)
    decoded = media._count(path)
    assert 5 < decoded < 60
    assert numbers_of(read_video(path, 4)) == segment_indices(decoded, 4).tolist()


def test_a_gif_of_one_frame_is_an_image_and_as_a_clip_repeats(tmp_path):
    path = write_animation(tmp_path / "still.gif", counter(3)[2:])
    assert kind_of(path) == "image"
    assert read_media(path, 4).shape == (1, 32, 48, 3)
    assert numbers_of(read_video(path, 4)) == [2, 2, 2, 2]


def test_a_file_name_is_not_taken_for_an_address(folder, tmp_path, monkeypatch):
    """To imageio, the text "<video0>" is a camera."""
    (tmp_path / "<video0>.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert read_video("<video0>.mp4", 4).shape == (4, 32, 48, 3)


# ---- images ----------------------------------------------------------------------------------------------------------


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", media.STILL_SUFFIXES + media.ANIMATION_SUFFIXES)
def test_every_image_format(tmp_path, suffix):
    path = save(tmp_path / f"picture{suffix.upper()}", Image.new("RGB", (6, 4), (0, 255, 255)))
    picture = read_image(path)
    assert kind_of(path) == "image" and picture.dtype == np.uint8 and picture.shape == (1, 4, 6, 3)
    assert np.abs(picture.astype(int) - [0, 255, 255]).max() <= 3
    assert np.array_equal(read_media(path, 4), picture) and picture.flags.writeable


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 0), (255, 255, 255)),
        ("P", 3, (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
        ("I;16", 0x4D00, (0x4D, 0x4D, 0x4D)),
        ("I;16", 0xFFFF, (255, 255, 255)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb_over_white(tmp_path, mode, color, expected):
    image = Image.new(mode, (5, 3), color)
    if mode == "P":
        image.putpalette([0] * 9 + [10, 20, 30])
    picture = read_image(save(tmp_path / "picture.png", image))
    assert picture.shape == (1, 3, 5, 3) and np.all(picture == np.array(expected))


def test_transparent_palette_colors_and_cmyk(tmp_path):
    image = Image.new("P", (5, 3), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert np.all(read_image(save(tmp_path / "a.gif", image, transparency=1)) == 255)
    gray = read_image(save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 155))))
    assert gray.shape == (1, 8, 8, 3) and np.abs(gray.astype(int) - 100).max() <= 3


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (48, 32))
    image.paste((255, 255, 255), (0, 0, 48, 8))  # light at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    picture = read_image(save(tmp_path / "turned.jpg", image, exif=exif))[0]
    assert picture.shape == (48, 32, 3)
    assert picture[:, -7:].min() > 240 and picture[:, :23].max() < 15


def test_content_counts_not_the_suffix(tmp_path):
    """Many a .jpg of the web is a PNG."""
    path = save(tmp_path / "picture.jpg", Image.new("RGB", (5, 3), (1, 2, 3)), format="PNG")
    assert np.all(read_image(path) == np.array([1, 2, 3]))


# ---- what is wrong with a file ---------------------------------------------------------------------------------------

ALL = media.MEDIA_SUFFIXES


@pytest.mark.parametrize("suffix", ALL)
def test_missing_empty_zeroed_and_folder(tmp_path, suffix):
    (tmp_path / f"empty{suffix}").touch()
    (tmp_path / f"zeros{suffix}").write_bytes(bytes(5000))
    (tmp_path / f"folder{suffix}").mkdir()
    read = read_image if suffix in media.STILL_SUFFIXES else lambda path: read_video(path, 2)
    for name, problem in [
        ("missing", "does not exist; check the path"),
        ("empty", r"is empty \(0 bytes\); .* download it again"),
        ("zeros", r"cannot be decoded \(.*\); it may be damaged"),
        ("folder", "is a folder"),
    ]:
        with pytest.raises(MediaError, match=f"{name}{suffix} {problem}") as caught:
            read(tmp_path / f"{name}{suffix}")
        assert str(caught.value).startswith(str(tmp_path))
        if suffix in media.ANIMATION_SUFFIXES:
            with pytest.raises(MediaError, match=f"{name}{suffix} {problem}"):
                kind_of(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("name", ["clip.txt", "clip", "clip.mp3"])
def test_unsupported_suffixes_are_listed(name):
    assert not is_media(name)
    for read in (kind_of, read_image, lambda path: read_video(path, 4)):
        with pytest.raises(
            MediaError, match=rf"{name}: suffix '.*' cannot be read; convert it to one of \.jpg, .*\.mov"
        ):
            read(name)


def test_is_media_goes_by_suffix_alone():
    assert all(is_media(f"nowhere/clip{suffix.upper()}") for suffix in ALL)


def test_a_picture_is_no_video_and_the_other_way_round(tmp_path):
    with pytest.raises(MediaError, match=r"a\.mp4 is a video, where an image was expected"):
        read_image(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"a\.jpg is a still image, where a video was expected"):
        read_video(tmp_path / "a.jpg", 4)


def test_a_file_of_sound_alone(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match=r"sound\.mp4 cannot be decoded \(.*not what its suffix says"):
        read_video(path, 4)


@pytest.mark.parametrize("garbage", [0, 900])
@pytest.mark.parametrize(
    "suffix, start, problem",
    [(".mp4", b"mdat", "cannot be decoded"), (".webm", b"\x1f\x43\xb6\x75", "has no frame that can be decoded")],
)
def test_a_video_stream_without_a_frame_that_can_be_decoded(tmp_path, suffix, start, problem, garbage):
    """A good head, and in MP4 an index of 10 frames, with nothing or garbage behind it."""
    path = write_video(tmp_path / f"none{suffix}", counter(10), **{"movflags": "faststart"} if suffix == ".mp4" else {})
    content = path.read_bytes()
    path.write_bytes(content[: content.index(start) + 4] + b"\xff" * garbage)
    for frames in (4, None):
        with pytest.raises(MediaError, match=f"none{suffix} {problem}"):
            read_video(path, frames)


def test_a_video_that_changes_its_size_has_that_of_its_first_frame(tmp_path):
    """Two raw H.264 streams, one behind the other, in one file: FFmpeg tells by content."""
    path = tmp_path / "grows.mp4"
    parts = []
    for height in (32, 64):
        part = io.BytesIO()
        with av.open(part, "w", format="h264") as container:
            stream = container.add_stream("libx264", rate=Fraction(10))
            stream.height, stream.width, stream.pix_fmt = height, 48, "yuv420p"
            for frame in counter(8, height=height):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        parts.append(part.getvalue())
    path.write_bytes(b"".join(parts))
    assert numbers_of(read_video(path, None)) == [*range(8), *range(8)]
    clip = read_video(path, 4)
    assert clip.shape == (4, 32, 48, 3) and numbers_of(clip) == [1, 5, 1, 5]


def test_a_decompression_bomb(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(MediaError, match=r"bomb\.png is too large: .*10000 pixels.* Shrink it first"):
        read_image(path)


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """A small good file of each format."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    contents = {}
    for suffix in ALL:
        file = io.BytesIO()
        if suffix in CODECS:
            with av.open(file, "w", format={".mkv": "matroska"}.get(suffix, suffix[1:])) as container:
                stream = container.add_stream(CODECS[suffix], rate=Fraction(10))
                stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
        else:
            first, *rest = map(Image.fromarray, frames)
            name = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:].upper())
            first.save(
                file,
                format=name,
                **({"save_all": True, "append_images": rest} if suffix in media.ANIMATION_SUFFIXES else {}),
            )
        contents[suffix] = file.getvalue()
    return contents


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of corrupt EXIF
@given(
    suffix=st.sampled_from(ALL),
    keep=st.floats(0.01, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
)
@settings(max_examples=120, deadline=None)
def test_a_damaged_file_is_a_clip_or_a_media_error_that_names_it(contents, tmp_path_factory, suffix, keep, changes):
    content = bytearray(contents[suffix])
    content = content[: int(len(content) * keep)]
    for place, change in changes:
        content[int(place * len(content))] ^= change
    path = tmp_path_factory.mktemp("damaged") / f"clip{suffix}"
    path.write_bytes(content)
    try:
        clip = read_image(path) if suffix in media.STILL_SUFFIXES else read_video(path, 4)
    except MediaError as error:
        assert str(path) in str(error)
    else:
        assert clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[0] in (1, 4) and clip.shape[3] == 3


# ---- pixels ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_to_frames_is_the_inverse_of_to_pixels_to_the_level(t, size, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (t, size, size, 3), dtype=np.uint8)
    frames.flags.writeable = False
    pixels = to_pixels(frames, size)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, t, size, size) and pixels.is_contiguous()
    assert np.array_equal(to_frames(pixels), frames)


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
@settings(max_examples=50, deadline=None)
def test_to_pixels_normalizes_each_color(red, green, blue):
    pixels = to_pixels(np.full((1, 2, 2, 3), (red, green, blue), np.uint8), 2)
    for channel, level in enumerate((red, green, blue)):
        expected = (level / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(pixels[channel], torch.full((1, 2, 2), expected), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 3), st.integers(4, 50), st.integers(4, 50), st.integers(4, 50), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_resizing_each_frame_by_itself_and_as_pillow_does(t, height, width, size, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (t, height, width, 3), dtype=np.uint8)
    resized = to_frames(to_pixels(frames, size))
    assert resized.shape == (t, size, size, 3)
    for frame, found in zip(frames, resized, strict=True):
        expected = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
        assert np.array_equal(found, np.asarray(expected))


def test_to_frames_clips_what_is_no_color():
    pixels = torch.stack([torch.full((1, 2, 2), value) for value in (-100.0, 0.0, 100.0)])
    levels = to_frames(pixels)[0, 0, 0].tolist()
    assert levels == [0, round(CLIP_MEAN[1] * 255), 255]


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 4, 4, 3)),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 3, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_to_pixels_takes_clips_of_bytes_only(frames):
    with pytest.raises(ValueError, match=r"expected uint8 frames of shape \(t, H, W, 3\)"):
        to_pixels(frames, 4)
