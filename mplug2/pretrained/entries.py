"""From the entries of another program's state dict to our parameters: names, shapes, what is missing or left over.

Released mPLUG-2, BERT and CLIP share their names for layers, so these tables stand here: parameter of ours -> entries
of theirs, which are stacked along the first axis to make it. Which layers of theirs are which of ours is said in
`released.py`, `clip.py` and `bert.py`.

Axes: d width, k frames that a patch spans, c = 3 colours, p side of a patch, h w patch rows and columns.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Names = dict[str, tuple[str, ...]]


def weights_and_biases(modules: Mapping[str, str | tuple[str, ...]]) -> Names:
    """Modules of ours -> modules of theirs, to parameters of ours -> entries of theirs."""
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
"""The language-model head, `cls.predictions`, without the word embedding that it is tied to."""

CLIP_VISION: Names = {
    "patch_embed.class_token": ("class_embedding",),
    "patch_embed.position": ("positional_embedding",),
    "patch_embed.linear.weight": ("conv1.weight",),
    **weights_and_biases({"patch_embed.norm": "ln_pre", "norm": "ln_post"}),
}
"""CLIP's ViT in the names of its first release, without the blocks."""

CLIP_BLOCK: Names = {
    "attention.qkv.weight": ("attn.in_proj_weight",),
    "attention.qkv.bias": ("attn.in_proj_bias",),
    **weights_and_biases({
        "attention.out": "attn.out_proj", "attention_norm": "ln_1", "mlp_norm": "ln_2", "mlp_up": "mlp.c_fc",
        "mlp_down": "mlp.c_proj",
    }),
}

LISTED = 20
"""So many names an error lists before it only counts them."""


def within(ours: str, table: Names, theirs: str) -> Names:
    """The names of a table, as they stand inside the module `ours` and the module `theirs`."""
    return {f"{ours}.{name}": tuple(f"{theirs}.{entry}" for entry in entries) for name, entries in table.items()}


def alternatives(values: Iterable) -> str:
    """A pattern that matches one of `values` and nothing else; nothing at all if there are none."""
    return "(" + ("|".join(re.escape(str(value)) for value in values) or "(?!)") + ")"


def entries_of(*tables: Names) -> str:
    """A pattern that matches the entries of theirs in `tables`."""
    return alternatives(entry for table in tables for entries in table.values() for entry in entries)


def listed(names: Collection[str]) -> str:
    """Names for an error message: the first of many."""
    more = len(names) - LISTED
    return ", ".join(sorted(names)[:LISTED]) + (f" and {more} more" if more > 0 else "")


def setting(settings: Mapping, name: str, source: str):
    """The value of a setting; ValueError if there is none."""
    if name not in settings:
        raise ValueError(f"{source}: the setting {name} is missing")
    return settings[name]


def check_bert_settings(settings: Mapping, source: str) -> None:
    """Raise ValueError for settings of BERT that our layers do not compute, by name."""
    computed = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
                "type_vocab_size": 2}
    for name, value in computed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{source}: {name}={settings[name]!r} cannot be followed: our layers compute {value!r}")


def check_entries(state: Iterable[str], used: Collection[str], never_used: Iterable[str], source: str) -> None:
    """Every entry of a state dict is used, or matched by a pattern of `never_used`; and every used one is there.

    Raises ValueError that lists what is missing and what is left over.
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
        raise ValueError(f"{source}: the entry {name} has shape {tuple(entry.shape)}, but by the settings it should "
                         f"have {tuple(expected)}; check that settings and weights belong together")


@torch.no_grad()
def stack_entries(
    parameters: Mapping[str, nn.Parameter], names: Names, state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]], source: str,
) -> dict[str, Tensor]:
    """New values for `parameters`, each stacked from the entries of `state` that `names` gives for it.

    An entry has the shape of its share of the parameter, or the one in `shapes`, of as many values. The new values are
    copies, in the dtype of the parameter, on the device of the entries. ValueError for an entry of another shape.
    """
    values = {}
    for name, parameter in parameters.items():
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=state[names[name][0]].device)
        for share, entry in zip(value.chunk(len(names[name])), names[name]):
            check_shape(entry, state[entry], shapes.get(name, share.shape), source)
            share.copy_(state[entry].reshape(share.shape))
        values[name] = value
    return values


def resize_positions(position: Tensor, patches: int, source: str) -> Tensor:
    """Position embeddings `1+n d` for another number of patches: their grid bilinearly, the class token as it is.

    ValueError if they are not those of a class token and a square of patches.
    """
    places = position.shape[0] - 1 if position.dim() == 2 else 0
    side, wanted = isqrt(max(0, places)), isqrt(patches)
    if not side or places != side**2:
        raise ValueError(f"{source} has shape {tuple(position.shape)}: expected a class token and a square of patches")
    if side == wanted:
        return position
    grid = rearrange(position[1:].float(), "(h w) d -> 1 d h w", h=side, w=side)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bilinear", align_corners=False)
    return torch.cat([position[:1].float(), rearrange(grid, "1 d h w -> (h w) d", h=wanted, w=wanted)])


def linear_from_kernel(kernel: Tensor) -> Tensor:
    """The patch embedding as a convolution, `d c k p p` -> as a linear layer on patches, `d (k c p p)`."""
    return rearrange(kernel, "d c k p p2 -> d (k c p p2)", c=3)


def kernel_from_linear(weight: Tensor, taps: int, patch: int) -> Tensor:
    """The inverse of `linear_from_kernel`, for k = `taps` and p = `patch`."""
    return rearrange(weight, "d (k c p p2) -> d c k p p2", c=3, k=taps, p=patch, p2=patch)
