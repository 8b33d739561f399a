"""The EMA teacher (momentum distillation, from ALBEF, Li et al. 2021, and mPLUG): an exponential moving average of the
model's weights, whose outputs are soft targets.

    teacher = decay * teacher + (1 - decay) * model            after every step of the optimizer
    target  = alpha * softmax(teacher's logits) + (1 - alpha) * label

Answers learn from the teacher's next-token distribution. With a queue, VTC (vision-text contrastive learning) learns
from the teacher's similarities, and compares each sample with the queued vectors of earlier batches too.

Axes: b batch of this rank, e contrastive width, i vectors in the queue, p positions of answers, s vocabulary.
"""

import copy

import torch
from torch import Tensor, nn

from mplug2.distributed import all_gather_with_grad
from mplug2.model.mplug2 import MPLUG2
from mplug2.model.shapes import check
from mplug2.objectives.losses import decoder_logits, scaled_similarity


class EMATeacher(nn.Module):
    """`teacher` is a copy of all modules of `model`. `alpha` is the weight of its soft targets; it grows linearly over
    the first `ramp` steps. `queue` is the number of vectors per side that VTC keeps, or 0.

    Weights, counters and queue are part of the state dict, so a run resumes with them. The counters are Python
    integers: a process would have to wait for its GPU each time that it reads them from there.
    """

    def __init__(self, model: MPLUG2, decay: float = 0.995, alpha: float = 0.4, ramp: int = 1, queue: int = 0):
        super().__init__()
        self.decay, self.max_alpha, self.ramp = decay, alpha, ramp
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        self.steps = self.queued = 0
        self.counters = ("steps", "queued") if queue else ("steps",)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []
        """Vectors and positive ids of the batches since the last update, for the queue."""
        if queue:
            width = model.config.contrastive_width
            self.register_buffer("queue_vision", torch.zeros(queue, width))
            self.register_buffer("queue_text", torch.zeros(queue, width))
            self.register_buffer("queue_meaning", torch.zeros(queue, dtype=torch.long))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: torch.tensor(getattr(self, name)) for name in self.counters}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others) -> None:
        self.load_counters(state_dict, prefix)
        names = {prefix + name for name in self.counters}
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if k not in names}, prefix, *others)

    def load_counters(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        for name in self.counters:
            setattr(self, name, int(state_dict[prefix + name]))

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in evaluation mode: the teacher has no dropout."""
        return super().train(False)

    @property
    def alpha(self) -> float:
        """The current weight of the soft targets."""
        return self.max_alpha * min(1.0, self.steps / self.ramp)

    @torch.no_grad()
    def update(self, model: MPLUG2) -> None:
        """Follow the model after a step of the optimizer: every parameter, frozen ones too. The vectors of the
        step join the queue."""
        for own, new in zip(self.teacher.parameters(), model.parameters(), strict=True):
            own.lerp_(new.detach().to(own.dtype), 1 - self.decay)
        self.steps += 1
        for vectors in self.pending:
            self.enqueue(*vectors)
        self.pending.clear()

    @torch.no_grad()
    def encode_vision(self, batch: dict) -> Tensor | None:
        """The teacher's V' `b v d`, which both losses read; None if neither needs it."""
        needed = "pixels" in batch and ("question_ids" in batch or self.has_queue)
        return self.teacher.encode_vision(batch["pixels"]) if needed else None

    @torch.no_grad()
    def answer_logits(self, batch: dict, vision: Tensor | None) -> tuple[Tensor, float]:
        """The teacher's logits `p s` at the positions of the batch's answers, and the weight of these soft targets.
        `vision` is the teacher's V'."""
        teacher = self.teacher
        memory, memory_mask = teacher.instruction_memory(vision, batch["question_ids"], batch["question_mask"])
        logits = decoder_logits(
            teacher, batch["answer_ids"], batch["answer_mask"], memory, batch["answer_positions"], memory_mask
        )
        return logits, self.alpha

    def contrastive_loss(
        self, batch: dict, own: Tensor, vision: Tensor, text: Tensor, temperature: Tensor, enqueue: bool
    ) -> Tensor:
        """VTC with soft targets of the model's unit vectors `b e`; `own` is the teacher's V'. `enqueue`: the next
        `update` adds the teacher's vectors to the queue. A step that is skipped has to clear `pending`."""
        teacher, positive_id = self.teacher, batch["positive_id"]
        with torch.no_grad():
            vectors = (
                teacher.project_vision(own),
                teacher.project_text(teacher.encode_text(batch["caption_ids"], batch["caption_mask"])),
            )
        loss = distilled_contrastive_loss(vision, text, temperature, positive_id, *vectors, self)
        if enqueue:
            self.pending.append((*vectors, positive_id))
        return loss

    @property
    def has_queue(self) -> bool:
        return "queued" in self.counters

    def queue(self) -> tuple[Tensor, Tensor, Tensor]:
        """Vision vectors `i e`, text vectors `i e` and positive ids `i` of the queue, as far as it is filled."""
        count = min(self.queued, len(self.queue_meaning))
        return self.queue_vision[:count], self.queue_text[:count], self.queue_meaning[:count]

    @torch.no_grad()
    def enqueue(self, vision: Tensor, text: Tensor, positive_id: Tensor) -> None:
        """Replace the oldest vectors by the unit vectors `b e` and positive ids `b` of all ranks.

        Every rank keeps the same queue. Raises ValueError if it is smaller than the batch of all ranks.
        """
        vision, text, positive_id = map(all_gather_with_grad, (vision, text, positive_id))
        size, count = len(self.queue_meaning), len(positive_id)
        if count > size:
            raise ValueError(f"queue_size={size}: a batch has {count} samples; raise --queue-size to {count} or more")
        positions = (self.queued + torch.arange(count, device=positive_id.device)) % size
        self.queue_vision[positions] = vision.to(self.queue_vision.dtype)
        self.queue_text[positions] = text.to(self.queue_text.dtype)
        self.queue_meaning[positions] = positive_id
        self.queued += count


def distilled_contrastive_loss(
    vision: Tensor, text: Tensor, temperature: Tensor, positive_id: Tensor, teacher_vision: Tensor,
    teacher_text: Tensor, ema_teacher: EMATeacher,
) -> Tensor:
    """VTC with soft targets (ALBEF, equation 6): the model's unit vectors `b e` are compared with the teacher's, from
    all ranks and from the queue. Positives share the hard part of the target evenly, as in `contrastive_loss`."""
    sizes = check(teacher_text, "b e", **check(teacher_vision, "b e", **check(text, "b e", **check(vision, "b e"))))
    check(positive_id, "b", **sizes)
    alpha = ema_teacher.alpha
    queued_vision, queued_text, queued_id = ema_teacher.queue()
    all_ids = torch.cat([all_gather_with_grad(positive_id), queued_id])
    positive = (positive_id[:, None] == all_ids[None, :]).to(vision.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    losses = []
    for rows, teacher_rows, columns, queued in (
        (vision, teacher_vision, teacher_text, queued_text), (text, teacher_text, teacher_vision, queued_vision),
    ):
        columns = torch.cat([all_gather_with_grad(columns), queued.to(columns.dtype)])
        soft = scaled_similarity(teacher_rows, columns, temperature.detach()).softmax(dim=1)
        log_probs = scaled_similarity(rows, columns, temperature).log_softmax(dim=1)
        losses.append(-((alpha * soft + (1 - alpha) * target) * log_probs).sum(dim=1))
    return torch.stack(losses).mean()
