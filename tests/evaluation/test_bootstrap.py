"""Standard errors: they agree with theory, with a plain bootstrap, and are the same in every run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2.evaluation.bootstrap import Score, correlation, mean, mean_of, median, ratio_of_sums, with_errors
from mplug2.evaluation.captions import bleu, bleu_counts
from mplug2.evaluation.ranking import f1, matthews


def by_hand(metric, count: int, *columns, replicates: int = 2000) -> float:
    """A plain bootstrap: resample rows, compute the metric of each sample."""
    rng = np.random.default_rng(1)
    rows = (rng.integers(count, size=count) for _ in range(replicates))
    return float(np.std([metric(*([column[i] for i in chosen] for column in columns)) for chosen in rows]))


def test_the_error_of_a_fraction_is_that_of_the_binomial_distribution():
    values = np.arange(400) < 100
    score = with_errors({"a": mean(values)})["a"]
    assert score.value == 0.25
    assert score.error == pytest.approx(np.sqrt(0.25 * 0.75 / 400), rel=0.1)


def test_values_of_one_record_are_drawn_together():
    """Four equal answers about each image are worth one, not four."""
    values = np.repeat(np.arange(100) < 50, 4)
    together, alone = mean(values, np.repeat(np.arange(100), 4)), mean(values)
    found = with_errors({"together": together, "alone": alone})
    assert found["together"].value == found["alone"].value == 0.5
    assert found["together"].error == pytest.approx(2 * found["alone"].error, rel=0.15)


def test_records_may_have_any_names_and_any_number_of_values():
    statistic = mean([1, 1, 0, 0, 0, 1], ["b", "b", "a", "c", "c", "c"])
    assert statistic.records == 3 and statistic.value == 0.5
    assert statistic.of(np.array([[0, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 3]])) == pytest.approx([1, 0, 0.5, 1 / 3])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_a_median_by_weights_is_that_of_the_repeated_values(ranks):
    statistic = median(ranks)
    assert statistic.value == np.median(ranks)
    weights = np.array([[i % 3 for i in range(len(ranks))], [1 + i % 2 for i in range(len(ranks))]])
    weights[:, 0] += 1
    for row, found in zip(weights, statistic.of(weights)):
        assert found == np.median(np.repeat(ranks, row))


def test_medians_of_records_with_several_values():
    statistic = median([1, 5, 9], [0, 0, 1])
    assert statistic.of(np.array([[1, 1], [1, 0], [0, 2]])).tolist() == [5, 3, 9]


def test_corpus_metrics_agree_with_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    found = with_errors({"r": correlation(x, y)})["r"]
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.error == pytest.approx(by_hand(lambda a, b: np.corrcoef(a, b)[0, 1], 60, x, y), rel=0.1)

    truths, guesses = (x > 0).tolist(), (y > 0).tolist()
    for metric in (matthews, f1):
        found = with_errors({"m": metric(truths, guesses)})["m"]
        assert found.error == pytest.approx(by_hand(lambda a, b, m=metric: m(a, b).value, 60, truths, guesses), rel=0.1)

    words = ["a", "red", "seven", "moves", "left"]
    references = [[" ".join(rng.choice(words, 6))] for _ in range(60)]
    texts = [" ".join(row[0].split()[: 3 + i % 3] + ["left"] * (i % 2)) for i, row in enumerate(references)]
    counts = bleu_counts(references, texts)
    found = with_errors({"b": ratio_of_sums(counts, lambda sums: bleu(sums)[..., 3])})["b"]
    expected = by_hand(lambda rows: bleu(np.sum(rows, axis=0))[3], 60, counts, replicates=1000)
    assert found.error == pytest.approx(expected, rel=0.15)


def test_errors_are_the_same_in_every_run_and_do_not_depend_on_other_metrics():
    values = np.arange(50) % 3 == 0
    alone = with_errors({"a": mean(values)})
    assert with_errors({"a": mean(values)}) == alone
    assert with_errors({"b": median(range(50)), "a": mean(values)})["a"] == alone["a"]
    assert with_errors({"a": mean(values)}, seed=1)["a"].error != alone["a"].error


def test_a_single_record_and_a_constant_have_no_error():
    assert with_errors({"a": mean([1.0])})["a"] == Score(1.0, 0.0)
    assert with_errors({"a": mean([1, 1, 1])})["a"] == Score(1.0, 0.0)
    for constant in (2, 0):
        for sides in (([constant] * 3, [1, 2, 3]), ([1, 2, 3], [constant] * 3)):
            assert with_errors({"a": correlation(*sides)})["a"] == Score(0.0, 0.0)
    assert with_errors({}) == {}


def test_the_mean_of_galleries_has_the_error_of_a_mean():
    assert mean_of([Score(0.5, 0.3), Score(0.7, 0.4)]) == Score(pytest.approx(0.6), pytest.approx(0.25))
