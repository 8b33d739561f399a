"""Image files and animations (GIF, WebP, PNG, AVIF): Pillow decodes them, and this file makes them RGB on white."""

import io
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mplug2.data.frame_choice import choose_frames

# Detected by content: many ".jpg" files on the web are PNG. EPS is left out, as Pillow runs Ghostscript to read it.
PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000", "TGA", "DIB", "ICO", "PCX",
                  "SGI", "QOI", "DDS", "PSD")


def open_image(path: Path | str) -> Image.Image:
    return _open(_content(path))


def _content(path: Path | str) -> bytes:
    """One read: Pillow's many small reads and seeks are slow on network disks."""
    with open(path, "rb") as file:
        content = file.read()
    if content[12:16] == b"VP8X" and content[20] & 0x02:
        # Where the frames of a WebP animation leave their canvas empty, it is transparent. Pillow makes it black unless
        # the header declares transparency (bit 0x10).
        content = content[:20] + bytes([content[20] | 0x10]) + content[21:]
    return content


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=PILLOW_FORMATS)
    except UnidentifiedImageError as error:  # Pillow's message holds a memory address, which differs each time
        raise UnidentifiedImageError("its content has no image format that Pillow knows") from error


def frame_count(image: Image.Image) -> int:
    return getattr(image, "n_frames", 1) - _first(image)


def read_first(path: Path | str, min_side: int | None) -> np.ndarray:
    """The image, or the first frame of an animation: uint8 (H, W, 3), writable. `min_side` as in `media.read_image`."""
    with open_image(path) as image:
        if min_side and image.format in ("JPEG", "MPO"):
            image.draft(None, (min_side, min_side))  # only ever picks 1/1, 1/2, 1/4 or 1/8 that is not below
        if first := _first(image):
            image.seek(first)
        return np.array(to_rgb(image))


def read_animation(path: Path | str, frames: int | None, rng: np.random.Generator | None) -> np.ndarray:
    """The chosen frames of an animation: uint8 (t, H, W, 3)."""
    content = _content(path)
    with _open(content) as image:
        numbers = choose_frames(_durations(image.format, content, frame_count(image)), frames, rng)
        kept: dict[int, np.ndarray] = {}
        for number in numbers:
            if number not in kept:
                image.seek(_first(image) + number)
                kept[number] = to_rgb(image)
    return np.stack([kept[number] for number in numbers])


def to_rgb(image: Image.Image) -> np.ndarray:
    """The current frame, upright and on white: uint8 (H, W, 3)."""
    if image.getexif():
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion would clip it at 255
        levels = np.asarray(image)
        gray = np.where(levels == image.info.get("transparency", -1), 255, levels >> 8)
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = on_white(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image, composited over white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _first(image: Image.Image) -> int:
    """Number of the first frame. An animated PNG may start with a default image for viewers that show no animation."""
    return int(getattr(image, "default_image", False))


# ---- how long each frame of an animation is shown --------------------------------------------------------------------


def _durations(image_format: str, content: bytes, total: int) -> list[float]:
    """Duration of each of `total` frames in ms, read from the file's blocks: Pillow would have to decode all frames.

    If the blocks show another number of frames (a damaged file), all durations are equal. A frame of 10 ms or less is
    shown for 100 ms, as browsers do.
    """
    durations: list[float] = []
    if total > 1 and image_format in READERS:
        with suppress(IndexError, struct.error):  # the file ends early
            durations = READERS[image_format](content)
    return [shown if shown > 10 else 100 for shown in durations] if len(durations) == total else [1.0] * total


def _gif_durations(data: bytes) -> list[float]:
    """A graphic control extension (0x21 0xF9) holds the delay of the image descriptor (0x2C) that follows it."""

    def palette(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    durations, delay, position = [], 0, 13 + palette(data[10])
    while data[position] in (0x21, 0x2C):
        if data[position] == 0x2C:
            durations.append(10.0 * delay)
            delay, position = 0, position + 11 + palette(data[position + 9])
        else:
            if data[position + 1] == 0xF9:
                delay = data[position + 4] + 256 * data[position + 5]
            position += 2
        while data[position]:  # sub-blocks: a length byte and as many bytes; length 0 ends them
            position += 1 + data[position]
        position += 1
    return durations


def _webp_durations(data: bytes) -> list[float]:
    """Each ANMF chunk is a frame, its duration 24 bits at offset 12."""
    durations, position = [], 12
    while position < len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        if kind == b"ANMF":
            durations.append(float(struct.unpack_from("<I", data, position + 20)[0] & 0xFFFFFF))
        position += 8 + size + size % 2
    return durations


def _png_durations(data: bytes) -> list[float]:
    """Each fcTL chunk is a frame, its duration a fraction of a second at offset 20."""
    durations, position = [], 8
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"fcTL":
            numerator, denominator = struct.unpack_from(">HH", data, position + 28)
            durations.append(1000 * numerator / (denominator or 100))
        position += 12 + size
    return durations


READERS = {"GIF": _gif_durations, "WEBP": _webp_durations, "PNG": _png_durations}
