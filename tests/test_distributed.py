"""Distributed helpers: two ranks with half a batch each have the losses and gradients of one with the whole batch.

Two real processes, joined by gloo, serve the whole file. Each test sends them a function and the arguments of each.
"""

from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from batches import make_batch, make_model, rank_share, similarity_for
from helpers import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Processes

from mplug2 import distributed
from mplug2.distributed import (
    AllRanksError,
    DistInfo,
    all_gather_object,
    all_gather_vectors,
    all_gather_with_grad,
    all_reduce_sum,
    all_to_all,
    any_rank,
    choose_device,
    first_to_report,
    global_mean,
    init_distributed,
    run_on_main,
    shutdown,
    world_size,
)
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.objectives import Objectives


def test_an_error_that_every_rank_finds_is_printed_once(monkeypatch):
    """torchrun's store decides; it is there before the ranks have found each other."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}.items():
        monkeypatch.setenv(name, value)
    error = ValueError("no such file")
    assert first_to_report(error) and first_to_report(error)  # without torchrun, each process speaks for itself
    assert not first_to_report(AllRanksError("a full disk"))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert [first_to_report(error), first_to_report(error), first_to_report("another")] == [True, False, True]
    assert not first_to_report(AllRanksError("a full disk"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_report(error)
    monkeypatch.setenv("RANK", "0")
    assert first_to_report(AllRanksError("a full disk"))


@pytest.fixture(scope="module")
def pair():
    two = Processes(2)
    yield two
    assert two.close() == [0, 0]


def describe() -> tuple:
    dist_info = init_distributed("cpu")
    return dist_info.rank, dist_info.world_size, dist_info.is_main, str(dist_info.device)


def test_each_process_knows_its_rank(pair):
    assert pair.run(describe, (), (), joined=False) == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]


# ---- collectives -----------------------------------------------------------------------------------------------------


def primitives(x: list, weights: list) -> tuple:
    """Gather `x`, weight the result and sum it; then the other collectives."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    gathered = all_gather_with_grad(x)
    (gathered * torch.tensor(weights, dtype=torch.float64)).sum().backward()
    return gathered.tolist(), x.grad.tolist(), all_reduce_sum(x.sum()).item(), all_gather_object(weights), world_size()


def test_gather_concatenates_by_rank_and_sums_the_gradients_of_all_ranks(pair):
    x, weights = [[1.0, 2.0], [3.0, 4.0]], [[1.0, 10.0, 100.0, 1000.0], [5.0, 6.0, 7.0, 8.0]]
    found = pair.run(primitives, *zip(x, weights))
    for rank, (gathered, gradient, whole, collected, size) in enumerate(found):
        assert gathered == [1.0, 2.0, 3.0, 4.0] and whole == 10.0 and collected == weights and size == 2
        assert gradient == [weights[0][2 * rank + i] + weights[1][2 * rank + i] for i in range(2)]


def test_a_single_process_needs_no_group():
    assert primitives([1.0, 2.0], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0], 3.0, [[3.0, 4.0]], 1)
    distributed.barrier()  # returns at once
    assert describe() == (0, 1, True, "cpu")
    shutdown()


def test_a_missing_device_is_refused_with_advice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert init_distributed("auto").device == torch.device("cpu")
    with pytest.raises(ValueError, match="device cuda: this machine .* has no CUDA; use --device cpu"):
        init_distributed("cuda")
    with pytest.raises(ValueError, match="mps: this machine .* has no MPS; use --device cpu"):
        init_distributed("mps")
    for name in ("gpu", "meta", "cuda:x"):
        with pytest.raises(ValueError, match=f"device '{name}': expected auto, cpu, cuda, cuda:N or mps"):
            init_distributed(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device cuda:2: this machine has 2 GPUs, .* at most one process per GPU"):
        choose_device("cuda", local_rank=2)


def test_the_device_of_a_rank_is_the_gpu_of_its_number_on_its_machine(monkeypatch):
    """Its products of float32 matrices use TF32."""
    chosen, precisions = [], []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    for name, device in (("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert init_distributed(name).device == torch.device(device)
    assert chosen == [torch.device("cuda:1")] * 2 + [torch.device("cuda:0")]
    assert precisions == ["high"] * 3


def exchanges(rank: int) -> tuple:
    """Flags, errors of the main process, and vectors of unequal lengths; a sum must not change what is summed."""
    info, ran, raised = DistInfo(rank, 2, torch.device("cpu")), [], []
    run_on_main(lambda: ran.append(rank), info)

    def fail() -> None:
        raise OSError("no space left") if rank == 0 else AssertionError("not on the main process")

    try:
        run_on_main(fail, info)
    except AllRanksError as error:
        raised.append(str(error))
    x = torch.tensor([1.0 + rank])
    summed = all_reduce_sum(x)
    sent = [torch.full((1 + target + 2 * rank,), 10.0 * rank + target) for target in (0, 1)]  # 1 2 from 0, 3 4 from 1
    received = all_to_all(sent, [1 + rank, 3 + rank], dist.group.WORLD)
    gathered = all_gather_vectors(torch.full((1 + rank,), float(rank)), [1, 2])
    return (any_rank(rank == 0, rank == 1, False), ran, raised, x.item(), summed.item(),
            [part.tolist() for part in received], [part.tolist() for part in gathered])


def test_flags_errors_and_vectors_reach_all_ranks(pair):
    found = pair.run(exchanges, (0,), (1,))
    for rank, (flags, ran, raised, x, summed, received, gathered) in enumerate(found):
        assert flags == [True, True, False] and ran == [0] * (rank == 0) and raised == ["no space left"]
        assert (x, summed) == (1 + rank, 3)
        assert received == [[float(rank)] * (1 + rank), [10.0 + rank] * (3 + rank)]
        assert gathered == [[0.0], [1.0, 1.0]]
    assert any_rank(True, False) == [True, False]


def mean(values: list, valid: list) -> tuple[float, list]:
    values = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    found = global_mean(values, torch.tensor(valid))
    found.backward()
    return found.item(), values.grad.tolist()


halves = st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=3, max_size=3)


@settings(max_examples=20, deadline=None)
@given(halves, halves)
def test_the_average_over_the_ranks_is_the_mean_of_the_valid_values_of_all(pair, one, other):
    both = [[list(column) for column in zip(*half)] for half in (one, other)]
    valid = [value for value, is_valid in one + other if is_valid]
    shares, gradients = zip(*pair.run(mean, *both))
    assert sum(shares) / 2 == pytest.approx(sum(valid) / max(1, len(valid)), abs=1e-12)
    for half, gradient in zip((one, other), gradients):
        for (_, is_valid), found in zip(half, gradient):
            assert found / 2 == pytest.approx(is_valid / max(1, len(valid)))


# ---- the losses ------------------------------------------------------------------------------------------------------

LOSSES = ("vtc", "mlm", "caption", "answer")


def losses_and_gradients(batch: dict, rank: int, world: int) -> dict:
    """Each loss of this rank's part of the batch, and its gradient for each parameter."""
    model = make_model()
    losses, found = Objectives(model)(rank_share(batch, rank, world)), {}
    for name in LOSSES:
        if name in losses:
            gradients = torch.autograd.grad(losses[name], model.parameters(), retain_graph=True, allow_unused=True)
            found[name] = losses[name].item(), [g if g is None else g.numpy() for g in gradients]
    return found


@settings(max_examples=5, deadline=None)
@given(st.sampled_from(["video", "image", "text"]), st.sampled_from([2, 4, 6]), st.integers(1, 3), seeds)
def test_two_processes_have_the_losses_and_gradients_of_one_with_the_whole_batch(pair, kind, b, r, seed):
    """After averaging, as DistributedDataParallel does, for VTC, MLM, caption and answer loss and every parameter. The
    batch is random, with texts of unequal lengths and samples that share a positive_id. VTM is left out: each rank
    draws its hard negatives from its own samples, which is a different loss (see the test below)."""
    batch = make_batch(kind, b, r, seed)
    batch["positive_id"] = torch.randint(0, b, (b,), generator=torch.Generator().manual_seed(seed))
    names = [name for name, _ in make_model().named_parameters()]
    whole = losses_and_gradients(batch, 0, 1)
    parts = pair.run(losses_and_gradients, (batch, 0, 2), (batch, 1, 2))
    assert set(whole) == set(parts[0]) == set(parts[1]) == ({"mlm"} if kind == "text" else set(LOSSES))
    for loss, (value, gradients) in whole.items():
        assert sum(part[loss][0] for part in parts) / 2 == pytest.approx(value, rel=1e-9), loss
        for name, expected, *found in zip(names, gradients, *(part[loss][1] for part in parts), strict=True):
            assert all((half is None) == (expected is None) for half in found), (loss, name)
            if expected is not None:
                np.testing.assert_allclose(
                    (found[0] + found[1]) / 2, expected, rtol=1e-7, atol=1e-10, err_msg=f"{loss}, {name}"
                )
    if kind != "text":
        assert whole["vtc"][1][names.index("temperature")] != 0


def distilled(batches: list[dict], rank: int, world: int) -> tuple[list, list, list]:
    """Losses and gradients of the second of two batches, with the first in the queue; and the queue."""
    model = make_model()
    ema_teacher = EMATeacher(model, alpha=0.4, queue=6).double()
    ema_teacher.teacher = make_model(seed=1)
    ema_teacher.steps += 1
    objectives = Objectives(model, ema_teacher).train()
    objectives(rank_share(batches[0], rank, world))
    objectives.after_step(skipped=False)
    losses = objectives(rank_share(batches[1], rank, world))
    (losses["vtc"] + losses["answer"]).backward()
    objectives.after_step(skipped=False)
    gradients = [p.grad.numpy() if p.grad is not None else None for p in model.parameters()]
    return [losses["vtc"].item(), losses["answer"].item()], gradients, [part.tolist() for part in ema_teacher.queue()]


def test_distillation_and_the_queue_agree_with_one_process(pair):
    batches = [make_batch("image", b=4, seed=seed) for seed in (0, 1)]
    batches[1]["positive_id"] = torch.tensor([0, 4, 5, 1])  # two of the second batch are in the queue already
    losses, gradients, queue = distilled(batches, 0, 1)
    one, other = pair.run(distilled, (batches, 0, 2), (batches, 1, 2))
    np.testing.assert_allclose((np.array(one[0]) + other[0]) / 2, losses, rtol=1e-9)
    for expected, first, second in zip(gradients, one[1], other[1], strict=True):
        assert (expected is None) == (first is None) == (second is None)
        if expected is not None:
            np.testing.assert_allclose((first + second) / 2, expected, rtol=1e-7, atol=1e-10)
    for expected, first, second in zip(queue, one[2], other[2], strict=True):
        np.testing.assert_allclose(first, expected, rtol=1e-9)
        np.testing.assert_allclose(second, expected, rtol=1e-9)
    assert queue[2] == [5, 1, 2, 3, 0, 4]


def matching(batch: dict, rank: int, world: int, partner: list[int]) -> tuple[float, list]:
    """VTM, where each sample of this rank draws the given one as its negative."""
    torch.manual_seed(0)
    model, part = make_model(), rank_share(batch, rank, world)
    with patch("mplug2.objectives.objectives.scaled_similarity", return_value=similarity_for(partner)):
        loss = Objectives(model, skip=frozenset({"vtc", "mlm", "caption", "answer"}))(part)["vtm"]
    loss.backward()
    gradients = [p.grad.numpy() if p.grad is not None else None for p in model.parameters()]
    return loss.item(), gradients


def test_the_matching_loss_agrees_where_the_negatives_are_the_same(pair):
    """Each rank draws from its own samples, so this holds only for a draw that stays within the halves."""
    batch = make_batch("video", b=4)
    batch["positive_id"] = torch.tensor([0, 1, 0, 0])  # no negatives within the second half
    value, _ = matching(batch, 0, 1, [1, 0, 1, 1])
    # One process finds a negative for the last two samples in the other half. Two ranks cannot.
    split = pair.run(matching, (batch, 0, 2, [1, 0]), (batch, 1, 2, [1, 0]))
    assert sum(part[0] for part in split) / 2 != pytest.approx(value, rel=1e-3)

    batch["positive_id"] = torch.arange(4)
    value, gradients = matching(batch, 0, 1, [1, 0, 3, 2])
    split = pair.run(matching, (batch, 0, 2, [1, 0]), (batch, 1, 2, [1, 0]))
    assert sum(part[0] for part in split) / 2 == pytest.approx(value, rel=1e-9)
    for expected, one, other in zip(gradients, split[0][1], split[1][1]):
        assert (expected is None) == (one is None)
        if expected is not None:
            np.testing.assert_allclose((one + other) / 2, expected, rtol=1e-7, atol=1e-10)
