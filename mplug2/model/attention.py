"""Attention: of a sequence to itself, of one sequence to another, and the masks that both take.

Axes: b batch, l text tokens (or any sequence), m tokens of the other sequence, d width, c heads, e width of a head.

Both modules end in `scaled_dot_product_attention`, which picks the fastest kernel at hand, but for the one case in
which it has none (`DropoutAttention`); `reference_attention` is the formula, kept as its oracle in the tests. Masks are
boolean, true = may be attended to.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.model.kernels import Linear, attention
from mplug2.model.shapes import check


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(Q K^T / sqrt(e)) V, written out. query `b c l e`, key and value `b c m e`, mask `b|1 1 l|1 m`."""
    scores = torch.einsum("b c l e, b c m e -> b c l m", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.einsum("b c l m, b c m e -> b c l e", weights, value)


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


class KVCache:
    """Keys and values `b c p e` of the p tokens that a self-attention has seen so far; empty at first."""

    def __init__(self):
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `b c l e` of new tokens -> those of all tokens, `b c (p+l) e`."""
        if self.key is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows only; a row may be taken more than once."""
        self.key, self.value = self.key[rows], self.value[rows]


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, with queries, keys and values from one linear layer."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """x `b l d`, mask broadcastable to `b c l l` -> `b l d`.

        With a cache, x is what follows the p tokens in it: they are attended to as well, and the mask is for
        `b c l (p+l)`. The cache then holds x too.
        """
        sizes = check(x, "b l d", d=self.width)
        b, l = sizes["b"], sizes["l"]
        query, key, value = rearrange(self.qkv(x), "b l (three c e) -> three b c l e", b=b, l=l, three=3, c=self.heads)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = attention(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(rearrange(mixed, "b c l e -> b l (c e)", b=b, l=l, c=self.heads))


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to another one, the memory.

    r sequences in a row may share a memory (the questions about a clip, the beams of a search): its keys and values
    are then computed once, and never copied.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory `b m d` -> its keys and values, `b c m e`: `forward` takes them in place of the memory."""
        sizes = check(memory, "b m d", d=self.width)
        key, value = rearrange(
            self.key_value(memory), "b m (two c e) -> two b c m e", b=sizes["b"], m=sizes["m"], two=2, c=self.heads
        )
        return key, value

    def forward(self, x: Tensor, memory: Tensor | tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """x `(b r) l d`, memory `b m d` or its keys and values, mask broadcastable to `b c 1 m` -> `(b r) l d`."""
        key, value = memory if isinstance(memory, tuple) else self.keys_and_values(memory)
        sizes = check(x, "br l d", d=self.width)
        b, l = key.shape[0], sizes["l"]
        if sizes["br"] % b:
            raise ValueError(f"{sizes['br']} sequences cannot share {b} memories evenly")
        query = rearrange(self.query(x), "(b r) l (c e) -> b c (r l) e", b=b, l=l, c=self.heads)
        mixed = attention(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(rearrange(mixed, "b c (r l) e -> (b r) l (c e)", b=b, l=l, c=self.heads))
