"""The losses: four for pre-training, and those of labels and boxes for fine-tuning.

    VTC     vision-text contrastive       InfoNCE between the class tokens of V' and text, over the samples of all ranks
    VTM     vision-text matching          do an image or video and a text belong together? asked of the fused text
    MLM     masked language modeling      cross-entropy at the masked tokens
    LM      language modeling             cross-entropy of the next token, from the decoder

Every loss is a mean over the valid samples or tokens of all ranks (`distributed.global_mean`). `positive_id` marks
pairs with the same meaning, such as two videos with the same caption: they are positives for each other in VTC, and
never negatives in VTC or VTM.

Axes: b batch of this rank, v visual tokens, l text tokens, d width, e contrastive width, s vocabulary, y classes,
p positions that carry a loss.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mplug2.boxes import generalized_iou
from mplug2.distributed import all_gather_with_grad, global_mean
from mplug2.model.attention import Memory
from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.model.shapes import check

TEMPERATURE_RANGE = (0.001, 0.5)
"""Range of VTC's learned temperature, as in ALBEF."""


def contrastive_loss(vision: Tensor, text: Tensor, temperature: Tensor, positive_id: Tensor) -> Tensor:
    """VTC on unit vectors, both `b e`: each vision is compared with the texts of all ranks, and each text with the
    visions. positive_id `b`, integers; several positives share the target evenly."""
    sizes = check(text, "b e", **check(vision, "b e"))
    check(positive_id, "b", **sizes)
    positive = (positive_id[:, None] == all_gather_with_grad(positive_id)[None, :]).to(vision.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    losses = []
    for rows, columns in ((vision, text), (text, vision)):
        log_probs = scaled_similarity(rows, all_gather_with_grad(columns), temperature).log_softmax(dim=1)
        losses.append(-(target * log_probs).sum(dim=1))
    return torch.stack(losses).mean()


def scaled_similarity(rows: Tensor, columns: Tensor, temperature: Tensor) -> Tensor:
    """Unit vectors `a e` and `b e` -> cosines / temperature, `a b`, in float32 or better.

    Under autocast they would be bfloat16, which rounds values near 44 to multiples of 0.25.
    """
    with torch.autocast(rows.device.type, enabled=False):
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(dtype) @ columns.to(dtype).T / temperature


def hard_negatives(similarity: Tensor, positive_id: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `similarity` `b b`, draw a column with another positive_id, with probability
    softmax(similarity). Returns the indices `b`, and whether the row has any negative, `b`.

    argmax(p / Exp(1)) draws from p. Unlike torch.multinomial it does not raise for NaN: the training loop can then skip
    the step and name its samples.
    """
    negative = positive_id[:, None] != positive_id[None, :]
    draw = (similarity.softmax(dim=1) + 1e-6) / torch.empty_like(similarity).exponential_()
    # A row without negatives draws the first column; the caller masks its loss.
    return draw.masked_fill(~negative, -1.0).argmax(dim=1), negative.any(dim=1)


def matching_loss(
    model: MPLUG2, pair: Tensor, other_text: Tensor, other_vision: Tensor, has_text: Tensor, has_vision: Tensor
) -> Tensor:
    """VTM on the fused text `b l d` of each pair as it is, with one hard negative text, and with one hard negative
    vision. `has_text` and `has_vision`, `b`: whether there is such a negative."""
    sizes = check(has_vision, "b", **check(has_text, "b", b=len(pair)))
    logits = torch.cat([model.itm_logits(fused) for fused in (pair, other_text, other_vision)])
    matches = (torch.arange(3 * sizes["b"], device=logits.device) < sizes["b"]).long()
    valid = torch.cat([torch.ones_like(has_text), has_text, has_vision])
    return global_mean(F.cross_entropy(logits, matches, reduction="none"), valid)


def masked_loss(model: MPLUG2, hidden: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
    """MLM: predict the original ids `b l` from hidden states `b l d`, at the masked positions `p`, indices into
    `(b l)`."""
    check(hidden, "b l d", **check(ids, "b l"))
    logits = model.mlm_logits(rearrange(hidden, "b l d -> (b l) d")[positions])
    return _mean(F.cross_entropy(logits, ids.flatten()[positions], reduction="none"))


def language_loss(
    model: MPLUG2, ids: Tensor, mask: Tensor, memory: Memory, positions: Tensor, memory_mask: Tensor | None = None,
    teacher_logits: Tensor | None = None, alpha: float = 0.0,
) -> Tensor:
    """LM: the next-token loss on ids `b l` ([CLS], tokens, [SEP], padding) at the positions `p`.

    The positions are indices into `(b (l-1))`, see `label_positions` in data/batches.py. With teacher_logits `p s`, the
    target is alpha * softmax(teacher_logits) + (1 - alpha) * the token.
    """
    logits = decoder_logits(model, ids, mask, memory, positions, memory_mask)
    losses = F.cross_entropy(logits, ids[:, 1:].flatten()[positions], reduction="none")
    if teacher_logits is not None:
        soft = -(teacher_logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
        losses = (1 - alpha) * losses + alpha * soft
    return _mean(losses)


def decoder_logits(
    model: MPLUG2, ids: Tensor, mask: Tensor, memory: Memory, positions: Tensor, memory_mask: Tensor | None = None
) -> Tensor:
    """The decoder's logits `p s` for the next tokens of ids `b l` at the positions `p`, indices into `(b (l-1))`."""
    check(mask, "b l", **check(ids, "b l"))
    decoder = model.require("decoder")
    hidden = decoder.hidden(ids[:, :-1], mask[:, :-1], memory, memory_mask)
    return decoder.logits(rearrange(hidden, "b l d -> (b l) d")[positions])


def label_loss(output: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of logits `b y` and classes `b`; squared error of numbers `b 1` and `b` (regression)."""
    check(label, "b", b=check(output, "b y")["b"])
    if label.is_floating_point():
        return _mean((output[:, 0] - label) ** 2)
    return _mean(F.cross_entropy(output, label, reduction="none"))


def box_losses(boxes: Tensor, target: Tensor) -> dict[str, Tensor]:
    """`l1`, the summed distance of the four numbers, and `giou`, 1 - GIoU, of boxes (cx, cy, w, h), both `b 4`."""
    return {"l1": _mean((boxes - target).abs().sum(dim=1)), "giou": _mean(1 - generalized_iou(boxes, target)[1])}


def location_loss(model: MPLUG2, fused: Tensor, vision: Tensor, text_mask: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the four location tokens of boxes `b 4`; the other arguments are those of `predict_box`."""
    tokens = model.require("box_head").tokens(target)
    memory = answer_memory(vision, fused, text_mask)
    logits = model.box_head.logits(model.require("decoder"), tokens[:, :-1], *memory)
    return _mean(F.cross_entropy(rearrange(logits, "b l p -> (b l) p"), tokens.flatten(), reduction="none"))


def _mean(losses: Tensor) -> Tensor:
    """The mean over all losses of all ranks."""
    return global_mean(losses, torch.ones_like(losses, dtype=torch.bool))
