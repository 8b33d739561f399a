"""Images and animations: what they decode to, and how long each frame of an animation is shown."""

import struct
from pathlib import Path
from zlib import compress, crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_files import counter, numbers_of, write_animation

from mplug2.data import images
from mplug2.data.animations import durations as durations_of
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


def tiff(path: Path, levels: np.ndarray, orientation: int = 1) -> Path:
    """A TIFF file of gray levels of any type. Pillow reads more types than it writes."""
    kind = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    height, width = levels.shape
    tags = {256: width, 257: height, 258: 8 * levels.itemsize, 259: 1, 262: 1, 273: 8, 274: orientation, 277: 1,
            278: height, 279: levels.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + levels.nbytes) + levels.tobytes()
                     + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_gray_in_floating_point_goes_from_0_to_1(tmp_path):
    levels = np.float32([[0, 0.2, 1], [0.4, 0.6, 0.8]])
    assert read_image(tiff(tmp_path / "a.tif", levels))[0, :, :, 1].tolist() == [[0, 51, 255], [102, 153, 204]]
    turned = read_image(tiff(tmp_path / "b.tif", levels, orientation=3))
    assert turned[0, :, :, 0].tolist() == [[204, 153, 102], [255, 51, 0]]


@pytest.mark.parametrize("levels, message", [
    (np.float32([[0, 255]]), "floating point, from 0 to 255"), (np.float32([[-0.5, 0.5]]), "from -0.5 to 0.5"),
    (np.float32([[np.nan, 0.5]]), "floating point, from nan"), (np.int32([[0, 255]]), "signed integers, from 0 to 255"),
    (np.uint32([[0, 255]]), "32-bit"), (np.int16([[-9, 255]]), "signed integers, from -9 to 255"),
])
def test_gray_whose_white_is_not_known_is_refused(tmp_path, levels, message):
    path = tiff(tmp_path / "a.tif", levels)
    with pytest.raises(MediaError, match=rf"a\.tif has gray levels in .*{message}.*convert it to 8 or 16 bits"):
        read_image(path)


@pytest.mark.parametrize("transfer, codes", [(16, (0.0, 0.5081, 0.5807, 0.7518)), (18, (0.0, 0.6285, 0.75, 1.0))])
def test_hdr_images_are_tone_mapped_as_videos_are(tmp_path, transfer, codes):
    """Black, half of reference white, reference white and 1000 cd/m2, as in test_hdr_is_tone_mapped."""
    levels = np.rint(255 * np.repeat(np.array(codes), 16)).astype(np.uint8)
    image = Image.fromarray(np.repeat(levels[None], 64, axis=0)).convert("RGB")
    avif = save(tmp_path / "a.avif", image, quality=100, subsampling="4:4:4")
    standard = read_image(avif)[0]
    at = (content := avif.read_bytes()).index(b"colrnclx") + 8
    avif.write_bytes(content[:at] + struct.pack(">HH", 9, transfer) + content[at + 4:])
    png = save(tmp_path / "a.png", image)
    chunk = b"cICP" + bytes([9, transfer, 0, 1])
    content = png.read_bytes()
    png.write_bytes(content[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", crc32(chunk)) + content[33:])
    for path in (avif, png):
        found = read_image(path)[0, 20, 8::16].astype(int)
        assert np.abs(found - np.array([[0], [186], [240], [254]])).max() <= 4, path
    assert np.abs(standard[20, 8::16, 0].astype(int) - levels[8::16]).max() <= 3
    gain_map = save(tmp_path / "b.avif", image, quality=100).read_bytes()  # standard, with a second box for HDR
    second = struct.pack(">I", 20) + b"freecolrnclx" + struct.pack(">HH", 9, transfer)
    (tmp_path / "b.avif").write_bytes(gain_map + second)
    assert np.array_equal(read_image(tmp_path / "b.avif"), read_image(save(tmp_path / "c.avif", image, quality=100)))


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
    assert durations_of(FORMATS[suffix], path.read_bytes(), len(durations)) == expected
    chosen = choose_frames(durations, 3)
    assert np.array_equal(read_video(path, 3), frames[chosen])


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_long_frame_of_an_animation_fills_its_share_of_time(tmp_path, suffix):
    path = write_animation(tmp_path / f"slow{suffix}", counter(10), [100] * 9 + [8100])
    assert numbers_of(read_video(path, 5)) == [4, 9, 9, 9, 9]


def test_frames_without_a_duration_are_shown_for_100_ms_as_in_a_browser(tmp_path):
    path = write_animation(tmp_path / "a.gif", counter(6), [0, 0, 0, 0, 0, 500])
    assert durations_of("GIF", path.read_bytes(), 6) == [100] * 5 + [500]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("cut", [1, 30, 200])
def test_where_the_blocks_of_a_file_end_early_the_durations_are_equal(tmp_path, suffix, cut):
    content = write_animation(tmp_path / f"a{suffix}", counter(6), [100] * 5 + [9000]).read_bytes()[:-cut]
    found = durations_of(FORMATS[suffix], content, 7)
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


# ---- the canvas of an animation --------------------------------------------------------------------------------------

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)]
RED, GREEN, BLUE, DARK = range(4)
KEEP, CLEAR, RESTORE = 1, 2, 3


def gif(path: Path, canvas: tuple[int, int], *frames: tuple[np.ndarray, tuple[int, int], int], clear: int = -1) -> Path:
    """A GIF of frames: indices into COLORS, left and top, and disposal. The index `clear` is transparent."""
    content = b"GIF89a" + struct.pack("<2H3B", *canvas, 0x81, DARK, 0) + bytes(sum(COLORS, ()))
    for indices, (left, top), disposal in frames:
        bits = "".join(f"{code:03b}"[::-1] for index in indices.flat for code in (4, index)) + "101"  # 4: reset; 5: end
        data = bytes(int(bits[i: i + 8][::-1], 2) for i in range(0, len(bits), 8))
        parts = b"".join(bytes([len(data[i: i + 255])]) + data[i: i + 255] for i in range(0, len(data), 255))
        content += b"!\xf9\x04" + struct.pack("<BHBB", disposal << 2 | (clear >= 0), 10, max(clear, 0), 0)
        content += b"," + struct.pack("<4HB", left, top, *indices.shape[::-1], 0) + b"\2" + parts + b"\0"
    path.write_bytes(content + b";")
    return path


def apng(path: Path, canvas: tuple[int, int], *frames: tuple[np.ndarray, tuple[int, int], int], default=None) -> Path:
    """A PNG of frames in RGB or RGBA: pixels, left and top, and disposal. `default`: an image that is no frame."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    def packed(pixels: np.ndarray) -> bytes:
        return compress(b"".join(b"\0" + row.tobytes() for row in pixels))

    color = {3: 2, 4: 6}[frames[0][0].shape[2]]
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", *canvas, 8, color, 0, 0, 0))
    content += chunk(b"acTL", struct.pack(">2I", len(frames), 0))
    content += chunk(b"IDAT", packed(default)) if default is not None else b""
    for number, (pixels, (left, top), disposal) in enumerate(frames):
        content += chunk(b"fcTL", struct.pack(">5I2H2B", 2 * number, *pixels.shape[1::-1], left, top, 1, 10,
                                              disposal - 1, 0))
        data = packed(pixels)
        content += chunk(b"IDAT", data) if number == 0 and default is None else chunk(b"fdAT", bytes(4) + data)
    path.write_bytes(content + chunk(b"IEND", b""))
    return path


def flat(color: int, width: int, height: int) -> np.ndarray:
    return np.full((height, width), color)


def on_canvas(*patches: tuple[int, tuple[int, int], tuple[int, int]]) -> np.ndarray:
    """A white canvas, 12 x 8, with rectangles: color, left and top, width and height."""
    canvas = np.full((8, 12, 3), 255, np.uint8)
    for color, (left, top), (width, height) in patches:
        canvas[top: top + height, left: left + width] = COLORS[color]
    return canvas


FIRST, SECOND, THIRD = (flat(RED, 4, 4), (1, 2)), (flat(GREEN, 5, 4), (6, 1)), (flat(BLUE, 2, 2), (2, 3))
AFTER = {
    "keep": (KEEP, [(RED, (1, 2), (4, 4)), (GREEN, (6, 1), (5, 4))]), "clear": (CLEAR, []),
    "restore": (RESTORE, [(RED, (1, 2), (4, 4))]),
}
"""What is left below the third frame, if the first one stays, or is cleared, and the second is treated as named."""


@pytest.mark.parametrize("suffix", [".gif", ".png"])
@pytest.mark.parametrize("second, left", AFTER.values(), ids=AFTER)
def test_what_no_frame_covers_is_white(tmp_path, suffix, second, left):
    """As in browsers, whatever background color a GIF names, and without transparency in the frames."""
    steps = [(*FIRST, CLEAR if second == CLEAR else KEEP), (*SECOND, second), (*THIRD, KEEP)]
    if suffix == ".gif":
        path = gif(tmp_path / "a.gif", (12, 8), *steps)
    else:
        steps = [(np.uint8(COLORS)[indices], place, after) for indices, place, after in steps]
        path = apng(tmp_path / "a.png", (12, 8), *steps, default=np.full((8, 12, 3), 77, np.uint8))
    red, green, blue = (RED, (1, 2), (4, 4)), (GREEN, (6, 1), (5, 4)), (BLUE, (2, 3), (2, 2))
    expected = [on_canvas(red), on_canvas(*([red] if second != CLEAR else []), green), on_canvas(*left, blue)]
    assert np.array_equal(read_video(path, None), expected)
    assert np.array_equal(read_video(path, 2), [expected[0], expected[1]])
    assert np.array_equal(read_image(path)[0], expected[0])


def test_a_gif_of_one_frame_that_does_not_cover_its_canvas(tmp_path):
    path = gif(tmp_path / "a.gif", (12, 8), (*FIRST, KEEP))
    assert kind_of(path) == "image" and np.array_equal(read_image(path)[0], on_canvas((RED, (1, 2), (4, 4))))


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_what_a_frame_clears_is_white(tmp_path, suffix):
    steps = [(flat(RED, 12, 8), (0, 0), CLEAR), (*SECOND, KEEP)]
    if suffix == ".gif":
        path = gif(tmp_path / "a.gif", (12, 8), *steps)
    else:
        path = apng(tmp_path / "a.png", (12, 8), *((np.uint8(COLORS)[step[0]], *step[1:]) for step in steps))
    expected = [on_canvas((RED, (0, 0), (12, 8))), on_canvas((GREEN, (6, 1), (5, 4)))]
    assert np.array_equal(read_video(path, None), expected)


def test_a_transparent_pixel_shows_what_is_below_it_or_white(tmp_path):
    """The first frame of this GIF has no transparent pixel, but it declares the index, as the others do."""
    indices = flat(DARK, 12, 8)
    indices[2:4, :4] = BLUE
    steps = [(*FIRST, KEEP), (indices, (0, 0), KEEP)]
    expected = [on_canvas((RED, (1, 2), (4, 4))), on_canvas((RED, (1, 2), (4, 4)), (BLUE, (0, 2), (4, 2)))]
    path = gif(tmp_path / "a.gif", (12, 8), *steps, clear=DARK)
    assert np.array_equal(read_video(path, None), expected)
    content = path.read_bytes()
    at = content.index(b"!\xf9\x04") + 3
    path.write_bytes(content[:at] + bytes([content[at] & ~1]) + content[at + 1:])  # now the first one declares nothing
    assert np.array_equal(read_video(path, None), expected)


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_the_canvas_is_that_of_pillow_where_pillow_is_right(tmp_path, suffix, monkeypatch):
    frames = np.zeros((5, 16, 24, 4), np.uint8)
    for number, frame in enumerate(frames):
        frame[4: 12, 3 * number: 3 * number + 8] = (*COLORS[number % 3], 255)
    for disposal in (0, 1, 2):
        path = write_animation(tmp_path / f"{disposal}{suffix}", frames, disposal=disposal)
        found = []
        for exact in (False, True):
            monkeypatch.setattr(images, "is_exact", lambda *_, exact=exact: exact)
            found.append(read_video(path, None))
        assert np.array_equal(*found)


def test_a_canvas_is_turned_as_the_exif_data_of_its_file_say(tmp_path):
    path = apng(tmp_path / "a.png", (12, 8), *((np.uint8(COLORS)[step[0]], *step[1:]) for step in (
        (*FIRST, 1), (*SECOND, 2), (*THIRD, 1))))
    upright, content, exif = read_video(path, None), path.read_bytes(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", crc32(b"eXIf" + data))
    path.write_bytes(content[:33] + chunk + content[33:])
    assert np.array_equal(read_video(path, None), np.rot90(upright, -1, axes=(1, 2)))


def test_what_follows_the_first_image_of_a_file_may_be_damaged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    (first,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * entries, 10)  # the second page would be in the middle of nowhere
    (tmp_path / "a.tif").write_bytes(content)
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content, data = (tmp_path / "a.png").read_bytes(), bytes([9, 16, 0, 1])
    chunk = struct.pack(">I", 4) + b"cICP" + data + struct.pack(">I", crc32(b"cICP" + data))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    expected = read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:] + b"\n")
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)
