"""An untrained predictor, and files for it, that several test files use."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from helpers import randomized, small
from PIL import Image

from mplug2.checkpoint import PreprocessConfig
from mplug2.data.text import Tokenizer
from mplug2.inference import Inference
from mplug2.model.mplug2 import MPLUG2
from mplug2.predictor import Predictor

WORDS = ("a video of a picture of red green blue one two three moving left right which colour digit is it and "
         "yes no up down")


def make_predictor(
    task: str = "pretrain", batch_size: int = 3, frames: int = 4, classes: dict[str, tuple[str, ...]] | None = None
) -> Predictor:
    """An untrained model whose outputs depend on all of its inputs."""
    tokenizer = Tokenizer.train([WORDS], 120)
    model = randomized(MPLUG2(small(vocab_size=len(tokenizer), max_positions=24), task, classes or {})).float()
    for name, parameter in model.named_parameters():
        if name.endswith(("qkv.weight", "query.weight", "key_value.weight")):
            parameter.data.mul_(4)  # attention that is not uniform
        if name.endswith("attention.out.weight"):
            parameter.data.mul_(2)
    if hasattr(model, "decoder"):  # no word is preferred, and no word repeats itself
        words, head = model.decoder.embeddings.word.weight.data, model.decoder.head
        words.copy_(0.3 * words / words.norm(dim=1, keepdim=True))
        model.decoder.embeddings.position.weight.data.mul_(4)
        head.bias.data.zero_()
        head.norm.bias.data.zero_()
    return Predictor(model, tokenizer, PreprocessConfig(frames, max_words=12), Inference(batch_size))


def write_media(path: Path, seed: int, frames: int) -> Path:
    """Four squares of random colors, different in each frame."""
    squares = np.random.default_rng(seed).integers(0, 256, (frames, 2, 2, 3), np.uint8)
    pixels = squares.repeat(16, 1).repeat(16, 2)
    if path.suffix == ".mp4":
        iio.imwrite(path, pixels, plugin="pyav", codec="libx264", fps=8)
    else:
        first, *rest = [Image.fromarray(frame) for frame in pixels]
        first.save(path, **({"save_all": True, "append_images": rest} if rest else {}))
    return path


def write_records(root: Path, name: str, records: list[dict]) -> None:
    (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
