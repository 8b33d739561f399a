"""Drawing: handwritten strokes are tinted and pasted into each frame, as the scripts of the scene say.

Axes: n strokes, t frames, h height, w width. Frames are drawn as palette indices; `PALETTE[frames]` gives the RGB
pixels. The whole world has 121 colors (black, and six hues in twenty levels of brightness), so GIF stores them exactly.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from einops import reduce

from tiny_data.world import CELL, COLOR_NAMES, COLORS, IMAGE_SIZE, SCRIPTS, Scene

LEVELS = 20  # levels of brightness, more than the 16 of the strokes
PALETTE = np.zeros((1 + LEVELS * len(COLORS), 3), np.uint8)  # (1 + 20 * color + level - 1, RGB); entry 0 is black
PALETTE[1:] = np.rint(
    np.array(list(COLORS.values()))[:, None, :] * (np.arange(1, LEVELS + 1)[None, :, None] / LEVELS)
).reshape(-1, 3)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits: strokes (n, 8, 8), float64 from 0 (paper) to 1 (full ink), and their labels (n,)."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        return file["images"] / 16.0, file["labels"].astype(int)


@lru_cache
def _spread(size: int) -> np.ndarray:
    """The matrix (size, 8) that resizes a column of 8 pixels to `size` pixels, each the mean of the area it covers."""
    step = CELL / size
    start = np.arange(size)[:, None] * step
    pixel = np.arange(CELL)[None, :]
    return np.clip(np.minimum(start + step, pixel + 1) - np.maximum(start, pixel), 0, None) / step


def vary(strokes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The digits (n, 8, 8) in another hand: each is turned by up to 10 degrees, slanted by up to 0.1, made up to 10 %
    larger or smaller in height and in width, and moved by up to half a pixel. The ink stays between 0 and 1."""
    n = len(strokes)
    turn, slant = rng.uniform(-np.pi / 18, np.pi / 18, n), rng.uniform(-0.1, 0.1, n)
    height, width = np.exp(rng.uniform(-0.1, 0.1, (2, n)))
    matrix = np.array([[np.cos(turn) * height, slant - np.sin(turn)], [np.sin(turn), np.cos(turn) * width]])
    move = rng.uniform(-0.5, 0.5, (2, n))

    fine = (np.arange(3 * CELL) + 0.5) / 3 - CELL / 2  # three samples per pixel, as distances from the center
    y, x = np.einsum("ijn,jhw->inhw", matrix, np.stack(np.meshgrid(fine, fine, indexing="ij"))) + move[..., None, None]
    paper = np.pad(strokes, ((0, 0), (2, 3), (2, 3)))  # pixel (i, j) of a digit is pixel (i + 2, j + 2) of its paper
    y, x = (np.clip(side + CELL / 2 - 0.5 + 2, 0, CELL + 3) for side in (y, x))
    top, left, each = y.astype(int), x.astype(int), np.arange(n)[:, None, None]
    down, right = y - top, x - left
    ink = (
        (1 - down) * ((1 - right) * paper[each, top, left] + right * paper[each, top, left + 1])
        + down * ((1 - right) * paper[each, top + 1, left] + right * paper[each, top + 1, left + 1])
    )
    return reduce(ink, "n (h a) (w b) -> n h w", "mean", n=n, h=CELL, w=CELL, a=3, b=3)


def render(scene: Scene, strokes: np.ndarray) -> np.ndarray:
    """Draw a scene as palette indices, uint8 (t, h, w). `strokes` (things, 8, 8) are in the order of `scene.things`."""
    scripts = SCRIPTS[scene.kind]
    frames = np.zeros((len(scripts[0]), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for thing, script, stroke in zip(scene.things, scripts, strokes, strict=True):
        below = LEVELS * COLOR_NAMES.index(thing.color)  # the palette entry before the first level of this color
        for frame, pose in zip(frames, script, strict=True):
            spread = _spread(pose.size)
            level = np.rint(LEVELS * pose.light * (spread @ stroke @ spread.T)).astype(np.uint8)
            y, x = thing.y + pose.y, thing.x + pose.x
            frame[y: y + pose.size, x: x + pose.size] += (level > 0) * (below + level)  # things do not overlap
    return frames
