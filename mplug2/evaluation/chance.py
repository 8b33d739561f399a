"""Chance level: metrics of a baseline that ignores its input."""

import math
from collections import Counter, defaultdict

import numpy as np

from mplug2.data.records import Record
from mplug2.data.text import normalize
from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.metric_names import DIRECTIONS, metric_prefix
from mplug2.evaluation.ranking import box_iou, grounding_accuracy
from mplug2.tasks import TASKS


def chance_level(data: EvalSplit) -> dict[str, float]:
    """Metrics of a baseline that knows the most common answer to each kind of question, the most common label and
    caption, and the mean box of the split, and that ranks a gallery at random."""
    levels = {"caption": chance_of_captions, "answer": chance_of_answers, "ranking": chance_of_ranking,
              "label": chance_of_labels, "box": chance_of_boxes}
    found: dict[str, float] = {}
    for task in data.tasks:
        if records := [record for record in data.records(task) if not record.unlabelled]:
            chances = levels[TASKS[task].output](task, records)
            found |= {metric_prefix(task) + name: value for name, value in chances.items()}
    return found


def chance_of_captions(task: str, records: list[Record]) -> dict[str, float]:
    captions = Counter(caption for record in records for caption in set(map(normalize, record.captions)))
    return {"caption_exact": captions.most_common(1)[0][1] / len(records)}


def chance_of_answers(task: str, records: list[Record]) -> dict[str, float]:
    by_kind = defaultdict(list)
    for question in (question for record in records for question in record.qa):
        by_kind[question.kind or "all"].append(set(map(normalize, question.answers)))
    return {
        f"qa_{kind}": Counter(answer for accepted in asked for answer in accepted).most_common(1)[0][1] / len(asked)
        for kind, asked in by_kind.items()
    }


def chance_of_ranking(task: str, records: list[Record]) -> dict[str, float]:
    found: dict[str, float] = {}
    sizes = Counter(record.gallery for record in records)
    right = Counter((record.gallery, record.positive_id) for record in records)
    for k in (1, 5, 10):
        # One minus the probability that k draws miss all the right items.
        values = []
        for record in records:
            size, positives = sizes[record.gallery], right[record.gallery, record.positive_id]
            values.append(1 - math.comb(size - positives, min(k, size)) / math.comb(size, min(k, size)))
        found |= {f"{direction}_r{k}": float(np.mean(values)) for direction in DIRECTIONS[TASKS[task].modality]}
    return found | {name + "_rerank": value for name, value in found.items() if name.endswith("_r1")}


def chance_of_labels(task: str, records: list[Record]) -> dict[str, float]:
    if not isinstance(records[0].label, str):
        return {}
    fraction = Counter(record.label for record in records).most_common(1)[0][1] / len(records)
    return {"accuracy": fraction, "zero_shot": fraction}


def chance_of_boxes(task: str, records: list[Record]) -> dict[str, float]:
    truths = np.array([record.box for record in records])
    mean = np.broadcast_to(truths.mean(axis=0), truths.shape)
    return {"accuracy": grounding_accuracy(truths, mean), "iou": float(box_iou(truths, mean).mean())}
