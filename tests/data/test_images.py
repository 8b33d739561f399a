"""Images and animations: what they decode to, and how long each frame of an animation is shown."""

import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_files import counter, numbers_of, write_animation

from mplug2.data import images
from mplug2.data.frame_choice import choose_frames
from mplug2.data.media import (
    ANIMATION_SUFFIXES,
    STILL_SUFFIXES,
    MediaError,
    kind_of,
    read_image,
    read_media,
    read_video,
    to_frames,
    to_pixels,
)

CASES = Path(__file__).parent / "media"
FORMATS = {".png": "PNG", ".gif": "GIF", ".webp": "WEBP"}


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def photoshop(image: Image.Image) -> bytes:
    """A PSD file of one flat image: three planes, not compressed. Pillow reads the format, but does not write it."""
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, image.height, image.width, 8, 3)
    return header + bytes(12) + bytes(2) + np.asarray(image).transpose(2, 0, 1).tobytes()


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", STILL_SUFFIXES + ANIMATION_SUFFIXES)
def test_every_image_format(tmp_path, suffix):
    path, image = tmp_path / f"image{suffix.upper()}", Image.new("RGB", (20, 16), (0, 255, 255))
    if suffix == ".psd":
        path.write_bytes(photoshop(image))
    else:
        names = {".dib": "DIB", ".jpe": "JPEG", ".avifs": "AVIF", ".sgi": "SGI", ".j2k": "JPEG2000"}
        save(path, image.convert("1" if suffix == ".pbm" else "RGB"),
             format=names.get(suffix) or Image.registered_extensions()[suffix],
             **({"sizes": [(20, 16)]} if suffix == ".ico" else {}))
    found = read_image(path)
    assert kind_of(path) == "image" and found.dtype == np.uint8 and found.shape == (1, 16, 20, 3)
    if suffix not in (".pbm", ".pgm"):  # black and white, gray
        assert np.abs(found.astype(int) - [0, 255, 255]).max() <= 3
    assert np.array_equal(read_media(path, 4), found) and found.flags.writeable


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
def test_every_kind_of_pixel_becomes_rgb_on_white(tmp_path, mode, color, expected):
    image = Image.new(mode, (5, 3), color)
    if mode == "P":
        image.putpalette([0] * 9 + [10, 20, 30])
    for suffix in (".png", ".tif"):
        found = read_image(save(tmp_path / f"image{suffix}", image))
        assert found.shape == (1, 3, 5, 3) and np.all(found == np.array(expected))


def test_transparent_palette_colors_and_cmyk(tmp_path):
    image = Image.new("P", (5, 3), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert np.all(read_image(save(tmp_path / "a.gif", image, transparency=1)) == 255)
    gray = read_image(save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 155))))
    assert gray.shape == (1, 8, 8, 3) and np.abs(gray.astype(int) - 100).max() <= 3


def test_a_transparent_level_of_16_bit_gray(tmp_path):
    """PNG may name one level that is transparent."""
    levels = np.full((3, 5), 0x4D00, np.uint16)
    levels[:, 2:] = 0x4D01
    path = save(tmp_path / "a.png", Image.fromarray(levels), transparency=0x4D01)
    content = path.read_bytes()
    if b"tRNS" not in content:  # Pillow reads this chunk, but writes it for 8 bits only
        chunk = b"tRNS" + struct.pack(">H", 0x4D01)
        at = content.index(b"IDAT") - 4
        path.write_bytes(content[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", crc32(chunk)) + content[at:])
    assert read_image(path)[0, :, :, 0].tolist() == [[0x4D, 0x4D, 255, 255, 255]] * 3


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (48, 32))
    image.paste((255, 255, 255), (0, 0, 48, 8))  # light at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    found = read_image(save(tmp_path / "turned.jpg", image, exif=exif))[0]
    assert found.shape == (48, 32, 3)
    assert found[:, -7:].min() > 240 and found[:, :23].max() < 15


def test_content_counts_not_the_suffix(tmp_path):
    """Many ".jpg" files on the web are PNG."""
    path = save(tmp_path / "image.jpg", Image.new("RGB", (5, 3), (1, 2, 3)), format="PNG")
    assert np.all(read_image(path) == np.array([1, 2, 3]))


def test_a_decompression_bomb(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(MediaError, match=r"bomb\.png is too large: .*10000 pixels.* Shrink it first"):
        read_image(path)


# ---- large photos ----------------------------------------------------------------------------------------------------


def photo(path: Path, content: str, width: int = 1600, height: int = 1200) -> Path:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if content == "edges":
        for _ in range(300):
            left, top, right, bottom = rng.integers(0, [width, height, 400, 400]).tolist()
            pixels[top: top + bottom + 5, left: left + right + 5] = rng.integers(0, 256, 3)
    return save(path, Image.fromarray(pixels), quality=90)


@pytest.mark.parametrize("size", [1, 100, 599, 600, 601, 1200, 5000])
def test_no_side_of_a_large_photo_falls_below_the_size_that_is_asked_for(tmp_path, size):
    found = read_image(photo(tmp_path / "a.jpg", "noise"), min_side=size)
    height, width = found.shape[1:3]
    assert (height, width) == {1: (150, 200), 100: (150, 200), 599: (600, 800), 600: (600, 800)}.get(size, (1200, 1600))


@pytest.mark.parametrize("content", ["edges", "noise"])
def test_a_photo_that_is_decoded_at_half_its_size_looks_the_same_to_the_model(tmp_path, content):
    """After resizing, the mean difference is 0.2 (edges) and 1.2 (noise, the worst case) of 255 levels."""
    path = photo(tmp_path / "a.jpg", content)
    whole, reduced = (to_frames(to_pixels(read_image(path, size), 224)).astype(int) for size in (None, 448))
    difference = np.abs(whole - reduced)
    assert 0 < difference.mean() < 1.5 and difference.max() <= 16


def test_only_jpeg_is_reduced_and_it_is_still_turned_upright(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    assert np.array_equal(read_image(save(tmp_path / "a.png", image), 8), read_image(tmp_path / "a.png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(save(tmp_path / "a.jpg", image, exif=exif), 30).shape == (1, 48, 32, 3)


# ---- animations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".apng", ".avif"])
def test_every_animation_gives_the_frames_that_are_chosen(tmp_path, suffix):
    path = write_animation(tmp_path / f"video{suffix}", counter(50))
    assert kind_of(path) == "video"
    for read in (read_video, read_media):
        assert numbers_of(read(path, 4)) == [5, 18, 30, 43]
    assert numbers_of(read_video(path, None)) == list(range(50))
    assert numbers_of(read_video(path, 52)) == [*range(50), 49, 49]
    if suffix != ".avif":  # the others are lossless
        assert np.array_equal(read_video(path, None), counter(50))


def test_an_animation_of_one_frame_is_an_image_and_as_a_video_it_repeats(tmp_path):
    for suffix in (".gif", ".webp", ".png", ".avif"):
        path = write_animation(tmp_path / f"still{suffix}", counter(3)[2:])
        assert kind_of(path) == "image"
        assert read_media(path, 4).shape == (1, 32, 48, 3)
        assert numbers_of(read_video(path, 4)) == [2, 2, 2, 2]


durations = st.lists(st.integers(2, 300).map(lambda hundredths: 10 * hundredths), min_size=2, max_size=12)


@given(st.sampled_from([".gif", ".webp", ".png"]), durations, st.booleans())
def test_durations_are_those_that_pillow_finds_by_decoding(tmp_path_factory, suffix, durations, palettes):
    path = tmp_path_factory.mktemp("animation") / f"a{suffix}"
    frames = counter(len(durations))
    if palettes and suffix == ".gif":  # each frame brings its own palette, and the file has a comment
        frames = frames + np.random.default_rng(0).integers(0, 4, frames.shape, dtype=np.uint8)
        write_animation(path, frames, durations, comment=b"x" * 700)
    else:
        write_animation(path, frames, durations)
    expected = []
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            expected.append(image.info["duration"])
    assert images._durations(FORMATS[suffix], path.read_bytes(), len(durations)) == expected
    chosen = choose_frames(durations, 3)
    assert np.array_equal(read_video(path, 3), frames[chosen])


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_long_frame_of_an_animation_fills_its_share_of_time(tmp_path, suffix):
    path = write_animation(tmp_path / f"slow{suffix}", counter(10), [100] * 9 + [8100])
    assert numbers_of(read_video(path, 5)) == [4, 9, 9, 9, 9]


def test_frames_without_a_duration_are_shown_for_100_ms_as_in_a_browser(tmp_path):
    path = write_animation(tmp_path / "a.gif", counter(6), [0, 0, 0, 0, 0, 500])
    assert images._durations("GIF", path.read_bytes(), 6) == [100] * 5 + [500]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("cut", [1, 30, 200])
def test_where_the_blocks_of_a_file_end_early_the_durations_are_equal(tmp_path, suffix, cut):
    content = write_animation(tmp_path / f"a{suffix}", counter(6), [100] * 5 + [9000]).read_bytes()[:-cut]
    found = images._durations(FORMATS[suffix], content, 7)
    assert found == [1] * 7


def test_the_default_image_of_an_animated_png_is_not_a_frame(tmp_path):
    path = CASES / "apng_default.png"
    assert kind_of(path) == "video" and len(read_video(path, None)) == 5
    assert not np.all(read_video(path, None) == 9, axis=(1, 2, 3)).any()  # the default image has gray level 9
    write_animation(tmp_path / "one.png", counter(3)[[0, 2]], default_image=True)
    assert kind_of(tmp_path / "one.png") == "image" and numbers_of(read_image(tmp_path / "one.png")) == [2]


def small_frames(path: Path, canvas: tuple[int, int], offset: tuple[int, int]) -> Path:
    """A WebP animation of two red frames, 8 x 8 pixels, opaque, on a larger canvas. Pillow cannot write such a file."""
    save(path, Image.new("RGB", (8, 8), (200, 0, 0)), lossless=True)
    frame = path.read_bytes()[12:]  # the chunk after the RIFF header

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def three(*values: int) -> bytes:
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    chunks = chunk(b"VP8X", bytes([2, 0, 0, 0]) + three(canvas[0] - 1, canvas[1] - 1)) + chunk(b"ANIM", bytes(6))
    for shift in (0, 2):
        place = three((offset[0] + shift) // 2, offset[1] // 2, 7, 7, 100)
        chunks += chunk(b"ANMF", place + b"\1" + frame)  # 1: clear the frame before the next one
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks)
    return path


def test_a_webp_animation_lies_on_white_where_it_does_not_cover_its_canvas(tmp_path):
    found = read_video(small_frames(tmp_path / "a.webp", (24, 16), (4, 2)), None)
    expected = np.full((2, 16, 24, 3), 255)
    for number in (0, 1):
        expected[number, 2: 10, 4 + 2 * number: 12 + 2 * number] = (200, 0, 0)
    assert np.array_equal(found, expected)
    assert np.array_equal(read_image(tmp_path / "a.webp")[0], expected[0])
