"""Records: the JSONL format of a data set, one JSON object per line.

A data set is a folder with one file per task and split, `<task>.<split>.jsonl`, such as `video_caption.train.jsonl`,
and the images and videos that the lines name, relative to that folder:

    {"video": "clips/0001.gif", "captions": ["a red three moves left", "a three, red, goes to the left"]}

`mplug2.tasks` lists the fields that each task requires; any line may also have the fields in `OPTIONAL_FIELDS` of
`record_fields.py`.

Reading is strict: a field that is missing, misspelled or of the wrong type is an error that names the file, the line
and the field. The media are not opened here: an image that does not exist is reported when it is decoded.
"""

import functools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mplug2.data.record_fields import (
    PLAIN,
    Question,
    RecordError,
    field_parsers,
    has_gallery,
    listing,
    parse_fields,
    short,
)
from mplug2.did_you_mean import did_you_mean
from mplug2.tasks import RECORD_FIELDS, parse_tasks

FILE_NAME = re.compile(r"([a-z_]+)\.([A-Za-z0-9_-]+)\.jsonl")
DECODE = json.JSONDecoder().raw_decode  # half the time of json.loads: no blanks before or after the object
LISTED = 20  # problems that an error message lists before it counts the rest


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
    batch_group: str | None = None
    """Records with equal values meet in a batch; see `OPTIONAL_FIELDS`."""
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
        self.parsers = {unlabelled: field_parsers(root, task, unlabelled) for unlabelled in (False, True)}
        self.required = frozenset(RECORD_FIELDS[task])
        self.shapes: dict[tuple[str, ...], list[Callable[[Any], bool]]] = {}
        """The checks of ordinary lines, by the names of their fields, in order."""
        self.numbers: np.ndarray | None = None
        """Line numbers, from 1, if the file has blank lines."""
        self.unlabelled: int | None = None
        """Index of the first unlabelled record."""
        self._file = None
        self._scan()

    def _scan(self) -> None:
        """Check every line, and note its position, its media file, its batch group and its id."""
        offsets, numbers, media, groups, ids, owners = (array("q") for _ in range(6))
        grouped = False
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
                    group = fields.batch_group
                    if fields.unlabelled and self.unlabelled is None:
                        self.unlabelled = len(offsets)
                else:
                    record_id, name = fields.get("id"), fields.get("video") or fields.get("image")
                    group = fields.get("batch_group")
                if record_id is not None:
                    ids.append(hash(record_id))
                    owners.append(len(offsets))
                    if record_id.startswith(f"{self.path.name}:"):
                        like_defaults.append(record_id)
                offsets.append(start)
                numbers.append(number)
                media.append(hash(name or (self.path, number)))
                groups.append(hash(group) if group else media[-1])
                grouped |= group is not None
        self.offsets = np.append(np.frombuffer(offsets, np.int64), offset)
        if len(numbers) and numbers[-1] != len(numbers):
            self.numbers = np.frombuffer(numbers, np.int64)
        self.media_hashes = np.frombuffer(media, np.int64)
        self.group_hashes = np.frombuffer(groups, np.int64) if grouped else None
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
                problems.append((number, f"{record.source}: id: found {short(record.id)}; expected {expected}"))
        return problems

    def _number(self, index: int) -> int:
        return index + 1 if self.numbers is None else int(self.numbers[index])

    def _plain(self, line: bytes) -> dict | None:
        """The fields of an ordinary line, which needs no further check; None for a line that needs one."""
        try:
            fields, end = DECODE(text := line.decode())
        except (ValueError, RecursionError):
            return None
        if type(fields) is not dict or text[end:] not in ("\n", "", "\r\n"):
            return None
        if (checks := self.shapes.get(names := tuple(fields))) is None:
            optional = {"id", "positive_id", "batch_group"}
            if not self.required <= fields.keys() <= (self.required | optional) & PLAIN.keys():
                return None
            checks = self.shapes[names] = [PLAIN[name] for name in names]
        return fields if all([check(value) for check, value in zip(checks, fields.values())]) else None

    def _parse(self, number: int, line: bytes) -> Record:
        source, default_id = f"{self.path}:{number}", f"{self.path.name}:{number}"
        return Record(source=source, **parse_fields(source, default_id, line, self.task, self.parsers))

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
            fields, _ = DECODE(line.decode().lstrip("\ufeff \t\r\n"))
            texts = fields.get("captions") or fields.get("texts") or ([fields["text"]] if "text" in fields else [])
            questions = fields.get("qa", ())
            yield (index, texts + [question["question"] for question in questions],
                   [answer for question in questions for answer in question.get("answers", ())])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}  # a process that gets a copy opens the file itself


def read_records(root: Path | str, task: str, split: str) -> Records:
    """Read the records of `root/<task>.<split>.jsonl`, in the order of the file. Blank lines are skipped.

    Raises RecordError, which lists all lines that are not records of the task, or for a file without records;
    ValueError for an unknown task; FileNotFoundError, which lists the existing files, for a missing file.
    """
    if task not in RECORD_FIELDS:
        hint = did_you_mean(task, RECORD_FIELDS)
        raise ValueError(f"unknown task {task!r}{hint}; the tasks are {listing(RECORD_FIELDS)}")
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
            f"the tasks are {listing(RECORD_FIELDS)}"
        )
    return found


def held_out_media(roots: Iterable[Path], task: str) -> str:
    """One line, if media that these folders train on are also in another split of one of them; otherwise empty. It
    happens where data sets divide the same images differently, such as RefCOCO and RefCOCOg."""
    folder = functools.cache(os.path.realpath)  # of links to the same download

    def media(root: Path, name: str, split: str) -> set[tuple[str, str]]:
        return {(folder(path.parent), path.name) for record in read_records(root, name, split)
                for path in (record.image, record.video, *record.images) if path}

    files = [(root, name, split) for root in roots for name, splits in available(root).items()
             if name in parse_tasks(task) for split in splits]
    trained = set().union(*(media(*file) for file in files if file[2] == "train"))
    shared = [(len(trained & media(*file)), file) for file in files if file[2] != "train"]
    found = [f"{count:,} in {root / name}.{split}.jsonl" for count, (root, name, split) in shared if count]
    return f"warning: media to train on are held out elsewhere: {', '.join(found)}; remove them from the training " \
           "files before you report results on these splits" if found else ""
