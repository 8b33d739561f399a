"""The table of tasks: what each task builds, reads, predicts, and is scored by. Everything else looks it up here.

To add a task, add a row to `TASKS`. If it needs a new head, add the head to `model/heads.py` and name it in
`COMPONENTS`, its loss to `objectives/`, and its metric to `evaluation/`.
"""

from dataclasses import dataclass, field
from typing import Literal

Modality = Literal["video", "image", "text"]

COMPONENTS: dict[str, tuple[str, ...]] = {
    "vision": ("vision_encoder", "vision_projection", "vision_norm"),
    "temporal": (),  # local temporal modules, inside the vision encoder
    "text": ("text_encoder",),
    "fusion": ("fusion",),
    "decoder": ("decoder",),
    "contrastive": ("contrastive_vision", "contrastive_text", "temperature"),
    "matching": ("matching_head",),
    "masked": ("masked_head",),
    "classifier": ("classifier",),
    "box": ("box_head",),
    "pair": ("pair_place",),
}
"""What a model can be made of, and the attributes of `MPLUG2` that hold it. The universal layers are in every model.

vision, temporal (more than one frame), text, fusion and decoder are the modules of the paper. The heads are
contrastive (vision and text projected into one space, for VTC), matching (do these two belong together? for VTM),
masked (masked language modeling), classifier (linear, to classes or to one number), box (a box in the image), and
pair (two images at once, told apart by a learned embedding)."""

NEW_HEADS = ("classifier", "box", "pair")
"""Components that pre-training does not have; fine-tuning initializes them."""

PROMPTS = {"video": "a video of", "image": "a picture of"}
"""Captions continue these words, by modality."""

INSTRUCTIONS = {"video": "what does the video describe", "image": "what does the picture describe"}
"""Captions are also trained as answers to these questions, by modality."""


@dataclass(frozen=True)
class BatchType:
    """One type of batch. All samples of a batch have the same type, on every rank."""

    task: str
    modality: Modality
    files: tuple[str, ...]
    """The records come from `<file>.<split>.jsonl`, for each of these."""
    fields: frozenset[str]
    """What the model needs of each sample: see `data.batches.Collate`."""


@dataclass(frozen=True)
class Task:
    """A row of the table."""

    modality: Modality
    """What the task looks at. Images and videos have prompts and metrics of their own."""
    components: frozenset[str] = frozenset()
    """What is built and loaded for the task, and nothing else: keys of `COMPONENTS`."""
    record: tuple[str, ...] = ()
    """Fields that each line of the task's JSONL files must have (`data/records.py`)."""
    batch: frozenset[str] = frozenset()
    """Fields of its batches (`data/batches.py`)."""
    output: Literal["caption", "answer", "ranking", "label", "box", ""] = ""
    """What the task predicts, which decides how it is evaluated."""
    metric: str = ""
    """The main metric, as `evaluation.evaluate` names it."""
    steps: int = 0
    """Default number of fine-tuning steps: a minute or two on the tiny world."""
    labels: tuple[str, ...] = ()
    """The labels, where the task fixes them; otherwise the class names that the training file uses."""
    number_labels: bool = False
    """Whether labels may be numbers to be predicted (regression)."""
    mixes: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """A task that alternates between several types of batches: modality and files of each, by name."""


def _task(modality: str, components: str, record: str = "", batch: str = "", **more) -> Task:
    return Task(modality, frozenset(components.split()), tuple(record.split()), frozenset(batch.split()), **more)


TASKS: dict[str, Task] = {
    "video_caption": _task(
        "video", "vision temporal decoder", "video captions", "prompted", output="caption", metric="caption_cider",
        steps=100),
    "video_qa": _task(
        "video", "vision temporal text fusion decoder", "video qa", "question", output="answer", metric="qa_accuracy",
        steps=100),
    "video_retrieval": _task(
        "video", "vision temporal text fusion contrastive matching", "video captions", "caption", output="ranking",
        metric="t2v_r1", steps=100),
    "image_caption": _task(
        "image", "vision decoder", "image captions", "prompted", output="caption", metric="image_caption_cider",
        steps=200),
    "image_qa": _task(
        "image", "vision text fusion decoder", "image qa", "question", output="answer", metric="image_qa_accuracy",
        steps=100),
    "image_retrieval": _task(
        "image", "vision text fusion contrastive matching", "image captions", "caption", output="ranking",
        metric="t2i_r1", steps=200),
    "text_classification": _task(
        "text", "text classifier", "text label", "text label", output="label", metric="text_classification_accuracy",
        steps=60, number_labels=True),
    "text_pair_classification": _task(
        "text", "text classifier", "texts label", "text label", output="label",
        metric="text_pair_classification_accuracy", steps=400, number_labels=True),
    "image_classification": _task(
        "image", "vision classifier", "image label", "label", output="label", metric="image_classification_accuracy",
        steps=200),
    "video_classification": _task(
        "video", "vision temporal classifier", "video label", "label", output="label",
        metric="video_classification_accuracy", steps=200),
    "visual_entailment": _task(
        "image", "vision text fusion classifier", "image text label", "text label", output="label",
        metric="visual_entailment_accuracy", steps=400, labels=("entailment", "neutral", "contradiction")),
    "image_pair_reasoning": _task(
        "image", "vision text fusion classifier pair", "images text label", "text label", output="label",
        metric="image_pair_reasoning_accuracy", steps=400, labels=("true", "false")),
    "grounding": _task(
        "image", "vision text fusion box", "image text box", "text box", output="box", metric="grounding_accuracy",
        steps=300),
    "pretrain": _task(
        "video", "vision temporal text fusion decoder contrastive matching masked",
        batch="caption masked prompted question", steps=1500,
        mixes={"video": ("video", ("video_caption", "video_qa")), "image": ("image", ("image_caption", "image_qa")),
               "text": ("text", ("text_only",))}),
}
"""The task table, in the order of evaluation. Several tasks at once, such as "video_caption,video_qa", have the
components of all of them."""

RECORD_FIELDS: dict[str, tuple[str, ...]] = {name: task.record for name, task in TASKS.items() if task.record}
RECORD_FIELDS["text_only"] = ("text",)  # sentences for pre-training; not a task of its own
"""Every file of records, and the fields that each of its lines must have."""

EVALUATED = tuple(name for name, task in TASKS.items() if task.output)
"""Every task that can be evaluated. Pre-training is evaluated by the tasks that it serves."""


def batch_types(task: str) -> dict[str, BatchType]:
    """The types of batches of one task, by name: a single one, named after the task, unless the task mixes several."""
    row = TASKS[task]
    mixes = row.mixes or {task: (row.modality, (task,))}
    return {name: BatchType(task, modality, files, row.batch) for name, (modality, files) in mixes.items()}


BATCH_TYPES: dict[str, BatchType] = {name: kind for task in TASKS for name, kind in batch_types(task).items()}
"""Every type of batch by its name."""


def parse_tasks(task: str) -> list[str]:
    """The names in "video_caption,video_qa". ValueError for an unknown name, or one that is there twice."""
    names = task.split(",")
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; known are {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{task}: a task is named twice")
    return names


def components(task: str) -> frozenset[str]:
    """What is built for one task, or for several ("video_caption,video_qa"): keys of `COMPONENTS`."""
    return frozenset().union(*(TASKS[name].components for name in parse_tasks(task)))
