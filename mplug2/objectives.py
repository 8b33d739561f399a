"""What is trained: contrastive (VTC), matching (VTM), masked (MLM) and instruction language modelling (LM), section 3.2
of the paper; and the losses of the other tasks' heads, classes, numbers and boxes.

All losses are means over the valid samples or tokens of all processes (see distributed.py).

Axes: b batch of this process, B of all processes, r questions a sample, v visual tokens, l text tokens, d width,
s vocabulary, m queued vectors, y classes.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.distributed import gather, global_mean
from mplug2.model import MPLUG2, answer_memory
from mplug2.momentum import Momentum
from mplug2.self_critical import SelfCritical
from mplug2.shapes import check

TEMPERATURE_RANGE = (0.001, 0.5)
MASKS = {"caption": "caption_mask", "masked": "caption_mask", "question": "question_mask"}
"""Which mask of a batch belongs to its texts."""


def contrastive_loss(vision: Tensor, text: Tensor, temperature: Tensor, meaning: Tensor) -> Tensor:
    """VTC on unit vectors `b e`: each vision has to find its texts among those of all processes, and each text its
    visions. Pairs of equal `meaning` (`b`, integers) are positives of each other, and share the target evenly.

    Each process scores its own rows against columns that are gathered with gradients.
    """
    sizes = check(text, "b e", **check(vision, "b e"))
    check(meaning, "b", **sizes)
    temperature = temperature.clamp(*TEMPERATURE_RANGE)
    positive = (meaning[:, None] == gather(meaning)[None, :]).to(vision.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    losses = []
    for rows, columns in ((vision, text), (text, vision)):
        log_probs = (rows @ gather(columns).T / temperature).log_softmax(dim=1)
        losses.append(-(target * log_probs).sum(dim=1))
    return torch.stack(losses).mean()


def distilled_contrastive_loss(
    vision: Tensor, text: Tensor, temperature: Tensor, meaning: Tensor, teacher_vision: Tensor, teacher_text: Tensor,
    momentum: Momentum,
) -> Tensor:
    """VTC against the teacher's vectors `b e` of the batch of all processes, and those in its queue; the target is
    mixed with the teacher's own similarities (ALBEF, equation 6). Equal meanings share the rest of it, as above."""
    sizes = check(teacher_text, "b e", **check(teacher_vision, "b e", **check(text, "b e", **check(vision, "b e"))))
    check(meaning, "b", **sizes)
    temperature, alpha = temperature.clamp(*TEMPERATURE_RANGE), momentum.weight
    queued_vision, queued_text, queued_meaning = momentum.queue()
    positive = (meaning[:, None] == torch.cat([gather(meaning), queued_meaning])[None, :]).to(vision.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    losses = []
    for rows, teacher_rows, columns, queued in (
        (vision, teacher_vision, teacher_text, queued_text), (text, teacher_text, teacher_vision, queued_vision),
    ):
        columns = torch.cat([gather(columns), queued.to(columns.dtype)]).T
        soft = (teacher_rows @ columns / temperature.detach()).softmax(dim=1)
        log_probs = (rows @ columns / temperature).log_softmax(dim=1)
        losses.append(-((alpha * soft + (1 - alpha) * target) * log_probs).sum(dim=1))
    return torch.stack(losses).mean()


def hard_negatives(similarity: Tensor, meaning: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `similarity` (`b b`) a column of another meaning, drawn in proportion to softmax(similarity).

    Returns indices `b` and whether there was any such column, `b`.
    """
    negative = meaning[:, None] != meaning[None, :]
    exists = negative.any(dim=1)
    chance = similarity.softmax(dim=1) + 1e-6
    # A row without any negative draws at random; its loss is masked by `exists`.
    chance = torch.where(negative | ~exists[:, None], chance, 0.0)
    return torch.multinomial(chance, 1)[:, 0], exists


def matching_loss(
    model: MPLUG2, vision: Tensor, text: Tensor, text_mask: Tensor, similarity: Tensor, meaning: Tensor
) -> Tensor:
    """VTM: do vision `b v d` and text `b l d` belong together? Each pair is asked as it is, with one hard negative
    text, and with one hard negative vision; `similarity` (`b b`, vision by text, without gradients) draws them."""
    sizes = check(text, "b l d", **check(vision, "b v d"))
    check(similarity, "b b", **sizes)
    other_text, has_text = hard_negatives(similarity, meaning)
    other_vision, has_vision = hard_negatives(similarity.T, meaning)
    # Each vision with its own and with another text, which share its keys and values; each text with another vision.
    both = rearrange(torch.stack([text, text[other_text]]), "r b l d -> (b r) l d")
    both_mask = rearrange(torch.stack([text_mask, text_mask[other_text]]), "r b l -> (b r) l")
    matched, unmatched = rearrange(model.match(model.fuse(vision, both, both_mask)[1]), "(b r) y -> r b y", r=2, y=2)
    other = model.match(model.fuse(vision[other_vision], text, text_mask)[1])
    logits = torch.cat([matched, unmatched, other])
    matches = torch.zeros(3 * sizes["b"], dtype=torch.long, device=text.device)
    matches[: sizes["b"]] = 1
    valid = torch.cat([torch.ones_like(has_text), has_text, has_vision])
    return global_mean(F.cross_entropy(logits, matches, reduction="none"), valid)


def masked_loss(model: MPLUG2, hidden: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """MLM: the original `ids` (`b l`) at the masked `places`, indices into `(b l)`, from `hidden` (`b l d`)."""
    check(hidden, "b l d", **check(ids, "b l"))
    logits = model.unmask(rearrange(hidden, "b l d -> (b l) d")[places])  # only where there is something to predict
    losses = F.cross_entropy(logits, ids.flatten()[places], reduction="none")
    return global_mean(losses, torch.ones_like(losses, dtype=torch.bool))


def language_loss(
    model: MPLUG2, ids: Tensor, mask: Tensor, memory: Tensor, places: Tensor, memory_mask: Tensor | None = None,
    teacher: Tensor | None = None, alpha: float = 0.0,
) -> Tensor:
    """Next-token loss of the decoder on `ids` (`b l`, [CLS] first, [SEP] last, then padding) at the n `places` that
    carry a loss, indices into `(b (l-1))` (see `label_places` in data/loader.py).

    `teacher`: logits `n s` of another model, whose distribution over the vocabulary is the target by a share of
    `alpha`; the rest of the target is the token itself.
    """
    logits = predictions(model, ids, mask, memory, places, memory_mask)
    losses = F.cross_entropy(logits, ids[:, 1:].flatten()[places], reduction="none")
    if teacher is not None:
        soft = -(teacher.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
        losses = (1 - alpha) * losses + alpha * soft
    return global_mean(losses, torch.ones_like(losses, dtype=torch.bool))


def predictions(
    model: MPLUG2, ids: Tensor, mask: Tensor, memory: Tensor, places: Tensor, memory_mask: Tensor | None = None
) -> Tensor:
    """The decoder's logits `n s` for the next tokens of `ids` (`b l`) at n `places`, indices into `(b (l-1))`."""
    check(mask, "b l", **check(ids, "b l"))
    decoder = model.part("decoder")
    hidden = decoder.hidden(ids[:, :-1], mask[:, :-1], memory, memory_mask)
    return decoder.logits(rearrange(hidden, "b l d -> (b l) d")[places])


def label_loss(output: Tensor, label: Tensor) -> Tensor:
    """Of logits `b y` and class numbers `b`: cross-entropy; of numbers `b 1` and `b` (regression): squared error."""
    sizes = check(output, "b y")
    check(label, "b", b=sizes["b"])
    if label.is_floating_point():
        losses = (output[:, 0] - label) ** 2
    else:
        losses = F.cross_entropy(output, label, reduction="none")
    return global_mean(losses, torch.ones_like(losses, dtype=torch.bool))


def generalised_iou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
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
    """`l1`, the summed distance of the four numbers, and `giou`, 1 - GIoU; boxes as for `generalised_iou`."""
    valid = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    return {
        "l1": global_mean((boxes - truth).abs().sum(dim=1), valid),
        "giou": global_mean(1 - generalised_iou(boxes, truth)[1], valid),
    }


def join(texts: list[Tensor], b: int) -> Tensor:
    """Texts about the same b clips, each `(b r) l ...` with r and l of its own -> all in one, `(b r) l ...`, those
    about a clip in a row; shorter ones are padded with zeros."""
    length = max(text.shape[1] for text in texts)
    padded = [torch.cat([text, text.new_zeros(text.shape[0], length - text.shape[1], *text.shape[2:])], dim=1)
              for text in texts]
    return torch.cat([text.unflatten(0, (b, -1)) for text in padded], dim=1).flatten(0, 1)


def split(joined: Tensor, counts: list[int], b: int) -> list[Tensor]:
    """What became of joined texts, `(b R) ...`, apart again: `(b r) ...` for each r of `counts`."""
    return [part.flatten(0, 1) for part in joined.unflatten(0, (b, -1)).split(counts, dim=1)]


class Objectives(nn.Module):
    """The losses of a batch, by name: `vtc`, `vtm`, `mlm`, `caption` (or `reward`), `answer`, `label`, `l1`, `giou`, as
    far as the model has the modules for them and the batch (see data/loader.py) the texts. A module, so that a
    distributed wrapper sees one forward.

    `momentum`: its teacher's soft targets for answers and, if it has a queue, for VTC. `self_critical`: captions are
    trained for their reward, in place of the next-token loss.
    """

    def __init__(
        self, model: MPLUG2, momentum: Momentum | None = None, self_critical: SelfCritical | None = None
    ):
        super().__init__()
        self.model, self.momentum, self.self_critical = model, momentum, self_critical

    def forward(self, batch: dict) -> dict[str, Tensor]:
        model, losses, vision = self.model, {}, encode_pixels(self.model, batch)
        if "masked_ids" in batch and vision is None:
            hidden = model.encode_text(batch["masked_ids"], batch["caption_mask"])
            losses["mlm"] = masked_loss(model, hidden, batch["caption_ids"], batch["masked_places"])
        text = {} if vision is None else self.encode_texts(batch)
        if "caption" in text:
            losses |= self.pairs(batch, vision, text["caption"])
        if "prompted_ids" in batch and self.self_critical:
            losses["reward"] = self.self_critical.loss(model, vision, batch)
        elif "prompted_ids" in batch:
            losses["caption"] = language_loss(
                model, batch["prompted_ids"], batch["prompted_mask"], vision, batch["prompted_places"]
            )
        asked = {name: text[name] for name in ("masked", "question") if name in text}
        if asked:
            seen, fused = self.fuse(batch, vision, asked)
        if "masked" in asked:
            losses["mlm"] = masked_loss(model, fused["masked"], batch["caption_ids"], batch["masked_places"])
        if "question" in asked:
            memory, memory_mask = answer_memory(seen["question"], fused["question"], batch["question_mask"])
            losses["answer"] = language_loss(
                model, batch["answer_ids"], batch["answer_mask"], memory, batch["answer_places"], memory_mask,
                *self.soft_answers(batch),
            )
        if "label" in batch:
            output = model.classify(described(model, batch, vision)[0], batch["task"])
            losses["label"] = label_loss(output, batch["label"])
        if "box" in batch:
            losses |= box_losses(model.locate(*described(model, batch, vision)), batch["box"])
        return losses

    @torch.no_grad()
    def soft_answers(self, batch: dict) -> tuple[Tensor | None, float]:
        """The teacher's logits `n s` at the places of the answers, and their weight; None without a teacher."""
        if self.momentum is None:
            return None, 0.0
        teacher, mask = self.momentum.teacher, batch["question_mask"]
        vision = teacher.encode_vision(batch["pixels"])
        seen, fused = teacher.fuse(vision, teacher.encode_text(batch["question_ids"], mask), mask)
        memory, memory_mask = answer_memory(seen, fused, mask)
        logits = predictions(
            teacher, batch["answer_ids"], batch["answer_mask"], memory, batch["answer_places"], memory_mask
        )
        return logits, self.momentum.weight

    def encode_texts(self, batch: dict) -> dict[str, Tensor]:
        """The texts that the model has a use for, `(b r) l d` by name. They go through the text encoder together:
        one large pass is faster than several small ones."""
        model, b = self.model, len(batch["pixels"])
        names = [name for name, module in (("caption", "contrastive_text"), ("masked", "masked_head"),
                                           ("question", "decoder")) if hasattr(model, module)]
        ids = {name: batch[f"{name}_ids"] for name in names if f"{name}_ids" in batch}
        if not ids:
            return {}
        hidden = model.encode_text(join([*ids.values()], b), join([batch[MASKS[name]] for name in ids], b))
        parts = split(hidden, [len(of_name) // b for of_name in ids.values()], b)
        return {name: part[:, : ids[name].shape[1]] for name, part in zip(ids, parts)}

    def fuse(self, batch: dict, vision: Tensor, text: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Texts of several names, fused with their own vision `b v d` in one pass: vision and fused text by name."""
        b, counts = len(vision), [len(of_name) // len(vision) for of_name in text.values()]
        seen, fused = self.model.fuse(
            vision, join([*text.values()], b), join([batch[MASKS[name]] for name in text], b)
        )
        # Connected layers change the vision for each text; else all texts share it.
        visions = split(seen, counts, b) if len(seen) > b else [vision] * len(text)
        parts = [part[:, : text[name].shape[1]] for name, part in zip(text, split(fused, counts, b))]
        return dict(zip(text, visions)), dict(zip(text, parts))

    def pairs(self, batch: dict, vision: Tensor, text: Tensor) -> dict[str, Tensor]:
        """VTC and VTM of vision `b v d` and the captions of the batch, `b l d`."""
        model, mask, meaning = self.model, batch["caption_mask"], batch["meaning"]
        unit_vision, unit_text = model.project_vision(vision), model.project_text(text)
        with torch.no_grad():
            similarity = unit_vision @ unit_text.T / model.temperature.clamp(*TEMPERATURE_RANGE)
        if self.momentum and hasattr(self.momentum, "queued"):
            teacher = self.momentum.teacher
            with torch.no_grad():
                vectors = (
                    teacher.project_vision(teacher.encode_vision(batch["pixels"])),
                    teacher.project_text(teacher.encode_text(batch["caption_ids"], mask)),
                )
            vtc = distilled_contrastive_loss(
                unit_vision, unit_text, model.temperature, meaning, *vectors, self.momentum
            )
            if self.training:
                self.momentum.enqueue(*vectors, meaning)
        else:
            vtc = contrastive_loss(unit_vision, unit_text, model.temperature, meaning)
        return {"vtc": vtc, "vtm": matching_loss(model, vision, text, mask, similarity, meaning)}


def encode_pixels(model: MPLUG2, batch: dict) -> Tensor | None:
    """V' `b v d` of the pixels, `b 3 t H W`; of pairs of images, `b 2 3 1 H W`, both joined; None for text."""
    if "pixels" not in batch:
        return None
    pixels = batch["pixels"]
    if pixels.dim() == 5:
        return model.encode_vision(pixels)
    vision = model.encode_vision(rearrange(pixels, "b two c t h w -> (b two) c t h w", two=2))
    return model.join_pair(rearrange(vision, "(b two) v d -> b two v d", two=2))


def described(model: MPLUG2, batch: dict, vision: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a label or a box is read from: V' `b v d`, or the text of the batch `b l d`, fused with V' if there is; and
    V' as fusion leaves it."""
    if "text_ids" not in batch:
        return vision, vision
    mask = batch["text_mask"]
    text = model.encode_text(batch["text_ids"], mask)
    if vision is None:
        return text, None
    vision, text = model.fuse(vision, text, mask)
    return text, vision
