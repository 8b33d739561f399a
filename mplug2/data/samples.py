"""Samples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mplug2.data.media import MediaError, read_image, read_video, to_pixels
from mplug2.data.records import Question, Record, RecordError, available, read_records
from mplug2.data.text import Tokenizer, clean
from mplug2.data.transforms import Augmentation, augment
from mplug2.tasks import BATCH_TYPES, INSTRUCTIONS, PROMPTS, batch_types, parse_tasks


@dataclass(frozen=True)
class Sample:
    """What is known about one picture, clip or sentence, of all files that speak of it."""

    source: str
    positive_id: int
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
    for task in parse_tasks(tasks):
        of_task = {}
        for name, kind in batch_types(task).items():
            records = [record for file in kind.files if split in there.get(file, ())
                       for record in read_records(root, file, split)]
            if hidden := next((record for record in records if record.unlabelled), None):
                raise RecordError(f"{hidden.source}: an unlabelled record can be predicted, but not learned from; "
                                  "give it its truth, or move it to a split of its own")
            if records:
                apart = kind.fields & {"label", "box"}
                of_task[name] = [_labelled(record) for record in records] if apart else _merge(records)
            for sample in of_task.get(name, ()):
                if task == "pretrain" and not sample.captions:
                    raise RecordError(
                        f"{sample.source}: questions about {sample.media}, but no captions, as pre-training needs; "
                        f"add them to {name}_caption.{split}.jsonl, take this line out, or train --task {name}_qa"
                    )
        if not of_task:
            wanted = ", ".join(f"{file}.{split}.jsonl" for kind in batch_types(task).values() for file in kind.files)
            raise FileNotFoundError(f"{root} has no data for {task}, split {split}: expected one or more of {wanted}")
        samples |= of_task
    return samples


def read_classes(samples: dict[str, list[Sample]]) -> dict[str, tuple[str, ...]]:
    """The classes that labels name, by task, in the order of their names; none of a task whose labels are numbers.

    Raises RecordError where names and numbers are mixed, or all labels are equal: there is nothing to learn then.
    """
    classes = {}
    for kind, of_kind in samples.items():
        if "label" not in BATCH_TYPES[kind].fields:
            continue
        numbers = [sample for sample in of_kind if isinstance(sample.label, float)]
        if numbers and len(numbers) < len(of_kind):
            raise RecordError(f"{numbers[0].source}: the label {numbers[0].label} is a number, others are names of "
                              "classes; write the names in quotes, or make all of them numbers")
        if len({sample.label for sample in of_kind}) == 1:
            raise RecordError(f"{of_kind[0].source}: every label is {of_kind[0].label!r}, as this one; "
                              "expected two classes at least")
        classes[BATCH_TYPES[kind].task] = () if numbers else tuple(sorted({sample.label for sample in of_kind}))
    return classes


def _labelled(record: Record) -> Sample:
    """Every record by itself: there may be other texts about the same image."""
    return Sample(
        record.source, _id_number(record.positive_id), record.video or record.image, images=record.images,
        texts=record.texts or ((record.text,) if record.text else ()), label=record.label, box=record.box,
    )


def stream_kind(stream: str) -> str:
    """What a stream has batches of: "video" for both "video" and "video@1", that of the second source."""
    return stream.partition("@")[0]


def _merge(records: list[Record]) -> list[Sample]:
    by_media: dict[Path | str, list[Record]] = {}
    for record in records:
        by_media.setdefault(record.video or record.image or record.source, []).append(record)
    return [
        Sample(
            source=group[0].source, positive_id=_id_number(group[0].positive_id),
            media=group[0].video or group[0].image,
            captions=sum((record.captions or (record.text,) for record in group if record.captions or record.text), ()),
            qa=sum((record.qa for record in group), ()),
        )
        for group in by_media.values()
    ]


def _id_number(positive_id: str) -> int:
    """The same 63-bit number for the same text, on every process."""
    return int.from_bytes(hashlib.blake2b(positive_id.encode(), digest_size=8).digest(), "big") >> 1


def check_texts(samples: dict[str, list[Sample]], tokenizer: Tokenizer, limit: int, max_words: int) -> None:
    """Refuse, before any work starts, a text that `limit` tokens cannot hold; RecordError names its place."""
    for kind, of_kind in samples.items():
        prompt = 0
        if "prompted" in BATCH_TYPES[kind].fields and (words := PROMPTS.get(BATCH_TYPES[kind].modality)):
            prompt = len(tokenizer.encode([words], special=False)[0][0])
        for sample in of_kind:
            texts = [(caption, prompt) for caption in sample.captions]
            texts += [(text, 0) for question in sample.qa for text in (question.question, *question.answers)]
            whole = [(text, clean(text, max_words), extra) for text, extra in texts]
            if sample.texts:
                part = next((text for text in sample.texts if not clean(text, max_words)), None)
                whole.append((" / ".join(sample.texts), join_text_pair(sample.texts, max_words), 0) if part is None
                             else (part, "", 0))
            for text, cleaned, extra in whole:
                if not cleaned:
                    raise RecordError(f"{sample.source}: the text {text!r} has no words; take it out")
                # Few words and short ones need no tokenizer: a word is at most as many tokens as letters.
                if len(cleaned) + extra + 2 <= limit:
                    continue
                if (count := tokenizer.lengths([cleaned])[0] + extra) > limit:
                    raise RecordError(
                        f"{sample.source}: the text {text!r} has {count} tokens (with [CLS], [SEP] and prompt), the "
                        f"model takes {limit}; shorten it, lower max_words ({max_words}), or raise max_positions"
                    )


def join_text_pair(texts: Sequence[str], max_words: int) -> str:
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
                return {**self.texts(sample, kind, rng), "pixels": pixels, "source": sample.source, "errors": errors}
            except MediaError as error:
                errors.append(f"{sample.source}: {error}")
        raise MediaError(f"{len(errors)} files in a row cannot be decoded; the first: {errors[0]}")

    def pixels(self, sample: Sample, kind: str, rng: np.random.Generator) -> Tensor | None:
        """`3 t H W`, of a pair of images `2 3 1 H W`, of a text None."""
        if sample.images:
            return torch.stack([self.prepare(read_image(image), "image", rng) for image in sample.images])
        if sample.media is None:
            return None
        modality = BATCH_TYPES[kind].modality
        frames = read_video(sample.media, self.frames, rng) if modality == "video" else read_image(sample.media)
        return self.prepare(frames, modality, rng)

    def prepare(self, frames: np.ndarray, modality: str, rng: np.random.Generator) -> Tensor:
        if self.augmentation:
            frames = augment(frames, self.image_size, modality, self.augmentation, rng)
        return to_pixels(frames, self.image_size)

    def texts(self, sample: Sample, kind: str, rng: np.random.Generator) -> dict:
        """One caption, r questions with an answer each, and the random numbers that choose the masked words; or the
        text that a label or a box is about."""
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
