"""What can be wrong with a media file, in words: the error that every reader of images and videos raises."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from av import FFmpegError
from PIL import Image, UnidentifiedImageError

HTML_STARTS = tuple(f"<{name}".encode() for name in (
    "!doctype html", "html", "head", "body", "script", "title", "meta", "div", "center", "br", "h1"))
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
MP4_BRANDS = (b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"avc1", b"M4V ", b"qt  ")
EBML = b"\x1a\x45\xdf\xa3"  # how Matroska and WebM files begin
ADVICE = "it may be damaged, cut off, or not what its suffix says: download it again, or leave it out"


class MediaError(ValueError):
    """An image or video cannot be read. The message says which file, what is wrong with it, and what to do."""


class UnclearImageError(ValueError):
    """An image that decodes, but does not say how it is meant to look. The message continues "PATH ..."."""


@contextmanager
def decoding(path: Path | str, expected: str) -> Iterator[None]:
    """Turn whatever a decoder raises on broken bytes (OSError, SyntaxError, struct.error, ...) into a MediaError.

    `expected` says what the file should hold: "an image" or "a video".
    """
    try:
        yield
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} is too large: {error} Shrink it first") from error
    except UnclearImageError as error:
        raise MediaError(f"{path} {error}") from error
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, FFmpegError):  # FFmpeg's: a length that is damaged
            raise
        # FFmpeg's `strerror` is its message alone; str() would add an error number and the path once more.
        reason = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
        other = _other_kind(path) if isinstance(error, UnidentifiedImageError) else None
        raise media_error(path, expected, other or f"cannot be decoded ({reason}); {ADVICE}") from error


def media_error(path: Path | str, expected: str, problem: str) -> MediaError:
    """The error of a file that cannot be read because of `problem`, unless a look at the file finds a better reason."""
    return MediaError(f"{path} {_known_problem(path, expected) or problem}")


def _other_kind(path: Path | str) -> str | None:
    """What a file is that has the suffix of an image, but is none that Pillow knows."""
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS:
            return "is a HEIC photo, which Pillow does not read; convert it to JPEG"
        if start[4:8] == b"ftyp" and start[8:] in MP4_BRANDS or start[:4] == EBML:
            return "is a video (MP4 or WebM), whatever its suffix says; rename it to .mp4 and call it `video`"
    return None


def _known_problem(path: Path | str, expected: str) -> str | None:
    """What a look at the file system and at the first bytes says. None if both look normal."""
    if not os.path.exists(path) and os.path.islink(path):
        return f"is a link to {os.readlink(path)}, which does not exist, or leads back to it; copy the file itself"
    if not os.path.exists(path):
        return "does not exist; check its path, and whether the media were copied"
    if os.path.isdir(path):
        return f"is a folder, not {expected}; check its path"
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return None  # the decoder's own error says why
    if not start:
        return f"is empty (0 bytes); {ADVICE}"
    if start.startswith(b"version https://git-lfs.github.com"):
        return f"is a git-lfs pointer, not {expected}; fetch the content with `git lfs pull`"
    if start.startswith(b"\x00\x05\x16\x07"):
        return f"is a macOS metadata file (._*), not {expected}; leave it out"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(HTML_STARTS) or (text.startswith(b"<") and b"<html" in text):
        return f"is an HTML page, not {expected}; the server sent an error or a login page: download the file again"
    if text.startswith((b"<?xml", b"<error", b"{\"")):
        kind = "a JSON" if text.startswith(b"{") else "an XML"
        return f"is {kind} document, not {expected}; the server sent an error message: download the file again"
    return None
