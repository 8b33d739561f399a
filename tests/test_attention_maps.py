"""Attention maps: the weights are those of the formula, and asking for them changes nothing."""

import torch
from helpers import assert_same, configs, noise, random_ids, random_mask, randomised, seeds
from hypothesis import given
from hypothesis import strategies as st

from mplug2.attention import CrossAttention
from mplug2.attention_maps import attention_maps, attention_weights
from mplug2.model import MPLUG2


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), seeds)
def test_the_weights_are_those_that_the_module_mixes_its_values_by(b, r, l, m, seed):
    module = randomised(CrossAttention(12, 3), seed)
    x, memory = noise(b * r, l, 12, seed=seed), noise(b, m, 12, seed=seed + 1)
    mask = random_mask(b, m, seed)[:, None, None, :]
    weights = attention_weights(module, x, memory, mask)
    assert weights.shape == (b * r, 3, l, m)
    assert_same(weights.sum(-1), torch.ones(b * r, 3, l).double())
    values = module.key_value(memory).chunk(2, dim=-1)[1].repeat_interleave(r, dim=0)
    heads = [weights[:, c] @ values[..., 4 * c : 4 * c + 4] for c in range(3)]
    assert_same(module.out(torch.cat(heads, dim=-1)), module(x, memory, mask))


@given(config=configs(fusion_stride=0), seed=seeds)
def test_every_cross_attention_leaves_its_weights_while_asked_and_nothing_changes(config, seed):
    model = randomised(MPLUG2(config, "video_qa"), seed)
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
