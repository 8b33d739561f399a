"""Initialize text encoder, universal layers, fusion and decoder from a BERT (parameter names of Hugging Face)."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mplug2.model.mplug2 import MPLUG2
from mplug2.pretrained.entries import (
    BERT_EMBEDDINGS,
    BERT_HEAD,
    BERT_LAYER,
    Names,
    check_bert_settings,
    check_entries,
    entries_of,
    setting,
    stack_entries,
    within,
)
from mplug2.pretrained.files import open_settings, open_weights

SOURCE = "BERT"


@torch.no_grad()
def from_bert(model: MPLUG2, source: str | Path | Mapping[str, Tensor], settings: Mapping | None = None) -> None:
    """Fill the text parts of `model` with the weights of a BERT. `source` is a file, a folder or a state dict.

    `settings` is Hugging Face's `config.json`, by default the one next to the weights. BERT's first layers become the
    text encoder with the universal layers, and also the decoder. Its last layers become the fusion module. If the
    source has a language-model head, both of our heads are filled with it. Everything that BERT does not have keeps its
    initial values: cross-attention, latents, the projection of vision, the other heads.

    Raises ValueError if sizes, heads or settings differ from the model's, or if entries are missing or left over.
    """
    state = plain_names(source if isinstance(source, Mapping) else open_weights(source))
    if settings is None and not isinstance(source, Mapping):
        settings = open_settings(source)
    if settings is None:
        raise ValueError(f"{SOURCE}: no settings next to the weights; add BERT's config.json to their folder")
    check_bert_settings(settings, SOURCE)
    config, depth = model.config, setting(settings, "num_hidden_layers", SOURCE)
    if not settings.get("tie_word_embeddings", True):
        raise ValueError(f"{SOURCE}: tie_word_embeddings=False is not supported: our head is tied to the embeddings")
    if setting(settings, "num_attention_heads", SOURCE) != config.heads:
        raise ValueError(f"{SOURCE}: num_attention_heads={settings['num_attention_heads']}, but the model has "
                         f"heads={config.heads}")
    for name in ("text_layers", "fusion_layers", "decoder_layers"):
        if getattr(config, name) > depth:
            raise ValueError(f"{SOURCE}: num_hidden_layers={depth}, but the model has {name}={getattr(config, name)}")

    has_head = any(name.startswith("cls.predictions.") for name in state)
    names = bert_names(model, depth, has_head)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    used = {entry for name in parameters for entry in names[name]}
    check_entries(state, used, never_used(depth), SOURCE)
    for name, value in stack_entries(parameters, names, state, {}, SOURCE).items():
        parameters[name].copy_(value)


def bert_names(model: MPLUG2, depth: int, has_head: bool) -> Names:
    """The entries of BERT that make each parameter, for all modules that a model may have."""
    config, names = model.config, {}
    for module in ("text_encoder", "decoder"):
        names |= within(f"{module}.embeddings", BERT_EMBEDDINGS, "embeddings")
    lower = config.text_layers - config.universal_layers
    for module, first, count in (
        ("text_encoder", 0, lower), ("universal", lower, config.universal_layers),
        ("fusion", depth - config.fusion_layers, config.fusion_layers), ("decoder", 0, config.decoder_layers),
    ):
        for i in range(count):
            names |= within(f"{module}.layers.{i}", BERT_LAYER, f"encoder.layer.{first + i}")
    if has_head:
        for head in ("decoder.head", "masked_head"):
            names |= within(head, BERT_HEAD, "cls.predictions")
    return names


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix `bert.`, and with today's names for the LayerNorm parameters of old files."""
    renamed = {}
    for name, entry in state.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        renamed[name.removeprefix("bert.")] = entry
    return renamed


def never_used(depth: int) -> list[str]:
    """Patterns of BERT's entries that a model may leave unused: layers beyond its own, the pooler and the heads."""
    return [
        rf"encoder\.layer\.({'|'.join(map(str, range(depth)))})\.{entries_of(BERT_LAYER)}",
        rf"embeddings\.({entries_of(BERT_EMBEDDINGS)}|position_ids)|pooler\.dense\.(weight|bias)",
        rf"cls\.(predictions\.({entries_of(BERT_HEAD)}|decoder\.(weight|bias))|seq_relationship\.(weight|bias))",
    ]
