"""The universal layers: shared weights with two entry points, and both forms of the vision path written out."""

import re

import pytest
import torch
from helpers import (
    assert_differs,
    assert_same,
    attention_by_hand,
    configs,
    layer_by_hand,
    noise,
    norm_by_hand,
    parameter_names,
    random_mask,
    randomized,
    seeds,
    shuffled,
    small,
    to_keys,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.model.attention import CrossAttention, SelfAttention
from mplug2.model.universal import UniversalLayers

sizes = st.integers(2, 6)
released, figure = {"universal_readout": "released"}, {"universal_readout": "figure"}


def universal(config, seed):
    return randomized(UniversalLayers(config, for_vision=True, for_text=True), seed)


@given(config=configs(universal_layers=1, text_layers=3, **released), v=sizes, seed=seeds)
def test_released_vision_path_of_one_layer(config, v, seed):
    module, tokens = universal(config, seed), noise(2, v, config.width, seed=seed)
    latents = module.latents.expand(2, -1, -1)
    stream = layer_by_hand(module.layers[0], tokens, memory=latents)
    assert_same(module.vision(tokens), norm_by_hand(module.vision_norm, tokens + stream))


@given(config=configs(universal_layers=2, text_layers=3, **released), v=sizes, seed=seeds)
def test_released_vision_path_of_two_layers(config, v, seed):
    module, tokens = universal(config, seed), noise(2, v, config.width, seed=seed)
    first, last = module.layers
    latents = layer_by_hand(first, module.latents.expand(2, -1, -1), memory=tokens)
    stream = layer_by_hand(last, tokens, memory=latents)
    assert_same(module.vision(tokens), norm_by_hand(module.vision_norm, tokens + stream))


@given(config=configs(universal_layers=3, text_layers=3, **released), v=sizes, seed=seeds)
def test_released_vision_path_of_three_layers(config, v, seed):
    module, tokens = universal(config, seed), noise(2, v, config.width, seed=seed)
    first, second, last = module.layers
    latents = layer_by_hand(first, module.latents.expand(2, -1, -1), memory=tokens)
    latents = layer_by_hand(second, latents, memory=tokens)
    stream = layer_by_hand(last, tokens, memory=latents)
    assert_same(module.vision(tokens), norm_by_hand(module.vision_norm, tokens + stream))


@given(config=configs(**figure), v=sizes, seed=seeds)
def test_vision_path_of_the_figure(config, v, seed):
    """Latents read V; S layers with cross-attention to V and a residual around each; V reads the stream; + V."""
    module, tokens = universal(config, seed), noise(2, v, config.width, seed=seed)
    stream = attention_by_hand(module.read, module.latents.expand(2, -1, -1), tokens)
    for layer in module.layers:
        inside = norm_by_hand(layer.self_norm, stream + attention_by_hand(layer.self_attention, stream, stream))
        inside = norm_by_hand(layer.cross_norm, inside + attention_by_hand(layer.cross_attention, inside, tokens))
        hidden = inside @ layer.feed_forward.up.weight.T + layer.feed_forward.up.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        hidden = hidden @ layer.feed_forward.down.weight.T + layer.feed_forward.down.bias
        stream = stream + norm_by_hand(layer.feed_forward_norm, inside + hidden)
    assert len(module.layers) == config.universal_layers
    stream = attention_by_hand(module.write, tokens, stream)
    assert_same(module.vision(tokens), norm_by_hand(module.vision_norm, tokens + stream))


@given(config=configs(), l=sizes, seed=seeds)
def test_text_path(config, l, seed):
    module, x, mask = universal(config, seed), noise(2, l, config.width, seed=seed), random_mask(2, l, seed)
    expected = x
    for layer in module.layers:
        change = layer_by_hand(layer, expected, to_keys(mask))
        expected = expected + change if config.universal_readout == "figure" else change
    if config.universal_readout == "figure":
        expected = norm_by_hand(module.text_norm, x + expected)
    assert_same(module.text(x, mask), expected)


@pytest.mark.parametrize("readout", ["released", "figure"])
@pytest.mark.parametrize("for_vision, for_text", [(True, True), (True, False), (False, True)])
def test_without_layers_vision_and_text_pass_unchanged(readout, for_vision, for_text):
    module = UniversalLayers(small(universal_layers=0, universal_readout=readout), for_vision, for_text)
    assert not parameter_names(module)
    x, mask = noise(2, 5, 16), random_mask(2, 5)
    assert torch.equal(module.text(x, mask), x) and torch.equal(module.vision(x), x)


@settings(max_examples=6)
@given(config=configs(), seed=seeds)
def test_shared_weights_change_both_outputs_and_others_only_one(config, seed):
    module, x, mask = universal(config, seed), noise(2, 5, config.width, seed=seed), random_mask(2, 5, seed)
    vision, text = module.vision(x), module.text(x, mask)
    for name, parameter in module.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += noise(*parameter.shape, seed=seed + 1)
        for_vision_only = name.startswith(("latents", "read", "write", "vision_norm")) or "cross" in name
        for_text_only = name.startswith("text_norm")
        (assert_same if for_text_only else assert_differs)(module.vision(x), vision)
        (assert_same if for_vision_only else assert_differs)(module.text(x, mask), text)
        with torch.no_grad():
            parameter.copy_(kept)


@pytest.mark.parametrize("readout, for_vision, for_text, own", [
    ("released", True, True, {"latents", "vision_norm", "cross"}),
    ("released", True, False, {"latents", "vision_norm", "cross"}),
    ("released", False, True, set()),
    ("figure", True, True, {"latents", "vision_norm", "cross", "read", "write", "text_norm"}),
    ("figure", True, False, {"latents", "vision_norm", "cross", "read", "write"}),
    ("figure", False, True, {"text_norm"}),
])
def test_only_what_an_entry_point_needs_is_built(readout, for_vision, for_text, own):
    module = UniversalLayers(small(universal_readout=readout), for_vision, for_text)
    names = {"cross" if "cross" in name else name.split(".")[0] for name in parameter_names(module)}
    assert names == {"layers"} | own


@given(config=configs(), v=sizes, seed=seeds)
def test_the_order_of_visual_tokens_does_not_count(config, v, seed):
    module, tokens, order = universal(config, seed), noise(2, v, config.width, seed=seed), shuffled(v, seed)
    assert_same(module.vision(tokens[:, order]), module.vision(tokens)[:, order])


@given(config=configs(), l=sizes, seed=seeds)
def test_padding_of_text_has_no_influence(config, l, seed):
    module, x, mask = universal(config, seed), noise(2, l, config.width, seed=seed), random_mask(2, l, seed)
    mask[:, -1] = False
    other = torch.where(mask[..., None], x, x + noise(config.width, seed=seed + 1))
    assert_same(module.text(other, mask)[mask], module.text(x, mask)[mask])
    assert_differs(module.text(other, torch.ones_like(mask))[mask], module.text(x, torch.ones_like(mask))[mask])


@given(config=configs(), l=sizes, seed=seeds)
def test_samples_are_independent(config, l, seed):
    module, x, mask = universal(config, seed), noise(3, l, config.width, seed=seed), random_mask(3, l, seed)
    order = shuffled(3, seed)
    assert_same(module.vision(x[order]), module.vision(x)[order])
    assert_same(module.text(x[order], mask[order]), module.text(x, mask)[order])


def test_dropout_ends_the_vision_path_in_training():
    module, tokens = universal(small(dropout=0.5), 0), noise(2, 30, 16)
    torch.manual_seed(0)
    assert 0.4 < (module.train().vision(tokens) == 0).double().mean() < 0.6
    assert (module.eval().vision(tokens) != 0).all()


@pytest.mark.parametrize("readout", ["released", "figure"])
def test_gradients_reach_vision_and_latents_along_every_path(readout):
    """Against finite differences: a path that is cut somewhere gives another derivative, though not zero."""
    module = randomized(UniversalLayers(small(universal_readout=readout), for_vision=True, for_text=False))
    tokens, step = noise(1, 3, 16), noise(1, 3, 16, seed=1)
    for start, change in ((tokens, step), (module.latents.data, noise(*module.latents.shape, seed=2))):
        values = []
        for shift in (1e-5, -1e-5):
            start += shift * change
            values.append(module.vision(tokens).square().sum().item())
            start -= shift * change
        module.zero_grad()
        watched = tokens.clone().requires_grad_()
        module.vision(watched).square().sum().backward()
        gradient = watched.grad if start is tokens else module.latents.grad
        assert (gradient * change).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_refuses_wrong_shapes():
    module = UniversalLayers(small(), for_vision=True, for_text=True)
    with pytest.raises(ValueError, match=re.escape("(b v d) with d=16, found (2, 5, 15)")):
        module.vision(torch.zeros(2, 5, 15))
    with pytest.raises(ValueError, match=re.escape("(b v d) with d=16, found (2, 5, 3, 16)")):
        module.vision(torch.zeros(2, 5, 3, 16))
    with pytest.raises(ValueError, match=re.escape("(b l d) with d=16, found (2, 5, 15)")):
        module.text(torch.zeros(2, 5, 15), random_mask(2, 5))
    with pytest.raises(ValueError, match=re.escape("(b l) with b=2, l=5, found (2, 4)")):
        module.text(torch.zeros(2, 5, 16), random_mask(2, 4))


@pytest.mark.parametrize("form", [released, figure])
def test_every_attention_drops_weights_at_the_rate_of_the_config(form):
    module = UniversalLayers(small(dropout=0.3, **form), for_vision=True, for_text=True)
    rates = [part.dropout for part in module.modules() if isinstance(part, (SelfAttention, CrossAttention))]
    assert rates == [0.3] * (6 if form is figure else 4)
