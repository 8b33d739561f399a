"""Fast forms of four operations. Skip this file at first: each computes what its plain form does, only faster on a CPU.

    here                                   plain form
    linear, Linear                         torch's nn.functional.linear, nn.Linear
    attention                              model.attention.reference_attention
    quick_gelu_linear, quick_gelu_mlp      linear layers and `quick_gelu`
    depthwise_conv                         torch's nn.functional.conv1d at every position

The tests compare each with its plain form, values and gradients.

Axes: b batch, l text tokens (or any sequence), m tokens of the other sequence, d width, c heads, e width of a head,
t frames, n patches a frame, r channels of the temporal convolution, k kernel taps.
"""

from itertools import product

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

FEW_ROWS = 16
"""Up to this many rows `linear` multiplies from the other side."""
MANY_WEIGHTS = 2**18
"""From this many attention weights per head on, dropout is worth `DropoutAttention`."""
QUICK_GELU_SCALE = 1.702
"""CLIP's approximation of GELU is quick_gelu(x) = x * sigmoid(1.702 x) = silu(1.702 x) / 1.702."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, for x `... d`.

    With only a few rows (one decoding step) a CPU computes (W xᵀ)ᵀ twice as fast as x Wᵀ: the cost is reading W once.
    """
    rows = x.numel() // x.shape[-1]
    if rows > FEW_ROWS or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    out = (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DropoutAttention(torch.autograd.Function):
    """softmax(Q Kᵀ / sqrt(e)) V with dropout of the weights, for long sequences on a CPU.

    Torch has no CPU kernel for this case and reads and writes all weights `b c l m` a dozen times. This form handles
    one head at a time, in the processor's cache. The backward pass recomputes the attention weights; only the dropout
    mask is stored.
    """

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


def attention(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float) -> Tensor:
    """query `b c l e`, key and value `b c m e`, attention_mask broadcastable to `b c l m` -> `b c l e`."""
    many = query.shape[2] * key.shape[2] >= MANY_WEIGHTS and query.dtype.itemsize >= 4
    if dropout and many and attention_mask is None and query.device.type == "cpu":
        return DropoutAttention.apply(query, key, value, dropout)
    return scaled_dot_product_attention(query, key, value, attention_mask, dropout)


def quick_gelu(x: Tensor) -> Tensor:
    """The plain form."""
    return x * (QUICK_GELU_SCALE * x).sigmoid()


def quick_gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(quick_gelu(x)), for x `... d`. Dividing by the scale is folded into the matrix product, so it is free."""
    return scaled_linear(layer, F.silu(QUICK_GELU_SCALE * x), 1 / QUICK_GELU_SCALE)


def quick_gelu_mlp(x: Tensor, up: nn.Linear, down: nn.Linear) -> Tensor:
    """down(quick_gelu(up(x))), for x `... d`. Both scale factors are folded into the two matrix products."""
    hidden = F.silu(scaled_linear(up, x, QUICK_GELU_SCALE, QUICK_GELU_SCALE))
    return scaled_linear(down, hidden, 1 / QUICK_GELU_SCALE)


def scaled_linear(layer: nn.Linear, x: Tensor, factor: float, bias_factor: float = 1.0) -> Tensor:
    """factor * x Wᵀ + bias_factor * bias, for x `... d`."""
    out = torch.addmm(layer.bias * bias_factor, x.flatten(0, -2), layer.weight.T, alpha=factor)
    return out.unflatten(0, x.shape[:-1])


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A depth-wise convolution over time, zero-padded: x `b t n r`, weight `r 1 k`, bias `r` -> `b t n r`.

    It is k shifted products in the token layout. `conv1d` would have to transpose the tokens before and after.
    """
    t, taps = x.shape[1], weight.shape[2]
    out, padded = bias, F.pad(x, (0, 0, 0, 0, taps // 2, taps // 2))
    for tap, tap_weight in enumerate(weight[:, 0].unbind(dim=1)):
        out = torch.addcmul(out, padded[:, tap: tap + t], tap_weight)
    return out
