"""Metrics with standard errors, from a bootstrap over records.

A `Statistic` computes a metric from weights: how often each record counts. Weights of one give the metric itself. The
bootstrap draws the weights of resampled data sets, all at once, and takes the standard deviation of the metric.
Questions about one image or video belong to one record and are drawn together: their errors are not independent.

Axes: b resampled data sets, n records.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

REPLICATES = 1000
"""Number of resampled data sets."""
MAX_WEIGHTS = 2**21
"""Weights that are in memory at a time."""


class Score(NamedTuple):
    """A metric and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Statistic:
    records: int
    of: Callable[[np.ndarray], np.ndarray]
    """Weights (b, n) to the metric of each resampled data set (b,)."""

    @property
    def value(self) -> float:
        return float(self.of(np.ones((1, self.records)))[0])


def with_errors(statistics: dict[str, Statistic], seed: int = 0) -> dict[str, Score]:
    """Each metric with its standard error. The same seed gives the same errors."""
    values: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for n in {statistic.records for statistic in statistics.values()}:
        rng, step = np.random.default_rng((seed, n)), max(1, MAX_WEIGHTS // n)
        for first in range(0, REPLICATES, step):
            b = min(step, REPLICATES - first)
            drawn = rng.integers(n, size=(b, n)) + n * np.arange(b)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=b * n).reshape(b, n).astype(float)
            for name, statistic in statistics.items():
                if statistic.records == n:
                    values[name].append(statistic.of(weights))
    return {name: Score(statistic.value, float(np.std(np.concatenate(values[name]))))
            for name, statistic in statistics.items()}


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean of independent scores, such as those of several galleries."""
    errors = np.array([score.error for score in scores])
    return Score(float(np.mean([score.value for score in scores])), float(np.sqrt((errors**2).sum()) / len(scores)))


def mean(values: Sequence[float], records: Sequence[int] | None = None) -> Statistic:
    """The mean of `values`; `records` are the numbers, from 0, of the records that they belong to."""
    records = np.arange(len(values)) if records is None else np.unique(records, return_inverse=True)[1]
    sums, counts = np.bincount(records, np.asarray(values, float)), np.bincount(records)
    return Statistic(len(counts), lambda weights: (weights @ sums) / (weights @ counts))


def ratio_of_sums(counts: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> Statistic:
    """`of` the sums of counts (n, k) over the records: (b, k) -> (b,). BLEU and F1, for example."""
    return Statistic(len(counts), lambda weights: of(weights @ counts))


def median(values: Sequence[float], records: Sequence[int] | None = None) -> Statistic:
    """The median of `values`; `records` as for `mean`."""
    records = np.arange(len(values)) if records is None else np.unique(records, return_inverse=True)[1]
    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values, float)[order]

    def of(weights: np.ndarray) -> np.ndarray:
        below = weights[:, records[order]].cumsum(axis=1)
        total = below[:, -1:]
        middle = [(below >= half).argmax(axis=1) for half in ((total + 1) // 2, total // 2 + 1)]
        return (ordered[middle[0]] + ordered[middle[1]]) / 2

    return Statistic(int(records.max()) + 1, of)


def correlation(first: Sequence[float], second: Sequence[float]) -> Statistic:
    """Pearson's correlation; 0 where either side is constant."""
    first, second = (np.asarray(values, float) - np.mean(values) * (np.ptp(values) > 0) for values in (first, second))
    columns = np.stack([np.ones_like(first), first, second, first**2, second**2, first * second], axis=1)

    def of(sums: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        var_x, var_y = xx - x**2 / n, yy - y**2 / n
        constant = (var_x <= 1e-12 * xx) | (var_y <= 1e-12 * yy)  # only rounding errors are left of the variance
        return np.where(constant, 0.0, (xy - x * y / n) / np.sqrt(np.where(constant, 1.0, var_x * var_y)))

    return ratio_of_sums(columns, of)
