"""Attention maps: the weights follow the formula, and recording them changes nothing."""

import pytest
import torch
from helpers import assert_same, configs, noise, random_ids, random_mask, randomized, seeds, small
from hypothesis import given
from hypothesis import strategies as st

from mplug2.attention_maps import attention_maps, attention_weights, self_attention_weights
from mplug2.model.attention import CrossAttention, KVCache, SelfAttention, causal_mask
from mplug2.model.mplug2 import MPLUG2


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), seeds)
def test_the_weights_are_those_with_which_the_module_mixes_its_values(b, r, l, m, seed):
    module = randomized(CrossAttention(12, 3), seed)
    x, memory = noise(b * r, l, 12, seed=seed), noise(b, m, 12, seed=seed + 1)
    mask = random_mask(b, m, seed)[:, None, None, :]
    weights = attention_weights(module, x, memory, mask)
    assert weights.shape == (b * r, 3, l, m) and not weights.requires_grad
    assert_same(weights.sum(-1), torch.ones(b * r, 3, l).double())
    values = module.key_value(memory).chunk(2, dim=-1)[1].repeat_interleave(r, dim=0)
    heads = [weights[:, c] @ values[..., 4 * c: 4 * c + 4] for c in range(3)]
    assert_same(module.out(torch.cat(heads, dim=-1)), module(x, memory, mask))
    assert_same(attention_weights(module, x, module.keys_and_values(memory), mask), weights)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), seeds)
def test_so_are_the_weights_of_self_attention_also_one_token_at_a_time(b, l, p, seed):
    module, x = randomized(SelfAttention(12, 3), seed), noise(b, p + l, 12, seed=seed)
    mask = causal_mask(random_mask(b, p + l, seed))
    weights = self_attention_weights(module, x, mask)
    values = module.qkv(x).chunk(3, dim=-1)[2]
    heads = [weights[:, c] @ values[..., 4 * c: 4 * c + 4] for c in range(3)]
    assert_same(module.out(torch.cat(heads, dim=-1)), module(x, mask))
    cache = KVCache()
    module(x[:, :p], mask[:, :, :p, :p], cache)
    module(x[:, p:], mask[:, :, p:], cache)
    assert_same(self_attention_weights(module, x[:, p:], mask[:, :, p:], cache), weights[:, :, p:])


@given(config=configs(fusion_stride=0), seed=seeds)
def test_every_cross_attention_is_recorded_inside_the_context_and_nothing_changes(config, seed):
    model = randomized(MPLUG2(config, "video_qa"), seed)
    vision, ids, mask = noise(2, 3, config.width, seed=seed), random_ids(2, 4, seed), random_mask(2, 4, seed)

    def run() -> torch.Tensor:
        fused = model.fuse(vision, model.encode_text(ids, mask), mask)[1]
        return model.decode(ids, mask, fused, mask)

    expected = run()
    with attention_maps(model) as maps:
        assert torch.equal(run(), expected)
    assert set(maps) == {f"fusion.layers.{i}.cross_attention" for i in range(config.fusion_layers)} | {
        f"decoder.layers.{i}.cross_attention" for i in range(config.decoder_layers)
    }
    assert maps["fusion.layers.0.cross_attention"].shape == (2, config.heads, 4, 3)
    assert (maps["decoder.layers.0.cross_attention"] * ~mask[:, None, None, :] == 0).all()
    maps.clear()
    run()
    assert maps == {} and not any(module._forward_hooks for module in model.modules())


@given(config=configs(), t=st.integers(1, 3), seed=seeds)
def test_the_vision_encoder_has_maps_of_each_frame_and_generation_of_each_step(config, t, seed):
    model = randomized(MPLUG2(config, "video_caption"), seed)
    pixels = noise(2, 3, t, config.image_size, config.image_size, seed=seed)
    with attention_maps(model, SelfAttention) as maps:
        vision = model.encode_vision(pixels)
    frames, m = model.vision_encoder.patch_embed(pixels).shape[1], 1 + config.patches
    assert maps["vision_encoder.blocks.0.attention"].shape == (2 * frames, config.vision_heads, m, m)
    ids = random_ids(2, 3, seed)
    with attention_maps(model) as whole:
        model.decode(ids, torch.ones_like(ids, dtype=torch.bool), vision)
    with attention_maps(model) as steps, attention_maps(model, SelfAttention) as self_steps:
        state = model.decoder.init_state(vision)
        for i in range(3):
            model.decoder.step(ids[:, i: i + 1], state)
            for name, weights in steps.items():
                assert_same(weights[:, :, 0], whole[name][:, :, i])
            assert self_steps["decoder.layers.0.self_attention"].shape == (2, config.heads, 1, i + 1)


@pytest.mark.slow
def test_a_compiled_model_is_recorded_too():
    """Its layers were compiled before the hooks existed, here with a backend that runs the graphs as they are."""
    model = randomized(MPLUG2(small(), "video_qa"))
    ids, mask, memory = random_ids(2, 4), random_mask(2, 4), noise(2, 3, 16)
    with attention_maps(model) as expected:
        model.decode(ids, mask, memory)
    for layer in model.decoder.layers:
        layer.compile(backend="eager")
    model.decode(ids, mask, memory)
    with attention_maps(model) as maps:
        model.decode(ids, mask, memory)
    assert set(maps) == set(expected) and maps
    for name, weights in expected.items():
        assert_same(maps[name], weights)
