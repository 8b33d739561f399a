"""Evaluation of heads: classes, numbers, and boxes; and of classes without a head (zero-shot)."""

from collections.abc import Sequence

import torch

from mplug2.data.media_batches import Medium
from mplug2.data.records import Record
from mplug2.data.text_check import EXAMPLES
from mplug2.evaluation.bootstrap import Score, Statistic, mean, with_errors
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.ranking import MIN_IOU, box_iou, f1, in_top_k, matthews, pearson, spearman
from mplug2.predictor import Predictor
from mplug2.tasks import PROMPTS, TASKS


class UnknownClasses(ValueError):
    """Zero-shot classification without a list of classes."""


def evaluate_labels(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, Score], list[Prediction]]:
    """Classes or numbers, from the classifier of the task. A model without it compares media with captions (zero-shot).

    Raises ValueError if the model predicts numbers where the labels are class names, or the other way round.
    """
    records = data.records(task)
    has_head = task in predictor.model.classes
    classes = predictor.model.classes[task] if has_head else list(zero_shot_captions(task, data))
    outputs = read_inputs(predictor, task, records) if has_head else zero_shot(predictor, task, records, data)
    read = [(record, output.float()) for record, output in zip(records, outputs) if output is not None]
    predictions = []
    for record, output in read:
        value = classes[int(output.argmax())] if classes else output.item()
        confidence = output.softmax(dim=0).max().item() if classes and has_head else None
        text = " / ".join(record.texts) or record.text or ""
        truth = () if record.unlabelled else (record.label,)
        predictions.append(Prediction(task, files_of(record), text, value, truth, record.id, confidence))
    labelled = [(output, prediction) for (_, output), prediction in zip(read, predictions) if prediction.truth]
    if not labelled:
        return {}, predictions
    truths = [prediction.truth[0] for _, prediction in labelled]
    found = [prediction.prediction for _, prediction in labelled]
    if len({isinstance(value, float) for value in (*truths, found[0])}) > 1:
        expected = "class names" if classes else "numbers"
        raise ValueError(f"{records[0].source}: found labels that are not all {expected}, which this model predicts; "
                         "check the labels, or fine-tune a model on such records")
    if not predictor.is_main:
        return {}, predictions
    if not classes:
        return with_errors({"pearson": pearson(truths, found), "spearman": spearman(truths, found)}), predictions
    right = [truth == value for truth, value in zip(truths, found)]
    if not has_head:
        return with_errors({"zero_shot": mean(right)}), predictions
    statistics = {"accuracy": mean(right), **two_class_metrics(truths, found, classes)}
    if len(classes) > 5 and set(truths) <= set(classes):
        scores = torch.stack([output for output, _ in labelled]).cpu().numpy()
        statistics["top5"] = mean(in_top_k(scores, [classes.index(truth) for truth in truths], 5))
    return with_errors(statistics), predictions


def unknown_labels(predictor: Predictor, task: str, data: EvalSplit) -> str:
    """One line if records have labels that are not among the classes to choose from; otherwise an empty string.

    Raises ValueError if the model predicts numbers where the labels are class names, or the other way round.
    """
    if TASKS[task].output != "label":
        return ""
    try:
        classes = predictor.model.classes.get(task, None)
        classes = zero_shot_captions(task, data) if classes is None else classes
    except UnknownClasses:
        return ""
    labels = {record.label: record.source for record in reversed(data.records(task)) if not record.unlabelled}
    for label, source in labels.items():
        if isinstance(label, str) != bool(classes):
            raise ValueError(f"{source}: found the label {label!r}, but this model predicts "
                             f"{'class names' if classes else 'numbers'}; check the labels, or fine-tune a model on "
                             "such records")
    unknown = sorted(labels.keys() - set(classes)) if classes else []
    examples = ", ".join(map(repr, unknown[:EXAMPLES]))
    return (f"{task}, {data.split}: {len(unknown):,} labels are not among the {len(classes):,} classes that are "
            f"predicted, such as {examples}; every prediction counts as wrong there") if unknown else ""


def files_of(record: Record) -> tuple:
    """The files that a record shows; none for text."""
    return Medium.of_record(record).paths if record.video or record.image or record.images else ()


def read_inputs(predictor: Predictor, task: str, records: list[Record]) -> list[torch.Tensor | None]:
    """The outputs of the task's classifier, one per class; None where a file could not be read."""
    components = TASKS[task].components
    return predictor.read(
        [Medium.of_record(record) for record in records] if "vision" in components else None,
        [record.texts or record.text for record in records] if "text" in components else None,
        lambda hidden, *_: predictor.model.classify(hidden, task),
    )


def two_class_metrics(truths: list[str], found: list[str], classes: Sequence[str]) -> dict[str, Statistic]:
    """What GLUE scores two classes by: Matthews correlation, and F1 where one class is named "not_" and the other."""
    if len(classes) != 2:
        return {}
    positive = next((name for name in classes if f"not_{name}" in classes), classes[0])
    pairs = [truth == positive for truth in truths], [name == positive for name in found]
    return {"matthews": matthews(*pairs)} | ({"f1": f1(*pairs)} if f"not_{positive}" in classes else {})


def zero_shot_captions(task: str, data: EvalSplit) -> dict[str, list[str]]:
    """Captions of each class: those of `<task>.captions.json`, or "a picture of a <class>" and "a video of a <class>".

    Without that file, the classes are those of the training split: the evaluated records may lack some, and a smaller
    choice is easier. Raises UnknownClasses without a training split, and ValueError for a class without captions.
    """
    if captions := data.class_captions(task):
        for name, texts in captions.items():
            if not texts:
                raise ValueError(f"{data.root / task}.captions.json: found no captions of the class {name!r}; add some")
        return captions
    names = data.class_names(task)
    if not names:
        raise UnknownClasses(f"{data.root} has no {task}.train.jsonl, so the classes are unknown; add "
                             f"{task}.captions.json with a list of captions for each class")
    return {name: [f"{PROMPTS[TASKS[task].modality]} a {name}"] for name in names}


def zero_shot(
    predictor: Predictor, task: str, records: list[Record], data: EvalSplit
) -> list[torch.Tensor | None]:
    """The cosine between each image or video and each class, without any training on classes.

    A class is the mean of the vectors of its captions.
    """
    captions = zero_shot_captions(task, data)
    vectors = iter(predictor.embed_texts([text for texts in captions.values() for text in texts]))
    classes = torch.stack([torch.stack([next(vectors) for _ in texts]).mean(dim=0) for texts in captions.values()])
    classes = torch.nn.functional.normalize(classes, dim=1)
    found = predictor.embed_media([Medium.of_record(record) for record in records])
    return [None if vector is None else classes @ vector for vector in found]


def evaluate_boxes(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, Score], list[Prediction]]:
    """Boxes by their IoU with the true box. Unlabelled records are left out: no benchmark server takes boxes."""
    records = [record for record in data.records(task) if not record.unlabelled]
    boxes = predictor.predict_boxes(
        [Medium.of_record(record) for record in records], [record.text for record in records])
    predictions = [
        Prediction(task, (record.image,), record.text, tuple(box.tolist()), (record.box,), record.id)
        for record, box in zip(records, boxes) if box is not None
    ]
    if not predictions or not predictor.is_main:
        return {}, predictions
    overlap = box_iou([prediction.truth[0] for prediction in predictions],
                      [prediction.prediction for prediction in predictions])
    return with_errors({"accuracy": mean(overlap >= MIN_IOU), "iou": mean(overlap)}), predictions
