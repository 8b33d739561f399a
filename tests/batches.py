"""Random small models and batches, in double precision, for the tests of objectives, parallel training and tools."""

import torch
from helpers import noise, randomized, small
from torch import Tensor

from mplug2.data.batches import label_positions
from mplug2.model.mplug2 import MPLUG2
from mplug2.tasks import TASKS, batch_types

CLS, SEP, WORDS = 2, 3, range(5, 29)
BATCH_NAMES = {
    "caption": ("caption_ids", "caption_mask"), "masked": ("masked", "masked_ids", "masked_positions"),
    "question": ("question_ids", "question_mask", "answer_ids", "answer_mask", "answer_positions"),
    "prompted": ("prompted_ids", "prompted_mask", "prompted_positions"),
}
"""The tensors of a batch, by the field of the task table that asks for them."""


def make_model(task: str = "pretrain", seed: int = 0) -> MPLUG2:
    """A small model; every weight is random, so no zero start hides an error."""
    model = randomized(MPLUG2(small(), task), seed)
    if hasattr(model, "temperature"):
        model.temperature.data.fill_(0.07)
    return model


def unit(rng: torch.Generator, b: int, e: int = 4) -> Tensor:
    """Unit vectors `b e`."""
    return torch.nn.functional.normalize(torch.randn(b, e, generator=rng, dtype=torch.float64), dim=1)


def similarity_for(wanted: list[int]) -> Tensor:
    """Similarities with which each row draws the wanted hard negative (except for one draw in 10,000)."""
    return 50 * torch.nn.functional.one_hot(torch.tensor(wanted), len(wanted)).double()


def make_texts(lengths: list[int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random texts of these lengths: [CLS] first, [SEP] last, then padding of random ids, which nothing may read."""
    ids = torch.randint(WORDS[0], WORDS[-1] + 1, (len(lengths), max(lengths)), generator=rng)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids[:, 0] = CLS
    for row, length in zip(ids, lengths):
        row[length - 1] = SEP
    return ids, mask


def make_batch(kind: str, b: int = 3, r: int = 2, seed: int = 0) -> dict:
    """A pre-training batch of video, image or text, as data/batches.py makes it, with r questions per sample."""
    rng = torch.Generator().manual_seed(seed)

    def texts(count: int, shortest: int = 3) -> tuple[Tensor, Tensor]:
        return make_texts(torch.randint(shortest, 9, (count,), generator=rng).tolist(), rng)

    batch = {"kind": kind, "task": "pretrain", "positive_id": torch.arange(b)}
    batch["caption_ids"], batch["caption_mask"] = texts(b)
    batch["masked"] = batch["caption_mask"] & (torch.rand(batch["caption_mask"].shape, generator=rng) < 0.4)
    batch["masked_ids"] = torch.where(batch["masked"], 4, batch["caption_ids"])
    if kind != "text":
        frames = 2 if kind == "video" else 1
        batch["pixels"] = noise(b, 3, frames, 8, 8, seed=seed)
        batch["prompted_ids"], batch["prompted_mask"] = texts(b, shortest=4)
        batch["question_ids"], batch["question_mask"] = texts(b * r)
        batch["answer_ids"], batch["answer_mask"] = texts(b * r)
    return with_positions(batch)


def with_positions(batch: dict) -> dict:
    """The batch with the indices of the tokens that carry a loss; its prompt has two words."""
    positions = {"masked_positions": batch["masked"].flatten().nonzero()[:, 0]}
    if "pixels" in batch:
        positions["prompted_positions"] = label_positions(batch["prompted_mask"], 3)
        positions["answer_positions"] = label_positions(batch["answer_mask"])
    return batch | positions


def task_batch(task: str, seed: int = 0, b: int = 3) -> dict:
    """A batch of the type that a task trains on, as data/batches.py makes it."""
    fields = next(iter(batch_types(task).values())).fields
    batch = make_batch(TASKS[task].modality, b=b, seed=seed)
    names = {"task", "positive_id", "pixels"}.union(*(BATCH_NAMES.get(field, ()) for field in fields))
    batch = {name: value for name, value in batch.items() if name in names} | {"task": task}
    if "pair" in TASKS[task].components:
        batch["pixels"] = noise(b, 2, 3, 1, 8, 8, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    if "text" in fields:
        batch["text_ids"], batch["text_mask"] = make_texts([4, 6, 5] * (b // 3) + [7] * (b % 3), rng)
    if "question" in fields and "pixels" not in batch:
        batch["question_ids"], batch["question_mask"] = make_texts([4, 6, 5] * (2 * b // 3) + [7] * (2 * b % 3), rng)
        batch["answer_ids"], batch["answer_mask"] = make_texts([4, 3] * b, rng)
        batch["answer_positions"] = label_positions(batch["answer_mask"])
    if "label" in fields:
        batch["label"] = (torch.arange(b) + 2) % 3
    if "box" in fields:
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.2, 0.3, 0.1, 0.3], [0.7, 0.6, 0.2, 0.5]])
        batch["box"] = boxes.double()[torch.arange(b) % 3]
    return batch


def rank_share(batch: dict, rank: int, world_size: int) -> dict:
    """The part of a batch that a rank would have made: its samples, padded to the longest of them only."""
    b = len(batch["positive_id"]) // world_size
    part = {}
    for name, value in batch.items():
        rows = len(value) // world_size if torch.is_tensor(value) else 0
        part[name] = value[rank * rows: (rank + 1) * rows] if rows else value
    assert len(part["positive_id"]) == b
    for text in ("caption", "prompted", "question", "answer"):
        if f"{text}_mask" in part:
            longest = int(part[f"{text}_mask"].sum(1).max())
            names = (f"{text}_ids", f"{text}_mask") + (("masked", "masked_ids") if text == "caption" else ())
            part |= {name: part[name][:, :longest] for name in names}
    return with_positions(part)
