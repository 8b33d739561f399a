"""Chance level: metrics of a baseline that never looks at the image or video."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from mplug2.data.records import Question, Record
from mplug2.data.text import normalize
from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.metric_names import DIRECTIONS, metric_prefix
from mplug2.evaluation.ranking import MIN_IOU, box_iou
from mplug2.evaluation.vqa import VOTES, vqa_accuracy
from mplug2.tasks import TASKS


@lru_cache(maxsize=8)
def chance_level(data: EvalSplit, tasks: tuple[str, ...] = ()) -> dict[str, float]:
    """Metrics, for these tasks or for all, of a baseline that answers from the question alone, and otherwise gives the
    most common label or caption or the mean box of the split, and ranks a gallery at random."""
    levels = {"caption": chance_of_captions, "answer": chance_of_answers, "ranking": chance_of_ranking,
              "label": chance_of_labels, "box": chance_of_boxes}
    found: dict[str, float] = {}
    for task in tasks or data.tasks:
        if records := [record for record in data.records(task) if not record.unlabelled]:
            chances = levels[TASKS[task].output](task, records, data)
            found |= {metric_prefix(task) + name: value for name, value in chances.items()}
    return found


def chance_of_captions(task: str, records: list[Record], data: EvalSplit) -> dict[str, float]:
    captions = Counter(caption for record in records for caption in set(map(normalize, record.captions)))
    return {"caption_exact": captions.most_common(1)[0][1] / len(records)}


def chance_of_answers(task: str, records: list[Record], data: EvalSplit) -> dict[str, float]:
    """The most common training answer to the same question, else to the same kind of question, else to any question.

    Without a training split, the most common answer to each kind of the evaluated questions.
    """
    questions = [question for record in records for question in record.qa]
    training = [question for record in data.training_records(task) for question in record.qa]
    known = training or questions
    by_text = most_common_answers(training, text_of)
    by_kind = most_common_answers(known, lambda question: question.kind or "")
    overall = most_common_answers(known, lambda _: "")[""]
    guesses = [by_text.get(text_of(question)) or by_kind.get(question.kind or "") or overall for question in questions]
    hits = defaultdict(list)
    for question, guess in zip(questions, guesses):
        for kind in {"accuracy", question.kind or "accuracy"}:
            hits[f"qa_{kind}"].append(guess in map(normalize, question.answers))
    found = {name: float(np.mean(values)) for name, values in hits.items()}
    if all(len(question.answers) == VOTES for question in questions):
        truths = [[answer.lower() for answer in question.answers] for question in questions]
        found["vqa_accuracy"] = float(np.mean(vqa_accuracy(truths, guesses)))
    return found


def text_of(question: Question) -> str:
    return normalize(question.question)


def most_common_answers(questions: Iterable[Question], key: Callable[[Question], str]) -> dict[str, str]:
    """The most common answer to the questions with each key. An answer counts once for each question."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for question in questions:
        counts[key(question)].update(set(map(normalize, question.answers)))
    # The first one of equally common answers, by the alphabet: the order of a set differs from run to run.
    return {name: min(answers, key=lambda answer: (-answers[answer], answer)) for name, answers in counts.items()}


def chance_of_ranking(task: str, records: list[Record], data: EvalSplit) -> dict[str, float]:
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


def chance_of_labels(task: str, records: list[Record], data: EvalSplit) -> dict[str, float]:
    if not isinstance(records[0].label, str):
        return {}
    fraction = Counter(record.label for record in records).most_common(1)[0][1] / len(records)
    return {"accuracy": fraction, "zero_shot": fraction}


def chance_of_boxes(task: str, records: list[Record], data: EvalSplit) -> dict[str, float]:
    truths = np.array([record.box for record in records])
    overlap = box_iou(truths, np.broadcast_to(truths.mean(axis=0), truths.shape))
    return {"accuracy": float((overlap >= MIN_IOU).mean()), "iou": float(overlap.mean())}
