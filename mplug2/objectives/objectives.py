"""What is trained: contrastive (VTC), matching (VTM), masked (MLM) and instruction language modelling (LM), section 3.2
of the paper; and the losses of the other tasks' heads, classes, numbers and boxes.

All losses are means over the valid samples or tokens of all processes (see distributed.py).

Axes: b batch of this process, B of all processes, r questions a sample, v visual tokens, l text tokens, d width,
s vocabulary, m queued vectors, y classes.
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
    decoder_logits,
    distilled_contrastive_loss,
    label_loss,
    language_loss,
    masked_loss,
    matching_loss,
)
from mplug2.objectives.self_critical import SelfCritical

MASKS = {"caption": "caption_mask", "masked": "caption_mask", "question": "question_mask"}
"""Which mask of a batch belongs to its texts."""


def pad_and_concat(texts: list[Tensor], b: int) -> Tensor:
    """Texts about the same b clips, each `(b r) l ...` with r and l of its own -> all in one, `(b r) l ...`, those
    about a clip in a row; shorter ones are padded with zeros."""
    length = max(text.shape[1] for text in texts)
    padded = [torch.cat([text, text.new_zeros(text.shape[0], length - text.shape[1], *text.shape[2:])], dim=1)
              for text in texts]
    return torch.cat([text.unflatten(0, (b, -1)) for text in padded], dim=1).flatten(0, 1)


def split_padded(joined: Tensor, counts: list[int], b: int) -> list[Tensor]:
    """What became of joined texts, `(b R) ...`, apart again: `(b r) ...` for each r of `counts`."""
    return [part.flatten(0, 1) for part in joined.unflatten(0, (b, -1)).split(counts, dim=1)]


class Objectives(nn.Module):
    """The losses of a batch, by name: `vtc`, `vtm`, `mlm`, `caption` (or `reward`), `answer`, `label`, `l1`, `giou`, as
    far as the model has the modules for them and the batch (see data/loader.py) the texts. A module, so that a
    distributed wrapper sees one forward.

    `ema_teacher`: its teacher's soft targets for answers and, if it has a queue, for VTC. `self_critical`: captions are
    trained for their reward, in place of the next-token loss.
    """

    def __init__(
        self, model: MPLUG2, ema_teacher: EMATeacher | None = None, self_critical: SelfCritical | None = None
    ):
        super().__init__()
        self.model, self.ema_teacher, self.self_critical = model, ema_teacher, self_critical

    def forward(self, batch: dict) -> dict[str, Tensor]:
        model, losses, vision = self.model, {}, encode_visual(self.model, batch)
        if "masked_ids" in batch and vision is None:
            hidden = model.encode_text(batch["masked_ids"], batch["caption_mask"])
            losses["mlm"] = masked_loss(model, hidden, batch["caption_ids"], batch["masked_positions"])
        text = {} if vision is None else self.encode_texts(batch)
        if "caption" in text:
            losses |= self.pairs(batch, vision, text["caption"])
        if "prompted_ids" in batch and self.self_critical:
            losses["reward"] = self.self_critical.loss(model, vision, batch)
        elif "prompted_ids" in batch:
            losses["caption"] = language_loss(
                model, batch["prompted_ids"], batch["prompted_mask"], vision, batch["prompted_positions"]
            )
        asked = {name: text[name] for name in ("masked", "question") if name in text}
        if asked:
            seen, fused = self.fuse(batch, vision, asked)
        if "masked" in asked:
            losses["mlm"] = masked_loss(model, fused["masked"], batch["caption_ids"], batch["masked_positions"])
        if "question" in asked:
            memory, memory_mask = answer_memory(seen["question"], fused["question"], batch["question_mask"])
            losses["answer"] = language_loss(
                model, batch["answer_ids"], batch["answer_mask"], memory, batch["answer_positions"], memory_mask,
                *self.soft_answers(batch),
            )
        if "label" in batch:
            output = model.classify(classification_input(model, batch, vision)[0], batch["task"])
            losses["label"] = label_loss(output, batch["label"])
        if "box" in batch:
            losses |= box_losses(model.predict_box(*classification_input(model, batch, vision)), batch["box"])
        return losses

    @torch.no_grad()
    def soft_answers(self, batch: dict) -> tuple[Tensor | None, float]:
        """The teacher's logits `n s` at the positions of the answers, and their weight; None without a teacher."""
        if self.ema_teacher is None:
            return None, 0.0
        teacher, mask = self.ema_teacher.teacher, batch["question_mask"]
        vision = teacher.encode_vision(batch["pixels"])
        seen, fused = teacher.fuse(vision, teacher.encode_text(batch["question_ids"], mask), mask)
        memory, memory_mask = answer_memory(seen, fused, mask)
        logits = decoder_logits(
            teacher, batch["answer_ids"], batch["answer_mask"], memory, batch["answer_positions"], memory_mask
        )
        return logits, self.ema_teacher.alpha

    def encode_texts(self, batch: dict) -> dict[str, Tensor]:
        """The texts that the model has a use for, `(b r) l d` by name. They go through the text encoder together:
        one large pass is faster than several small ones."""
        model, b = self.model, len(batch["pixels"])
        names = [name for name, module in (("caption", "contrastive_text"), ("masked", "masked_head"),
                                           ("question", "decoder")) if hasattr(model, module)]
        ids = {name: batch[f"{name}_ids"] for name in names if f"{name}_ids" in batch}
        if not ids:
            return {}
        hidden = model.encode_text(pad_and_concat([*ids.values()], b),
                                   pad_and_concat([batch[MASKS[name]] for name in ids], b))
        parts = split_padded(hidden, [len(of_name) // b for of_name in ids.values()], b)
        return {name: part[:, : ids[name].shape[1]] for name, part in zip(ids, parts)}

    def fuse(self, batch: dict, vision: Tensor, text: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Texts of several names, fused with their own vision `b v d` in one pass: vision and fused text by name."""
        b, counts = len(vision), [len(of_name) // len(vision) for of_name in text.values()]
        seen, fused = self.model.fuse(
            vision, pad_and_concat([*text.values()], b), pad_and_concat([batch[MASKS[name]] for name in text], b)
        )
        # Connected layers change the vision for each text; else all texts share it.
        visions = split_padded(seen, counts, b) if len(seen) > b else [vision] * len(text)
        parts = [part[:, : text[name].shape[1]] for name, part in zip(text, split_padded(fused, counts, b))]
        return dict(zip(text, visions)), dict(zip(text, parts))

    def pairs(self, batch: dict, vision: Tensor, text: Tensor) -> dict[str, Tensor]:
        """VTC and VTM of vision `b v d` and the captions of the batch, `b l d`."""
        model, mask, positive_id = self.model, batch["caption_mask"], batch["positive_id"]
        unit_vision, unit_text = model.project_vision(vision), model.project_text(text)
        with torch.no_grad():
            similarity = unit_vision @ unit_text.T / model.temperature.clamp(*TEMPERATURE_RANGE)
        if self.ema_teacher and hasattr(self.ema_teacher, "queued"):
            teacher = self.ema_teacher.teacher
            with torch.no_grad():
                vectors = (
                    teacher.project_vision(teacher.encode_vision(batch["pixels"])),
                    teacher.project_text(teacher.encode_text(batch["caption_ids"], mask)),
                )
            vtc = distilled_contrastive_loss(
                unit_vision, unit_text, model.temperature, positive_id, *vectors, self.ema_teacher
            )
            if self.training:
                self.ema_teacher.enqueue(*vectors, positive_id)
        else:
            vtc = contrastive_loss(unit_vision, unit_text, model.temperature, positive_id)
        return {"vtc": vtc, "vtm": matching_loss(model, vision, text, mask, similarity, positive_id)}


def encode_visual(model: MPLUG2, batch: dict) -> Tensor | None:
    """V' `b v d` of the pixels, `b 3 t H W`; of pairs of images, `b 2 3 1 H W`, both joined; None for text."""
    if "pixels" not in batch:
        return None
    pixels = batch["pixels"]
    if pixels.dim() == 5:
        return model.encode_vision(pixels)
    vision = model.encode_vision(rearrange(pixels, "b two c t h w -> (b two) c t h w", two=2))
    return model.concat_pair(rearrange(vision, "(b two) v d -> b two v d", two=2))


def classification_input(model: MPLUG2, batch: dict, vision: Tensor | None) -> tuple[Tensor, Tensor | None]:
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
