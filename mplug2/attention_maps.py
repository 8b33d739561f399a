"""Attention maps: the weights of attention modules, recomputed from their inputs by hooks.

    with attention_maps(model) as maps:
        model.fuse(vision, text, mask)
    maps["fusion.layers.1.cross_attention"]      # `b c l m`: from each of l tokens to the m tokens of the memory

    with attention_maps(model, SelfAttention) as maps:
        model.encode_vision(pixels)
    maps["vision_encoder.blocks.0.attention"]    # `(b t) c m m`: from each token of a frame to the m of that frame

The fast kernels of `model/attention.py` never form these weights. Outside the context nothing is computed, and inside
it the forward passes do not change.

Axes: b texts, c heads, l tokens, past cached tokens before them, m memory tokens, e head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mplug2.model.attention import CrossAttention, KVCache, Memory, SelfAttention


@contextmanager
def attention_maps(
    model: nn.Module, of: type[CrossAttention] | type[SelfAttention] = CrossAttention
) -> Iterator[dict[str, Tensor]]:
    """A dictionary that receives the weights of the last call of each cross-attention of `model`, or of each module of
    the class `of`, under the name of the module."""
    weights, names = {
        CrossAttention: (attention_weights, ("x", "memory", "attention_mask")),
        SelfAttention: (self_attention_weights, ("x", "attention_mask", "cache")),
    }[of]
    maps: dict[str, Tensor] = {}

    def recorder(name: str):
        def record(module: nn.Module, inputs: tuple, named: dict, _) -> None:
            maps[name] = weights(module, **dict(zip(names, inputs)), **named)

        return record

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in model.named_modules() if isinstance(module, of)
    ]
    compiled = any(module._compiled_call_impl for module in model.modules())  # their graphs do not contain the hooks
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield maps
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_weights(
    module: CrossAttention, x: Tensor, memory: Memory | tuple[Tensor, Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(e)): `(b r) c l m`, from x `(b r) l d` to the memory `b m d` (or its keys and values). The
    mask broadcasts to `b c 1 m`."""
    key, _ = module.keys_and_values(memory) if isinstance(memory, Memory) else memory
    r = x.shape[0] // key.shape[0]
    query = rearrange(module.query(x), "b l (c e) -> b c l e", c=module.heads)
    key = repeat(key, "b ... -> (b r) ...", r=r)
    if attention_mask is not None:
        attention_mask = repeat(attention_mask, "b ... -> (b r) ...", r=r)
    return _softmax(query, key, attention_mask)


@torch.no_grad()
def self_attention_weights(
    module: SelfAttention, x: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(e)): `b c l l`, from x `b l d` to itself; with a cache that holds the keys of x and of
    the past tokens before it, `b c l (past+l)`. The mask broadcasts to that shape."""
    query, key, _ = rearrange(module.qkv(x), "b l (three c e) -> three b c l e", three=3, c=module.heads)
    return _softmax(query, key if cache is None else cache.key, attention_mask)


def _softmax(query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor:
    scores = torch.einsum("b c l e, b c m e -> b c l m", query, key) * query.shape[-1] ** -0.5
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return scores.softmax(dim=-1)
