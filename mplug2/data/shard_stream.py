"""A resumable stream of batches from the shards of `shards.py`.

Each worker of each rank is a reader with shards of its own. Every epoch the shards are shuffled and assigned to the
readers again. A reader reads its shards from front to back and shuffles within windows of `--shuffle-buffer` samples.

The position of a reader is two numbers: completed rounds, and completed samples of the current round. With the same
number of readers, a resumed run continues exactly there. With another number of readers, the rest of the epoch is
assigned again, and each old reader's current window is read from its start: no sample is lost, and only samples of
these windows may be repeated.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.loader import start_worker
from mplug2.data.media import MediaError
from mplug2.data.records import RecordError
from mplug2.data.samples import Sample, Samples, check_texts, stream_kind
from mplug2.data.shards import ShardSet, ending, parse_sample, read_members


class ShardRange(NamedTuple):
    """Samples `first` to `stop` (excluded) of a shard, in an epoch."""

    epoch: int
    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class ReadPlan:
    """Which reader reads which samples: first `leftovers`, ranges of an epoch that other readers began; then whole
    epochs, starting with `epoch`."""

    readers: int
    leftovers: tuple[tuple[ShardRange, ...], ...] = ()
    """By reader."""
    epoch: int = 0

    def round(self, shards: ShardSet, reader: int, number: int, seed: tuple[int, ...]) -> tuple[ShardRange, ...]:
        """The ranges of a reader in round `number`: its leftovers in round 0, then its shards of one epoch each."""
        if number == 0:
            return self.leftovers[reader] if self.leftovers else ()
        epoch = self.epoch + number - 1
        order = np.random.default_rng((*seed, epoch)).permutation(len(shards.paths))
        return tuple(ShardRange(epoch, int(i), 0, shards.sizes[i]) for i in order[reader:: self.readers])


class Reader:
    """The endless stream of one reader: `next` returns an item, as `Samples` does.

    `at` is its position: completed rounds, and completed samples of the current round, skipped ones included.
    `check` raises RecordError for samples whose texts cannot be used.
    """

    def __init__(
        self, shards: ShardSet, stream: str, samples: Samples, check, plan: ReadPlan, reader: int, window: int,
        at: tuple[int, int] = (0, 0),
    ):
        if plan.readers > len(shards.paths):
            raise ValueError(f"{shards.paths[0].parent}: {len(shards.paths)} shards of {stream_kind(stream)} for "
                             f"{plan.readers} readers (ranks times workers); pack with fewer samples per shard, or "
                             "lower --workers")
        self.shards, self.stream, self.samples, self.check = shards, stream, samples, check
        self.plan, self.reader, self.window, self.at = plan, reader, window, tuple(at)
        self.seed = (samples.seed, *stream.encode())
        self.next_member, self.members = (-1, 0), iter(())  # (shard, number) that the tar, kept open, gives next
        self.items = self._items()

    def __next__(self) -> dict:
        return next(self.items)

    def _items(self) -> Iterator[dict]:
        errors: list[str] = []
        while True:
            number, position = self.at
            ranges = self.plan.round(self.shards, self.reader, number, self.seed)
            total = sum(one.stop - one.first for one in ranges)
            while position < total:
                start = position - position % self.window
                order = np.random.default_rng((*self.seed, self.plan.epoch, number, self.reader, start)).permutation(
                    min(self.window, total - start)
                )
                buffer = self._read(ranges, start, len(order))
                for index in order[position - start:]:
                    position += 1
                    self.at = (number, position)
                    item = self._item(*buffer[index])
                    buffer[index] = None  # free the memory
                    if isinstance(item, str):
                        errors.append(item)
                        if len(errors) >= 2 * max(self.shards.sizes):  # two shards without a single usable sample
                            raise MediaError(f"{len(errors)} samples in a row cannot be read; the first: {errors[0]}")
                        continue
                    yield {**item, "errors": errors}
                    errors = []
            self.at = (number + 1, 0)

    def _read(self, ranges: tuple[ShardRange, ...], start: int, count: int) -> list[tuple]:
        """`count` samples of a round, beginning with number `start`: (epoch, shard, number, files or error)."""
        buffer: list[tuple] = []
        for one in ranges:
            size = one.stop - one.first
            if start < size and len(buffer) < count:
                first = one.first + start
                stop = min(one.stop, first + count - len(buffer))
                buffer += [(one.epoch, one.shard, *member) for member in self._members(one.shard, first, stop)]
            start = max(0, start - size)
        return buffer

    def _members(self, shard: int, first: int, stop: int) -> Iterator[tuple[int, dict[str, bytes] | str]]:
        """Samples `first` to `stop` of a shard. They continue the tar of the last call where they can: to find a sample
        in a tar, all headers before it have to be read."""
        if self.next_member != (shard, first):
            self.members = read_members(self.shards.paths[shard], first, self.shards.sizes[shard])
        self.next_member = (shard, stop)
        return islice(self.members, stop - first)

    def _item(self, epoch: int, shard: int, number: int, files: dict[str, bytes] | str) -> dict | str:
        """The item, or an error message."""
        path = self.shards.paths[shard]
        if isinstance(files, str):
            return f"{path}:{number}: {files}"
        rng = np.random.default_rng((*self.seed, epoch, shard, number))
        kind = stream_kind(self.stream)
        try:
            sample, suffix = parse_sample(path, number, files)
            self.check({kind: [sample]})
            pixels = None
            if suffix:
                with tempfile.NamedTemporaryFile(suffix=ending(suffix)) as media:  # decoders need a named file
                    media.write(files[suffix])
                    media.flush()
                    pixels = self.samples.pixels(Sample(sample.source, sample.positive_id, Path(media.name)), kind, rng)
            elif kind != "text":
                raise RecordError(f"there is no {kind} file")
            return {**self.samples.texts(sample, kind, rng), "pixels": pixels, "source": sample.source}
        except (MediaError, RecordError) as error:
            return f"{path}:{number}: {error}"


class ReaderState:
    """The positions of all readers of all streams: saved in checkpoints, and the starting point of a resumed run.

    `state` is the result of `collected` in the previous run, or empty for a new run.
    """

    def __init__(self, shards: dict[str, ShardSet], readers: int, window: int, seed: int, state: dict):
        self.plans: dict[str, ReadPlan] = {}
        self.at: dict[str, dict[int, tuple[int, int]]] = {}
        for stream, shard_set in shards.items():
            self.plans[stream], self.at[stream] = ReadPlan(readers), {}
            if stream in state:
                leftovers = tuple(tuple(ShardRange(*one) for one in ranges)
                                  for ranges in state[stream]["leftovers"])
                plan = ReadPlan(state[stream]["readers"], leftovers, state[stream]["epoch"])
                at = {reader: tuple(position) for reader, position in state[stream]["at"].items()}
                unchanged = plan.readers == readers and state[stream]["window"] == window
                self.plans[stream] = plan if unchanged else assign(
                    shard_set, plan, at, readers, state[stream]["window"], (seed, *stream.encode())
                )
                self.at[stream] = at if unchanged else {}
        self.window = window

    def advance(self, batch: dict) -> None:
        """Record that a batch was trained on."""
        if "position" in batch:
            stream, reader, at = batch["position"]
            self.at[stream][reader] = tuple(at)  # the DataLoader turns tuples into lists

    def collected(self, others: Iterable["ReaderState"]) -> dict:
        """The state for a checkpoint. `others` are the states of all ranks: each has the newest positions of its own
        readers."""
        state = {}
        for stream, plan in self.plans.items():
            at: dict[int, tuple[int, int]] = {}
            for other in others:
                for reader, position in other.at[stream].items():
                    at[reader] = max(at.get(reader, (0, 0)), position)
            state[stream] = {
                "readers": plan.readers, "epoch": plan.epoch, "window": self.window, "at": at,
                "leftovers": [[list(one) for one in ranges] for ranges in plan.leftovers],
            }
        return state


def assign(
    shards: ShardSet, plan: ReadPlan, at: dict[int, tuple[int, int]], readers: int, window: int, seed: tuple[int, ...]
) -> ReadPlan:
    """A plan for another number of readers. The unread ranges of all epochs that any reader has begun are assigned,
    largest first, to the reader with the fewest samples. Windows that were begun are read from their start."""
    last = max([number for number, _ in at.values()], default=0)
    left: list[ShardRange] = []
    for reader in range(plan.readers):
        number, position = at.get(reader, (0, 0))
        skip = position - position % window
        for later in range(number, last + 1):
            for one in plan.round(shards, reader, later, seed):
                size = one.stop - one.first
                if skip < size:
                    left.append(one._replace(first=one.first + skip))
                skip = max(0, skip - size)
    shares: list[list[ShardRange]] = [[] for _ in range(readers)]
    for one in sorted(left, key=lambda one: (one.first - one.stop, one)):
        min(shares, key=lambda share: sum(each.stop - each.first for each in share)).append(one)
    return ReadPlan(readers, tuple(map(tuple, shares)), plan.epoch + last)


class MixedStream(IterableDataset):
    """The batches that one worker makes, when some streams are read from shards: of each stream, every `workers`-th
    batch of this rank, starting with batch number `worker`.

    A batch from shards has the position of its reader after it, as `position`.
    """

    def __init__(
        self, samples: Samples, shards: dict[str, ShardSet], batches: MixedBatches, collate: Collate,
        reader_state: ReaderState, max_words: int, worker: int, workers: int,
    ):
        self.samples, self.shards, self.batches, self.collate = samples, shards, batches, collate
        self.reader_state, self.max_words, self.worker, self.workers = reader_state, max_words, worker, workers

    def check(self, samples: dict[str, list[Sample]]) -> None:
        check_texts(samples, self.collate.tokenizer, self.samples.max_positions, self.max_words)

    def __iter__(self) -> Iterator[dict]:
        number, state = self.batches.rank * self.workers + self.worker, self.reader_state
        readers = {
            stream: Reader(
                shards, stream, self.samples, self.check, state.plans[stream], number, state.window,
                state.at[stream].get(number, (0, 0)),
            )
            for stream, shards in self.shards.items()
        }
        for (stream, count), keys in zip(self.batches.turns(), self.batches):
            if count % self.workers != self.worker:
                continue
            if stream in readers:
                batch = self.collate([next(readers[stream]) for _ in keys])
                yield {**batch, "position": (stream, number, readers[stream].at)}
            else:
                yield self.collate([self.samples[key] for key in keys])


def stream_batches(
    samples: Samples, shards: dict[str, ShardSet], batches: MixedBatches, collate: Collate,
    reader_state: ReaderState, max_words: int, workers: int, pin: bool,
) -> Iterator[dict]:
    """The batches of this rank, when some streams are read from shards.

    Each worker has a DataLoader of its own, and the batches of a stream come from all workers in turn. A single
    DataLoader would ask its workers in turn for the next batch of any stream: if every 20th batch were text, one of 4
    workers would make all text batches, and the text shards of the other three would never be read.
    """
    loaders = [
        iter(DataLoader(
            MixedStream(samples, shards, batches, collate, reader_state, max_words, worker, max(1, workers)),
            batch_size=None, num_workers=min(1, workers), pin_memory=pin, prefetch_factor=4 if workers else None,
            generator=torch.Generator(), worker_init_fn=start_worker,
        )) for worker in range(max(1, workers))
    ]
    return (next(loaders[count % len(loaders)]) for _, count in batches.turns())
