"""From records to batches: what a training step of each kind sees, and in which order.

A step has one kind of batch, the same on every process, in proportion to given weights: `video`, `image` or `text` in
pre-training; else a kind is a task.
Everything random about a sample (frames, caption, questions, masked words) comes from (seed, kind, epoch, index): a
batch is a function of the step number alone, however many workers and processes there are.

Axes: b samples of this process, r questions a sample, t frames, l text tokens, y classes.
"""

import atexit
import gc
import hashlib
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mplug2.data.media import MediaError, read_image, read_video, to_pixels
from mplug2.data.records import Question, Record, RecordError, available, read_records
from mplug2.data.transforms import Augmentation, augment
from mplug2.model import split_tasks
from mplug2.tokenizer import Tokenizer, clean

PROMPTS = {"video": "a video of", "image": "a picture of"}
INSTRUCTIONS = {"video": "what does the video describe", "image": "what does the picture describe"}


@dataclass(frozen=True)
class Kind:
    """A kind of batch: for which task, of what, from which files, and with which parts (see `Collate`)."""

    task: str
    medium: Literal["video", "image", "text"]
    files: tuple[str, ...]
    parts: frozenset[str]


def _kind(task: str, medium: str, *parts: str) -> dict[str, Kind]:
    return {task: Kind(task, medium, (task,), frozenset(parts))}


PRETRAINING = frozenset({"caption", "masked", "prompted", "question"})
KINDS: dict[str, dict[str, Kind]] = {
    "text_classification": _kind("text_classification", "text", "text", "label"),
    "text_pair_classification": _kind("text_pair_classification", "text", "text", "label"),
    "image_classification": _kind("image_classification", "image", "label"),
    "video_classification": _kind("video_classification", "video", "label"),
    "image_retrieval": _kind("image_retrieval", "image", "caption"),
    "video_retrieval": _kind("video_retrieval", "video", "caption"),
    "image_caption": _kind("image_caption", "image", "prompted"),
    "video_caption": _kind("video_caption", "video", "prompted"),
    "image_qa": _kind("image_qa", "image", "question"),
    "video_qa": _kind("video_qa", "video", "question"),
    "visual_entailment": _kind("visual_entailment", "image", "text", "label"),
    "image_pair_reasoning": _kind("image_pair_reasoning", "image", "text", "label"),
    "grounding": _kind("grounding", "image", "text", "box"),
    "pretrain": {
        "video": Kind("pretrain", "video", ("video_caption", "video_qa"), PRETRAINING),
        "image": Kind("pretrain", "image", ("image_caption", "image_qa"), PRETRAINING),
        "text": Kind("pretrain", "text", ("text_only",), PRETRAINING),
    },
}
"""For each task: the kinds of batches it mixes."""
KIND: dict[str, Kind] = {name: kind for kinds in KINDS.values() for name, kind in kinds.items()}
"""Each kind by its name."""


@dataclass(frozen=True)
class Sample:
    """What is known about one picture, clip or sentence, of all files that speak of it."""

    where: str
    meaning: int
    media: Path | None = None
    captions: tuple[str, ...] = ()
    qa: tuple[Question, ...] = ()
    images: tuple[Path, ...] = ()
    """Two images, in place of `media`."""
    texts: tuple[str, ...] = ()
    """What a label or a box is about: one text, or a pair."""
    label: str | float | None = None
    box: tuple[float, float, float, float] | None = None


def read_samples(root: Path, tasks: str, split: str) -> dict[str, list[Sample]]:
    """The samples of a task, or of several ("video_caption,video_qa"), by kind.

    Questions about a clip join its captions; kinds of pre-training without a file are left out.

    Raises FileNotFoundError if there is no file at all, RecordError for a clip in pre-training that has no captions: a
    process whose clips lack them would have other losses than the next process, which waits for it.
    """
    there, samples = available(root), {}
    for task in split_tasks(tasks):
        of_task = {}
        for name, kind in KINDS[task].items():
            records = [record for file in kind.files if split in there.get(file, ())
                       for record in read_records(root, file, split)]
            if hidden := next((record for record in records if record.unlabelled), None):
                raise RecordError(f"{hidden.where}: an unlabelled record can be predicted, but not learned from; "
                                  "give it its truth, or move it to a split of its own")
            if records:
                apart = kind.parts & {"label", "box"}
                of_task[name] = [_labelled(record) for record in records] if apart else _merge(records)
            for sample in of_task.get(name, ()):
                if task == "pretrain" and not sample.captions:
                    raise RecordError(
                        f"{sample.where}: questions about {sample.media}, but no captions, as pre-training needs; "
                        f"add them to {name}_caption.{split}.jsonl, take this line out, or train --task {name}_qa"
                    )
        if not of_task:
            wanted = ", ".join(f"{file}.{split}.jsonl" for kind in KINDS[task].values() for file in kind.files)
            raise FileNotFoundError(f"{root} has no data for {task}, split {split}: expected one or more of {wanted}")
        samples |= of_task
    return samples


def read_classes(samples: dict[str, list[Sample]]) -> dict[str, tuple[str, ...]]:
    """The classes that labels name, by task, in the order of their names; none of a task whose labels are numbers.

    Raises RecordError where names and numbers are mixed, or all labels are equal: there is nothing to learn then.
    """
    classes = {}
    for kind, of_kind in samples.items():
        if "label" not in KIND[kind].parts:
            continue
        numbers = [sample for sample in of_kind if isinstance(sample.label, float)]
        if numbers and len(numbers) < len(of_kind):
            raise RecordError(f"{numbers[0].where}: the label {numbers[0].label} is a number, others are names of "
                              "classes; write the names in quotes, or make all of them numbers")
        if len({sample.label for sample in of_kind}) == 1:
            raise RecordError(f"{of_kind[0].where}: every label is {of_kind[0].label!r}, as this one; "
                              "expected two classes at least")
        classes[KIND[kind].task] = () if numbers else tuple(sorted({sample.label for sample in of_kind}))
    return classes


def _labelled(record: Record) -> Sample:
    """Every record by itself: there may be other texts about the same image."""
    return Sample(
        record.where, _number(record.meaning), record.video or record.image, images=record.images,
        texts=record.texts or ((record.text,) if record.text else ()), label=record.label, box=record.box,
    )


def stream_kind(stream: str) -> str:
    """What a stream has batches of: "video" for both "video" and "video@1", that of the second source."""
    return stream.partition("@")[0]


def _merge(records: list[Record]) -> list[Sample]:
    by_media: dict[Path | str, list[Record]] = {}
    for record in records:
        by_media.setdefault(record.video or record.image or record.where, []).append(record)
    return [
        Sample(
            where=group[0].where, meaning=_number(group[0].meaning), media=group[0].video or group[0].image,
            captions=sum((record.captions or (record.text,) for record in group if record.captions or record.text), ()),
            qa=sum((record.qa for record in group), ()),
        )
        for group in by_media.values()
    ]


def _number(meaning: str) -> int:
    """The same 63-bit number for the same text, on every process."""
    return int.from_bytes(hashlib.blake2b(meaning.encode(), digest_size=8).digest(), "big") >> 1


def check_texts(samples: dict[str, list[Sample]], tokenizer: Tokenizer, limit: int, max_words: int) -> None:
    """Refuse, before any work starts, a text that `limit` tokens cannot hold; RecordError names its place."""
    for kind, of_kind in samples.items():
        prompt = 0
        if "prompted" in KIND[kind].parts and (words := PROMPTS.get(KIND[kind].medium)):
            prompt = len(tokenizer.encode([words], special=False)[0][0])
        for sample in of_kind:
            texts = [(caption, prompt) for caption in sample.captions]
            texts += [(text, 0) for question in sample.qa for text in (question.question, *question.answers)]
            whole = [(text, clean(text, max_words), extra) for text, extra in texts]
            if sample.texts:
                part = next((text for text in sample.texts if not clean(text, max_words)), None)
                whole.append((" / ".join(sample.texts), joined(sample.texts, max_words), 0) if part is None
                             else (part, "", 0))
            for text, cleaned, extra in whole:
                if not cleaned:
                    raise RecordError(f"{sample.where}: the text {text!r} has no words; take it out")
                # Few words and short ones need no tokenizer: a word is at most as many tokens as letters.
                if len(cleaned) + extra + 2 <= limit:
                    continue
                if (count := tokenizer.lengths([cleaned])[0] + extra) > limit:
                    raise RecordError(
                        f"{sample.where}: the text {text!r} has {count} tokens (with [CLS], [SEP] and prompt), the "
                        f"model takes {limit}; shorten it, lower max_words ({max_words}), or raise max_positions"
                    )


def joined(texts: Sequence[str], max_words: int) -> str:
    """One text, or the two of a pair as one: [SEP] between them, as BERT has it (but with one token type for both)."""
    return " [SEP] ".join(clean(text, max_words) for text in texts)


class Samples(torch.utils.data.Dataset):
    """`samples[stream, epoch, index]`: a training item. A file that cannot be decoded is replaced by the next sample,
    and its error travels with the item."""

    def __init__(
        self, samples: dict[str, list[Sample]], image_size: int, frames: int, questions: int, max_positions: int,
        max_words: int, seed: int, augmentation: Augmentation | None = None,
    ):
        self.samples, self.seed, self.augmentation = samples, seed, augmentation
        self.image_size, self.frames, self.questions = image_size, frames, questions
        self.max_positions, self.max_words = max_positions, max_words

    def __getitem__(self, key: tuple[str, int, int]) -> dict:
        stream, epoch, index = key
        kind, of_kind, errors = stream_kind(stream), self.samples[stream], []
        for shift in range(min(16, len(of_kind))):
            number = (index + shift) % len(of_kind)
            sample = of_kind[number]
            rng = np.random.default_rng((self.seed, *stream.encode(), epoch, number))
            try:
                pixels = self.pixels(sample, kind, rng)
                return {**self.texts(sample, kind, rng), "pixels": pixels, "where": sample.where, "errors": errors}
            except MediaError as error:
                errors.append(f"{sample.where}: {error}")
        raise MediaError(f"{len(errors)} files in a row cannot be decoded; the first: {errors[0]}")

    def pixels(self, sample: Sample, kind: str, rng: np.random.Generator) -> Tensor | None:
        """`3 t H W`, of a pair of images `2 3 1 H W`, of a text None."""
        if sample.images:
            return torch.stack([self.prepare(read_image(image), "image", rng) for image in sample.images])
        if sample.media is None:
            return None
        medium = KIND[kind].medium
        frames = read_video(sample.media, self.frames, rng) if medium == "video" else read_image(sample.media)
        return self.prepare(frames, medium, rng)

    def prepare(self, frames: np.ndarray, medium: str, rng: np.random.Generator) -> Tensor:
        if self.augmentation:
            frames = augment(frames, self.image_size, medium, self.augmentation, rng)
        return to_pixels(frames, self.image_size)

    def texts(self, sample: Sample, kind: str, rng: np.random.Generator) -> dict:
        """One caption, r questions with an answer each, and the random numbers that choose the masked words; or the
        text that a label or a box is about."""
        captions, medium = sample.captions, KIND[kind].medium
        item = {"kind": kind, "meaning": sample.meaning, "noise": rng.random((3, self.max_positions))}
        if captions:
            item["caption"] = self.clean(captions[rng.integers(len(captions))])
            item["references"] = [self.clean(caption) for caption in captions]
        if sample.texts:
            item["text"] = joined(sample.texts, self.max_words)
        item |= {name: value for name in ("label", "box") if (value := getattr(sample, name)) is not None}
        asked = list(sample.qa)
        if captions and medium in INSTRUCTIONS:
            asked.append(Question(INSTRUCTIONS[medium], captions, "describe"))
        # Each kind of question is as likely as any other, however many of it there are, and comes again only when all
        # have come.
        kinds = sorted({question.kind or "" for question in asked})
        order = [kind for _ in range(-(-self.questions // max(1, len(kinds)))) for kind in rng.permutation(kinds)]
        for drawn in order[: self.questions]:
            of_drawn = [question for question in asked if (question.kind or "") == drawn]
            question = of_drawn[rng.integers(len(of_drawn))]
            answer = question.answers[rng.integers(len(question.answers))]
            item.setdefault("questions", []).append((self.clean(question.question), self.clean(answer)))
        return item

    def clean(self, text: str) -> str:
        return clean(text, self.max_words)


class Collate:
    """Items of one kind -> a batch of tensors, as the parts of the kind ask for:

        caption     caption_ids and caption_mask, to compare with vision
        masked      the same, with masked_ids and masked
        prompted    prompted_ids, prompted_mask, prompt_length and references (texts), to write captions
        question    question_* and answer_*
        text        text_ids and text_mask, that a label or a box is about
        label       label: the number of the class `b`, or the number to predict
        box         box, `b 4`

    `classes`: the names of the classes by task (`read_classes`; those of the model).
    """

    def __init__(self, tokenizer: Tokenizer, classes: Mapping[str, tuple[str, ...]] = {}):
        self.tokenizer = tokenizer
        self.numbers = {task: {name: i for i, name in enumerate(names)} for task, names in classes.items()}

    def __call__(self, items: list[dict]) -> dict:
        kind = KIND[items[0]["kind"]]
        parts = kind.parts
        batch = {
            "kind": items[0]["kind"],
            "task": kind.task,
            "where": [item["where"] for item in items],
            "errors": [error for item in items for error in item["errors"]],
            "meaning": torch.tensor([item["meaning"] for item in items]),
        }
        if kind.medium != "text":
            batch["pixels"] = torch.stack([item["pixels"] for item in items])
        captions = [item.get("caption") for item in items]
        if "caption" in parts and all(captions):
            ids, mask = self.tokenizer.encode(captions)
            batch |= {"caption_ids": ids, "caption_mask": mask}
            if "masked" in parts:
                batch |= self.masked(ids, mask, np.stack([item["noise"] for item in items]))
        if "prompted" in parts and kind.medium != "text" and all(captions):
            prompt = PROMPTS[kind.medium]
            batch["prompted_ids"], batch["prompted_mask"] = self.tokenizer.encode([f"{prompt} {c}" for c in captions])
            prompt_length = 1 + self.tokenizer.encode([prompt], special=False)[0].shape[1]
            batch["prompted_places"] = label_places(batch["prompted_mask"], prompt_length)
            batch["prompt_length"] = prompt_length
            batch["references"] = [item["references"] for item in items]
        if "text" in parts:
            batch["text_ids"], batch["text_mask"] = self.tokenizer.encode([item["text"] for item in items])
        if "label" in parts:
            batch["label"] = torch.tensor([self.number(kind.task, item) for item in items])
        if "box" in parts:
            batch["box"] = torch.tensor([item["box"] for item in items])
        if "question" in parts and all("questions" in item for item in items):
            questions, answers = zip(*(pair for item in items for pair in item["questions"]))
            batch["question_ids"], batch["question_mask"] = self.tokenizer.encode(list(questions))
            batch["answer_ids"], batch["answer_mask"] = self.tokenizer.encode(list(answers))
            batch["answer_places"] = label_places(batch["answer_mask"])
        return batch

    def number(self, task: str, item: dict) -> int | float:
        """Of the class, or the number that is to be predicted. RecordError for a class that is not of the model's."""
        numbers, label = self.numbers[task], item["label"]
        if isinstance(label, float) == bool(numbers) or (numbers and label not in numbers):
            expected = f"one of {', '.join(numbers)}" if numbers else "a number"
            raise RecordError(f"{item['where']}: label {label!r}: this model was made for {expected}")
        return numbers[label] if numbers else label

    def masked(self, ids: Tensor, mask: Tensor, noise: np.ndarray) -> dict[str, Tensor]:
        """15 % of the words, `b l`: of these 80 % become [MASK], 10 % a random token, 10 % stay. Source: BERT."""
        tokenizer = self.tokenizer
        choose, how, which = torch.from_numpy(noise[:, :, : ids.shape[1]]).unbind(dim=1)
        masked = mask & (choose < 0.15) & (ids != tokenizer.cls) & (ids != tokenizer.sep)
        random = 5 + (which * (len(tokenizer) - 5)).long()
        replaced = torch.where(how < 0.8, tokenizer.mask, torch.where(how < 0.9, random, ids))
        return {"masked_ids": torch.where(masked, replaced, ids), "masked_places": masked.flatten().nonzero()[:, 0]}


def label_places(mask: Tensor, prompt_length: int = 1) -> Tensor:
    """Of the predictions `b (l-1)` of the next tokens of texts with `mask` (`b l`), those that carry a loss, as
    indices into `(b (l-1))`: neither padding nor the first `prompt_length` tokens, [CLS] and a prompt, are labels.

    Found here, on the CPU: to look for them on a GPU would make the program wait for it.
    """
    labels = mask[:, 1:].clone()
    labels[:, : prompt_length - 1] = False
    return labels.flatten().nonzero()[:, 0]


def schedule(weights: dict[str, float], steps: int) -> list[str]:
    """The kind of each step: always the one that is furthest behind its share."""
    whole, counts, kinds = sum(weights.values()), dict.fromkeys(weights, 0), []
    for step in range(steps):
        kind = max(weights, key=lambda name: weights[name] / whole * (step + 1) - counts[name])
        counts[kind] += 1
        kinds.append(kind)
    return kinds


class MixedBatches(torch.utils.data.Sampler):
    """Keys (kind, epoch, index) of this process' share of every batch, from step `start` to step `steps`; if a step is
    made of several micro-batches (`accumulate`), those of each of them.

    Each kind runs through its samples in an order that is drawn anew every epoch. Process `rank` of `world` takes every
    world-th sample of the global batch: where a step stands in the stream does not depend on the number of processes.
    """

    def __init__(
        self, sizes: dict[str, int], weights: dict[str, float], batch_size: int, steps: int, seed: int, start: int = 0,
        rank: int = 0, world: int = 1, accumulate: int = 1,
    ):
        self.sizes, self.batch_size, self.seed, self.start = sizes, batch_size, seed, start
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.kinds = schedule(weights, steps)
        self.orders: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return (len(self.kinds) - self.start) * self.accumulate

    def turns(self) -> Iterator[tuple[str, int]]:
        """Of each micro-batch its kind, and how many of that kind came before it, since step 0."""
        counts = dict.fromkeys(self.sizes, 0)
        for step, kind in enumerate(self.kinds):
            for _ in range(self.accumulate):
                if step >= self.start:
                    yield kind, counts[kind]
                counts[kind] += 1

    def __iter__(self) -> Iterator[list[tuple[str, int, int]]]:
        size = self.batch_size // self.accumulate
        for kind, count in self.turns():
            yield [self.key(kind, count * size + i) for i in range(self.rank, size, self.world)]

    def key(self, kind: str, position: int) -> tuple[str, int, int]:
        """The sample at a position of the endless stream of one kind."""
        epoch, place = divmod(position, self.sizes[kind])
        if (kind, epoch) not in self.orders:
            self.orders = {key: order for key, order in self.orders.items() if key[0] != kind or key[1] == epoch - 1}
            rng = np.random.default_rng((self.seed, *kind.encode(), epoch))
            self.orders[kind, epoch] = rng.permutation(self.sizes[kind])
        return kind, epoch, int(self.orders[kind, epoch][place])


def make_loader(dataset: Samples, batches: MixedBatches, collate: Collate, workers: int, pin: bool) -> DataLoader:
    # A generator of its own: else every new loader would draw from torch's, and a resumed run would go on with other
    # random numbers than the run that never stopped.
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None, generator=torch.Generator(), worker_init_fn=start_worker,
    )


def start_worker(_: int) -> None:
    """imageio collects garbage whenever it closes a video: what is there at the start need not be looked at again.

    Signals that ask the run to stop reach its workers too: they go on until the training process has what it needs, and
    end with it."""
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def ahead(batches: Iterable[dict]) -> Iterator[dict]:
    """Each batch is made by a thread while the one before it is used: what workers do, where there are none."""
    coming = iter(batches)
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(next, coming, None)
        while (batch := made.result()) is not None:
            made = thread.submit(next, coming, None)
            yield batch


@atexit.register
def end_workers() -> None:
    """Python ends what workers are left when it exits by SIGTERM, which they do not hear: it would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
