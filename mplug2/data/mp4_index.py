"""The index of an MP4 file, from its boxes: when its frames are decoded, how large they are, and which are key frames.

    file = box, box, ...                             box = size, name, content, which may be boxes again
    moov: a trak for each stream, with its index     mdat: the packets     moof: a fragment, with an index of its own

FFmpeg reads the same index, but gives it to Python as one object for each frame: 4 ms for 4 minutes of video.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Mp4Index:
    """The packets of a video stream of constant rate, in the order of decoding."""

    step: int
    """Time from each packet to the next, in units of the stream's time base."""
    sizes: list[int]
    """Size of each packet in bytes."""
    keys: list[int]
    """Numbers of the key frames, from 0."""


def read_index(path: Path | str, track: int) -> Mp4Index | None:
    """The index of the stream with the number `track`.

    None for whatever is not plain: a rate that varies, edits that cut the video into parts, fragments ("moof"), whose
    frames the index may lack, and a file that ends before its last packet.
    """
    try:
        if (movie := _movie(path)) is None:
            return None
        for box in _all(movie, b"trak"):
            header = _one(box, b"tkhd")
            if struct.unpack_from(">I", header, 20 if header[0] else 12)[0] == track:
                return _index_of_track(box, os.path.getsize(path))
    except (KeyError, ValueError, IndexError, struct.error):  # a box is missing, or shorter than it says
        return None
    return None


def _movie(path: Path | str) -> bytes | None:
    """The content of the box moov. None for a file with fragments, and if a box reaches beyond the end of the file."""
    movie, position, end = None, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while position < end:
            file.seek(position)
            size, kind, head = _box_at(file.read(16), 0)
            if kind == b"moof" or size < head or position + size > end:
                return None
            if kind == b"moov":
                file.seek(position + head)
                movie = file.read(size - head)
            position += size
    return movie


def _box_at(data: bytes, position: int) -> tuple[int, bytes, int]:
    """Size and name of a box, and the size of its head. A size of 1 says that a 64-bit number follows the name."""
    size, kind = struct.unpack_from(">I4s", data, position)
    return (struct.unpack_from(">Q", data, position + 8)[0], kind, 16) if size == 1 else (size, kind, 8)


def _all(content: bytes, name: bytes) -> Iterator[bytes]:
    position = 0
    while position + 8 <= len(content):
        size, kind, head = _box_at(content, position)
        if size < head or position + size > len(content):
            raise ValueError(f"a box of {size} bytes")
        if kind == name:
            yield content[position + head: position + size]
        position += size


def _one(content: bytes, *names: bytes) -> bytes:
    """The box inside boxes of these names. KeyError if there is none."""
    for name in names:
        content = next(_all(content, name), None)
        if content is None:
            raise KeyError(name)
    return content


def _table(content: bytes, columns: int, kind: str = ">u4") -> np.ndarray:
    """The rows of a box that holds flags, the number of rows, and the rows: int64 (rows, columns)."""
    count = columns * struct.unpack_from(">I", content, 4)[0]
    return np.frombuffer(content, kind, count, offset=8).astype(np.int64).reshape(-1, columns)


def _index_of_track(track: bytes, file_size: int) -> Mp4Index | None:
    tables = _one(track, b"mdia", b"minf", b"stbl")
    boxes = {name: next(_all(tables, name), None) for name in (b"stss", b"stco", b"co64")}
    runs, chunks = _table(_one(tables, b"stts"), 2), _table(_one(tables, b"stsc"), 3)
    step = int(runs[0, 1])
    if len(set(runs[:, 1])) > 1 and not (len(runs) == 2 and runs[1, 0] == 1) or step <= 0:  # the last frame may differ
        return None
    for edits in (edits for box in _all(track, b"edts") for edits in _all(box, b"elst")):
        count, = struct.unpack_from(">I", edits, 4)
        start = struct.unpack_from(">q", edits, 16) if edits[0] else struct.unpack_from(">i", edits, 12)
        if count > 1 + (start == (-1,)):  # -1: the video starts late
            return None
    header = _one(tables, b"stsz")
    same, total = struct.unpack_from(">2I", header, 4)
    sizes = np.full(total, same) if same else np.frombuffer(header, ">u4", total, offset=12).astype(np.int64)
    offsets = (_table(boxes[b"co64"], 1, ">u8") if boxes[b"co64"] else _table(boxes[b"stco"], 1))[:, 0]
    in_chunk = np.repeat(chunks[:, 1], np.diff(chunks[:, 0], append=len(offsets) + 1))
    firsts = np.cumsum(in_chunk) - in_chunk
    if not total == runs[:, 0].sum() == in_chunk.sum() or len(in_chunk) != len(offsets):
        return None
    if (offsets + np.add.reduceat(sizes, firsts)).max() > file_size:
        return None
    keys = _table(boxes[b"stss"], 1)[:, 0] - 1 if boxes[b"stss"] else np.arange(total)
    return Mp4Index(step, sizes.tolist(), keys.tolist())
