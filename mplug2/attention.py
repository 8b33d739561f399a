"""Attention: of a sequence to itself, of one sequence to another, and the masks that both take.

Axes: b batch, l text tokens (or any sequence), m tokens of the other sequence, d width, c heads, e width of a head.

Both modules end in `scaled_dot_product_attention`, which picks the fastest kernel at hand, but for the one case in
which it has none (`DropoutAttention`); `plain_attention` is the formula, kept as its oracle in the tests. Masks are
boolean, true = may be attended to.
"""

from itertools import product

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from mplug2.shapes import check

FEW_ROWS = 16
MANY_WEIGHTS = 2**18


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, for x `... d`. The few rows of a step of generation go the other way round, as (W x^T)^T: on a CPU
    that takes half the time, which is that of reading W."""
    rows = x.numel() // x.shape[-1]
    if rows > FEW_ROWS or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    out = (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class Linear(nn.Linear):
    """nn.Linear, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(Q K^T / sqrt(e)) V, written out. query `b c l e`, key and value `b c m e`, mask `b|1 1 l|1 m`."""
    scores = torch.einsum("b c l e, b c m e -> b c l m", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.einsum("b c l m, b c m e -> b c l e", weights, value)


class DropoutAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(e)) V with dropout of the weights, for long sequences on a CPU, where torch has no kernel
    for it and reads and writes all weights `b c l m` a dozen times. Here it is a head at a time, in the processor's
    cache; what the backward pass needs of the weights is computed again, but for which of them were kept."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """query `b c l e`, key and value `b c m e` -> `b c l e`."""
        query = query * query.shape[-1] ** -0.5
        out, total = torch.empty_like(query), query.new_empty(*query.shape[:3], 1)
        kept = torch.empty(*query.shape[:3], key.shape[2], dtype=torch.bool)
        for head in product(*map(range, query.shape[:2])):
            scores = query[head] @ key[head].T
            total[head] = scores.logsumexp(dim=-1, keepdim=True)
            weights = scores.sub_(total[head]).exp_()
            torch.mm(weights.mul_(kept[head].bernoulli_(1 - dropout)), value[head], out=out[head])
        out /= 1 - dropout
        ctx.save_for_backward(query, key, value, out, total, kept)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, total, kept = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(x) for x in (query, key, value))
        through_softmax = (grad * out).sum(dim=-1, keepdim=True)
        grad = grad / (1 - ctx.dropout)
        for head in product(*map(range, query.shape[:2])):
            weights = (query[head] @ key[head].T).sub_(total[head]).exp_()
            torch.mm((weights * kept[head]).T, grad[head], out=to_value[head])
            to_scores = (grad[head] @ value[head].T).mul_(kept[head]).sub_(through_softmax[head]).mul_(weights)
            torch.mm(to_scores, key[head], out=to_query[head])
            torch.mm(to_scores.T, query[head], out=to_key[head])
        return to_query * query.shape[-1] ** -0.5, to_key, to_value, None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """query `b c l e`, key and value `b c m e`, mask broadcastable to `b c l m` -> `b c l e`."""
    many = query.shape[2] * key.shape[2] >= MANY_WEIGHTS and query.dtype.itemsize >= 4
    if dropout and many and mask is None and query.device.type == "cpu":
        return DropoutAttention.apply(query, key, value, dropout)
    return scaled_dot_product_attention(query, key, value, mask, dropout)


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


class Cache:
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

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only; a row may be taken more than once."""
        self.key, self.value = self.key[rows], self.value[rows]


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, with queries, keys and values from one linear layer."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """x `b l d`, mask broadcastable to `b c l l` -> `b l d`.

        With a cache, x is what follows the p tokens in it: they are attended to as well, and the mask is for
        `b c l (p+l)`. The cache then holds x too.
        """
        sizes = check(x, "b l d", d=self.width)
        b, l = sizes["b"], sizes["l"]
        query, key, value = rearrange(self.qkv(x), "b l (three c e) -> three b c l e", b=b, l=l, three=3, c=self.heads)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0)
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
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(rearrange(mixed, "b c (r l) e -> (b r) l (c e)", b=b, l=l, c=self.heads))
