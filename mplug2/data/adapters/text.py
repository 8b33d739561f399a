"""GLUE: adapters for its nine tasks and its diagnostic set. The test sets have no labels: the server keeps them."""

from collections.abc import Iterator
from dataclasses import dataclass

from mplug2.data.adapters.source import Annotation, Files, ParsedRecord, fail, table

NO_YES = {"0": "not_entailment", "1": "entailment"}
ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
EQUIVALENT = {"0": "not_equivalent", "1": "equivalent"}
THREE = {name: name for name in ("entailment", "neutral", "contradiction")}


@dataclass(frozen=True)
class GlueTask:
    folder: str
    """The folder in the published archive, and the name of the file that the server accepts."""
    texts: tuple[str, ...]
    """The columns of the sentence or of the two sentences."""
    label: str
    """The column of the label."""
    labels: dict[str, str]
    """Label in the file -> our class name; {} if the label is a score."""


GLUE = {
    "cola": GlueTask("CoLA", ("sentence",), "label", {"0": "unacceptable", "1": "acceptable"}),
    "sst2": GlueTask("SST-2", ("sentence",), "label", {"0": "negative", "1": "positive"}),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", EQUIVALENT),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", EQUIVALENT),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2"), "score", {}),
    "mnli": GlueTask("MNLI", ("sentence1", "sentence2"), "gold_label", THREE),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "rte": GlueTask("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT),
    "wnli": GlueTask("WNLI", ("sentence1", "sentence2"), "label", NO_YES),
    "ax": GlueTask("AX", ("sentence1", "sentence2"), "gold_label", THREE),
}
"""The tasks by their short names. The server expects 0 and 1 for QQP, as in its training file."""

COLA_COLUMNS = ["source", "label", "mark", "sentence"]  # its training and validation files have no header


def glue(files: Files, name: str) -> Iterator[ParsedRecord]:
    """train.tsv, dev.tsv and test.tsv, in the download itself or in the folder of the task (CoLA/, SST-2/, ...).

    "ax" is the diagnostic set for models of MNLI: diagnostic/diagnostic.tsv, without labels. In QQP's published files,
    line breaks split a few rows, and two rows have no second question. Such rows are left out and listed.
    """
    task, faulty = GLUE[name], files.faulty if name == "qqp" else None
    parts = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
    if name == "mnli":
        parts = {"train": "train.tsv", "val": "dev_matched.tsv", "val_mismatched": "dev_mismatched.tsv",
                 "test": "test_matched.tsv", "test_mismatched": "test_mismatched.tsv"}
    if name == "ax":
        paths = files.splits({"test": ("diagnostic/diagnostic.tsv", "AX/diagnostic.tsv", "AX/test.tsv",
                                       "diagnostic.tsv")})
    elif files.optional(*(f"{task.folder}/{file}" for file in parts.values())):
        paths = files.splits({split: (f"{task.folder}/{file}",) for split, file in parts.items()})
    else:
        paths = files.splits({split: (file,) for split, file in parts.items()})
    for split, path in paths:
        if path.parent.name in {other.folder for other in GLUE.values()} - {task.folder}:
            raise FileNotFoundError(f"{path} belongs to another task of GLUE: expected a folder {task.folder}; "
                                    "unpack the files of the task there")
        labelled = not split.startswith("test")
        columns = COLA_COLUMNS if name == "cola" and labelled else None
        for number, row in enumerate(table(path, "\t", columns, False, faulty)):
            if faulty is not None and not all(row.get(column).strip() for column in task.texts):
                faulty.append(f"{row.source}: a question is empty")
                continue
            texts = [row.text(column) for column in task.texts]
            fields = {"text": texts[0]} if len(texts) == 1 else {"texts": texts}
            if labelled:
                fields["label"] = row.choice(task.label, task.labels) if task.labels else _score(row, task.label)
            else:
                index = next((row.key(column) for column in ("index", "id") if column in row), str(number))
                fields |= {"id": index, "unlabelled": True}
            kind = "text_classification" if len(texts) == 1 else "text_pair_classification"
            yield ParsedRecord(kind, split, row.source, fields)


def _score(row: Annotation, column: str) -> float:
    value = row.number(column)
    if not 0 <= value <= 5:
        fail(f"{row.source}: {column}", "a score from 0 to 5", row.get(column))
    return value
