"""Augmentation of training pictures and clips: crops, flips and RandAugment, the same for all frames of a clip.

    uint8 (t, H, W, 3) --augment--> uint8 (t, size, size, 3)

Test pictures are not augmented: `media.to_pixels` resizes them whole. The tiny world is never augmented: a flip turns
left into right, and a crop cuts digits off. Source of the settings: section "Pre-processing" of the mPLUG-2 paper and
the settings of its released code; RandAugment by Cubuk et al. 2020, with the levels of ALBEF, whose code it took.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (128, 128, 128)  # what shows where an operation moves the picture away
COLOURS = {
    "brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "sharpness": ImageEnhance.Sharpness,
}
MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
IMAGE_OPERATIONS = ("identity", "autocontrast", "equalize", "brightness", "sharpness", *MOVES)
VIDEO_OPERATIONS = ("identity", "contrast", "brightness", "sharpness", *MOVES)
MAGNITUDE = {"image": 7, "video": 5}  # of 10


@dataclass(frozen=True)
class Augmentation:
    style: Literal["finetune", "pretrain"] = "finetune"
    """finetune: crops of half of the area or more, for pictures and clips. pretrain: of a fifth or more for pictures;
    clips are resized to 1.14 of the size and cropped at a random place."""
    flip: bool = True
    """Turn half of the samples over, left to right (clips of pre-training: fewer, by one of RandAugment's operations).
    Not for data that speaks of left and right."""


def augment(
    frames: np.ndarray, size: int, kind: Literal["image", "video"], augmentation: Augmentation,
    rng: np.random.Generator,
) -> np.ndarray:
    """uint8 (t, H, W, 3) -> uint8 (t, size, size, 3): crop, flip and two operations of RandAugment, drawn by `rng`
    once for all frames."""
    height, width = frames.shape[1:3]
    slides = augmentation.style == "pretrain" and kind == "video"
    inner = int(1.14 * size) if slides else size
    least = 0.2 if augmentation.style == "pretrain" else 0.5
    box = (0, 0, width, height) if slides else crop_box(height, width, least, rng)
    images = [Image.fromarray(frame).resize((inner, inner), Image.Resampling.BICUBIC, box=box) for frame in frames]
    if augmentation.flip and not slides and rng.random() < 0.5:
        images = [ImageOps.mirror(image) for image in images]
    for name, value in draw_operations(kind, inner, rng, augmentation.flip and slides):
        images = [apply(image, name, value) for image in images]
    if slides:
        left, top = rng.integers(0, inner - size + 1, 2).tolist()
        images = [image.crop((left, top, left + size, top + size)) for image in images]
    return np.stack([np.asarray(image) for image in images])


def crop_box(height: int, width: int, least: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random box (left, top, right, bottom), in pixels, of `least` to all of the area, with sides of 3:4 to 4:3.

    Where no such box is found in ten attempts, the largest one in the middle whose sides are.
    """
    for _ in range(10):
        area, ratio = rng.uniform(least, 1) * height * width, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return float(left), float(top), float(left + w), float(top + h)


def draw_operations(
    kind: str, size: int, rng: np.random.Generator, flips: bool = False
) -> list[tuple[str, float]]:
    """Two operations and their values: factors, pixels or degrees. On pictures each is left out half of the time. With
    `flips` a flip is one of the operations.

    The levels run to 10: a colour factor from 0.1 to 1.9, a shear to 0.3, a shift to 10 of 224 pixels, a rotation to
    30 degrees, to either side. At level 5, that of clips, the colour factor is 1: only moves change anything, as
    released.
    """
    level = MAGNITUDE[kind] / 10
    operations = (IMAGE_OPERATIONS if kind == "image" else VIDEO_OPERATIONS) + (("flip",) if flips else ())
    drawn = []
    for name in rng.choice(operations, 2).tolist():
        side, used = rng.choice([-1, 1]), kind == "video" or rng.random() < 0.5
        largest = {"shear": 0.3, "translate": 10 / 224 * size, "rotate": 30.0}.get(name.split("_")[0])
        value = float(side * largest * level) if largest else 0.1 + 1.8 * level
        if used:
            drawn.append((name, value))
    return drawn


def apply(image: Image.Image, name: str, value: float) -> Image.Image:
    """One operation on one picture, which keeps its size."""
    if name in COLOURS:
        return COLOURS[name](image).enhance(value)
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "flip":
        return ImageOps.mirror(image)
    if name == "rotate":
        return image.rotate(value, Image.Resampling.BILINEAR, fillcolor=GREY)
    if name in MOVES:
        # The affine map from places in the result to places in the picture, row by row.
        matrix = {
            "shear_x": (1, value, 0, 0, 1, 0), "shear_y": (1, 0, 0, value, 1, 0),
            "translate_x": (1, 0, value, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, value),
        }[name]
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)
    return image
