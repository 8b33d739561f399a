"""Emoji: a small, free, real data set of images and videos with names.

    python -m tiny_data.emoji --out data/emoji

This fetches six packages with the `npm` client (about 800 MB) and writes a folder of about 160 MB:

    emoji-datasource-google@16              3,786 images of 64 x 64 pixels                 drawings: Apache-2.0 (Noto)
    emojibase-data@17                       names, keywords and groups                     MIT
    @lobehub/fluent-emoji-anim-1 ... -4     2,109 animations, most of them 72 frames       MIT

A concept is an emoji regardless of skin tone, gender and direction: "woman running: dark skin tone" and "man running"
are one concept. Splits are by concept, so training sees no skin tone or gender of a test concept. All flags are in
training, because nobody can read the name of an unknown country off its flag. Validation and test have no skin tones.

Videos are stored with 64 x 64 pixels and 16 frames, which decode in milliseconds. `test_still` has the test videos with
one frame held; `test_shuffled` has their four quarters in another order. With `--frames 4`, the shuffled videos have
the same four frames as the originals.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from mplug2.flags import one_line_errors, parse

IMAGE_PACKAGE, NAME_PACKAGE = "emoji-datasource-google", "emojibase-data"
CLIP_PACKAGES = tuple(f"@lobehub/fluent-emoji-anim-{part}" for part in (1, 2, 3, 4))
VERSIONS = {IMAGE_PACKAGE: "16", NAME_PACKAGE: "17", **{name: "1" for name in CLIP_PACKAGES}}

TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
IGNORED = {"FE0F", "200D", "2640", "2642", "27A1", *TONES}  # emoji style, joiner, female, male, facing right, tones
PERSON = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man, woman -> person
SIZE, FRAMES = 64, 16
SHARES = {"test": 0.15, "val": 0.05}
QUESTION = "which group is it from"


@dataclass(frozen=True)
class Emoji:
    """One emoji, and what the packages say about it."""

    code: str
    """Code points in hexadecimal, joined by dashes, without the mark FE0F for emoji style."""
    name: str
    keywords: tuple[str, ...]
    group: str

    @property
    def concept(self) -> str:
        return "-".join(PERSON.get(point, point) for point in self.code.split("-") if point not in IGNORED)

    @property
    def toned(self) -> bool:
        return bool(TONES & set(self.code.split("-")))

    @property
    def split(self) -> str | None:
        """The split of the concept, drawn by a hash. None for a skin tone of a held-out concept."""
        if self.group == "flags":
            return "train"
        draw = int.from_bytes(hashlib.blake2b(self.concept.encode(), digest_size=8).digest(), "big") / 2**64
        for split, share in SHARES.items():
            if draw < share:
                return None if self.toned else split
            draw -= share
        return "train"

    @property
    def captions(self) -> list[str]:
        """The name alone, and the name followed by two keywords."""
        pairs = [self.keywords[first: first + 2] for first in range(0, min(len(self.keywords), 6), 2)]
        return [self.name, *(f"{self.name}, {', '.join(pair)}" for pair in pairs)]


@dataclass(frozen=True)
class EmojiSettings:
    out: str = ""
    """Output folder, which must be new or empty."""
    packages: str = ""
    """Folder with the packages (*.tgz), if they were fetched before."""

    def __post_init__(self):
        if not self.out:
            raise ValueError("no output folder: name a new one with --out")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(EmojiSettings, __doc__, "python -m tiny_data.emoji", arguments)
    out = Path(settings.out)
    with one_line_errors("python -m tiny_data.emoji"), tempfile.TemporaryDirectory() as folder:
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} is not empty; choose a new folder")
        counts = write(Path(settings.packages) if settings.packages else fetch(Path(folder)), out)
    for (task, split), count in sorted(counts.items()):
        print(f"{task}.{split}: {count:,}")


def fetch(folder: Path) -> Path:
    """Fetch the packages into `folder` with `npm pack`, which verifies their digests.

    Raises ValueError if there is no `npm`, or with the message of `npm` if it fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("the command `npm` was not found; install Node.js, or fetch these packages elsewhere with "
                         "`npm pack` and give their folder with --packages: "
                         + " ".join(f"{name}@{version}" for name, version in VERSIONS.items()))
    for name, version in VERSIONS.items():
        print(f"fetching {name}@{version}", flush=True)
        command = [npm, "pack", "--silent", f"{name}@{version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"npm pack {name}@{version} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return folder


def open_package(packages: Path, name: str) -> tarfile.TarFile:
    """The archive of a package. Raises ValueError if it is missing or damaged, or has another name or version."""
    pattern = f"{name.strip('@').replace('/', '-')}-{VERSIONS[name]}.*.tgz"
    found = sorted(packages.glob(pattern))
    if not found:
        raise ValueError(f"{packages} has no {pattern}; fetch it with `npm pack {name}@{VERSIONS[name]}`")
    try:
        archive = tarfile.open(found[-1])
        about = json.load(archive.extractfile("package/package.json"))
    except (tarfile.TarError, KeyError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{found[-1]} is not a complete package ({error}); fetch it again") from error
    package, version = about.get("name"), about.get("version", "")
    if package != name or version.split(".")[0] != VERSIONS[name]:
        raise ValueError(f"{found[-1]} is {package} {version}, expected {name} {VERSIONS[name]}; fetch it again")
    return archive


def read_names(packages: Path) -> dict[str, Emoji]:
    """All emoji by their code."""
    with open_package(packages, NAME_PACKAGE) as archive:
        entries = json.load(archive.extractfile("package/en/data.json"))
        messages = json.load(archive.extractfile("package/en/messages.json"))
    groups = {group["order"]: group["message"].replace("&", "and") for group in messages["groups"]}
    found = {}
    for entry in entries:
        if "group" not in entry:  # the 26 letters that flags are composed of
            continue
        for form in (entry, *entry.get("skins", ())):
            code = plain(form["hexcode"])
            found[code] = Emoji(code, form["label"], tuple(entry.get("tags", ())), groups[entry["group"]])
    return found


def plain(code: str) -> str:
    """A code without the mark for emoji style, which the packages use differently."""
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def write(packages: Path, out: Path) -> Counter[tuple[str, str]]:
    """Write images, videos and JSONL files. Returns the number of records by task and split."""
    names = read_names(packages)
    out.mkdir(parents=True, exist_ok=True)
    records: dict[tuple[str, str], list[dict]] = {}
    unknown = []
    for folder in ("images", "clips", "clips_still", "clips_shuffled"):
        (out / folder).mkdir(exist_ok=True)
    for code, content in images(packages):
        emoji = names.get(code)
        if emoji is None:
            unknown.append(code)
        elif emoji.split:
            (out / "images" / f"{code}.png").write_bytes(content)
            add(records, "image", emoji, emoji.split, f"images/{code}.png")
    for code, content in clips(packages):
        emoji = names.get(code)
        if emoji is None:
            unknown.append(code)
        elif emoji.split and (frames := read_frames(content, code)) is not None:
            save_clip(frames, out / "clips" / f"{code}.webp")
            add(records, "video", emoji, emoji.split, f"clips/{code}.webp")
            if emoji.split == "test":
                for name, changed in (("still", still(frames)), ("shuffled", shuffled(frames, code))):
                    save_clip(changed, out / f"clips_{name}" / f"{code}.webp")
                    add(records, "video", emoji, f"test_{name}", f"clips_{name}/{code}.webp")
    check_counts(records, unknown)
    for (task, split), lines in records.items():
        (out / f"{task}.{split}.jsonl").write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    return Counter({part: len(lines) for part, lines in records.items()})


def check_counts(records: dict[tuple[str, str], list[dict]], unknown: list[str]) -> None:
    """Raise ValueError if the packages have far fewer emoji than the versions that this file was written for."""
    for modality, least in (("image", 3000), ("video", 1500)):
        count = sum(len(lines) for (task, split), lines in records.items()
                    if task == f"{modality}_caption" and split in ("train", "val", "test"))
        if count < least:
            raise ValueError(f"only {count} emoji have a name and {modality} data, expected at least {least} "
                             f"({len(unknown)} have no name, such as {', '.join(unknown[:5])}); "
                             "fetch the packages again")


def add(records: dict, modality: str, emoji: Emoji, split: str, path: str) -> None:
    """Append the records of one file, for every task."""
    shared = {modality: path, "id": f"{modality}-{emoji.code}", "positive_id": emoji.code}
    lines = {
        "caption": {"captions": emoji.captions},
        "qa": {"qa": [{"question": QUESTION, "answers": [emoji.group], "kind": "group"}]},
        "retrieval": {"captions": emoji.captions},
        "classification": {"label": emoji.group},
    }
    for task, fields in lines.items():
        records.setdefault((f"{modality}_{task}", split), []).append({**shared, **fields})


def images(packages: Path):
    """(code, PNG) of each image, skin tones included."""
    with open_package(packages, IMAGE_PACKAGE) as archive:
        codes = {}
        for entry in json.load(archive.extractfile("package/emoji.json")):
            for form in (entry, *entry.get("skin_variations", {}).values()):
                codes[form["image"]] = plain(form["unified"])
        for member in archive:
            path, _, name = member.name.rpartition("/")
            if path == "package/img/google/64" and name in codes:
                yield codes[name], archive.extractfile(member).read()


def clips(packages: Path):
    """(code, WebP) of each animation. Some of them are still images."""
    for name in CLIP_PACKAGES:
        with open_package(packages, name) as archive:
            for member in archive:
                path, _, file = member.name.rpartition("/")
                if path == "package/assets" and file.endswith(".webp"):
                    yield plain(file.removesuffix(".webp")), archive.extractfile(member).read()


def read_frames(content: bytes, code: str) -> np.ndarray | None:
    """FRAMES evenly spaced frames on white: uint8 (t, SIZE, SIZE, 3). None for a still image."""
    try:
        with Image.open(BytesIO(content), formats=["WEBP"]) as image:
            total = getattr(image, "n_frames", 1)
            if total == 1:
                return None
            frames = []
            for number in range(FRAMES):
                image.seek(number * total // FRAMES)
                layer = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                frames.append(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
    except OSError as error:
        raise ValueError(f"the animation of {code} cannot be decoded ({error}); fetch the packages again") from error
    return np.stack([np.asarray(frame) for frame in frames])


def still(frames: np.ndarray) -> np.ndarray:
    """A clip that holds one of its frames."""
    return np.repeat(frames[5:6], FRAMES, axis=0)


def shuffled(frames: np.ndarray, code: str) -> np.ndarray:
    """The quarters of a clip in another order, neither the original nor its reverse; the code is the seed."""
    rng = np.random.default_rng(list(code.encode()))
    while True:
        order = rng.permutation(4)
        if order.tolist() not in ([0, 1, 2, 3], [3, 2, 1, 0]):
            return frames.reshape(4, FRAMES // 4, *frames.shape[1:])[order].reshape(frames.shape)


def save_clip(frames: np.ndarray, path: Path) -> None:
    """Write uint8 (t, h, w, 3) as a lossless WebP of exactly t frames."""
    frames = frames.copy()
    # The encoder merges equal frames. One pixel in the corner makes neighbors differ, by one level of 255.
    frames[::2, -1, -1] = frames[::2, -1, -1] // 2 * 2
    frames[1::2, -1, -1] = frames[1::2, -1, -1] // 2 * 2 + 1
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=1000 // 8, lossless=True, quality=0, method=0)


if __name__ == "__main__":
    main()
