"""Muon: its rule written out, orthogonal steps, and the division of the work, which changes no step."""

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from helpers import noise, randomized, seeds, slow_except, small
from hypothesis import given
from hypothesis import strategies as st
from processes import Processes
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.flop_counter import FlopCounterMode

from mplug2 import distributed
from mplug2.config import large
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.objectives import Objectives
from mplug2.training.muon import assign_owners, orthogonalization_flops, orthogonalize
from mplug2.training.optim import OptimizerSettings, make_optimizer
from mplug2.training.parallel import ParallelSettings, wrap_model


@pytest.fixture(scope="module")
def processes():
    four = Processes(4)
    yield four
    assert four.close() == [0, 0, 0, 0]


# ---- the rule --------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 3), rows=st.integers(1, 12), columns=st.integers(1, 12), scale=st.floats(1e-3, 1e3), seed=seeds)
def test_orthogonalizing_keeps_singular_vectors_and_makes_singular_values_about_one(n, rows, columns, scale, seed):
    matrices = noise(n, rows, columns, seed=seed).float() * scale
    found = orthogonalize(matrices)
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    turned = left.mT @ found.double() @ right.mT  # diagonal if the singular vectors are the same
    large = values > 0.02 * values.norm(dim=1, keepdim=True)  # five steps do not raise tiny ones
    diagonal = turned.diagonal(dim1=1, dim2=2)
    assert (diagonal[large] > 0.5).all() and (diagonal[large] < 1.3).all()
    assert (turned - torch.diag_embed(diagonal)).abs().max() < 1e-2


def test_muon_equals_its_formula_and_adamw_for_the_rest():
    """Three steps: Nesterov momentum, orthogonalized, scaled to AdamW's size, with decoupled weight decay."""
    model, rng = randomized(MPLUG2(small(), "pretrain")).float(), torch.Generator().manual_seed(0)
    reference = copy.deepcopy(model)
    both = [make_optimizer(each, OptimizerSettings(name, lr=0.1, vision_lr=0.01, weight_decay=0.5)) for each, name in
            ((model, "muon"), (reference, "adamw"))]
    linear = [name + ".weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = {name: model.get_parameter(name).detach().clone() for name in linear}
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _ in range(3):
        for parameter, other in zip(model.parameters(), reference.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=rng)
            other.grad = parameter.grad.clone()
        for name in linear:
            gradient, lr = model.get_parameter(name).grad, 0.01 if name.startswith("vision_encoder") else 0.1
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradient
            step = orthogonalize((0.95 * momenta[name] + 0.05 * gradient)[None])[0]
            weights[name] = weights[name] * (1 - 0.5 * lr) - 0.2 * lr * max(gradient.shape) ** 0.5 * step
        for optimizer in both:
            optimizer.step()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters()):
        expected = weights[name] if name in weights else other
        torch.testing.assert_close(parameter.data, expected.data, msg=name, rtol=1e-4, atol=1e-5)


def test_muon_continues_from_its_saved_state():
    models = [randomized(MPLUG2(small(), "video_caption")).float() for _ in range(2)]
    first, second = (make_optimizer(model, OptimizerSettings(lr=0.1, weight_decay=0.5)) for model in models)

    def step(model, optimizer, seed):
        rng = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()

    step(models[0], first, 1)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second)):
        step(model, optimizer, 2)
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert one.equal(other)


# ---- the division of the work ----------------------------------------------------------------------------------------


def three_steps(rank: int, world: int, way: str) -> tuple[dict[str, np.ndarray], dict[str, int], int]:
    """Weights in float64 after three steps with random gradients; the second has gradients for some modules only. And
    the collectives and FLOPs of the last step."""
    model = randomized(MPLUG2(small(), "pretrain"))
    module = Objectives(model)
    process = distributed.DistInfo(rank, world, torch.device("cpu"), 2 if way == "hsdp" else None)
    wrap_model(module, process, ParallelSettings(parallel=way))
    optimizer = make_optimizer(model, OptimizerSettings("muon", lr=0.1, vision_lr=0.05, weight_decay=0.3))
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=rng, dtype=torch.double)
            skipped = seed == 1 and name.startswith(("vision_encoder", "decoder"))
            parameter.grad = None if skipped else distributed.shard_like(gradient, parameter)
        with CommDebugMode() as communication, FlopCounterMode(display=False) as flops:
            optimizer.step()
    calls = {str(call).split(".")[-1]: count for call, count in communication.get_comm_counts().items() if count}
    return ({name: distributed.full_tensor(p).numpy() for name, p in model.named_parameters()}, calls,
            flops.get_total_flops())


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def steps(processes, request) -> Callable:
    """What `three_steps` gives on each rank, computed once for each number of ranks."""
    return cache(lambda world: processes.run(three_steps, *((rank, world, request.param) for rank in range(world))))


@pytest.mark.parametrize("world", slow_except([3], [1, 2, 3]))
def test_dividing_the_work_changes_no_step(steps, world):
    """Rows that the ranks cannot share evenly, and matrices without gradients. Each rank orthogonalizes its share."""
    expected, _, all_flops = three_steps(0, 1, "ddp")
    found = steps(world)
    for weights, _, _ in found:
        for name, value in expected.items():
            np.testing.assert_allclose(weights[name], value, rtol=1e-9, atol=1e-11, err_msg=name)
    flops = [of_rank for _, _, of_rank in found]
    assert sum(flops) == all_flops and max(flops) < 1.1 * all_flops / world


@pytest.mark.slow
def test_with_hsdp_each_node_does_the_work(processes):
    """Two nodes of two: each divides all matrices, and sends nothing to the other. Both keep the same weights."""
    expected, _, all_flops = three_steps(0, 1, "ddp")
    found = processes.run(three_steps, *((rank, 4, "hsdp") for rank in range(4)))
    for weights, calls, _ in found:
        assert calls == {"alltoall_base_": 2}
        for name, value in expected.items():
            np.testing.assert_allclose(weights[name], value, rtol=1e-9, atol=1e-11, err_msg=name)
            assert weights[name].tobytes() == found[0][0][name].tobytes()
    flops = [of_rank for _, _, of_rank in found]
    assert flops[:2] == flops[2:] and sum(flops[:2]) == all_flops and max(flops) < 1.1 * all_flops / 2


def test_a_step_has_two_exchanges_with_fsdp2_and_one_with_ddp(steps, request):
    expected = {"fsdp": {"alltoall_base_": 2}, "ddp": {"_allgather_base_": 1}}[request.node.callspec.params["steps"]]
    assert [calls for _, calls, _ in steps(3)] == [expected] * 3


def test_owners_of_the_large_model_have_equal_work():
    """The busiest of 8 ranks has at most 1 % more than the mean, of 64 ranks at most 5 % more."""
    with torch.device("meta"):
        linear = [module for module in MPLUG2(large()).modules() if isinstance(module, nn.Linear)]
    shapes = tuple(tuple(module.weight.shape) for module in linear)
    flops = [orthogonalization_flops(*shape) for shape in shapes]
    assert sum(flops) / 1e12 == pytest.approx(22.9, abs=0.1)
    for ranks, excess in ((1, 1.0), (8, 1.01), (64, 1.05)):
        load = [0] * ranks
        for owner, count in zip(assign_owners(shapes, ranks), flops):
            load[owner] += count
        assert max(load) <= excess * sum(flops) / ranks


@pytest.mark.slow
def test_flops_are_those_of_the_products():
    for rows, columns in ((3, 7), (8, 8), (9, 2)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(1, rows, columns))
        assert counter.get_total_flops() == orthogonalization_flops(rows, columns)
