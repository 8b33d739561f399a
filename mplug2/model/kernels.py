"""Fast forms of four operations. Skip this file at first: each function computes what its plain form does, but faster.

    here                                   plain form
    linear, Linear                         torch.nn.functional.linear, torch.nn.Linear
    attention, DropoutAttention            reference_attention
    quick_gelu_linear, quick_gelu_mlp      linear layers and `quick_gelu`
    depthwise_conv                         torch.nn.functional.conv1d for every patch position

The tests compare each fast form with its plain form, values and gradients.

Axes: b batch, t frames, n patches per frame, k kernel size and z channels of the temporal convolution, l tokens of a
sequence, m tokens of the memory, d width, c heads, e width of a head.
"""

from itertools import product

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

FEW_ROWS = 16
"""`linear` computes (W xᵀ)ᵀ for at most this many rows."""
MANY_WEIGHTS = 2**18
"""`attention` uses `DropoutAttention` from this many attention weights per head."""
QUICK_GELU_SCALE = 1.702
"""CLIP's approximation of GELU is quick_gelu(x) = x * sigmoid(1.702 x) = silu(1.702 x) / 1.702."""
CPU_CONVOLUTION = torch.backends.mkldnn.is_available()
"""Whether this CPU has a fast `conv2d` for `depthwise_conv`. Asked here, because Dynamo cannot trace the question."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, for x `... d`.

    With only a few rows (one decoding step) a CPU computes (W xᵀ)ᵀ twice as fast as x Wᵀ: the cost is reading W once.
    """
    rows = x.numel() // x.shape[-1]
    if torch.is_grad_enabled() or x.device.type != "cpu" or rows > FEW_ROWS:  # sizes last, for compilation
        return F.linear(x, weight, bias)
    out = (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class Linear(nn.Linear):
    """nn.Linear that calls `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DropoutAttention(torch.autograd.Function):
    """softmax(Q Kᵀ / sqrt(e)) V with dropout on the attention weights, for long sequences on a CPU.

    Torch has no fused CPU kernel for this case: it reads and writes the weights `b c l m` a dozen times. This form
    computes one head at a time, which fits in the processor's cache. The backward pass recomputes the attention
    weights; only the dropout mask is stored.
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
    """Scaled dot-product attention: query `b c l e`, key and value `b c m e`, attention_mask broadcastable to
    `b c l m` -> `b c l e`."""
    many = query.shape[2] * key.shape[2] >= MANY_WEIGHTS and query.dtype.itemsize >= 4
    if dropout and many and attention_mask is None and query.device.type == "cpu":
        return DropoutAttention.apply(query, key, value, dropout)
    return scaled_dot_product_attention(query, key, value, attention_mask, dropout)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(Q Kᵀ / sqrt(e)) V, written out: query `b c l e`, key and value `b c m e` -> `b c l e`."""
    scores = torch.einsum("b c l e, b c m e -> b c l m", query, key) * query.shape[-1] ** -0.5
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.einsum("b c l m, b c m e -> b c l e", weights, value)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, written out: the plain form of the two functions below."""
    return x * (QUICK_GELU_SCALE * x).sigmoid()


def quick_gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(quick_gelu(x)), for x `... d`. Dividing by the scale is folded into the matrix product: it is free."""
    return scaled_linear(layer, F.silu(QUICK_GELU_SCALE * x), 1 / QUICK_GELU_SCALE)


def quick_gelu_mlp(x: Tensor, up: nn.Linear, down: nn.Linear) -> Tensor:
    """down(quick_gelu(up(x))), for x `... d`. Both scale factors are folded into the matrix products: free."""
    hidden = F.silu(scaled_linear(up, x, QUICK_GELU_SCALE, QUICK_GELU_SCALE))
    return scaled_linear(down, hidden, 1 / QUICK_GELU_SCALE)


def scaled_linear(layer: nn.Linear, x: Tensor, factor: float, bias_factor: float = 1.0) -> Tensor:
    """factor * x Wᵀ + bias_factor * bias, for x `... d`."""
    out = torch.addmm(layer.bias * bias_factor, x.flatten(0, -2), layer.weight.T, alpha=factor)
    return out.unflatten(0, x.shape[:-1])


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depth-wise convolution over time, zero-padded: x `b t n z`, weight `z 1 k`, bias `z` -> `b t n z`.

    `conv1d` would transpose the tokens before and after. They are an image of t x n pixels in the layout "channels
    last", which the CPU's `conv2d` takes as it is. Elsewhere this sums one shifted product per tap, in the type of x,
    as under autocast: the taps are float32, and would make float32 of bfloat16 tokens.
    """
    t, kernel_size = x.shape[1], weight.shape[2]
    if x.device.type == "cpu" and x.dtype == torch.float32 and CPU_CONVOLUTION:
        image = rearrange(x, "b t n z -> b z t n")
        out = F.conv2d(image, weight[..., None], bias, padding=(kernel_size // 2, 0), groups=len(weight))
        return rearrange(out, "b z t n -> b t n z")
    out, padded = bias.to(x.dtype), F.pad(x, (0, 0, 0, 0, kernel_size // 2, kernel_size // 2))
    for tap, tap_weight in enumerate(weight[:, 0].to(x.dtype).unbind(dim=1)):
        out = torch.addcmul(out, padded[:, tap: tap + t], tap_weight)
    return out
