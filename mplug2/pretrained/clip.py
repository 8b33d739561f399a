"""CLIP's ViT as the vision encoder: the names of its first release, of open_clip and of Hugging Face.

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
    **weights_and_biases({"patch_embed.norm": "pre_layrnorm", "norm": "post_layernorm"}),  # so misspelled there
}
HF_BLOCK = weights_and_biases({
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": "self_attn.out_proj", "attention_norm": "layer_norm1", "mlp_norm": "layer_norm2",
    "mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2",
})
NEVER_USED = (  # the text tower, and what joins the two towers
    r"visual\.proj|positional_embedding|text_projection(\.weight)?|logit_scale|logit_bias|token_embedding\.weight",
    r"transformer\.resblocks\..+|ln_final\.(weight|bias)|attn_mask|input_resolution|context_length|vocab_size|text\..+",
    r"(vision_model\.)?embeddings\.position_ids|text_model\..+|visual_projection\.weight",
)


@torch.no_grad()
def from_clip(model: MPLUG2, source: str | Path | Mapping[str, Tensor], settings: Mapping | None = None) -> None:
    """Fill the vision encoder of `model` with the weights of a CLIP ViT: `source` is a file, a folder or a state dict.

    `settings` are the source's own, by default read from the file beside the weights: Hugging Face's `config.json` or
    open_clip's `open_clip_config.json`. They say how many heads there are, and which activation. The files of CLIP's
    first release have none, but the same names as those of open_clip, so `{"quick_gelu": True}` must be given for them.

    Local temporal modules become identities again: for images the encoder is CLIP's, with its last LayerNorm on every
    token. Positions are resized to the model's resolution; with temporal down-sampling the kernel stands at the centre
    tap. Raises ValueError if the sizes, the number of heads or the activation are not the model's, or if entries are
    missing or left over.
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
    """Which entries make which parameters of our vision encoder, by the naming that `state` is in."""
    if "visual.class_embedding" in state:
        vision, block, prefix, stack = CLIP_VISION, CLIP_BLOCK, "visual.", "transformer.resblocks"
    elif any(name.endswith("embeddings.class_embedding") for name in state):
        vision, block, stack = HF_VISION, HF_BLOCK, "encoder.layers"
        prefix = "vision_model." if "vision_model.embeddings.class_embedding" in state else ""
    else:
        raise ValueError(f"{SOURCE}: no class embedding of a ViT found, under the names of CLIP's first release, "
                         "open_clip or Hugging Face; only their ViT models can be loaded")
    names = {ours: tuple(f"{prefix}{entry}" for entry in entries) for ours, entries in vision.items()}
    for i in range(blocks):
        names |= within(f"blocks.{i}", block, f"{prefix}{stack}.{i}")
    return names


def clip_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of a CLIP ViT, under the names of our `ModelConfig`, from the shapes of its weights."""
    layers = 0
    while clip_names(state, layers + 1)[f"blocks.{layers}.attention_norm.bias"][0] in state:
        layers += 1
    names = clip_names(state, layers)
    (kernel,), (position,) = names["patch_embed.linear.weight"], names["patch_embed.position"]
    width, _, _, patch = state[kernel].shape
    return {"vision_width": width, "vision_layers": layers, "patch_size": patch,
            "image_size": patch * isqrt(len(state[position]) - 1)}


def check_settings(settings: Mapping, width: int, heads: int) -> None:
    """Raise ValueError, by name, for settings of CLIP that our vision encoder does not compute."""
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
            raise ValueError(f"{SOURCE}: no settings say which activation these weights were trained with; if it is "
                             "QuickGELU, as in all files of CLIP's first release, say so: the settings "
                             '{"quick_gelu": True}, or --quick-gelu')
    for name, value in computed.items():
        if found[name] != value:
            raise ValueError(f"{SOURCE}: {name}={found[name]!r} cannot be followed: the vision encoder of this model "
                             f"computes {name}={value!r}")
