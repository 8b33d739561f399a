"""Evaluate a model on one split of a data set. The table of tasks decides how: `TASKS[task].output` names the function.

Metric names are listed in `metric_names.py`.
"""

from collections.abc import Sequence

from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.labels import evaluate_boxes, evaluate_labels
from mplug2.evaluation.metric_names import metric_prefix
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.retrieval import evaluate_retrieval
from mplug2.evaluation.writing import evaluate_answers, evaluate_captions
from mplug2.model.mplug2 import MPLUG2
from mplug2.predictor import Predictor
from mplug2.tasks import EVALUATED, TASKS

EVALUATORS = {
    "caption": evaluate_captions, "answer": evaluate_answers, "ranking": evaluate_retrieval, "label": evaluate_labels,
    "box": evaluate_boxes,
}
"""The evaluation of each kind of output: (predictor, task, data, options) -> metrics without prefix, predictions."""


def evaluate(
    predictor: Predictor, data: EvalSplit, tasks: Sequence[str] | None = None, options: EvalOptions | None = None
) -> tuple[dict[str, float], list[Prediction]]:
    """Metrics and predictions of every task that the model has the modules for and the split has records of, or of
    these `tasks` only. Unlabelled records are predicted, but not scored.

    Raises ValueError for a task among `tasks` that is unknown, or that the model does not have the modules for.
    """
    for task in tasks or ():
        if task not in EVALUATED:
            raise ValueError(f"task {task!r} cannot be evaluated; expected one of {', '.join(EVALUATED)}")
        if not supports(predictor.model, task):
            raise ValueError(f"a model for {predictor.model.task} does not have the modules for {task}; "
                             f"fine-tune it with train.py --task {task} --init")
    metrics: dict[str, float] = {}
    predictions: list[Prediction] = []
    for task in data.tasks:
        if supports(predictor.model, task) and (not tasks or task in tasks):
            found, of_task = EVALUATORS[TASKS[task].output](predictor, task, data, options or EvalOptions())
            metrics |= {metric_prefix(task) + name: value for name, value in found.items()}
            predictions += of_task
    return metrics, predictions


def supports(model: MPLUG2, task: str) -> bool:
    """Whether the model has the modules for a task. Classes need the task's classifier, or VTC for zero-shot."""
    needed, built = TASKS[task].components, model.components
    if "classifier" in needed:
        return task in model.classes or ("contrastive" in built and "vision" in needed and "fusion" not in needed)
    return needed - {"temporal", "matching"} <= built
