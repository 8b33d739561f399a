"""The cards of a report: which predictions count as right. `test_report.py` looks at the cards on a page."""

import pytest

from mplug2.tools.cards import right


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
