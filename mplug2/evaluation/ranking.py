"""Ranking metrics."""

import math
from collections.abc import Sequence

import numpy as np


def retrieval(similarity: np.ndarray, positives: np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10 (fractions) and the median rank (1 is best) of each query's best positive item.

    similarity: (query, item), higher is closer; positives: (query, item), bool. Ties are broken against us: a
    negative item that ties with the best positive counts before it, so a model that cannot tell items apart scores
    as badly as it should. The other positives of a query do not count before its best one.

    Raises ValueError for shapes that differ or are empty, positives that are not bool, a similarity that is not a
    number, and a query without a positive item (with its index).
    """
    similarity, positives = np.asarray(similarity), np.asarray(positives)
    if similarity.ndim != 2 or similarity.size == 0 or similarity.shape != positives.shape:
        raise ValueError("expected similarity and positives of one non-empty shape (query, item), "
                         f"found {similarity.shape} and {positives.shape}")
    if positives.dtype != np.bool_:
        raise ValueError(f"expected bool positives, found {positives.dtype}: say which items are right, not how much")
    unknown, lonely = np.isnan(similarity).any(axis=1), ~positives.any(axis=1)
    if unknown.any():
        raise ValueError(f"the similarities of query {unknown.argmax()} hold NaN: look for the cause in the model")
    if lonely.any():
        raise ValueError(f"query {lonely.argmax()} has no positive item: leave it out, or add its item to the gallery")
    best = np.where(positives, similarity, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + ((similarity >= best) & ~positives).sum(axis=1)
    recall = {f"r{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return recall | {"median_rank": float(np.median(ranks))}


def top_k(scores: np.ndarray, labels: Sequence[int], k: int) -> float:
    """Share of samples whose label is among the k classes of the highest score; scores (sample, class).

    A class that ties with the right one counts before it. Raises ValueError for shapes that do not fit, labels out of
    range (with the sample) and scores that are not numbers.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.size == 0 or labels.shape != scores.shape[:1]:
        raise ValueError(f"expected scores (sample, class) and one label a sample, found {scores.shape} and "
                         f"{labels.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"the scores of sample {np.isnan(scores).any(axis=1).argmax()} hold NaN")
    outside = (labels < 0) | (labels >= scores.shape[1])
    if outside.any():
        raise ValueError(f"sample {outside.argmax()}: label {labels[outside.argmax()]} is not one of the "
                         f"{scores.shape[1]} classes, numbered from 0")
    right = scores[np.arange(len(labels)), labels]
    better = (scores >= right[:, None]).sum(axis=1) - 1
    return float((better < k).mean())


def matthews(truths: Sequence[bool], predictions: Sequence[bool]) -> float:
    """Matthews' correlation of two classes, in [-1, 1] (CoLA); 0 if either side has one class only."""
    return _correlation(*_two_classes(truths, predictions))


def f1(truths: Sequence[bool], predictions: Sequence[bool]) -> float:
    """F1 of the class "true", in [0, 1] (MRPC, QQP); 0 if nothing is true on either side."""
    truths, predictions = _two_classes(truths, predictions)
    hits, total = float((truths * predictions).sum()), float(truths.sum() + predictions.sum())
    return 2 * hits / total if total else 0.0


def pearson(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Correlation of the values, in [-1, 1] (STS-B); 0 if either side is constant."""
    return _correlation(*_pairs(truths, predictions))


def spearman(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Correlation of the ranks, in [-1, 1] (STS-B); equal values share the mean of their ranks."""
    return _correlation(*(_mean_ranks(values) for values in _pairs(truths, predictions)))


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (..., 4) as (centre x, centre y, width, height): (...)."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    low = np.maximum(first[..., :2] - first[..., 2:] / 2, second[..., :2] - second[..., 2:] / 2)
    high = np.minimum(first[..., :2] + first[..., 2:] / 2, second[..., :2] + second[..., 2:] / 2)
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    union = np.prod(first[..., 2:], axis=-1) + np.prod(second[..., 2:], axis=-1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def grounding_accuracy(truths: np.ndarray, predictions: np.ndarray) -> float:
    """Share of boxes (sample, 4) whose intersection over union with the true one is 0.5 or more (RefCOCO)."""
    truths, predictions = np.asarray(truths, float), np.asarray(predictions, float)
    if truths.shape != predictions.shape or truths.ndim != 2 or truths.shape[1] != 4 or not len(truths):
        raise ValueError(f"expected two arrays of boxes (sample, 4), found {truths.shape} and {predictions.shape}")
    return float((box_iou(truths, predictions) >= 0.5).mean())


def _two_classes(truths: Sequence[bool], predictions: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    for name, values in (("truths", truths), ("predictions", predictions)):
        if not set(np.asarray(values).ravel().tolist()) <= {0, 1}:
            raise ValueError(f"expected {name} of two classes, false and true, found {sorted(set(values))[:4]}")
    return _pairs(truths, predictions)


def _pairs(truths: Sequence[float], predictions: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    truths, predictions = np.asarray(truths, float), np.asarray(predictions, float)
    if truths.ndim != 1 or truths.shape != predictions.shape or not len(truths):
        raise ValueError(f"expected one truth and one prediction a sample, found {truths.shape} and "
                         f"{predictions.shape}")
    if not (np.isfinite(truths).all() and np.isfinite(predictions).all()):
        raise ValueError("truths or predictions hold values that are not finite")
    return truths, predictions


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).sum() / math.sqrt((first**2).sum() * (second**2).sum()))


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
