"""The optimizer: each parameter in one group, decay where it belongs, and the shape of the schedule."""

import pytest
import torch
from helpers import configs, randomised, seeds, small
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mplug2.local_temporal import TemporalConv
from mplug2.model import MPLUG2, TASKS
from mplug2.optim import make_optimizer, parameter_groups, schedule, set_rates

rates = st.sampled_from([1e-3, 2e-5])


@given(config=configs(), task=st.sampled_from([*TASKS]), lr=rates, vision_lr=rates, decay=st.sampled_from([0.0, 0.02]))
def test_each_parameter_is_in_one_group_with_its_rate_and_decay(config, task, lr, vision_lr, decay):
    model = MPLUG2(config, task)
    groups = parameter_groups(model, lr, vision_lr, decay)
    found = [(id(parameter), group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]]
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, TemporalConv))}
    expected = [
        (id(parameter), vision_lr if name.startswith("vision_encoder.") else lr, decay * (id(parameter) in matrices))
        for name, parameter in model.named_parameters()
    ]
    assert sorted(found) == sorted(expected)
    assert all(group["params"] and group["base_lr"] == group["lr"] for group in groups)
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)


def test_biases_norms_embeddings_positions_latents_and_temperature_do_not_decay():
    model = MPLUG2(small(), "pretrain")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {
        names[id(parameter)] for group in parameter_groups(model, 1e-3, 1e-3, 0.1) for parameter in group["params"]
        if group["weight_decay"] == 0
    }
    words = ("bias", "norm.weight", "embeddings.word.weight", "position", "position.weight", "token_type.weight",
             "latents", "class_token", "temperature")
    assert spared == {name for name in names.values() if name.endswith(words)}


def test_a_step_without_gradient_only_shrinks_what_decays():
    model = randomised(MPLUG2(small(), "pretrain"))
    optimizer = make_optimizer(model, lr=0.1, vision_lr=0.01, weight_decay=0.5, betas=(0.9, 0.98))
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.testing.assert_close(parameter.data, before[parameter] * (1 - group["lr"] * group["weight_decay"]))


@given(steps=st.integers(1, 200), warmup_share=st.floats(0, 1), floor=st.floats(0, 1))
def test_the_rate_rises_to_one_and_falls_to_the_floor(steps, warmup_share, floor):
    warmup = round(warmup_share * (steps - 1))
    shares = [schedule(step, steps, warmup, floor) for step in range(steps + 1)]
    rising, falling = shares[:warmup], shares[warmup:]
    assert rising == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert falling[0] == 1 and falling[-1] == pytest.approx(floor)
    assert all(later <= earlier for earlier, later in zip(falling, falling[1:]))
    assert falling == pytest.approx([1 + floor - share for share in reversed(falling)])  # half a cosine is symmetric
    assert schedule(steps + 10, steps, warmup, floor) == pytest.approx(floor)


def test_a_quarter_of_the_fall_is_that_of_a_cosine():
    assert schedule(25, 100, 0, 0.0) == pytest.approx((1 + 2**-0.5) / 2)
    assert schedule(75, 100, 0, 0.2) == pytest.approx(0.2 + 0.8 * (1 - 2**-0.5) / 2)


@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=3), seed=seeds)
def test_rates_are_shares_of_the_full_ones_however_often_they_are_set(shares, seed):
    optimizer = make_optimizer(MPLUG2(small(), "video_caption"), 1e-3, 1e-4, 0.02, (0.9, 0.98))
    full = [group["lr"] for group in optimizer.param_groups]
    for share in shares:
        set_rates(optimizer, share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate * share for rate in full])
