"""What is evaluated, and how: a split of a data set, and the options of an evaluation."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mplug2.data.records import Record, available, read_records
from mplug2.tasks import EVALUATED


@dataclass(frozen=True)
class EvalSplit:
    root: Path
    """Folder with <task>.<split>.jsonl files."""
    split: str
    limit: int = 0
    """Evaluate only the first records of each task; 0: all of them."""

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that this split has records of, in the order of evaluation."""
        there = available(self.root)
        return [task for task in EVALUATED if self.split in there.get(task, ())]

    def records(self, task: str) -> list[Record]:
        return read_records(self.root, task, self.split)[: self.limit or None]

    def class_captions(self, task: str) -> dict[str, list[str]]:
        """Captions that describe each class, from `<task>.captions.json`; empty without such a file."""
        file = self.root / f"{task}.captions.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@dataclass(frozen=True)
class EvalOptions:
    """How the model is asked, and what is scored."""

    answer_list: tuple[str, ...] | None = None
    """Answers to rank; None: the model writes its answers."""
    beams: int = 1
    """Beams of the search for captions; 1 is greedy."""
    paper_captions: bool = False
    """Also score captions with the pipeline of the captioning papers."""
    all_captions: bool = False
    """Every caption of a record is a query of retrieval, as in COCO and Flickr30k, not only the first."""
    rerank: int = 16
    """Retrieval: number of candidates, the best by cosine, that the matching head re-ranks."""
