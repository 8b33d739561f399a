"""Multi-head attention, softmax(Q Kᵀ / sqrt(e)) V, within one sequence or from one sequence to another.

There are two kinds of masks, both boolean:

    mask             `b l`: true = real token, false = padding
    attention_mask   `b c l m`, or anything that broadcasts to it: true = query l may attend to key m

Axes: b batch, l tokens, m memory tokens, r sequences that share a memory, d width, c heads, e width of a head.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mplug2.model.kernels import Linear, attention
from mplug2.model.shapes import check


class JointMemory(NamedTuple):
    """The sequence [V', text] of each of r texts about an image or video: V' `b v d`, text `(b r) l d`.

    Its parts are joined after they are projected, so keys and values of V' are computed once for all r texts. It is a
    named tuple because FSDP2 looks for the tensors of a block's inputs in tuples.
    """

    vision: Tensor
    text: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(b r) (v+l) d`"""
        return len(self.text), self.vision.shape[1] + self.text.shape[1], self.text.shape[2]


Memory = Tensor | JointMemory
"""What cross-attention reads: a sequence `b m d`, in one piece or in two."""


def padding_mask(mask: Tensor) -> Tensor:
    """mask `b m` -> attention mask `b 1 1 m`: no query attends to padding."""
    return rearrange(mask, "b m -> b 1 1 m")


def causal_mask(mask: Tensor) -> Tensor:
    """mask `b l` -> attention mask `b 1 l l`: a token attends to itself and to earlier tokens, never to padding.

    The first token must be real: a query that may attend to nothing has no defined result.
    """
    l = mask.shape[1]
    past = torch.ones(l, l, dtype=torch.bool, device=mask.device).tril()
    return past & rearrange(mask, "b m -> b 1 1 m")


class KVCache:
    """Keys and values `b c past e` of the tokens that a self-attention has seen so far; empty at first."""

    def __init__(self):
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `b c l e` of new tokens -> those of all tokens, `b c (past + l) e`."""
        if self.key is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order. A row may appear more than once."""
        self.key, self.value = self.key[rows], self.value[rows]


class SelfAttention(nn.Module):
    """Attention within one sequence. One linear layer computes queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """x `b l d`, attention_mask broadcastable to `b c l l` -> `b l d`.

        With a cache, x continues the tokens in it: they are attended to as well (attention_mask then covers
        `b c l (past + l)`), and the keys and values of x are appended.
        """
        sizes = check(x, "b l d", d=self.width)
        b, l = sizes["b"], sizes["l"]
        query, key, value = rearrange(self.qkv(x), "b l (three c e) -> three b c l e", b=b, l=l, three=3, c=self.heads)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = attention(query, key, value, attention_mask, self.dropout if self.training else 0.0)
        return self.out(rearrange(mixed, "b c l e -> b l (c e)", b=b, l=l, c=self.heads))


class CrossAttention(nn.Module):
    """Attention from one sequence to another, the memory.

    r consecutive sequences may share a memory (the questions about one video, the beams of a search). Its keys and
    values are computed once and never copied.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def keys_and_values(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """memory `b m d` -> keys and values, each `b c m e`."""
        if isinstance(memory, JointMemory):
            parts = zip(self.keys_and_values(memory.vision), self.keys_and_values(memory.text))
            r = len(memory.text) // len(memory.vision)
            return tuple(torch.cat([repeat(v, "b c v e -> (b r) c v e", r=r), l], dim=2) for v, l in parts)
        sizes = check(memory, "b m d", d=self.width)
        pattern = "b m (two c e) -> two b c m e"
        key, value = rearrange(self.key_value(memory), pattern, b=sizes["b"], m=sizes["m"], two=2, c=self.heads)
        return key, value

    def forward(self, x: Tensor, memory: Memory | tuple, attention_mask: Tensor | None = None) -> Tensor:
        """x `(b r) l d`, a memory or its keys and values, attention_mask broadcastable to `b c 1 m` -> `(b r) l d`."""
        key, value = self.keys_and_values(memory) if isinstance(memory, Memory) else memory
        sizes = check(x, "br l d", d=self.width)
        b, l = key.shape[0], sizes["l"]
        if sizes["br"] % b:
            raise ValueError(f"{sizes['br']} sequences cannot share {b} memories evenly")
        query = rearrange(self.query(x), "(b r) l (c e) -> b c (r l) e", b=b, l=l, c=self.heads)
        mixed = attention(query, key, value, attention_mask, self.dropout if self.training else 0.0)
        return self.out(rearrange(mixed, "b c (r l) e -> (b r) l (c e)", b=b, l=l, c=self.heads))
