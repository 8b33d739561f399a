"""What the adapters share: annotations that know where they stand, readers of the published formats, and the files of a
download, found wherever in it they lie."""

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

from mplug2.data.media import ANIMATION_SUFFIXES, STILL_SUFFIXES, VIDEO_SUFFIXES
from mplug2.data.records import RecordError

SUFFIXES = {"image": STILL_SUFFIXES + ANIMATION_SUFFIXES, "video": VIDEO_SUFFIXES + ANIMATION_SUFFIXES}


def fail(source: str, expected: str, found: Any) -> NoReturn:
    raise RecordError(f"{source}: expected {expected}; found {reprlib.repr(found)}")


@dataclass(frozen=True)
class ParsedRecord:
    """One of our records, made from a published annotation."""

    task: str
    split: str
    source: str
    """The file and line, or file and entry, that it comes from."""
    fields: dict[str, Any]
    """Fields of `records.RECORD_FIELDS`; media as paths relative to the download."""


class Annotation:
    """One annotation, an object of a JSON file or a row of a table. Its methods raise RecordError, with its place, for
    a field that is missing or not what they expect."""

    def __init__(self, source: str, values: Any):
        if not isinstance(values, dict):
            fail(source, "an object with named fields", values)
        self.source, self.values = source, values

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise RecordError(f"{self.source}: field {name!r} is missing; there are {', '.join(map(str, self.values))}")
        return self.values[name]

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            fail(f"{self.source}: {name}", "a text that is not empty", value)
        return value.strip()

    def texts(self, name: str) -> list[str]:
        """One or more of them; a single string is a list of one."""
        value = self.get(name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not values:
            fail(f"{self.source}: {name}", "one or more texts", value)
        return [Annotation(f"{self.source}: {name}[{k}]", {"text": text}).text("text") for k, text in enumerate(values)]

    def key(self, name: str) -> str:
        """A string or an integer that names something."""
        value = self.get(name)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.text(name)

    def number(self, name: str) -> float:
        value = self.get(name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            fail(f"{self.source}: {name}", "a number", value)
        return number

    def choice(self, name: str, choices: dict[str, str]) -> str:
        """What `choices` has for the value of a field: a split, or a class."""
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
        """The entry of another list that a field refers to."""
        key = self.key(name)
        if key not in table:
            fail(f"{self.source}: {name}", what, key)
        return table[key]


# ---- readers ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a JSON file. RecordError names the line at which it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{error.lineno}: expected JSON, {error.msg}; fetch the file again") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: expected JSON in UTF-8: {error}; fetch the file again") from error


def json_object(path: Path) -> Annotation:
    return Annotation(str(path), read_json(path))


def json_list(path: Path) -> list[Annotation]:
    return Annotation(str(path), {"entry": read_json(path)}).items("entry")


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line of a text file, with its end."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RecordError(f"{path}:{number}: expected text in UTF-8: {error}; fetch the file again") from error


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank, without the blanks around it."""
    return ((source, line.strip()) for source, line in numbered_lines(path) if line.strip())


def json_lines(path: Path) -> Iterator[Annotation]:
    for source, line in text_lines(path):
        try:
            yield Annotation(source, json.loads(line))
        except json.JSONDecodeError as error:
            raise RecordError(f"{source}: expected a JSON object, {error.msg}") from error


def table(
    path: Path, delimiter: str, columns: list[str] | None = None, quoted: bool = True, faulty: list[str] | None = None
) -> Iterator[Annotation]:
    """Rows of a CSV or TSV file, whose first line names the columns unless `columns` does. Every row must have as many
    cells. `quoted`: cells may stand in quotes, as in CSV; in most TSV files a quote is a quote. `faulty`: where
    to note rows of another number of cells, for a file that is known to have some, in place of an error."""
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
        raise RecordError(f"{path}:{rows.line_num}: expected a table: {error}; fetch the file again") from error


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise RecordError(f"it holds {module}.{name}, where lists, dictionaries, strings and numbers are expected")


def pickle_list(path: Path) -> list[Annotation]:
    """A list of objects in a pickle, of which nothing is run: anything but plain data is refused."""
    try:
        with path.open("rb") as file:
            content = _Plain(file, encoding="latin1").load()  # RefCOCO's were written by Python 2
    except (RecordError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}; fetch it again from its publisher") from error
    return Annotation(str(path), {"entry": content}).items("entry")


# ---- the files of a download -----------------------------------------------------------------------------------------


@dataclass
class Files:
    """All files below `root`, listed once; media are found by name, whatever folders they were put in."""

    root: Path
    missing: set[str] = field(default_factory=set)
    """Media that annotations name and the download lacks."""
    faulty: list[str] = field(default_factory=list)
    """Rows that are at fault in the publisher's own file, and left out: their places."""

    def __post_init__(self):
        self.root = Path(os.path.abspath(self.root))
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder; expected that of the download")
        self._names: dict[str, list[str]] = {}
        self._media: dict[str, list[str]] = {}
        seen = set()
        for folder, folders, names in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link back to where we come from
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            for name in sorted(names):
                path = os.path.relpath(os.path.join(folder, name), self.root)
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES["image"] + SUFFIXES["video"]:
                    self._media.setdefault(stem, []).append(path)
                else:
                    self._names.setdefault(name, []).append(path)

    def annotation(self, *names: str) -> Path:
        """The first of these annotation files that is there. Raises FileNotFoundError with the names if none is."""
        if (path := self.optional(*names)) is None:
            raise FileNotFoundError(f"{self.root}: no annotation file {' or '.join(names)} there or in a folder below; "
                                    "unpack the published annotations into it")
        return path

    def optional(self, *names: str) -> Path | None:
        for name in names:
            if (self.root / name).is_file():
                return self.root / name
            found = [path for path in self._names.get(os.path.basename(name), []) if f"/{path}".endswith(f"/{name}")]
            if len(found) > 1:
                raise RecordError(f"{self.root}: {name} is there more than once, as {' and '.join(found[:3])}; "
                                  "name the folder of one of them as the download")
            if found:
                return self.root / found[0]
        return None

    def media(self, kind: str, name: str) -> str:
        """The path, relative to the download, of the picture or clip that is called `name`, with a suffix, with another
        one, or with none. One that is not there goes to `missing`, and gets the path that would do."""
        stem, suffix = os.path.splitext(os.path.basename(name))
        if suffix.lower() not in SUFFIXES["image"] + SUFFIXES["video"]:
            stem, suffix = os.path.basename(name), ""
        found = [path for path in self._media.get(stem, []) if path.lower().endswith(SUFFIXES[kind])]
        for rule in (lambda path: path == name, lambda path: path.endswith(f"/{name}"),
                     lambda path: f"/{os.path.dirname(name)}/" in f"/{path}",
                     lambda path: os.path.basename(path) == os.path.basename(name)):
            found = [path for path in found if rule(path)] or found
        if len(found) > 1:
            raise RecordError(f"{self.root}: {name} is there more than once, as {' and '.join(found[:3])}; keep one")
        if not found:
            path = name if suffix else name + (".jpg" if kind == "image" else ".mp4")
            self.missing.add(path)
            return path
        return found[0]

    def pictures(self, folder: str) -> Iterator[str]:
        """The pictures below a folder of the download, by path."""
        below = (path for paths in self._media.values() for path in paths if path.startswith(f"{folder}/"))
        return iter(sorted(path for path in below if path.lower().endswith(SUFFIXES["image"])))
