"""What is evaluated, and how: a split of a data set, and the options of an evaluation."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from mplug2.data.records import Record, available, read_records
from mplug2.data.text import Tokenizer, clean
from mplug2.data.text_check import (
    describe_equal,
    describe_numbers,
    equal_captions,
    nothing_known,
    record_text_problems,
    record_texts,
    report_unknown,
)
from mplug2.predictor import Generation
from mplug2.tasks import EVALUATED, TASKS


@dataclass(frozen=True)
class EvalSplit:
    root: Path
    """Folder with <task>.<split>.jsonl files."""
    split: str
    limit: int = 0
    """Evaluate a random sample of this many records of each task, always the same one; 0: all records. Galleries stay
    whole, so a retrieval task may have more records."""

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that this split has records of, in the order of evaluation."""
        there = available(self.root)
        return [task for task in EVALUATED if self.split in there.get(task, ())]

    def records(self, task: str) -> list[Record]:
        records = list(read_records(self.root, task, self.split))
        if not self.limit or len(records) <= self.limit:
            return records
        rng = np.random.default_rng((0, *task.encode()))
        if TASKS[task].output != "ranking":
            return [records[i] for i in sorted(rng.choice(len(records), self.limit, replace=False))]
        sizes, chosen, count = Counter(record.gallery for record in records), set(), 0
        for gallery in rng.permutation(sorted(sizes)):
            if count < self.limit:
                chosen.add(str(gallery))
                count += sizes[str(gallery)]
        return [record for record in records if record.gallery in chosen]

    def training_records(self, task: str) -> list[Record]:
        """The records of the training split; empty if there is none."""
        return _training_records(self.root, task)

    def class_captions(self, task: str) -> dict[str, list[str]]:
        """Captions that describe each class, from `<task>.captions.json`; empty without such a file."""
        file = self.root / f"{task}.captions.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def class_names(self, task: str) -> list[str]:
        """The names of the classes in the training split."""
        return sorted({str(record.label) for record in self.training_records(task) if not record.unlabelled})


@lru_cache(maxsize=4)  # the records of a training run do not change
def _training_records(root: Path, task: str) -> list[Record]:
    return list(read_records(root, task, "train")) if "train" in available(root).get(task, ()) else []


def read_answer_list(source: str, root: Path) -> tuple[str, ...]:
    """The different answers of a file with one per line, or, for the word `train`, of the training questions in `root`.

    They are cleaned, and come in the order of their first occurrence. Raises ValueError if there are none.
    """
    if source == "train":
        tasks = [task for task in EVALUATED if TASKS[task].output == "answer"]
        found = [answer for task in tasks for record in _training_records(root, task)
                 for question in record.qa for answer in question.answers]
    else:
        found = Path(source).read_text(encoding="utf-8").splitlines()
    unique = tuple(dict.fromkeys(cleaned for answer in found if (cleaned := clean(answer))))
    if not unique:
        raise ValueError(f"answers={source!r}: found no answers there; expected at least one")
    return unique


def check_texts(
    data: EvalSplit, tasks: Sequence[str], tokenizer: Tokenizer, limit: int, max_words: int, max_unknown: float
) -> tuple[list[str], list[str]]:
    """The problems and the notes of a split, one line each.

    Problems: a text without words; one to read with more than `limit` tokens; a task with more than the fraction
    `max_unknown` of words that are unknown to the vocabulary, [UNK]. Notes: a task with fewer of them; questions whose
    answers the model cannot write; numbers as labels that may be meant as classes; a gallery whose records share
    captions.
    """
    problems, notes = [], []
    for task in tasks:
        records, name = data.records(task), f"{task}, {data.split}"
        for record in records:
            problems += record_text_problems(record, task, tokenizer, limit, max_words)
        words = Counter(word for record in records for text in record_texts(record)
                        for word in clean(text, max_words).split())
        report_unknown(name, words, tokenizer, max_unknown, problems, notes)
        answers = [question.answers for record in records for question in record.qa if question.answers]
        if lost := [one for one in answers if all(nothing_known(answer, tokenizer, max_words) for answer in one)]:
            notes.append(f"{name}: {len(lost):,} of {len(answers):,} questions have only answers of unknown words, "
                         f"such as {lost[0][0]!r}; the model can never write them")
        notes += filter(None, [describe_numbers(name, (record.label for record in records))])
        if TASKS[task].output == "ranking" and (equal := equal_captions(records)):
            notes.append(describe_equal(name, equal))
    return problems, notes


def choose_splits(root: Path, names: Sequence[str], limit: int = 0) -> tuple[list[EvalSplit], list[str]]:
    """Those of the splits that the folder has, and the names of the others. Raises ValueError if it has none."""
    there = {split for splits in available(root).values() for split in splits}
    splits = [EvalSplit(root, name, limit) for name in names if name in there]
    if not splits:
        raise ValueError(f"{root} has none of the splits {', '.join(names)}; it has {', '.join(sorted(there))}")
    return splits, [name for name in names if name not in there]


def find_data(given: str, recorded: list[Path] | None, splits: Sequence[str]) -> tuple[Path | None, str]:
    """The folder to evaluate on, None for the tiny world, and why: the `given` one, or the training data of the model.

    `recorded` are the folders that the checkpoint names; none for the tiny world, and None in a checkpoint that does
    not record its data. Raises ValueError if none of the folders has one of these splits.
    """
    if given:
        return Path(given), "--data"
    if not recorded:
        return None, "the tiny world" if recorded == [] else "the tiny world; the checkpoint does not record its data"
    for root in filter(Path.is_dir, recorded):
        if any(any(root.glob(f"*.{split}.jsonl")) for split in splits):
            return root, "the training data of the checkpoint"
    raise ValueError(f"{', '.join(map(str, recorded))}: the training data of the checkpoint is gone, or has no split "
                     f"{' or '.join(splits)}; name a folder with --data, or other --splits")


@dataclass(frozen=True)
class EvalOptions:
    """How the model writes, and what is scored."""

    caption: Generation = Generation()
    answer: Generation = Generation()
    answer_list: tuple[str, ...] | None = None
    """Answers to rank; None: the model writes its answers."""
    paper_captions: bool = False
    """Also score captions with the pipeline of the captioning papers."""
    all_captions: bool = False
    """Every caption of a record is a query of retrieval, as in COCO and Flickr30k, not only the first."""
    rerank: int = 16
    """Retrieval: number of candidates, the best by cosine, that the matching head re-ranks."""
