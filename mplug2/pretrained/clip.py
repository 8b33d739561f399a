"""Initialize the vision encoder from a CLIP ViT, in the parameter names of OpenAI, open_clip or Hugging Face.

Axes: d width, k frames that a patch spans, p side of a patch.
"""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from mplug2.model.local_temporal import LocalTemporal
from mplug2.model.mplug2 import MPLUG2
from mplug2.pretrained.entries import (
    CLIP_BLOCK,
    CLIP_VISION,
    Names,
    check_entries,
    check_shape,
    linear_from_kernel,
    resize_positions,
    stack_entries,
    weights_and_biases,
    within,
)
from mplug2.pretrained.files import open_settings, open_weights

SOURCE = "CLIP"
HF_VISION: Names = {
    "patch_embed.class_token": ("embeddings.class_embedding",),
    "patch_embed.position": ("embeddings.position_embedding.weight",),
    "patch_embed.linear.weight": ("embeddings.patch_embedding.weight",),
    **weights_and_biases({"patch_embed.norm": "pre_layrnorm", "norm": "post_layernorm"}),  # their spelling
}
HF_BLOCK = weights_and_biases({
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": "self_attn.out_proj", "attention_norm": "layer_norm1", "mlp_norm": "layer_norm2",
    "mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2",
})
NEVER_USED = (  # the text tower, and the projections of both towers
    r"visual\.proj|positional_embedding|text_projection(\.weight)?|logit_scale|logit_bias|token_embedding\.weight",
    r"transformer\.resblocks\..+|ln_final\.(weight|bias)|attn_mask|input_resolution|context_length|vocab_size|text\..+",
    r"(vision_model\.)?embeddings\.position_ids|text_model\..+|visual_projection\.weight",
)


@torch.no_grad()
def from_clip(model: MPLUG2, source: str | Path | Mapping[str, Tensor], settings: Mapping | None = None) -> None:
    """Fill the vision encoder of `model` with the weights of a CLIP ViT. `source` is a file, a folder or a state dict.

    `settings` give the number of heads and the activation. By default they are read from the file next to the weights:
    Hugging Face's `config.json` or open_clip's `open_clip_config.json`. OpenAI's files have no settings, but the same
    names as open_clip's files, so `{"quick_gelu": True}` must be given for them.

    The local temporal modules are reset to identities. For images the encoder then computes what CLIP computes, with
    its last LayerNorm on every token. Positions are resized to the model's resolution. With temporal down-sampling the
    patch kernel is put at the center of the three frames.

    Raises ValueError if sizes, heads or activation differ from the model's, or if entries are missing or left over.
    """
    state = dict(source if isinstance(source, Mapping) else open_weights(source))
    if settings is None and not isinstance(source, Mapping):
        settings = open_settings(source)
    encoder, config = model.vision_encoder, model.config
    names = clip_names(state, config.vision_layers)
    check_settings(settings or {}, config.vision_width, config.vision_heads)
    check_entries(state, {entry for entries in names.values() for entry in entries}, NEVER_USED, SOURCE)
    parameters = {name: parameter for name, parameter in encoder.named_parameters() if name in names}

    (kernel_name,), (position_name,) = names["patch_embed.linear.weight"], names["patch_embed.position"]
    kernel = state[kernel_name]
    check_shape(kernel_name, kernel, (config.vision_width, 3, config.patch_size, config.patch_size), SOURCE)
    taps = torch.zeros(len(kernel), 3, encoder.patch_embed.span, *kernel.shape[2:])
    taps[:, :, encoder.patch_embed.span // 2] = kernel
    state[kernel_name] = linear_from_kernel(taps)
    position = state[position_name]
    state[position_name] = resize_positions(position, config.patches, f"{SOURCE}: the entry {position_name}")
    for name, value in stack_entries(parameters, names, state, {}, SOURCE).items():
        parameters[name].copy_(value)
    for module in encoder.modules():
        if isinstance(module, LocalTemporal):
            module.reset_up()


def clip_names(state: Mapping[str, Tensor], blocks: int) -> Names:
    """The entries that make each parameter of our vision encoder, in the naming scheme that `state` uses."""
    if "visual.class_embedding" in state:
        vision, block, prefix, stack = CLIP_VISION, CLIP_BLOCK, "visual.", "transformer.resblocks"
    elif any(name.endswith("embeddings.class_embedding") for name in state):
        vision, block, stack = HF_VISION, HF_BLOCK, "encoder.layers"
        prefix = "vision_model." if "vision_model.embeddings.class_embedding" in state else ""
    else:
        raise ValueError(f"{SOURCE}: no class embedding of a ViT found; expected a ViT in the names of OpenAI, "
                         "open_clip or Hugging Face")
    names = {ours: tuple(f"{prefix}{entry}" for entry in entries) for ours, entries in vision.items()}
    for i in range(blocks):
        names |= within(f"blocks.{i}", block, f"{prefix}{stack}.{i}")
    return names


def clip_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of a CLIP ViT, as fields of our `ModelConfig`, from the shapes of its weights."""
    layers = 0
    while clip_names(state, layers + 1)[f"blocks.{layers}.attention_norm.bias"][0] in state:
        layers += 1
    names = clip_names(state, layers)
    (kernel,), (position,) = names["patch_embed.linear.weight"], names["patch_embed.position"]
    width, _, _, patch = state[kernel].shape
    return {"vision_width": width, "vision_layers": layers, "patch_size": patch,
            "image_size": patch * isqrt(len(state[position]) - 1)}


def check_settings(settings: Mapping, width: int, heads: int) -> None:
    """Raise ValueError for a setting of CLIP that our vision encoder does not support. The message names it."""
    if "model_type" in settings:  # Hugging Face, which leaves out what has its default value
        vision = settings.get("vision_config", settings)
        found = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12, **vision}
        computed = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": heads}
        if settings["model_type"] not in ("clip", "clip_vision_model"):
            raise ValueError(f"{SOURCE}: model_type={settings['model_type']!r}: expected clip or clip_vision_model")
    else:
        settings = settings.get("model_cfg", settings)
        found = {"quick_gelu": False, "head_width": 64, **settings, **settings.get("vision_cfg", {})}
        computed = {"quick_gelu": True, "head_width": width // heads}
        if "quick_gelu" not in settings and "vision_cfg" not in settings:
            raise ValueError(f"{SOURCE}: the activation of these weights is unknown, because they have no settings; "
                             "OpenAI's files were trained with QuickGELU: state that with --quick-gelu or the settings "
                             '{"quick_gelu": True}')
    for name, value in computed.items():
        if found[name] != value:
            raise ValueError(f"{SOURCE}: {name}={found[name]!r} is not supported: the vision encoder of this model "
                             f"has {name}={value!r}")
