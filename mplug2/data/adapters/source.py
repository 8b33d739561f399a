"""What all adapters share: annotations that know their place in a file, readers of the published formats, and the files
of a download, found by name in any folder."""

import csv
import json
import math
import os
import pickle
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mplug2.data.media import ANIMATION_SUFFIXES, MEDIA_SUFFIXES, STILL_SUFFIXES, VIDEO_SUFFIXES
from mplug2.data.records import RecordError

SUFFIXES = {"image": STILL_SUFFIXES + ANIMATION_SUFFIXES, "video": VIDEO_SUFFIXES + ANIMATION_SUFFIXES}
DEFAULT_SUFFIX = {"image": ".jpg", "video": ".mp4"}
LFS_POINTER = b"version https://git-lfs"


def fail(source: str, expected: str, found: Any) -> NoReturn:
    raise RecordError(f"{source}: found {reprlib.repr(found)}; expected {expected}")


@dataclass(frozen=True)
class ParsedRecord:
    """One of our records, made from a published annotation."""

    task: str
    split: str
    source: str
    """Its file and line, or file and entry, for messages."""
    fields: dict[str, Any]
    """The fields of a `Record`; media are paths relative to the download."""


class Annotation:
    """One annotation: an object of a JSON file or a row of a table.

    Its methods raise RecordError, with the place, for a field that is missing or has an unexpected value.
    """

    def __init__(self, source: str, values: Any):
        if not isinstance(values, dict):
            fail(source, "an object with named fields", values)
        self.source, self.values = source, values

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise RecordError(f"{self.source}: field {name!r} is missing; it has {', '.join(map(str, self.values))}")
        return self.values[name]

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            fail(f"{self.source}: {name}", "a text that is not empty", value)
        return value.strip()

    def texts(self, name: str) -> list[str]:
        """A list of one or more such strings; a single string counts as a list of one."""
        value = self.get(name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not values:
            fail(f"{self.source}: {name}", "one or more texts", value)
        return [Annotation(f"{self.source}: {name}[{k}]", {"text": text}).text("text") for k, text in enumerate(values)]

    def key(self, name: str) -> str:
        """A string or an integer that identifies something, as a string."""
        value = self.get(name)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.text(name)

    def number(self, name: str) -> float:
        """A finite number, or a string that spells one."""
        value = self.get(name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            fail(f"{self.source}: {name}", "a number", value)
        return number

    def choice(self, name: str, choices: dict[str, str]) -> str:
        """The entry of `choices`, splits or classes, for the value of a field."""
        value = self.key(name)
        if value not in choices:
            few = len(choices) <= 12
            fail(f"{self.source}: {name}", f"one of {', '.join(choices) if few else f'{len(choices)} names'}", value)
        return choices[value]

    def items(self, name: str) -> list["Annotation"]:
        """A list of objects."""
        value = self.get(name)
        if not isinstance(value, list):
            fail(f"{self.source}: {name}", "a list", value)
        return [Annotation(f"{self.source}: {name}[{k}]", each) for k, each in enumerate(value)]

    def look_up(self, name: str, table: dict[str, Any], what: str) -> Any:
        """The entry of `table` that a field refers to; `what` describes the expected values."""
        key = self.key(name)
        if key not in table:
            fail(f"{self.source}: {name}", what, key)
        return table[key]


# ---- readers ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a JSON file. RecordError names the line where parsing fails."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{error.lineno}: this is not JSON ({error.msg}); download the file again") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: this is not UTF-8 ({error}); download the file again") from error


def json_object(path: Path) -> Annotation:
    return Annotation(str(path), read_json(path))


def json_list(path: Path) -> list[Annotation]:
    return Annotation(str(path), {"entry": read_json(path)}).items("entry")


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line of a text file; the line includes its line break."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RecordError(f"{path}:{number}: this is not UTF-8 ({error}); download the file again") from error


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank, stripped."""
    return ((source, line.strip()) for source, line in numbered_lines(path) if line.strip())


def json_lines(path: Path) -> Iterator[Annotation]:
    for source, line in text_lines(path):
        try:
            yield Annotation(source, json.loads(line))
        except json.JSONDecodeError as error:
            raise RecordError(f"{source}: this is not a JSON object ({error.msg}); download the file again") from error


def table(
    path: Path, delimiter: str, columns: list[str] | None = None, quoted: bool = True, faulty: list[str] | None = None
) -> Iterator[Annotation]:
    """The rows of a CSV or TSV file. Its first line names the columns, unless `columns` is given.

    quoted: whether cells may be quoted, as in CSV; in most TSV files a quotation mark is text. A row with another
    number of cells is an error. For files that are published with such rows, give a list `faulty`: the rows are skipped
    and listed there.
    """
    for source, row in _quoted_rows(path, delimiter) if quoted else _rows(path, delimiter):
        if columns is None:
            columns = [cell.strip() for cell in row]
        elif len(row) == len(columns):
            yield Annotation(source, dict(zip(columns, row, strict=True)))
        elif faulty is None:
            fail(source, f"{len(columns)} columns ({', '.join(columns)})", row)
        else:
            faulty.append(f"{source}: {len(row)} columns, not {len(columns)}")


def _rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    lines = ((source, line.rstrip("\r\n")) for source, line in numbered_lines(path))
    return ((source, line.split(delimiter)) for source, line in lines if line)


def _quoted_rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(2**30)
    rows = csv.reader((line for _, line in numbered_lines(path)), delimiter=delimiter)
    try:
        yield from ((f"{path}:{rows.line_num}", row) for row in rows if row)
    except csv.Error as error:
        raise RecordError(f"{path}:{rows.line_num}: this is no CSV row ({error}); download the file again") from error


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise RecordError(f"it contains {module}.{name}; expected only lists, dictionaries, strings and numbers")


def pickle_list(path: Path) -> list[Annotation]:
    """A list of objects in a pickle. Anything except plain data is refused, so no code of the file can run."""
    try:
        with path.open("rb") as file:
            content = _Plain(file, encoding="latin1").load()  # RefCOCO's files were written by Python 2
    except (RecordError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}; download it again from its publisher") from error
    return Annotation(str(path), {"entry": content}).items("entry")


# ---- the files of a download -----------------------------------------------------------------------------------------


@dataclass
class Files:
    """The files below `root`, listed once. Media are found by name, in any folder; annotations too."""

    root: Path
    annotations: Path | None = None
    """Another folder with the annotation files, searched before `root`."""
    prefer: str = ""
    """The folder whose file is taken where several have the same name; without it, the shortest path is taken."""
    dataset: str = ""
    """The name of the data set: annotations in a folder with this name are preferred."""
    missing: set[str] = field(default_factory=set)
    """Media that the annotations name but the download does not have."""
    duplicates: dict[str, list[str]] = field(default_factory=dict)
    """Names that several media files have, and the paths of these files; the first one is used."""
    absent: list[str] = field(default_factory=list)
    """Splits without annotations, and the annotation files that were looked for."""
    faulty: list[str] = field(default_factory=list)
    """Places of annotations that are invalid in the published file itself, and are left out."""

    def __post_init__(self):
        self.root = Path(os.path.abspath(self.root))
        self._media: dict[str, list[str]] = {}
        self._bare: dict[str, list[str]] = {}  # media files that a downloader wrote without a suffix
        folders = [self.root]
        if self.annotations is not None:
            self.annotations = Path(os.path.abspath(self.annotations))
            folders.insert(0, self.annotations)
        self._annotations: dict[str, list[Path]] = {}
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not a folder: expected the folder of the download")
            for path in _walk(folder):
                name = os.path.basename(path)
                if folder == self.root and os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES:
                    self._media.setdefault(os.path.splitext(name)[0], []).append(path)
                else:
                    self._annotations.setdefault(name, []).append(folder / path)
                    if folder == self.root and "." not in name:
                        self._bare.setdefault(name, []).append(path)

    # ---- annotations

    def annotation(self, *names: str) -> Path:
        """The first of these annotation files that exists. Raises FileNotFoundError if none does."""
        if (path := self.optional(*names)) is None:
            folders = " and ".join(map(str, filter(None, (self.annotations, self.root))))
            raise FileNotFoundError(f"{folders}: no annotation file {' or '.join(names)}, in no subfolder either; "
                                    "unpack the published annotations there, or name their folder with --annotations")
        return path

    def optional(self, *names: str) -> Path | None:
        """The first of these annotation files that exists, or None.

        Raises RecordError if several have the same name and none is in a folder named like the data set, and for a
        git-lfs pointer.
        """
        for name in names:
            if not (found := self._find(name)):
                continue
            if len({path.resolve() for path in found}) > 1:
                raise RecordError(f"{name} exists more than once: {' and '.join(map(str, found[:3]))}; "
                                  "name the folder of one of them with --annotations")
            with found[0].open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise RecordError(f"{found[0]} is a git-lfs pointer, not the file; fetch it with git lfs pull")
            return found[0]
        return None

    def _find(self, name: str) -> list[Path]:
        """The annotation files of a name; if there are several, those in the folder of the data set, or at the top."""
        found = [path for path in self._annotations.get(os.path.basename(name), []) if str(path).endswith(f"/{name}")]
        top = [folder / name for folder in (self.annotations, self.root) if folder]
        for preferred in (
            [path for path in found if path.parent.name == self.dataset],
            [path for path in found if path.parent.parent.name == self.dataset],
            [path for path in found if path.parent.name == self.dataset.partition("_")[0]],
            [path for path in top if path in found][:1],
        ):
            found = [path for path in found if path in preferred] or found
        return found

    def splits(self, names: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Path]]:
        """(split, annotation file) for the splits whose annotations exist; the others are listed in `absent`.

        `names` has the possible names of the annotation file of each split. Raises FileNotFoundError if there is none.
        """
        found = {split: path for split, files in names.items() if (path := self.optional(*files))}
        if not found:
            self.annotation(*(name for files in names.values() for name in files))
        self.absent += [f"{split} ({' or '.join(files)})" for split, files in names.items() if split not in found]
        yield from found.items()

    # ---- media

    def media(self, kind: str, *names: str, unique: bool = False) -> str:
        """The path, relative to the download, of the image or video with one of these names; its suffix may differ.

        A name that is only a number, such as "train/000000000.jpg", must match together with its folder, unless
        `unique` says that the number identifies the file in the whole data set. A file that does not exist is added to
        `missing`, and the path that it should have is returned.
        """
        for name in names:
            base = os.path.basename(name)
            stem, suffix = os.path.splitext(base)
            for key in dict.fromkeys((base, stem if suffix.lower() in MEDIA_SUFFIXES else base)):
                found = [path for path in self._media.get(key, ()) if path.lower().endswith(SUFFIXES[kind])]
                found = found or self._bare.get(key, [])
                folder = os.path.dirname(name)
                if folder and stem.isdecimal() and not unique:
                    found = [path for path in found if f"/{folder}/" in f"/{path}"]
                if found:
                    return found[0] if len(found) == 1 else self._choose(name, found)
        name = names[0]
        path = name if os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES else name + DEFAULT_SUFFIX[kind]
        self.missing.add(path)
        return path

    def _choose(self, name: str, found: list[str]) -> str:
        """One of several files that match a name: in the preferred folder, at the published path, or with the shortest
        path. They are not duplicates if all are the same file, or if only one is at the published path."""
        published = [path for path in found if f"/{path}".endswith(f"/{name}")] if "/" in name else []
        if self.prefer:
            published = [path for path in found if f"/{self.prefer}/" in f"/{path}"] or published
        found = sorted(published or found, key=lambda path: (
            os.path.basename(path) != os.path.basename(name), path.count("/"), path))
        if len(found) > 1 and len({os.path.realpath(self.root / path) for path in found}) > 1:
            self.duplicates[name] = found
        return found[0]

    def all_media(self, kind: str) -> list[str]:
        """The paths of all images or videos, sorted."""
        paths = (path for paths in self._media.values() for path in paths)
        return sorted(path for path in paths if path.lower().endswith(SUFFIXES[kind]))

    def nearby(self, path: str, suffix: str) -> Path | None:
        """The file with the same name and another suffix, in the same folder as a media file, if there is one."""
        other = Path(os.path.splitext(self.root / path)[0] + suffix)
        return other if other.is_file() else None

    def tars(self) -> list[Path]:
        """The tar files of the download."""
        return sorted(path for paths in self._annotations.values() for path in paths if path.suffix == ".tar")


def _walk(root: Path) -> Iterator[str]:
    """The paths, relative to `root`, of all files below it. Links are followed, each folder is listed once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder that was listed already
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            if not name.startswith("._"):  # what macOS leaves on foreign file systems
                yield os.path.relpath(os.path.join(folder, name), root)
