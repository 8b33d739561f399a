"""Evaluate a model on one split of a data set. The table of tasks decides how: `TASKS[task].output` names the function.

All ranks call `evaluate`. They share the images and videos, and the main rank scores. Metric names are listed in
`metric_names.py`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mplug2.data.media_batches import Medium
from mplug2.data.records import raise_all
from mplug2.did_you_mean import did_you_mean
from mplug2.distributed import AllRanksError, all_gather_object
from mplug2.evaluation.bootstrap import Score
from mplug2.evaluation.data import EvalOptions, EvalSplit, check_texts
from mplug2.evaluation.labels import UnknownClasses, evaluate_boxes, evaluate_labels, files_of, unknown_labels
from mplug2.evaluation.metric_names import metric_prefix
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.retrieval import evaluate_retrieval
from mplug2.evaluation.writing import evaluate_answers, evaluate_captions
from mplug2.model.mplug2 import MPLUG2
from mplug2.predictor import Predictor
from mplug2.tasks import EVALUATED, TASKS, parse_tasks

EVALUATORS = {
    "caption": evaluate_captions, "answer": evaluate_answers, "ranking": evaluate_retrieval, "label": evaluate_labels,
    "box": evaluate_boxes,
}
"""The evaluation of each kind of output: (predictor, task, data, options) -> scores without prefix, predictions."""


@dataclass
class EvalResult:
    scores: dict[str, Score] = field(default_factory=dict)
    """Every metric with its standard error; on the main rank only."""
    predictions: list[Prediction] = field(default_factory=list)
    records: int = 0
    """Records of the evaluated tasks, unreadable and unlabelled ones included."""
    scored: int = 0
    """Records that are readable and labelled."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The error of each record whose image or video could not be read, by the place of the record."""
    notes: list[str] = field(default_factory=list)
    """Tasks that could not be evaluated, and why."""

    @property
    def metrics(self) -> dict[str, float]:
        return {name: score.value for name, score in self.scores.items()}

    @property
    def errors(self) -> dict[str, float]:
        return {name: score.error for name, score in self.scores.items()}


def evaluate(
    predictor: Predictor, data: EvalSplit, tasks: Sequence[str] | None = None, options: EvalOptions | None = None
) -> EvalResult:
    """Evaluate every task that the model has the modules for and the split has records of, or these `tasks` only.

    Unlabelled records are predicted, but not scored. A file that cannot be read is skipped if `predictor.inference`
    says so. Raises ValueError for a task among `tasks` that is unknown or whose modules the model does not have.
    """
    check_tasks(predictor.model, tasks or ())
    result = EvalResult()
    for task in data.tasks:
        if not supports(predictor.model, task) or (tasks and task not in tasks):
            continue
        predictor.description = f"{data.split} {task}"
        try:
            scores, predictions = evaluate_task(predictor, task, data, options or EvalOptions())
            if predictions and not any(prediction.truth for prediction in predictions):
                result.notes.append(f"{task}: the records have no truth, so they are predicted, but not scored")
        except UnknownClasses as error:
            if tasks:
                raise
            result.notes.append(str(error))
            continue
        result.scores |= {metric_prefix(task) + name: score for name, score in scores.items()}
        result.predictions += predictions
        records = data.records(task)
        result.records += len(records)
        for record in records:
            if files_of(record) and (error := predictor.unreadable.get(Medium.of_record(record))):
                result.skipped[record.source] = error
            elif not record.unlabelled:
                result.scored += 1
    return result


def evaluate_task(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, Score], list[Prediction]]:
    """Scores and predictions of one task. An error on one rank is raised on all of them."""
    scores, predictions, problem = {}, [], ""
    try:
        scores, predictions = EVALUATORS[TASKS[task].output](predictor, task, data, options)
    except (AllRanksError, UnknownClasses):  # raised on every rank
        raise
    except ValueError as error:
        if predictor.inference.world_size == 1:
            raise
        problem = str(error)
    if predictor.inference.world_size > 1 and any(problems := all_gather_object(problem)):
        raise AllRanksError(next(filter(None, problems)))
    return scores, predictions


def evaluated_tasks(results: Mapping[str, EvalResult]) -> tuple[str, ...]:
    """The tasks with predictions."""
    return tuple(dict.fromkeys(one.task for result in results.values() for one in result.predictions))


def check_data(
    predictor: Predictor, splits: Sequence[EvalSplit], tasks: Sequence[str] | None, max_unknown: float
) -> None:
    """Print what is doubtful about the texts and labels of these splits, before anything is computed.

    Raises ValueError for a task that cannot be evaluated or has no records, and RecordError, which lists every text
    that the model cannot read, with file and line, and every task with more than the fraction `max_unknown` of unknown
    words in a split.
    """
    check_tasks(predictor.model, tasks or ())
    for task in tasks or ():
        if not any(task in data.tasks for data in splits):
            raise ValueError(f"{splits[0].root} has no records of {task} in the splits "
                             f"{', '.join(data.split for data in splits)}; leave it out of --task, or name other data")
    chosen = {data: [task for task in data.tasks if task in (tasks or data.tasks) and supports(predictor.model, task)]
              for data in splits}
    if not any(chosen.values()):
        raise ValueError(f"{splits[0].root} has no records, in the splits {', '.join(data.split for data in splits)}, "
                         f"of a task that this checkpoint can do; it was trained for {predictor.model.task}")
    limit, max_words = predictor.model.config.max_positions, predictor.preprocess.max_words
    problems, notes = [], []
    for data, of_split in chosen.items():
        found, doubtful = check_texts(data, of_split, predictor.tokenizer, limit, max_words, max_unknown)
        problems += found
        notes += [*doubtful, *filter(None, (unknown_labels(predictor, task, data) for task in of_split))]
    for note in notes:
        print(note, file=sys.stderr)
    raise_all(problems)


def check_tasks(model: MPLUG2, tasks: Sequence[str]) -> None:
    """Raise ValueError for a task that is unknown, or that the model does not have the modules for."""
    for task in tasks:
        if task not in EVALUATED:
            raise ValueError(f"task {task!r} cannot be evaluated{did_you_mean(task, EVALUATED)}; expected one of "
                             f"{', '.join(EVALUATED)}")
        if not supports(model, task):
            raise ValueError(f"a model for {model.task} does not have the modules for {task}; "
                             f"fine-tune it with train.py --task {task} --init CHECKPOINT")


def supports(model: MPLUG2, task: str) -> bool:
    """Whether the model has the modules for a task. Classes need the task's classifier, or VTC for zero-shot. Answers
    about a text alone are no part of pre-training: a model has to be trained for them."""
    needed, built = TASKS[task].components, model.components
    if task == "text_qa" and "text_qa" not in parse_tasks(model.task):
        return False
    if "classifier" in needed:
        return task in model.classes or ("contrastive" in built and "vision" in needed and "fusion" not in needed)
    return needed - {"temporal"} <= built
