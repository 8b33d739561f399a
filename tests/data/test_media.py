"""Media: the readers of any file, the MediaError of each kind of bad file, and pixels for the vision encoder."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from video_files import CODECS, counter, numbers_of, write_animation, write_video

from mplug2.data.media import (
    ANIMATION_SUFFIXES,
    CLIP_MEAN,
    CLIP_STD,
    MEDIA_SUFFIXES,
    STILL_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaError,
    is_media,
    kind_of,
    normalize,
    read_image,
    read_media,
    read_video,
    to_frames,
    to_pixels,
)

CASES = Path(__file__).parent / "media"


def reader(suffix: str):
    return read_image if suffix in STILL_SUFFIXES else lambda path: read_video(path, 2)


# ---- what is a media file --------------------------------------------------------------------------------------------


def test_is_media_looks_at_the_name_alone():
    assert all(is_media(f"nowhere/video{suffix.upper()}") for suffix in MEDIA_SUFFIXES)
    assert not any(is_media(f"nowhere/._video{suffix}") for suffix in MEDIA_SUFFIXES)  # metadata files of macOS
    assert not any(is_media(name) for name in ("a.txt", "a", "a.mp3", "mp4", "a red three."))


def test_no_suffix_stands_for_two_kinds():
    assert len(set(MEDIA_SUFFIXES)) == len(MEDIA_SUFFIXES) and all(s == s.lower() for s in MEDIA_SUFFIXES)
    assert set(VIDEO_SUFFIXES) == set(CODECS)  # each is written and read by a test
    assert set(VIDEO_SUFFIXES) >= set(".m4v .mpg .mpeg .wmv .3gp .3g2 .mts .m2ts .ts .flv .ogv".split())
    assert {".jfif", ".tif", ".tiff"} <= set(STILL_SUFFIXES) and ".avif" in ANIMATION_SUFFIXES


@pytest.mark.parametrize("name", ["video.txt", "video", "video.mp3"])
def test_other_suffixes_are_refused(name):
    for read in (kind_of, read_image, lambda path: read_video(path, 4)):
        with pytest.raises(MediaError, match=rf"{name}: suffix '.*' is not that of an image or a video; convert"):
            read(name)


def test_a_file_without_a_suffix_is_what_its_content_says(tmp_path):
    Image.fromarray(counter(3)[2]).save(tmp_path / "still", format="PNG")
    write_animation(tmp_path / "moving.gif", counter(3)).rename(tmp_path / "moving")
    assert [kind_of(tmp_path / name) for name in ("still", "moving")] == ["image", "video"]
    assert numbers_of(read_media(tmp_path / "moving", 4)) == [0, 1, 2, 2]
    assert numbers_of(read_image(tmp_path / "still")) == [2]


def test_an_image_is_no_video_and_the_other_way_round(tmp_path):
    with pytest.raises(MediaError, match=r"a\.mp4 is a video, where an image was expected"):
        read_image(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"a\.jpg is a still image, where a video was expected"):
        read_video(tmp_path / "a.jpg", 4)


def test_reading_no_frames_is_a_mistake_of_the_caller(tmp_path):
    path = write_animation(tmp_path / "a.gif", counter(2))
    with pytest.raises(ValueError, match=r"frames=0: expected at least 1, or None") as caught:
        read_video(path, 0)
    assert not isinstance(caught.value, MediaError)


# ---- what is wrong with a file ---------------------------------------------------------------------------------------

HTML = b"\xef\xbb\xbf\r\n <!DOCTYPE html>\n<html><body>Sign in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".gif", ".png", ".avif", ".mp4", ".mkv", ".ts", ".wmv", ".h264"])
def test_what_a_file_is_in_place_of_an_image_or_a_video(tmp_path, suffix):
    expected = "a video" if suffix not in STILL_SUFFIXES else "an image"
    for name, content in [
        ("empty", b""), ("zeros", bytes(5000)), ("page", HTML), ("pointer", POINTER),
        ("xhtml", b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">\n<html lang="en">'),
        ("saved", b"<!-- saved from url -->\n<html>"), ("title", b"<TITLE>404</TITLE>"),
        ("json", b'{"error": "not found"}'),
        ("denied", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
        ("._mac", b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(4000)),
    ]:
        (tmp_path / f"{name}{suffix}").write_bytes(content)
    (tmp_path / f"folder{suffix}").mkdir()
    for name, problem in [
        ("missing", "does not exist; check its path"),
        ("empty", r"is empty \(0 bytes\); .* download it again"),
        ("zeros", r"(cannot be decoded \(.*\)|has no frame that can be decoded); it may be damaged"),
        ("folder", f"is a folder, not {expected}"),
        ("page", f"is an HTML page, not {expected}; .*download the file again"),
        *((name, "is an HTML page, not") for name in ("xhtml", "saved", "title")),
        ("json", f"is a JSON document, not {expected}; .*download the file again"),
        ("pointer", f"is a git-lfs pointer, not {expected}; fetch the content with `git lfs pull`"),
        ("denied", f"is an XML document, not {expected}; .*download the file again"),
        (r"\._mac", f"is a macOS metadata file .*, not {expected}; leave it out"),
    ]:
        path = tmp_path / f"{name}{suffix}".replace("\\", "")
        with pytest.raises(MediaError, match=f"{name}{suffix} {problem}") as caught:
            reader(suffix)(path)
        assert str(caught.value).startswith(str(tmp_path)) and str(caught.value).count(str(tmp_path)) == 1
        if suffix in ANIMATION_SUFFIXES:
            with pytest.raises(MediaError, match=f"{name}{suffix} .*"):
                kind_of(path)


@pytest.mark.parametrize("suffix", [".jpg", ".gif", ".png"])
def test_a_video_or_a_heic_photo_with_the_suffix_of_an_image(tmp_path, suffix):
    """GIFs of many web sites are MP4 files, and phones save HEIC photos."""
    path = tmp_path / f"a{suffix}"
    for start, problem in [
        (b"\0\0\0\x20ftypisom", r"is a video \(MP4 or WebM\), whatever its suffix says; rename it to .mp4"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\1\x42\xf7\x81", "is a video"),
        (b"\0\0\0\x18ftypheic", "is a HEIC photo, which Pillow does not read; convert it to JPEG"),
    ]:
        path.write_bytes(start + bytes(200))
        with pytest.raises(MediaError, match=f"a{suffix} {problem}"):
            reader(suffix)(path)
    path.write_bytes(b"\0\0\0\x18ftypcrx " + bytes(200))  # a raw photo: to rename it to .mp4 would not help
    with pytest.raises(MediaError, match=f"a{suffix} (?!is a video).*damaged"):
        reader(suffix)(path)


@pytest.mark.parametrize("suffix", [".jpg", ".gif", ".mp4"])
def test_a_link_that_leads_nowhere(tmp_path, suffix):
    for name, target in (("loop", f"loop{suffix}"), ("gone", "elsewhere")):
        (tmp_path / f"{name}{suffix}").symlink_to(target)
        with pytest.raises(MediaError, match=f"{name}{suffix} is a link to {target}, which does not exist"):
            reader(suffix)(tmp_path / f"{name}{suffix}")


def test_an_html_page_in_place_of_a_video():
    with pytest.raises(MediaError, match=r"html_named\.mp4 is an HTML page, not a video"):
        read_video(CASES / "html_named.mp4", 4)


def test_a_jpeg_file_that_ends_early(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(MediaError, match=r"a\.jpg cannot be decoded \(OSError: .*truncated.*\); it may be damaged"):
        read_image(tmp_path / "a.jpg")


def test_a_damaged_length_is_the_fault_of_the_file_but_a_lack_of_memory_is_not(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(bytes(100))
    for raised, expected in ((av.error.MemoryError(12, "Cannot allocate memory"), MediaError),
                             (MemoryError(), MemoryError)):
        monkeypatch.setattr(av, "open", Mock(side_effect=raised))
        with pytest.raises(expected) as caught:
            read_video(tmp_path / "a.mp4", 4)
        assert type(caught.value) is expected


DAMAGED = (".jpg", ".bmp", ".tif", ".gif", ".webp", ".png", ".avif", ".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts",
           ".mpg", ".flv", ".wmv", ".h264")


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    """A small good file of each format."""
    folder = tmp_path_factory.mktemp("good")
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for suffix in DAMAGED:
        path = folder / f"a{suffix}"
        if suffix in VIDEO_SUFFIXES:
            write_video(path, frames, codec_options={"g": "3"})
        elif suffix in ANIMATION_SUFFIXES:
            write_animation(path, frames)
        else:
            Image.fromarray(frames[0]).save(path)
    return {suffix: (folder / f"a{suffix}").read_bytes() for suffix in DAMAGED}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of corrupt EXIF
@given(
    suffix=st.sampled_from(DAMAGED),
    keep=st.floats(0.01, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_gives_frames_or_a_media_error_that_names_it(contents, tmp_path_factory, suffix, keep, changes):
    content = bytearray(contents[suffix])
    content = content[: int(len(content) * keep)]
    for place, change in changes:
        content[int(place * len(content))] ^= change
    path = tmp_path_factory.mktemp("damaged") / f"a{suffix}"
    path.write_bytes(content)
    try:
        found = read_image(path) if suffix in STILL_SUFFIXES else read_video(path, 4)
    except MediaError as error:
        assert str(path) in str(error)
    else:
        assert found.dtype == np.uint8 and found.ndim == 4 and found.shape[0] in (1, 4) and found.shape[3] == 3
    shutil.rmtree(path.parent)


# ---- pixels ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_to_frames_is_the_inverse_of_to_pixels_to_the_level(t, size, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (t, size, size, 3), dtype=np.uint8)
    frames.flags.writeable = False
    pixels = to_pixels(frames, size)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, t, size, size) and pixels.is_contiguous()
    assert np.array_equal(to_frames(pixels), frames)


def test_pixels_are_normalized_as_for_clip():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert (list(CLIP_MEAN), list(CLIP_STD)) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def test_normalizing_on_a_cpu_is_the_arithmetic_of_float32_to_the_bit():
    """In NumPy, for each of the 256 levels of each color, of images and of pairs of images."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = (np.arange(256, dtype=np.float32) / 255 - np.float32(CLIP_MEAN)[:, None]) / np.float32(CLIP_STD)[:, None]
    for shape in ((2, 3, 1, 16, 16), (2, 2, 3, 1, 16, 16)):
        found = normalize(levels.expand(shape))
        assert found.shape == shape
        assert all(np.array_equal(one, expected) for one in found.reshape(-1, 3, 256).numpy())


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
@settings(max_examples=20, deadline=None)
def test_to_pixels_normalizes_each_color(red, green, blue):
    pixels = to_pixels(np.full((1, 2, 2, 3), (red, green, blue), np.uint8), 2)
    for channel, level in enumerate((red, green, blue)):
        expected = (level / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(pixels[channel], torch.full((1, 2, 2), expected), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 3), st.integers(4, 50), st.integers(4, 50), st.integers(4, 50), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
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
