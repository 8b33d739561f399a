"""The table of tasks: what each task builds, reads, predicts, and is scored by. Everything else looks it up here.

To add a task, add a row to `TASKS`. If it needs a new head, add the head to `model/heads.py` and name it in
`COMPONENTS`, its loss to `objectives/`, and its metric to `evaluation/`.
"""

from dataclasses import dataclass, field
from typing import Literal

from mplug2.comma_list import comma_list
from mplug2.did_you_mean import did_you_mean

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
"""The parts that a model can have, and the attributes of `MPLUG2` that hold them. Every model has universal layers.

vision, temporal (more than one frame), text, fusion and decoder are the modules of the paper. The others are heads:
contrastive (projects vision and text into one space, for VTC, vision-text contrastive learning), matching (do these two
belong together? for VTM, vision-text matching), masked (for MLM, masked language modeling), classifier (linear, to
classes or to one number), box (a box in the image) and pair (two images, distinguished by a learned embedding)."""

NEW_HEADS = ("classifier", "box", "pair")
"""Heads that pre-training does not have; fine-tuning initializes them."""

PROMPTS = {"video": "a video of", "image": "a picture of"}
"""Captions continue this prompt, by modality."""

INSTRUCTIONS = {"video": "what does the video describe", "image": "what does the image describe"}
"""Captions are also trained as answers to this instruction, by modality."""


@dataclass(frozen=True)
class BatchType:
    """A type of batch. All samples of a batch have the same type, on every rank."""

    task: str
    modality: Modality
    files: tuple[str, ...]  # the records come from <file>.<split>.jsonl, for each of these
    fields: frozenset[str]  # what the batch contains, see data.batches.Collate


@dataclass(frozen=True)
class Task:
    """A row of the table."""

    modality: Modality  # the input; images and videos have prompts and metrics of their own
    components: frozenset[str] = frozenset()  # what is built and loaded, and nothing else: keys of `COMPONENTS`
    record: tuple[str, ...] = ()  # fields that each line of the task's JSONL files must have (data/records.py)
    batch: frozenset[str] = frozenset()  # fields of its batches (data/batches.py)
    output: Literal["caption", "answer", "ranking", "label", "box", ""] = ""  # decides how the task is evaluated
    metric: str = ""  # the main metric, as `evaluation.evaluate` names it
    steps: int = 0  # default number of fine-tuning steps: a minute or two on the tiny world
    labels: tuple[str, ...] = ()  # if the task fixes them; otherwise the class names in the training file
    number_labels: bool = False  # whether labels may be numbers (regression)
    mixes: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """For a task that alternates between several types of batches: modality and files of each, by name."""


def _task(modality: str, components: str, record: str = "", batch: str = "", **more) -> Task:
    return Task(modality, frozenset(components.split()), tuple(record.split()), frozenset(batch.split()), **more)


TASKS: dict[str, Task] = {
    "video_caption": _task("video", "vision temporal decoder", record="video captions", batch="prompted",
                           output="caption", metric="caption_cider", steps=100),
    "video_qa": _task("video", "vision temporal text fusion decoder", record="video qa", batch="question",
                      output="answer", metric="qa_accuracy", steps=100),
    "video_retrieval": _task("video", "vision temporal text fusion contrastive matching", record="video captions",
                             batch="caption", output="ranking", metric="t2v_r1", steps=100),
    "image_caption": _task("image", "vision decoder", record="image captions", batch="prompted",
                           output="caption", metric="image_caption_cider", steps=200),
    "image_qa": _task("image", "vision text fusion decoder", record="image qa", batch="question",
                      output="answer", metric="image_qa_accuracy", steps=100),
    "image_retrieval": _task("image", "vision text fusion contrastive matching", record="image captions",
                             batch="caption", output="ranking", metric="t2i_r1", steps=200),
    "text_classification": _task("text", "text classifier", record="text label", batch="text label", output="label",
                                 metric="text_classification_accuracy", steps=100, number_labels=True),
    "text_pair_classification": _task("text", "text classifier", record="texts label", batch="text label",
                                      output="label", metric="text_pair_classification_accuracy", steps=400,
                                      number_labels=True),
    "text_qa": _task("text", "text decoder", record="qa", batch="question", output="answer",
                     metric="text_qa_accuracy", steps=200),
    "image_classification": _task("image", "vision classifier", record="image label", batch="label", output="label",
                                  metric="image_classification_accuracy", steps=200),
    "video_classification": _task("video", "vision temporal classifier", record="video label", batch="label",
                                  output="label", metric="video_classification_accuracy", steps=200),
    "visual_entailment": _task("image", "vision text fusion classifier", record="image text label", batch="text label",
                               output="label", metric="visual_entailment_accuracy", steps=400,
                               labels=("entailment", "neutral", "contradiction")),
    "image_pair_reasoning": _task("image", "vision text fusion classifier pair", record="images text label",
                                  batch="text label", output="label", metric="image_pair_reasoning_accuracy",
                                  steps=400, labels=("true", "false")),
    "grounding": _task("image", "vision text fusion box", record="image text box", batch="text box",
                       output="box", metric="grounding_accuracy", steps=300),
    "pretrain": _task(
        "video", "vision temporal text fusion decoder contrastive matching masked",
        batch="caption masked prompted question", steps=1500,
        mixes={"video": ("video", ("video_caption", "video_qa")), "image": ("image", ("image_caption", "image_qa")),
               "text": ("text", ("text_only",))}),
}
"""The task table, in the order of evaluation."""

RECORD_FIELDS: dict[str, tuple[str, ...]] = {name: task.record for name, task in TASKS.items() if task.record}
RECORD_FIELDS["text_only"] = ("text",)  # sentences for pre-training; not a task
"""Every type of records file, and the fields that each of its lines must have."""

EVALUATED = tuple(name for name, task in TASKS.items() if task.output)
"""Every task that can be evaluated. Pre-training is evaluated on these tasks."""


def batch_types(task: str) -> dict[str, BatchType]:
    """The types of batches of one task, by name: one type, named after the task, unless the task mixes several."""
    row = TASKS[task]
    mixes = row.mixes or {task: (row.modality, (task,))}
    return {name: BatchType(task, modality, files, row.batch) for name, (modality, files) in mixes.items()}


BATCH_TYPES: dict[str, BatchType] = {name: kind for task in TASKS for name, kind in batch_types(task).items()}
"""Every type of batch by name."""


def parse_tasks(task: str) -> list[str]:
    """The names in "video_caption,video_qa". Raises ValueError for an unknown name, or one that is given twice."""
    names = comma_list("task", task)
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}{did_you_mean(name, TASKS)}; known are {', '.join(TASKS)}")
    return names


def components(task: str) -> frozenset[str]:
    """The keys of `COMPONENTS` that one task, or any of several ("video_caption,video_qa"), needs."""
    return frozenset().union(*(TASKS[name].components for name in parse_tasks(task)))
