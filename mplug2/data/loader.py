"""From records to batches: what a training step of each kind sees, and in which order.

A step has one kind of batch, `video`, `image` or `text`, the same on every process, in proportion to given weights.
Everything random about a sample (frames, caption, questions, masked words) comes from (seed, kind, epoch, index): a
batch is a function of the step number alone, however many workers and processes there are.

Axes: b samples of this process, r questions a sample, t frames, l text tokens.
"""

import gc
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mplug2.data.media import MediaError, read_image, read_video, to_pixels
from mplug2.data.records import Question, Record, RecordError, available, read_records
from mplug2.tokenizer import Tokenizer, clean

PROMPTS = {"video": "a video of", "image": "a picture of"}
INSTRUCTIONS = {"video": "what does the video describe", "image": "what does the picture describe"}

KINDS = {
    "pretrain": {
        "video": ("video_caption", "video_qa"), "image": ("image_caption", "image_qa"), "text": ("text_only",),
    },
    "video_caption": {"video": ("video_caption",)}, "image_caption": {"image": ("image_caption",)},
    "video_qa": {"video": ("video_qa",)}, "image_qa": {"image": ("image_qa",)},
    "video_retrieval": {"video": ("video_retrieval",)}, "image_retrieval": {"image": ("image_retrieval",)},
}
"""For each task: the kinds of batches it mixes, and the files that each kind is read from."""


@dataclass(frozen=True)
class Sample:
    """What is known about one picture, clip or sentence, of all files that speak of it."""

    where: str
    meaning: int
    media: Path | None = None
    captions: tuple[str, ...] = ()
    qa: tuple[Question, ...] = ()


def read_samples(root: Path, task: str, split: str) -> dict[str, list[Sample]]:
    """The samples of a task by kind. Questions about a clip join its captions; kinds without a file are left out.

    Raises FileNotFoundError if there is no file at all, RecordError for a clip in pre-training that has no captions: a
    process whose clips lack them would have other losses than the next process, which waits for it.
    """
    there, samples = available(root), {}
    for kind, files in KINDS[task].items():
        found = [file for file in files if split in there.get(file, ())]
        if found:
            samples[kind] = _merge([record for file in found for record in read_records(root, file, split)])
            for sample in samples[kind]:
                if task == "pretrain" and not sample.captions:
                    raise RecordError(
                        f"{sample.where}: questions about {sample.media}, but no captions, as pre-training needs; "
                        f"add them to {kind}_caption.{split}.jsonl, take this line out, or train --task {kind}_qa"
                    )
    if not samples:
        wanted = ", ".join(f"{file}.{split}.jsonl" for files in KINDS[task].values() for file in files)
        raise FileNotFoundError(f"{root} has no data for {task}, split {split}: expected one or more of {wanted}")
    return samples


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
        prompt = len(tokenizer.encode([PROMPTS[kind]], special=False)[0][0]) if kind in PROMPTS else 0
        for sample in of_kind:
            texts = [(caption, prompt) for caption in sample.captions]
            texts += [(text, 0) for question in sample.qa for text in (question.question, *question.answers)]
            for text, extra in texts:
                cleaned = clean(text, max_words)
                if not cleaned:
                    raise RecordError(f"{sample.where}: the text {text!r} has no words; take it out")
                # Few words and short ones need no tokenizer: a word is at most as many tokens as letters.
                if len(cleaned) + prompt + 2 <= limit:
                    continue
                if (count := tokenizer.lengths([cleaned])[0] + extra) > limit:
                    raise RecordError(
                        f"{sample.where}: the text {text!r} has {count} tokens (with [CLS], [SEP] and prompt), the "
                        f"model takes {limit}; shorten it, lower max_words ({max_words}), or raise max_positions"
                    )


class Samples(torch.utils.data.Dataset):
    """`samples[kind, epoch, index]`: a training item. A file that cannot be decoded is replaced by the next sample,
    and its error travels with the item."""

    def __init__(
        self, samples: dict[str, list[Sample]], image_size: int, frames: int, questions: int, max_positions: int,
        max_words: int, seed: int,
    ):
        self.samples, self.seed = samples, seed
        self.image_size, self.frames, self.questions = image_size, frames, questions
        self.max_positions, self.max_words = max_positions, max_words

    def __getitem__(self, key: tuple[str, int, int]) -> dict:
        kind, epoch, index = key
        of_kind, errors = self.samples[kind], []
        for shift in range(min(16, len(of_kind))):
            number = (index + shift) % len(of_kind)
            sample = of_kind[number]
            rng = np.random.default_rng((self.seed, *kind.encode(), epoch, number))
            try:
                pixels = self.pixels(sample, kind, rng)
                return {**self.texts(sample, kind, rng), "pixels": pixels, "where": sample.where, "errors": errors}
            except MediaError as error:
                errors.append(f"{sample.where}: {error}")
        raise MediaError(f"{len(errors)} files in a row cannot be decoded; the first: {errors[0]}")

    def pixels(self, sample: Sample, kind: str, rng: np.random.Generator) -> Tensor | None:
        if sample.media is None:
            return None
        frames = read_video(sample.media, self.frames, rng) if kind == "video" else read_image(sample.media)
        return to_pixels(frames, self.image_size)

    def texts(self, sample: Sample, kind: str, rng: np.random.Generator) -> dict:
        """One caption, r questions with an answer each, and the random numbers that choose the masked words."""
        captions = sample.captions
        item = {"kind": kind, "meaning": sample.meaning, "noise": rng.random((3, self.max_positions))}
        if captions:
            item["caption"] = self.clean(captions[rng.integers(len(captions))])
        asked = list(sample.qa)
        if captions and kind in INSTRUCTIONS:
            asked.append(Question(INSTRUCTIONS[kind], captions, "describe"))
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
    """Items of one kind -> a batch of tensors: `pixels`, `caption_*`, `masked*`, `prompted_*`, `question_*`, ...

    `parts` says which texts the task trains on: `caption` (with `masked`), `prompted`, `question`.
    """

    def __init__(self, tokenizer: Tokenizer, parts: frozenset[str]):
        self.tokenizer, self.parts = tokenizer, parts

    def __call__(self, items: list[dict]) -> dict:
        kind = items[0]["kind"]
        batch = {
            "kind": kind,
            "where": [item["where"] for item in items],
            "errors": [error for item in items for error in item["errors"]],
            "meaning": torch.tensor([item["meaning"] for item in items]),
        }
        if kind != "text":
            batch["pixels"] = torch.stack([item["pixels"] for item in items])
        captions = [item.get("caption") for item in items]
        if "caption" in self.parts and all(captions):
            ids, mask = self.tokenizer.encode(captions)
            batch |= {"caption_ids": ids, "caption_mask": mask}
            batch |= self.masked(ids, mask, np.stack([item["noise"] for item in items]))
        if "prompted" in self.parts and kind != "text" and all(captions):
            prompt = PROMPTS[kind]
            batch["prompted_ids"], batch["prompted_mask"] = self.tokenizer.encode([f"{prompt} {c}" for c in captions])
            prompt_length = 1 + self.tokenizer.encode([prompt], special=False)[0].shape[1]
            batch["prompted_places"] = label_places(batch["prompted_mask"], prompt_length)
        if "question" in self.parts and all("questions" in item for item in items):
            questions, answers = zip(*(pair for item in items for pair in item["questions"]))
            batch["question_ids"], batch["question_mask"] = self.tokenizer.encode(list(questions))
            batch["answer_ids"], batch["answer_mask"] = self.tokenizer.encode(list(answers))
            batch["answer_places"] = label_places(batch["answer_mask"])
        return batch

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
    """Keys (kind, epoch, index) of this process' share of every batch, from step `start` to step `steps`.

    Each kind runs through its samples in an order that is drawn anew every epoch. Process `rank` of `world` takes every
    world-th sample of the global batch.
    """

    def __init__(
        self, sizes: dict[str, int], weights: dict[str, float], batch_size: int, steps: int, seed: int, start: int = 0,
        rank: int = 0, world: int = 1,
    ):
        self.sizes, self.batch_size, self.seed, self.start = sizes, batch_size, seed, start
        self.rank, self.world = rank, world
        self.kinds = schedule(weights, steps)
        self.orders: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.kinds) - self.start

    def __iter__(self) -> Iterator[list[tuple[str, int, int]]]:
        counts = dict.fromkeys(self.sizes, 0)
        for step, kind in enumerate(self.kinds):
            if step >= self.start:
                first = counts[kind] * self.batch_size
                yield [self.key(kind, first + i) for i in range(self.rank, self.batch_size, self.world)]
            counts[kind] += 1

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
        prefetch_factor=4 if workers else None, generator=torch.Generator(), worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    """imageio collects garbage whenever it closes a video: what is there at the start need not be looked at again."""
    gc.freeze()
