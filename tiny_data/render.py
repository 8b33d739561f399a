"""Drawing: handwritten strokes are tinted and pasted into each frame, as the scripts of the scene say.

Axes: n strokes, t frames, h height, w width. Frames are drawn as palette indices; `PALETTE[frames]` gives the RGB
pixels. The whole world has 121 colors (black, and six hues in twenty levels of brightness), so GIF stores them exactly.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

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
