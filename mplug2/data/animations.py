"""What the blocks of a GIF, WebP or PNG animation say: how long each frame is shown, and where it lies on the canvas.

Pillow decodes the pixels. It would have to decode all frames to find the durations, and it makes some parts of a canvas
black that are transparent, as every browser shows: see `is_exact`.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

CLEAR, RESTORE = "clear", "restore"


@dataclass(frozen=True)
class Patch:
    """A frame as the file stores it: a rectangle of the canvas."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom, in pixels of the canvas."""
    file: bytes
    """An image file of this rectangle alone."""
    after: Literal["", "clear", "restore"]
    """What happens to the rectangle before the next frame: it stays, becomes transparent, or is again as before."""
    over: bool = True
    """Whether the canvas shows through transparent pixels. Otherwise they replace it."""
    transparent: bool = True
    """Whether a GIF declares transparent pixels."""


def patches(image_format: str | None, content: bytes) -> list[Patch]:
    """The frames of a GIF or PNG file; empty for other formats, and for a file that ends early."""
    with suppress(IndexError, struct.error):
        return list({"GIF": _gif_patches, "PNG": _png_patches}.get(image_format, lambda _: ())(content))
    return []


def is_exact(image_format: str, mode: str, default_image: bool, size: tuple[int, int], found: Sequence[Patch]) -> bool:
    """Whether Pillow certainly shows these frames right. Where nothing is drawn, it makes the canvas black, or of the
    background color, unless a GIF declares transparency or the pixels of a PNG have alpha; and it draws the first frame
    of a PNG over the default image."""
    if image_format == "GIF":
        return len(found) == 1 and (found[0].transparent or found[0].box == (0, 0, *size))
    cleared = any(patch.after == CLEAR for patch in found)
    return not default_image and (mode in ("RGBA", "LA") or not cleared)


def durations(image_format: str | None, content: bytes, total: int) -> list[float]:
    """Duration of each of `total` frames in ms.

    If the blocks show another number of frames (a damaged file), all durations are equal. A frame of 10 ms or less is
    shown for 100 ms, as browsers do.
    """
    found: list[float] = []
    if total > 1 and image_format in READERS:
        with suppress(IndexError, struct.error):  # the file ends early
            found = READERS[image_format](content)
    return [shown if shown > 10 else 100 for shown in found] if len(found) == total else [1.0] * total


# ---- GIF -------------------------------------------------------------------------------------------------------------


def _palette_size(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_blocks(data: bytes) -> Iterator[bytes]:
    """Every extension (0x21) and image (0x2C), with its sub-blocks: a length byte and as many bytes, until length 0."""
    position = 13 + _palette_size(data[10])
    while data[position] in (0x21, 0x2C):
        start = position
        position += 2 if data[start] == 0x21 else 11 + _palette_size(data[start + 9])
        while data[position]:
            position += 1 + data[position]
        position += 1
        yield data[start:position]


def _gif_images(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every image, and the graphic control extension (0x21 0xF9) before it; 8 zeros without one."""
    control = bytes(8)
    for block in _gif_blocks(data):
        if block[0] == 0x2C:
            yield block, control
            control = bytes(8)
        elif block[1] == 0xF9:
            control = block


def _gif_durations(data: bytes) -> list[float]:
    return [10.0 * struct.unpack_from("<H", control, 4)[0] for _, control in _gif_images(data)]


def _gif_patches(data: bytes) -> Iterator[Patch]:
    for block, control in _gif_images(data):
        left, top, width, height = struct.unpack_from("<4H", block, 1)
        start = data[:6] + struct.pack("<2H", width, height) + data[10: 13 + _palette_size(data[10])]
        image = block[:1] + bytes(4) + block[5:]
        file = start + (control if control[0] else b"") + image + b";"
        after = {2: CLEAR, 3: RESTORE}.get(control[3] >> 2 & 7, "")
        yield Patch((left, top, left + width, top + height), file, after, transparent=bool(control[3] & 1))


# ---- PNG -------------------------------------------------------------------------------------------------------------


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 8
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        yield kind, data[position + 8: position + 8 + size]
        position += 12 + size


def _png_durations(data: bytes) -> list[float]:
    """Each fcTL chunk is a frame, its duration a fraction of a second."""
    fractions = [struct.unpack_from(">HH", chunk, 20) for kind, chunk in png_chunks(data) if kind == b"fcTL"]
    return [1000 * numerator / (denominator or 100) for numerator, denominator in fractions]


def _png_patches(data: bytes) -> Iterator[Patch]:
    """The pixels of a frame are in the IDAT or fdAT chunks after its fcTL chunk."""
    common, header, frames = [], b"", []
    for kind, chunk in png_chunks(data):
        if kind == b"IHDR":
            header = chunk
        elif kind == b"fcTL":
            frames.append((chunk, []))
        elif kind in (b"IDAT", b"fdAT") and frames:
            frames[-1][1].append(chunk if kind == b"IDAT" else chunk[4:])
        elif kind in (b"PLTE", b"tRNS"):
            common.append((kind, chunk))
    for number, (control, pixels) in enumerate(frames):
        width, height, left, top, after, over = struct.unpack_from(">4I4x2B", control, 4)
        after = {1: CLEAR, 2: RESTORE if number else CLEAR}.get(after, "")
        chunks = [(b"IHDR", struct.pack(">2I", width, height) + header[8:]), *common, (b"IDAT", b"".join(pixels)),
                  (b"IEND", b"")]
        file = data[:8] + b"".join(struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", crc32(kind + chunk))
                                   for kind, chunk in chunks)
        yield Patch((left, top, left + width, top + height), file, after, bool(over))


# ---- WebP ------------------------------------------------------------------------------------------------------------


def _webp_durations(data: bytes) -> list[float]:
    """Each ANMF chunk is a frame, its duration 24 bits at offset 12."""
    found, position = [], 12
    while position < len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        if kind == b"ANMF":
            found.append(float(struct.unpack_from("<I", data, position + 20)[0] & 0xFFFFFF))
        position += 8 + size + size % 2
    return found


READERS = {"GIF": _gif_durations, "WEBP": _webp_durations, "PNG": _png_durations}
