"""A trained model on files of the user's: captions and answers of one file or of many, and a search by text."""

import glob
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mplug2.data.media import is_media
from mplug2.predictor import Generation, Predictor

CHUNK = 8
"""Batches per process whose results are written at a time."""


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


def write(
    predictor: Predictor, files: list[Path], question: str, how: Generation, out: Path, checkpoint: str,
    say: Callable[[str], None],
) -> None:
    """Append a line with the caption of each file, or the answer to the question, to the JSONL file `out`.

    Files that it already has, from the same checkpoint and with the same question, are left out. So a call that was
    stopped continues where it stopped. Files that cannot be read are named and left out.
    """
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    if predictor.is_main and whole != lines:  # the last line was cut off
        out.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    known = [json.loads(line) for line in whole]
    done = {line["file"] for line in known if (line["checkpoint"], line.get("question", "")) == (checkpoint, question)}
    todo = [file for file in files if str(file) not in done]
    size, written = predictor.inference.batch_size * predictor.inference.world_size * CHUNK, len(files) - len(todo)
    for first in range(0, len(todo), size):
        chunk = todo[first: first + size]
        if question:
            texts = predictor.answer(chunk, [question] * len(chunk), **vars(how))
        else:
            texts = predictor.caption(chunk, **vars(how))
        found = [(file, text) for file, text in zip(chunk, texts) if text is not None]
        written += len(found)
        if predictor.is_main:
            with out.open("a", encoding="utf-8") as stream:
                for file, text in found:
                    asked = {"question": question, "answer": text} if question else {"caption": text}
                    stream.write(json.dumps({"file": str(file), **asked, "checkpoint": checkpoint}) + "\n")
    for error in predictor.unreadable.values():
        say(f"skipped: {error}")
    say(f"{out}: {written:,} of {len(files):,} files")
