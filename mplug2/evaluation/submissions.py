"""Prediction files for the evaluation servers of benchmarks whose test truths are not published.

    vqav2     one JSON list of {"question_id", "answer"}
    nocaps    one JSON list of {"image_id", "caption"}
    glue_*    a TSV file with the columns index and prediction, named after the task: CoLA.tsv, ..., MNLI-mm.tsv

A server scores complete files only, so a file is complete, or it is not written.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mplug2.data.adapters.text import GLUE
from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.evaluate import check_tasks
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.results import check_writable, write_whole
from mplug2.model.mplug2 import MPLUG2

BENCHMARKS = {"vqav2": "image_qa", "nocaps": "image_caption"} | {
    f"glue_{name}": "text_classification" if len(task.texts) == 1 else "text_pair_classification"
    for name, task in GLUE.items()
}
"""Every benchmark, and the task that it belongs to."""
NUMBERED = ("CoLA", "SST-2", "MRPC", "QQP", "WNLI")
"""GLUE tasks whose files have 0 and 1 for the classes; the other files have the names of the classes."""


def check_submission(
    benchmark: str, folder: Path, splits: Sequence[EvalSplit], tasks: Sequence[str] | None, model: MPLUG2
) -> None:
    """Check, before anything is computed, that the evaluation of `tasks` (None: all) can write the server's files.

    Raises ValueError if the task of the benchmark is not evaluated, or has no records in one of the splits; for a
    sample of the records; for ids that are not numbers, or occur twice; for a model with other classes; for two splits
    with the same file; and for a file that cannot be written.
    """
    task, files = BENCHMARKS[benchmark], [submission_file(benchmark, folder, data.split) for data in splits]
    if tasks and task not in tasks:
        raise ValueError(f"server={benchmark!r} needs predictions of {task}; add it to --task")
    check_tasks(model, [task])
    if benchmark.startswith("glue_"):
        expected, classes = set(GLUE[benchmark.removeprefix("glue_")].labels.values()), set(model.classes[task])
        if not classes <= expected or bool(classes) != bool(expected):
            raise ValueError(f"server={benchmark!r}: this model predicts {_listed(classes)}; expected a model that is "
                             f"trained on {benchmark}, with {_listed(expected)}")
    for data, file in zip(splits, files):
        if task not in data.tasks:
            raise ValueError(f"server={benchmark!r}: {data.root} has no {task}.{data.split}.jsonl; leave the split "
                             f"{data.split} out of --splits")
        if data.limit:
            raise ValueError(f"limit={data.limit} with server={benchmark!r}: the server only accepts complete "
                             "predictions; leave --limit out")
        if files.count(file) > 1:
            raise ValueError(f"server={benchmark!r} has one file for the splits "
                             f"{', '.join(data.split for data in splits)}: {file}; evaluate one of them at a time")
        for name, count in Counter(submission_ids(benchmark, data)).items():
            if not name.isdecimal():
                raise ValueError(f"id {name!r}: expected a number, as the server of {benchmark} does. Write the "
                                 f"records with python -m mplug2.data {benchmark} ROOT --out DIR, which keeps the "
                                 "published ids")
            if count > 1:
                raise ValueError(f"id {name}: found {count} predictions, expected one; remove records with this id")
    check_writable(*files)


def submission_ids(benchmark: str, data: EvalSplit) -> list[str]:
    """The id of each prediction that the server expects for this split: one for a record, or for each question."""
    return [record.id for record in data.records(BENCHMARKS[benchmark]) for _ in record.qa or (None,)]


def submission_file(benchmark: str, folder: Path, split: str) -> Path:
    """Where the file for one split is written. The server of GLUE expects one name, whatever the split."""
    if not benchmark.startswith("glue_"):
        return folder / f"{benchmark}_{split}.json"
    suffix = {"glue_mnli": "-mm" if split.endswith("mismatched") else "-m"}.get(benchmark, "")
    return folder / f"{GLUE[benchmark.removeprefix('glue_')].folder}{suffix}.tsv"


def write_submission(
    benchmark: str, folder: Path, data: EvalSplit, predictions: Sequence[Prediction]
) -> Path:
    """Write the predictions of the benchmark's task into `folder`, in the format of its server; returns the file.

    Raises ValueError, and leaves an older file as it is, if one of the predictions is missing, because an image could
    not be read, and for an empty caption.
    """
    found = {one.id: str(one.prediction) for one in predictions if one.task == BENCHMARKS[benchmark]}
    file, ids = submission_file(benchmark, folder, data.split), submission_ids(benchmark, data)
    if missing := [name for name in ids if name not in found]:
        raise ValueError(f"{file} is not written: {len(missing):,} of {len(ids):,} predictions are missing, such as "
                         f"that of id {missing[0]}, and the server of {benchmark} only accepts all of them; repair the "
                         "skipped files")
    if benchmark == "nocaps" and (empty := [name for name in ids if not found[name].strip()]):
        raise ValueError(f"{file} is not written: {len(empty):,} captions are empty, such as that of id {empty[0]}, "
                         "and the server refuses them; use another checkpoint, or --min-length 1")
    if benchmark.startswith("glue_"):
        write_whole(file, _glue_table(benchmark.removeprefix("glue_"), [(name, found[name]) for name in ids]))
    else:
        fields = {"vqav2": ("question_id", "answer"), "nocaps": ("image_id", "caption")}[benchmark]
        write_whole(file, json.dumps([dict(zip(fields, (int(name), found[name]))) for name in ids]) + "\n")
    return file


def write_submissions(
    benchmark: str, folder: Path, splits: Sequence[EvalSplit], predictions: Mapping[str, Sequence[Prediction]]
) -> None:
    """`write_submission` for each split, whose predictions are found by its name; prints the files.

    Raises ValueError for the splits that are not written, after it has written the others.
    """
    problems = []
    for data in splits:
        try:
            file = write_submission(benchmark, folder, data, predictions[data.split])
            print(f"for the server of {benchmark}: {file}")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def _glue_table(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    task = GLUE[name]
    codes = {label: code for code, label in task.labels.items()}
    lines = ["index\tprediction"]
    for index, label in sorted(pairs, key=lambda pair: int(pair[0])):
        if not codes:  # regression: a score from 0 to 5
            written = f"{min(5.0, max(0.0, float(label))):.3f}"
        else:
            written = codes[label] if task.folder in NUMBERED else label
        lines.append(f"{index}\t{written}")
    return "\n".join(lines) + "\n"


def _listed(classes: set[str]) -> str:
    return f"the classes {', '.join(sorted(classes))}" if classes else "numbers"
