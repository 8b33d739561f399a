"""A small data set on disk, and the samples and batches made from it, for all tests that need one."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.loader import make_loader
from mplug2.data.samples import Sample, Samples, read_classes, read_samples
from mplug2.data.text import Tokenizer

VIDEOS, IMAGES = 6, 5
SUBJECTS = ("a red three", "a blue seven", "a green one")


DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]
HOSTILE = (
    None, True, 0, -1, 3.7, 1e308, 10**30, 10**400, float("nan"), float("-inf"), "", " ", "?!", "5", "[MASK]", "\n",
    "\ud800", "a\ud83d red", "a\x00b.gif", "x" * 10_000, "red " * 2500, "a/" * 3000, [], [[]], [{}], [None], [1], ["a"],
    [""], ["", ""], [["a red three"]], [1e308] * 4, [True] * 4, DEEP, [DEEP], {}, {"a": 1}, {"question": DEEP},
    [{"question": "a", "answers": ["red"]}], [{"question": ["a"], "answers": {"red": 1}}],
)
"""JSON values that people have by mistake, or in order to do harm."""


def hostile_versions(fields: dict) -> Iterator[tuple[tuple, dict]]:
    """Copies of JSON fields, in which one value at any depth is a hostile one: (where, fields)."""
    def places(value, where: tuple = ()):
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield (*where, key)
                yield from places(inner, (*where, key))

    for where in places(fields):
        for value in HOSTILE:
            changed = inner = copy.deepcopy(fields)
            for key in where[:-1]:
                inner = inner[key]
            inner[where[-1]] = value
            yield where, changed


def write_gif(path: Path, seed: int, frames: int = 4) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (frames, 8, 8, 3), np.uint8)
    first, *rest = [Image.fromarray(frame) for frame in noise]
    first.save(path, save_all=True, append_images=rest)


def write_records(root: Path, name: str, records: list[dict]) -> None:
    (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_data(root: Path) -> Path:
    """Write six videos with captions and questions, five images with captions, and seven sentences."""
    root.mkdir(exist_ok=True)
    for i in range(VIDEOS):
        write_gif(root / f"{i}.gif", seed=i)
    for i in range(IMAGES):
        pixels = np.random.default_rng(100 + i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    write_records(root, "video_caption.train", [
        {"video": f"{i}.gif", "captions": [f"{SUBJECTS[i % 3]} moving left", f"{SUBJECTS[i % 3]} going left"],
         "positive_id": f"left {i % 3}"} for i in range(VIDEOS)
    ])
    write_records(root, "video_qa.train", [
        {"video": f"{i}.gif", "positive_id": f"left {i % 3}", "qa": [
            {"question": "which color is it?", "answers": ["red", "scarlet"], "kind": "color"},
            {"question": "what digit is it?", "answers": ["three"], "kind": "digit"},
            {"question": "which digit is shown?", "answers": ["three"], "kind": "digit"},
        ]} for i in range(VIDEOS)
    ])
    write_records(root, "image_caption.train", [
        {"image": f"{i}.png", "captions": [SUBJECTS[i % 3]], "positive_id": f"left {i % 3}"} for i in range(IMAGES)
    ])
    write_records(root, "text_only.train", [{"text": f"Here is {SUBJECTS[i % 3]}!"} for i in range(7)])
    return root


def make_tokenizer() -> Tokenizer:
    words = "a an red blue green three seven one moving going left here is which color what digit it shown scarlet the"
    return Tokenizer.train([words, "video picture image of does describe", *SUBJECTS], 120)


def dataset(samples: dict[str, list[Sample]], **changes) -> Samples:
    """Items of small frames and short texts."""
    return Samples(samples, **{**dict(image_size=8, frames=4, questions=2, max_positions=24, max_words=30, seed=0),
                               **changes})


def batches_of(root: Path, tokenizer: Tokenizer, workers: int, start: int = 0, seed: int = 0) -> list[dict]:
    """The batches of six steps of pre-training, from step `start` on."""
    samples = read_samples(root, "pretrain", "train")
    sizes = {kind: len(of_kind) for kind, of_kind in samples.items()}
    order = MixedBatches(sizes, {"video": 2, "image": 1, "text": 1}, 3, 6, seed, start)
    return list(make_loader(dataset(samples, seed=seed), order, Collate(tokenizer), workers, pin=False))


def batch_of(root: Path, tokenizer: Tokenizer, task: str, **limits) -> dict:
    """The first two samples of a task, collated."""
    samples = read_samples(root, task, "train")
    data = dataset(samples, **limits)
    return Collate(tokenizer, read_classes(samples))([data[task, 0, i] for i in range(2)])


def assert_equal_batches(found: list[dict], expected: list[dict]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.equal(other[name]) if torch.is_tensor(value) else value == other[name], name
