"""The dual-vision encoder: its blocks written out, whether it sees the order of frames, and how far they reach."""

import dataclasses
import re

import pytest
import torch
from helpers import (
    assert_differs,
    assert_same,
    attention_by_hand,
    configs,
    noise,
    norm_by_hand,
    parameter_names,
    quick_gelu_by_hand,
    randomized,
    seeds,
    shuffled,
    small,
)
from hypothesis import given
from hypothesis import strategies as st

from mplug2.model.local_temporal import LocalTemporal
from mplug2.model.vision_encoder import VisionBlock, VisionEncoder

frames = st.integers(2, 5)
whole = {"temporal_stride": 0}  # one frame of tokens for each frame of pixels


def pixels_for(config, b, t, seed):
    return noise(b, 3, t, config.image_size, config.image_size, seed=seed)


def by_frames(config, tokens, t):
    """Visual tokens -> class token `b d`, patches `b t n d`."""
    return tokens[:, 0], tokens[:, 1:].unflatten(1, (t, config.patches))


def other_form(encoder, config, **changes):
    """The encoder with other settings and the same weights, except those that it does not have."""
    other, weights = VisionEncoder(dataclasses.replace(config, **changes)).double(), encoder.state_dict()
    other.load_state_dict({name: weights[name] for name in other.state_dict()})
    return other.eval()


@given(config=configs(), b=st.integers(1, 2), t=st.integers(1, 4), image=st.booleans(), seed=seeds)
def test_the_block_is_its_formula(config, b, t, image, seed):
    block, m, d = randomized(VisionBlock(config, 0.0), seed), 1 + config.patches, config.vision_width
    x = noise(b, t, m, d, seed=seed)
    expected = x.clone()
    expected[:, :, 1:] = x[:, :, 1:] + block.lt1(x[:, :, 1:])
    each = norm_by_hand(block.attention_norm, expected, eps=1e-5).flatten(0, 1)
    change = attention_by_hand(block.attention, each, each).unflatten(0, (b, t))
    if config.class_token == "figure":
        change[:, :, 0] = change[:, :, 0].mean(dim=1, keepdim=True)
    expected = expected + change
    assert block.attention.heads == d // config.vision_head_width
    if config.local_temporal_placement == "released":
        expected[:, :, 1:] += block.lt2(expected[:, :, 1:])
    hidden = norm_by_hand(block.mlp_norm, expected, eps=1e-5) @ block.mlp_up.weight.T + block.mlp_up.bias
    assert hidden.shape[-1] == 4 * d
    expected = expected + quick_gelu_by_hand(hidden) @ block.mlp_down.weight.T + block.mlp_down.bias
    assert_same(block(x, is_image=image), expected)


@given(config=configs(), t=st.integers(1, 5), seed=seeds)
def test_the_output_is_the_mean_class_token_then_the_patches_time_major(config, t, seed):
    encoder, pixels = randomized(VisionEncoder(config), seed), pixels_for(config, 2, t, seed)
    x = encoder.patch_embed(pixels)
    for block in encoder.blocks:
        x = block(x, is_image=t == 1)
    rows = [x[:, :, 0].mean(dim=1)] + [x[:, frame, 1 + n] for frame in range(x.shape[1]) for n in range(config.patches)]
    stride = config.temporal_stride or 1
    assert len(rows) == 1 + ((t - 1) // stride + 1) * config.patches
    assert_same(encoder(pixels), norm_by_hand(encoder.norm, torch.stack(rows, dim=1), eps=1e-5))


@given(config=configs(local_temporal=False, **whole), t=frames, seed=seeds)
def test_without_local_temporal_the_order_of_frames_cannot_be_seen(config, t, seed):
    encoder, pixels, order = randomized(VisionEncoder(config), seed), pixels_for(config, 2, t, seed), shuffled(t, seed)
    class_token, patches = by_frames(config, encoder(pixels), t)
    class_token_of_shuffled, patches_of_shuffled = by_frames(config, encoder(pixels[:, :, order]), t)
    assert_same(class_token_of_shuffled, class_token)
    assert_same(patches_of_shuffled, patches[:, order])
    assert_differs(patches_of_shuffled, patches)


@given(config=configs(local_temporal=True, **whole), t=frames, seed=seeds)
def test_with_local_temporal_it_can(config, t, seed):
    encoder, pixels, order = randomized(VisionEncoder(config), seed), pixels_for(config, 2, t, seed), shuffled(t, seed)
    class_token, patches = by_frames(config, encoder(pixels), t)
    class_token_of_shuffled, patches_of_shuffled = by_frames(config, encoder(pixels[:, :, order]), t)
    assert_differs(class_token_of_shuffled, class_token)
    assert_differs(patches_of_shuffled, patches[:, order])


@given(config=configs(class_token="figure"), t=frames, seed=seeds)
def test_one_class_token_for_all_frames_is_the_same_in_every_frame(config, t, seed):
    encoder, pixels = randomized(VisionEncoder(config), seed), pixels_for(config, 2, t, seed)
    x = encoder.patch_embed(pixels)
    for block in encoder.blocks:
        x = block(x, is_image=False)
        assert_same(x[:, :, 0], x[:, :1, 0].expand_as(x[:, :, 0]))
    assert_same(encoder(pixels)[:, 0], norm_by_hand(encoder.norm, x[:, 0, 0], eps=1e-5))


@given(config=configs(), seed=seeds)
def test_for_an_image_both_kinds_of_class_tokens_are_the_same(config, seed):
    encoder, image = randomized(VisionEncoder(config), seed), pixels_for(config, 2, 1, seed)
    other = {"released": "figure", "figure": "released"}[config.class_token]
    assert_same(encoder(image), other_form(encoder, config, class_token=other)(image))


@given(config=configs(local_temporal=False, class_token="figure", **whole), t=frames, seed=seeds)
def test_one_class_token_carries_information_between_frames_without_local_temporal(config, t, seed):
    config = dataclasses.replace(config, vision_layers=2)
    encoder, pixels = randomized(VisionEncoder(config), seed), pixels_for(config, 1, t, seed)
    changed = pixels.clone()
    changed[:, :, 0] += noise(*pixels[:, :, 0].shape, seed=seed + 1)
    _, before = by_frames(config, encoder(pixels), t)
    _, after = by_frames(config, encoder(changed), t)
    assert_differs(after[:, -1], before[:, -1])


@given(config=configs(local_temporal=False, class_token="released", **whole), t=frames, seed=seeds)
def test_without_local_temporal_a_video_is_a_set_of_images(config, t, seed):
    encoder, pixels = randomized(VisionEncoder(config), seed), pixels_for(config, 1, t, seed)
    _, patches = by_frames(config, encoder(pixels), t)
    for frame in range(t):
        image = encoder(pixels[:, :, frame:frame + 1])
        assert_same(patches[:, frame], image[:, 1:])


@given(config=configs(), t=st.integers(1, 4), seed=seeds)
def test_at_their_zero_start_local_temporal_modules_change_nothing(config, t, seed):
    encoder, pixels = randomized(VisionEncoder(config), seed), pixels_for(config, 2, t, seed)
    never = other_form(encoder, config, local_temporal=False)
    assert_differs(encoder(pixels), never(pixels))
    for module in encoder.modules():
        if isinstance(module, LocalTemporal):
            module.reset_up()
    assert_same(encoder(pixels), never(pixels))


@pytest.mark.parametrize("placement, modules", [("released", 2), ("figure", 1)])
@pytest.mark.parametrize("layers", [1, 2])
@given(frame=st.integers(0, 9), seed=seeds)
def test_the_reach_grows_by_one_frame_per_module(placement, modules, layers, frame, seed):
    config = small(local_temporal_placement=placement, vision_layers=layers, image_size=4, patch_size=2)
    encoder, pixels = randomized(VisionEncoder(config), seed), pixels_for(config, 1, 10, seed)
    changed = pixels.clone()
    changed[:, :, frame] += noise(*pixels[:, :, frame].shape, seed=seed + 1)
    _, before = by_frames(config, encoder(pixels), 10)
    _, after = by_frames(config, encoder(changed), 10)
    for other in range(10):
        if abs(other - frame) <= modules * layers:
            assert (after[:, other] != before[:, other]).any()
        else:
            assert_same(after[:, other], before[:, other])


@given(config=configs(local_temporal_placement="figure", class_token="released"), t=frames, frame=st.integers(0, 4),
       seed=seeds)
def test_class_tokens_bypass_the_local_temporal_module(config, t, frame, seed):
    frame = min(frame, t - 1)
    block = randomized(VisionBlock(config, 0.0), seed)
    x = noise(1, t, 1 + config.patches, config.vision_width, seed=seed)
    with_patch, with_class = x.clone(), x.clone()
    with_patch[:, frame, 1] += 1 + noise(config.vision_width, seed=seed + 1)
    with_class[:, frame, 0] += 1 + noise(config.vision_width, seed=seed + 1)
    neighbor = frame - 1 if frame else 1
    assert_differs(block(with_patch, False)[:, neighbor], block(x, False)[:, neighbor])
    assert_same(block(with_class, False)[:, neighbor], block(x, False)[:, neighbor])
    assert_same(block.add_to_patches(x, block.lt1)[:, :, 0], x[:, :, 0])


@given(config=configs(temporal_on_images=False), t=frames, seed=seeds)
def test_temporal_on_images_concerns_images_only(config, t, seed):
    encoder = randomized(VisionEncoder(config), seed)
    image, video = pixels_for(config, 2, 1, seed), pixels_for(config, 2, t, seed)
    always, never = (other_form(encoder, config, **{name: value}) for name, value in (
        ("temporal_on_images", True), ("local_temporal", False)
    ))
    assert_same(encoder(image), never(image))
    assert_differs(encoder(image), always(image))
    assert_same(encoder(video), always(video))
    assert_differs(encoder(video), never(video))


@given(config=configs(temporal_on_images=True), seed=seeds)
def test_only_the_middle_tap_counts_for_an_image(config, seed):
    encoder, image = randomized(VisionEncoder(config), seed), pixels_for(config, 2, 1, seed)
    expected = encoder(image)
    with torch.no_grad():
        for block in encoder.blocks:
            block.lt1.conv.weight[:, :, [0, 2]] += 1
    assert_same(encoder(image), expected)
    with torch.no_grad():
        encoder.blocks[0].lt1.conv.weight[:, :, 1] += 1
    assert_differs(encoder(image), expected)


@pytest.mark.parametrize("changes, built", [
    ({}, {"lt1", "lt2"}), ({"local_temporal_placement": "figure"}, {"lt1"}), ({"local_temporal": False}, set()),
])
def test_only_local_temporal_modules_that_run_are_built(changes, built):
    for block in VisionEncoder(small(**changes)).blocks:
        assert {name.split(".")[0] for name in parameter_names(block) if name.startswith("lt")} == built


@given(config=configs(), t=st.integers(1, 4), seed=seeds)
def test_samples_are_independent(config, t, seed):
    encoder, pixels, order = randomized(VisionEncoder(config), seed), pixels_for(config, 3, t, seed), shuffled(3, seed)
    assert_same(encoder(pixels[order]), encoder(pixels)[order])


@given(placement=st.sampled_from(["released", "figure"]), seed=seeds)
def test_drop_path_applies_to_every_branch_of_a_block(placement, seed):
    block = randomized(VisionBlock(small(local_temporal_placement=placement), drop_path=1 - 1e-12), seed)
    x = noise(3, 2, 5, 24, seed=seed)
    assert_same(block.train()(x, False), x)
    assert_differs(block.eval()(x, False), x)


@pytest.mark.parametrize("layers, rates", [(1, [0]), (2, [0, 0.3]), (4, [0, 0.1, 0.2, 0.3])])
def test_drop_path_grows_with_depth(layers, rates):
    encoder = VisionEncoder(small(vision_layers=layers, drop_path=0.3))
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx(rates)


def test_refuses_wrong_shapes():
    encoder = VisionEncoder(small())
    for shape in ((1, 3, 8, 8), (1, 4, 2, 8, 8), (1, 3, 2, 8, 9)):
        with pytest.raises(ValueError, match=re.escape(f"found {shape}")):
            encoder(torch.zeros(shape))
