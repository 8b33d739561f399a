"""Each fast form equals its plain form, values and gradients."""

from unittest.mock import patch

import pytest
import torch
from einops import rearrange
from helpers import assert_same, conv_by_hand, noise, quick_gelu_by_hand, random_mask, randomized, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.model import kernels
from mplug2.model.attention import padding_mask
from mplug2.model.kernels import (
    DropoutAttention,
    Linear,
    attention,
    depthwise_conv,
    quick_gelu,
    quick_gelu_linear,
    quick_gelu_mlp,
    reference_attention,
)

sizes = st.integers(1, 4)


def assert_same_with_gradients(fast, plain, *inputs: Tensor) -> None:
    """`fast(*inputs)` equals `plain(*inputs)`, and so do the gradients of the inputs."""
    gradients = []
    outputs = [fast(*inputs), plain(*inputs)]
    assert_same(*outputs)
    direction = noise(*outputs[0].shape, seed=9)
    for output in outputs:
        gradients.append(torch.autograd.grad((output * direction).sum(), inputs))
    for found, expected in zip(*gradients):
        assert_same(found, expected)


@given(rows=st.integers(1, 40), seed=seeds)
def test_linear_equals_torch_with_few_rows_and_with_many(rows, seed):
    layer, x = randomized(Linear(3, 5), seed), noise(rows, 2, 3, seed=seed)
    with torch.no_grad():
        assert_same(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer(x).is_contiguous()
    assert_same_with_gradients(lambda x: layer(x), lambda x: F.linear(x, layer.weight, layer.bias), x.requires_grad_())


@given(b=sizes, l=sizes, m=sizes, c=sizes, e=sizes, seed=seeds)
def test_attention_equals_the_reference(b, l, m, c, e, seed):
    query, key, value = noise(b, c, l, e, seed=seed), noise(b, c, m, e, seed=seed + 1), noise(b, c, m, e, seed=seed + 2)
    mask = padding_mask(random_mask(b, m, seed))
    assert_same(attention(query, key, value, None, 0.0), reference_attention(query, key, value))
    assert_same(attention(query, key, value, mask, 0.0), reference_attention(query, key, value, mask))


@given(b=sizes, l=sizes, m=sizes, c=sizes, e=sizes, dropout=st.sampled_from([0.1, 0.5, 0.9]), seed=seeds)
def test_dropout_attention_is_the_formula_with_the_same_weights_dropped(b, l, m, c, e, dropout, seed):
    given = [noise(b, c, n, e, seed=seed + i).requires_grad_() for i, n in enumerate((l, m, m))]
    copies = [x.detach().clone().requires_grad_() for x in given]
    torch.manual_seed(seed)
    found = DropoutAttention.apply(*given, dropout)
    torch.manual_seed(seed)
    kept = torch.stack([torch.empty(l, m).bernoulli_(1 - dropout) for _ in range(b * c)]).view(b, c, l, m)
    weights = (copies[0] @ copies[1].mT * e**-0.5).softmax(dim=-1) * kept.to(found) / (1 - dropout)
    expected = weights @ copies[2]
    assert_same(found, expected)
    direction = noise(b, c, l, e, seed=seed + 9)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for x, copy in zip(given, copies):
        assert_same(x.grad, copy.grad)


def test_dropout_attention_serves_many_weights_without_a_mask(monkeypatch):
    monkeypatch.setattr(kernels, "MANY_WEIGHTS", 12)
    query, key, value = (noise(1, 2, n, 3).float().requires_grad_() for n in (3, 4, 4))

    def used(*arguments) -> str:
        return type(attention(*arguments).grad_fn).__name__

    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    assert used(query, key, value, None, 0.1) == "DropoutAttentionBackward"
    for others in [(None, 0.0), (mask, 0.1)]:
        assert used(query, key, value, *others) != "DropoutAttentionBackward"
    assert used(query[:, :, 1:], key, value, None, 0.1) != "DropoutAttentionBackward"  # few weights
    half = (x.bfloat16() for x in (query, key, value))  # too coarse for its sums
    assert used(*half, None, 0.1) != "DropoutAttentionBackward"


@given(seed=seeds)
def test_quick_gelu_forms_equal_linear_layers_and_the_formula(seed):
    up, down = randomized(nn.Linear(3, 5), seed), randomized(nn.Linear(5, 2), seed + 1)
    x = noise(2, 4, 3, seed=seed).requires_grad_()
    hidden = noise(2, 4, 5, seed=seed).requires_grad_()
    assert_same(quick_gelu(x), quick_gelu_by_hand(x))
    assert_same_with_gradients(
        lambda x, *_: quick_gelu_mlp(x, up, down), lambda x, *_: down(quick_gelu_by_hand(up(x))),
        x, up.weight, up.bias, down.weight, down.bias,
    )
    assert_same_with_gradients(
        lambda x, *_: quick_gelu_linear(x, down), lambda x, *_: down(quick_gelu_by_hand(x)), hidden, down.weight,
        down.bias,
    )


@given(b=sizes, t=sizes, n=sizes, channels=sizes, seed=seeds)
def test_depthwise_conv_equals_torch(b, t, n, channels, seed):
    x, weight, bias = noise(b, t, n, channels, seed=seed), noise(channels, 1, 3, seed=seed), noise(channels, seed=seed)
    assert_same_with_gradients(
        depthwise_conv, lambda *given: conv_by_hand(*given, groups=channels),
        x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(),
    )


@given(b=sizes, t=sizes, n=sizes, channels=sizes, seed=seeds)
def test_depthwise_conv_on_a_cpu_equals_its_form_for_other_types(b, t, n, channels, seed):
    """The CPU's convolution in float32, the shifted products in double precision: values, gradients and layout."""
    given = [noise(b, t, n, channels, seed=seed), noise(channels, 1, 3, seed=seed), noise(channels, seed=seed)]
    found, direction = [], noise(b, t, n, channels, seed=seed + 1)
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in given]
        with patch.object(F, "conv2d", wraps=F.conv2d) as convolved:
            out = depthwise_conv(*inputs)
        assert convolved.called == (dtype == torch.float32 and kernels.CPU_CONVOLUTION)
        assert out.is_contiguous()
        found.append([out, *torch.autograd.grad((out * direction.to(dtype)).sum(), inputs)])
    for one, other in zip(*found):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_depthwise_conv_compiles_as_one_graph(dtype):
    given = [noise(2, 4, 3, 5).to(dtype), noise(5, 1, 3).float(), noise(5).float()]
    compiled = torch.compile(depthwise_conv, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given), depthwise_conv(*given))


@given(t=sizes, seed=seeds)
def test_depthwise_conv_keeps_bfloat16_under_autocast_like_conv1d(t, seed):
    x, weight, bias = noise(2, t, 3, 5, seed=seed).bfloat16(), noise(5, 1, 3, seed=seed), noise(5, seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        found = depthwise_conv(x, weight.float(), bias.float())
        series = F.conv1d(rearrange(x, "b t n z -> (b n) z t"), weight.float(), bias.float(), padding=1, groups=5)
    expected = rearrange(series, "(b n) z t -> b t n z", b=2)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.06)  # rounded after each tap
