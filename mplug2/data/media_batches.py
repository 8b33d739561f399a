"""Batches of media for inference: grouped by shape, decoded ahead of the device.

A batch depends on the whole list of inputs, never on the rank, the number of ranks, or the worker that reads it. So
every input is padded, and computed, in the same way however many processes share the work.

Axes: b media, r inputs (questions, texts) about each of them, n files of a medium (1, or 2 for a pair of images).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mplug2.data.loader import prefetch, start_worker
from mplug2.data.media import MediaError, kind_of, read_image, read_video, to_bytes
from mplug2.data.records import Record


@dataclass(frozen=True)
class Medium:
    """An image, a video, or a pair of images."""

    paths: tuple[Path, ...]
    modality: str
    """"image" or "video"."""

    @classmethod
    def of_record(cls, record: Record) -> "Medium":
        """The record decides between image and video, not the file: a video may have a single frame."""
        if record.video:
            return cls((record.video,), "video")
        return cls(record.images or (record.image,), "image")

    @classmethod
    def of(cls, item: "Medium | str | Path | tuple[str | Path, str | Path]") -> "Medium":
        """A file, whose suffix and content decide, or a pair of images. Raises MediaError for an unknown file."""
        if isinstance(item, Medium):
            return item
        if isinstance(item, tuple):
            return cls(tuple(map(Path, item)), "image")
        return cls((Path(item),), kind_of(item))


@dataclass(frozen=True)
class MediaBatch:
    """b media of the same modality and number of files, with r inputs about each."""

    media: tuple[Medium, ...]
    indices: tuple[tuple[int, ...], ...]
    """For each medium, the indices of the r inputs about it."""

    @property
    def modality(self) -> str:
        return self.media[0].modality


def media_batches(media: Mapping[int, Medium], size: int) -> list[MediaBatch]:
    """Batches of at most `size` inputs, given the medium of each input by its index. A medium occurs once, with all its
    inputs, however many there are."""
    inputs: dict[Medium, list[int]] = {}
    for i, medium in media.items():
        inputs.setdefault(medium, []).append(i)
    groups: dict[tuple[str, int, int], list[tuple[Medium, tuple[int, ...]]]] = {}
    for medium, indices in inputs.items():
        shape = (medium.modality, len(medium.paths), len(indices))
        groups.setdefault(shape, []).append((medium, tuple(indices)))
    return [MediaBatch(*zip(*group[part.start: part.stop])) for (_, _, r), group in groups.items()
            for part in even_parts(len(group), max(1, size // r))]


def even_parts(count: int, size: int) -> list[range]:
    """`count` items in order, in batches of at most `size`, whose sizes differ by one at most.

    64 items or more are in a multiple of eight batches, so that 2, 4 or 8 ranks have about the same work.
    """
    parts = -(-count // size)
    if count >= 64:
        parts = min(count, -(-parts // 8) * 8)
    return [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


class MediaReader(Dataset):
    """`reader[i]`: the readable part of batch i, or None; its pixels `b n 3 t H W`, uint8; the errors of the others."""

    def __init__(self, batches: list[MediaBatch], frames: int, image_size: int):
        self.batches, self.frames, self.image_size = batches, frames, image_size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[MediaBatch | None, Tensor | None, dict[Medium, str]]:
        pixels, readable, errors = [], [], {}
        for medium, indices in zip(self.batches[i].media, self.batches[i].indices):
            try:
                pixels.append(torch.stack([self.read(path, medium.modality) for path in medium.paths]))
                readable.append((medium, indices))
            except MediaError as error:
                errors[medium] = str(error)
        return (MediaBatch(*zip(*readable)), torch.stack(pixels), errors) if readable else (None, None, errors)

    def read(self, path: Path, modality: str) -> Tensor:
        """Pixels `3 t H W`, uint8."""
        size = self.image_size
        return to_bytes(read_image(path, 2 * size) if modality == "image" else read_video(path, self.frames), size)


def read_ahead(reader: MediaReader, workers: int) -> Iterator[tuple[MediaBatch | None, Tensor | None, dict]]:
    """The items of `reader`, decoded by worker processes, or by a thread without workers."""
    if not workers:
        return prefetch(reader[i] for i in range(len(reader)))
    # A generator of its own: the loader would draw from torch's global one, which training uses.
    return iter(DataLoader(
        reader, batch_size=None, num_workers=workers, prefetch_factor=2, collate_fn=unchanged,
        worker_init_fn=start_worker, generator=torch.Generator(),
    ))


def unchanged(item: tuple) -> tuple:
    return item
