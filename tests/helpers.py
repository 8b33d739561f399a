"""Shared by the tests of the modules: small models with random weights, random inputs, and oracles.

Everything is in double precision: equal means equal to about ten digits, and a difference is never rounding.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.config import ModelConfig
from mplug2.model.attention import JointMemory, SelfAttention
from mplug2.model.layers import BertLayer

seeds = st.integers(0, 2**16)
Module = TypeVar("Module", bound=nn.Module)
QUICK_TASKS = ("pretrain", "video_caption", "image_qa", "video_retrieval", "visual_entailment", "grounding")
"""Pre-training, and one task for each kind of output. Tests of the others may be slow."""


def slow_except(quick: Iterable, values: Iterable) -> list[Any]:
    """Values of a parametrized test. The test is slow, except with those that are also in `quick`."""
    assert set(quick) <= set(values)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def small(**changes) -> ModelConfig:
    """A model of a few thousand parameters. Sizes that code could mix up are different."""
    sizes = dict(
        image_size=8, patch_size=4, vision_width=24, vision_layers=2, vision_head_width=8, width=16, heads=2,
        ff_width=20, text_layers=3, universal_layers=2, latents=3, fusion_layers=2, decoder_layers=2, vocab_size=29,
        max_positions=11, contrastive_width=5, dropout=0.0,
    )
    return ModelConfig(**{**sizes, **changes})


@st.composite
def configs(draw: st.DrawFn, **fixed) -> ModelConfig:
    """Small models of every form. Heads and head widths are drawn and multiplied, so no example is rejected."""
    few = st.integers(1, 3)
    vision_head_width, heads, universal_layers, patch = 2 * draw(st.integers(2, 4)), draw(few), draw(few), draw(few)
    drawn = dict(
        patch_size=patch, image_size=patch * draw(few),
        vision_head_width=vision_head_width, vision_width=vision_head_width * draw(few),
        vision_layers=draw(st.integers(1, 2)),
        temporal_stride=draw(st.sampled_from([0, 0, 0, 1, 2, 3])),
        local_temporal_groups=draw(st.sampled_from([0, 1, vision_head_width // 2])),
        class_token=draw(st.sampled_from(["released", "figure"])),
        local_temporal_placement=draw(st.sampled_from(["released", "figure"])),
        heads=heads, width=heads * draw(st.integers(4, 8)), universal_layers=universal_layers,
        text_layers=universal_layers + draw(st.integers(0, 2)), latents=draw(st.integers(2, 4)),
        universal_readout=draw(st.sampled_from(["released", "figure"])),
        fusion_layers=draw(few), fusion_stride=draw(st.integers(0, 2)),
        decoder_layers=draw(st.integers(1, 2)),
    )
    return small(**{**drawn, **fixed})


def randomized(module: Module, seed: int = 0) -> Module:
    """`module` in double precision and evaluation mode, with noise on every weight, so no zero start hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.double)
            parameter.copy_(noise + (parameter == 1))  # the weights of LayerNorms stay around one
    return module.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def random_ids(b: int, l: int, seed: int = 0, vocab_size: int = 29) -> Tensor:
    """Token ids `b l`."""
    return torch.randint(vocab_size, (b, l), generator=torch.Generator().manual_seed(seed))


def random_mask(b: int, l: int, seed: int = 0) -> Tensor:
    """A mask `b l` with holes anywhere except at the first token."""
    mask = torch.rand(b, l, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    return mask


def shuffled(size: int, seed: int = 0) -> Tensor:
    """A permutation of `size` indices, never the identity for two or more."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order.roll(1) if torch.equal(order, torch.arange(size)) else order


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def assert_differs(found: Tensor, other: Tensor) -> None:
    assert found.shape == other.shape
    assert (found - other).abs().max() > 1e-7, "nothing changed"


def norm_by_hand(norm: nn.LayerNorm, x: Tensor, eps: float = 1e-12) -> Tensor:
    """LayerNorm, written out, with the epsilon that the module should have."""
    centered = x - x.mean(dim=-1, keepdim=True)
    return centered / (centered.square().mean(dim=-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def joined(memory: JointMemory) -> Tensor:
    """The sequence [V', text] of each text, `(b r) (v+l) d`, with V' once for every text about it."""
    vision = memory.vision.repeat_interleave(len(memory.text) // len(memory.vision), dim=0)
    return torch.cat([vision, memory.text], dim=1)


def attention_by_hand(module: nn.Module, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of x `b l d` to memory `b m d`, one head at a time; mask `b l m`."""
    if isinstance(module, SelfAttention):
        query, key, value = module.qkv(x).chunk(3, dim=-1)
    else:
        query, (key, value) = module.query(x), module.key_value(memory).chunk(2, dim=-1)
    mixed, e = [], module.width // module.heads
    for q, k, v in zip(query.split(e, dim=-1), key.split(e, dim=-1), value.split(e, dim=-1)):
        weights = (q @ k.transpose(1, 2) / e**0.5).exp()
        if mask is not None:
            weights = weights * mask
        mixed.append(weights / weights.sum(dim=-1, keepdim=True) @ v)
    return module.out(torch.cat(mixed, dim=-1))


def layer_by_hand(
    layer: BertLayer, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
) -> Tensor:
    """BERT's layer, written out: x `b l d`, mask `b l l`, memory `b m d`, memory_mask `b l m`."""
    x = norm_by_hand(layer.self_norm, x + attention_by_hand(layer.self_attention, x, x, mask))
    if memory is not None:
        x = norm_by_hand(layer.cross_norm, x + attention_by_hand(layer.cross_attention, x, memory, memory_mask))
    hidden = layer.feed_forward.up(x)
    hidden = layer.feed_forward.down(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
    return norm_by_hand(layer.feed_forward_norm, x + hidden)


def to_keys(mask: Tensor) -> Tensor:
    """A mask of tokens `b l` -> which keys each query may attend to, `b l l`."""
    return mask[:, None, :].expand(-1, mask.shape[1], -1)


def parameter_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def quick_gelu_by_hand(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def conv_by_hand(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """A convolution over time of x `b t n z`, as torch's Conv3d with kernel (3, 1, 1)."""
    series = x.permute(0, 3, 1, 2).unsqueeze(-1)  # b z t n 1
    series = F.conv3d(series, weight[..., None, None], bias, padding=(1, 0, 0), groups=groups)
    return series.squeeze(-1).permute(0, 2, 3, 1)
