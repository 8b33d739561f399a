"""What is trained: contrastive (VTC), matching (VTM), masked (MLM) and instruction language modelling (LM).

Section 3.2 of the paper. All losses are means over the valid samples or tokens of all processes (see distributed.py).

Axes: b batch of this process, B of all processes, r questions a sample, v visual tokens, l text tokens, d width,
s vocabulary.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.distributed import gather, global_mean
from mplug2.model import MPLUG2, answer_memory
from mplug2.shapes import check

TEMPERATURE_RANGE = (0.001, 0.5)


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


def masked_loss(model: MPLUG2, hidden: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
    """MLM: the original `ids` (`b l`) at the places that were `masked` (`b l`), from `hidden` (`b l d`)."""
    sizes = check(masked, "b l", **check(ids, "b l"))
    check(hidden, "b l d", **sizes)
    logits = model.unmask(hidden[masked])  # only where there is something to predict
    losses = F.cross_entropy(logits, ids[masked], reduction="none")
    return global_mean(losses, torch.ones_like(losses, dtype=torch.bool))


def language_loss(
    model: MPLUG2, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None = None, prompt_length: int = 1
) -> Tensor:
    """Next-token loss of the decoder on `ids` (`b l`, [CLS] first, [SEP] last, then padding).

    The first `prompt_length` tokens ([CLS] and a prompt) are given: they carry no loss, and neither does padding.
    """
    check(mask, "b l", **check(ids, "b l"))
    logits = model.decode(ids[:, :-1], mask[:, :-1], memory, memory_mask)
    valid = mask[:, 1:].clone()
    valid[:, : prompt_length - 1] = False
    losses = F.cross_entropy(rearrange(logits, "b l s -> b s l"), ids[:, 1:], reduction="none")
    return global_mean(losses, valid)


class Objectives(nn.Module):
    """The losses of a batch, by name: `vtc`, `vtm`, `mlm`, `caption` and `answer`, as far as the model has the
    modules for them and the batch (see data/loader.py) the texts. A module, so that a distributed wrapper sees one
    forward.
    """

    def __init__(self, model: MPLUG2):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> dict[str, Tensor]:
        if "pixels" not in batch:
            return {"mlm": self.masked(batch, None)}
        losses, vision = {}, self.model.encode_vision(batch["pixels"])
        if hasattr(self.model, "contrastive_vision"):
            losses |= self.pairs(batch, vision)
        if hasattr(self.model, "masked_head"):
            losses["mlm"] = self.masked(batch, vision)
        if "prompted_ids" in batch:
            losses["caption"] = language_loss(
                self.model, batch["prompted_ids"], batch["prompted_mask"], vision, prompt_length=batch["prompt_length"]
            )
        if "question_ids" in batch:
            losses["answer"] = self.answers(batch, vision)
        return losses

    def pairs(self, batch: dict, vision: Tensor) -> dict[str, Tensor]:
        """VTC and VTM of vision `b v d` and the captions of the batch."""
        model, mask, meaning = self.model, batch["caption_mask"], batch["meaning"]
        text = model.encode_text(batch["caption_ids"], mask)
        unit_vision, unit_text = model.project_vision(vision), model.project_text(text)
        with torch.no_grad():
            similarity = unit_vision @ unit_text.T / model.temperature.clamp(*TEMPERATURE_RANGE)
        return {
            "vtc": contrastive_loss(unit_vision, unit_text, model.temperature, meaning),
            "vtm": matching_loss(model, vision, text, mask, similarity, meaning),
        }

    def masked(self, batch: dict, vision: Tensor | None) -> Tensor:
        """MLM from the fused text, or from the text alone where there is no vision."""
        hidden = self.model.encode_text(batch["masked_ids"], batch["caption_mask"])
        if vision is not None:
            _, hidden = self.model.fuse(vision, hidden, batch["caption_mask"])
        return masked_loss(self.model, hidden, batch["caption_ids"], batch["masked"])

    def answers(self, batch: dict, vision: Tensor) -> Tensor:
        """r questions about each clip share its visual tokens."""
        mask = batch["question_mask"]
        seen, fused = self.model.fuse(vision, self.model.encode_text(batch["question_ids"], mask), mask)
        memory, memory_mask = answer_memory(seen, fused, mask)
        return language_loss(self.model, batch["answer_ids"], batch["answer_mask"], memory, memory_mask)
