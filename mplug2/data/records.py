"""Records: the JSONL format of a data set, one JSON object per line.

A data set is a folder with one file per task and split, `<task>.<split>.jsonl`, such as `video_caption.train.jsonl`,
and the images and videos that the lines name, relative to that folder:

    {"video": "clips/0001.gif", "captions": ["a red three moves left", "a three, red, goes to the left"]}

`mplug2.tasks` lists the fields that each task requires; any line may also have the fields in `OPTIONAL_FIELDS`.

Reading is strict: a field that is missing, misspelled or of the wrong type is an error that names the file, the line
and the field. The media are not opened here: an image that does not exist is reported when it is decoded.
"""

import json
import math
import os
import re
import reprlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mplug2.did_you_mean import did_you_mean
from mplug2.tasks import RECORD_FIELDS, TASKS

OPTIONAL_FIELDS: tuple[str, ...] = ("id", "positive_id", "unlabelled")
"""Fields that a line of any task may have.

`positive_id`: records with equal values are positives of each other: their texts and media have the same meaning. VTC
and VTM never use them as negatives, and retrieval counts each as a correct answer for the other. The default is the
record's `id`, so that a record is its own only positive. Older files spell this field `meaning`, which is still read.
"""

TRUTH_FIELDS: tuple[str, ...] = ("captions", "label", "box")
"""Fields, in addition to the answers of questions, that a line with `"unlabelled": true` may leave out.

Benchmarks keep the labels of their test sets on a server. Such a record can be predicted, but not trained on or scored.
"""

FILE_NAME = re.compile(r"([a-z_]+)\.([A-Za-z0-9_-]+)\.jsonl")
LISTED = 20  # problems that an error message lists before it counts the rest
BOX_SLACK = 1e-3  # how far a box may reach outside its image, in image sizes: rounding to three digits causes this much


class RecordError(ValueError):
    """A line of a data file is not a valid record. The message names file, line, field, and what was expected."""


@dataclass(frozen=True)
class Question:
    """One question about an image or a video."""

    question: str
    answers: tuple[str, ...]
    """All correct answers; at least one, unless the record is unlabelled. Repeated answers are kept: they are votes."""
    kind: str | None = None
    """The kind of the question ("colour", "order", ...); accuracy is also reported for each kind."""


@dataclass(frozen=True)
class Record:
    """One line of a data file. Fields that its task does not have are None, or () for lists."""

    id: str
    """Unique in its file. The default is "<file name>:<line>", which does not depend on the location of the folder."""
    positive_id: str
    """Records with equal values are positives of each other; see `OPTIONAL_FIELDS`."""
    source: str
    """"<file path>:<line>", for messages."""
    image: Path | None = None
    """Absolute, like all paths of a record."""
    video: Path | None = None
    images: tuple[Path, ...] = ()
    """Two images."""
    captions: tuple[str, ...] = ()
    """Paraphrases of each other; at least one."""
    qa: tuple[Question, ...] = ()
    text: str | None = None
    texts: tuple[str, ...] = ()
    """Two texts."""
    label: str | float | None = None
    """The name of a class, or, for text tasks, a number to predict (regression)."""
    box: tuple[float, float, float, float] | None = None
    """Center x, center y, width and height, as fractions of the image size, from its top left corner."""
    gallery: str | None = None
    """Retrieval ranks the records with the same value against each other. The default is "all"."""
    unlabelled: bool = False
    """Whether the label, captions, box or answers are left out."""


class Records(Sequence[Record]):
    """The records of one file, in its order. A record is parsed when it is used.

    Only the positions of the lines are in memory: 8 bytes per record, in arrays that the workers of a loader share. The
    lines stay in the file, and all ranks share the system's cache of it. Raises RecordError, which lists all lines that
    are not records of the task.
    """

    def __init__(self, root: Path, task: str, path: Path):
        self.root, self.task, self.path = root, task, path
        self.parsers = {unlabelled: _field_parsers(root, task, unlabelled) for unlabelled in (False, True)}
        self.required = frozenset(RECORD_FIELDS[task])
        self.numbers: np.ndarray | None = None
        """Line numbers, from 1, if the file has blank lines."""
        self.unlabelled: int | None = None
        """Index of the first unlabelled record."""
        self._file = None
        self._scan()

    def _scan(self) -> None:
        """Check every line, and note its position, its media file and its id."""
        offsets, numbers, media, ids, owners = (array("q") for _ in range(5))
        problems, like_defaults, offset = [], [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                start, offset = offset, offset + len(line)
                if line.isspace():
                    continue
                try:
                    fields = self._plain(line) or self._parse(number, line)
                except RecordError as error:
                    problems.append((number, str(error)))
                    continue
                if isinstance(fields, Record):
                    record_id = None if fields.id == f"{self.path.name}:{number}" else fields.id
                    name = fields.video or fields.image
                    name = name and str(name)[len(str(self.root)) + 1:]
                    if fields.unlabelled and self.unlabelled is None:
                        self.unlabelled = len(offsets)
                else:
                    record_id, name = fields.get("id"), fields.get("video") or fields.get("image")
                if record_id is not None:
                    ids.append(hash(record_id))
                    owners.append(len(offsets))
                    if record_id.startswith(f"{self.path.name}:"):
                        like_defaults.append(record_id)
                offsets.append(start)
                numbers.append(number)
                media.append(hash(name or (self.path, number)))
        self.offsets = np.append(np.frombuffer(offsets, np.int64), offset)
        if len(numbers) and numbers[-1] != len(numbers):
            self.numbers = np.frombuffer(numbers, np.int64)
        self.media_hashes = np.frombuffer(media, np.int64)
        problems += self._duplicates(np.frombuffer(ids, np.int64), np.frombuffer(owners, np.int64), like_defaults)
        raise_all([message for _, message in sorted(problems)])

    def _duplicates(
        self, hashes: np.ndarray, owners: np.ndarray, like_defaults: list[str]
    ) -> list[tuple[int, str]]:
        """A message for each record whose id an earlier one has. Few records have equal hashes; these are parsed.

        `like_defaults` are ids that may also be the default id of a record without one.
        """
        if like_defaults:
            owners, hashes = np.arange(len(self)), np.array([hash(record.id) for record in self])
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        first: dict[str, int] = {}
        problems = []
        for index in owners[counts[inverse] > 1].tolist():
            record = self[index]
            number = self._number(index)
            if first.setdefault(record.id, number) != number:
                expected = f"a unique id, but line {first[record.id]} has it too"
                problems.append((number, f"{record.source}: id: found {_short(record.id)}; expected {expected}"))
        return problems

    def _number(self, index: int) -> int:
        return index + 1 if self.numbers is None else int(self.numbers[index])

    def _plain(self, line: bytes) -> dict | None:
        """The fields of an ordinary line, which needs no further check; None for a line that needs one."""
        try:
            fields = json.loads(line.decode())
        except (ValueError, RecursionError):
            return None
        if type(fields) is not dict or not self.required <= fields.keys() or not fields.keys() <= PLAIN.keys():
            return None
        if len(fields) > len(self.required) and not fields.keys() - self.required <= {"id", "positive_id"}:
            return None
        return fields if all([PLAIN[name](value) for name, value in fields.items()]) else None

    def _parse(self, number: int, line: bytes) -> Record:
        return _parse_line(f"{self.path}:{number}", f"{self.path.name}:{number}", line, self.task, self.parsers)

    def _record(self, index: int, line: bytes) -> Record:
        number, line = self._number(index), line.partition(b"\n")[0]  # without blank lines that follow
        if (fields := self._plain(line)) is None:
            try:
                return self._parse(number, line)
            except RecordError as error:
                raise RecordError(f"{self.path} changed while it was in use; start again ({error})") from error
        record_id = fields.pop("id", None) or f"{self.path.name}:{number}"
        fields.setdefault("positive_id", record_id)
        for name in ("image", "video"):
            if name in fields:
                fields[name] = self.root / fields[name]
        if "captions" in fields:
            fields["captions"] = tuple(fields["captions"])
        if "qa" in fields:
            fields["qa"] = tuple(
                Question(q["question"], tuple(q["answers"]), q.get("kind")) for q in fields["qa"])
        if has_gallery(self.task):
            fields["gallery"] = "all"
        return Record(id=record_id, source=f"{self.path}:{number}", **fields)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        start, stop = self.offsets[index: index + 2].tolist()
        return self._record(index, os.pread(self._file.fileno(), stop - start, start))

    def __iter__(self) -> Iterator[Record]:
        return (self._record(index, line) for index, line in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[0]) if len(self) else 0)
            for index, size in enumerate(np.diff(self.offsets).tolist()):
                yield index, file.read(size)

    def texts(self) -> Iterator[tuple[int, list[str], list[str]]]:
        """(index, texts, answers) of each record, faster than from the records: captions, texts and questions."""
        for index, line in self._lines():
            fields = json.loads(line.decode().removeprefix("\ufeff"))
            texts = fields.get("captions") or fields.get("texts") or ([fields["text"]] if "text" in fields else [])
            questions = fields.get("qa", ())
            yield (index, texts + [question["question"] for question in questions],
                   [answer for question in questions for answer in question.get("answers", ())])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}  # a process that gets a copy opens the file itself


def _plain_text(value: Any) -> bool:
    return type(value) is str and value.isprintable() and value != "" and not value.isspace()


def _plain_path(value: Any) -> bool:
    return _plain_text(value) and value[0] not in "/." and value[-1] != "/" and "//" not in value and "/." not in value


def _plain_captions(value: Any) -> bool:
    return type(value) is list and len(value) > 0 and all([_plain_text(text) for text in value])


def _plain_questions(value: Any) -> bool:
    return type(value) is list and len(value) > 0 and all([
        type(each) is dict and each.keys() <= {"question", "answers", "kind"} and _plain_text(each.get("question"))
        and _plain_captions(each.get("answers")) and _plain_text(each.get("kind", "-")) for each in value])


PLAIN: dict[str, Callable[[Any], bool]] = {
    "id": _plain_text, "positive_id": _plain_text, "image": _plain_path, "video": _plain_path, "text": _plain_text,
    "captions": _plain_captions, "qa": _plain_questions,
}
"""Whether the value of a field is ordinary and surely valid. This is quick; all other values get the full check."""


def read_records(root: Path | str, task: str, split: str) -> Records:
    """Read the records of `root/<task>.<split>.jsonl`, in the order of the file. Blank lines are skipped.

    Raises RecordError, which lists all lines that are not records of the task, or for a file without records;
    ValueError for an unknown task; FileNotFoundError, which lists the existing files, for a missing file.
    """
    if task not in RECORD_FIELDS:
        hint = did_you_mean(task, RECORD_FIELDS)
        raise ValueError(f"unknown task {task!r}{hint}; the tasks are {_listing(RECORD_FIELDS)}")
    root = Path(os.path.abspath(root))
    path = root / f"{task}.{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: no split {split!r} of task {task!r}. The folder has:\n"
            + "\n".join(f"  {t}.{s}.jsonl" for t, splits in available(root).items() for s in splits)
        )
    records = Records(root, task, path)
    if not records:
        raise RecordError(f"{path} is empty: expected one JSON object per line; add lines, or remove the file")
    return records


def raise_all(problems: Sequence[str]) -> None:
    """Raise one RecordError that lists all problems, if there are any; of many, the first `LISTED`."""
    if problems:
        more = f"\nand {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
        raise RecordError("\n".join(problems[:LISTED]) + more)


def available(root: Path | str) -> dict[str, list[str]]:
    """The splits of each task in the folder `root`: tasks in the order of `RECORD_FIELDS`, splits sorted by name.

    Files that are not named `<task>.<split>.jsonl` are ignored. Raises FileNotFoundError if the folder does not exist
    or has no such file.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: expected one with files named <task>.<split>.jsonl")
    matches = [match for match in map(FILE_NAME.fullmatch, sorted(os.listdir(root))) if match]
    splits = {task: [match[2] for match in matches if match[1] == task] for task in RECORD_FIELDS}
    found = {task: names for task, names in splits.items() if names}
    if not found:
        raise FileNotFoundError(
            f"{root} has no data: expected files named <task>.<split>.jsonl, such as video_caption.train.jsonl; "
            f"the tasks are {_listing(RECORD_FIELDS)}"
        )
    return found


def has_gallery(task: str) -> bool:
    """Whether the lines of a task may have a `gallery`: retrieval tasks only."""
    return task in TASKS and TASKS[task].output == "ranking"


def _labels(task: str) -> tuple[tuple[str, ...], bool]:
    """The labels that a task allows (() for any), and whether a label may be a number."""
    return (TASKS[task].labels, TASKS[task].number_labels) if task in TASKS else ((), False)


def _parse_line(
    source: str, default_id: str, line: bytes, task: str, parsers: dict[bool, dict[str, Callable]]
) -> Record:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets nested thousands deep
        raise RecordError(
            f"{source}: found {_short(line.decode(errors='replace'))}; expected one JSON object in UTF-8 ({error})"
        ) from error
    if not isinstance(fields, dict):
        _fail(source, fields, "a JSON object")
    if "meaning" in fields:  # the old spelling of `positive_id`
        fields.setdefault("positive_id", fields.pop("meaning"))
    unlabelled = fields.get("unlabelled") is True
    needed = tuple(name for name in RECORD_FIELDS[task] if not (unlabelled and name in TRUTH_FIELDS))
    _check_names(source, f"task {task!r}", fields, needed, tuple(parsers[unlabelled]))
    values = {name: parsers[unlabelled][name](f"{source}: {name}", value) for name, value in fields.items()}
    record_id = values.setdefault("id", default_id)
    values.setdefault("positive_id", record_id)
    if has_gallery(task):
        values.setdefault("gallery", "all")
    return Record(source=source, **values)


def _field_parsers(root: Path, task: str, unlabelled: bool) -> dict[str, Callable[[str, Any], Any]]:
    """The parser of each field of the task's lines: (place for messages, JSON value) -> value in the record."""
    path = partial(_path, root)
    parsers = {
        "id": _string,
        "positive_id": _string,
        "image": path,
        "video": path,
        "images": partial(_pair, path),
        "captions": partial(_strings, "paraphrases"),
        "qa": partial(_questions, unlabelled),
        "text": _string,
        "texts": partial(_pair, _string),
        "label": partial(_label, *_labels(task)),
        "box": _box,
        "gallery": _string,
        "unlabelled": _true,
    }
    names = OPTIONAL_FIELDS + RECORD_FIELDS[task] + (("gallery",) if has_gallery(task) else ())
    return {name: parsers[name] for name in names}


def _check_names(source: str, owner: str, fields: dict, required: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in fields:
        if name not in known:
            raise RecordError(
                f"{source}: {owner} has no field {name!r}{did_you_mean(name, known)}; its fields are {_listing(known)}"
            )
    for name in required:
        if name not in fields:
            raise RecordError(f"{source}: field {name!r} is missing; {owner} requires {_listing(required)}")


def _string(at: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        _fail(at, value, "a string that is not empty")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        _fail(at, value, "text without lone surrogates (halves of \\u escapes)")
    return value


def _strings(what: str, at: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        _fail(at, value, f"a list of one or more strings ({what})")
    return tuple(_string(f"{at}[{k}]", item) for k, item in enumerate(value))


def _pair(parse: Callable[[str, Any], Any], at: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        _fail(at, value, "a list of two strings")
    return parse(f"{at}[0]", value[0]), parse(f"{at}[1]", value[1])


def _path(root: Path, at: str, value: Any) -> Path:
    name = os.path.normpath(_string(at, value))
    if os.path.isabs(name) or name.split(os.sep)[0] in ("..", "."):
        _fail(at, value, f"the path of a file inside {root}, relative to that folder")
    return root / name


def _true(at: str, value: Any) -> bool:
    if value is not True:
        _fail(at, value, "true, or no such field")
    return value


def _questions(unlabelled: bool, at: str, value: Any) -> tuple[Question, ...]:
    if not isinstance(value, list) or not value:
        _fail(at, value, 'a list of one or more {"question": ..., "answers": [...]}')
    return tuple(_question(unlabelled, f"{at}[{k}]", item) for k, item in enumerate(value))


def _question(unlabelled: bool, at: str, value: Any) -> Question:
    if not isinstance(value, dict):
        _fail(at, value, 'an object {"question": ..., "answers": [...]}')
    needed = ("question",) if unlabelled else ("question", "answers")
    _check_names(at, "a question", value, needed, ("question", "answers", "kind"))
    return Question(
        question=_string(f"{at}.question", value["question"]),
        answers=_strings("the right answers", f"{at}.answers", value["answers"]) if "answers" in value else (),
        kind=_string(f"{at}.kind", value["kind"]) if "kind" in value else None,
    )


def _label(labels: tuple[str, ...], numbers: bool, at: str, value: Any) -> str | float:
    if labels and value not in labels:
        _fail(at, value, f"one of {_listing(labels)}")
    if numbers and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    return _string(at, value)


def _box(at: str, value: Any) -> tuple[float, float, float, float]:
    numbers = value if isinstance(value, list) and len(value) == 4 else ()
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n <= 1 for n in numbers):
        _fail(at, value, "[center x, center y, width, height], four numbers from 0 to 1")
    cx, cy, width, height = map(float, numbers)
    for center, size in ((cx, width), (cy, height)):
        if size == 0 or center - size / 2 < -BOX_SLACK or center + size / 2 > 1 + BOX_SLACK:
            _fail(at, value, "[center x, center y, width, height] of a box that has an area and lies inside its image")
    return cx, cy, width, height


def _fail(at: str, found: Any, expected: str) -> NoReturn:
    raise RecordError(f"{at}: found {_short(found)}; expected {expected}")


def _short(value: Any) -> str:
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    return shortener.repr(value)


def _listing(names: Any) -> str:
    return ", ".join(names)
