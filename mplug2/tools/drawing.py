"""Drawing on frames: the attention of a word, boxes, smaller copies, and a WebP to embed in a page.

Axes: t frames, h w rows and columns of patches, H W pixels.
"""

import base64
import io

import numpy as np
from PIL import Image

from mplug2.predictor import WordAttention

SIDE = 128
"""Larger images are scaled down to this, in pixels."""


def attended_frames(frames: np.ndarray, word: WordAttention) -> np.ndarray:
    """The frames of `t H W 3` that `word` has a map for: every second one with temporal down-sampling."""
    columns = word.map.shape[0]
    return frames[:: max(1, len(frames) // columns)][:columns]


def overlay(frames: np.ndarray, word: WordAttention) -> np.ndarray:
    """The frames `t H W 3` in gray, with warmer colors where the word attends more: uint8 `t H W 3`.

    Scaled by the largest weight of all frames. The frames are gray so that every color stands for a weight.
    """
    import matplotlib
    weights = word.map.float().numpy() / max(word.map.max().item(), 1e-9)
    (height, width), (h, w) = frames.shape[1:3], weights.shape[1:]
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    warm = matplotlib.colormaps["inferno"](weights[:, rows][:, :, columns])[..., :3] * 255
    return (0.65 * warm + 0.35 * frames.max(axis=3, keepdims=True)).round().astype(np.uint8)


def scale_down(frames: np.ndarray) -> np.ndarray:
    """A copy of the frames `t H W 3`, scaled down to SIDE if they are larger."""
    height, width = frames.shape[1:3]
    if max(height, width) <= SIDE:
        return frames.copy()
    size = (max(1, round(width * SIDE / max(height, width))), max(1, round(height * SIDE / max(height, width))))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def draw_box(frame: np.ndarray, box: list[float], color: tuple[int, int, int]) -> None:
    """Draw a box (center x, center y, width, height, as fractions) into `H W 3`, one pixel wide."""
    height, width = frame.shape[:2]
    cx, cy, w, h = box
    left, right = (int(np.clip(x * width, 0, width - 1)) for x in (cx - w / 2, cx + w / 2))
    top, bottom = (int(np.clip(y * height, 0, height - 1)) for y in (cy - h / 2, cy + h / 2))
    frame[[top, bottom], left: right + 1] = color
    frame[top: bottom + 1, [left, right]] = color


def data_uri(frames: np.ndarray) -> str:
    """uint8 `t H W 3` as a WebP: an animation of at most two seconds, with a pause at the end, if t > 1."""
    images = [Image.fromarray(frame) for frame in frames]
    while len(images) > 1 and images[-1].tobytes() == images[-2].tobytes():  # a short video repeats its last frame
        images.pop()
    duration = [int(np.clip(2000 / len(images), 100, 400))] * len(images)
    duration[-1] += 600
    file = io.BytesIO()
    animation = dict(save_all=True, append_images=images[1:], duration=duration, loop=0) if len(images) > 1 else {}
    images[0].save(file, "WEBP", lossless=frames.shape[1] <= 64, quality=80, **animation)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
