"""A teacher that follows the model: an average of its weights over time, whose outputs are soft targets.

EMATeacher distillation, from ALBEF (Li et al. 2021) and mPLUG: question answering learns from the copy's answers, and
contrastive learning from the copy's similarities, with a queue of its earlier vectors as further negatives.

Axes: b samples of this process, B of all processes, e contrastive width.
"""

import copy

import torch
from torch import Tensor, nn

from mplug2.distributed import all_gather_with_grad
from mplug2.model.mplug2 import MPLUG2


class EMATeacher(nn.Module):
    """`teacher`: the copy of all modules of `model`. After each step it becomes decay * itself + (1 - decay) * model.

    `alpha` is the weight of its soft targets, reached evenly over the first `ramp` steps. `queue`: how many vectors of
    each side are kept for contrastive learning; 0: none. All of this is state, and is saved and resumed with a run.
    """

    def __init__(self, model: MPLUG2, decay: float = 0.995, alpha: float = 0.4, ramp: int = 1, queue: int = 0):
        super().__init__()
        self.decay, self.max_alpha, self.ramp = decay, alpha, ramp
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        if queue:
            width = model.config.contrastive_width
            self.register_buffer("queue_vision", torch.zeros(queue, width))
            self.register_buffer("queue_text", torch.zeros(queue, width))
            self.register_buffer("queue_meaning", torch.zeros(queue, dtype=torch.long))
            self.register_buffer("queued", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> "EMATeacher":
        """The teacher never drops anything out."""
        return super().train(False)

    @property
    def alpha(self) -> float:
        """Of the soft targets, now."""
        return self.max_alpha * min(1.0, self.steps.item() / self.ramp)

    @torch.no_grad()
    def update(self, model: MPLUG2) -> None:
        """After a step of the optimizer: every parameter of every module, frozen ones too."""
        for own, new in zip(self.teacher.parameters(), model.parameters(), strict=True):
            own.lerp_(new.detach().to(own.dtype), 1 - self.decay)
        self.steps += 1

    def queue(self) -> tuple[Tensor, Tensor, Tensor]:
        """Vision and text vectors, `m e` each, and their meanings `m`: as many as there are so far."""
        count = min(self.queued.item(), len(self.queue_meaning))
        return self.queue_vision[:count], self.queue_text[:count], self.queue_meaning[:count]

    @torch.no_grad()
    def enqueue(self, vision: Tensor, text: Tensor, positive_id: Tensor) -> None:
        """Put unit vectors `b e` of every process, and their meanings `b`, in the place of the oldest ones.

        Every process keeps the same queue."""
        vision, text, positive_id = all_gather_with_grad(
            vision), all_gather_with_grad(text), all_gather_with_grad(positive_id)
        if not (vision.isfinite().all() and text.isfinite().all()):
            return  # the step is going to be skipped
        size, count = len(self.queue_meaning), len(positive_id)
        if count > size:
            raise ValueError(f"queue={size}: expected room for the {count} samples of a batch at least")
        positions = (self.queued + torch.arange(count, device=positive_id.device)) % size
        self.queue_vision[positions] = vision.to(self.queue_vision.dtype)
        self.queue_text[positions] = text.to(self.queue_text.dtype)
        self.queue_meaning[positions] = positive_id
        self.queued += count
