"""Caption metrics against their reference implementation; all others against hand-computed values and properties."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from mplug2.data.records import Question, Record
from mplug2.data.text import Tokenizer, clean, normalize
from mplug2.evaluation.captions import CiderD, bleu, bleu_counts, cider_d, paper_captions, rouge_l
from mplug2.evaluation.chance import chance_of_boxes, most_common_answers
from mplug2.evaluation.data import EvalOptions
from mplug2.evaluation.labels import evaluate_boxes, evaluate_labels, two_class_metrics
from mplug2.evaluation.metric_names import format_table, heading, is_fraction, main_score, mean_score, metric_prefix
from mplug2.evaluation.predictions import Prediction, is_right
from mplug2.evaluation.ranking import box_iou, f1, in_top_k, matthews, pearson, ranks, retrieval, spearman
from mplug2.evaluation.vqa import exact_match, vqa_accuracy, vqa_normalize
from mplug2.evaluation.writing import evaluate_answers, evaluate_captions
from mplug2.tasks import EVALUATED, TASKS

captions = st.lists(st.sampled_from(["a", "red", "blue", "seven", "moves"]), max_size=9).map(" ".join)
"""Few words, so that n-grams are shared; often one word or none."""


@st.composite
def corpora(draw):
    """References and hypotheses of 1 to 6 samples, not all blank. Some hypotheses repeat a reference."""
    references = draw(st.lists(st.lists(captions, min_size=1, max_size=4), min_size=1, max_size=6))
    references[0][0] += draw(st.sampled_from([" red", " a red", " a red seven moves"]))
    return references, [draw(captions | st.sampled_from(texts)) for texts in references]


def as_coco(references, hypotheses):
    return dict(enumerate(references)), {index: [text] for index, text in enumerate(hypotheses)}


@settings(max_examples=40, deadline=None)
@given(corpora())
def test_bleu_equals_the_coco_evaluation(corpus):
    expected, _ = Bleu(4).compute_score(*as_coco(*corpus), verbose=0)
    np.testing.assert_allclose(bleu(bleu_counts(*corpus).sum(axis=0)), expected, rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(corpora())
def test_cider_d_equals_the_coco_evaluation(corpus):
    expected_mean, expected = Cider().compute_score(*as_coco(*corpus))
    scores = cider_d(*corpus)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
    assert scores.mean() == pytest.approx(expected_mean, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(corpora())
def test_rouge_l_equals_the_coco_evaluation(corpus):
    references, hypotheses = corpus
    # The reference counts an empty caption as one empty word, which could match another one: replace them.
    references = [[" ".join(text.split()) for text in texts if text.strip()] or ["a"] for texts in references]
    hypotheses = [" ".join(text.split()) or "x" for text in hypotheses]
    expected, _ = Rouge().compute_score(*as_coco(references, hypotheses))
    assert np.mean(rouge_l(references, hypotheses)) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_by_hand():
    assert rouge_l([["a red seven moves"]], ["a seven moves"]) == pytest.approx([2.44 * 0.75 / (0.75 + 1.44)])
    assert rouge_l([["a red seven"]], [""]) == [0]


CAPTIONS = (
    [["A man is riding a horse.", "Man rides horse"], ["Two dogs run, fast!"]], ["a man rides a horse", "two dogs"],
)


@pytest.mark.slow
def test_the_pipeline_of_the_papers():
    """Runs the pipeline where there is Java; elsewhere the error says that it is missing."""
    if shutil.which("java") is None:
        with pytest.raises(ValueError, match="there is no `java`"):
            paper_captions(*CAPTIONS)
        return
    found = paper_captions(*CAPTIONS)
    assert set(found) == {"bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider"}
    # The tokenizer lower-cases and drops punctuation: the rest is scored like with the functions above.
    tokens = [["a man is riding a horse", "man rides horse"], ["two dogs run fast"]], CAPTIONS[1]
    assert found["cider"] == pytest.approx(cider_d(*tokens).mean(), abs=1e-9)
    assert found["bleu4"] == pytest.approx(bleu(bleu_counts(*tokens).sum(axis=0))[3], abs=1e-9)
    assert found["rouge_l"] == pytest.approx(np.mean(rouge_l(*tokens)), abs=1e-9)
    assert 0.2 < found["meteor"] < 0.7
    assert paper_captions([[text] for text in PERFECT["Chinese"]], PERFECT["Chinese"])["cider"] > 5
    accents = [["un café près du pâté"], ["two men walk here"]]  # which no model here can write
    assert paper_captions(accents, ["un cafe pres du pate", "two men walk here"])["bleu4"] > 0.999


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="the pipeline of the papers needs Java")
def test_a_line_break_in_a_caption_does_not_shift_the_others():
    """The tokenizer of the papers' pipeline takes one caption per line."""
    breaks = iter("\n\r\v\f\x85\u2028\u2029")

    def broken(text: str) -> str:
        """The text with line breaks in place of its blanks, until every kind has been used."""
        return re.sub(" ", lambda _: next(breaks, " "), text)

    references = [[broken(text) for text in texts] for texts in CAPTIONS[0]]
    predictions = [broken(text) for text in CAPTIONS[1]]
    assert next(breaks, None) is None
    assert paper_captions(references, predictions) == paper_captions(*CAPTIONS)


def test_answers_with_capitals_can_be_right_for_all_annotators():
    """The official code compares answers as they are if all annotators agree, and a model writes lower case only."""
    record = SimpleNamespace(id="1", video=None, image=Path("a.png"), images=(),
                             qa=(Question("where is it", ("Köln",) * 10),))
    predictor = SimpleNamespace(answer=lambda *_, **__: ["koln"], is_main=True)
    scores, _ = evaluate_answers(predictor, "image_qa", SimpleNamespace(records=lambda _: [record]), EvalOptions())
    assert scores["vqa_accuracy"].value == 1


def test_captions_are_scored_by_their_metrics_and_the_papers_pipeline_gets_them_raw(monkeypatch):
    references, texts = [["A red seven, moving."], ["a blue one moves up", "up!"]], ["a red seven up", "a blue one"]
    records = [Record(f"{n}", f"{n}", "", image=Path(f"{n}.png"), captions=tuple(own))
               for n, own in enumerate(references)]
    data = SimpleNamespace(records=lambda _: records)
    predictor = SimpleNamespace(caption=lambda *_, **__: texts, is_main=True)
    monkeypatch.setattr("mplug2.evaluation.writing.paper_captions", lambda given, _: {"bleu1": given == references})
    scores, _ = evaluate_captions(predictor, "image_caption", data, EvalOptions(paper_captions=True))
    cleaned = [list(map(normalize, own)) for own in references]
    assert scores["caption_bleu4"].value == pytest.approx(bleu(bleu_counts(cleaned, texts).sum(axis=0))[3])
    assert scores["caption_cider"].value == pytest.approx(cider_d(cleaned, texts).mean())
    assert scores["caption_paper_bleu1"].value == 1


def test_questions_about_one_image_are_one_record_of_the_standard_error():
    """All answers about the first image are right, all about the second are wrong: two observations, not 100."""
    records = [SimpleNamespace(id=name, video=None, image=Path(f"{name}.png"), images=(),
                               qa=(Question("where is it", (name,) * votes, "place"),) * 50)
               for name, votes in (("left", 10), ("right", 1))]
    predictor = SimpleNamespace(answer=lambda *_, **__: ["left"] * 100, is_main=True)
    scores, _ = evaluate_answers(predictor, "image_qa", SimpleNamespace(records=lambda _: records), EvalOptions())
    assert "vqa_accuracy" not in scores  # only some of the questions have ten answers
    for name in ("qa_accuracy", "qa_place"):
        assert scores[name].value == 0.5 and scores[name].error == pytest.approx(0.5**1.5, rel=0.1)


PERFECT = {"Chinese": ["一只狗在草地上奔跑", "两只猫在睡觉"], "Japanese": ["犬が走っている。", "猫がねている。"],
           "Korean": ["개가 풀밭에서 달린다", "고양이 두 마리가 자고 있다"],
           "Thai": ["สุนัขวิ่งบนหญ้า", "แมวสองตัวกำลังนอนหลับ"],
           "German": ["Der Hund läuft über das Gras", "Zwei Kätzchen schlafen hier"]}


@pytest.mark.parametrize("language", PERFECT)
def test_a_perfect_model_has_perfect_scores_in_every_script(language):
    """From the tokens of the training text through the decoder's text to every metric."""
    texts = PERFECT[language]
    tokenizer = Tokenizer.train([clean(text) for text in texts], 200)
    written = tokenizer.decode(tokenizer.encode([clean(text) for text in texts])[0])
    references = [[normalize(text)] for text in texts]
    assert exact_match([[text] for text in texts], written) == rouge_l(references, list(map(normalize, written)))
    assert exact_match([[text] for text in texts], written) == [True, True]
    assert cider_d(references, list(map(normalize, written))).mean() > 5
    assert bleu(bleu_counts(references, written).sum(axis=0))[0] > 0.999
    lower = [text.rstrip("。").lower() for text in texts]
    assert vqa_accuracy([[text] * 10 for text in lower], written) == [1, 1]
    assert vqa_accuracy([[text] * 9 + ["x"] for text in lower], written) == [1, 1]


def test_the_metrics_of_the_papers_are_those_of_pycocoevalcap(monkeypatch, capsys):
    """With another tokenizer and another METEOR, so that it runs without Java."""
    split = SimpleNamespace(tokenize=lambda texts: {i: [one["caption"] for one in of] for i, of in texts.items()})
    monkeypatch.setattr("pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer", lambda: split)
    meteor = SimpleNamespace(compute_score=lambda *_: (0.25, []))
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", lambda: meteor)
    monkeypatch.setattr(shutil, "which", {"java": "/usr/bin/java"}.get)
    references, texts = [["a red seven moves", "a seven"], ["a blue one"]], ["a red seven", "a blue two"]
    found = paper_captions(references, texts)
    own = bleu(bleu_counts(references, texts).sum(axis=0))
    assert [found.pop(f"bleu{n}") for n in (1, 2, 3, 4)] == pytest.approx(own.tolist())
    truths, written = {0: references[0], 1: references[1]}, {0: texts[:1], 1: texts[1:]}
    assert found == {"meteor": 0.25, "rouge_l": pytest.approx(np.mean(rouge_l(references, texts))),
                     "cider": pytest.approx(Cider().compute_score(truths, written)[0])}
    assert capsys.readouterr().out == ""


def test_the_pipeline_of_the_papers_names_what_it_needs(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="there is no `java`: install a Java runtime, or leave the flag out"):
        paper_captions(*CAPTIONS)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    with pytest.raises(ValueError, match=r"pip install mplug2\[eval\]"):
        paper_captions(*CAPTIONS)


@settings(max_examples=20, deadline=None)
@given(corpora(), st.data())
def test_cider_d_keeps_the_document_frequencies_of_its_corpus(corpus, data):
    """Any batch of samples gets the scores that these samples have in the whole corpus."""
    references, hypotheses = corpus
    batch = data.draw(st.lists(st.integers(0, len(references) - 1), min_size=1, max_size=8))
    scores = CiderD(references).scores([references[i] for i in batch], [hypotheses[i] for i in batch])
    np.testing.assert_array_equal(scores, cider_d(references, hypotheses)[batch])


def test_caption_metrics_of_perfect_and_hopeless_captions():
    references = [["a red seven moves left"], ["the blue two grows very slowly"]]
    perfect, hopeless = [texts[0] for texts in references], ["x y z v w", "x y z v w"]
    assert bleu(bleu_counts(references, perfect).sum(axis=0)) == pytest.approx([1, 1, 1, 1])
    assert cider_d(references, perfect) == pytest.approx([10, 10])
    assert bleu(bleu_counts(references, hopeless).sum(axis=0)) == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert cider_d(references, hopeless).tolist() == [0, 0]


@pytest.mark.parametrize("metric", [bleu_counts, cider_d, rouge_l, exact_match, vqa_accuracy, paper_captions])
def test_lists_that_do_not_fit_are_refused(metric):
    with pytest.raises(ValueError, match="2 lists of references but 1 predictions"):
        metric([["a"], ["b"]], ["a"])
    with pytest.raises(ValueError, match=r"sample 1: found \[\], expected a non-empty list"):
        metric([["a"], []], ["a", "b"])
    with pytest.raises(ValueError, match="sample 0: found 'yes', expected a non-empty list of reference strings"):
        metric(["yes"], ["yes"])
    with pytest.raises(ValueError, match="no samples to score"):
        metric([], [])


@pytest.mark.parametrize("text, expected", [
    ("  The RED,\tseven! ", "the red seven"),
    ("it's the dogs’ ball", "its the dogs ball"),
    ("it’s", "its"),
    ("left-to-right (slowly)", "left to right slowly"),
    ("snake_case", "snake case"),
    ("Café cafe\u0301 naïve", "cafe cafe naive"),
    ("日本 한국 7½", "日 本 한국 7½"),
    ("...", ""),
])
def test_normalize(text, expected):
    assert normalize(text) == expected


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_normalize_is_idempotent(text):
    assert normalize(normalize(text)) == normalize(text)


def test_exact_match():
    answers = [["yes"], ["seven", "The number 7!"], ["left"], ["it's red"]]
    assert exact_match(answers, [" Yes.", "the number 7", "right", "its red"]) == [True, True, False, True]
    assert exact_match(answers, ["yes no", "number 7", "", "red"]) == [False] * 4


def retrieval_values(similarity, positives) -> dict[str, float]:
    return {name: statistic.value for name, statistic in retrieval(ranks(similarity, positives)).items()}


def test_retrieval_by_hand():
    similarity = np.array([[0.9, 0.1, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4], [0.7, 0.8, 0.8, 0.1]])
    positives = np.zeros((3, 4), bool)
    positives[0, 0] = positives[1, 1] = positives[2, 2] = True
    assert ranks(similarity, positives).tolist() == [1, 3, 2]  # the last one is a tie
    assert retrieval_values(similarity, positives) == {"r1": pytest.approx(1 / 3), "r5": 1, "r10": 1, "median_rank": 2}
    positives[1, 3] = True  # now the better of two positives has rank 1
    assert ranks(similarity, positives).tolist() == [1, 1, 2]
    positives[2, 1] = True  # and the tie is between two positives
    assert ranks(similarity, positives).tolist() == [1, 1, 1]


def test_retrieval_counts_the_top_one_five_and_ten():
    similarity = np.tile(-np.arange(12.0), (12, 1))  # the positive of query i has rank i + 1
    expected = {"r1": 1 / 12, "r5": 5 / 12, "r10": 10 / 12, "median_rank": 6.5}
    assert retrieval_values(similarity, np.eye(12, dtype=bool)) == pytest.approx(expected)


@st.composite
def galleries(draw):
    """Similarities with many ties, and at least one positive per query."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 14)))
    similarity = draw(arrays.arrays(np.float32, shape, elements=st.integers(-3, 3)))
    positives = draw(arrays.arrays(bool, shape))
    for row in positives:
        row[draw(st.integers(0, shape[1] - 1))] = True
    return similarity, positives


@settings(max_examples=40, deadline=None)
@given(galleries(), st.randoms(use_true_random=False))
def test_properties_of_retrieval(gallery, random):
    similarity, positives = gallery
    scores = retrieval_values(similarity, positives)
    assert 0 <= scores["r1"] <= scores["r5"] <= scores["r10"] <= 1
    assert 1 <= scores["median_rank"] <= similarity.shape[1]
    assert scores["median_rank"] == np.median(ranks(similarity, positives))
    rows, columns = (random.sample(range(size), size) for size in similarity.shape)
    # The order does not matter.
    assert retrieval_values(similarity[rows][:, columns], positives[rows][:, columns]) == pytest.approx(scores)
    assert retrieval_values(similarity * 2 + 1, positives) == scores  # only the ranking counts
    assert ranks(similarity + 10 * positives, positives).tolist() == [1] * len(similarity)


@settings(max_examples=15, deadline=None)
@given(st.integers(11, 40), st.floats(-1, 1))
def test_a_constant_similarity_finds_nothing(size, value):
    scores = retrieval_values(np.full((size, size), value), np.eye(size, dtype=bool))
    assert scores == {"r1": 0, "r5": 0, "r10": 0, "median_rank": size}


def test_retrieval_errors():
    square = np.eye(3)
    with pytest.raises(ValueError, match=r"similarity \(3, 3\) and positives \(3, 2\)"):
        ranks(square, np.ones((3, 2), bool))
    with pytest.raises(ValueError, match="non-empty"):
        ranks(np.zeros((0, 3)), np.zeros((0, 3), bool))
    with pytest.raises(ValueError, match="found positives of type float64: expected bool"):
        ranks(square, square)
    with pytest.raises(ValueError, match="query 2 has no positive item"):
        ranks(square, np.diag([True, True, False]))
    with pytest.raises(ValueError, match="query 1 contain NaN"):
        ranks(np.diag([0, np.nan, 0]), square.astype(bool))


def test_vqa_accuracy_by_hand():
    """Leaving one annotator out, with h that agree: h times min(1, (h - 1) / 3) and 10 - h times min(1, h / 3)."""
    by_hits = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1, 9: 1, 10: 1}
    for hits, expected in by_hits.items():
        answers = ["yes"] * hits + [f"no {k}" for k in range(10 - hits)]
        assert vqa_accuracy([answers], ["yes"]) == pytest.approx([expected]), hits
    assert vqa_accuracy([["yes"] * 10, ["no"] * 10], ["yes", "yes"]) == [1, 0]


def test_vqa_accuracy_normalizes_as_the_official_evaluation():
    """Since March 2021: both sides in full, unless all annotators agree; then neither side."""
    assert vqa_accuracy([["2"] * 4 + ["dont know"] * 6], [" Two\n"]) == [1]
    assert vqa_accuracy([["two"] * 4 + ["a cat"] * 6], ["2"]) == [1]
    assert vqa_accuracy([["don't know"] * 5 + ["no"] * 5], ["Dont know"]) == [1]
    assert vqa_accuracy([["the dog"] * 5 + ["a dog."] * 5], ["dog"]) == [1]
    assert vqa_accuracy([["a dog"] * 10], ["a dog"]) == vqa_accuracy([["t-shirt"] * 10], [" t-shirt\n"]) == [1]
    assert vqa_accuracy([["2"] * 10], ["two"]) == vqa_accuracy([["a dog"] * 10], ["dog"]) == [0]
    assert vqa_accuracy([["t-shirt"] * 9 + ["shirt"]], ["t-shirt"]) == [1]


@pytest.mark.parametrize("text, expected", [
    ("The two dogs", "2 dogs"),
    ("none", "0"),
    ("Whats that?", "what's that"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("1,000 people", "1000 people"),
    ("3.5 m.", "3.5 m"),
    ("u.s.", "us"),
    ("t-shirt", "t shirt"),
    ("an x-ray - or the t-shirt", "xray or tshirt"),  # a mark at the edge of a word is removed everywhere
    ("一只 red狗", "一 只 red 狗"),
    ("wont", "won't"),
    ("couldn'tve", "couldn't've"),
    ("yall'd've", "y'all'd've"),
    ("ows'at", "ows'at"),
    ("somebody'd", "somebodyd"),
    ("im shes let's", "im shes let's"),
    ("a\tb\n- c", "b c"),
    ("a", ""),
])
def test_vqa_normalize(text, expected):
    assert vqa_normalize(text) == expected


def test_top_k():
    scores = np.array([[0.1, 0.9, 0.5, 0.0], [0.3, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
    assert in_top_k(scores, [2, 0, 3], 1).tolist() == [False] * 3  # the second sample ties with a wrong class
    assert in_top_k(scores, [2, 0, 3], 2).tolist() == [True, True, False]
    assert in_top_k(scores, [2, 0, 3], 4).all()
    assert in_top_k(scores, [1, 0, 0], 1).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="sample 1: label 4 is not one of the 4 classes"):
        in_top_k(scores, [0, 4, 0], 1)
    with pytest.raises(ValueError, match=r"found scores \(3, 4\) and labels \(2,\)"):
        in_top_k(scores, [0, 1], 1)
    with pytest.raises(ValueError, match="sample 2 contain NaN"):
        in_top_k(np.array([[0.0], [0.0], [np.nan]]), [0, 0, 0], 1)


two_classes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(two_classes)
def test_matthews_and_f1_by_their_definitions(pairs):
    truths, found = zip(*pairs)
    tp, tn = sum(t and p for t, p in pairs), sum(not t and not p for t, p in pairs)
    fp, fn = sum(p and not t for t, p in pairs), sum(t and not p for t, p in pairs)
    below = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert matthews(truths, found).value == pytest.approx((tp * tn - fp * fn) / below if below else 0, abs=1e-12)
    precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert f1(truths, found).value == pytest.approx(expected, abs=1e-12)


def test_the_f1_of_two_classes_is_that_of_the_class_without_not_in_any_order():
    """Three of four predictions say "x", and two of them are right."""
    truths, found = ["x", "x", "not_x", "not_x"], ["x", "x", "x", "not_x"]
    for classes in (("x", "not_x"), ("not_x", "x")):
        assert two_class_metrics(truths, found, classes)["f1"].value == pytest.approx(0.8)
    assert set(two_class_metrics(["a"], ["b"], ["a", "b"])) == {"matthews"}
    assert two_class_metrics(["a"], ["b"], ["a", "b", "c"]) == {}


def test_more_than_two_classes_are_refused():
    with pytest.raises(ValueError, match=r"found the truths \[0, 1, 2\]: expected two classes"):
        matthews([0, 1, 2], [0, 1, 1])
    with pytest.raises(ValueError, match=r"found the predictions \[0, 0.5\]: expected two classes"):
        f1([0, 1], [0, 0.5])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=20))
def test_pearson_and_spearman_by_their_definitions(pairs):
    first, second = map(np.array, zip(*pairs))

    def ranks(values):
        return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

    constant = np.ptp(first) == 0 or np.ptp(second) == 0
    assert pearson(first, second).value == pytest.approx(0 if constant else np.corrcoef(first, second)[0, 1], abs=1e-9)
    expected = 0 if constant else np.corrcoef(ranks(first), ranks(second))[0, 1]
    assert spearman(first, second).value == pytest.approx(expected, abs=1e-9)
    monotone = spearman(first**3, second * 2 + 1)
    assert spearman(first, second).value == pytest.approx(monotone.value, abs=1e-9)


def test_correlations_refuse_unequal_lengths_and_nan():
    with pytest.raises(ValueError, match=r"found truths \(2,\) and predictions \(3,\)"):
        pearson([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not finite"):
        spearman([1, 2], [1, float("nan")])


def test_boxes_by_hand():
    box = [0.5, 0.5, 0.4, 0.4]
    pairs = [  # half of each box overlaps in the second pair; the last boxes have no area
        (box, box, 1), (box, [0.7, 0.5, 0.4, 0.4], 1 / 3), (box, [0.1, 0.1, 0.1, 0.1], 0),
        (box, [0.5, 0.5, 0.2, 0.4], 0.5), ([0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], 0),
    ]
    truths, found, expected = zip(*pairs)
    assert box_iou(truths, found) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"shapes \(5, 4\) and \(3, 4\): expected two arrays"):
        box_iou(truths, found[:3])
    for boxes in (np.zeros((2, 3)), np.zeros(4), np.zeros((0, 4)), np.zeros((1, 4, 4))):
        with pytest.raises(ValueError, match=r"expected two arrays \(sample, 4\)"):
            box_iou(boxes, boxes)


def test_a_box_that_overlaps_by_exactly_one_half_is_right_wherever_it_is_counted(tmp_path):
    """In the metric, in predictions.jsonl, and in the baseline that answers with the mean box."""
    true, half, less = (0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.25, 0.5), (0.5, 0.5, 0.125, 0.5)
    assert [is_right("grounding", box, [true]) for box in (half, less)] == [True, False]
    records = [Record(f"{n}", f"{n}", f"a:{n}", tmp_path / "a.png", text="it", box=true) for n in (1, 2)]
    predictor = SimpleNamespace(is_main=True, predict_boxes=lambda *_: [torch.tensor(half), torch.tensor(less)])
    data = SimpleNamespace(records=lambda task: records)
    assert evaluate_boxes(predictor, "grounding", data, None)[0]["accuracy"].value == 0.5
    wide = [SimpleNamespace(box=(0.5, 0.5, width, 0.5)) for width in (0.5, 1.5)]  # the mean is 1 wide
    assert chance_of_boxes("grounding", wide, None)["accuracy"] == 1
    wide = [SimpleNamespace(box=(0.5, 0.5, width, 0.5)) for width in (0.2, 0.2, 0.8)]  # the mean is 0.4 wide
    assert chance_of_boxes("grounding", wide, None)["iou"] == pytest.approx(0.5)


@pytest.mark.parametrize("count, label, scored", [(5, "a", False), (6, "a", True), (6, "another", False)])
def test_more_than_five_known_classes_have_a_top_5_accuracy(tmp_path, count, label, scored):
    classes = tuple("abcdef"[:count])
    outputs = [torch.arange(count, 0, -1), torch.arange(count)]  # "a" is the first of them, and the last
    predictor = SimpleNamespace(is_main=True, read=lambda *_: outputs,
                                model=SimpleNamespace(classes={"text_classification": classes}))
    records = [Record(f"{n}", f"{n}", f"a:{n}", text="it", label=one) for n, one in enumerate(("a", label))]
    data = SimpleNamespace(records=lambda task: records)
    scores, predictions = evaluate_labels(predictor, "text_classification", data, None)
    assert scores["accuracy"].value == 0.5 and [one.prediction for one in predictions] == ["a", classes[-1]]
    assert scores["top5"].value == 0.5 if scored else "top5" not in scores


def test_a_line_of_predictions_keeps_four_digits_of_boxes_and_any_confidence():
    line = Prediction("grounding", (), "it", (0.123449, 0.5, 0.25, 1.0), (), "1").line("test")
    assert line["prediction"] == [0.1234, 0.5, 0.25, 1.0] and "confidence" not in line
    assert Prediction("text_classification", (), "it", "a", (), "1", 0.0).line("test")["confidence"] == 0.0


def test_the_first_of_equally_common_answers_is_that_of_the_alphabet():
    questions = [Question("who", (answer,)) for answer in ("red", "green", "blue", "green", "blue")]
    assert most_common_answers(questions, lambda _: "all") == {"all": "blue"}


def test_fractions_are_all_metrics_except_cider_and_ranks():
    names = [f"{prefix}caption_{name}" for prefix in ("", "image_") for name in ("exact", "bleu4", "rouge_l")]
    names += ["qa_order", "t2i_r1", "i2t_r1_rerank", "visual_entailment_accuracy", "grounding_iou"]
    assert all(map(is_fraction, names))
    others = ["caption_cider", "image_caption_cider", "caption_paper_cider", "t2v_median_rank", "i2t_median_rank"]
    assert not any(map(is_fraction, others))
    assert mean_score({"qa_order": 0.5, "t2v_r1": 0.25, "caption_cider": 9, "v2t_median_rank": 7}) == 0.375
    assert mean_score({"qa_order": 0.5, "t2v_r1": float("nan")}) == 0.5
    assert mean_score({"caption_cider": 9}) is None


def test_the_best_checkpoint_is_that_of_the_main_metric_of_the_task():
    metrics = {"caption_cider": 4.0, "caption_exact": 0.9, "t2v_r1": 0.5, "t2v_r10": 1.0, "t2v_median_rank": 3.0}
    assert main_score(metrics, ["video_caption"]) == pytest.approx(0.4)
    assert main_score(metrics, ["video_retrieval"]) == 0.5
    assert main_score(metrics, ["video_caption", "video_retrieval", "grounding"]) == pytest.approx(0.45)
    assert main_score(metrics, ["pretrain"]) == mean_score(metrics) == pytest.approx(0.8)
    assert main_score(metrics, ["video_caption"], "t2v_r10") == 1.0
    assert main_score(metrics, ["video_caption"], "t2v_median_rank") == -3.0  # a lower rank is better
    assert main_score(metrics, ["video_caption"], "qa_accuracy") is None and main_score({}, ["video_qa"]) is None


@pytest.mark.parametrize("name, expected", [
    ("qa_order", "Answers by kind of question, videos"), ("vqa_accuracy", "Answers by kind of question, videos"),
    ("image_qa_digit", "Answers by kind of question, images"), ("caption_cider", "Captions, videos"),
    ("image_caption_exact", "Captions, images"), ("t2v_r1", "Retrieval, videos"), ("i2t_r1", "Retrieval, images"),
    ("t2i_median_rank", "Retrieval, images"), ("image_classification_accuracy", "Classes, labels, and boxes"),
    ("grounding_iou", "Classes, labels, and boxes"),
])
def test_every_metric_has_a_heading(name, expected):
    assert heading(name) == expected


def test_every_main_metric_of_the_table_has_the_prefix_of_its_task():
    for task in EVALUATED:
        assert TASKS[task].metric.startswith(metric_prefix(task)), task


def test_a_table_has_a_column_per_split_and_blanks_where_a_split_has_no_number():
    text = format_table({"test": {"caption_cider": 1.25, "qa_order": 0.955}, "combos": {"qa_order": 0.5}})
    assert text.splitlines() == [
        "                              test    combos",
        "caption_cider                1.250          ",
        "qa_order                      95.5      50.0",
    ]


def test_columns_are_as_wide_as_the_names_of_their_splits():
    printed = format_table({"test": {"t2v_r1": 0.5}, "test_shuffled": {"t2v_r1": 0.25, "t2v_median_rank": 3.0}})
    assert [line.split() for line in printed.splitlines()] == [
        ["test", "test_shuffled"], ["t2v_r1", "50.0", "25.0"], ["t2v_median_rank", "3.0"],
    ]
