"""From settings to batches: the sources of the training data, and in which order their samples come."""

from dataclasses import dataclass, field
from typing import Literal

from mplug2.flags import check_range
from mplug2.tasks import TASKS, batch_types, parse_tasks


@dataclass(frozen=True)
class DataSettings:
    task: str = field(default="pretrain", metadata={"known": tuple(TASKS)})
    """Task to train, or several separated by commas."""
    task_weights: str = ""
    """Shares of the steps of several tasks, in their order, such as 3,1; empty: equal shares."""
    data: str = ""
    """Folder with <task>.<split>.jsonl files or tar shards, or several with weights, DIR=2,OTHER=1; empty: the tiny
    world, written to a cache on first use."""
    eval_data: str = ""
    """Folder with <task>.<split>.jsonl files for validation; empty: the first folder of --data that has some."""
    tokenizer: str = ""
    """BERT's vocab.txt or tokenizer.json; empty: train a small vocabulary on the training texts."""
    max_steps: int = TASKS["pretrain"].steps
    """Number of training steps; the learning-rate schedule spans them."""
    epochs: float | None = None
    """In place of --max-steps: how often each caption, question or labeled sample is seen."""
    batch_size: int = 32
    """Samples per step, over all ranks and micro-batches."""
    accumulation_steps: int = 1
    """Micro-batches per step: gradients are averaged over them. VTC and VTM compare samples within a micro-batch."""
    frames: int = 4
    """Frames sampled from each video."""
    max_words: int = 30
    """Texts are cut after this number of words."""
    questions_per_sample: int = 2
    """Questions asked about each sample in a step."""
    augment: Literal["none", "finetune", "pretrain"] = "none"
    """finetune: RandAugment and crops of at least half the area; pretrain: stronger, as for web data."""
    hflip: bool = False
    """With --augment: mirror half of the samples. Do not use it if texts or classes distinguish left from right."""
    video_weight: float = 0.65
    """Pre-training: share of the steps with video batches, relative to the next two."""
    image_weight: float = 0.3
    """Pre-training: share of the steps with image batches."""
    text_weight: float = 0.05
    """Pre-training: share of the steps with text-only batches."""
    workers: int = 0
    """Processes per rank that decode media; 0: the training process decodes in a thread."""
    shuffle_buffer: int = 256
    """Number of samples that a reader of tar shards holds in memory and shuffles."""
    max_skipped: float = 0.02
    """Fraction of the media files that may fail to decode before the run stops."""

    def __post_init__(self):
        tasks = parse_tasks(self.task)
        check_range(self, "max_steps batch_size accumulation_steps frames max_words shuffle_buffer", 1)
        check_range(self, "questions_per_sample video_weight image_weight text_weight workers", 0)
        check_range(self, "max_skipped", 0, 1)
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs}: expected a number above 0")
        if self.task_weights and len(self.shares()) != len(tasks):
            raise ValueError(f"task_weights={self.task_weights!r}: expected one number for each task of {self.task}")
        if not sum(self.batch_weights().values()):
            raise ValueError("all batch types have weight 0, so there is nothing to train on; see task_weights, "
                             "video_weight, image_weight and text_weight")
        if self.augment != "none" and "grounding" in tasks:
            raise ValueError(f"augment={self.augment!r} with task={self.task}: crops would not move the boxes of "
                             "grounding along; use --augment none")
        if self.hflip and self.augment == "none":
            raise ValueError("hflip with augment='none': mirroring is part of augmentation; add --augment finetune")

    def shares(self) -> list[float]:
        """The share of each task, in the order of `task`."""
        try:
            shares = [float(number) for number in self.task_weights.split(",")]
        except ValueError as error:
            raise ValueError(f"task_weights={self.task_weights!r}: expected numbers, separated by commas") from error
        if any(share < 0 for share in shares):
            raise ValueError(f"task_weights={self.task_weights!r}: expected no negative number")
        return shares

    def batch_weights(self) -> dict[str, float]:
        """Shares of the steps by batch type: that of its task, which pre-training divides among its three types."""
        tasks = parse_tasks(self.task)
        weights = dict(zip(tasks, self.shares() if self.task_weights else [1.0] * len(tasks)))
        modalities = {"video": self.video_weight, "image": self.image_weight, "text": self.text_weight}
        total = sum(modalities.values()) or 1
        return {
            name: weights[task] * (modalities[kind.modality] / total if task == "pretrain" else 1.0)
            for task in tasks for name, kind in batch_types(task).items()
        }

    def micro_batch_size(self, world_size: int) -> int:
        """Samples of a micro-batch on one rank. ValueError if the ranks cannot share a batch evenly."""
        parts = world_size * self.accumulation_steps
        if self.batch_size % parts:
            raise ValueError(f"batch_size={self.batch_size} is not divisible by {parts} ({world_size} ranks x "
                             f"{self.accumulation_steps} accumulation steps); change --batch-size")
        return self.batch_size // parts
