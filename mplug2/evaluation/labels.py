"""Evaluation of heads: classes, numbers, and boxes; and of classes without a head (zero-shot)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mplug2.data.records import Record
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.ranking import box_iou, f1, grounding_accuracy, matthews, pearson, spearman, top_k
from mplug2.predictor import Predictor
from mplug2.tasks import PROMPTS, TASKS


def evaluate_labels(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, float], list[Prediction]]:
    """Classes or numbers, from the classifier of the task. A model without it compares media with captions (zero-shot).

    Raises ValueError if the model predicts numbers where the labels are class names, or the other way round.
    """
    records = data.records(task)
    known = [i for i, record in enumerate(records) if not record.unlabelled]
    confidences: list[float | None] = [None] * len(records)
    if task in predictor.model.classes:
        classes = predictor.model.classes[task]
        scores = read_inputs(predictor, task, records)
        found = [classes[best] for best in scores.argmax(dim=1).tolist()] if classes else scores[:, 0].tolist()
        if classes:
            confidences = scores.softmax(dim=1).amax(dim=1).tolist()
    else:
        captions = data.class_captions(task)
        names = sorted({records[i].label for i in known})
        found = zero_shot(predictor, task, [record.video or record.image for record in records], names, captions)
    predictions = [
        Prediction(
            task, media_of(record), " / ".join(record.texts) or record.text or "", value,
            () if record.unlabelled else (record.label,), record.id, confidence,
        )
        for record, value, confidence in zip(records, found, confidences)
    ]
    if not known:
        return {}, predictions
    truths, found = [records[i].label for i in known], [found[i] for i in known]
    numbers = {isinstance(value, float) for value in (*truths, found[0])}
    if len(numbers) > 1:
        made_for = "numbers" if isinstance(found[0], float) else "classes"
        raise ValueError(f"{records[0].source}: the labels do not fit this model, which predicts {made_for}; expected "
                         f"{'numbers' if made_for == 'numbers' else 'names of classes'} only")
    if numbers == {True}:
        return {"pearson": pearson(truths, found), "spearman": spearman(truths, found)}, predictions
    metrics = {"accuracy" if task in predictor.model.classes else "zero_shot":
               float(np.mean([truth == value for truth, value in zip(truths, found)]))}
    if task in predictor.model.classes:
        metrics |= two_class_metrics(truths, found, classes)
        if len(classes) > 5 and set(truths) <= set(classes):
            metrics["top5"] = top_k(scores[known].cpu().numpy(), [classes.index(truth) for truth in truths], 5)
    return metrics, predictions


def media_of(record: Record) -> tuple[Path, ...]:
    """The files that a record shows."""
    return record.images or tuple(path for path in (record.video, record.image) if path)


def read_inputs(predictor: Predictor, task: str, records: list[Record]) -> torch.Tensor:
    """The outputs of the task's classifier, (record, class)."""
    media = [record.images or record.video or record.image for record in records]
    texts = [record.texts or record.text for record in records]
    return predictor.read(
        media if "vision" in TASKS[task].components else None, texts if "text" in TASKS[task].components else None,
        lambda hidden, _: predictor.model.classify(hidden, task),
    )


def two_class_metrics(truths: list[str], found: list[str], classes: Sequence[str]) -> dict[str, float]:
    """What GLUE scores two classes by: Matthews correlation, and F1 where one class is named "not_" and the other."""
    if len(classes) != 2:
        return {}
    positive = next((name for name in classes if f"not_{name}" in classes), classes[0])
    pairs = [truth == positive for truth in truths], [name == positive for name in found]
    return {"matthews": matthews(*pairs)} | ({"f1": f1(*pairs)} if f"not_{positive}" in classes else {})


def zero_shot(
    predictor: Predictor, task: str, media: list[Path], classes: list[str], captions: dict[str, list[str]]
) -> list[str]:
    """The class whose captions are nearest to each image or video by VTC, without any training on classes.

    A class is the mean of the vectors of its captions. Without `captions`, they are "a picture of a <class>" and "a
    video of a <class>". Raises ValueError for a class without captions.
    """
    if captions:
        if missing := [name for name in classes if not captions.get(name)]:
            raise ValueError(f"{task}.captions.json: found no captions of the class {missing[0]!r}; add some")
        classes = list(captions)
    else:
        captions = {name: [f"{PROMPTS[TASKS[task].modality]} a {name}"] for name in classes}
    vectors = torch.stack([predictor.embed(captions[name]).mean(dim=0) for name in classes])
    scores = predictor.embed(media) @ torch.nn.functional.normalize(vectors, dim=1).T
    return [classes[number] for number in scores.argmax(dim=1).tolist()]


def evaluate_boxes(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, float], list[Prediction]]:
    """Boxes by their IoU with the true box. Unlabelled records are left out: no benchmark server takes boxes."""
    records = [record for record in data.records(task) if not record.unlabelled]
    if not records:
        return {}, []
    found = predictor.predict_boxes([record.image for record in records], [record.text for record in records]).tolist()
    truths = [record.box for record in records]
    return {"accuracy": grounding_accuracy(truths, found), "iou": float(box_iou(truths, found).mean())}, [
        Prediction(task, (record.image,), record.text, tuple(box), (record.box,), record.id)
        for record, box in zip(records, found)
    ]
