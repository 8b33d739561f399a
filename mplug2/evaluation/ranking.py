"""Metrics of rankings, classes, numbers, and boxes: arrays in, values per sample or a `Statistic` out."""

from collections.abc import Sequence

import numpy as np
import torch

from mplug2.boxes import generalized_iou
from mplug2.evaluation.bootstrap import Statistic, correlation, mean, median, ratio_of_sums

MIN_IOU = 0.5
"""A predicted box is right if its intersection over union with the true box is at least this."""


def ranks(similarity: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """The rank of each query's best positive item, from 1: int (query,).

    similarity: (query, item), higher is closer; positives: (query, item), bool. A negative item that ties with the
    best positive counts before it, so a model that cannot tell items apart gets a bad score. The other positives of a
    query never count before its best one.

    Raises ValueError for empty or different shapes, for positives that are not bool, for a similarity of NaN, and for
    a query without a positive item (with its index).
    """
    similarity, positives = np.asarray(similarity), np.asarray(positives)
    if similarity.ndim != 2 or similarity.size == 0 or similarity.shape != positives.shape:
        raise ValueError(f"found similarity {similarity.shape} and positives {positives.shape}: expected the same "
                         "non-empty shape (query, item)")
    if positives.dtype != np.bool_:
        raise ValueError(f"found positives of type {positives.dtype}: expected bool, whether each item is right")
    unknown, lonely = np.isnan(similarity).any(axis=1), ~positives.any(axis=1)
    if unknown.any():
        raise ValueError(f"the similarities of query {unknown.argmax()} contain NaN: check the weights of the model")
    if lonely.any():
        raise ValueError(f"query {lonely.argmax()} has no positive item: remove it, or add its item to the gallery")
    best = np.where(positives, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best) & ~positives).sum(axis=1)


def retrieval(ranks: np.ndarray, records: Sequence[int] | None = None) -> dict[str, Statistic]:
    """Recall at 1, 5, and 10 (fractions), and the median rank; `records` as for `bootstrap.mean`."""
    recalls = {f"r{k}": mean(ranks <= k, records) for k in (1, 5, 10)}
    return {**recalls, "median_rank": median(ranks, records)}


def in_top_k(scores: np.ndarray, labels: Sequence[int], k: int) -> np.ndarray:
    """Whether the label of each sample is among the k classes with the highest scores; scores (sample, class).

    A class that ties with the right one counts before it. Raises ValueError for shapes that do not fit, for labels out
    of range (with the sample), and for scores of NaN.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.size == 0 or labels.shape != scores.shape[:1]:
        raise ValueError(f"found scores {scores.shape} and labels {labels.shape}: expected scores (sample, class) and "
                         "one label per sample")
    if np.isnan(scores).any():
        raise ValueError(f"the scores of sample {np.isnan(scores).any(axis=1).argmax()} contain NaN: check the weights "
                         "of the model")
    outside = (labels < 0) | (labels >= scores.shape[1])
    if outside.any():
        raise ValueError(f"sample {outside.argmax()}: label {labels[outside.argmax()]} is not one of the "
                         f"{scores.shape[1]} classes, numbered from 0")
    right = scores[np.arange(len(labels)), labels]
    return (scores >= right[:, None]).sum(axis=1) <= k


def matthews(truths: Sequence[bool], predictions: Sequence[bool]) -> Statistic:
    """Matthews correlation coefficient of two classes, in [-1, 1] (CoLA); 0 if either side has only one class."""
    return correlation(*_two_classes(truths, predictions))


def f1(truths: Sequence[bool], predictions: Sequence[bool]) -> Statistic:
    """F1 of the class "true", in [0, 1] (MRPC, QQP); 0 if nothing is true on either side."""
    truths, predictions = _two_classes(truths, predictions)

    def of(sums: np.ndarray) -> np.ndarray:
        hits, total = np.moveaxis(sums, -1, 0)
        return np.where(total > 0, 2 * hits / np.maximum(total, 1), 0.0)

    return ratio_of_sums(np.stack([truths * predictions, truths + predictions], axis=1), of)


def pearson(truths: Sequence[float], predictions: Sequence[float]) -> Statistic:
    """Correlation of the values, in [-1, 1] (STS-B); 0 if either side is constant."""
    return correlation(*_pairs(truths, predictions))


def spearman(truths: Sequence[float], predictions: Sequence[float]) -> Statistic:
    """Correlation of the ranks, in [-1, 1] (STS-B). Equal values share the mean of their ranks. The standard error
    keeps the ranks of the whole data set."""
    return correlation(*(_mean_ranks(values) for values in _pairs(truths, predictions)))


def box_iou(truths: Sequence, predictions: Sequence) -> np.ndarray:
    """Intersection over union of boxes (sample, 4), each (center x, center y, width, height): float64 (sample,).

    Raises ValueError for arrays of other shapes, or of different ones.
    """
    truths, predictions = (torch.from_numpy(np.array(boxes, float)) for boxes in (truths, predictions))
    if truths.shape != predictions.shape or truths.ndim != 2 or truths.shape[1] != 4 or not len(truths):
        raise ValueError(f"found boxes of shapes {tuple(truths.shape)} and {tuple(predictions.shape)}: expected two "
                         "arrays (sample, 4)")
    return generalized_iou(truths, predictions)[0].numpy()


def _two_classes(truths: Sequence[bool], predictions: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    for name, values in (("truths", truths), ("predictions", predictions)):
        if not set(np.asarray(values).ravel().tolist()) <= {0, 1}:
            raise ValueError(f"found the {name} {sorted(set(values))[:4]}: expected two classes, false and true")
    return _pairs(truths, predictions)


def _pairs(truths: Sequence[float], predictions: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    truths, predictions = np.asarray(truths, float), np.asarray(predictions, float)
    if truths.ndim != 1 or truths.shape != predictions.shape or not len(truths):
        raise ValueError(f"found truths {truths.shape} and predictions {predictions.shape}: expected one truth and one "
                         "prediction per sample")
    if not (np.isfinite(truths).all() and np.isfinite(predictions).all()):
        raise ValueError("truths or predictions contain values that are not finite: check the weights of the model")
    return truths, predictions


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 1; equal values get the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]
