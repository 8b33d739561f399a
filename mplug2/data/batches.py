"""Batches: which samples each step sees (`MixedBatches`), and how they become tensors (`Collate`).

All samples of a batch have the same type: `video`, `image` or `text` in pre-training, otherwise a task. All ranks have
the same type at the same step, in proportion to given weights. A batch is a function of the step alone, so a resumed
run sees what the uninterrupted run would have seen.

Axes: `b` samples on this rank, `r` questions per sample, `l` text tokens.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from mplug2.data.records import RecordError
from mplug2.data.text import Tokenizer
from mplug2.tasks import BATCH_TYPES, PROMPTS


class Collate:
    """Turn items of one type (see `Samples`) into a batch of tensors. The fields of the type decide what is in it:

        caption     caption_ids and caption_mask `b l`, to compare with vision
        masked      masked_ids `b l` and masked_positions, for masked language modeling on the same captions
        prompted    prompted_ids and prompted_mask `b l`, prompted_positions, prompt_length, and references (all
                    captions, as text), for captioning
        question    question_* and answer_*, each `(b r) l`
        text        text_ids and text_mask `b l`: the text that a label or a box refers to
        label       label `b`: the index of the class, or the number to predict
        box         box `b 4`

    `classes` holds the class names of the model by task (`read_classes`).
    """

    def __init__(self, tokenizer: Tokenizer, classes: Mapping[str, tuple[str, ...]] = {}):
        self.tokenizer = tokenizer
        self.class_index = {task: {name: i for i, name in enumerate(names)} for task, names in classes.items()}

    def __call__(self, items: list[dict]) -> dict:
        batch_type = BATCH_TYPES[items[0]["kind"]]
        fields, modality = batch_type.fields, batch_type.modality
        batch = {
            "kind": items[0]["kind"],
            "task": batch_type.task,
            "source": [item["source"] for item in items],
            "errors": [error for item in items for error in item["errors"]],
            "positive_id": torch.tensor([item["positive_id"] for item in items]),
        }
        if modality != "text":
            batch["pixels"] = torch.stack([item["pixels"] for item in items])
        captions = [item.get("caption") for item in items]
        if "caption" in fields and all(captions):
            ids, mask = self.tokenizer.encode(captions)
            batch |= {"caption_ids": ids, "caption_mask": mask}
            if "masked" in fields:
                batch |= self.masked(ids, mask, np.stack([item["noise"] for item in items]))
        if "prompted" in fields and modality != "text" and all(captions):
            prompt = PROMPTS[modality]
            batch["prompted_ids"], batch["prompted_mask"] = self.tokenizer.encode([f"{prompt} {c}" for c in captions])
            prompt_length = 1 + self.tokenizer.encode([prompt], special=False)[0].shape[1]
            batch["prompted_positions"] = label_positions(batch["prompted_mask"], prompt_length)
            batch["prompt_length"] = prompt_length
            batch["references"] = [item["references"] for item in items]
        if "text" in fields:
            batch["text_ids"], batch["text_mask"] = self.tokenizer.encode([item["text"] for item in items])
        if "label" in fields:
            batch["label"] = torch.tensor([self.label(batch_type.task, item) for item in items])
        if "box" in fields:
            batch["box"] = torch.tensor([item["box"] for item in items])
        if "question" in fields and all("questions" in item for item in items):
            questions, answers = zip(*(pair for item in items for pair in item["questions"]))
            batch["question_ids"], batch["question_mask"] = self.tokenizer.encode(list(questions))
            batch["answer_ids"], batch["answer_mask"] = self.tokenizer.encode(list(answers))
            batch["answer_positions"] = label_positions(batch["answer_mask"])
        return batch

    def label(self, task: str, item: dict) -> int | float:
        """The index of the class, or the number to predict. RecordError for a class that the model does not have."""
        index, label = self.class_index[task], item["label"]
        if isinstance(label, float) == bool(index) or (index and label not in index):
            expected = f"one of {', '.join(index)}" if index else "a number"
            raise RecordError(f"{item['source']}: label {label!r}: the model expects {expected}; "
                              "fix the label, or train a model with these classes")
        return index[label] if index else label

    def masked(self, ids: Tensor, mask: Tensor, noise: np.ndarray) -> dict[str, Tensor]:
        """Choose 15 % of the words of `b l`; replace 80 % of them by [MASK], 10 % by a random token, keep 10 %.

        `noise` holds the random numbers, `b 3 l` or longer. Source: BERT.
        """
        tokenizer = self.tokenizer
        choose, how, which = torch.from_numpy(noise[:, :, : ids.shape[1]]).unbind(dim=1)
        masked = mask & (choose < 0.15) & (ids != tokenizer.cls) & (ids != tokenizer.sep)
        random = 5 + (which * (len(tokenizer) - 5)).long()
        replaced = torch.where(how < 0.8, tokenizer.mask, torch.where(how < 0.9, random, ids))
        return {"masked_ids": torch.where(masked, replaced, ids), "masked_positions": masked.flatten().nonzero()[:, 0]}


def label_positions(mask: Tensor, prompt_length: int = 1) -> Tensor:
    """Which next-token predictions `b (l-1)` carry a loss, as indices into the flattened `(b (l-1))`.

    `mask`, `b l`, marks the tokens that are not padding. Padding and the first `prompt_length` tokens ([CLS] and the
    prompt) are never labels. This runs on the CPU: on a GPU the search would force a synchronization.
    """
    labels = mask[:, 1:].clone()
    labels[:, : prompt_length - 1] = False
    return labels.flatten().nonzero()[:, 0]


def batch_schedule(weights: dict[str, float], steps: int) -> list[str]:
    """The batch type of each step: always the one that is furthest behind its share."""
    total, counts, schedule = sum(weights.values()), dict.fromkeys(weights, 0), []
    for step in range(steps):
        kind = max(weights, key=lambda name: weights[name] / total * (step + 1) - counts[name])
        counts[kind] += 1
        schedule.append(kind)
    return schedule


class MixedBatches(torch.utils.data.Sampler):
    """The sample keys (stream, epoch, index) of this rank's part of every batch, from step `start` to step `steps`.

    A stream is the samples of one batch type from one source (`stream_kind`). With gradient accumulation (`accumulate`)
    each step yields that many micro-batches. Each stream runs through its samples in an order that is shuffled again
    every epoch; samples with equal numbers in `groups` (`SampleList.groups`) stay together. Rank r of `world_size`
    takes the r-th part of the global batch, so the position of a step in a stream does not depend on the number of
    ranks.
    """

    def __init__(
        self, sizes: dict[str, int], weights: dict[str, float], batch_size: int, steps: int, seed: int, start: int = 0,
        rank: int = 0, world_size: int = 1, accumulate: int = 1, groups: Mapping[str, np.ndarray | None] = {},
    ):
        self.sizes, self.batch_size, self.seed, self.start, self.groups = sizes, batch_size, seed, start, groups
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.kinds = batch_schedule(weights, steps)
        self.orders: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return (len(self.kinds) - self.start) * self.accumulate

    def turns(self) -> Iterator[tuple[str, int]]:
        """For each micro-batch: its stream, and how many micro-batches of that stream precede it since step 0."""
        counts = dict.fromkeys(self.sizes, 0)
        for step, kind in enumerate(self.kinds):
            for _ in range(self.accumulate):
                if step >= self.start:
                    yield kind, counts[kind]
                counts[kind] += 1

    def __iter__(self) -> Iterator[list[tuple[str, int, int]]]:
        size = self.batch_size // self.accumulate
        share = size // self.world_size
        for kind, count in self.turns():
            yield [self.key(kind, count * size + self.rank * share + i) for i in range(share)]

    def key(self, kind: str, position: int) -> tuple[str, int, int]:
        """The key of the sample at a position of the endless, shuffled stream."""
        epoch, offset = divmod(position, self.sizes[kind])
        if (kind, epoch) not in self.orders:  # keep the previous epoch: a batch may span both
            self.orders = {key: order for key, order in self.orders.items() if key[0] != kind or key[1] == epoch - 1}
            rng = np.random.default_rng((self.seed, *kind.encode(), epoch))
            if (group := self.groups.get(kind)) is None:
                self.orders[kind, epoch] = rng.permutation(self.sizes[kind])
            else:
                self.orders[kind, epoch] = np.argsort(rng.permutation(group.max() + 1)[group], kind="stable")
        return kind, epoch, int(self.orders[kind, epoch][offset])
