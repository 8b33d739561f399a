"""Pixels to patches and back, and the patch embedding as the convolution that it equals."""

import dataclasses
import re

import pytest
import torch
from einops import rearrange
from helpers import assert_differs, assert_same, configs, noise, norm_by_hand, randomized, seeds, shuffled, small
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mplug2.model.patch_embed import PatchEmbed, patchify, unpatchify

sizes = st.integers(1, 3)


@given(b=sizes, t=sizes, h=sizes, w=sizes, p=sizes, seed=seeds)
def test_patchify_and_unpatchify_are_inverses(b, t, h, w, p, seed):
    pixels, patches = noise(b, 3, t, h * p, w * p, seed=seed), noise(b, t, h * w, 3 * p * p, seed=seed)
    assert torch.equal(unpatchify(patchify(pixels, p), p, rows=h), pixels)
    assert torch.equal(patchify(unpatchify(patches, p, rows=h), p), patches)


@given(t=sizes, h=sizes, w=sizes, p=sizes, seed=seeds)
def test_a_patch_is_a_square_of_the_image_row_by_row(t, h, w, p, seed):
    pixels = noise(1, 3, t, h * p, w * p, seed=seed)
    patches = patchify(pixels, p)
    for row in range(h):
        for column in range(w):
            square = pixels[0, :, :, row * p:(row + 1) * p, column * p:(column + 1) * p]
            for frame in range(t):
                assert torch.equal(patches[0, frame, row * w + column], square[:, frame].flatten())


def embedded(module: PatchEmbed, tokens):
    """The output of the convolution, `b d t h w`, with positions and LayerNorm."""
    tokens = rearrange(tokens, "b d t h w -> b t (h w) d") + module.position[1:]
    return norm_by_hand(module.norm, tokens, eps=1e-5)


@given(config=configs(temporal_stride=0), t=sizes, seed=seeds)
def test_it_equals_a_conv3d(config, t, seed):
    p, module = config.patch_size, randomized(PatchEmbed(config), seed)
    pixels = noise(2, 3, t, config.image_size, config.image_size, seed=seed)
    kernel = rearrange(module.linear.weight, "d (three p p2) -> d three 1 p p2", three=3, p=p)
    expected = embedded(module, F.conv3d(pixels, kernel, stride=(1, p, p)))
    assert_same(module(pixels)[:, :, 1:], expected)


@given(config=configs(), stride=st.integers(1, 3), t=st.integers(1, 7), seed=seeds)
def test_temporal_downsampling_equals_a_conv3d_over_three_frames(config, stride, t, seed):
    config = dataclasses.replace(config, temporal_stride=stride)
    p, s, module = config.patch_size, config.temporal_stride, randomized(PatchEmbed(config), seed)
    pixels = noise(2, 3, t, config.image_size, config.image_size, seed=seed)
    kernel = rearrange(module.linear.weight, "d (k three p p2) -> d three k p p2", k=3, three=3, p=p)
    expected = embedded(module, F.conv3d(pixels, kernel, stride=(s, p, p), padding=(1, 0, 0)))
    found = module(pixels)
    assert found.shape == (2, (t - 1) // s + 1, 1 + config.patches, config.vision_width)
    assert_same(found[:, :, 1:], expected)


@given(config=configs(), t=st.integers(1, 5), seed=seeds)
def test_every_frame_starts_with_the_same_class_token(config, t, seed):
    module = randomized(PatchEmbed(config), seed)
    tokens = module(noise(2, 3, t, config.image_size, config.image_size, seed=seed))
    expected = norm_by_hand(module.norm, module.class_token + module.position[0], eps=1e-5)
    assert_same(tokens[:, :, 0], expected.expand(*tokens.shape[:2], -1))


@given(config=configs(temporal_stride=0), t=st.integers(2, 5), seed=seeds)
def test_it_is_equivariant_to_the_order_of_frames_and_samples(config, t, seed):
    module, order = randomized(PatchEmbed(config), seed), shuffled(t, seed)
    pixels = noise(2, 3, t, config.image_size, config.image_size, seed=seed)
    tokens = module(pixels)
    assert_same(module(pixels[:, :, order]), tokens[:, order])
    assert_same(module(pixels.flip(0)), tokens.flip(0))
    assert_differs(tokens[:, order], tokens)


def test_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="frames of 8 x 6 pixels cannot be cut into patches of 4 x 4"):
        patchify(torch.zeros(1, 3, 1, 8, 6), 4)
    with pytest.raises(ValueError, match=re.escape("expected shape (b 3 t H W), found (1, 4, 1, 8, 8)")):
        patchify(torch.zeros(1, 4, 1, 8, 8), 4)
    with pytest.raises(ValueError, match="4 patches cannot be arranged in 3 rows"):
        unpatchify(torch.zeros(1, 1, 4, 48), 4, rows=3)
    with pytest.raises(ValueError, match=re.escape("with values=48, found (1, 1, 4, 47)")):
        unpatchify(torch.zeros(1, 1, 4, 47), 4, rows=2)
    for shape in ((1, 3, 8, 8), (1, 1, 2, 8, 8), (1, 3, 2, 8, 12), (1, 3, 2, 12, 12)):
        with pytest.raises(ValueError, match=re.escape(f"(b 3 T H W) with H=8, W=8, found {shape}")):
            PatchEmbed(small())(torch.zeros(shape))
