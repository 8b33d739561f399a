"""Predictions as the servers of benchmarks take them: those whose test truths are not published.

    vqav2     one JSON list of {"question_id", "answer"}
    nocaps    one JSON list of {"image_id", "caption"}
    glue_*    a TSV file with the columns index and prediction, named by task: CoLA.tsv, ..., MNLI-m.tsv, MNLI-mm.tsv
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mplug2.data.adapters.text import GLUE

BENCHMARKS = {"vqav2": "image_qa", "nocaps": "image_caption"} | {
    f"glue_{name}": "text_classification" if len(task.texts) == 1 else "text_pair_classification"
    for name, task in GLUE.items()
}
"""The benchmarks, and which of our tasks each is."""
NUMBERED = ("CoLA", "SST-2", "MRPC", "QQP", "WNLI")
"""Tasks of GLUE whose files have 0 and 1 for the classes; the others have their names."""


def write_submission(benchmark: str, folder: Path | str, split: str, predictions: Sequence[tuple[str, str]]) -> Path:
    """Write (id of the record, prediction) pairs into `folder`, as the server of `benchmark` wants them; returns the
    file. Raises ValueError for an unknown benchmark, an id that is no number or is there twice, an empty prediction and
    a class that the task does not have, each with its id."""
    if benchmark not in BENCHMARKS:
        raise ValueError(f"no server format for {benchmark!r}; there are {', '.join(BENCHMARKS)}")
    if not predictions:
        raise ValueError(f"there is no prediction of {BENCHMARKS[benchmark]} for {benchmark}, split {split}")
    seen = set()
    for name, prediction in predictions:
        if not name.isdecimal():
            raise ValueError(f"id {name!r}: {benchmark}'s server knows numbers only; write the records by "
                             f"python -m mplug2.data {benchmark} ROOT --out DIR, which keeps the published ids")
        if name in seen:
            raise ValueError(f"id {name}: there are two predictions for it")
        seen.add(name)
        if not prediction.strip() and benchmark == "nocaps":
            raise ValueError(f"id {name}: the caption is empty, which the server refuses")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if benchmark.startswith("glue_"):
        return _glue(benchmark.removeprefix("glue_"), folder, split, predictions)
    fields = {"vqav2": ("question_id", "answer"), "nocaps": ("image_id", "caption")}[benchmark]
    path = folder / f"{benchmark}_{split}.json"
    path.write_text(json.dumps([dict(zip(fields, (int(name), text))) for name, text in predictions]) + "\n")
    return path


def _glue(name: str, folder: Path, split: str, predictions: Sequence[tuple[str, str]]) -> Path:
    task = GLUE[name]
    codes = {label: code for code, label in task.labels.items()}
    suffix = {"mnli": "-mm" if split.endswith("mismatched") else "-m"}.get(name, "")
    lines = ["index\tprediction"]
    for index, label in sorted(predictions, key=lambda pair: int(pair[0])):
        if not codes:  # a score
            written = f"{min(5.0, max(0.0, float(label))):.3f}"
        elif label not in codes:
            raise ValueError(f"id {index}: {label!r} is none of the classes {', '.join(codes)} of {task.folder}")
        else:
            written = codes[label] if task.folder in NUMBERED else label
        lines.append(f"{index}\t{written}")
    path = folder / f"{task.folder}{suffix}.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path
