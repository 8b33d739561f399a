"""Small videos for tests. They count: frame k shows k as two gray levels, k // 20 on the left and k % 20 on the right.

The levels lie far enough apart for every codec here.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

STEP = 12  # gray levels between two neighboring digits; 20 digits

FORMATS = {
    ("libx264", None): (".mp4", ".mov", ".mkv"), ("libx264", "mp4"): (".m4v", ".f4v", ".gifv"),
    ("libx264", "mov"): (".qt",), ("libx264", "3gp"): (".3gp", ".3g2"), ("libx264", "flv"): (".flv",),
    ("libx264", "mpegts"): (".ts", ".mts", ".m2ts", ".m2t", ".tod"), ("libx264", "h264"): (".h264", ".264"),
    ("libx265", "hevc"): (".hevc", ".h265", ".265"), ("libvpx", "webm"): (".webm",),
    ("libvpx", "ogg"): (".ogv", ".ogm"), ("mpeg4", "avi"): (".avi", ".divx"),
    ("mpeg2video", "mpeg"): (".mpg", ".mod"), ("mpeg1video", "mpeg"): (".mpeg", ".mpe"),
    ("mpeg2video", "vob"): (".vob",), ("mpeg1video", "mpeg1video"): (".m1v",),
    ("mpeg2video", "mpeg2video"): (".m2v",), ("mpeg2video", "mxf"): (".mxf",), ("wmv2", "asf"): (".wmv", ".asf"),
    ("rv20", "rm"): (".rm", ".rmvb"), ("mjpeg", "mjpeg"): (".mjpeg", ".mjpg"), ("dvvideo", "dv"): (".dv",),
    ("rawvideo", "yuv4mpegpipe"): (".y4m",),
}
"""Codec and container (None: FFmpeg's choice) for each suffix."""
CODECS = {suffix: form for form, suffixes in FORMATS.items() for suffix in suffixes}


def counter(total: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 (total, height, width, 3)."""
    frames = np.zeros((total, height, width, 3), np.uint8)
    numbers = np.arange(total)[:, None, None, None]
    frames[:, :, : width // 2] = numbers // 20 * STEP
    frames[:, :, width // 2:] = numbers % 20 * STEP
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    """The number that each frame of a counter shows."""
    quarter = frames.shape[2] // 4
    left = frames[:, :, :quarter].mean(axis=(1, 2, 3)) / STEP
    right = frames[:, :, -quarter:].mean(axis=(1, 2, 3)) / STEP
    return [round(a) * 20 + round(b) for a, b in zip(left, right, strict=True)]


def write_video(
    path: Path, frames: np.ndarray, codec: str | None = None, times: Sequence[int] | None = None, rate: int = 25,
    pixel_format: str | None = None, codec_options: dict[str, str] | None = None, **options: str,
) -> Path:
    """Write frames (t, H, W, 3), or (t, H, W, 4) with transparency. `times` in ms make a variable rate."""
    chosen, container_format = CODECS[path.suffix]
    codec = codec or chosen
    quiet = {"libx265": {"x265-params": "log-level=none"}}.get(codec, {})
    with usual_scheduling(), av.open(str(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options={**quiet, **(codec_options or {})})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format or {"mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.bit_rate = 1_000_000
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24" if array.shape[2] == 3 else "rgba")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@contextmanager
def usual_scheduling() -> Iterator[None]:
    """The SVT-AV1 encoder, used as root, leaves the calling thread with the real-time policy SCHED_FIFO. Processes that
    are started later inherit it, and a thread of gloo that spins for a lock then never lets the owner of the lock run.
    """
    try:
        yield
    finally:
        if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def write_animation(path: Path, frames: np.ndarray, durations: int | list[int] = 100, **options) -> Path:
    """A GIF, WebP, PNG or AVIF. `durations` in ms."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    if path.suffix == ".webp":
        options = {"lossless": True, **options}
    first.save(path, save_all=True, append_images=rest, duration=durations, **options)
    return path
