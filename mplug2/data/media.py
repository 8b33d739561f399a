"""Media: pictures and clips from files to arrays, and from arrays to what the vision encoder takes.

Axes: `t` frames, `H W` rows and columns, 3 colours (red, green, blue). A picture is a clip of one frame.

    file --read_image, read_video--> uint8 (t, H, W, 3) --to_pixels--> float32 (3, t, size, size)

GIF, WebP and PNG, still or animated, and JPEG and BMP are decoded by Pillow; MP4, WebM, MKV, AVI and MOV by FFmpeg
through PyAV, in one thread: the workers of a loader are what runs in parallel. Whatever is wrong with a file, the error
is a `MediaError` that names it.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

STILL_SUFFIXES = (".jpg", ".jpeg", ".bmp")
ANIMATION_SUFFIXES = (".gif", ".webp", ".png")
"""One frame or many: only the file itself tells."""
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
MEDIA_SUFFIXES = STILL_SUFFIXES + ANIMATION_SUFFIXES + VIDEO_SUFFIXES

PILLOW_FORMATS = ("JPEG", "BMP", "GIF", "WEBP", "PNG")  # by content: many a ".jpg" of the web is a PNG

ADVICE = "it may be damaged or cut off: fetch it again, or take its record out"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue, from 0 to 1, of the pictures that CLIP was trained on."""


class MediaError(ValueError):
    """A picture or clip cannot be read. The message names the file, what is wrong with it, and what to do."""


def is_media(path: Path | str) -> bool:
    """Whether the suffix of `path` is one that this file reads. The disk is not looked at."""
    return Path(path).suffix.lower() in MEDIA_SUFFIXES


def kind_of(path: Path | str) -> str:
    """Tell "image" from "video". The suffix decides, but for GIF, WebP and PNG the number of frames: one is an image.

    Raises MediaError for another suffix, or if it has to be opened and cannot be.
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
    """Read a picture, or the first frame of a GIF, WebP or PNG. Returns uint8 (1, H, W, 3).

    Turned upright as its EXIF orientation says; transparent parts are laid over white; 16 bits a colour become 8.
    Raises MediaError.
    """
    if _suffix(path) in VIDEO_SUFFIXES:
        raise MediaError(f"{path} is a video, where an image was expected; name it as `video` in its record")
    with _decoding(path), _open_image(path) as image:
        return np.stack([_to_rgb(image)])  # a copy that may be written to


def read_video(path: Path | str, frames: int | None, rng: np.random.Generator | None = None) -> np.ndarray:
    """Read the frames of a clip that `segment_indices` picks, or all of them for None. Returns uint8 (t, H, W, 3).

    Only the wanted frames are kept in memory. A GIF, WebP or PNG of one frame is a clip of one frame. A video file that
    ends early, or is damaged on the way, is the clip up to there, as long as that is half of what it promised or more.
    Raises MediaError.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"expected to read 1 frame or more, or None for all of them, found {frames}")
    suffix = _suffix(path)
    if suffix in STILL_SUFFIXES:
        raise MediaError(f"{path} is a still image, where a video was expected; name it as `image` in its record")
    if suffix in ANIMATION_SUFFIXES:
        with _decoding(path), _open_image(path) as image:
            return _read_animation(image, frames, rng)
    return _read_stream(path, frames, rng)


def segment_indices(total: int, frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Which `frames` of `total` frames to take: one of each of `frames` equal segments. Returns int64 (frames,).

    With `rng` it is a random frame of the segment (training), without it the middle one, the earlier of two (testing).
    A clip of fewer frames than asked gives all of them, and repeats its last.
    """
    if total < 1 or frames < 1:
        raise ValueError(f"expected at least 1 frame to take of at least 1 frame, found {frames} of {total}")
    if total < frames:
        return np.minimum(np.arange(frames), total - 1)
    bounds = np.arange(frames + 1) * total // frames  # segment i is bounds[i] <= number < bounds[i + 1]
    if rng is None:
        return (bounds[:-1] + bounds[1:] - 1) // 2
    return rng.integers(bounds[:-1], bounds[1:])


def to_pixels(frames: np.ndarray, size: int) -> torch.Tensor:
    """What the vision encoder takes: uint8 (t, H, W, 3) to float32 (3, t, size, size), by CLIP's mean and deviation.

    The whole frame is resized, whatever its proportions, by Pillow (bicubic, antialiased, rounded to 8 bits); a frame
    of that size already is left as it is.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"expected uint8 frames of shape (t, H, W, 3), found {frames.dtype} {frames.shape}")
    if frames.shape[1:3] != (size, size):
        resized = (Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC) for frame in frames)
        frames = np.stack([np.asarray(frame) for frame in resized])
    pixels = torch.from_numpy(frames.astype(np.float32)) / 255
    pixels = (pixels - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    return rearrange(pixels, "t h w c -> c t h w", h=size, w=size, c=3).contiguous()


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """The inverse of `to_pixels` but for the resizing, for pictures: (3, t, H, W) to uint8 (t, H, W, 3)."""
    frames = rearrange(pixels.detach().cpu().float(), "c t h w -> t h w c", c=3)
    frames = frames * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    return (frames * 255).round().clamp(0, 255).to(torch.uint8).numpy()


# ---- Pillow ----------------------------------------------------------------------------------------------------------


def _open_image(path: Path | str) -> Image.Image:
    with open(path, "rb") as file:  # read at once: Pillow's many small reads and seeks are slow on network disks
        return Image.open(io.BytesIO(file.read()), formats=PILLOW_FORMATS)


def _frame_count(image: Image.Image) -> int:
    return getattr(image, "n_frames", 1)


def _read_animation(image: Image.Image, frames: int | None, rng: np.random.Generator | None) -> np.ndarray:
    total = _frame_count(image)
    numbers = range(total) if frames is None else segment_indices(total, frames, rng).tolist()
    kept: dict[int, np.ndarray] = {}
    for number in numbers:
        if number not in kept:
            image.seek(number)
            kept[number] = _to_rgb(image)
    return np.stack([kept[number] for number in numbers])


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The current frame, upright, over white: uint8 (H, W, 3)."""
    if image.getexif():
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would cut off at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


# ---- FFmpeg ----------------------------------------------------------------------------------------------------------


def _read_stream(path: Path | str, frames: int | None, rng: np.random.Generator | None) -> np.ndarray:
    """Pick by the number of frames that the file promises, or, where it promises none (WebM, MKV), by a count of them.

    Where fewer can be decoded, the promise was wrong: pick again, of those.
    """
    with _decoding(path), _open_video(path) as (_, stream):
        promised = max(0, stream.frames)  # a broken header may say anything
    if frames is None:
        kept, decoded = _decode(path, None)
        _check_promise(path, decoded, promised)
        return _stack(path, list(kept.values()))
    numbers = segment_indices(promised or _decode(path, ())[1], frames, rng)
    kept, decoded = _decode(path, numbers.tolist())
    if decoded <= numbers[-1]:
        _check_promise(path, decoded, promised)
        numbers = segment_indices(decoded, frames, rng)
        kept, _ = _decode(path, numbers.tolist())
    return _stack(path, [kept[number] for number in numbers.tolist()])


def _decode(path: Path | str, wanted: Sequence[int] | None) -> tuple[dict[int, np.ndarray], int]:
    """Decode up to the last of the `wanted` frame numbers; to the end for None, which keeps all, and for (), none.

    Returns the kept frames by number, and how many frames were decoded, at least one. Damage after the first frame ends
    the clip.
    """
    kept: dict[int, np.ndarray] = {}
    decoded = 0
    with _decoding(path), _open_video(path) as (container, stream):
        try:
            for frame in container.decode(stream):
                if wanted is None or decoded in wanted:
                    kept[decoded] = _upright(frame)
                decoded += 1
                if wanted and decoded > wanted[-1]:
                    break
        except av.FFmpegError:
            if decoded == 0:
                raise
    if decoded == 0:
        raise MediaError(f"{path} has a video stream without any frame; {ADVICE}")
    return kept, decoded


@contextmanager
def _open_video(path: Path | str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with av.open(os.path.abspath(path)) as container:  # absolute: FFmpeg takes "a:b.mp4" for an address
        stream = container.streams.best("video")
        if stream is None:
            raise MediaError(f"{path} has no video stream; {ADVICE}")
        stream.codec_context.thread_count = 1
        yield container, stream


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """uint8 (H, W, 3), turned as the file says it is to be shown (phones film on their side)."""
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    return np.rot90(pixels, k=round(frame.rotation / 90))  # both count counter-clockwise


def _check_promise(path: Path | str, decoded: int, promised: int) -> None:
    if 2 * decoded < promised:
        raise MediaError(f"{path} promises {promised} frames, but only {decoded} could be decoded; {ADVICE}")


def _stack(path: Path | str, frames: list[np.ndarray]) -> np.ndarray:
    shapes = sorted({frame.shape[:2] for frame in frames})
    if len(shapes) > 1:
        raise MediaError(f"{path} changes its frame size on the way, (H, W) = {shapes}; encode it anew at one size")
    return np.stack(frames)


# ---- errors ----------------------------------------------------------------------------------------------------------


def _suffix(path: Path | str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in MEDIA_SUFFIXES:
        raise MediaError(f"{path}: suffix {suffix!r} cannot be read; convert it to one of {', '.join(MEDIA_SUFFIXES)}")
    return suffix


@contextmanager
def _decoding(path: Path | str) -> Iterator[None]:
    """Turn whatever a broken byte makes a decoder raise (OSError, SyntaxError, struct.error, ...) into a MediaError."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} is too large a picture: {error} Shrink it first") from error
    except Exception as error:
        if not os.path.exists(path):
            problem = "does not exist; check the path in its record, and that the media were copied along"
        elif os.path.isdir(path):
            problem = "is a folder, where a media file was expected; check the path in its record"
        elif os.path.getsize(path) == 0:
            problem = f"is empty (0 bytes); {ADVICE}"
        else:
            problem = f"cannot be decoded ({type(error).__name__}: {error}); {ADVICE}"
        raise MediaError(f"{path} {problem}") from error
