"""The names of the metrics, and what follows from a name: its unit, how it is printed, and its heading.

    videos                images
    caption_exact         image_caption_exact      fraction of captions that equal a reference; also _bleu4, _rouge_l
    caption_cider         image_caption_cider      CIDEr-D, from 0 to 10
    caption_paper_...     image_caption_paper_...  the captioning papers' pipeline
    qa_accuracy           image_qa_accuracy        fraction of right answers; also qa_<kind> for each kind of question
    vqa_accuracy          image_vqa_accuracy       where each question has ten answers
    t2v_..., v2t_...      t2i_..., i2t_...         retrieval from text and to text: r1, r5, r10, median_rank, r1_rerank

Labels: `<task>_accuracy`, `<task>_top5` with more than five classes, `<task>_matthews` and `<task>_f1` with two,
`<task>_pearson` and `<task>_spearman` for numbers, and `<task>_zero_shot` for classes that are told apart by captions.
Boxes: `grounding_accuracy` (IoU of at least 0.5) and `grounding_iou`. Questions about a text alone: `text_qa_accuracy`
and `text_qa_<kind>`.
"""

import math
from collections.abc import Iterable, Sequence

from mplug2.tasks import TASKS

DIRECTIONS = {"video": ("t2v", "v2t"), "image": ("t2i", "i2t")}
"""The two directions of retrieval, from text and to text, by modality."""


def metric_prefix(task: str) -> str:
    """What the metric names of a task start with."""
    row = TASKS[task]
    if row.output in ("caption", "answer"):
        return "" if row.modality == "video" else f"{row.modality}_"
    return "" if row.output == "ranking" else f"{task}_"


def group_by_split(flat: dict[str, float]) -> dict[str, dict[str, float]]:
    """{"test/qa_order": x} -> {"test": {"qa_order": x}}"""
    by_split: dict[str, dict[str, float]] = {}
    for key, value in flat.items():
        split, _, name = key.partition("/")
        by_split.setdefault(split, {})[name] = value
    return by_split


def is_fraction(name: str) -> bool:
    """Whether a metric lies between 0 and 1: all except CIDEr and ranks. (Correlations are counted as fractions.)"""
    return not name.endswith(("cider", "median_rank"))


def mean_score(metrics: dict[str, float]) -> float | None:
    """The mean of all metrics that are fractions; None if there is none."""
    fractions = [value for name, value in metrics.items() if is_fraction(name) and math.isfinite(value)]
    return sum(fractions) / len(fractions) if fractions else None


def main_score(metrics: dict[str, float], tasks: Sequence[str], name: str = "") -> float | None:
    """What `best` is chosen by, higher is better: the metric `name`, or the mean of the main metrics of the tasks.

    CIDEr counts as a tenth of its value, so that all main metrics lie between 0 and 1. Without a main metric (in
    pre-training, for example) it is the mean of all fractions. None if there is no such metric.
    """
    if name:
        value = metrics.get(name)
        return -value if value is not None and name.endswith("median_rank") else value
    found = {TASKS[task].metric: metrics[TASKS[task].metric] for task in tasks if TASKS[task].metric in metrics}
    if not found:
        return mean_score(metrics)
    return sum(value if is_fraction(metric) else value / 10 for metric, value in found.items()) / len(found)


def heading(name: str) -> str:
    """The heading under which the report lists a metric."""
    modality = "images" if name.startswith(("image_", *DIRECTIONS["image"])) else "videos"
    if name.startswith("text_qa_"):
        modality = "texts"
    name = name.removeprefix("image_").removeprefix("text_")
    if name.startswith(("qa_", "vqa_")):
        return f"Answers by kind of question, {modality}"
    if name.startswith("caption_"):
        return f"Captions, {modality}"
    if name.startswith(sum(DIRECTIONS.values(), ())):
        return f"Retrieval, {modality}"
    return "Classes, labels, and boxes"


def by_heading(names: Iterable[str]) -> dict[str, list[str]]:
    """The different names, grouped by their heading."""
    grouped: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        grouped.setdefault(heading(name), []).append(name)
    return grouped


def format_value(name: str, value: float) -> str:
    """Fractions in percent, such as 95.5; CIDEr with three digits after the point, ranks with one."""
    if is_fraction(name):
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if name.endswith("cider") else f"{value:.1f}"


def format_table(by_split: dict[str, dict[str, float]], errors: dict[str, dict[str, float]] | None = None) -> str:
    """One row per metric and one column per split, formatted by `format_value`; with standard errors after a ±."""
    def cell(split: str, name: str) -> str:
        if name not in by_split[split]:
            return ""
        error = (errors or {}).get(split, {}).get(name, 0.0)
        return format_value(name, by_split[split][name]) + (f" ±{format_value(name, error):>4}" if error else "")

    names = list(dict.fromkeys(name for metrics in by_split.values() for name in metrics))
    rows = [[cell(split, name) for split in by_split] for name in names]
    width = max([23, *map(len, names)]) + 1
    column = max([8, *map(len, by_split), *(len(text) for row in rows for text in row)]) + 2
    lines = [f"{'':<{width}}" + "".join(f"{split:>{column}}" for split in by_split)]
    lines += [f"{name:<{width}}" + "".join(f"{text:>{column}}" for text in row) for name, row in zip(names, rows)]
    return "\n".join(lines)
