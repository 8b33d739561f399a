"""Attention: of a sequence to itself, of one sequence to another, and the masks that both take.

Axes: b batch, l text tokens (or any sequence), m tokens of the other sequence, d width, c heads, e width of a head.

Both modules end in `scaled_dot_product_attention`, which picks the fastest kernel at hand;
`plain_attention` is the formula, kept as its oracle in the tests. Masks are boolean, true = may be attended to.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mplug2.shapes import check


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(e)) V, written out. query `b c l e`, key and value `b c m e`, mask `b|1 1 l|1 m`."""
    scores = torch.einsum("b c l e, b c m e -> b c l m", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("b c l m, b c m e -> b c l e", scores.softmax(dim=-1), value)


def padding_mask(mask: Tensor) -> Tensor:
    """`b l`, true = real token, to `b 1 1 l`: no query attends to padding."""
    return rearrange(mask, "b l -> b 1 1 l")


def causal_mask(mask: Tensor) -> Tensor:
    """`b l`, true = real token, to `b 1 l l`: a token attends to itself and to those before it, never to padding.

    The first token has to be a real one: a query that may attend to nothing has no defined result.
    """
    l = mask.shape[1]
    past = torch.ones(l, l, dtype=torch.bool, device=mask.device).tril()
    return past & rearrange(mask, "b m -> b 1 1 m")


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, with queries, keys and values from one linear layer."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x `b l d`, mask broadcastable to `b c l l` -> `b l d`."""
        sizes = check(x, "b l d", d=self.width)
        b, l = sizes["b"], sizes["l"]
        query, key, value = rearrange(self.qkv(x), "b l (three c e) -> three b c l e", b=b, l=l, three=3, c=self.heads)
        mixed = scaled_dot_product_attention(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(rearrange(mixed, "b c l e -> b l (c e)", b=b, l=l, c=self.heads))


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to another one, the memory.

    r sequences in a row may share a memory (the questions about a clip, the beams of a search): its keys and values
    are then computed once, and never copied.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """x `(b r) l d`, memory `b m d`, mask broadcastable to `b c 1 m` -> `(b r) l d`."""
        sizes = check(memory, "b m d", **check(x, "br l d", d=self.width))
        b, m, l = sizes["b"], sizes["m"], sizes["l"]
        if sizes["br"] % b:
            raise ValueError(f"{sizes['br']} sequences cannot share {b} memories evenly")
        query = rearrange(self.query(x), "(b r) l (c e) -> b c (r l) e", b=b, l=l, c=self.heads)
        key, value = rearrange(self.key_value(memory), "b m (two c e) -> two b c m e", b=b, m=m, two=2, c=self.heads)
        mixed = scaled_dot_product_attention(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(rearrange(mixed, "b c (r l) e -> (b r) l (c e)", b=b, l=l, c=self.heads))
