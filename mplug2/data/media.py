"""Media: images and videos from files to arrays, and from arrays to the input of the vision encoder.

Axes: `t` frames, `H W` rows and columns, 3 colors (red, green, blue). An image is a video of one frame.

    file --read_image, read_video--> uint8 (t, H, W, 3) --to_bytes--> uint8 (3, t, size, size) --normalize--> float32

`to_pixels` does the last two steps. Loaders send bytes, a quarter of the size, and normalize them on the device.

Pillow decodes images and animations (`images.py`), FFmpeg decodes videos (`video.py`). The arrays hold what a viewer
shows: upright, on white, in standard dynamic range. Whatever is wrong with a file, the error is a `MediaError`, which
says what (`media_errors.py`).
"""

import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError

from mplug2.data import images, video
from mplug2.data.frame_choice import segment_indices
from mplug2.data.media_errors import MediaError, decoding

__all__ = ["MediaError", "is_media", "kind_of", "normalize", "read_image", "read_media", "read_video",
           "segment_indices", "to_bytes", "to_frames", "to_pixels"]

STILL_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".ico", ".pcx", ".sgi", ".qoi", ".dds", ".psd",
)
ANIMATION_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".avif", ".avifs")
"""These may hold one frame or many. Only the file itself shows which."""
VIDEO_SUFFIXES = (
    ".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".qt", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts",
    ".mts", ".m2ts", ".m2t", ".tod", ".mod", ".wmv", ".asf", ".3gp", ".3g2", ".flv", ".f4v", ".ogv", ".ogm", ".divx",
    ".rm", ".rmvb", ".mxf", ".dv", ".gifv", ".mjpeg", ".mjpg", ".h264", ".264", ".hevc", ".h265", ".265", ".y4m",
)
MEDIA_SUFFIXES = STILL_SUFFIXES + ANIMATION_SUFFIXES + VIDEO_SUFFIXES

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue (from 0 to 1) over CLIP's training images."""


def is_media(path: Path | str) -> bool:
    """Whether `path` has the suffix of an image or a video. The file itself is not opened.

    macOS writes a metadata file `._NAME` next to each file NAME on some disks: these are no media.
    """
    return Path(path).suffix.lower() in MEDIA_SUFFIXES and not Path(path).name.startswith("._")


def kind_of(path: Path | str) -> str:
    """Return "image" or "video", by the suffix. A GIF, WebP, PNG or AVIF is an image if it has one frame.

    Raises MediaError for an unknown suffix, or if a file has to be opened and cannot be.
    """
    category = _category(path)
    if category == "animation":
        with decoding(path, "an image"), images.open_image(path) as image:
            return "video" if images.frame_count(image) > 1 else "image"
    return "video" if category == "video" else "image"


def read_media(path: Path | str, frames: int | None, rng: np.random.Generator | None = None) -> np.ndarray:
    """`read_image` or `read_video`, whichever `kind_of` says. Returns uint8 (t, H, W, 3), with t = 1 for an image."""
    return read_image(path) if kind_of(path) == "image" else read_video(path, frames, rng)


def read_image(path: Path | str, min_side: int | None = None) -> np.ndarray:
    """Read an image, or the first frame of an animation. Returns uint8 (1, H, W, 3).

    The EXIF orientation is applied, transparent parts become white, HDR is tone-mapped, and 16 bits per color or gray
    from 0.0 to 1.0 become 8 bits; gray of other ranges is refused. With `min_side` a JPEG file may be decoded at a
    half, a quarter or an eighth of its size, which is faster, as long as no side falls below `min_side` pixels. Raises
    MediaError.
    """
    if _category(path) == "video":
        raise MediaError(f"{path} is a video, where an image was expected; call it `video` in its record")
    with decoding(path, "an image"):
        return images.read_first(path, min_side)[None]


def read_video(path: Path | str, frames: int | None, rng: np.random.Generator | None = None) -> np.ndarray:
    """Read the frames of a video that `choose_frames` picks, or all of them for None. Returns uint8 (t, H, W, 3).

    An animation is a video, and so is a GIF, WebP, PNG or AVIF of one frame. Raises MediaError. A video file

    - is shown as its display matrix says (phones film on their side), on white, and tone-mapped if it is HDR;
    - that ends early, or is damaged on the way, is the video up to there, if that is half of its frames or more;
    - that changes its size on the way has the size of its first frame.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: expected at least 1, or None for all frames")
    category = _category(path)
    if category == "still":
        raise MediaError(f"{path} is a still image, where a video was expected; call it `image` in its record")
    with decoding(path, "a video"):
        return (images.read_animation if category == "animation" else video.read_frames)(path, frames, rng)


def _category(path: Path | str) -> str:
    """"still", "animation" or "video", by the suffix. A file without a suffix is an animation if Pillow can open it."""
    suffix = Path(path).suffix.lower()
    for category, suffixes in (
        ("still", STILL_SUFFIXES), ("animation", ANIMATION_SUFFIXES), ("video", VIDEO_SUFFIXES)
    ):
        if suffix in suffixes:
            return category
    if suffix in ("", ".") and os.path.isfile(path):
        try:
            with images.open_image(path):
                return "animation"
        except (UnidentifiedImageError, OSError):
            return "video"
    raise MediaError(f"{path}: suffix {suffix!r} is not that of an image or a video; "
                     "convert the file, for example to .jpg, .png, .gif or .mp4")


def to_pixels(frames: np.ndarray, size: int) -> torch.Tensor:
    """Prepare frames for the vision encoder: uint8 (t, H, W, 3) to float32 (3, t, size, size)."""
    return normalize(to_bytes(frames, size))


def to_bytes(frames: np.ndarray, size: int) -> torch.Tensor:
    """Resize frames: uint8 (t, H, W, 3) to uint8 (3, t, size, size).

    Pillow resizes each frame without cropping, whatever its aspect (bicubic, antialiased, rounded to 8 bits). A frame
    that already has the size is not resampled.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"{frames.dtype} {frames.shape}: expected uint8 frames of shape (t, H, W, 3)")
    if frames.shape[1:3] != (size, size):
        resized = (Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC) for frame in frames)
        frames = np.stack([np.asarray(frame) for frame in resized])
    return torch.from_numpy(rearrange(frames, "t h w c -> c t h w", h=size, w=size, c=3).copy())


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Normalize colors by CLIP's mean and standard deviation: uint8 `... 3 t H W` to float32, on the same device."""
    planes = pixels.float().div_(255).unbind(dim=-4)
    return torch.stack([(plane - mean).div_(std) for plane, mean, std in zip(planes, CLIP_MEAN, CLIP_STD)], dim=-4)


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """Undo the normalization of `to_pixels`, for display: (3, t, H, W) to uint8 (t, H, W, 3)."""
    frames = rearrange(pixels.detach().cpu().float(), "c t h w -> t h w c", c=3)
    frames = frames * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    return (frames * 255).round().clamp(0, 255).to(torch.uint8).numpy()
