"""From settings to objectives: the weights of the losses, the EMA teacher and self-critical training."""

from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from mplug2.data.build import TrainingData
from mplug2.flags import check_range
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.objectives import Objectives
from mplug2.objectives.self_critical import SelfCritical
from mplug2.tasks import BatchType

LOSSES_OF = {"caption": {"vtc", "vtm"}, "masked": {"mlm"}, "prompted": {"caption"}, "question": {"answer"}}
"""The losses of each field of a batch (`tasks.BatchType`); those of other fields have no weight."""


@dataclass(frozen=True)
class LossSettings:
    vtc_weight: float = 2.0
    """Weight of the contrastive loss (VTC)."""
    vtm_weight: float = 1.0
    """Weight of the matching loss (VTM)."""
    mlm_weight: float = 1.0
    """Weight of the masked language modeling loss (MLM)."""
    mlm: Literal["fused", "text", "both"] = "fused"
    """What masked captions are predicted from: the fused text, the text alone, or both (mean of the two losses)."""
    caption_weight: float = 1.0
    """Weight of the captioning loss."""
    answer_weight: float = 1.0
    """Weight of the loss on answers to questions and instructions."""
    distill_weight: float = 0.0
    """Weight of an EMA teacher's soft targets for answers and VTC, ramped up over the first epoch (ALBEF, mPLUG: 0.4);
    0: no teacher."""
    ema_decay: float = 0.995
    """EMA decay of the teacher."""
    queue_size: int = 0
    """Number of queued negatives for VTC, with --distill-weight; 0: VTC has no teacher."""
    self_critical: bool = False
    """Train captions for their CIDEr-D (self-critical sequence training), to refine a captioner given with --init."""

    def __post_init__(self):
        check_range(self, " ".join([f"{name}_weight" for name in self.weighted] + ["queue_size"]), 0)
        check_range(self, "distill_weight", 0, 1)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: expected a number of at least 0 and below 1; with 1 the "
                             "teacher would never follow the model")
        if self.queue_size and not self.distill_weight:
            raise ValueError(f"queue_size={self.queue_size}: the queue needs an EMA teacher; add "
                             "--distill-weight 0.4")

    @property
    def weighted(self) -> list[str]:
        """The losses that have a weight: one for each field `NAME_weight`, except that of the soft targets."""
        names = [field.name.removesuffix("_weight") for field in fields(self) if field.name.endswith("_weight")]
        return [name for name in names if name != "distill"]

    @property
    def skipped(self) -> frozenset[str]:
        """The losses that are not computed, because their weight is 0."""
        return frozenset(name for name in self.weighted if not getattr(self, f"{name}_weight"))

    def losses_of(self, batch_type: BatchType) -> set[str]:
        """The losses that batches of this type train. Sentences alone have MLM only."""
        only_text = batch_type.modality == "text" and "masked" in batch_type.fields
        parts = {"masked"} if only_text else batch_type.fields
        losses = set().union(*(LOSSES_OF.get(field, {field}) for field in parts)) - self.skipped
        return losses | ({"reward"} if self.self_critical and "prompted" in parts else set())

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses of a batch; a loss without a weight of its own counts once."""
        return sum(getattr(self, f"{name}_weight", 1.0) * loss for name, loss in losses.items())


def build_objectives(model: MPLUG2, settings: LossSettings, data: TrainingData) -> Objectives:
    """The losses of a run: `model`, with an EMA teacher and self-critical training if the settings have them."""
    ema_teacher, self_critical = None, None
    if settings.distill_weight:
        ema_teacher = EMATeacher(
            model, settings.ema_decay, settings.distill_weight, data.steps_per_epoch, settings.queue_size
        )
    if settings.self_critical:
        self_critical = SelfCritical(data.tokenizer, data.references())
    return Objectives(model, ema_teacher, self_critical, settings.mlm, settings.skipped)
