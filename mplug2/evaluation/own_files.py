"""A trained model on files of the user's: captions and answers of one file or of many, and a search by text."""

import glob
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mplug2.data.media import is_media
from mplug2.distributed import DistInfo, all_gather_object, run_on_main
from mplug2.inference import Stopped
from mplug2.predictor import Generation, Predictor

CHUNK = 8
"""Batches per process whose results are written at a time."""
LINE = '{"file": '
"""How a line of results begins."""


@dataclass(frozen=True)
class InputSettings:
    input: str = ""
    """An image, GIF, or video to caption or to ask about; a folder or a pattern such as "videos/*.mp4" for many."""
    question: str = ""
    """A question about --input."""
    find: str = ""
    """A text: list the files of the folder --input that match it best."""
    attention: str = ""
    """Image file, such as out.png, for the attention of the words of --question and of the written text."""
    output: str = ""
    """With many files: a JSONL file for the captions or answers, continued if it exists. Default: captions.jsonl, or
    answers.jsonl."""

    def __post_init__(self):
        if not self.input:
            for name in ("question", "find", "attention", "output"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)!r}: name the file or folder with --input")
            return
        if self.find and (self.question or self.attention or self.output):
            raise ValueError("find searches a folder; question, attention, and output belong to captions and answers: "
                             "leave them out")
        if not self.files:
            raise ValueError(f"input={self.input!r}: found no image, GIF, or video there")
        if self.attention and self.many:
            raise ValueError(f"attention={self.attention!r}: expected one file as --input, not a folder")
        if self.output and not self.many:
            raise ValueError(f"output={self.output!r}: expected a folder or a pattern as --input; one file is printed")

    @property
    def many(self) -> bool:
        return not Path(self.input).is_file()

    @cached_property
    def files(self) -> list[Path]:
        """The file itself, the media below a folder, or those that match a pattern."""
        path = Path(self.input)
        if path.is_file():
            return [path]
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(self.input, recursive=True))
        return sorted(file for file in found if is_media(file))


def find(predictor: Predictor, files: list[Path], text: str) -> list[tuple[float, Path]]:
    """The files by their cosine with the text, best first; without those that cannot be read."""
    (query,) = predictor.embed_texts([text])
    vectors = predictor.embed_media(files)
    scores = [(float(query @ vector), file) for file, vector in zip(files, vectors) if vector is not None]
    return sorted(scores, key=lambda pair: (-pair[0], pair[1]))


def print_best(predictor: Predictor, files: list[Path], text: str, say: Callable[[str], None]) -> None:
    """Print the ten files that match the text best, and the errors of those that cannot be read."""
    for value, file in find(predictor, files, text)[:10]:
        say(f"{value:6.3f}  {file}")
    say_skipped(predictor, say)


def say_skipped(predictor: Predictor, say: Callable[[str], None]) -> None:
    for error in predictor.unreadable.values():
        say(f"skipped: {error}")


def write(
    predictor: Predictor, files: list[Path], question: str, how: Generation, out: Path, checkpoint: str,
    say: Callable[[str], None],
) -> None:
    """Append a line with the caption of each file, or the answer to the question, to the JSONL file `out`.

    Files that it already has, from the same checkpoint, question and search, are left out. So a call that was stopped
    continues where it stopped. Files that cannot be read are named and left out. Raises ValueError if `out` has other
    contents.
    """
    changed = {name: value for name, value in vars(how).items() if value != getattr(Generation(), name)}
    same = {"checkpoint": checkpoint} | ({"question": question} if question else {}) | (
        {"search": changed} if changed else {})
    todo: list[Path] = []

    def prepare() -> None:
        done = {line["file"] for line in read_results(out)
                if {name: line[name] for name in ("checkpoint", "question", "search") if name in line} == same}
        todo.extend(file for file in files if str(file) not in done)

    inference = predictor.inference
    # The other ranks may not see the file, or see it half written.
    run_on_main(prepare, DistInfo(inference.rank, inference.world_size, predictor.device))
    todo = all_gather_object(todo)[0]
    size, written = inference.batch_size * inference.world_size * CHUNK, len(files) - len(todo)
    before = f", {written:,} of them in earlier calls" if written else ""
    for first in range(0, len(todo), size):
        chunk, stopped = todo[first: first + size], None
        try:
            if question:
                texts = predictor.answer(chunk, [question] * len(chunk), **vars(how))
            else:
                texts = predictor.caption(chunk, **vars(how))
        except Stopped as error:
            stopped, texts = error, [error.found.get(i) for i in range(len(chunk))]
        found = [(file, text) for file, text in zip(chunk, texts) if text is not None]
        written += len(found)
        if predictor.is_main:
            with out.open("a", encoding="utf-8") as stream:
                for file, text in found:
                    line = {"file": str(file), "answer" if question else "caption": text, **same}
                    stream.write(json.dumps(line) + "\n")
        if stopped:
            say(f"{out}: {written:,} of {len(files):,} files{before}; the same command continues")
            raise stopped
    say_skipped(predictor, say)
    say(f"{out}: {written:,} of {len(files):,} files{before}")


def read_results(out: Path) -> list[dict]:
    """The lines of a file that `write` began, which may not exist yet. A last line that was cut off is removed.

    Raises ValueError, and changes nothing, if a line is not one of `write`; OSError if the file cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        whole, _, rest = file.read().rpartition("\n")
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            ours = all({"file", "checkpoint"} <= line.keys() for line in lines) and LINE.startswith(rest[: len(LINE)])
        except (ValueError, AttributeError):
            ours = False
        if not ours:
            raise ValueError(f"{out} has lines that are no captions or answers of eval.py; name another file with "
                             "--output")
        if rest:
            file.truncate(len(f"{whole}\n".encode()) if lines else 0)
    return lines
