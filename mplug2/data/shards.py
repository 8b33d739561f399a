"""Tar shards, for sets that no folder can hold: written by `pack`, read as a stream, resumable.

A shard follows the WebDataset convention: the files of a sample stand one after the other in a tar, share their name up
to the first dot, and end in what they are: `000012.json` and `000012.mp4`. A folder of shards says in `shards.json` how
many samples each of them holds.

    video-000000.tar  video-000001.tar ...  image-000000.tar ...  text-000000.tar ...  shards.json

Every worker of every process is a reader, and has shards of its own: each epoch the shards are shuffled and dealt out
anew. A reader runs through its shards from front to back and shuffles within a window of as many samples as its buffer
holds. Where it is, is two numbers: how many rounds are done, and how many samples of this one. With as many readers as
before, a resumed run goes on exactly there. With more or fewer of them, what is left of the epoch is dealt out anew,
and each old reader's window is read once more from its start: no sample is lost, and none outside of these windows
comes twice.
"""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.loader import start_worker
from mplug2.data.media import MediaError
from mplug2.data.records import Question, RecordError
from mplug2.data.samples import Sample, Samples, check_texts, read_samples, stream_kind

INDEX = "shards.json"


def pack(root: Path | str, out: Path | str, split: str = "train", samples_per_shard: int = 1000) -> dict[str, int]:
    """Write the records of pre-training in the folder `root` as shards into `out`; returns the samples of each kind.

    Media are stored as they are. What was there before stays as it was until all of it is written. Raises ValueError
    for a folder that has shards already, FileNotFoundError for records or media that are not there.
    """
    out = Path(out)
    if (out / INDEX).exists():
        raise ValueError(f"{out} holds shards already ({INDEX}); choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[dict]] = {}
    for kind, samples in read_samples(Path(root), "pretrain", split).items():
        for first in range(0, len(samples), samples_per_shard):
            name, part = f"{kind}-{first // samples_per_shard:06d}.tar", samples[first: first + samples_per_shard]
            with tarfile.open(out / f".{name}.part", "w") as tar:
                for number, sample in enumerate(part, start=first):
                    _write_sample(tar, f"{number:09d}", sample)
            os.replace(out / f".{name}.part", out / name)
            index.setdefault(kind, []).append({"file": name, "samples": len(part)})
    (out / f".{INDEX}.part").write_text(json.dumps({"format": 1, "kinds": index}, indent=1) + "\n")
    os.replace(out / f".{INDEX}.part", out / INDEX)
    return {kind: sum(shard["samples"] for shard in shards) for kind, shards in index.items()}


def _write_sample(tar: tarfile.TarFile, key: str, sample: Sample) -> None:
    texts = {
        "source": sample.source, "positive_id": sample.positive_id, "captions": sample.captions,
        "qa": [{"question": q.question, "answers": q.answers, "kind": q.kind} for q in sample.qa],
    }
    files = {"json": json.dumps(texts).encode()}
    if sample.media:
        if not sample.media.is_file():
            raise FileNotFoundError(f"{sample.source}: {sample.media} does not exist; fetch it, or take the line out")
        files[sample.media.suffix[1:].lower()] = sample.media.read_bytes()
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def is_shards(root: Path | str) -> bool:
    return (Path(root) / INDEX).is_file()


class ShardRange(NamedTuple):
    """Samples `first` to `stop` of a shard, in an epoch."""

    epoch: int
    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class ShardSet:
    """The shards of one kind in a folder."""

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    """Samples in each."""

    def __len__(self) -> int:
        """Samples in all."""
        return sum(self.sizes)


def read_shards(root: Path | str) -> dict[str, ShardSet]:
    """What `pack` wrote, by kind. ValueError for an index that cannot be read, or shards that are not there."""
    root = Path(root)
    try:
        kinds = json.loads((root / INDEX).read_text())["kinds"]
        found = {
            kind: ShardSet(tuple(root / shard["file"] for shard in shards), tuple(int(s["samples"]) for s in shards))
            for kind, shards in kinds.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root / INDEX} is not an index of shards ({type(error).__name__}: {error}); "
                         "write it by python -m mplug2.data pack") from error
    for shards in found.values():
        for path in shards.paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is in {root / INDEX}, but not there; fetch it, or pack anew")
    return found


def _members(path: Path, first: int, stop: int) -> Iterator[tuple[int, dict[str, bytes] | str]]:
    """Samples `first` to `stop` of a shard, by number: their files by suffix, or what is wrong."""
    number, key, files = -1, None, {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                name, _, suffix = os.path.basename(member.name).partition(".")
                if name != key:
                    if first <= number < stop:
                        yield number, files
                    number, key, files = number + 1, name, {}
                if number >= stop:
                    return
                if number >= first:
                    content = tar.extractfile(member).read()
                    if len(content) < member.size:
                        raise tarfile.ReadError(f"{len(content)} of the {member.size} bytes of {member.name}")
                    files[suffix] = content
        if first <= number < stop:
            yield number, files
        number, problem = number + 1, "the shard ends before it"
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = f"the shard cannot be read from here on ({error})"
    for lost in range(max(number, first), stop):
        yield lost, problem


def _parse(path: Path, number: int, files: dict[str, bytes]) -> tuple[Sample, str | None]:
    """A sample without its media, and the suffix of the file that is its media. RecordError if it is not whole."""
    try:
        texts = json.loads(files["json"])
        for old, name in (("where", "source"), ("meaning", "positive_id")):  # the names in shards packed before
            if old in texts:
                texts.setdefault(name, texts.pop(old))
        sample = Sample(
            source=f"{path}:{number} ({texts['source']})", positive_id=int(texts["positive_id"]),
            captions=tuple(map(str, texts["captions"])),
            qa=tuple(Question(q["question"], tuple(q["answers"]), q["kind"]) for q in texts["qa"]),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RecordError(f"its .json is missing or not a sample ({type(error).__name__}: {error})") from error
    if not isinstance(texts["captions"], list) or not sample.captions:  # without, this process would have other losses
        raise RecordError(f"captions: expected a list of one or more strings, found {texts['captions']!r}")
    media = [suffix for suffix in files if suffix != "json"]
    if len(media) > 1:
        raise RecordError(f"files {', '.join(media)}: expected one picture or clip")
    return sample, media[0] if media else None


@dataclass(frozen=True)
class ReadPlan:
    """Who reads what: `readers` readers, which first share out `leftovers`, pieces of an epoch that others began, and
    then read epoch after epoch, from `epoch` on."""

    readers: int
    leftovers: tuple[tuple[ShardRange, ...], ...] = ()
    """By reader."""
    epoch: int = 0

    def round(self, shards: ShardSet, reader: int, number: int, seed: tuple[int, ...]) -> tuple[ShardRange, ...]:
        """What a reader reads in its round `number`: its leftovers in round 0, then its shards of one epoch."""
        if number == 0:
            return self.leftovers[reader] if self.leftovers else ()
        epoch = self.epoch + number - 1
        order = np.random.default_rng((*seed, epoch)).permutation(len(shards.paths))
        return tuple(ShardRange(epoch, int(i), 0, shards.sizes[i]) for i in order[reader:: self.readers])


class Reader:
    """The endless stream of one of the readers of a kind: `next` gives an item, as `Samples` does.

    `at` is its position: rounds done, samples of this round done (those that were skipped, too).
    """

    def __init__(
        self, shards: ShardSet, stream: str, samples: Samples, check, plan: ReadPlan, reader: int, window: int,
        at: tuple[int, int] = (0, 0),
    ):
        if plan.readers > len(shards.paths):
            raise ValueError(f"{shards.paths[0].parent}: {len(shards.paths)} shards of {stream_kind(stream)} for "
                             f"{plan.readers} readers (workers of all processes); pack with fewer samples a shard, or "
                             "lower --workers")
        self.shards, self.stream, self.samples, self.check = shards, stream, samples, check
        self.plan, self.reader, self.window, self.at = plan, reader, window, tuple(at)
        self.seed = (samples.seed, *stream.encode())
        self.items = self._items()

    def __next__(self) -> dict:
        return next(self.items)

    def _items(self) -> Iterator[dict]:
        errors: list[str] = []
        while True:
            number, position = self.at
            pieces = self.plan.round(self.shards, self.reader, number, self.seed)
            total = sum(piece.stop - piece.first for piece in pieces)
            while position < total:
                start = position - position % self.window
                order = np.random.default_rng((*self.seed, self.plan.epoch, number, self.reader, start)).permutation(
                    min(self.window, total - start)
                )
                buffer = self._read(pieces, start, len(order))
                for place in order[position - start:]:
                    position += 1
                    self.at = (number, position)
                    found = self._item(*buffer[place])
                    buffer[place] = None
                    if isinstance(found, str):
                        errors.append(found)
                        if len(errors) >= 2 * max(self.shards.sizes):  # not one good one in two whole shards
                            raise MediaError(f"{len(errors)} samples in a row cannot be read; the first: {errors[0]}")
                        continue
                    yield {**found, "errors": errors}
                    errors = []
            self.at = (number + 1, 0)

    def _read(self, pieces: tuple[ShardRange, ...], start: int, count: int) -> list[tuple]:
        """The next `count` samples of a round from `start` on, as (epoch, shard, number, files or what is wrong)."""
        buffer: list[tuple] = []
        for piece in pieces:
            size = piece.stop - piece.first
            if start < size and len(buffer) < count:
                first = piece.first + start
                stop = min(piece.stop, first + count - len(buffer))
                buffer += [(piece.epoch, piece.shard, *found)
                           for found in _members(self.shards.paths[piece.shard], first, stop)]
            start = max(0, start - size)
        return buffer

    def _item(self, epoch: int, shard: int, number: int, files: dict[str, bytes] | str) -> dict | str:
        """The item, or what is wrong with it."""
        path = self.shards.paths[shard]
        if isinstance(files, str):
            return f"{path}:{number}: {files}"
        rng = np.random.default_rng((*self.seed, epoch, shard, number))
        kind = stream_kind(self.stream)
        try:
            sample, suffix = _parse(path, number, files)
            self.check({kind: [sample]})
            pixels = None
            if suffix:
                with tempfile.NamedTemporaryFile(suffix=f".{suffix}") as media:  # decoders want a file with a name
                    media.write(files[suffix])
                    media.flush()
                    pixels = self.samples.pixels(Sample(sample.source, sample.positive_id, Path(media.name)), kind, rng)
            elif kind != "text":
                raise RecordError("there is no picture or clip")
            return {**self.samples.texts(sample, kind, rng), "pixels": pixels, "source": sample.source}
        except (MediaError, RecordError) as error:
            return f"{path}:{number}: {error}"


class ReaderState:
    """Where all readers are, of every stream: what a checkpoint has to know, and what a new set of readers starts from.

    `state` is what `collected` returned, or empty for a new run.
    """

    def __init__(self, shards: dict[str, ShardSet], readers: int, window: int, seed: int, state: dict):
        self.plans: dict[str, ReadPlan] = {}
        self.at: dict[str, dict[int, tuple[int, int]]] = {}
        for stream, shard_set in shards.items():
            self.plans[stream], self.at[stream] = ReadPlan(readers), {}
            if stream in state:
                leftovers = tuple(tuple(ShardRange(*piece) for piece in pieces)
                                  for pieces in state[stream]["leftovers"])
                plan = ReadPlan(state[stream]["readers"], leftovers, state[stream]["epoch"])
                at = {reader: tuple(place) for reader, place in state[stream]["at"].items()}
                same = plan.readers == readers and state[stream]["window"] == window
                self.plans[stream] = plan if same else assign(
                    shard_set, plan, at, readers, state[stream]["window"], (seed, *stream.encode())
                )
                self.at[stream] = at if same else {}
        self.window = window

    def advance(self, batch: dict) -> None:
        """A batch was trained on."""
        if "position" in batch:
            stream, reader, at = batch["position"]
            self.at[stream][reader] = tuple(at)  # a loader makes lists of tuples

    def collected(self, others: Iterable["ReaderState"]) -> dict:
        """This and those of the other processes, of which each knows its own readers best."""
        state = {}
        for stream, plan in self.plans.items():
            at: dict[int, tuple[int, int]] = {}
            for other in others:
                for reader, place in other.at[stream].items():
                    at[reader] = max(at.get(reader, (0, 0)), place)
            state[stream] = {
                "readers": plan.readers, "epoch": plan.epoch, "window": self.window, "at": at,
                "leftovers": [[list(piece) for piece in pieces] for pieces in plan.leftovers],
            }
        return state


def assign(
    shards: ShardSet, plan: ReadPlan, at: dict[int, tuple[int, int]], readers: int, window: int, seed: tuple[int, ...]
) -> ReadPlan:
    """A plan for another number of readers: what is left of the epochs that anybody began is dealt out, the largest
    pieces first, to whom has least; windows that were begun are read from their start."""
    last = max([number for number, _ in at.values()], default=0)
    left: list[ShardRange] = []
    for reader in range(plan.readers):
        number, position = at.get(reader, (0, 0))
        skip = position - position % window
        for later in range(number, last + 1):
            for piece in plan.round(shards, reader, later, seed):
                size = piece.stop - piece.first
                if skip < size:
                    left.append(piece._replace(first=piece.first + skip))
                skip = max(0, skip - size)
    shares: list[list[ShardRange]] = [[] for _ in range(readers)]
    for piece in sorted(left, key=lambda piece: (piece.first - piece.stop, piece)):
        min(shares, key=lambda share: sum(p.stop - p.first for p in share)).append(piece)
    return ReadPlan(readers, tuple(map(tuple, shares)), plan.epoch + last)


class MixedStream(IterableDataset):
    """What one worker makes of the batches of a run of which some streams are read from shards, in their order: of each
    stream every `workers`-th batch of this process, from number `worker` on.

    A batch from shards says, as `position`, where its reader stands after it.
    """

    def __init__(
        self, samples: Samples, shards: dict[str, ShardSet], batches: MixedBatches, collate: Collate,
        positions: ReaderState, max_words: int, worker: int, workers: int,
    ):
        self.samples, self.shards, self.batches, self.collate = samples, shards, batches, collate
        self.positions, self.max_words, self.worker, self.workers = positions, max_words, worker, workers

    def check(self, samples: dict[str, list[Sample]]) -> None:
        check_texts(samples, self.collate.tokenizer, self.samples.max_positions, self.max_words)

    def __iter__(self) -> Iterator[dict]:
        number = self.batches.rank * self.workers + self.worker
        readers = {
            stream: Reader(
                shards, stream, self.samples, self.check, self.positions.plans[stream], number, self.positions.window,
                self.positions.at[stream].get(number, (0, 0)),
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
    samples: Samples, shards: dict[str, ShardSet], batches: MixedBatches, collate: Collate, positions: ReaderState,
    max_words: int, workers: int, pin: bool,
) -> Iterator[dict]:
    """This process' share of the batches of a run of which some streams are read from shards.

    Each worker has a loader of its own, and the batches of a stream come from all workers in turn. (One loader for all
    would ask its workers in turn for whatever comes: if every 20th batch is of text, one of 4 workers would read all
    the text there is, and the shards of the other three would never be read.)
    """
    coming = [
        iter(DataLoader(
            MixedStream(samples, shards, batches, collate, positions, max_words, worker, max(1, workers)),
            batch_size=None, num_workers=min(1, workers), pin_memory=pin, prefetch_factor=4 if workers else None,
            generator=torch.Generator(), worker_init_fn=start_worker,
        )) for worker in range(max(1, workers))
    ]
    for _, count in batches.turns():
        yield next(coming[count % len(coming)])
