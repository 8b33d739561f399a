"""All losses of a batch. Pre-training has five: VTC, VTM, MLM (see losses.py), captions from V', and answers from V'
and the fused question. Fine-tuning has those of its task: captions, answers, VTC and VTM, labels, or boxes.

A batch (data/batches.py) holds pixels and several texts about them, each as `<name>_ids` and `<name>_mask`:

    caption     for VTC and VTM                      masked      the caption with masked tokens, for MLM
    prompted    the caption after its prompt         question    with its answer; r questions per image or video
    text        with a label or a box

Axes: b batch of this rank, r texts per image or video, v visual tokens, l text tokens, d width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.losses import (
    TEMPERATURE_RANGE,
    box_losses,
    contrastive_loss,
    label_loss,
    language_loss,
    masked_loss,
    matching_loss,
)
from mplug2.objectives.packing import pad_and_concat, split_padded
from mplug2.objectives.self_critical import SelfCritical

MASKS = {"caption": "caption_mask", "masked": "caption_mask", "question": "question_mask"}
"""The mask of each text of a batch."""


class Objectives(nn.Module):
    """The losses by name: `vtc`, `vtm`, `mlm`, `caption` (or `reward`), `answer`, `label`, `l1` and `giou`, as far as
    model and batch have what they need. A module, so that DDP and FSDP wrap one forward.

    `ema_teacher` gives soft targets for answers and, with a queue, for VTC. `self_critical` replaces the caption loss.
    """

    def __init__(self, model: MPLUG2, ema_teacher: EMATeacher | None = None, self_critical: SelfCritical | None = None):
        super().__init__()
        self.model, self.ema_teacher, self.self_critical = model, ema_teacher, self_critical

    def forward(self, batch: dict) -> dict[str, Tensor]:
        model, losses, vision = self.model, {}, encode_visual(self.model, batch)
        if "masked_ids" in batch and vision is None:
            hidden = model.encode_text(batch["masked_ids"], batch["caption_mask"])
            losses["mlm"] = masked_loss(model, hidden, batch["caption_ids"], batch["masked_positions"])
        text = {} if vision is None else self.encode_texts(batch)
        if "caption" in text:
            losses |= self.pair_losses(batch, vision, text["caption"])
        if "prompted_ids" in batch and self.self_critical:
            losses["reward"] = self.self_critical.loss(model, vision, batch)
        elif "prompted_ids" in batch:
            losses["caption"] = language_loss(
                model, batch["prompted_ids"], batch["prompted_mask"], vision, batch["prompted_positions"]
            )
        if to_fuse := {name: text[name] for name in ("masked", "question") if name in text}:
            fused_vision, fused = self.fuse(batch, vision, to_fuse)
        if "masked" in text:
            losses["mlm"] = masked_loss(model, fused["masked"], batch["caption_ids"], batch["masked_positions"])
        if "question" in text:
            memory, memory_mask = answer_memory(fused_vision["question"], fused["question"], batch["question_mask"])
            soft_targets = self.ema_teacher.answer_logits(batch) if self.ema_teacher else ()
            losses["answer"] = language_loss(
                model, batch["answer_ids"], batch["answer_mask"], memory, batch["answer_positions"], memory_mask,
                *soft_targets,
            )
        if "label" in batch:
            output = model.classify(classification_input(model, batch, vision)[0], batch["task"])
            losses["label"] = label_loss(output, batch["label"])
        if "box" in batch:
            losses |= box_losses(model.predict_box(*classification_input(model, batch, vision)), batch["box"])
        return losses

    def pair_losses(self, batch: dict, vision: Tensor, text: Tensor) -> dict[str, Tensor]:
        """VTC and VTM of V' `b v d` and the captions of the batch, `b l d`."""
        model, mask, positive_id = self.model, batch["caption_mask"], batch["positive_id"]
        unit_vision, unit_text = model.project_vision(vision), model.project_text(text)
        with torch.no_grad():
            similarity = unit_vision @ unit_text.T / model.temperature.clamp(*TEMPERATURE_RANGE)
        if self.ema_teacher and self.ema_teacher.has_queue:
            vtc = self.ema_teacher.contrastive_loss(batch, unit_vision, unit_text, model.temperature, self.training)
        else:
            vtc = contrastive_loss(unit_vision, unit_text, model.temperature, positive_id)
        return {"vtc": vtc, "vtm": matching_loss(model, vision, text, mask, similarity, positive_id)}

    def encode_texts(self, batch: dict) -> dict[str, Tensor]:
        """The encoded texts that the model has a use for, `(b r) l d` by name: one large pass of the text encoder is
        faster than several small ones."""
        model, b = self.model, len(batch["pixels"])
        users = {"caption": "contrastive_text", "masked": "masked_head", "question": "decoder"}
        ids = {name: batch[f"{name}_ids"] for name, user in users.items()
               if hasattr(model, user) and f"{name}_ids" in batch}
        if not ids:
            return {}
        hidden = model.encode_text(pad_and_concat([*ids.values()], b),
                                   pad_and_concat([batch[MASKS[name]] for name in ids], b))
        parts = split_padded(hidden, [len(rows) // b for rows in ids.values()], b)
        return {name: part[:, : ids[name].shape[1]] for name, part in zip(ids, parts)}

    def fuse(self, batch: dict, vision: Tensor, text: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fuse several texts with V' `b v d` in one pass. Returns the visual tokens and the fused text, by name."""
        b, counts = len(vision), [len(rows) // len(vision) for rows in text.values()]
        vision, fused = self.model.fuse(
            vision, pad_and_concat([*text.values()], b), pad_and_concat([batch[MASKS[name]] for name in text], b)
        )
        # Connected-attention layers change the vision for each text. Otherwise all texts share it.
        visions = split_padded(vision, counts, b) if len(vision) > b else [vision] * len(text)
        parts = [part[:, : text[name].shape[1]] for name, part in zip(text, split_padded(fused, counts, b))]
        return dict(zip(text, visions)), dict(zip(text, parts))


def encode_visual(model: MPLUG2, batch: dict) -> Tensor | None:
    """V' `b v d` of pixels `b 3 t H W`; the joint V' of pairs of images `b 2 3 1 H W`; None for text alone."""
    if "pixels" not in batch:
        return None
    pixels = batch["pixels"]
    if pixels.dim() == 5:
        return model.encode_vision(pixels)
    vision = model.encode_vision(rearrange(pixels, "b two c t h w -> (b two) c t h w", two=2))
    return model.concat_pair(rearrange(vision, "(b two) v d -> b two v d", two=2))


def classification_input(model: MPLUG2, batch: dict, vision: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a label or a box is read from: V' `b v d`, the text of the batch `b l d`, or that text fused with V'. Also
    returns the visual tokens that leave fusion."""
    if "text_ids" not in batch:
        return vision, vision
    mask = batch["text_mask"]
    text = model.encode_text(batch["text_ids"], mask)
    if vision is None:
        return text, None
    vision, text = model.fuse(vision, text, mask)
    return text, vision
