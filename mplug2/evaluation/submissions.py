"""Prediction files for the evaluation servers of benchmarks whose test truths are not published.

    vqav2     one JSON list of {"question_id", "answer"}
    nocaps    one JSON list of {"image_id", "caption"}
    glue_*    a TSV file with the columns index and prediction, named after the task: CoLA.tsv, ..., MNLI-mm.tsv
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mplug2.data.adapters.text import GLUE
from mplug2.evaluation.predictions import Prediction

BENCHMARKS = {"vqav2": "image_qa", "nocaps": "image_caption"} | {
    f"glue_{name}": "text_classification" if len(task.texts) == 1 else "text_pair_classification"
    for name, task in GLUE.items()
}
"""Every benchmark, and the task that it belongs to."""
NUMBERED = ("CoLA", "SST-2", "MRPC", "QQP", "WNLI")
"""GLUE tasks whose files have 0 and 1 for the classes; the other files have the names of the classes."""


def write_submission(benchmark: str, folder: Path | str, split: str, predictions: Sequence[Prediction]) -> Path:
    """Write the predictions of the benchmark's task into `folder`, in the format of its server.

    Returns the path of the file. Raises ValueError for an unknown benchmark; and, with the id, for an id that is not a
    number or occurs twice, for an empty caption, and for a class that the task does not have.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {benchmark!r}: expected one of {', '.join(BENCHMARKS)}")
    pairs = [(one.id, str(one.prediction)) for one in predictions if one.task == BENCHMARKS[benchmark]]
    if not pairs:
        raise ValueError(f"split {split} has no predictions of {BENCHMARKS[benchmark]}, which {benchmark} needs: "
                         f"evaluate with --task {BENCHMARKS[benchmark]}")
    seen = set()
    for name, prediction in pairs:
        if not name.isdecimal():
            raise ValueError(f"id {name!r}: expected a number, as the server of {benchmark} does. Write the records "
                             f"with python -m mplug2.data {benchmark} ROOT --out DIR, which keeps the published ids")
        if name in seen:
            raise ValueError(f"id {name}: found two predictions, expected one; remove a record with this id")
        seen.add(name)
        if not prediction.strip() and benchmark == "nocaps":
            raise ValueError(f"id {name}: the caption is empty, and the server refuses empty captions; use another "
                             "checkpoint")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if benchmark.startswith("glue_"):
        return _write_glue(benchmark.removeprefix("glue_"), folder, split, pairs)
    fields = {"vqav2": ("question_id", "answer"), "nocaps": ("image_id", "caption")}[benchmark]
    path = folder / f"{benchmark}_{split}.json"
    path.write_text(json.dumps([dict(zip(fields, (int(name), text))) for name, text in pairs]) + "\n")
    return path


def _write_glue(name: str, folder: Path, split: str, pairs: Sequence[tuple[str, str]]) -> Path:
    task = GLUE[name]
    codes = {label: code for code, label in task.labels.items()}
    suffix = {"mnli": "-mm" if split.endswith("mismatched") else "-m"}.get(name, "")
    lines = ["index\tprediction"]
    for index, label in sorted(pairs, key=lambda pair: int(pair[0])):
        if not codes:  # regression: a score from 0 to 5
            written = f"{min(5.0, max(0.0, float(label))):.3f}"
        elif label not in codes:
            raise ValueError(f"id {index}: {label!r} is not a class of {task.folder}; expected one of "
                             f"{', '.join(codes)}")
        else:
            written = codes[label] if task.folder in NUMBERED else label
        lines.append(f"{index}\t{written}")
    path = folder / f"{task.folder}{suffix}.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path
