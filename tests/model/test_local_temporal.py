"""The local temporal module: zero start, reach of one frame, independent patch positions, and its convolution."""

import re

import pytest
import torch
from einops import rearrange
from helpers import (
    assert_differs,
    assert_same,
    configs,
    conv_by_hand,
    noise,
    norm_by_hand,
    quick_gelu_by_hand,
    randomized,
    seeds,
    small,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mplug2.model.local_temporal import LocalTemporal, TemporalConv

sizes = st.integers(1, 4)


@given(config=configs(), t=sizes, n=sizes, seed=seeds)
def test_a_new_module_changes_nothing_yet_gets_gradients(config, t, n, seed):
    module = LocalTemporal(config).double()
    change = module(noise(2, t, n, config.vision_width, seed=seed))
    assert torch.equal(change, torch.zeros_like(change))
    (change * noise(*change.shape, seed=seed)).sum().backward()
    assert module.up.weight.grad.abs().max() > 0 and module.up.bias.grad.abs().max() > 0


@pytest.mark.parametrize("channels, groups", [(64, 1), (1024, 32)])
def test_the_convolution_starts_like_that_of_torch(channels, groups):
    """Evenly within one over the square root of the inputs of a channel; the bias starts at zero."""
    torch.manual_seed(0)
    module = TemporalConv(channels, groups)
    bound = (3 * module.channels / groups) ** -0.5
    assert 0.995 * bound < module.weight.abs().max() <= bound and not module.bias.any()
    assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_reset_up_restores_the_zero_start():
    module, x = randomized(LocalTemporal(small())), noise(1, 3, 2, 24)
    assert_differs(module(x), torch.zeros_like(x))
    module.reset_up()
    assert torch.equal(module(x), torch.zeros_like(x))


@given(config=configs(), t=sizes, n=sizes, seed=seeds)
def test_the_module_is_its_formula(config, t, n, seed):
    module, x = randomized(LocalTemporal(config), seed), noise(2, t, n, config.vision_width, seed=seed)
    groups = config.local_temporal_groups or config.vision_width // 2
    hidden = norm_by_hand(module.norm, x, eps=1e-5) @ module.down.weight.T + module.down.bias
    assert hidden.shape[-1] == config.vision_width // 2
    hidden = quick_gelu_by_hand(conv_by_hand(hidden, module.conv.weight, module.conv.bias, groups))
    assert_same(module(x), hidden @ module.up.weight.T + module.up.bias)


@given(config=configs(), t=st.integers(1, 7), frame=st.integers(0, 6), seed=seeds)
def test_it_reaches_one_frame_to_each_side(config, t, frame, seed):
    frame = min(frame, t - 1)
    module, x = randomized(LocalTemporal(config), seed), noise(1, t, 2, config.vision_width, seed=seed)
    changed = x.clone()
    changed[:, frame] += noise(*x[:, frame].shape, seed=seed + 1)
    before, after = module(x), module(changed)
    for other in range(t):
        if abs(other - frame) <= 1:
            assert_differs(after[:, other], before[:, other])
        else:
            assert torch.equal(after[:, other], before[:, other])


@given(config=configs(), t=sizes, n=st.integers(2, 4), seed=seeds)
def test_patch_positions_and_samples_are_independent(config, t, n, seed):
    module, x = randomized(LocalTemporal(config), seed), noise(2, t, n, config.vision_width, seed=seed)
    changed = x.clone()
    changed[1, :, 1] += noise(*x[1, :, 1].shape, seed=seed + 1)
    difference = (module(changed) - module(x)).abs().amax(dim=(1, 3))
    assert difference[1, 1] > 0
    difference[1, 1] = 0
    assert torch.equal(difference, torch.zeros_like(difference))


@given(b=sizes, t=sizes, n=sizes, channels=sizes, seed=seeds)
def test_depth_wise_convolution_equals_torch(b, t, n, channels, seed):
    module, x = randomized(TemporalConv(channels, channels), seed), noise(b, t, n, channels, seed=seed)
    series = rearrange(x, "b t n z -> (b n) z t")
    series = F.conv1d(series, module.weight, module.bias, padding=1, groups=channels)
    assert_same(module(x), rearrange(series, "(b n) z t -> b t n z", b=b))
    assert_same(module(x), conv_by_hand(x, module.weight, module.bias, channels))


@given(t=sizes, n=sizes, groups=sizes, channels_per_group=sizes, seed=seeds)
def test_grouped_convolution_is_its_formula(t, n, groups, channels_per_group, seed):
    channels = groups * channels_per_group
    module, x = randomized(TemporalConv(channels, groups), seed), noise(2, t, n, channels, seed=seed)
    expected = module.bias.expand(2, t, n, channels).clone()
    for frame in range(t):
        for channel in range(channels):
            first = channel // channels_per_group * channels_per_group
            for tap, source in enumerate((frame - 1, frame, frame + 1)):
                if 0 <= source < t:
                    inputs = x[:, source, :, first:first + channels_per_group]
                    expected[:, frame, :, channel] += inputs @ module.weight[channel, :, tap]
    assert_same(module(x), expected)


def test_refuses_wrong_shapes():
    module = LocalTemporal(small())
    for shape in ((1, 2, 24), (1, 2, 3, 23)):
        with pytest.raises(ValueError, match=re.escape(f"expected shape (b t n d) with d=24, found {shape}")):
            module(torch.zeros(shape))
