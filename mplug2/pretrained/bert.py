"""BERT as the start of text encoder, universal layers, fusion and decoder, in the names of Hugging Face."""

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
    """Fill the text parts of `model` with the weights of a BERT: `source` is a file, a folder or a state dict.

    `settings` is Hugging Face's `config.json`, by default the one beside the weights. Text encoder and universal layers
    are BERT's first layers, and so is the decoder; fusion is its last ones. Both language-model heads are BERT's,
    unless the source comes without one. What BERT does not have keeps its values: all cross-attention, the latents,
    the projection of vision, the other heads. Raises ValueError if the sizes, heads or settings are not the model's,
    or if entries are missing or left over.
    """
    state = plain_names(source if isinstance(source, Mapping) else open_weights(source))
    if settings is None and not isinstance(source, Mapping):
        settings = open_settings(source)
    if settings is None:
        raise ValueError(f"{SOURCE}: there are no settings beside the weights; give those of config.json")
    check_bert_settings(settings, SOURCE)
    config, depth = model.config, setting(settings, "num_hidden_layers", SOURCE)
    if not settings.get("tie_word_embeddings", True):
        raise ValueError(f"{SOURCE}: tie_word_embeddings=False cannot be followed: our head is tied to the embeddings")
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
    """Which entries make which parameters, for all the modules that a model may have."""
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
    """Names without the prefix `bert.`; the LayerNorm parameters of the first files get their later names."""
    renamed = {}
    for name, entry in state.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        renamed[name.removeprefix("bert.")] = entry
    return renamed


def never_used(depth: int) -> list[str]:
    """Patterns of the entries of BERT that a model may do without: layers beyond its own, and the heads."""
    return [
        rf"encoder\.layer\.({'|'.join(map(str, range(depth)))})\.{entries_of(BERT_LAYER)}",
        rf"embeddings\.({entries_of(BERT_EMBEDDINGS)}|position_ids)|pooler\.dense\.(weight|bias)",
        rf"cls\.(predictions\.({entries_of(BERT_HEAD)}|decoder\.(weight|bias))|seq_relationship\.(weight|bias))",
    ]
