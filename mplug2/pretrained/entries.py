"""Convert the entries of a foreign state dict to our parameters: names, shapes, and what is missing or left over.

Released mPLUG-2, BERT and CLIP use the same names inside their layers. The tables here map each of our parameters to
the entries that are stacked along the first axis to make it. `released.py`, `clip.py` and `bert.py` map the layers.

Axes: d width, k frames that a patch spans, c = 3 colors, p side of a patch, h w patch rows and columns.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Names = dict[str, tuple[str, ...]]


def weights_and_biases(modules: Mapping[str, str | tuple[str, ...]]) -> Names:
    """Turn a table of modules (ours -> theirs) into a table of parameters, weight and bias."""
    return {
        f"{ours}.{kind}": tuple(f"{module}.{kind}" for module in ([theirs] if isinstance(theirs, str) else theirs))
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


BERT_LAYER = weights_and_biases({
    "self_attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "self_attention.out": "attention.output.dense",
    "self_norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
})
BERT_CROSS_ATTENTION = weights_and_biases({
    "cross_attention.query": "crossattention.self.query",
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.out": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
})
BERT_EMBEDDINGS: Names = {
    "word.weight": ("word_embeddings.weight",),
    "position.weight": ("position_embeddings.weight",),
    "token_type.weight": ("token_type_embeddings.weight",),
    **weights_and_biases({"norm": "LayerNorm"}),
}
BERT_HEAD: Names = {
    "bias": ("bias",), **weights_and_biases({"dense": "transform.dense", "norm": "transform.LayerNorm"}),
}
"""The language-model head, `cls.predictions`, without the tied word embedding."""

CLIP_VISION: Names = {
    "patch_embed.class_token": ("class_embedding",),
    "patch_embed.position": ("positional_embedding",),
    "patch_embed.linear.weight": ("conv1.weight",),
    **weights_and_biases({"patch_embed.norm": "ln_pre", "norm": "ln_post"}),
}
"""CLIP's ViT in OpenAI's names, without the blocks."""

CLIP_BLOCK: Names = {
    "attention.qkv.weight": ("attn.in_proj_weight",),
    "attention.qkv.bias": ("attn.in_proj_bias",),
    **weights_and_biases({
        "attention.out": "attn.out_proj", "attention_norm": "ln_1", "mlp_norm": "ln_2", "mlp_up": "mlp.c_fc",
        "mlp_down": "mlp.c_proj",
    }),
}

LISTED = 20
"""An error message lists this many names and counts the rest."""


def within(ours: str, table: Names, theirs: str) -> Names:
    """The names of a table inside our module `ours` and their module `theirs`."""
    return {f"{ours}.{name}": tuple(f"{theirs}.{entry}" for entry in entries) for name, entries in table.items()}


def alternatives(values: Iterable) -> str:
    """A pattern that matches exactly one of `values`. If there are none, it matches nothing."""
    return "(" + ("|".join(re.escape(str(value)) for value in values) or "(?!)") + ")"


def entries_of(*tables: Names) -> str:
    """A pattern that matches all of their entries in `tables`."""
    return alternatives(entry for table in tables for entries in table.values() for entry in entries)


def listed(names: Collection[str]) -> str:
    """Names for an error message, at most `LISTED` of them."""
    more = len(names) - LISTED
    return ", ".join(sorted(names)[:LISTED]) + (f" and {more} more" if more > 0 else "")


def setting(settings: Mapping, name: str, source: str):
    """The value of a setting. ValueError if it is missing."""
    if name not in settings:
        raise ValueError(f"{source}: the setting {name} is missing")
    return settings[name]


def check_bert_settings(settings: Mapping, source: str) -> None:
    """Raise ValueError for a setting of BERT that our layers do not support. The message names it."""
    computed = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
                "type_vocab_size": 2}
    for name, value in computed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{source}: {name}={settings[name]!r} is not supported: our layers have {value!r}")


def check_entries(state: Iterable[str], used: Collection[str], never_used: Iterable[str], source: str) -> None:
    """Check that every used entry is there, and that every other entry matches a pattern of `never_used`.

    ValueError lists what is missing and what is left over.
    """
    names, unused = set(state), re.compile("|".join(never_used))
    missing = [name for name in used if name not in names]
    left = [name for name in names.difference(used) if not unused.fullmatch(name)]
    wrong = [f"{len(missing)} entries are missing: {listed(missing)}"] if missing else []
    wrong += [f"{len(left)} entries are neither used nor known to be unused: {listed(left)}"] if left else []
    if wrong:
        raise ValueError(f"{source}: {'; '.join(wrong)}")


def check_shape(name: str, entry: Tensor, expected: Iterable[int], source: str) -> None:
    """Raise ValueError that names the entry, its shape and the expected one."""
    if tuple(entry.shape) != tuple(expected):
        raise ValueError(f"{source}: the entry {name} has shape {tuple(entry.shape)}, but the settings imply "
                         f"{tuple(expected)}; check that settings and weights belong together")


@torch.no_grad()
def stack_entries(
    parameters: Mapping[str, nn.Parameter], names: Names, state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]], source: str,
) -> dict[str, Tensor]:
    """New values for `parameters`, each stacked from the entries of `state` that `names` lists for it.

    An entry has the shape of its part of the parameter, or the one in `shapes`, which has as many values. The new
    values are copies in the dtype of the parameter, on the device of the entries. ValueError for any other shape.
    """
    values = {}
    for name, parameter in parameters.items():
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=state[names[name][0]].device)
        for part, entry in zip(parts(value, len(names[name])), names[name]):
            check_shape(entry, state[entry], shapes.get(name, part.shape), source)
            part.copy_(state[entry].reshape(part.shape))
        values[name] = value
    return values


def parts(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """The parts of a parameter that `count` entries make; a number is its only part."""
    return tensor.chunk(count) if tensor.dim() else [tensor]


def resize_positions(position: Tensor, patches: int, source: str) -> Tensor:
    """Resize position embeddings `1+n d` to another number of patches: the class token's stays, the grid of the patches
    is interpolated bilinearly. ValueError if n is not a square.
    """
    n = position.shape[0] - 1 if position.dim() == 2 else 0
    side, wanted = isqrt(max(0, n)), isqrt(patches)
    if not side or n != side**2:
        raise ValueError(f"{source} has shape {tuple(position.shape)}: expected a class token and a square of patches")
    if side == wanted:
        return position
    grid = rearrange(position[1:].float(), "(h w) d -> 1 d h w", h=side, w=side)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bilinear", align_corners=False)
    return torch.cat([position[:1].float(), rearrange(grid, "1 d h w -> (h w) d", h=wanted, w=wanted)])


def linear_from_kernel(kernel: Tensor) -> Tensor:
    """The patch embedding's convolution kernel `d c k p p` as the weight of a linear layer, `d (k c p p)`."""
    return rearrange(kernel, "d c k p p2 -> d (k c p p2)", c=3)


def kernel_from_linear(weight: Tensor, taps: int, patch: int) -> Tensor:
    """The inverse of `linear_from_kernel`, for k = `taps` and p = `patch`."""
    return rearrange(weight, "d (k c p p2) -> d c k p p2", c=3, k=taps, p=patch, p2=patch)
