"""Batches."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from mplug2.data.records import RecordError
from mplug2.data.text import Tokenizer
from mplug2.tasks import BATCH_TYPES, PROMPTS


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
        kind = BATCH_TYPES[items[0]["kind"]]
        parts = kind.fields
        batch = {
            "kind": items[0]["kind"],
            "task": kind.task,
            "source": [item["source"] for item in items],
            "errors": [error for item in items for error in item["errors"]],
            "positive_id": torch.tensor([item["positive_id"] for item in items]),
        }
        if kind.modality != "text":
            batch["pixels"] = torch.stack([item["pixels"] for item in items])
        captions = [item.get("caption") for item in items]
        if "caption" in parts and all(captions):
            ids, mask = self.tokenizer.encode(captions)
            batch |= {"caption_ids": ids, "caption_mask": mask}
            if "masked" in parts:
                batch |= self.masked(ids, mask, np.stack([item["noise"] for item in items]))
        if "prompted" in parts and kind.modality != "text" and all(captions):
            prompt = PROMPTS[kind.modality]
            batch["prompted_ids"], batch["prompted_mask"] = self.tokenizer.encode([f"{prompt} {c}" for c in captions])
            prompt_length = 1 + self.tokenizer.encode([prompt], special=False)[0].shape[1]
            batch["prompted_positions"] = label_positions(batch["prompted_mask"], prompt_length)
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
            batch["answer_positions"] = label_positions(batch["answer_mask"])
        return batch

    def number(self, task: str, item: dict) -> int | float:
        """Of the class, or the number that is to be predicted. RecordError for a class that is not of the model's."""
        numbers, label = self.numbers[task], item["label"]
        if isinstance(label, float) == bool(numbers) or (numbers and label not in numbers):
            expected = f"one of {', '.join(numbers)}" if numbers else "a number"
            raise RecordError(f"{item['source']}: label {label!r}: this model was made for {expected}")
        return numbers[label] if numbers else label

    def masked(self, ids: Tensor, mask: Tensor, noise: np.ndarray) -> dict[str, Tensor]:
        """15 % of the words, `b l`: of these 80 % become [MASK], 10 % a random token, 10 % stay. Source: BERT."""
        tokenizer = self.tokenizer
        choose, how, which = torch.from_numpy(noise[:, :, : ids.shape[1]]).unbind(dim=1)
        masked = mask & (choose < 0.15) & (ids != tokenizer.cls) & (ids != tokenizer.sep)
        random = 5 + (which * (len(tokenizer) - 5)).long()
        replaced = torch.where(how < 0.8, tokenizer.mask, torch.where(how < 0.9, random, ids))
        return {"masked_ids": torch.where(masked, replaced, ids), "masked_positions": masked.flatten().nonzero()[:, 0]}


def label_positions(mask: Tensor, prompt_length: int = 1) -> Tensor:
    """Of the predictions `b (l-1)` of the next tokens of texts with `mask` (`b l`), those that carry a loss, as
    indices into `(b (l-1))`: neither padding nor the first `prompt_length` tokens, [CLS] and a prompt, are labels.

    Found here, on the CPU: to look for them on a GPU would make the program wait for it.
    """
    labels = mask[:, 1:].clone()
    labels[:, : prompt_length - 1] = False
    return labels.flatten().nonzero()[:, 0]


def batch_schedule(weights: dict[str, float], steps: int) -> list[str]:
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
        rank: int = 0, world_size: int = 1, accumulate: int = 1,
    ):
        self.sizes, self.batch_size, self.seed, self.start = sizes, batch_size, seed, start
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.kinds = batch_schedule(weights, steps)
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
            yield [self.key(kind, count * size + i) for i in range(self.rank, size, self.world_size)]

    def key(self, kind: str, position: int) -> tuple[str, int, int]:
        """The sample at a position of the endless stream of one kind."""
        epoch, place = divmod(position, self.sizes[kind])
        if (kind, epoch) not in self.orders:
            self.orders = {key: order for key, order in self.orders.items() if key[0] != kind or key[1] == epoch - 1}
            rng = np.random.default_rng((self.seed, *kind.encode(), epoch))
            self.orders[kind, epoch] = rng.permutation(self.sizes[kind])
        return kind, epoch, int(self.orders[kind, epoch][place])
