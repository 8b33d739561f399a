"""Tar shards, for data sets that do not fit in a folder: `pack` writes them, training reads them as a resumable stream.

A shard follows the WebDataset convention: the files of a sample are neighbors in a tar and share their name up to the
first dot, such as `000012.json` and `000012.mp4`. `shards.json` lists the shards of a folder and their sizes.

    video-000000.tar  video-000001.tar ...  image-000000.tar ...  text-000000.tar ...  shards.json

Shards of other programs (img2dataset, video2dataset, webdataset) are read as they are: an image or a video with its
caption in a `.txt`, or under "caption" in a `.json`. Their samples are counted once, and listed in `shards.json`.

Each worker of each rank is a reader with shards of its own. Every epoch the shards are shuffled and assigned to the
readers again. A reader reads its shards from front to back and shuffles within windows of `--shuffle-buffer` samples.

The position of a reader is two numbers: completed rounds, and completed samples of the current round. With the same
number of readers, a resumed run continues exactly there. With another number of readers, the rest of the epoch is
assigned again, and each old reader's current window is read from its start: no sample is lost, and only samples of
these windows may be repeated.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.loader import start_worker
from mplug2.data.media import MEDIA_SUFFIXES, VIDEO_SUFFIXES, MediaError
from mplug2.data.records import Question, RecordError
from mplug2.data.samples import Sample, Samples, check_texts, read_samples, stream_kind
from mplug2.data.text import clean

INDEX = "shards.json"
MAX_BYTES = 2**30
"""Larger members of a shard are not read."""


def pack(root: Path | str, out: Path | str, split: str = "train", samples_per_shard: int = 1000) -> dict[str, int]:
    """Write the pre-training records in the folder `root` as shards into `out`; returns the samples of each batch type.

    Media files are copied unchanged. A shard, and the index, appear only once they are complete. Raises ValueError for
    a folder that already has shards, FileNotFoundError for missing records or media.
    """
    out = Path(out)
    if (out / INDEX).exists():
        raise ValueError(f"{out} already contains shards ({INDEX}); choose another folder")
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
            raise FileNotFoundError(f"{sample.source}: {sample.media} does not exist; add the file, or remove the line")
        files[sample.media.suffix[1:].lower()] = sample.media.read_bytes()
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def is_shards(root: Path | str) -> bool:
    """Whether the folder has an index of shards, or tars and no JSONL files."""
    root = Path(root)
    return (root / INDEX).is_file() or (any(root.glob("*.tar")) and not any(root.glob("*.jsonl")))


def index_shards(root: Path, before: dict) -> dict[str, list[dict]]:
    """List the tars that another program wrote, by batch type, and write the index where the folder allows it.

    The batch type of a tar is that of its first sample. The index of an earlier run (`before`) is used again if it has
    the same tars with the same sizes.
    """
    tars = {path.name: path.stat().st_size for path in sorted(root.glob("*.tar"))}
    if before["bytes"] == tars:
        return before["kinds"]
    index: dict[str, list[dict]] = {}
    for name in tqdm(tars, desc=f"counting samples in {root}", unit=" tar"):
        kind, samples = count_samples(root / name)
        if samples:
            index.setdefault(kind, []).append({"file": name, "samples": samples})
    if not index:
        raise FileNotFoundError(f"{root}: none of its {len(tars)} tars has a sample; expected images or videos with a "
                                ".txt or .json next to each")
    with suppress(OSError):  # a folder without write permission
        part = root / f".{INDEX}.{os.getpid()}.part"
        part.write_text(json.dumps({"format": 1, "bytes": tars, "kinds": index}, indent=1) + "\n")
        os.replace(part, root / INDEX)
    return index


def count_samples(path: Path) -> tuple[str, int]:
    """The batch type of a tar's first sample, and the number of its samples. Only the headers are read."""
    key, count, suffixes = None, 0, set()
    with suppress(tarfile.TarError, EOFError), tarfile.open(path) as tar:  # of a tar that is cut off, the part before
        for member in tar:
            if member.isfile():
                name, _, suffix = os.path.basename(member.name).partition(".")
                key, count = name, count + (name != key)
                if count == 1:
                    suffixes.add(_ending(suffix))
    if suffixes & {*VIDEO_SUFFIXES}:
        return "video", count
    return "image" if suffixes & {*MEDIA_SUFFIXES} else "text", count


class ShardRange(NamedTuple):
    """Samples `first` to `stop` (excluded) of a shard, in an epoch."""

    epoch: int
    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class ShardSet:
    """The shards of one batch type in a folder."""

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    """Number of samples in each shard."""

    def __len__(self) -> int:
        """Number of samples in all shards."""
        return sum(self.sizes)


def read_shards(root: Path | str) -> dict[str, ShardSet]:
    """The shards of a folder, by batch type: those that `pack` wrote, or those of another program.

    Raises ValueError for an index that cannot be read, FileNotFoundError for a shard that is missing.
    """
    root = Path(root)
    try:
        index = json.loads((root / INDEX).read_text()) if (root / INDEX).is_file() else {"bytes": None}
        kinds = index_shards(root, index) if "bytes" in index else index["kinds"]
        found = {
            kind: ShardSet(tuple(root / shard["file"] for shard in shards), tuple(int(s["samples"]) for s in shards))
            for kind, shards in kinds.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root / INDEX} is not an index of shards ({type(error).__name__}: {error}); "
                         "write it with python -m mplug2.data pack") from error
    for shards in found.values():
        for path in shards.paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is listed in {root / INDEX} but missing; copy it there, or pack again")
    return found


def _members(path: Path, first: int, stop: int) -> Iterator[tuple[int, dict[str, bytes] | str]]:
    """Samples `first` to `stop` of a shard as (number, content): the files by suffix, or an error message."""
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
                if number >= first and not isinstance(files, str):
                    if member.size > MAX_BYTES:
                        files = f"{member.name} has {member.size:,} bytes; at most {MAX_BYTES:,} are read"
                        continue
                    content = tar.extractfile(member).read()
                    if len(content) < member.size:
                        raise tarfile.ReadError(f"{len(content)} of the {member.size} bytes of {member.name}")
                    files[suffix] = content
        if first <= number < stop:
            yield number, files
        number, problem = number + 1, "the shard ends before it"
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = f"the shard cannot be read beyond this point ({error})"
    for lost in range(max(number, first), stop):
        yield lost, problem


def _parse(path: Path, number: int, files: dict[str, bytes]) -> tuple[Sample, str | None]:
    """A sample without its media, and the suffix of its media file. RecordError if it is incomplete."""
    media = [suffix for suffix in files if _ending(suffix) in MEDIA_SUFFIXES]
    if len(media) > 1:
        raise RecordError(f"found {len(media)} media files ({', '.join(media)}); expected one")
    try:
        texts = json.loads(files["json"]) if "json" in files else {}
        if "captions" not in texts and ("caption" in texts or "txt" in files):
            texts = _captioned(texts, files)
        for old, name in (("where", "source"), ("meaning", "positive_id")):  # old spellings
            if old in texts:
                texts.setdefault(name, texts.pop(old))
        sample = Sample(
            source=f"{path}:{number} ({texts['source']})", positive_id=int(texts["positive_id"]),
            captions=tuple(map(_text, texts["captions"])),
            qa=tuple(Question(_text(q["question"]), _answers(q["answers"]), q.get("kind")) for q in texts["qa"]),
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise RecordError(f"the .json file is missing or not a sample ({type(error).__name__}: {error})") from error
    if not isinstance(texts["captions"], list) or not sample.captions:  # other ranks have captions and their losses
        raise RecordError(f"captions: found {texts['captions']!r}; expected a list of one or more strings")
    return sample, media[0] if media else None


def _ending(suffix: str) -> str:
    """The last part of a suffix, such as .mp4 of seg1.mp4, in lower case."""
    return "." + suffix.rpartition(".")[2].lower()


def _captioned(texts: dict, files: dict[str, bytes]) -> dict:
    """The fields of a sample of another program, whose caption is in its .json or its .txt. Samples with the same
    caption are positives of each other."""
    caption = texts.get("caption")
    if caption is None:
        caption = files["txt"].decode("utf-8").strip()
    digest = hashlib.sha256(clean(_text(caption)).encode()).digest()
    return {"source": texts.get("key", "caption"), "positive_id": int.from_bytes(digest[:7], "big"),
            "captions": [caption], "qa": []}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {value!r:.40}, expected a text")
    return value


def _answers(value: object) -> tuple[str, ...]:
    """A list of answers; a single text is one answer."""
    return tuple(map(_text, [value] if isinstance(value, str) else value))


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
                buffer += [(one.epoch, one.shard, *member)
                           for member in _members(self.shards.paths[one.shard], first, stop)]
            start = max(0, start - size)
        return buffer

    def _item(self, epoch: int, shard: int, number: int, files: dict[str, bytes] | str) -> dict | str:
        """The item, or an error message."""
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
                with tempfile.NamedTemporaryFile(suffix=_ending(suffix)) as media:  # decoders need a named file
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
    for _, count in batches.turns():
        yield next(loaders[count % len(loaders)])
