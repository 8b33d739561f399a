"""Samples: the records of all files about the same image, video or text, joined; and training items made from them.

    <task>.<split>.jsonl --read_records--> Record --read_samples--> Sample --Samples--> item --Collate--> batch

Everything random about an item (frames, caption, questions, masked words) is drawn from (seed, stream, epoch, index).
An item is therefore the same whatever the number of workers and ranks.

Axes: `t` frames, `H W` pixels.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mplug2.data.media import MediaError, read_image, read_video, to_bytes, to_pixels
from mplug2.data.record_fields import short
from mplug2.data.records import Question, Record, RecordError, Records, available, raise_all, read_records
from mplug2.data.text import Tokenizer, clean
from mplug2.data.transforms import Augmentation, augment
from mplug2.tasks import BATCH_TYPES, INSTRUCTIONS, PROMPTS, RECORD_FIELDS, batch_types, parse_tasks


@dataclass(frozen=True)
class Sample:
    """Everything that the records of a task say about one image, video or text."""

    source: str
    """File and line of its first record, for messages."""
    positive_id: int
    """Samples with equal numbers are positives of each other (`Record.positive_id`)."""
    media: Path | None = None
    captions: tuple[str, ...] = ()
    qa: tuple[Question, ...] = ()
    images: tuple[Path, ...] = ()
    """Two images, instead of `media`."""
    texts: tuple[str, ...] = ()
    """The text, or the pair of texts, that a label or a box refers to."""
    label: str | float | None = None
    box: tuple[float, float, float, float] | None = None


class SampleList(Sequence[Sample]):
    """The samples of one batch type from the files of one folder. A sample is made when it is used.

    In memory are 16 bytes per record: which records belong to which sample (see also `Records`). Batch groups take
    another 8.
    """

    def __init__(self, files: list[Records], joined: bool):
        """joined: all records about a media file make one sample; otherwise each record is a sample."""
        self.files, self.joined = files, joined
        self.ends = np.cumsum([len(file) for file in files])
        hashes = np.concatenate([file.media_hashes for file in files])
        self.order = np.arange(len(hashes))
        self.starts = np.arange(len(hashes) + 1)
        if joined:
            sample_of = _numbered(hashes)
            self.order = np.argsort(sample_of, kind="stable")
            self.starts = np.append(0, np.cumsum(np.bincount(sample_of)))
        self.groups: np.ndarray | None = None
        """A number for each sample, equal for samples that should meet in a batch (the `batch_group` of their first
        record); None if no record has one."""
        if any(file.group_hashes is not None for file in files):
            groups = [file.media_hashes if file.group_hashes is None else file.group_hashes for file in files]
            self.groups = _numbered(np.concatenate(groups)[self.order[self.starts[:-1]]])
        for file in files:
            file.media_hashes = file.group_hashes = None

    def without_captions(self, captioned: list[bool]) -> int | None:
        """The first sample without a record of the files that are `captioned`."""
        has = np.repeat(captioned, [len(file) for file in self.files])[self.order]
        lacking = np.flatnonzero(~np.logical_or.reduceat(has, self.starts[:-1]))
        return int(lacking[0]) if len(lacking) else None

    def _record(self, number: int) -> Record:
        file = int(np.searchsorted(self.ends, number, side="right"))
        return self.files[file][int(number) - (int(self.ends[file - 1]) if file else 0)]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        records = [self._record(number) for number in self.order[self.starts[index]: self.starts[index + 1]]]
        return _merge(records) if self.joined else _labelled(records[0])

    def __iter__(self) -> Iterator[Sample]:
        if len(self.files) == 1 and len(self) == len(self.order):  # in the order of the file, which is faster to read
            yield from (_merge([record]) if self.joined else _labelled(record) for record in self.files[0])
        else:
            yield from (self[index] for index in range(len(self)))


def _numbered(hashes: np.ndarray) -> np.ndarray:
    """Equal hashes get equal numbers, from 0, in the order in which they first appear (Python's hashes of texts differ
    from process to process)."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse]


class Joined(Sequence[Sample]):
    """Several sequences of samples, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Sample]]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Sample:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def __iter__(self) -> Iterator[Sample]:
        return (sample for part in self.parts for sample in part)


def read_samples(root: Path, tasks: str, split: str) -> dict[str, SampleList]:
    """Read the samples of one task, or of several ("video_caption,video_qa"), by batch type.

    The questions about a video are joined with its captions. Batch types of pre-training without a file are left out.

    Raises FileNotFoundError if a task has no file at all, and RecordError for an unlabelled record or for a
    pre-training sample without captions: a rank whose samples lack captions would have other losses than the other
    ranks, which would wait for it.
    """
    splits, samples = available(root), {}
    for task in parse_tasks(tasks):
        of_task = {}
        for name, batch_type in batch_types(task).items():
            files = [read_records(root, file, split) for file in batch_type.files if split in splits.get(file, ())]
            for records in files:
                if records.unlabelled is not None:
                    raise RecordError(f"{records[records.unlabelled].source}: this record is unlabelled and cannot be "
                                      "trained on; add its label, or move it to a split of its own")
            if files:
                of_task[name] = SampleList(files, joined=not batch_type.fields & {"label", "box"})
                captioned = [not {"captions", "text"}.isdisjoint(RECORD_FIELDS[records.task]) for records in files]
                lacking = of_task[name].without_captions(captioned) if task == "pretrain" else None
                if lacking is not None:
                    sample = of_task[name][lacking]
                    raise RecordError(
                        f"{sample.source}: {sample.media} has questions but no captions, and pre-training needs both; "
                        f"add captions to {name}_caption.{split}.jsonl, remove this line, or train --task {name}_qa"
                    )
        if not of_task:
            expected = ", ".join(f"{file}.{split}.jsonl" for each in batch_types(task).values() for file in each.files)
            raise FileNotFoundError(f"{root} has no data for {task}, split {split}: expected one or more of {expected}")
        samples |= of_task
    return samples


def read_classes(samples: Mapping[str, Sequence[Sample]]) -> dict[str, tuple[str, ...]]:
    """The class names that the labels use, sorted, by task. A task with numbers as labels (regression) has none.

    Raises RecordError for a mixture of names and numbers, and for labels that are all equal: nothing can be learned.
    """
    classes = {}
    for kind, of_kind in samples.items():
        if "label" not in BATCH_TYPES[kind].fields:
            continue
        first: dict[str | float, str] = {}  # the place of the first sample with each label
        for sample in of_kind:
            first.setdefault(sample.label, sample.source)
        numbers = [label for label in first if isinstance(label, float)]
        if numbers and len(numbers) < len(first):
            raise RecordError(f"{first[numbers[0]]}: the label {numbers[0]} is a number, others are names of "
                              "classes; quote the numbers, or use numbers only")
        if len(first) == 1:
            (label, source), = first.items()
            raise RecordError(f"{source}: every label is {label!r}, here and everywhere else; "
                              "expected at least two classes")
        classes[BATCH_TYPES[kind].task] = () if numbers else tuple(sorted(first))
    return classes


def sample_of(record: Record) -> Sample:
    """The sample of one record."""
    return _labelled(record) if record.label is not None or record.box else _merge([record])


def _labelled(record: Record) -> Sample:
    """One sample per record: other records may pair the same image with other texts."""
    return Sample(
        record.source, _id_number(record.positive_id), record.video or record.image, images=record.images,
        texts=record.texts or ((record.text,) if record.text else ()), label=record.label, box=record.box,
    )


def stream_kind(stream: str) -> str:
    """The batch type of a stream: "video" for "video", and for "video@1", the videos of the second source."""
    return stream.partition("@")[0]


def _merge(records: list[Record]) -> Sample:
    """The sample of all records about the same media file."""
    return Sample(
        source=records[0].source, positive_id=_id_number(records[0].positive_id),
        media=records[0].video or records[0].image,
        captions=tuple(text for record in records for text in record.captions or (record.text,) if text),
        qa=tuple(question for record in records for question in record.qa),
    )


def _id_number(positive_id: str) -> int:
    """A 63-bit number for a text, the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.blake2b(positive_id.encode(), digest_size=8).digest(), "big") >> 1


def check_texts(samples: Mapping[str, Sequence[Sample]], tokenizer: Tokenizer, limit: int, max_words: int) -> None:
    """Refuse texts without words, or with more than `limit` tokens. The RecordError lists all of them."""
    raise_all([problem for kind, of_kind in samples.items() for sample in of_kind
               for problem in text_problems(sample, kind, tokenizer, limit, max_words)])


def text_problems(sample: Sample, kind: str, tokenizer: Tokenizer, limit: int, max_words: int) -> Iterator[str]:
    """An error message for each text of a sample without words, or with more than `limit` tokens."""
    prompt_length, fields = 0, BATCH_TYPES[kind].fields
    if sample.captions and "prompted" in fields and (words := PROMPTS.get(BATCH_TYPES[kind].modality)):
        prompt_length = tokenizer.lengths([words])[0] - 2
    for caption in sample.captions:
        yield from text_problem(sample.source, caption, tokenizer, limit, max_words, prompt_length)
    for question in sample.qa:
        for text in (question.question, *question.answers):
            yield from text_problem(sample.source, text, tokenizer, limit, max_words)
    if sample.texts:
        yield from text_problem(sample.source, sample.texts, tokenizer, limit, max_words)


def text_problem(
    source: str, text: str | Sequence[str], tokenizer: Tokenizer, limit: int, max_words: int, prompt_length: int = 0
) -> Iterator[str]:
    """An error message, if a text (or pair of texts) has no words, or more than `limit` tokens with the prompt."""
    texts = (text,) if isinstance(text, str) else text
    if (empty := next((one for one in texts if not clean(one, max_words)), None)) is not None:
        yield f"{source}: the text {short(empty)} has no words; remove it"
        return
    joined = join_text_pair(texts, max_words)
    # A text has at most as many tokens as letters, so a short one does not need the tokenizer.
    if len(joined) + prompt_length + 2 <= limit:
        return
    if (count := tokenizer.lengths([joined])[0] + prompt_length) > limit:
        yield (f"{source}: the text {short(' / '.join(texts))} has {count} tokens (with [CLS], [SEP] and prompt), the "
               f"model takes {limit}; shorten it, lower max_words ({max_words}), or raise max_positions")


def join_text_pair(texts: Sequence[str], max_words: int) -> str:
    """The cleaned text, or two cleaned texts with [SEP] between them, as in BERT (but with one token type for both)."""
    return " [SEP] ".join(clean(text, max_words) for text in texts)


class Samples(torch.utils.data.Dataset):
    """The training items: `samples[stream, epoch, index]`.

    A file that cannot be decoded is replaced by the next sample; the error message is kept in the item. With
    `as_bytes`, pixels are not normalized yet: `loader.on_device` does that.
    """

    def __init__(
        self, samples: Mapping[str, Sequence[Sample]], image_size: int, frames: int, questions: int, max_positions: int,
        max_words: int, seed: int, augmentation: Augmentation | None = None, as_bytes: bool = False,
    ):
        self.samples, self.seed, self.augmentation, self.as_bytes = samples, seed, augmentation, as_bytes
        self.image_size, self.frames, self.questions = image_size, frames, questions
        self.max_positions, self.max_words = max_positions, max_words

    def __getitem__(self, key: tuple[str, int, int]) -> dict:
        stream, epoch, index = key
        kind, of_stream, errors = stream_kind(stream), self.samples[stream], []
        for shift in range(min(16, len(of_stream))):
            number = (index + shift) % len(of_stream)
            sample = of_stream[number]
            rng = np.random.default_rng((self.seed, *stream.encode(), epoch, number))
            try:
                pixels = self.pixels(sample, kind, rng)
                return {**self.texts(sample, kind, rng), "pixels": pixels, "source": sample.source, "errors": errors}
            except MediaError as error:
                errors.append(f"{sample.source}: {error}")
        raise MediaError(f"{len(errors)} files in a row cannot be decoded; the first: {errors[0]}")

    def pixels(self, sample: Sample, kind: str, rng: np.random.Generator) -> Tensor | None:
        """`3 t H W`; `2 3 1 H W` for a pair of images; None for a text."""
        if sample.images:
            return torch.stack([self.prepare(self.read_image(image), "image", rng) for image in sample.images])
        if sample.media is None:
            return None
        modality = BATCH_TYPES[kind].modality
        frames = read_video(sample.media, self.frames, rng) if modality == "video" else self.read_image(sample.media)
        return self.prepare(frames, modality, rng)

    def read_image(self, path: Path) -> np.ndarray:
        """uint8 (1, H, W, 3). A large photo is decoded at a reduced size that leaves enough pixels for any crop."""
        return read_image(path, min_side=(4 if self.augmentation else 2) * self.image_size)

    def prepare(self, frames: np.ndarray, modality: str, rng: np.random.Generator) -> Tensor:
        """Augment, resize and normalize: uint8 (t, H, W, 3) to float32 (with `as_bytes`, uint8) `3 t H W`."""
        if self.augmentation:
            frames = augment(frames, self.image_size, modality, self.augmentation, rng)
        return (to_bytes if self.as_bytes else to_pixels)(frames, self.image_size)

    def texts(self, sample: Sample, kind: str, rng: np.random.Generator) -> dict:
        """Draw one caption, `r` questions with one answer each, and the noise that chooses the masked words.

        A sample with a label or a box has the text that these refer to instead.
        """
        captions, modality = sample.captions, BATCH_TYPES[kind].modality
        item = {"kind": kind, "positive_id": sample.positive_id, "noise": rng.random((3, self.max_positions))}
        if captions:
            item["caption"] = self.clean(captions[rng.integers(len(captions))])
            item["references"] = [self.clean(caption) for caption in captions]
        if sample.texts:
            item["text"] = join_text_pair(sample.texts, self.max_words)
        item |= {name: value for name in ("label", "box") if (value := getattr(sample, name)) is not None}
        asked = list(sample.qa)
        if captions and modality in INSTRUCTIONS:
            asked.append(Question(INSTRUCTIONS[modality], captions, "describe"))
        # Every kind of question is equally likely, however many questions it has, and none repeats before all were
        # drawn.
        kinds = sorted({question.kind or "" for question in asked})
        order = [kind for _ in range(-(-self.questions // max(1, len(kinds)))) for kind in rng.permutation(kinds)]
        for drawn in order[: self.questions]:
            candidates = [question for question in asked if (question.kind or "") == drawn]
            question = candidates[rng.integers(len(candidates))]
            answer = question.answers[rng.integers(len(question.answers))]
            item.setdefault("questions", []).append((self.clean(question.question), self.clean(answer)))
        return item

    def clean(self, text: str) -> str:
        return clean(text, self.max_words)
