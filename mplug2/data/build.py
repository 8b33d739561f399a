"""From settings to batches: `build_data` reads the sources and yields the batches of a run in their order.

A stream is the samples of one batch type from one source. It has the name of its batch type ("video"); from the second
source on, the number of the source follows ("video@1").
"""

import copy
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tiny_data
from mplug2.config import ModelConfig
from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.loader import default_workers, make_loader, on_device, prefetch
from mplug2.data.records import held_out_media
from mplug2.data.samples import Joined, Sample, SampleList, Samples, read_classes, read_samples, stream_kind
from mplug2.data.shard_stream import ReaderState, stream_batches
from mplug2.data.shards import ShardSet, is_shards, read_shards
from mplug2.data.text import Tokenizer, clean
from mplug2.data.text_check import check_run_texts
from mplug2.data.transforms import Augmentation
from mplug2.distributed import DistInfo, all_gather_object, run_on_main
from mplug2.flags import check_range
from mplug2.tasks import BATCH_TYPES, INSTRUCTIONS, PROMPTS, TASKS, batch_types, parse_tasks


@dataclass(frozen=True)
class DataSettings:
    task: str = field(default="pretrain", metadata={"known": tuple(TASKS)})
    """Task to train, or several separated by commas."""
    task_weights: str = ""
    """Shares of the steps of several tasks, in their order, such as 3,1; empty: equal shares."""
    data: str = ""
    """Folder with <task>.<split>.jsonl files or tar shards, or several with weights, DIR=2,OTHER=1 (names may
    have "=" and ","); empty: the tiny world, written to a cache on first use."""
    eval_data: str = ""
    """Folder with <task>.<split>.jsonl files for validation; empty: the first folder of --data that has some."""
    tokenizer: str = ""
    """BERT's vocab.txt or tokenizer.json; empty: train a small vocabulary on the training texts."""
    max_steps: int = TASKS["pretrain"].steps
    """Number of training steps; the learning-rate schedule spans them."""
    epochs: float | None = None
    """In place of --max-steps: how often each caption, question or labeled sample is seen."""
    batch_size: int = field(default=32, metadata={"title": "batches (samples, augmentation and reading)"})
    """Samples per step, over all ranks and micro-batches."""
    accumulation_steps: int = 1
    """Micro-batches per step: gradients are averaged over them. VTC and VTM compare samples within a micro-batch."""
    frames: int = 4
    """Frames sampled from each video."""
    max_words: int = 30
    """Texts are cut after this number of words."""
    questions_per_sample: int = 2
    """Questions asked about each sample in a step."""
    augment: Literal["none", "finetune", "pretrain"] = "none"
    """finetune: RandAugment and crops of at least half the area; pretrain: stronger, as for web data."""
    hflip: bool = False
    """With --augment: mirror half of the samples. Do not use it if texts or classes distinguish left from right."""
    video_weight: float = 0.65
    """Pre-training: share of the steps with video batches, relative to the next two."""
    image_weight: float = 0.3
    """Pre-training: share of the steps with image batches."""
    text_weight: float = 0.05
    """Pre-training: share of the steps with text-only batches."""
    workers: int | None = None
    """Processes per rank that decode media; 0: a thread decodes. By default 0 on a CPU, and with GPUs the cores of each
    rank, less one, but at most 8."""
    shuffle_buffer: int = 256
    """Number of samples that a reader of tar shards holds in memory and shuffles."""
    max_unknown: float = 0.2
    """Fraction of the words of a split that may be unknown to the vocabulary ([UNK])."""
    max_skipped: float = 0.02
    """Fraction of the media files that may fail to decode before the run stops."""

    def __post_init__(self):
        tasks = parse_tasks(self.task)
        object.__setattr__(self, "task", ",".join(tasks))  # without blanks: it names folders, and goes into checkpoints
        check_range(self, "max_steps batch_size accumulation_steps frames max_words shuffle_buffer", 1)
        check_range(self, "questions_per_sample video_weight image_weight text_weight workers", 0)
        check_range(self, "max_skipped max_unknown", 0, 1)
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs}: expected a number above 0")
        if self.task_weights and len(self.shares()) != len(tasks):
            raise ValueError(f"task_weights={self.task_weights!r}: expected one number for each task of {self.task}")
        if not sum(self.batch_weights().values()):
            raise ValueError("all batch types have weight 0, so there is nothing to train on; see task_weights, "
                             "video_weight, image_weight and text_weight")
        if self.augment != "none" and "grounding" in tasks:
            raise ValueError(f"augment={self.augment!r} with task={self.task}: crops would not move the boxes of "
                             "grounding along; use --augment none")
        if self.hflip and self.augment == "none":
            raise ValueError("hflip with augment='none': mirroring is part of augmentation; add --augment finetune")

    def shares(self) -> list[float]:
        """The share of each task, in the order of `task`."""
        try:
            shares = [float(number) for number in self.task_weights.split(",")]
        except ValueError as error:
            raise ValueError(f"task_weights={self.task_weights!r}: expected numbers with single commas between them "
                             f"({error})") from error
        if any(share < 0 for share in shares):
            raise ValueError(f"task_weights={self.task_weights!r}: expected no negative number")
        return shares

    def batch_weights(self) -> dict[str, float]:
        """Shares of the steps by batch type: that of its task, which pre-training divides among its three types."""
        tasks = parse_tasks(self.task)
        weights = dict(zip(tasks, self.shares() if self.task_weights else [1.0] * len(tasks)))
        modalities = {"video": self.video_weight, "image": self.image_weight, "text": self.text_weight}
        total = sum(modalities.values()) or 1
        return {
            name: weights[task] * (modalities[kind.modality] / total if task == "pretrain" else 1.0)
            for task in tasks for name, kind in batch_types(task).items()
        }

    def micro_batch_size(self, world_size: int) -> int:
        """Samples of a micro-batch on one rank. ValueError if the ranks cannot share a batch evenly."""
        parts = world_size * self.accumulation_steps
        if self.batch_size % parts:
            raise ValueError(f"batch_size={self.batch_size} is not divisible by {parts} ({world_size} ranks x "
                             f"{self.accumulation_steps} accumulation steps); change --batch-size")
        return self.batch_size // parts


@dataclass
class TrainingData:
    """The data of a run. Iterating yields this rank's micro-batches on its device, from the current step to the last.

    The position in the data belongs to the state of a run: `state_dict` and `load_state_dict`.
    """

    settings: DataSettings
    process: DistInfo
    seed: int
    roots: dict[Path, float]
    """The folders of the sources, and their weights."""
    samples: dict[str, SampleList]
    """By stream, if its source has JSONL files."""
    shards: dict[str, ShardSet]
    """By stream, if its source has tar shards."""
    tokenizer: Tokenizer
    classes: Mapping[str, tuple[str, ...]]
    """The names of the classes of each task with labels."""
    dataset: Samples
    batches: MixedBatches
    longest: dict[str, int]
    """Tokens of the longest text to write, [SEP] included, by stream of `samples`."""

    def __post_init__(self):
        self.load_state_dict(0, {})

    def __iter__(self) -> Iterator[dict]:
        settings, collate = self.settings, Collate(self.tokenizer, self.classes)
        cuda = self.process.device.type == "cuda"
        if self.shards:
            loader = stream_batches(self.dataset, self.shards, self.batches, collate, self.readers, settings.max_words,
                                    settings.workers, pin=cuda)
        else:
            loader = make_loader(self.dataset, self.batches, collate, settings.workers, pin=cuda)
        if cuda:
            return prefetch(on_device(loader, self.process.device))
        # On a CPU, a second thread that computes would double the threads of torch, and halve the speed of a step.
        return on_device(loader if settings.workers else prefetch(loader), self.process.device)

    def advance(self, batch: dict) -> None:
        """Record that a batch was trained on."""
        self.readers.advance(batch)

    def state_dict(self) -> dict[str, Any]:
        """The positions of all readers of tar shards, on all ranks. Every rank has to call it."""
        return self.readers.collected(all_gather_object(self.readers))

    def load_state_dict(self, step: int, positions: dict[str, Any]) -> None:
        """Continue after `step` steps, with the result of `state_dict`. The number of ranks may be another one."""
        self.batches.start = step
        readers = self.process.world_size * max(1, self.settings.workers)
        self.readers = ReaderState(self.shards, readers, self.settings.shuffle_buffer, self.seed, positions)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return len(self.batches.kinds)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples of each stream."""
        return {stream: len(of_stream) for stream, of_stream in {**self.samples, **self.shards}.items()}

    def files(self) -> dict[str, list[tuple[str, int]]]:
        """The name and the number of bytes of each file that the records come from, by stream, wherever they lie."""
        found: dict[str, list[tuple[str, int]]] = {}
        for stream, of_stream in {**self.samples, **self.shards}.items():
            paths = of_stream.paths if isinstance(of_stream, ShardSet) else [file.path for file in of_stream.files]
            found[stream] = [(path.name, path.stat().st_size) for path in paths]
        return found

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which as many samples are seen as there are."""
        return math.ceil(sum(self.sizes.values()) / self.settings.batch_size)

    @property
    def eval_root(self) -> Path | None:
        """The folder to validate on; None if all sources are tar shards."""
        return eval_root(self.settings, self.roots)

    def longest_text(self) -> int:
        """Tokens of the longest caption or answer, [SEP] included; the decoder has to be able to write it.

        0 if the run writes no text. Texts of tar shards are not read: twice the number of words is assumed.
        """
        writes = {"prompted", "question"}
        writing = [stream for stream in self.sizes if writes & BATCH_TYPES[stream_kind(stream)].fields]
        return max((self.longest.get(stream, 2 * self.settings.max_words) for stream in writing), default=0)

    @property
    def recorded_roots(self) -> list[Path]:
        """The folders that a checkpoint records as its data, the one to validate on first; none for the tiny world."""
        if not self.settings.data:
            return [self.eval_root] if self.settings.eval_data else []
        return list(dict.fromkeys([*([self.eval_root] if self.eval_root else []), *self.roots]))

    def references(self) -> list[list[str]]:
        """The cleaned captions of each sample that a captioning batch may have."""
        captioned = [sample for kind, of_kind in by_batch_type(self.samples).items()
                     if "prompted" in BATCH_TYPES[kind].fields for sample in of_kind if sample.captions]
        return [[clean(caption, self.settings.max_words) for caption in sample.captions] for sample in captioned]

    def names_at(self, step: int) -> str:
        """The samples that this rank waits for at a step, by file and line."""
        at_step = copy.copy(self.batches)
        at_step.start = step
        keys = next(iter(at_step))
        if keys[0][0] in self.shards:
            return f"from the shards of {keys[0][0]}"
        return ", ".join(self.samples[stream][index].source for stream, _, index in keys)


def build_data(
    settings: DataSettings, model: ModelConfig, process: DistInfo, seed: int, tokenizer: Tokenizer | None = None,
    classes: Mapping[str, tuple[str, ...]] | None = None,
) -> TrainingData:
    """Read the sources and prepare the batches of all steps. Every rank has to call it.

    `model` limits the sizes of images and texts. A run that starts from a checkpoint has its `tokenizer`, and a resumed
    run its `classes` too; otherwise they come from the training data. Raises ValueError (RecordError for a line of a
    file) or FileNotFoundError for data that cannot be used.
    """
    settings.micro_batch_size(process.world_size)  # refuse a batch that the ranks cannot share, before reading anything
    if settings.data:
        roots = read_sources(settings.data)
    else:
        if process.is_main:
            print("data: the tiny world; on first use it is written to a cache, in seconds", flush=True)
        run_on_main(tiny_data.ensure, process)
        roots = {tiny_data.ensure(): 1.0}
    samples, shards, weights = read_streams(settings, roots)
    if settings.workers is None:
        workers = default_workers(process.device)
        for shard_set in shards.values():  # each worker of each rank needs a shard
            workers = min(workers, len(shard_set.paths) // process.world_size)
        settings = dataclasses.replace(settings, workers=workers)
    merged = by_batch_type(samples)
    classes = read_classes(merged) if classes is None else classes
    tokenizer = tokenizer or make_tokenizer(settings, samples, model.vocab_size)
    lines, longest = check_run_texts(samples, eval_root(settings, roots), settings.task, tokenizer,
                                     model.max_positions, settings.max_words, settings.max_unknown, classes)
    if process.is_main and lines:
        print("\n".join(lines))
    if len(roots) > 1 and settings.task != "pretrain" and process.is_main:
        if line := held_out_media(roots, settings.task):
            print(line)
    dataset = Samples(
        samples, model.image_size, settings.frames, settings.questions_per_sample, model.max_positions,
        settings.max_words, seed,
        None if settings.augment == "none" else Augmentation(settings.augment, settings.hflip), as_bytes=True,
    )
    sizes = {stream: len(of_stream) for stream, of_stream in {**samples, **shards}.items()}
    batches = MixedBatches(
        sizes, weights, settings.batch_size, number_of_steps(settings, samples, shards), seed, 0, process.rank,
        process.world_size, settings.accumulation_steps,
        {stream: of_stream.groups for stream, of_stream in samples.items()},
    )
    return TrainingData(settings, process, seed, roots, samples, shards, tokenizer, classes, dataset, batches, longest)


def eval_root(settings: DataSettings, roots: Mapping[Path, float]) -> Path | None:
    """The folder to validate on: the one that the settings name, or the first source that is not tar shards."""
    if settings.eval_data:
        return Path(settings.eval_data)
    return next((root for root in roots if not is_shards(root)), None)


def read_sources(text: str) -> dict[Path, float]:
    """The folders in `DIR=2,OTHER=1`, or in `DIR`, and their weights.

    Names may contain "," and "=": an existing folder takes precedence, and so does the longest name. ValueError for
    weights that are not numbers, for a folder that is named twice, and if no weight is above 0.
    """
    parts, sources = text.split(","), []
    while parts:
        for count in range(len(parts), 0, -1):
            name, equals, weight = (one := ",".join(parts[:count])).rpartition("=")
            if os.path.isdir(one) or not equals or "," in weight:
                name, weight = one, "1"
            if os.path.isdir(name):
                break
        if not name:
            raise ValueError(f"data={text!r}: the name of a folder is empty; expected folders with single commas "
                             "between them")
        sources.append((Path(name), weight))
        del parts[:count]
    try:
        weights = {root: float(weight) for root, weight in sources}
    except ValueError as error:
        raise ValueError(f"data={text!r}: expected folders with weights, such as DIR=2,OTHER=1; for a folder whose "
                         "name has '=' or ',', check that it exists") from error
    if len(weights) < len(sources) or not min(weights.values()) >= 0 or not 0 < sum(weights.values()) < math.inf:
        raise ValueError(f"data={text!r}: expected each folder once, and at least one weight above 0")
    return weights


def read_streams(
    settings: DataSettings, roots: dict[Path, float]
) -> tuple[dict[str, Sequence[Sample]], dict[str, ShardSet], dict[str, float]]:
    """The samples and the shards of each stream, and its share of the steps."""
    samples: dict[str, Sequence[Sample]] = {}
    shards: dict[str, ShardSet] = {}
    weights: dict[str, float] = {}
    shares, found = settings.batch_weights(), set()
    for number, (root, weight) in enumerate(roots.items()):
        if is_shards(root) and settings.task != "pretrain":
            raise ValueError(f"{root} contains tar shards, which only pre-training can read; {settings.task} needs "
                             "JSONL files")
        streams = read_shards(root) if is_shards(root) else read_samples(root, settings.task, "train")
        found |= set(streams)
        for kind, of_stream in streams.items():
            if weight and shares[kind]:
                stream = f"{kind}@{number}" if number else kind
                (shards if is_shards(root) else samples)[stream] = of_stream
                weights[stream] = weight
    if not weights:
        raise ValueError(f"{', '.join(map(str, roots))}: all batch types that have training data "
                         f"({', '.join(sorted(found))}) have weight 0; raise one of the weights")
    for kind in {stream_kind(stream) for stream in weights}:  # divide the share of a batch type among its sources
        sources = [stream for stream in weights if stream_kind(stream) == kind]
        total = sum(weights[stream] for stream in sources)
        weights |= {stream: shares[kind] * weights[stream] / total for stream in sources}
    return samples, shards, weights


def by_batch_type(samples: dict[str, Sequence[Sample]]) -> dict[str, Sequence[Sample]]:
    """The samples of all sources, by batch type."""
    parts: dict[str, list[Sequence[Sample]]] = {}
    for stream, of_stream in samples.items():
        parts.setdefault(stream_kind(stream), []).append(of_stream)
    return {kind: Joined(of_kind) for kind, of_kind in parts.items()}


def number_of_steps(
    settings: DataSettings, samples: dict[str, Sequence[Sample]], shards: dict[str, ShardSet]
) -> int:
    """The steps of the whole run: those of `epochs` where it is given, otherwise `max_steps`."""
    if settings.epochs is None:
        return settings.max_steps
    return max(1, math.ceil(settings.epochs * texts_per_epoch(settings, samples, shards) / settings.batch_size))


def texts_per_epoch(settings: DataSettings, samples: dict[str, Sequence[Sample]], shards: dict[str, ShardSet]) -> int:
    """Number of samples that an epoch has to draw until each caption, question or label was seen once."""
    counts = (max(len(sample.captions), math.ceil(len(sample.qa) / max(1, settings.questions_per_sample)), 1)
              for of_stream in samples.values() for sample in of_stream)
    return sum(counts) + sum(map(len, shards.values()))


def make_tokenizer(settings: DataSettings, samples: dict[str, Sequence[Sample]], vocab_size: int) -> Tokenizer:
    """The tokenizer of `--tokenizer`, or one with at most `vocab_size` tokens, trained on the training texts."""
    if settings.tokenizer:
        return Tokenizer.load(settings.tokenizer)
    if not samples:
        raise ValueError("tar shards: a vocabulary cannot be trained on them; add --tokenizer, or a checkpoint with "
                         "--init")
    texts = (
        text for of_stream in samples.values() for sample in of_stream for text in (
            *sample.captions, *sample.texts,
            *(text for question in sample.qa for text in (question.question, *question.answers)))
    )
    texts = itertools.chain(texts, PROMPTS.values(), INSTRUCTIONS.values())
    return Tokenizer.train((clean(text, settings.max_words) for text in texts), vocab_size)
