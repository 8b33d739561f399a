"""Writing the world to a folder: PNG images, GIF clips, JSONL files with one record per line, and `about.json`."""

import json
import os
import shutil
import struct
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from mplug2.tasks import TASKS
from tiny_data import tasks
from tiny_data.render import PALETTE, load_digits, render, vary
from tiny_data.scenes import SPLITS, STROKES, SceneSource
from tiny_data.world import AXES, COLORS, DIGITS, FRAMES, IMAGE_SIZE, Scene, held_out

NAME = "tiny"
VERSION = 6  # increased whenever the same seed gives different files
FRAME_MILLISECONDS = 250


@dataclass(frozen=True)
class Sizes:
    """How many of each to write. Test sizes apply to both "test" and "combos"."""

    clips: int = 12000
    """Training clips with captions and questions."""
    images: int = 6000
    """Training images with captions and questions."""
    texts: int = 4000
    """Sentences for language modeling."""
    labelled: int = 2000
    """Training records for each of the other tasks: classification, entailment, two images, grounding, ..."""
    val_clips: int = 240
    """The same for validation: clips."""
    val_images: int = 120
    """Images."""
    val_texts: int = 240
    """Sentences."""
    val_labelled: int = 120
    """Records for each of the other tasks."""
    test_clips: int = 600
    """The same for testing: clips."""
    test_images: int = 300
    """Images."""
    test_texts: int = 300
    """Sentences."""
    test_labelled: int = 300
    """Records for each of the other tasks."""
    galleries: int = 5
    """Retrieval galleries of 100 clips and of 100 images."""

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 1 if field.name == "galleries" else 16
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}, but the world needs at least {least}")

    def for_split(self, split: str) -> tuple[int, int, int, int]:
        """The numbers of clips, images, texts and labeled records of a split."""
        if split == "train":
            return self.clips, self.images, self.texts, self.labelled
        if split == "val":
            return self.val_clips, self.val_images, self.val_texts, self.val_labelled
        return self.test_clips, self.test_images, self.test_texts, self.test_labelled


class SplitWriter:
    """Writes the media and the records of one split into `root`."""

    def __init__(self, root: Path, split: str, strokes: np.ndarray, labels: np.ndarray, rng: np.random.Generator):
        self.root, self.split, self.strokes, self.rng = root, split, strokes, rng
        self.source = SceneSource(split, labels, rng)
        self.hand = rng.spawn(1)[0]  # of the writers: how the handwriting of training varies

    def write(self, sizes: Sizes) -> None:
        clips, images, texts, labelled = sizes.for_split(self.split)
        if self.split == "train":
            self._described("video", *_groups(self.source.training_clips(clips)))
            self._described("image", *_groups(self.source.training_images(images)))
        else:
            self._described("video", self.source.testing_clips(clips))
            self._described("image", self.source.testing_images(images))
        if self.split in ("test", "combos"):
            self._galleries("video", [self.source.clip_gallery() for _ in range(sizes.galleries)])
            self._galleries("image", [self.source.image_gallery() for _ in range(sizes.galleries)])
        if self.split != "combos":
            self._shown("text_only", tasks.text_only(self.source, texts))
        for task in TASKS:
            make = getattr(tasks, task, None)  # captions, questions and retrieval are written above
            if make is not None:
                self._shown(task, make(self.source, labelled))

    def _described(self, modality: str, scenes: list[Scene], groups: Sequence[dict] = ()) -> None:
        """Captions of the scenes and questions about them; outside the test splits, also retrieval among them.
        `groups`: the `batch_group` of each scene, for training."""
        paths = [{modality: path} for path in self._media(modality, scenes)]
        captions = _merged(paths, tasks.caption_records(scenes))
        if groups:
            captions = _merged(captions, groups)
        self._records(f"{modality}_caption", captions)
        self._records(f"{modality}_qa", _merged(paths, tasks.question_records(scenes, self.rng, self.split == "train")))
        if self.split in ("train", "val"):
            self._records(f"{modality}_retrieval", captions)

    def _galleries(self, modality: str, galleries: list[list[Scene]]) -> None:
        records = []
        for i, scenes in enumerate(galleries):
            paths = self._media(f"{modality}-gallery{i}", scenes)
            records += _merged([{modality: path, "gallery": str(i)} for path in paths], tasks.caption_records(scenes))
        self._records(f"{modality}_retrieval", records)

    def _shown(self, task: str, shown: list[tasks.Shown]) -> None:
        """Records with their own media: one image or clip, two images, or none."""
        paths = iter(self._media(task, [scene for _, scenes in shown for scene in scenes]))
        records = []
        for record, scenes in shown:
            own = [next(paths) for _ in scenes]
            media = {} if not own else {"images": own} if len(own) == 2 else {TASKS[task].modality: own[0]}
            records.append(media | record)
        self._records(task, records)

    def _media(self, name: str, scenes: Sequence[Scene]) -> list[str]:
        """Draw the scenes into files named after `name`. Returns their paths, relative to the root."""
        ink = self.strokes[[thing.stroke for scene in scenes for thing in scene.things]]
        if self.split == "train" and len(ink):  # 1,140 digits are too few: a model would learn them by heart
            ink = np.concatenate([vary(some, self.hand) for some in np.array_split(ink, 1 + len(ink) // 1000)])
        (self.root / "media" / self.split).mkdir(parents=True, exist_ok=True)
        paths, start = [], 0
        for i, scene in enumerate(scenes):
            stop = start + len(scene.things)
            frames = render(scene, ink[start:stop])
            start = stop
            if name.startswith("video"):
                data, suffix = gif(frames), "gif"
            else:
                data, suffix = png(frames[0]), "png"
            paths.append(f"media/{self.split}/{name}-{i:05d}.{suffix}")
            (self.root / paths[-1]).write_bytes(data)
        return paths

    def _records(self, task: str, records: Sequence[dict]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.root / f"{task}.{self.split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def _groups(groups: Sequence[tuple[Scene, ...]]) -> tuple[list[Scene], list[dict]]:
    """The scenes of all groups, and for each of them the field of its record that names its group, if it has others."""
    return [scene for group in groups for scene in group], [
        {"batch_group": str(number)} if len(group) > 1 else {} for number, group in enumerate(groups) for _ in group]


def _merged(ones: Sequence[dict], others: Sequence[dict]) -> list[dict]:
    return [one | other for one, other in zip(ones, others, strict=True)]


def png(frame: np.ndarray) -> bytes:
    """Encode palette indices (h, w) as a PNG of `PALETTE[frame]`."""
    file = BytesIO()
    Image.fromarray(PALETTE[frame]).save(file, "PNG")
    return file.getvalue()


def gif(frames: np.ndarray) -> bytes:
    """Encode palette indices (t, h, w), with h * w a multiple of 64, as a GIF that repeats forever.

    It decodes to exactly `PALETTE[frames]`, in t frames. Storing the pixels without compression is much faster, and the
    file is still a valid GIF: of the 8-bit codes, 0 to 127 are the palette, 128 clears the decoder's dictionary, and
    129 ends the data. The dictionary is cleared before every 64 pixels, so that every code stays one byte long.
    """
    t, h, w = frames.shape
    codes = np.full((t, h * w // 64, 65), 128, np.uint8)
    codes[:, :, 1:] = frames.reshape(t, -1, 64)
    palette = PALETTE.tobytes().ljust(3 * 128, b"\0")
    parts = [b"GIF89a", struct.pack("<HHBBB", w, h, 0xF6, 0, 0), palette]  # 0xF6: a palette of 128 colors follows
    parts.append(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # repeat forever
    for frame in codes:
        parts.append(struct.pack("<3sBHBB", b"!\xf9\x04", 0, FRAME_MILLISECONDS // 10, 0, 0))
        parts.append(struct.pack("<sHHHHBB", b",", 0, 0, w, h, 0, 7))  # 7: colors have 7 bits, codes 8
        stream = frame.tobytes() + b"\x81"
        for start in range(0, len(stream), 255):
            block = stream[start: start + 255]
            parts += (bytes([len(block)]), block)
        parts.append(b"\0")
    return b"".join(parts) + b";"


def write(out: Path | str, seed: int = 0, sizes: Sizes = Sizes()) -> Path:
    """Write the world into the new folder `out`, and return that folder. Equal seeds and sizes give equal bytes.

    The files are written to a temporary folder, which is renamed to `out` when it is complete.
    Raises FileExistsError if `out` exists and is not an empty folder.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; remove it or choose another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        rng = np.random.default_rng(seed)
        strokes, labels = load_digits()
        for split, split_rng in zip(SPLITS, rng.spawn(len(SPLITS))):  # so that no split depends on another one
            SplitWriter(aside, split, strokes, labels, split_rng).write(sizes)
        for task, by_class in tasks.class_captions().items():
            (aside / f"{task}.captions.json").write_text(json.dumps(by_class, indent=2) + "\n", encoding="utf-8")
        (aside / "about.json").write_text(json.dumps(about(seed, sizes), indent=2) + "\n", encoding="utf-8")
        os.rename(aside, out)
    except BaseException:
        shutil.rmtree(aside)
        raise
    return out


def about(seed: int, sizes: Sizes) -> dict:
    """The contents of `about.json`: what was written, and what is kept apart."""
    return {
        "name": NAME,
        "version": VERSION,
        "seed": seed,
        "sizes": asdict(sizes),
        "image_size": IMAGE_SIZE,
        "frames": FRAMES,
        "colors": COLORS,
        "strokes": STROKES,
        "held_out": {
            axis: [f"{c} {d}" for d in range(len(DIGITS)) for c in COLORS if held_out(axis, d, c)] for axis in AXES
        },
    }


def ensure(root: Path | str | None = None, seed: int = 0) -> Path:
    """The folder of the default world, which is written first if it does not exist.

    `root` is that folder. By default it is `tiny-v6-seed0` (named after the version and the seed) in the cache folder:
    MPLUG2_CACHE, else mplug2 in XDG_CACHE_HOME, else ~/.cache/mplug2. Several processes may call this at once: the
    first one to finish provides the folder.
    Raises ValueError if `root` has the world of another version or seed, and FileExistsError if it has something else.
    """
    root = _cache() / f"tiny-v{VERSION}-seed{seed}" if root is None else Path(root)
    if not (root / "about.json").exists():
        try:
            return write(root, seed)
        except OSError:
            if not (root / "about.json").exists():  # otherwise another process was faster
                raise
    found = json.loads((root / "about.json").read_text(encoding="utf-8"))
    for key, expected in (("name", NAME), ("version", VERSION), ("seed", seed)):
        if found.get(key) != expected:
            raise ValueError(
                f"{root}/about.json: {key} is {found.get(key)!r}, expected {expected!r}; remove the folder"
            )
    return root


def _cache() -> Path:
    if "MPLUG2_CACHE" in os.environ:
        return Path(os.environ["MPLUG2_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mplug2"
