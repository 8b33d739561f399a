"""Which frames of a video a model sees: one from each of equal segments of time."""

from collections.abc import Sequence

import numpy as np


def segment_indices(total: int, frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Pick one frame from each of `frames` equal segments of a video of `total` frames. Returns int64 (frames,).

    With `rng` it is a random frame of the segment (training). Without it, it is the middle frame, or the earlier one of
    two (testing). A video with fewer frames gives all of them and repeats its last frame.
    """
    if total < 1 or frames < 1:
        raise ValueError(f"{frames} of {total} frames: expected to pick at least 1 frame of at least 1")
    if total < frames:
        return np.minimum(np.arange(frames), total - 1)
    bounds = np.arange(frames + 1) * total // frames  # segment i is bounds[i] <= number < bounds[i + 1]
    if rng is None:
        return (bounds[:-1] + bounds[1:] - 1) // 2
    return rng.integers(bounds[:-1], bounds[1:])


def choose_frames(
    durations: Sequence[float], frames: int | None, rng: np.random.Generator | None = None
) -> list[int]:
    """Numbers of the frames to read from a video whose frames are shown for `durations`, in any unit of time.

    The video is resampled to as many frames of equal duration, and `segment_indices` picks from those. So the chosen
    frames are spread over time. At a constant rate the choice is exactly that of `segment_indices`. A video that has no
    more frames than asked gives each of them once and then repeats its last one. None asks for all frames.
    """
    total = len(durations)
    if frames is None:
        return list(range(total))
    picked = segment_indices(total, frames, rng)
    if total > frames:
        ends = np.cumsum(durations, dtype=np.float64)
        middles = (picked + 0.5) * ends[-1] / total  # the middle, so that rounded time stamps do not matter
        picked = np.minimum(np.searchsorted(ends, middles, side="right"), total - 1)
    return picked.tolist()
