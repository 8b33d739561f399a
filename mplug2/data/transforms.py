"""Augmentation of training images and videos: crops, flips and RandAugment, the same for all frames of a video.

    uint8 (t, H, W, 3) --augment--> uint8 (t, size, size, 3)

Test inputs are not augmented: `media.to_pixels` resizes them without cropping. The tiny world is never augmented: a
flip would turn left into right, and a crop would cut digits off. The settings come from the configs of the released
code; RandAugment (Cubuk et al. 2020) has the levels of ALBEF, the code base that mPLUG-2 builds on.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GRAY = (128, 128, 128)  # fills the area that a geometric operation leaves empty
COLORS = {
    "brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "sharpness": ImageEnhance.Sharpness,
}
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
IMAGE_OPERATIONS = ("identity", "autocontrast", "equalize", "brightness", "sharpness", *GEOMETRIC)
VIDEO_OPERATIONS = ("identity", "contrast", "brightness", "sharpness", *GEOMETRIC)
MAGNITUDE = {"image": 7, "video": 5}  # on a scale of 10


@dataclass(frozen=True)
class Augmentation:
    style: Literal["finetune", "pretrain"] = "finetune"
    """finetune: random crops of 50 to 100 % of the area. pretrain: crops of 20 to 100 % for images; videos are resized
    to 1.14 times the size and cropped at a random position."""
    flip: bool = True
    """Mirror half of the samples horizontally. Pre-training videos are mirrored less often, as one of RandAugment's
    operations. Leave it off for data whose texts mention left and right."""


def augment(
    frames: np.ndarray, size: int, kind: Literal["image", "video"], augmentation: Augmentation,
    rng: np.random.Generator,
) -> np.ndarray:
    """Crop, flip and apply two operations of RandAugment: uint8 (t, H, W, 3) -> uint8 (t, size, size, 3).

    `rng` draws the parameters once; all frames share them.
    """
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
    """A random box (left, top, right, bottom) in pixels, with `least` to 1 of the area and an aspect of 3:4 to 4:3.

    If ten attempts find no such box, it is the largest centered box of an allowed aspect.
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
    """Draw two operations and their values: factors, pixels or degrees.

    Each operation on an image is skipped half of the time. With `flips`, a flip is one of the operations.

    Level 10 is a color factor of 1.9 (level 0: 0.1), a shear of 0.3, a shift of 10 pixels in 224, or a rotation by 30
    degrees, to either side. Videos have level 5, where the color factor is 1: only the geometric operations change
    anything. The released code does the same.
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
    """Apply one operation to one image. The size stays."""
    if name in COLORS:
        return COLORS[name](image).enhance(value)
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "flip":
        return ImageOps.mirror(image)
    if name == "rotate":
        return image.rotate(value, Image.Resampling.BILINEAR, fillcolor=GRAY)
    if name in GEOMETRIC:
        # The affine map from output positions to input positions, row by row.
        matrix = {
            "shear_x": (1, value, 0, 0, 1, 0), "shear_y": (1, 0, 0, value, 1, 0),
            "translate_x": (1, 0, value, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, value),
        }[name]
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GRAY)
    return image
