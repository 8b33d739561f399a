"""From settings to objectives: the weights of the losses, the EMA teacher and self-critical training."""

from dataclasses import dataclass

from torch import Tensor

from mplug2.data.build import TrainingData
from mplug2.flags import check_range
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.objectives import Objectives
from mplug2.objectives.self_critical import SelfCritical


@dataclass(frozen=True)
class LossSettings:
    vtc_weight: float = 2.0
    """Weight of the contrastive loss (VTC)."""
    vtm_weight: float = 1.0
    """Weight of the matching loss (VTM)."""
    mlm_weight: float = 1.0
    """Weight of the masked language modeling loss (MLM)."""
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
        check_range(self, "vtc_weight vtm_weight mlm_weight caption_weight answer_weight queue_size", 0)
        check_range(self, "distill_weight", 0, 1)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: expected a number of at least 0 and below 1; with 1 the "
                             "teacher would never follow the model")
        if self.queue_size and not self.distill_weight:
            raise ValueError(f"queue_size={self.queue_size}: the queue needs an EMA teacher; add "
                             "--distill-weight 0.4")

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
    return Objectives(model, ema_teacher, self_critical)
