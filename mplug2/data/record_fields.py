"""The fields of a record: what a JSON value of each may be, and the message for one that is not.

`records.py` reads whole files. Most lines are ordinary: `PLAIN` recognizes them quickly, and only the others are parsed
here field by field.
"""

import json
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from mplug2.did_you_mean import did_you_mean
from mplug2.tasks import RECORD_FIELDS, TASKS

OPTIONAL_FIELDS: tuple[str, ...] = ("id", "positive_id", "batch_group", "unlabelled")
"""Fields that a line of any task may have.

`positive_id`: records with equal values are positives of each other: their texts and media have the same meaning. VTC
and VTM never use them as negatives, and retrieval counts each as a correct answer for the other. The default is the
record's `id`, so that a record is its own only positive. Older files spell this field `meaning`, which is still read.

`batch_group`: training draws records with equal values one after the other, so that they meet in a batch. They should
be hard negatives of each other, such as a video and its reversed copy: VTC and VTM learn little from easy negatives.
"""

TRUTH_FIELDS: tuple[str, ...] = ("captions", "label", "box")
"""Fields, in addition to the answers of questions, that a line with `"unlabelled": true` may leave out.

Benchmarks keep the labels of their test sets on a server. Such a record can be predicted, but not trained on or scored.
"""

BOX_SLACK = 1e-3  # how far a box may reach outside its image, in image sizes: rounding to three digits causes this much


LARGEST_LABEL = 3.4e38  # the range of float32


class RecordError(ValueError):
    """A line of a data file is not a valid record. The message names file, line, field, and what was expected."""


@dataclass(frozen=True)
class Question:
    """One question about an image or a video."""

    question: str
    answers: tuple[str, ...]
    """All correct answers; at least one, unless the record is unlabelled. Repeated answers are kept: they are votes."""
    kind: str | None = None
    """The kind of the question ("color", "order", ...); accuracy is also reported for each kind."""


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
    "id": _plain_text, "positive_id": _plain_text, "batch_group": _plain_text, "image": _plain_path,
    "video": _plain_path, "text": _plain_text, "captions": _plain_captions, "qa": _plain_questions,
}
"""Whether the value of a field is ordinary and surely valid. This is quick; all other values get the full check."""


def has_gallery(task: str) -> bool:
    """Whether the lines of a task may have a `gallery`: retrieval tasks only."""
    return task in TASKS and TASKS[task].output == "ranking"


def _labels(task: str) -> tuple[tuple[str, ...], bool]:
    """The labels that a task allows (() for any), and whether a label may be a number."""
    return (TASKS[task].labels, TASKS[task].number_labels) if task in TASKS else ((), False)


def parse_fields(
    source: str, default_id: str, line: bytes, task: str, parsers: dict[bool, dict[str, Callable]]
) -> dict[str, Any]:
    """The fields of a line, checked and with their defaults; `parsers` as `field_parsers` gives them, for lines without
    and with labels. RecordError for a line that is not a record of the task."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets nested thousands deep
        raise RecordError(
            f"{source}: found {short(line.decode(errors='replace'))}; expected one JSON object in UTF-8 ({error})"
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
    return values


def field_parsers(root: Path, task: str, unlabelled: bool) -> dict[str, Callable[[str, Any], Any]]:
    """The parser of each field of the task's lines: (place for messages, JSON value) -> value in the record."""
    path = partial(_path, root)
    parsers = {
        "id": _string,
        "positive_id": _string,
        "batch_group": _string,
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
                f"{source}: {owner} has no field {name!r}{did_you_mean(name, known)}; its fields are {listing(known)}"
            )
    for name in required:
        if name not in fields:
            raise RecordError(f"{source}: field {name!r} is missing; {owner} requires {listing(required)}")


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
        _fail(at, value, f"one of {listing(labels)}")
    if numbers and type(value) in (int, float):
        if not abs(value) <= LARGEST_LABEL:  # NaN too
            _fail(at, value, f"a number between -{LARGEST_LABEL:g} and {LARGEST_LABEL:g}, or a string")
        return float(value)
    if type(value) in (int, float):
        _fail(at, value, f'the name of a class; write the number as a text, "{short(value)}"')
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
    raise RecordError(f"{at}: found {short(found)}; expected {expected}")


def short(value: Any) -> str:
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    return shortener.repr(value)


def listing(names: Any) -> str:
    return ", ".join(names)
