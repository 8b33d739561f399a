"""A prediction, and when it counts as right: one decision for metrics, `predictions.jsonl`, and the report."""

from dataclasses import dataclass
from pathlib import Path

from mplug2.data.text import normalize
from mplug2.evaluation.ranking import MIN_IOU, box_iou
from mplug2.tasks import TASKS


@dataclass(frozen=True)
class Prediction:
    """A line of `predictions.jsonl`."""

    task: str
    media: tuple[Path, ...]
    """The image or video; a pair of images; empty for text, and for a text that searches a gallery."""
    question: str
    """A question, the text that a label or a box is about, or the text that searches a gallery."""
    prediction: str | float | tuple[float, ...]
    truth: tuple
    """Everything that counts as right; empty if the record is unlabelled. Captions and answers are normalized."""
    id: str = ""
    """The id of the record."""
    confidence: float | None = None
    """The probability of the predicted class."""

    @property
    def right(self) -> bool | None:
        return is_right(self.task, self.prediction, self.truth)

    def line(self, split: str) -> dict:
        """The JSON object that stands in `predictions.jsonl`."""
        box = [round(x, 4) for x in self.prediction] if isinstance(self.prediction, tuple) else self.prediction
        line = {
            "task": self.task, "split": split, "id": self.id, "media": list(map(str, self.media)),
            "question": self.question, "prediction": box, "truth": list(self.truth), "right": self.right,
        }
        return line if self.confidence is None else {**line, "confidence": round(self.confidence, 4)}


def is_right(task: str, prediction: str | float | tuple[float, ...], truth: tuple | list) -> bool | None:
    """Whether a prediction is right, as the task's metric counts it. None without a truth, and for numbers.

    Captions and answers are compared after `normalize`, boxes by their IoU, everything else exactly.
    """
    if not truth or isinstance(prediction, float):
        return None
    if TASKS[task].output == "box":
        return bool(box_iou(truth[:1], [prediction])[0] >= MIN_IOU)
    if TASKS[task].output in ("caption", "answer"):
        return normalize(prediction) in map(normalize, truth)
    return prediction in truth
