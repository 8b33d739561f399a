"""The optimizer: parameter groups, weight decay, and the learning-rate schedule."""

import pytest
import torch
from helpers import configs, randomized, small
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mplug2.model.local_temporal import LocalTemporal, TemporalConv
from mplug2.model.mplug2 import MPLUG2
from mplug2.tasks import TASKS
from mplug2.training.muon import Muon
from mplug2.training.optim import (
    OptimizerSettings,
    depth,
    freeze,
    lr_factor,
    make_optimizer,
    parameter_groups,
    set_lr,
)

rates = st.sampled_from([1e-3, 2e-5])


@given(config=configs(), task=st.sampled_from([*TASKS]), lr=rates, vision_lr=rates, decay=st.sampled_from([0.0, 0.02]))
def test_each_parameter_is_in_one_group_with_its_learning_rate_and_decay(config, task, lr, vision_lr, decay):
    model = MPLUG2(config, task)
    groups = parameter_groups(model, OptimizerSettings(lr=lr, vision_lr=vision_lr, weight_decay=decay))
    found = [(id(parameter), group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]]
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, TemporalConv))}
    expected = [
        (id(parameter), vision_lr if name.startswith("vision_encoder.") else lr, decay * (id(parameter) in matrices))
        for name, parameter in model.named_parameters()
    ]
    assert sorted(found) == sorted(expected)
    assert all(group["params"] and group["base_lr"] == group["lr"] for group in groups)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    assert {id(p) for group in groups if group["matrices"] for p in group["params"]} == linear
    assert len({(group["lr"], group["weight_decay"], group["matrices"]) for group in groups}) <= len(groups) <= 6


@given(config=configs(), task=st.sampled_from(["pretrain", "video_caption", "text_classification"]),
       decay=st.sampled_from([0.5, 0.75, 1.0]))
def test_each_encoder_layer_has_a_fraction_of_the_learning_rate_of_the_layer_above(config, task, decay):
    model = MPLUG2(config, task)
    settings = OptimizerSettings(lr=1.0, vision_lr=0.5, layer_decay=decay)
    rates = {id(parameter): group["lr"] for group in parameter_groups(model, settings)
             for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    for name, rate in found.items():
        top, *rest = name.split(".")
        if top == "vision_encoder":
            layer = {"patch_embed": 0, "blocks": int(rest[1]) + 1 if rest[0] == "blocks" else 0}.get(
                rest[0], config.vision_layers)
            assert rate == pytest.approx(0.5 * decay ** (config.vision_layers + 1 - layer)), name
        elif top == "text_encoder":
            layer = int(rest[1]) + 1 if rest[0] == "layers" else 0
            assert rate == pytest.approx(decay ** (config.text_layers + 1 - layer)), name
        elif name.startswith("universal.layers"):
            above = config.universal_layers - int(rest[1])
            assert rate == pytest.approx(decay**above) and depth(model, name) == above
        else:
            assert rate == 1.0, name


def test_local_temporal_modules_can_have_a_learning_rate_of_their_own():
    model = MPLUG2(small(), "video_caption")
    groups = parameter_groups(model, OptimizerSettings(lr=1.0, vision_lr=0.5, temporal_lr=0.25))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    temporal = {id(p) for module in model.modules() if isinstance(module, LocalTemporal) for p in module.parameters()}
    vision = {id(parameter) for parameter in model.vision_encoder.parameters()} - temporal
    assert {one for one, rate in rates.items() if rate == 0.25} == temporal
    assert {one for one, rate in rates.items() if rate == 0.5} == vision
    assert set(rates.values()) == {0.25, 0.5, 1.0}


def test_only_frozen_modules_are_excluded():
    model = MPLUG2(small(), "video_qa")
    freeze(model, ["vision_encoder", "universal"])
    groups = parameter_groups(model, OptimizerSettings())
    learning = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vision_encoder.", "universal."))
        assert parameter.requires_grad != frozen and (id(parameter) in learning) != frozen
    freeze(model, [])
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="freeze='vision_encodr': the modules of a model for video_qa are vision_"):
        freeze(model, ["vision_encodr"])
    with pytest.raises(ValueError, match="no module is left to train"):
        freeze(MPLUG2(small(), "text_classification"), ["text_encoder", "universal", "classifier"])


def test_biases_norms_embeddings_positions_latents_and_temperature_do_not_decay():
    model = MPLUG2(small(), "pretrain")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    undecayed = {
        names[id(parameter)] for group in parameter_groups(model, OptimizerSettings()) for parameter in group["params"]
        if group["weight_decay"] == 0
    }
    words = ("bias", "norm.weight", "embeddings.word.weight", "position", "position.weight", "token_type.weight",
             "latents", "class_token", "temperature")
    assert undecayed == {name for name in names.values() if name.endswith(words)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_with_zero_gradients_only_applies_weight_decay(name):
    model = randomized(MPLUG2(small(), "pretrain"))
    optimizer = make_optimizer(model, OptimizerSettings(name, lr=0.1, vision_lr=0.01, weight_decay=0.5))
    assert type(optimizer) is {"adamw": torch.optim.AdamW, "muon": Muon}[name]
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.testing.assert_close(parameter.data, before[parameter] * (1 - group["lr"] * group["weight_decay"]))


# ---- the schedule ----------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 200), warmup_ratio=st.floats(0, 1), floor=st.floats(0, 1))
def test_the_learning_rate_rises_to_the_peak_and_falls_to_the_floor(steps, warmup_ratio, floor):
    warmup = round(warmup_ratio * (steps - 1))
    factors = [lr_factor(step, steps, warmup, floor) for step in range(steps + 1)]
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert falling[0] == 1 and falling[-1] == pytest.approx(floor)
    assert all(later <= earlier for earlier, later in zip(falling, falling[1:]))
    assert falling == pytest.approx([1 + floor - factor for factor in reversed(falling)])  # half a cosine is symmetric
    assert lr_factor(steps + 10, steps, warmup, floor) == pytest.approx(floor)


def test_the_fall_is_a_half_cosine():
    assert lr_factor(25, 100, 0, 0.0) == pytest.approx((1 + 2**-0.5) / 2)
    assert lr_factor(75, 100, 0, 0.2) == pytest.approx(0.2 + 0.8 * (1 - 2**-0.5) / 2)


@given(steps=st.integers(1, 50), step=st.integers(0, 50), warmup=st.integers(0, 9), ratio=st.floats(0, 1))
def test_learning_rates_are_fractions_of_the_peak_however_often_they_are_set(steps, step, warmup, ratio):
    settings = OptimizerSettings(lr=1e-3, vision_lr=1e-4, warmup_steps=warmup, min_lr_ratio=ratio)
    optimizer = make_optimizer(MPLUG2(small(), "video_caption"), settings)
    peaks = [group["lr"] for group in optimizer.param_groups]
    assert set(peaks) == {1e-3, 1e-4}
    for _ in range(2):
        set_lr(optimizer, settings, step, steps)
        factor = lr_factor(step, steps, warmup, ratio)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([peak * factor for peak in peaks])


def test_the_floor_is_a_ratio_or_the_same_rate_for_all_groups_and_never_above_the_peak():
    optimizer = make_optimizer(MPLUG2(small(), "video_caption"), OptimizerSettings(lr=1e-3, vision_lr=1e-4))
    for settings, floors in ((OptimizerSettings(min_lr_ratio=0.5), {5e-4, 5e-5}),
                             (OptimizerSettings(min_lr=2e-5), {2e-5}), (OptimizerSettings(min_lr=0.0), {0.0}),
                             (OptimizerSettings(min_lr=5e-4), {5e-4, 1e-4})):
        set_lr(optimizer, settings, 100, 100)
        found = sorted({group["lr"] for group in optimizer.param_groups})
        assert found == pytest.approx(sorted(floors)), settings
    frozen = make_optimizer(MPLUG2(small(), "video_caption"), OptimizerSettings(lr=0.0))
    set_lr(frozen, OptimizerSettings(min_lr=1e-6), 100, 100)
    assert {group["lr"] for group in frozen.param_groups} == {0.0}


def test_warmup_is_a_ratio_of_the_steps_rounded_up_or_a_number_of_steps():
    assert OptimizerSettings(warmup_ratio=0.05).warmup(1500) == 75
    assert OptimizerSettings(warmup_ratio=0.1).warmup(11) == 2
    assert OptimizerSettings(warmup_steps=200).warmup(1500) == 200 and OptimizerSettings(warmup_steps=0).warmup(9) == 0
