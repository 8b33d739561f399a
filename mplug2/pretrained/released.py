"""Released mPLUG-2 checkpoints: their settings, the names of their entries, and which entries a task uses."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mplug2.config import ModelConfig
from mplug2.model.mplug2 import MPLUG2
from mplug2.pretrained.entries import (
    BERT_CROSS_ATTENTION,
    BERT_EMBEDDINGS,
    BERT_HEAD,
    BERT_LAYER,
    CLIP_BLOCK,
    CLIP_VISION,
    Names,
    alternatives,
    check_bert_settings,
    check_entries,
    check_shape,
    entries_of,
    kernel_from_linear,
    linear_from_kernel,
    listed,
    parts,
    resize_positions,
    setting,
    stack_entries,
    weights_and_biases,
    within,
)

SOURCE = "released checkpoint"

CLIP_SIZES = {"ViT-B-32": (32, 12), "ViT-B-16": (16, 12), "ViT-L-14": (14, 24)}
"""Patch size and number of blocks of CLIP's ViTs, by the `clip_name` in the run settings."""

LARGE_RUN = {"clip_name": "ViT-L-14", "image_res": 224, "vision_width": 1024}
LARGE_BERT = {
    "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24,
    "text_encoder_layers": 24, "num_uni_layer": 2, "fusion_layers": 6, "stride_layer": 1000, "text_decode_layers": 12,
    "vocab_size": 30522, "max_position_embeddings": 512, "hidden_dropout_prob": 0.1,
}
"""The settings of the released large runs that define the model."""

KNOWN_MODULES = ("visual_encoder.", "text_encoder.", "fusion_encoder.", "text_decoder.", "visn_fc.", "visn_layer_norm.",
                 "visn_emb_norm.")
VISION, TEXT, FUSION, DECODER = "visual_encoder.visual", "text_encoder", "fusion_encoder", "text_decoder.bert"
HEAD = "text_decoder.cls.predictions"
LATENTS = "text_encoder.encoder.layer.{}.latents"
KERNEL, POSITION = f"{VISION}.conv1.weight", f"{VISION}.positional_embedding"
REPEATED = {
    f"{HEAD}.decoder.weight": f"{DECODER}.embeddings.word_embeddings.weight",
    f"{HEAD}.decoder.bias": f"{HEAD}.bias",
}
"""Entries of the language-model head -> the entries that they duplicate. If the two differ, the head's is used."""

PROJECTIONS = weights_and_biases({
    "vision_projection": "visn_fc", "vision_norm": "visn_layer_norm", "universal.vision_norm": "visn_emb_norm",
})
LOCAL_TEMPORAL = weights_and_biases({"norm": "ln", "down": "down_proj", "conv": "conv", "up": "up_proj"})

RETRIEVAL_HEADS = {
    **weights_and_biases({"contrastive_vision": "vision_proj", "contrastive_text": "text_proj",
                          "matching_head": "itm_head"}),
    "temperature": ("temp",),
}
"""The names in ALBEF and mPLUG. The released mPLUG-2 files define no such heads, and no checkpoint of pre-training was
at hand: these names are a guess, which `from_released` checks."""

MOMENTUM_COPIES = (
    r"(visual_encoder|text_encoder|fusion_encoder|text_decoder|visn_fc|visn_layer_norm|visn_emb_norm|vision_proj|"
    r"text_proj)_m\..+"
)
PRETRAINING_HEADS = (
    r"temp|(vision_proj|text_proj|itm_head)\.(weight|bias)|(image|text|idx)_queue|queue_ptr|ptr_queue|"
    r"(text_encoder|fusion_encoder)\.cls\.predictions\.\w+(\.\w+)*"
)
"""VTC, VTM and MLM heads in the usual names of the mPLUG family. Only pre-training uses them."""


def from_released(
    state_dict: Mapping, run_config: Mapping, bert_config: Mapping, task: str = "video_caption"
) -> MPLUG2:
    """The model of `task` with the weights of a released state dict, in evaluation mode.

    The state dict may be nested under `model` or `module`, and its keys may have the prefixes of pre-training.
    `run_config` and `bert_config` are the settings of its run. The model gets copies of the entries that it uses, one
    at a time, and reads no others. With a memory-mapped state dict no further memory is needed. Entries on the meta
    device give a model on the meta device.

    Raises ValueError for entries that are missing, left over, or of a shape that contradicts the settings, for a
    setting that this model does not support, and for a task with a head that released checkpoints do not have.
    """
    state = plain_names(unnested(state_dict))
    config = released_config(run_config, bert_config, state)
    with torch.device("meta"):
        model = MPLUG2(config, task)
    model.released_stack = setting(bert_config, "num_hidden_layers", "BERT settings")
    if model.released_stack < config.fusion_layers:
        raise ValueError(f"BERT settings: fusion_layers={config.fusion_layers}: expected at most num_hidden_layers="
                         f"{model.released_stack}")
    names, parameters = entry_names(model), dict(model.named_parameters())
    used = {entry for entries in names.values() for entry in entries}
    repeated = REPEATED if "decoder" in model.components else {}
    if lacking := [entry for name in RETRIEVAL_HEADS if name in names for entry in names[name] if entry not in state]:
        found = [name for name in state if re.fullmatch(PRETRAINING_HEADS, name)]
        found += [name for name in state if "." not in name or not name.startswith(KNOWN_MODULES)]
        raise ValueError(f"{SOURCE}: no heads for {task}: {listed(lacking)}; expected the names of ALBEF and mPLUG. "
                         f"Other entries that may be heads: {listed(dict.fromkeys(found)) if found else 'none'}")
    check_entries(state, used.union(repeated.values()), never_used(model), SOURCE)

    taps = model.vision_encoder.patch_embed.span
    check_shape(KERNEL, state[KERNEL], (config.vision_width, 3, taps, config.patch_size, config.patch_size), SOURCE)
    state[KERNEL] = linear_from_kernel(state[KERNEL])
    check_shape(POSITION, state[POSITION], (*state[POSITION].shape[:1], config.vision_width), SOURCE)
    state[POSITION] = resize_positions(state[POSITION], config.patches, f"{SOURCE}: the entry {POSITION}")
    model.load_state_dict(stack_entries(parameters, names, state, entry_shapes(parameters), SOURCE), assign=True)
    for kept, copied in repeated.items():
        check_shape(copied, state[copied], state[kept].shape, SOURCE)
    return model.eval()


def to_released(model: MPLUG2) -> dict[str, Tensor]:
    """The inverse of `from_released`: copies of the parameters in the released names.

    Fusion layers are numbered as in the released checkpoint, and only a model that `from_released` has just made knows
    these numbers. Raises ValueError for a fusion module from elsewhere, for settings that the released code does not
    have, and for parameters that released checkpoints do not have.
    """
    if hasattr(model, "fusion") and not hasattr(model, "released_stack"):
        raise ValueError("the released numbers of the fusion layers are unknown, because from_released did not make "
                         "this model; call to_released on the model that it returns")
    only = {"vision_head_width": 64, "local_temporal": True, "local_temporal_groups": 0,
            "local_temporal_placement": "released", "temporal_on_images": True, "universal_readout": "released"}
    for name, value in only.items():
        if getattr(model.config, name) != value:
            raise ValueError(f"{name}={getattr(model.config, name)!r}: expected {value!r}, as in all released "
                             "checkpoints")
    parameters = dict(model.named_parameters())
    names, shapes, state = entry_names(model), entry_shapes(parameters), {}
    for name, parameter in parameters.items():
        for part, entry in zip(parts(parameter.detach(), len(names[name])), names[name]):
            state[entry] = part.reshape(shapes.get(name, part.shape)).clone()
    state[KERNEL] = kernel_from_linear(state[KERNEL], model.vision_encoder.patch_embed.span, model.config.patch_size)
    return state | {repeated: state[kept].clone() for kept, repeated in REPEATED.items() if kept in state}


def released_config(run_config: Mapping, bert_config: Mapping, state: Mapping[str, Tensor]) -> ModelConfig:
    """Our settings from the two dictionaries of a released run. The number of latents is read from the weights.

    There is one dropout rate, `hidden_dropout_prob`, which applies to attention as well. Raises ValueError for a
    setting that is missing or that this model does not support.
    """
    def run(name: str):
        return setting(run_config, name, "run settings")

    def bert(name: str):
        return setting(bert_config, name, "BERT settings")

    for name, settings in (("run settings", run_config), ("BERT settings", bert_config)):
        if not isinstance(settings, Mapping):
            raise ValueError(f"{name}: expected a dictionary, found {type(settings).__name__}")
    check_bert_settings(bert_config, "BERT settings")
    if "clip_dims" in run_config:
        names = "vision_patch_size", "vision_layers"
        patch_size, blocks = (setting(run("clip_dims"), name, "run settings, clip_dims") for name in names)
    elif run("clip_name") in CLIP_SIZES:
        patch_size, blocks = CLIP_SIZES[run("clip_name")]
    else:
        raise ValueError(f"run settings: clip_name={run('clip_name')!r}: expected one of {', '.join(CLIP_SIZES)}; "
                         "describe any other ViT with clip_dims (vision_patch_size and vision_layers)")
    first_universal = bert("text_encoder_layers") - bert("num_uni_layer")
    latents = state.get(LATENTS.format(first_universal))
    downsampling = run_config.get("temporal_downsampling", False)
    return ModelConfig(
        image_size=run("image_res"), patch_size=patch_size, vision_width=run("vision_width"), vision_layers=blocks,
        temporal_stride=run("temporal_stride") if downsampling else 0,
        width=bert("hidden_size"), heads=bert("num_attention_heads"), ff_width=bert("intermediate_size"),
        text_layers=bert("text_encoder_layers"), universal_layers=bert("num_uni_layer"),
        latents=len(latents) if latents is not None and latents.dim() else 50, fusion_layers=bert("fusion_layers"),
        fusion_stride=bert("stride_layer"),
        decoder_layers=bert("text_decode_layers"), vocab_size=bert("vocab_size"),
        max_positions=bert("max_position_embeddings"), dropout=bert("hidden_dropout_prob"),
        contrastive_width=len(state["vision_proj.weight"]) if "vision_proj.weight" in state else 256,
    )


def unnested(state_dict: Mapping) -> Mapping[str, Tensor]:
    """The state dict inside the `model` or `module` of a training checkpoint. ValueError if there is none."""
    while nested := [name for name in ("model", "module") if isinstance(state_dict.get(name), Mapping)]:
        state_dict = state_dict[nested[0]]
    if others := [str(name) for name, entry in state_dict.items() if not isinstance(entry, Tensor)]:
        raise ValueError(f"{SOURCE}: these entries are not tensors: {listed(others)}; expected a state dict, or one "
                         "under the key 'model' or 'module'")
    return state_dict


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes `fusion.` and `bert.` of pre-training checkpoints. The decoder keeps its `bert.`."""
    plain = {}
    for name, entry in state.items():
        parts = name.split(".")
        if not parts[0].startswith("text_decoder"):
            parts = [part for part in parts if part not in ("fusion", "bert")]
        name = ".".join(parts)
        if name in plain:
            raise ValueError(f"{SOURCE}: {name} occurs twice, with and without the prefixes of pre-training")
        plain[name] = entry
    return plain


def never_used(model: MPLUG2) -> list[str]:
    """Patterns of all entries that a released checkpoint may have and that the task of `model` never uses."""
    config, built, stack = model.config, model.components, model.released_stack
    universal = range(config.text_layers - config.universal_layers, config.text_layers)
    decoder = range(max(0, config.decoder_layers - config.universal_layers), config.decoder_layers)
    layer, embeddings = entries_of(BERT_LAYER), entries_of(BERT_EMBEDDINGS)
    layer_with_cross = entries_of(BERT_LAYER, BERT_CROSS_ATTENTION)
    vision_feed_forward = r"(intermediate_vision\.dense|output_vision\.(dense|LayerNorm))\.(weight|bias)"
    patterns = [
        # CLIP's text tower, and the projection after its vision tower
        r"visual_encoder\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight|visual\.proj)",
        rf"visual_encoder\.(transformer\.resblocks\.\d+\.{entries_of(CLIP_BLOCK)}|ln_final\.(weight|bias))",
        # Universal layers have a vision feed-forward part that never runs. The decoder's last layers are built alike.
        rf"{TEXT}\.encoder\.layer\.{alternatives(universal)}\.{vision_feed_forward}",
        rf"{DECODER}\.encoder\.layer\.{alternatives(decoder)}\.{vision_feed_forward}",
        rf"{DECODER}\.encoder\.layer\.{alternatives(decoder[:1])}\.latents",
        rf"({TEXT}|{FUSION}|{DECODER})\.embeddings\.position_ids",
        rf"{FUSION}\.embeddings\.{embeddings}",
        MOMENTUM_COPIES,
        PRETRAINING_HEADS,
    ]
    if "fusion" in built:  # only the last layers of the stack run; connected layers run without cross-attention
        first = stack - config.fusion_layers
        connected = [first + i for i, connected in enumerate(model.fusion.connected) if connected]
        patterns += [
            rf"{FUSION}\.encoder\.layer\.{alternatives(range(first))}\.{layer_with_cross}",
            rf"{FUSION}\.encoder\.layer\.{alternatives(connected)}\.{entries_of(BERT_CROSS_ATTENTION)}",
        ]
    else:
        patterns += [rf"{FUSION}\.encoder\.layer\.{alternatives(range(stack))}\.{layer_with_cross}"]
    if "decoder" not in built:
        patterns += [r"text_decoder\..+"]
    if "text" not in built:
        patterns += [
            rf"{TEXT}\.embeddings\.{embeddings}",
            rf"{TEXT}\.encoder\.layer\.{alternatives(range(universal.start))}\.{layer}",
        ]
    return patterns


def entry_names(model: MPLUG2) -> Names:
    """The released entries that make each parameter. ValueError for a parameter that released checkpoints lack."""
    config = model.config
    stack = getattr(model, "released_stack", config.text_layers)
    names = {
        **within("vision_encoder", CLIP_VISION, VISION),
        **PROJECTIONS,
        **RETRIEVAL_HEADS,
        **within("text_encoder.embeddings", BERT_EMBEDDINGS, f"{TEXT}.embeddings"),
        **within("decoder.embeddings", BERT_EMBEDDINGS, f"{DECODER}.embeddings"),
        **within("decoder.head", BERT_HEAD, HEAD),
        "universal.latents": (LATENTS.format(config.text_layers - config.universal_layers),),
        "decoder.embeddings.word.weight": (f"{HEAD}.decoder.weight",),
        "decoder.head.bias": (f"{HEAD}.decoder.bias",),
    }
    for i in range(config.vision_layers):
        block, theirs = f"vision_encoder.blocks.{i}", f"{VISION}.transformer.resblocks.{i}"
        names |= within(block, CLIP_BLOCK, theirs)
        names |= within(f"{block}.lt1", LOCAL_TEMPORAL, f"{theirs}.lmhra1")
        names |= within(f"{block}.lt2", LOCAL_TEMPORAL, f"{theirs}.lmhra2")
    layer, universal = BERT_LAYER | BERT_CROSS_ATTENTION, config.text_layers - config.universal_layers
    for ours, theirs, first, count in (
        ("text_encoder", TEXT, 0, universal),
        ("universal", TEXT, universal, config.universal_layers),
        ("fusion", FUSION, stack - config.fusion_layers, config.fusion_layers),
        ("decoder", DECODER, 0, config.decoder_layers),
    ):
        for i in range(count):
            names |= within(f"{ours}.layers.{i}", layer, f"{theirs}.encoder.layer.{first + i}")
    parameters = [name for name, _ in model.named_parameters()]
    if unknown := [name for name in parameters if name not in names]:
        raise ValueError(f"{SOURCE}: no weights for these parameters of the task {model.task!r}: {listed(unknown)}; "
                         "load it for captioning, question answering or retrieval")
    return {name: names[name] for name in parameters}


def entry_shapes(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of entries that differ from ours: linear layers of local temporal modules are convolutions there."""
    ones = {"down.weight": (1, 1, 1), "up.weight": (1, 1, 1), "conv.weight": (1, 1)}
    return {
        name: (*parameter.shape, *more)
        for name, parameter in parameters.items()
        for module, more in ones.items()
        if re.search(rf"\.lt[12]\.{re.escape(module)}$", name)
    }
