"""Losses."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mplug2.distributed import all_gather_with_grad, global_mean
from mplug2.model.mplug2 import MPLUG2
from mplug2.model.shapes import check
from mplug2.objectives.ema_teacher import EMATeacher

TEMPERATURE_RANGE = (0.001, 0.5)


def contrastive_loss(vision: Tensor, text: Tensor, temperature: Tensor, positive_id: Tensor) -> Tensor:
    """VTC on unit vectors `b e`: each vision has to find its texts among those of all processes, and each text its
    visions. Pairs of equal `positive_id` (`b`, integers) are positives of each other, and share the target evenly.

    Each process scores its own rows against columns that are gathered with gradients.
    """
    sizes = check(text, "b e", **check(vision, "b e"))
    check(positive_id, "b", **sizes)
    temperature = temperature.clamp(*TEMPERATURE_RANGE)
    positive = (positive_id[:, None] == all_gather_with_grad(positive_id)[None, :]).to(vision.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    losses = []
    for rows, columns in ((vision, text), (text, vision)):
        log_probs = (rows @ all_gather_with_grad(columns).T / temperature).log_softmax(dim=1)
        losses.append(-(target * log_probs).sum(dim=1))
    return torch.stack(losses).mean()


def distilled_contrastive_loss(
    vision: Tensor, text: Tensor, temperature: Tensor, positive_id: Tensor, teacher_vision: Tensor,
    teacher_text: Tensor, ema_teacher: EMATeacher,
) -> Tensor:
    """VTC against the teacher's vectors `b e` of the batch of all processes, and those in its queue; the target is
    mixed with the teacher's own similarities (ALBEF, equation 6). Equal meanings share the rest of it, as above."""
    sizes = check(teacher_text, "b e", **check(teacher_vision, "b e", **check(text, "b e", **check(vision, "b e"))))
    check(positive_id, "b", **sizes)
    temperature, alpha = temperature.clamp(*TEMPERATURE_RANGE), ema_teacher.alpha
    queued_vision, queued_text, queued_id = ema_teacher.queue()
    positive = (positive_id[:, None] == torch.cat(
        [all_gather_with_grad(positive_id), queued_id])[None, :]).to(vision.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    losses = []
    for rows, teacher_rows, columns, queued in (
        (vision, teacher_vision, teacher_text, queued_text), (text, teacher_text, teacher_vision, queued_vision),
    ):
        columns = torch.cat([all_gather_with_grad(columns), queued.to(columns.dtype)]).T
        soft = (teacher_rows @ columns / temperature.detach()).softmax(dim=1)
        log_probs = (rows @ columns / temperature).log_softmax(dim=1)
        losses.append(-((alpha * soft + (1 - alpha) * target) * log_probs).sum(dim=1))
    return torch.stack(losses).mean()


def hard_negatives(similarity: Tensor, positive_id: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `similarity` (`b b`) a column of another positive_id, drawn in proportion to softmax(similarity).

    Returns indices `b` and whether there was any such column, `b`.
    """
    negative = positive_id[:, None] != positive_id[None, :]
    exists = negative.any(dim=1)
    chance = similarity.softmax(dim=1) + 1e-6
    # A row without any negative draws at random; its loss is masked by `exists`.
    chance = torch.where(negative | ~exists[:, None], chance, 0.0)
    return torch.multinomial(chance, 1)[:, 0], exists


def label_loss(output: Tensor, label: Tensor) -> Tensor:
    """Of logits `b y` and class numbers `b`: cross-entropy; of numbers `b 1` and `b` (regression): squared error."""
    sizes = check(output, "b y")
    check(label, "b", b=sizes["b"])
    if label.is_floating_point():
        losses = (output[:, 0] - label) ** 2
    else:
        losses = F.cross_entropy(output, label, reduction="none")
    return global_mean(losses, torch.ones_like(losses, dtype=torch.bool))


def generalized_iou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and generalised IoU (Rezatofighi et al. 2019), of boxes (cx, cy, w, h), both `b 4`.

    GIoU = IoU - the share of the smallest box around both that neither covers: it has a gradient far from each other.
    """
    check(others, "b 4", **check(boxes, "b 4"))
    (low, high), (other_low, other_high) = (
        (box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2) for box in (boxes, others)
    )
    shared = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(dim=1)
    union = boxes[:, 2:].prod(dim=1) + others[:, 2:].prod(dim=1) - shared
    around = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(dim=1)
    iou = shared / union.clamp(min=1e-9)
    return iou, iou - (around - union) / around.clamp(min=1e-9)


def box_losses(boxes: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """`l1`, the summed distance of the four numbers, and `giou`, 1 - GIoU; boxes as for `generalized_iou`."""
    valid = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    return {
        "l1": global_mean((boxes - truth).abs().sum(dim=1), valid),
        "giou": global_mean(1 - generalized_iou(boxes, truth)[1], valid),
    }


def matching_loss(
    model: MPLUG2, vision: Tensor, text: Tensor, text_mask: Tensor, similarity: Tensor, positive_id: Tensor
) -> Tensor:
    """VTM: do vision `b v d` and text `b l d` belong together? Each pair is asked as it is, with one hard negative
    text, and with one hard negative vision; `similarity` (`b b`, vision by text, without gradients) draws them."""
    sizes = check(text, "b l d", **check(vision, "b v d"))
    check(similarity, "b b", **sizes)
    other_text, has_text = hard_negatives(similarity, positive_id)
    other_vision, has_vision = hard_negatives(similarity.T, positive_id)
    # Each vision with its own and with another text, which share its keys and values; each text with another vision.
    both = rearrange(torch.stack([text, text[other_text]]), "r b l d -> (b r) l d")
    both_mask = rearrange(torch.stack([text_mask, text_mask[other_text]]), "r b l -> (b r) l")
    matched, unmatched = rearrange(model.itm_logits(model.fuse(
        vision, both, both_mask)[1]), "(b r) y -> r b y", r=2, y=2)
    other = model.itm_logits(model.fuse(vision[other_vision], text, text_mask)[1])
    logits = torch.cat([matched, unmatched, other])
    matches = torch.zeros(3 * sizes["b"], dtype=torch.long, device=text.device)
    matches[: sizes["b"]] = 1
    valid = torch.cat([torch.ones_like(has_text), has_text, has_vision])
    return global_mean(F.cross_entropy(logits, matches, reduction="none"), valid)


def masked_loss(model: MPLUG2, hidden: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
    """MLM: the original `ids` (`b l`) at the masked `positions`, indices into `(b l)`, from `hidden` (`b l d`)."""
    check(hidden, "b l d", **check(ids, "b l"))
    # only where there is something to predict
    logits = model.mlm_logits(rearrange(hidden, "b l d -> (b l) d")[positions])
    losses = F.cross_entropy(logits, ids.flatten()[positions], reduction="none")
    return global_mean(losses, torch.ones_like(losses, dtype=torch.bool))


def language_loss(
    model: MPLUG2, ids: Tensor, mask: Tensor, memory: Tensor, positions: Tensor, memory_mask: Tensor | None = None,
    teacher: Tensor | None = None, alpha: float = 0.0,
) -> Tensor:
    """Next-token loss of the decoder on `ids` (`b l`, [CLS] first, [SEP] last, then padding) at the n `positions` that
    carry a loss, indices into `(b (l-1))` (see `label_positions` in data/loader.py).

    `teacher`: logits `n s` of another model, whose distribution over the vocabulary is the target by a share of
    `alpha`; the rest of the target is the token itself.
    """
    logits = decoder_logits(model, ids, mask, memory, positions, memory_mask)
    losses = F.cross_entropy(logits, ids[:, 1:].flatten()[positions], reduction="none")
    if teacher is not None:
        soft = -(teacher.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
        losses = (1 - alpha) * losses + alpha * soft
    return global_mean(losses, torch.ones_like(losses, dtype=torch.bool))


def decoder_logits(
    model: MPLUG2, ids: Tensor, mask: Tensor, memory: Tensor, positions: Tensor, memory_mask: Tensor | None = None
) -> Tensor:
    """The decoder's logits `n s` for the next tokens of `ids` (`b l`) at n `positions`, indices into `(b (l-1))`."""
    check(mask, "b l", **check(ids, "b l"))
    decoder = model.require("decoder")
    hidden = decoder.hidden(ids[:, :-1], mask[:, :-1], memory, memory_mask)
    return decoder.logits(rearrange(hidden, "b l d -> (b l) d")[positions])
