"""All losses of a batch. Pre-training has five: VTC, VTM, MLM (see losses.py), captions from V', and answers from V'
and the fused question. Fine-tuning has those of its task: captions, answers, VTC and VTM, labels, or boxes.

A batch (data/batches.py) holds pixels and several texts about them, each as `<name>_ids` and `<name>_mask`:

    caption     for VTC and VTM                      masked      the caption with masked tokens, for MLM
    prompted    the caption after its prompt         question    with its answer; r questions per image or video
    text        with a label or a box

Without pixels, masked words and answers are predicted from the text alone.

Axes: b batch of this rank, r texts per image or video, v visual tokens, l text tokens, d width.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.losses import (
    TEMPERATURE_RANGE,
    box_losses,
    contrastive_loss,
    hard_negatives,
    label_loss,
    language_loss,
    location_loss,
    masked_loss,
    matching_loss,
    scaled_similarity,
)
from mplug2.objectives.packing import pad_and_concat, split_padded
from mplug2.objectives.self_critical import SelfCritical

TEXTS = {
    "caption": ("caption_mask", "contrastive_text", {"vtc", "vtm"}),
    "masked": ("caption_mask", "masked_head", {"mlm"}),
    "question": ("question_mask", "decoder", {"answer"}),
}
"""The texts of a batch that the text encoder reads: the mask, the module and the losses that need each."""


class Objectives(nn.Module):
    """The losses by name: `vtc`, `vtm`, `mlm`, `caption` (or `reward`), `answer`, `label`, `l1` and `giou` (or
    `location`), as far as model and batch have what they need. A module, so that DDP and FSDP wrap one forward.

    `ema_teacher` gives soft targets for answers and, with a queue, for VTC. `self_critical` replaces the caption loss.
    `mlm` chooses what masked captions are predicted from: the fused text (ALBEF, mPLUG), the text alone (the released
    model files), or both, with the mean of the two losses. Sentences without vision are always predicted from the text.
    `skip` names losses that are not computed, because their weight is 0.
    """

    def __init__(
        self, model: MPLUG2, ema_teacher: EMATeacher | None = None, self_critical: SelfCritical | None = None,
        mlm: Literal["fused", "text", "both"] = "fused", skip: frozenset[str] = frozenset(),
    ):
        super().__init__()
        self.model, self.ema_teacher, self.self_critical = model, ema_teacher, self_critical
        self.mlm, self.skip = mlm, skip

    def forward(self, batch: dict) -> dict[str, Tensor]:
        model, losses, vision = self.model, {}, encode_visual(self.model, batch)
        text, teacher = self.encode_texts(batch), self.ema_teacher
        teacher_vision = teacher.encode_vision(batch) if teacher else None
        mask = {name: batch[TEXTS[name][0]] for name in text}
        reads_vision = [] if vision is None else ["question"] if self.mlm == "text" else ["masked", "question"]
        if "caption" in text:
            losses, similarity = self.contrast(batch, vision, text["caption"], teacher_vision)
        if matching := "caption" in text and "vtm" not in self.skip:
            other_text, has_text = hard_negatives(similarity, batch["positive_id"])
            other_vision, has_vision = hard_negatives(similarity.T, batch["positive_id"])
            text["negative"], mask["negative"] = text["caption"][other_text], mask["caption"][other_text]
            reads_vision += ["caption", "negative"]
        to_fuse = {name: text[name] for name in reads_vision if name in text}
        fused_vision, fused = self.fuse(vision, to_fuse, mask) if to_fuse else ({}, {})
        if matching:
            elsewhere = model.fuse(vision[other_vision], text["caption"], mask["caption"])[1]
            losses["vtm"] = matching_loss(model, fused["caption"], fused["negative"], elsewhere, has_text, has_vision)
        if "prompted_ids" in batch and self.self_critical:
            losses["reward"] = self.self_critical.loss(model, vision, batch)
        elif "prompted_ids" in batch and "caption" not in self.skip:
            ids, prompted_mask, positions = (batch[f"prompted_{name}"] for name in ("ids", "mask", "positions"))
            losses["caption"] = language_loss(model, ids, prompted_mask, vision, positions)
        if "masked" in text:
            hidden = [fused["masked"]] if "masked" in fused else []
            hidden += [text["masked"]] if self.mlm == "both" or not hidden else []
            masked = [masked_loss(model, x, batch["caption_ids"], batch["masked_positions"]) for x in hidden]
            losses["mlm"] = sum(masked) / len(masked)
        if "question" in text:
            seen, read = fused_vision.get("question"), fused.get("question", text["question"])
            memory, memory_mask = answer_memory(seen, read, mask["question"])
            soft_targets = teacher.answer_logits(batch, teacher_vision) if teacher else ()
            losses["answer"] = language_loss(
                model, batch["answer_ids"], batch["answer_mask"], memory, batch["answer_positions"], memory_mask,
                *soft_targets,
            )
        if "label" in batch:
            output = model.classify(classification_input(model, batch, vision)[0], batch["task"])
            losses["label"] = label_loss(output, batch["label"])
        if "box" in batch:
            read = *classification_input(model, batch, vision), batch["text_mask"]
            if model.config.boxes == "tokens":
                losses["location"] = location_loss(model, *read, batch["box"])
            else:
                losses |= box_losses(model.predict_box(*read), batch["box"])
        return losses

    @torch.no_grad()
    def after_step(self, skipped: bool) -> None:
        """After a step, also a skipped one: clamp the temperature (checkpoints save it), and update the teacher."""
        if "contrastive" in self.model.components:
            self.model.temperature.clamp_(*TEMPERATURE_RANGE)
        if self.ema_teacher and skipped:
            self.ema_teacher.pending.clear()
        elif self.ema_teacher:
            self.ema_teacher.update(self.model)

    def contrast(self, batch: dict, vision: Tensor, text: Tensor, teacher_vision: Tensor | None) -> tuple[dict, Tensor]:
        """VTC, by name, of V' `b v d` and the captions of the batch, `b l d`, and their similarity `b b`, vision by
        text, without gradients."""
        model, losses, teacher = self.model, {}, self.ema_teacher
        vectors = model.project_vision(vision), model.project_text(text)
        with torch.no_grad():
            # Clamp the parameter itself, as ALBEF does: clamping a copy in the loss would stop its gradient for good.
            temperature = model.temperature.clamp_(*TEMPERATURE_RANGE)
            similarity = scaled_similarity(*vectors, temperature)
        if "vtc" not in self.skip and teacher and teacher.has_queue:
            losses["vtc"] = teacher.contrastive_loss(batch, teacher_vision, *vectors, model.temperature, self.training)
        elif "vtc" not in self.skip:
            losses["vtc"] = contrastive_loss(*vectors, model.temperature, batch["positive_id"])
        return losses, similarity

    def encode_texts(self, batch: dict) -> dict[str, Tensor]:
        """The encoded texts that the losses need, `(b r) l d` by name: one large pass of the text encoder is faster
        than several small ones. Captions need pixels to be compared with."""
        names = [name for name, (_, module, losses) in TEXTS.items() if f"{name}_ids" in batch
                 and hasattr(self.model, module) and losses - self.skip and (name != "caption" or "pixels" in batch)]
        if not names:
            return {}
        b, ids = len(batch["positive_id"]), [batch[f"{name}_ids"] for name in names]
        mask = pad_and_concat([batch[TEXTS[name][0]] for name in names], b)
        hidden = self.model.encode_text(pad_and_concat(ids, b), mask)
        parts = split_padded(hidden, [len(rows) // b for rows in ids], b)
        return {name: part[:, : rows.shape[1]] for name, rows, part in zip(names, ids, parts)}

    def fuse(
        self, vision: Tensor, text: dict[str, Tensor], mask: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fuse several texts with V' `b v d` in one pass: keys and values of V' are computed once. Returns the visual
        tokens and the fused text, by name."""
        b, counts = len(vision), [len(rows) // len(vision) for rows in text.values()]
        all_text, all_masks = (pad_and_concat([of[name] for name in text], b) for of in (text, mask))
        vision, fused = self.model.fuse(vision, all_text, all_masks)
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
