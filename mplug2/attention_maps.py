"""Where cross-attention looks: its weights, recomputed from what goes into the module, by a hook.

    with attention_maps(model) as maps:
        model.fuse(vision, text, mask)
    maps["fusion.layers.1.cross_attention"]      # `b c l m`: of each of l tokens, over the m tokens of the memory

The fast kernels of `attention.py` never form these weights. Without the context nothing is computed, and no forward is
another one. Axes: b texts, c heads, l tokens, m memory tokens, e width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mplug2.attention import CrossAttention


@contextmanager
def attention_maps(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While it is open, each cross-attention of `model` leaves the weights of its last call in the dictionary, by the
    name of the module."""
    maps: dict[str, Tensor] = {}

    def recorder(name: str):
        def record(module: CrossAttention, inputs: tuple, named: dict, _) -> None:
            maps[name] = attention_weights(module, **dict(zip(("x", "memory", "mask"), inputs)), **named)

        return record

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in model.named_modules() if isinstance(module, CrossAttention)
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_weights(module: CrossAttention, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(e)) of x `(b r) l d` over memory `b m d`, mask to `b c 1 m` -> `(b r) c l m`."""
    r = x.shape[0] // memory.shape[0]
    query = rearrange(module.query(x), "b l (c e) -> b c l e", c=module.heads)
    key, _ = rearrange(module.key_value(memory), "b m (two c e) -> two b c m e", two=2, c=module.heads)
    key = repeat(key, "b c m e -> (b r) c m e", r=r)
    scores = torch.einsum("b c l e, b c m e -> b c l m", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~repeat(mask, "b ... -> (b r) ...", r=r), float("-inf"))
    return scores.softmax(dim=-1)
