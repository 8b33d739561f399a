"""Image files and animations (GIF, WebP, PNG, AVIF): Pillow decodes them, and this file makes them RGB on white."""

import io
import struct
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mplug2.data.animations import CLEAR, RESTORE, Patch, durations, is_exact, patches, png_chunks
from mplug2.data.frame_choice import choose_frames
from mplug2.data.hdr import TRANSFERS, to_sdr
from mplug2.data.media_errors import UnclearImageError

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
    content = _content(path)
    with _open(content) as image:
        if min_side and image.format in ("JPEG", "MPO"):
            image.draft(None, (min_side, min_side))  # only ever picks 1/1, 1/2, 1/4 or 1/8 that is not below
        return np.array(_read(image, content, [0])[0])


def read_animation(path: Path | str, frames: int | None, rng: np.random.Generator | None) -> np.ndarray:
    """The chosen frames of an animation: uint8 (t, H, W, 3)."""
    content = _content(path)
    with _open(content) as image:
        numbers = choose_frames(durations(image.format, content, frame_count(image)), frames, rng)
        kept = _read(image, content, numbers)
    return np.stack([kept[number] for number in numbers])


def _read(image: Image.Image, content: bytes, numbers: Collection[int]) -> dict[int, np.ndarray]:
    """The frames with these numbers, in RGB."""
    transfer, first = _transfer(image.format, content), _first(image)
    may_differ = image.format == "GIF" or image.format == "PNG" and getattr(image, "is_animated", False)
    found = patches(image.format, content) if may_differ else []
    kept: dict[int, np.ndarray] = {}
    if found and len(found) == frame_count(image) and not is_exact(
            image.format, image.mode, first > 0, image.size, found):
        for number, canvas in enumerate(islice(_compose(image.size, found), max(numbers) + 1)):
            if number in numbers:
                canvas.info |= {"exif": exif.tobytes()} if (exif := image.getexif()) else {}  # it may lie on its side
                kept[number] = to_rgb(canvas, transfer)
        return kept
    for number in sorted(set(numbers)):
        if first + number:  # PSD files know no number 0
            image.seek(first + number)
        kept[number] = to_rgb(image, transfer)
    return kept


def _compose(size: tuple[int, int], frames: Sequence[Patch]) -> Iterator[Image.Image]:
    """The canvas, RGBA, with each frame: transparent where no frame has drawn yet."""
    canvas = Image.new("RGBA", size)
    for frame in frames:
        with _open(frame.file) as patch:
            gray = patch.mode.startswith("I")  # of 16 bits
            drawn = (Image.fromarray(to_rgb(patch)) if gray else patch).convert("RGBA")
        before = canvas.copy()
        if frame.over:
            canvas.alpha_composite(drawn, frame.box[:2])
        else:
            canvas.paste(drawn, frame.box[:2])
        yield canvas.copy()
        if frame.after == CLEAR:
            canvas.paste((0, 0, 0, 0), frame.box)
        elif frame.after == RESTORE:
            canvas = before


def to_rgb(image: Image.Image, transfer: str | None = None) -> np.ndarray:
    """The current frame, upright, on white, and in standard dynamic range: uint8 (H, W, 3).

    Gray of 16 bits is scaled by its range, 65,536 levels, and gray in floating point by its convention: 0 is black and
    1 is white. UnclearImageError for other gray, whose range is anyone's guess.
    """
    unclear = image.mode == "F" or (image.mode == "I" and image.format == "TIFF")
    if image.getexif():
        image = ImageOps.exif_transpose(image)
    if unclear:
        levels = np.asarray(image)
        low, high = levels.min(), levels.max()
        if image.mode == "I" or not 0 <= low <= high <= 1:
            kind = "32-bit or signed integers" if image.mode == "I" else "floating point"
            raise UnclearImageError(f"has gray levels in {kind}, from {low:g} to {high:g}, and does not say which of "
                                    "them is white; convert it to 8 or 16 bits, or to floating point from 0 to 1")
        image = Image.fromarray(np.rint(255 * levels).astype(np.uint8))
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion would clip it at 255
        levels = np.asarray(image)
        gray = np.where(levels == image.info.get("transparency", -1), 255, levels >> 8)
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    if transfer:  # Pillow has made the codes 8 bits
        light = to_sdr(np.asarray(image.convert("RGB")) * np.uint16(257), transfer)
        opaque = image.convert("RGBA").getchannel("A")
        image = Image.fromarray(light)
        image.putalpha(opaque)
    if image.has_transparency_data:
        image = on_white(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _transfer(image_format: str | None, content: bytes) -> str | None:
    """The curve of an HDR image ("pq" or "hlg"), from a PNG's chunk cICP or an AVIF's box colr.

    An AVIF with a gain map has two of these boxes. Pillow reads its base image, in standard dynamic range.
    """
    found = set()
    if image_format == "AVIF":
        found = {struct.unpack_from(">H", rest, 2)[0] for rest in content.split(b"colrnclx")[1:] if len(rest) >= 4}
    elif image_format == "PNG" and b"cICP" in content[:1000]:
        found = {chunk[1] for kind, chunk in png_chunks(content) if kind == b"cICP" and len(chunk) == 4}
    return TRANSFERS.get(found.pop()) if len(found) == 1 else None


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image, composited over white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _first(image: Image.Image) -> int:
    """Number of the first frame. An animated PNG may start with a default image for viewers that show no animation."""
    return int(getattr(image, "default_image", False))
