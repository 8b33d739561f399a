"""The cards of a report: which predictions count as right, and what a card says. `test_report.py` looks at a page."""

import pytest

from mplug2.tools import cards
from mplug2.tools.cards import mistake_cards, prediction_row, right, sample_cards


def prediction(task: str, text, truth: list, **more) -> dict:
    return {"task": task, "prediction": text, "truth": truth, **more}


@pytest.mark.parametrize("one, expected", [
    (prediction("video_qa", "two", ["Two.", "2"]), True), (prediction("video_qa", "two", ["three"]), False),
    (prediction("video_qa", "yes", ["Yes"]), True), (prediction("video_qa", "yes", ["no"], right=True), True),
    (prediction("image_retrieval", "a.b", ["a b"]), False),
    (prediction("video_qa", "two", []), None), (prediction("text_classification", 1.5, [1.5]), None),
    (prediction("grounding", [0.5, 0.5, 0.4, 0.4], [[0.5, 0.5, 0.4, 0.3]]), True),
    (prediction("grounding", [0.5, 0.5, 0.4, 0.4], [[0.5, 0.5, 0.1, 0.1]]), False),
])
def test_right_is_what_the_metrics_count_as_right(one, expected):
    assert right(one) is expected


def test_the_confidence_of_a_box_is_shown_as_its_overlap_and_that_of_a_class_as_its_probability():
    box = [0.5, 0.5, 0.4, 0.4]
    line = prediction("grounding", box, [box], question="<the box>", confidence=0.125)
    assert "&lt;the box&gt;" in prediction_row(line) and "<span class=faint>overlap 88%</span>" in prediction_row(line)
    row = prediction_row(prediction("video_qa", "two", ["three"], question="", confidence=0.125))
    assert "probability 12%" in row and "(three)" in row
    assert "%" not in prediction_row(prediction("text_classification", 1.5, [2.5], question="", confidence=1.0))


def test_mistakes_are_wrong_predictions_of_each_task_and_the_most_confident_first(monkeypatch):
    """Of three tasks, a third of the cards each, rounded up. Records without truth are no mistakes."""
    monkeypatch.setattr(cards, "card", lambda lines: f"{lines[0]['prediction']}.")
    lines = [prediction(task, f"{task} {i}", truth, media=[], confidence=i / 10)
             for task in ("text_classification", "text_pair_classification", "text_qa")
             for i in range(5) for truth in (["right"], [])]
    shown = mistake_cards(lines, None)
    expected = [f"{task} {i}." for task in ("text_qa", "text_classification", "text_pair_classification")
                for i in (4, 3, 2)]
    assert sorted("".join(expected)) == sorted(shown[shown.index("<div class=grid>") + 16: -6])
    assert all(first in shown for first in expected) and "15 of 30 predictions are wrong" in shown


def test_only_some_cards_have_the_attention_of_the_words(monkeypatch):
    monkeypatch.setattr(cards, "card", lambda lines, attention: attention or "-")
    monkeypatch.setattr(cards, "attention_rows", lambda *_: "A")
    shown = sample_cards([prediction("text_qa", "yes", ["yes"], media=[]) for _ in range(20)], None)
    assert "<div class=grid>AAAA----</div>" in shown and cards.ATTENTION_CARDS == 4
