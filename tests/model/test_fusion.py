"""Fusion, with and without connected-attention layers: its formula, padding, and texts that share a video."""

import re

import pytest
import torch
from helpers import (
    assert_differs,
    assert_same,
    configs,
    layer_by_hand,
    noise,
    parameter_names,
    random_mask,
    randomized,
    seeds,
    shuffled,
    small,
    to_keys,
)
from hypothesis import example, given
from hypothesis import strategies as st

from mplug2.model.fusion import Fusion

sizes = st.integers(2, 5)


def inputs(config, b, v, l, seed):
    """Vision, text and text mask. The texts end in padding."""
    mask = random_mask(b, l, seed)
    mask[:, -1] = False
    return noise(b, v, config.width, seed=seed), noise(b, l, config.width, seed=seed + 1), mask


@given(config=configs(fusion_stride=0), v=sizes, l=sizes, seed=seeds)
def test_as_released_every_layer_attends_to_vision(config, v, l, seed):
    module, (vision, text, mask) = randomized(Fusion(config), seed), inputs(config, 2, v, l, seed)
    expected = text
    for layer in module.layers:
        expected = layer_by_hand(layer, expected, to_keys(mask), memory=vision)
    same_vision, fused = module(vision, text, mask)
    assert same_vision is vision
    assert len(module.layers) == config.fusion_layers
    assert_same(fused, expected)


@pytest.mark.parametrize("stride, connected", [
    (1, [False, True, True, True, True]), (2, [False, False, True, False, True]),
    (3, [False, False, False, True, False]), (4, [False, False, False, False, True]), (5, [False] * 5),
])
@given(v=sizes, l=sizes, seed=seeds)
def test_with_a_stride_some_layers_join_vision_and_text(stride, connected, v, l, seed):
    config = small(fusion_layers=5, fusion_stride=stride)
    module, (vision, text, mask) = randomized(Fusion(config), seed), inputs(config, 2, v, l, seed)
    expected, fused = vision, text
    joint_mask = to_keys(torch.cat([torch.ones(2, v, dtype=torch.bool), mask], dim=1))
    for layer, is_connected in zip(module.layers, connected):
        assert any("cross" in name for name in parameter_names(layer)) != is_connected
        if is_connected:
            joint = layer_by_hand(layer, torch.cat([expected, fused], dim=1), joint_mask)
            expected, fused = expected + joint[:, :v], joint[:, v:]
        else:
            fused = layer_by_hand(layer, fused, to_keys(mask), memory=expected)
    found = module(vision, text, mask)
    assert_same(found[0], expected)
    assert_same(found[1], fused)


@given(config=configs(), v=sizes, l=sizes, seed=seeds)
def test_padding_has_no_influence(config, v, l, seed):
    module, (vision, text, mask) = randomized(Fusion(config), seed), inputs(config, 2, v, l, seed)
    other = torch.where(mask[..., None], text, text + noise(config.width, seed=seed + 2))
    found, expected = module(vision, other, mask), module(vision, text, mask)
    assert_same(found[0], expected[0])
    assert_same(found[1][mask], expected[1][mask])
    all_real = torch.ones_like(mask)
    assert_differs(module(vision, other, all_real)[1][mask], module(vision, text, all_real)[1][mask])


@given(config=configs(), r=st.integers(1, 3), v=sizes, l=sizes, seed=seeds)
@example(config=small(fusion_stride=1), r=2, v=3, l=4, seed=0)  # a connected layer, which copies the videos
def test_sharing_a_video_equals_one_copy_per_text(config, r, v, l, seed):
    module, vision = randomized(Fusion(config), seed), noise(2, v, config.width, seed=seed)
    _, text, mask = inputs(config, 2 * r, v, l, seed)
    shared, each = module(vision, text, mask), module(vision.repeat_interleave(r, dim=0), text, mask)
    assert_same(shared[1], each[1])
    copies = each[0].shape[0] // shared[0].shape[0]
    assert copies == (1 if any(module.connected) else r)
    assert_same(shared[0].repeat_interleave(copies, dim=0), each[0])


@given(config=configs(), v=sizes, l=sizes, seed=seeds)
def test_the_order_of_visual_tokens_does_not_count(config, v, l, seed):
    module, (vision, text, mask) = randomized(Fusion(config), seed), inputs(config, 2, v, l, seed)
    order = shuffled(v, seed)
    found, expected = module(vision[:, order], text, mask), module(vision, text, mask)
    assert_same(found[0], expected[0][:, order])
    assert_same(found[1], expected[1])


@given(config=configs(), v=sizes, l=sizes, seed=seeds)
def test_samples_are_independent(config, v, l, seed):
    module, (vision, text, mask) = randomized(Fusion(config), seed), inputs(config, 3, v, l, seed)
    order = shuffled(3, seed)
    found, expected = module(vision[order], text[order], mask[order]), module(vision, text, mask)
    assert_same(found[0], expected[0][order])
    assert_same(found[1], expected[1][order])


def test_refuses_wrong_shapes():
    module = Fusion(small())
    vision, text, mask = torch.zeros(2, 4, 16), torch.zeros(2, 3, 16), random_mask(2, 3)
    with pytest.raises(ValueError, match=re.escape("(b v d) with d=16, found (2, 4, 15)")):
        module(vision[..., 1:], text, mask)
    with pytest.raises(ValueError, match=re.escape("(br l d) with d=16, found (2, 3, 15)")):
        module(vision, text[..., 1:], mask)
    with pytest.raises(ValueError, match=re.escape("(br l) with br=2, l=3, found (2, 2)")):
        module(vision, text, mask[:, 1:])
    with pytest.raises(ValueError, match="1 texts cannot share 2 images or videos evenly"):
        module(vision, text[:1], mask[:1])
