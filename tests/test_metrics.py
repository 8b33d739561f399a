"""Caption metrics against their reference implementation, exact match and retrieval against hand values and laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from mplug2.metrics import CiderD, bleu, cider_d, exact_match, normalise, retrieval

captions = st.lists(st.sampled_from(["a", "red", "blue", "seven", "moves"]), max_size=9).map(" ".join)
"""Few words, so that n-grams are shared; often one word or none."""


@st.composite
def corpora(draw):
    """References and hypotheses of 1 to 6 samples, some of whose hypotheses repeat a reference; not all blank."""
    references = draw(st.lists(st.lists(captions, min_size=1, max_size=4), min_size=1, max_size=6))
    references[0][0] += draw(st.sampled_from([" red", " a red", " a red seven moves"]))
    return references, [draw(captions | st.sampled_from(texts)) for texts in references]


def as_coco(references, hypotheses):
    return dict(enumerate(references)), {index: [text] for index, text in enumerate(hypotheses)}


@settings(max_examples=100, deadline=None)
@given(corpora())
def test_bleu_equals_the_coco_evaluation(corpus):
    expected, _ = Bleu(4).compute_score(*as_coco(*corpus), verbose=0)
    np.testing.assert_allclose(bleu(*corpus), expected, rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(corpora())
def test_cider_d_equals_the_coco_evaluation(corpus):
    expected_mean, expected = Cider().compute_score(*as_coco(*corpus))
    mean, scores = cider_d(*corpus)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
    assert mean == pytest.approx(expected_mean, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(corpora(), st.data())
def test_cider_d_keeps_the_document_frequencies_of_its_corpus(corpus, data):
    """Scoring any batch of samples gives what these samples score within the whole corpus."""
    references, hypotheses = corpus
    batch = data.draw(st.lists(st.integers(0, len(references) - 1), min_size=1, max_size=8))
    scores = CiderD(references).scores([references[i] for i in batch], [hypotheses[i] for i in batch])
    np.testing.assert_array_equal(scores, cider_d(references, hypotheses)[1][batch])


def test_caption_metrics_of_perfect_and_hopeless_captions():
    references = [["a red seven moves left"], ["the blue two grows very slowly"]]
    perfect, hopeless = [texts[0] for texts in references], ["x y z v w", "x y z v w"]
    assert bleu(references, perfect) == pytest.approx([1, 1, 1, 1])
    assert cider_d(references, perfect)[0] == pytest.approx(10)
    assert bleu(references, hopeless) == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert cider_d(references, hopeless)[0] == 0


@pytest.mark.parametrize("metric", [bleu, cider_d, exact_match])
def test_lists_that_do_not_fit_are_refused(metric):
    with pytest.raises(ValueError, match="2 lists of references but 1 predictions"):
        metric([["a"], ["b"]], ["a"])
    with pytest.raises(ValueError, match="sample 1: expected a non-empty list"):
        metric([["a"], []], ["a", "b"])
    with pytest.raises(ValueError, match="sample 0: expected a non-empty list of reference strings, found 'yes'"):
        metric(["yes"], ["yes"])
    with pytest.raises(ValueError, match="no samples to score"):
        metric([], [])


@pytest.mark.parametrize("text, expected", [
    ("  The RED,\tseven! ", "the red seven"),
    ("it's the dogs’ ball", "its the dogs ball"),
    ("left-to-right (slowly)", "left to right slowly"),
    ("snake_case", "snake case"),
    ("Café cafe\u0301 naïve", "cafe cafe naive"),
    ("日本 한국 7½", "日本 한국 7½"),
    ("...", ""),
])
def test_normalise(text, expected):
    assert normalise(text) == expected


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_normalise_changes_nothing_the_second_time(text):
    assert normalise(normalise(text)) == normalise(text)


def test_exact_match():
    answers = [["yes"], ["seven", "The number 7!"], ["left"], ["it's red"]]
    assert exact_match(answers, [" Yes.", "the number 7", "right", "its red"]) == 0.75
    assert exact_match(answers, ["yes no", "number 7", "", "red"]) == 0


def test_retrieval_by_hand():
    similarity = np.array([[0.9, 0.1, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4], [0.7, 0.8, 0.8, 0.1]])
    positives = np.zeros((3, 4), bool)
    positives[0, 0] = positives[1, 1] = positives[2, 2] = True  # ranks 1, 3, and 2 (a tie)
    assert retrieval(similarity, positives) == {"r1": pytest.approx(1 / 3), "r5": 1, "r10": 1, "median_rank": 2}
    positives[1, 3] = True  # now the best of two positives has rank 1
    assert retrieval(similarity, positives) == {"r1": pytest.approx(2 / 3), "r5": 1, "r10": 1, "median_rank": 1}
    positives[2, 1] = True  # and the tie is one between positives
    assert retrieval(similarity, positives)["r1"] == 1


def test_retrieval_counts_the_top_one_five_and_ten():
    similarity = np.tile(-np.arange(12.0), (12, 1))  # the positive of query i has rank i + 1
    expected = {"r1": 1 / 12, "r5": 5 / 12, "r10": 10 / 12, "median_rank": 6.5}
    assert retrieval(similarity, np.eye(12, dtype=bool)) == pytest.approx(expected)


@st.composite
def galleries(draw):
    """Similarities with many ties, and at least one positive a query."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 14)))
    similarity = draw(arrays.arrays(np.float32, shape, elements=st.integers(-3, 3)))
    positives = draw(arrays.arrays(bool, shape))
    for row in positives:
        row[draw(st.integers(0, shape[1] - 1))] = True
    return similarity, positives


@settings(max_examples=100, deadline=None)
@given(galleries(), st.randoms(use_true_random=False))
def test_retrieval_laws(gallery, random):
    similarity, positives = gallery
    scores = retrieval(similarity, positives)
    assert 0 <= scores["r1"] <= scores["r5"] <= scores["r10"] <= 1
    assert 1 <= scores["median_rank"] <= similarity.shape[1]
    rows, columns = (random.sample(range(size), size) for size in similarity.shape)
    assert retrieval(similarity[rows][:, columns], positives[rows][:, columns]) == scores  # order says nothing
    assert retrieval(similarity * 2 + 1, positives) == scores  # only the ranking counts
    lifted = retrieval(similarity + 10 * positives, positives)
    assert lifted == {"r1": 1, "r5": 1, "r10": 1, "median_rank": 1}


@settings(max_examples=30, deadline=None)
@given(st.integers(11, 40), st.floats(-1, 1))
def test_a_constant_similarity_finds_nothing(size, value):
    scores = retrieval(np.full((size, size), value), np.eye(size, dtype=bool))
    assert scores == {"r1": 0, "r5": 0, "r10": 0, "median_rank": size}


def test_retrieval_errors():
    square = np.eye(3)
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(3, 2\)"):
        retrieval(square, np.ones((3, 2), bool))
    with pytest.raises(ValueError, match="non-empty"):
        retrieval(np.zeros((0, 3)), np.zeros((0, 3), bool))
    with pytest.raises(ValueError, match="expected bool positives, found float64"):
        retrieval(square, square)
    with pytest.raises(ValueError, match="query 2 has no positive item"):
        retrieval(square, np.diag([True, True, False]))
    with pytest.raises(ValueError, match="query 1 hold NaN"):
        retrieval(np.diag([0, np.nan, 0]), square.astype(bool))
