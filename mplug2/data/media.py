"""Media: images and videos from files to arrays, and from arrays to the input of the vision encoder.

Axes: `t` frames, `H W` rows and columns, 3 colors (red, green, blue). An image is a video of one frame.

    file --read_image, read_video--> uint8 (t, H, W, 3) --to_pixels--> float32 (3, t, size, size)

Pillow decodes GIF, WebP and PNG, still or animated, and JPEG and BMP. FFmpeg, through imageio's PyAV plugin, decodes
MP4, WebM, MKV, AVI and MOV. It runs in one thread, because the workers of a loader already run in parallel. Whatever is
wrong with a file, the error is a `MediaError` that names it.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from av import FFmpegError  # imageio passes it on
from einops import rearrange
from imageio.core.v3_plugin_api import PluginV3
from PIL import Image, ImageOps, UnidentifiedImageError

STILL_SUFFIXES = (".jpg", ".jpeg", ".bmp")
ANIMATION_SUFFIXES = (".gif", ".webp", ".png")
"""These may hold one frame or many. Only the file itself tells."""
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
MEDIA_SUFFIXES = STILL_SUFFIXES + ANIMATION_SUFFIXES + VIDEO_SUFFIXES

PILLOW_FORMATS = ("JPEG", "BMP", "GIF", "WEBP", "PNG")  # detected by content: many ".jpg" files on the web are PNG

ADVICE = "it may be damaged, cut off, or not what its suffix says: download it again, or remove its record"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue (from 0 to 1) over CLIP's training images."""
NORMALIZED = ((np.arange(256, dtype=np.float32) / 255 - np.float32(CLIP_MEAN)[:, None]) / np.float32(CLIP_STD)[:, None])
"""Normalized value of each of the 256 levels of red, green and blue, (3, 256). A look-up is faster than arithmetic."""


class MediaError(ValueError):
    """An image or video cannot be read. The message says which file, what is wrong with it, and what to do."""


def is_media(path: Path | str) -> bool:
    """Whether `path` has the suffix of an image or a video. The file itself is not opened."""
    return Path(path).suffix.lower() in MEDIA_SUFFIXES


def kind_of(path: Path | str) -> str:
    """Return "image" or "video", by the suffix. A GIF, WebP or PNG is an image if it has one frame.

    Raises MediaError for an unknown suffix, or if a GIF, WebP or PNG cannot be opened.
    """
    suffix = _suffix(path)
    if suffix in ANIMATION_SUFFIXES:
        with _decoding(path), _open_image(path) as image:
            return "video" if _frame_count(image) > 1 else "image"
    return "video" if suffix in VIDEO_SUFFIXES else "image"


def read_media(path: Path | str, frames: int | None, rng: np.random.Generator | None = None) -> np.ndarray:
    """`read_image` or `read_video`, whichever `kind_of` says. Returns uint8 (t, H, W, 3), with t = 1 for an image."""
    return read_image(path) if kind_of(path) == "image" else read_video(path, frames, rng)


def read_image(path: Path | str) -> np.ndarray:
    """Read an image, or the first frame of an animated GIF, WebP or PNG. Returns uint8 (1, H, W, 3).

    The EXIF orientation is applied, transparent parts become white, and 16 bits per color become 8. Raises MediaError.
    """
    if _suffix(path) in VIDEO_SUFFIXES:
        raise MediaError(f"{path} is a video, where an image was expected; call it `video` in its record")
    with _decoding(path), _open_image(path) as image:
        return np.stack([_to_rgb(image)])  # a writable copy


def read_video(path: Path | str, frames: int | None, rng: np.random.Generator | None = None) -> np.ndarray:
    """Read the frames of a clip that `segment_indices` picks, or all of them for None. Returns uint8 (t, H, W, 3).

    Only the wanted frames are converted to RGB and kept. A GIF, WebP or PNG of one frame is a clip of one frame. Raises
    MediaError. A video file

    - that ends early, or is damaged on the way, is the clip up to there, if that is half of what it promised or more;
    - that changes its size on the way has the size of its first frame;
    - that is to be shown turned (phones film on their side) is not turned: the frames come as they are stored.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: expected at least 1, or None for all frames")
    suffix = _suffix(path)
    if suffix in STILL_SUFFIXES:
        raise MediaError(f"{path} is a still image, where a video was expected; call it `image` in its record")
    if suffix in ANIMATION_SUFFIXES:
        with _decoding(path), _open_image(path) as image:
            return _read_animation(image, frames, rng)
    return _read_stream(path, frames, rng)


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


def _numbers(total: int, frames: int | None, rng: np.random.Generator | None) -> list[int]:
    return list(range(total)) if frames is None else segment_indices(total, frames, rng).tolist()


def to_pixels(frames: np.ndarray, size: int) -> torch.Tensor:
    """Prepare frames for the vision encoder: uint8 (t, H, W, 3) to float32 (3, t, size, size).

    Pillow resizes each frame without cropping, whatever its aspect (bicubic, antialiased, rounded to 8 bits). CLIP's
    mean and standard deviation normalize the colors. A frame that already has the size is not resampled.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"{frames.dtype} {frames.shape}: expected uint8 frames of shape (t, H, W, 3)")
    if frames.shape[1:3] != (size, size):
        resized = (Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC) for frame in frames)
        frames = np.stack([np.asarray(frame) for frame in resized])
    planes = rearrange(frames, "t h w c -> c t h w", h=size, w=size, c=3)
    return torch.from_numpy(np.stack([table[plane] for table, plane in zip(NORMALIZED, planes)]))


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """Undo the normalization of `to_pixels`, for display: (3, t, H, W) to uint8 (t, H, W, 3)."""
    frames = rearrange(pixels.detach().cpu().float(), "c t h w -> t h w c", c=3)
    frames = frames * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    return (frames * 255).round().clamp(0, 255).to(torch.uint8).numpy()


# ---- Pillow ----------------------------------------------------------------------------------------------------------


def _open_image(path: Path | str) -> Image.Image:
    with open(path, "rb") as file:  # one read: Pillow's many small reads and seeks are slow on network disks
        content = io.BytesIO(file.read())
    try:
        return Image.open(content, formats=PILLOW_FORMATS)
    except UnidentifiedImageError as error:  # Pillow's message holds a memory address, which differs each time
        raise UnidentifiedImageError(f"its content is none of the formats {', '.join(PILLOW_FORMATS)}") from error


def _frame_count(image: Image.Image) -> int:
    return getattr(image, "n_frames", 1)


def _read_animation(image: Image.Image, frames: int | None, rng: np.random.Generator | None) -> np.ndarray:
    total = _frame_count(image)
    numbers = _numbers(total, frames, rng)
    kept: dict[int, np.ndarray] = {}
    for number in numbers:
        if number not in kept:
            image.seek(number)
            kept[number] = _to_rgb(image)
    return np.stack([kept[number] for number in numbers])


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The current frame, upright and on white: uint8 (H, W, 3)."""
    if image.getexif():
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion would clip it at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


# ---- FFmpeg ----------------------------------------------------------------------------------------------------------


def _read_stream(path: Path | str, frames: int | None, rng: np.random.Generator | None) -> np.ndarray:
    """Pick by the number of frames that the file promises, or, where it promises none (WebM, MKV), by a count of them.

    Where fewer can be decoded, the promise was wrong: count, and pick again, of those.
    """
    with _decoding(path):
        with _open_video(path) as file:
            promised = max(0, file.properties().n_images)  # a broken header may say anything
            total = promised or _count(path)
            with suppress(EOFError, FFmpegError):
                return _pick(file, total, frames, rng)
        total = _count(path)
        if 2 * total < promised:
            raise MediaError(f"{path} promises {promised} frames, but only {total} could be decoded; {ADVICE}")
        with _open_video(path) as file:
            return _pick(file, total, frames, rng)


def _pick(file: PluginV3, total: int, frames: int | None, rng: np.random.Generator | None) -> np.ndarray:
    """Decode up to the last wanted frame. Raises EOFError or FFmpegError if the file ends before it."""
    numbers = _numbers(total, frames, rng)
    wanted = sorted(set(numbers))
    select = "1" if frames is None else "+".join(f"eq(n,{number})" for number in wanted)
    kept = dict(zip(wanted, _decode(file, "rgb24", select), strict=False))
    if len(kept) < len(wanted):
        raise EOFError(f"{len(kept)} of {len(wanted)} wanted frames were found")
    return np.stack([kept[number] for number in numbers])


def _count(path: Path | str) -> int:
    """How many frames can be decoded, up to the end or to the first damage. In grey, as that costs least."""
    total = 0
    with _open_video(path) as file, suppress(FFmpegError):
        for _ in _decode(file, "gray"):
            total += 1
    if total == 0:
        raise MediaError(f"{path} has no frame that can be decoded; {ADVICE}")
    return total


def _open_video(path: Path | str) -> PluginV3:
    return iio.imopen(Path(path), "r", plugin="pyav")  # a str might be taken for an address


def _decode(file: PluginV3, colours: str, select: str = "1") -> Iterator[np.ndarray]:
    """Convert only the frames, numbered `n`, for which `select`, an expression of FFmpeg's, is not 0.

    The scaling is by 1. It is named because it is what converts the colours, and takes many threads unless told.
    """
    filters = [("select", select), ("scale", "threads=1"), ("format", colours)]
    return file.iter(filter_sequence=filters, format=colours, thread_count=1)


# ---- errors ----------------------------------------------------------------------------------------------------------


def _suffix(path: Path | str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in MEDIA_SUFFIXES:
        raise MediaError(f"{path}: suffix {suffix!r} cannot be read; convert it to one of {', '.join(MEDIA_SUFFIXES)}")
    return suffix


@contextmanager
def _decoding(path: Path | str) -> Iterator[None]:
    """Turn whatever a decoder raises on broken bytes (OSError, SyntaxError, struct.error, ...) into a MediaError."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} is too large: {error} Shrink it first") from error
    except Exception as error:
        if not os.path.exists(path):
            problem = "does not exist; check the path in its record, and whether the media were copied"
        elif os.path.isdir(path):
            problem = "is a folder, where a media file was expected; check the path in its record"
        elif os.path.getsize(path) == 0:
            problem = f"is empty (0 bytes); {ADVICE}"
        else:
            problem = f"cannot be decoded ({type(error).__name__}: {error}); {ADVICE}"
        raise MediaError(f"{path} {problem}") from error
