"""DDP and FSDP2 on two and three ranks, and HSDP on two nodes of two, equal one process with the whole batch, and a
resumed run an uninterrupted one.

Four real processes serve the whole file.
"""

import contextlib
import io
import json
import math
import os
import pickle
import queue
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from batches import make_batch, make_model, rank_share, task_batch
from data_helpers import write_data
from helpers import randomized, small
from processes import Processes
from runs import SMALL, lines
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor, Replicate, Shard

import mplug2
import train
from mplug2 import distributed
from mplug2.checkpoint import CheckpointError, write_manifest
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives import objectives
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.objectives import Objectives
from mplug2.training import run_checkpoint
from mplug2.training.optim import OptimizerSettings, make_optimizer
from mplug2.training.parallel import (
    ParallelSettings,
    all_reduce_replicated_grads,
    checkpoint_activations,
    clip_grad_norm,
    gathered,
    load_optimizer_state,
    no_sync,
    unsharded_copy,
    wrap_model,
)
from mplug2.training.run_checkpoint import load_training
from mplug2.training.sharded_state import ShardReader, _HashingFileSystem, read_shards
from mplug2.training.state import TrainState

LOSSES = ("vtc", "vtm", "mlm", "caption", "answer")


@pytest.fixture(scope="module")
def processes():
    four = Processes(4)
    yield four
    assert four.close() == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


# ---- gradients -------------------------------------------------------------------------------------------------------


def fixed_negatives(similarity: torch.Tensor, _) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for drawn hard negatives: samples 0 and 1 are negatives of each other, 2 and 3, ..., on any rank."""
    return torch.arange(len(similarity)) ^ 1, torch.ones(len(similarity), dtype=torch.bool)


def gradients(parallel: torch.nn.Module, batches: list[dict], loss: str) -> tuple[float, dict[str, np.ndarray]]:
    """One loss, averaged over micro-batches and ranks, and its gradient for every parameter."""
    value = 0.0
    for number, batch in enumerate(batches):
        with no_sync(parallel, last=number == len(batches) - 1):
            losses = parallel(batch)
            sum(part * (name == loss) for name, part in losses.items()).div(len(batches)).backward()
            value += distributed.all_reduce_sum(losses[loss]).item() / distributed.world_size() / len(batches)
    all_reduce_replicated_grads(parallel)
    found = {}
    for name, parameter in parallel.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found[name.removeprefix("module.")] = distributed.full_tensor(
            gradient).numpy().copy()  # DDP writes into it again
    parallel.zero_grad()
    return value, found


def info(rank: int, world: int) -> distributed.DistInfo:
    """Four ranks are two nodes of two."""
    return distributed.DistInfo(rank, world, torch.device("cpu"), 2 if world == 4 else None)


def whole_batches(kind: str, world: int) -> list[dict]:
    """Two samples for each rank, or four for one of two."""
    batches = [make_batch(kind, max(4, 2 * world), 2, seed) for seed in (1, 2)]
    for batch in batches:
        batch["positive_id"] = torch.tensor([5, 6, 5, 7, 8, 8, 9, 6])[: len(batch["positive_id"])]
    return batches


def shared_gradients(kind: str, rank: int, world: int) -> dict:
    """Of each loss, by DDP and by FSDP2, or on four ranks by HSDP; of two micro-batches, and by DDP also of a single
    batch."""
    process, found, whole = info(rank, world), {}, whole_batches(kind, world)
    with patch.object(objectives, "hard_negatives", fixed_negatives):
        for way in ("ddp", "fsdp") if world < 4 else ("hsdp",):
            parallel = wrap_model(Objectives(make_model()), process, ParallelSettings(parallel=way))
            for loss in LOSSES if kind != "text" else ("mlm",):
                for count in (1, 2) if way == "ddp" else (2,):
                    shares = [rank_share(batch, rank, world) for batch in whole[:count]]
                    found[way, loss, count] = gradients(parallel, shares, loss)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("kind", ["video", "text"])
def test_losses_and_gradients_of_several_processes_are_those_of_one(processes, world, kind):
    """Every objective, every parameter, in double precision; texts of unequal lengths, so that each process has another
    number of valid tokens; also without any exchange before the last of two micro-batches."""
    found = processes.run(shared_gradients, *((kind, rank, world) for rank in range(world)))
    whole = whole_batches(kind, world)
    alone = Objectives(make_model())
    with patch.object(objectives, "hard_negatives", fixed_negatives):
        expected = {(loss, count): gradients(alone, whole[:count], loss)
                    for loss in (LOSSES if kind != "text" else ("mlm",)) for count in (1, 2)}
    for rank in range(world):
        for (way, loss, count), (value, grads) in found[rank].items():
            assert value == pytest.approx(expected[loss, count][0], rel=1e-9), (way, loss, count)
            for name, gradient in expected[loss, count][1].items():
                np.testing.assert_allclose(
                    grads[name], gradient, rtol=1e-7, atol=1e-10, err_msg=f"{way}, {loss}, {count}, {name}"
                )


HEADS = {"text_classification": ("label",), "video_classification": ("label",), "image_pair_reasoning": ("label",),
         "number": ("label",), "grounding": ("l1", "giou"), "video_retrieval": ("vtc", "vtm")}
"""Losses of tasks other than pre-training; "number" is a regression head."""


def task_gradients(b: int, rank: int, world: int) -> dict:
    """Of each of these losses for a batch of b, by DDP and by FSDP2."""
    process, found = distributed.DistInfo(rank, world, torch.device("cpu")), {}
    for name, heads in HEADS.items():
        task = "text_pair_classification" if name == "number" else name
        batch = task_batch(task, b=b)
        if name == "number":
            batch["label"] = batch["label"].double()
        batch = {key: value.chunk(world)[rank] if torch.is_tensor(value) else value for key, value in batch.items()}
        for way in ("ddp", "fsdp") if world > 1 else ("alone",):
            model = randomized(MPLUG2(small(), task, {} if name == "number" else {task: ("a", "b", "c")}))
            settings = ParallelSettings(parallel="fsdp" if way == "fsdp" else "ddp")
            parallel = wrap_model(Objectives(model), process, settings)
            with patch.object(objectives, "hard_negatives", fixed_negatives):
                for loss in heads:
                    found[name, loss, way] = gradients(parallel, [batch], loss)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_losses_and_gradients_of_other_tasks_are_those_of_one_process(processes, world):
    """Classes from text, from vision, from pairs of images; numbers; boxes; and retrieval."""
    expected = task_gradients(2 * world, 0, 1)
    for found in processes.run(task_gradients, *((2 * world, rank, world) for rank in range(world))):
        assert len(found) == 2 * len(expected) == 16
        for (name, loss, way), (value, grads) in found.items():
            wanted, wanted_grads = expected[name, loss, "alone"]
            assert value == pytest.approx(wanted, rel=1e-9) and value > 0, (name, loss, way)
            for parameter, gradient in wanted_grads.items():
                np.testing.assert_allclose(
                    grads[parameter], gradient, rtol=1e-7, atol=1e-10, err_msg=f"{name}, {loss}, {way}, {parameter}"
                )


def exchanges(rank: int, world: int, way: str) -> list[bool]:
    """After each of two micro-batches: have the processes exchanged their gradients?"""
    parallel, found = wrap_model(Objectives(make_model()), info(rank, world), ParallelSettings(parallel=way)), []
    for last in (False, True):
        with no_sync(parallel, last):
            parallel(rank_share(make_batch("text", 2 * world, 2, 1), rank, world))["mlm"].backward()
        there = [distributed.full_tensor(p.grad) for p in parallel.parameters() if p.dim() and p.grad is not None]
        sums = distributed.all_gather_object(float(sum(gradient.abs().sum() for gradient in there)))
        found.append(sums[0] > 0 and len(set(sums)) == 1)
    return found


@pytest.mark.parametrize(("way", "world"), [
    ("ddp", 2), ("fsdp", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow)])
def test_only_the_last_micro_batch_exchanges_gradients(processes, way, world):
    assert processes.run(exchanges, *((rank, world, way) for rank in range(world))) == [[False, True]] * world


def refused_nodes(rank: int) -> str:
    with pytest.raises(ValueError) as refused:
        process = distributed.DistInfo(rank, 3, torch.device("cpu"), 2 if rank < 2 else 1)
        wrap_model(Objectives(make_model()), process, ParallelSettings(parallel="hsdp"))
    return str(refused.value)


def test_hsdp_needs_the_same_number_of_ranks_on_each_node(processes):
    for said in processes.run(refused_nodes, (0,), (1,), (2,)):
        assert said.startswith("parallel=hsdp: the nodes have different numbers of processes, {1, 2}; start the same")


def whole_state(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's state by parameter name, in one piece. Every rank has to call it."""
    return {name: gathered(optimizer.state[parameter], keep=True)
            for name, parameter in module.named_parameters() if parameter in optimizer.state}


def clipped(rank: int, world: int, way: str, name: str) -> tuple[float, list[np.ndarray], dict, bool]:
    """Three steps with clipping; the last norm, the weights in one piece, and the optimizer's state there and back."""
    module = Objectives(make_model())
    settings = ParallelSettings(parallel="fsdp" if way == "offload" else way, cpu_offload=way == "offload")
    parallel = wrap_model(module, info(rank, world), settings)
    if way == "hsdp":
        assert {(*p.placements, p.device_mesh.shape) for p in module.parameters() if p.dim()} == {
            (Replicate(), Shard(0), (2, 2))}
        (mesh,) = {p.device_mesh for p in module.parameters() if p.dim()}
        for group in mesh.get_all_groups():  # of NCCL they would end a run after 10 minutes without a collective
            assert group._get_backend(torch.device("cpu")).options._timeout == distributed.NO_TIMEOUT
    parameters = list(module.parameters())
    optimizer = make_optimizer(module.model, OptimizerSettings(name, lr=0.01, vision_lr=0.02, weight_decay=0.1))
    for seed in range(3):
        batch = rank_share(make_batch("image", 24, 2, seed), rank, world)
        with patch.object(objectives, "hard_negatives", fixed_negatives):
            sum(parallel(batch).values()).backward()
        all_reduce_replicated_grads(parallel)
        norm = clip_grad_norm(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    state = whole_state(optimizer, module)
    optimizer.state.clear()
    load_optimizer_state(optimizer, module, state)
    again = whole_state(optimizer, module)
    same = all(again[name][key].equal(value) for name in state for key, value in state[name].items())
    weights = [distributed.full_tensor(parameter).numpy() for parameter in parameters]
    one = unsharded_copy(module.model)
    if rank == 0:
        assert all(p.detach().numpy().tobytes() == w.tobytes() for p, w in zip(one.parameters(), weights))
    return norm.item(), weights, {name: list(value.values())[-1].numpy() for name, value in state.items()}, same


@pytest.mark.parametrize("limit, factor", [(0.0, 1.0), (5.0, 1.0), (2.5, 0.5)])
def test_gradients_are_scaled_down_to_the_limit_and_0_is_no_limit(limit, factor):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm([parameter], limit).item() == 5
    assert parameter.grad.tolist() == pytest.approx([3 * factor, 4 * factor])


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    model, batch, kept = make_model(), make_batch("image"), []
    for number in range(2):
        kept.append(0)

        def keep(tensor: torch.Tensor, number: int = number) -> torch.Tensor:
            kept[number] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Objectives(model.train())(batch)
        checkpoint_activations(model)
    assert kept[1] < 0.6 * kept[0]


class Products(torch.nn.Module):
    """Its gradients are its input, for a vector that FSDP2 shards and for a scalar that every rank keeps."""

    def __init__(self):
        super().__init__()
        self.vector, self.scalar = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4,), ()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.vector * x).sum() + self.scalar * x


def mean_and_clipped(rank: int) -> list[tuple[list[float], float]]:
    """The gradients of two ranks after their mean, and after limits above and below their norm."""
    settings = ParallelSettings(parallel="fsdp", precision="bfloat16")
    module = wrap_model(Products(), distributed.DistInfo(rank, 2, torch.device("cpu")), settings)
    module(torch.tensor((1.0, 2.0**-10)[rank])).backward()
    all_reduce_replicated_grads(module)
    found = []
    for limit in (math.inf, 100.0, 0.0, 0.5):
        clip_grad_norm([module.vector, module.scalar], limit)
        found.append((module.vector.grad.full_tensor().tolist(), module.scalar.grad.item()))
    return found


def test_sharded_gradients_are_averaged_in_float32_and_only_scaled_down(processes):
    """In bfloat16 the sum of 1 and 2^-10 would be 1. The norm of five equal gradients of (1 + 2^-10) / 2 is above 0.5.
    """
    mean = (1 + 2**-10) / 2
    for found in processes.run(mean_and_clipped, (0,), (1,)):
        for vector, scalar in found[:3]:
            assert vector == [mean] * 4 and scalar == mean
        assert found[3][0] == pytest.approx([0.5 / 5**0.5] * 4, rel=1e-5)
        assert found[3][1] == pytest.approx(0.5 / 5**0.5, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_clipped_updates_of_sharded_models_are_those_of_one_process(processes, name):
    expected = clipped(0, 1, "ddp", name)
    assert expected[0] > 0.5
    for way, world in (("ddp", 3), ("fsdp", 3), ("offload", 3), ("hsdp", 4)):
        for norm, weights, moments, same in processes.run(
                clipped, *((rank, world, way, name) for rank in range(world))):
            assert norm == pytest.approx(expected[0], rel=1e-9) and same
            for found, value in zip(weights, expected[1], strict=True):
                np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-6)  # Muon's steps are float32
            assert moments.keys() == expected[2].keys()
            for parameter, value in expected[2].items():
                np.testing.assert_allclose(moments[parameter], value, rtol=1e-4, atol=1e-6, err_msg=parameter)


def seen_batch(rank: int) -> tuple[dict[str, bool], bool]:
    """Which tensors of a batch reach the losses of a sharded bfloat16 model unchanged; and are all gradients finite?"""
    model = randomized(MPLUG2(small(), "grounding")).float()
    objectives, seen, forward = Objectives(model), {}, Objectives.forward
    settings = ParallelSettings(parallel="fsdp", precision="bfloat16")
    parallel = wrap_model(objectives, distributed.DistInfo(rank, 2, torch.device("cpu")), settings)
    batch = {name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
             for name, value in task_batch("grounding", b=2).items()} | {"year": torch.tensor([1987.0, 0.123456])}

    def watched_forward(self, batch: dict) -> dict:
        seen.update({name: value for name, value in batch.items() if torch.is_tensor(value)})
        return forward(self, batch)

    with patch.object(Objectives, "forward", watched_forward), torch.autocast("cpu", torch.bfloat16):
        losses = parallel(batch)
    sum(losses.values()).backward()
    equal = {name: value.dtype == batch[name].dtype and value.equal(batch[name]) for name, value in seen.items()}
    return equal, all(p.grad.full_tensor().isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_sharded_bfloat16_model_does_not_round_labels_and_boxes(processes):
    """1987 would become 1984."""
    for equal, finite in processes.run(seen_batch, (0,), (1,)):
        assert {"box", "year", "pixels"} <= set(equal) and all(equal.values()), equal
        assert finite


def one_sided(rank: int) -> tuple:
    process = distributed.DistInfo(rank, 2, torch.device("cpu"))

    def fail() -> None:
        raise OSError("disk full")

    try:
        distributed.run_on_main(fail, process)
    except distributed.AllRanksError as error:
        return distributed.any_rank(rank == 1, False), str(error)


def train_with_broken_step(rank: int, arguments: list[str], where: str) -> str:
    """Train with infinite losses, or NaN in the activations of the encoders, in the second step on rank 1. Returns what
    this rank printed."""
    forward, count = Objectives.forward, iter(range(1000))

    def broken_forward(self, batch: dict) -> dict:
        bad = next(count) == rank == 1
        if where == "losses":
            return {name: loss * float("inf") if bad else loss for name, loss in forward(self, batch).items()}
        encoders = self.model.vision_encoder.blocks[0], self.model.text_encoder
        hooks = [one.register_forward_hook(lambda _, inputs, found: found * float("nan")) for one in encoders if bad]
        try:
            return forward(self, batch)
        finally:
            for hook in hooks:
                hook.remove()

    printed = io.StringIO()
    with patch.object(Objectives, "forward", broken_forward), contextlib.redirect_stderr(printed):
        train.main(arguments)
    return printed.getvalue()


@pytest.mark.parametrize("where", ["losses", "activations"])
def test_all_ranks_skip_a_step_that_is_not_finite_on_one_and_its_samples_are_named(processes, data, tmp_path, where):
    """Only rank 0 prints, and has the progress bar. NaN in activations also reaches the draw of hard negatives."""
    arguments = [*SMALL, "--data", str(data), "--out", str(tmp_path), "--max-steps", "3"]
    printed, other = processes.run(
        train_with_broken_step, (0, arguments, where), (1, arguments, where), joined=False)
    (line,) = [line for line in printed.splitlines() if "step 1 is not finite" in line]
    # VTC compares with the vectors of all ranks, so NaN in those of one rank makes the loss of every rank NaN.
    assert line.count(".jsonl:") == {"losses": 3, "activations": 6}[where] and "3/3" in printed
    assert "finite" not in other and "step/s" not in other  # torch may have printed warnings
    assert [line["nonfinite_steps"] for line in lines(tmp_path / "tiny")] == [0, 1, 1]


def train_until_signal(rank: int, arguments: list[str], step: int, number: signal.Signals) -> dict:
    """Train, and send this process a signal in step `step` (0: never). Returns what train.py returns."""
    backward = train.Trainer.backward

    def signaled_backward(self, batches):
        found = backward(self, batches)
        if self.state.step + 1 == step:
            os.kill(os.getpid(), number)
        return found

    with patch.object(train.Trainer, "backward", signaled_backward):
        return train.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_can_save_and_stop_around_the_first_line_of_metrics(processes, data, tmp_path, world):
    """Metrics have a line every 20 steps. The signal reaches the last rank only; every rank saves and ends normally."""
    arguments = [*SMALL, "--log-every", "20", "--data", str(data), "--out", str(tmp_path), "--max-steps", "22"]

    def run(*more: str, step: int = 0, number: signal.Signals = signal.SIGINT) -> None:
        given = [(rank, [*arguments, *more], step if rank == world - 1 else 0, number) for rank in range(world)]
        if world == 1:
            assert train_until_signal(*given[0]) == {}
        else:
            assert processes.run(train_until_signal, *given, joined=False) == [{}] * world

    run("--name", "saves", "--save-every", "1", "--keep-checkpoints", "30")
    for step, number in zip((1, 2, 19, 20, 21), (signal.SIGINT, signal.SIGTERM) * 3):
        assert load_training(tmp_path / "saves" / f"step_{step:07d}")["step"] == step
        run("--name", f"stops{step}", step=step, number=number)
        folder = tmp_path / f"stops{step}"
        assert load_training(folder / "last")["step"] == step
        written = lines(folder) if (folder / "metrics.jsonl").exists() else []
        assert [line["step"] for line in written] == [20] * (step >= 20) and (folder / "curves.png").exists()
        run("--name", f"stops{step}", "--resume")
        assert load_training(folder / "last")["step"] == 22 and [line["step"] for line in lines(folder)] == [20, 22]


def train_by_the_clock(arguments: list[str], seconds: float) -> dict:
    """Train, while each step takes `seconds` by the clock of this process."""
    now, backward = [0.0], train.Trainer.backward

    def timed_backward(self, batches):
        now[0] += seconds
        return backward(self, batches)

    with patch.object(train.Trainer, "backward", timed_backward), patch.object(
            run_checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0])):
        return train.main(arguments)


@pytest.mark.parametrize("clocks", [(25, 100), (25, 0)])
def test_the_clock_of_the_main_process_decides_when_all_ranks_save(processes, data, tmp_path, clocks):
    """With its steps of 25 seconds a minute is over after three. By its own, rank 1 would save always or never."""
    arguments = [*SMALL, "--data", str(data), "--out", str(tmp_path),
                 *"--save-every 1min --keep-checkpoints 9 --max-steps 7".split()]
    processes.run(train_by_the_clock, *[(arguments, seconds) for seconds in clocks], joined=False)
    assert sorted(path.name for path in (tmp_path / "tiny").glob("step_*")) == [
        "step_0000003", "step_0000006", "step_0000007"]


def test_flags_and_errors_of_one_rank_reach_all(processes):
    assert processes.run(one_sided, (0,), (1,)) == [([True, False], "disk full")] * 2
    assert distributed.any_rank(True, False) == [True, False]


# ---- resume ----------------------------------------------------------------------------------------------------------


def load_whole(folder: Path) -> dict:
    """The state of a run with all its tensors in one piece, sharded or not."""
    saved = load_training(folder)
    return {**saved, **read_shards(saved["shards"], {})} if "shards" in saved else saved


def train_together(processes: Processes, world: int, arguments: list[str]) -> None:
    """train.py on `world` ranks; a single rank is this process, which can have workers."""
    found = processes.run(train.main, *[(arguments,)] * world, joined=False) if world > 1 else [train.main(arguments)]
    assert found == [{}] * world  # there is nothing to evaluate


def copy_until(whole: Path, out: Path, step: int) -> None:
    """Copy a run as it was when it was killed some steps after the checkpoint of `step`."""
    shutil.copytree(whole, out, symlinks=True)
    for checkpoint in out.glob("step_*"):
        if checkpoint.name > f"step_{step:07d}":
            shutil.rmtree(checkpoint)
    (out / "last").unlink()
    (out / "last").symlink_to(f"step_{step:07d}")


def weights_at_the_start(arguments: list[str]) -> tuple[set[str], dict[str, np.ndarray]]:
    """The devices that the model of a run is built on, and all weights and buffers before the first step."""
    devices, found, build = set(), {}, train.build_objectives

    def watched_build(model, *others) -> Objectives:
        devices.update(parameter.device.type for parameter in model.parameters())
        return build(model, *others)

    def look(self) -> dict:
        found.update({name: value.numpy() for name, value in gathered(self.objectives.state_dict(), keep=True).items()})
        return {}

    with patch.object(train.Trainer, "train", look), patch.object(train, "build_objectives", watched_build):
        train.main(arguments)
    return devices, found


def start_refused(arguments: list[str]) -> str:
    """What a run prints that cannot start."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit):
        train.main(arguments)
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--cpu-offload", "--init START --reinit decoder"])
def test_only_the_main_process_has_the_weights_of_a_sharded_model(processes, data, tmp_path, more):
    """The others get their shards from it. They are the ones of a run of one process, to the bit, with a teacher."""
    arguments = [*SMALL, *f"--data {data} --batch-size 12 --distill-weight 0.4 --queue-size 12 --name run".split()]
    start = tmp_path / "start" / "run" / "last"
    if "START" in more:
        train.main([*arguments, *f"--max-steps 1 --out {tmp_path / 'start'}".split()])
    more = more.replace("START", str(start)).split()
    alone = [word for word in more if word != "--cpu-offload"]
    devices, expected = weights_at_the_start([*arguments, *alone, "--out", str(tmp_path / "one")])
    assert devices == {"cpu"} and len(expected) > 50
    for way, world in (("fsdp", 3), ("hsdp", 4)):
        given = [*arguments, *more, "--parallel", way, "--out", str(tmp_path / way)]
        found = processes.run(weights_at_the_start, *[(given,)] * world, joined=False)
        assert [devices for devices, _ in found] == [{"cpu"}] + [{"meta"}] * (world - 1)
        for _, weights in found:
            assert {name: value.tobytes() for name, value in weights.items()} == {
                name: value.tobytes() for name, value in expected.items()}
    if "--init" in more:
        (start / "model.safetensors").write_bytes(b"damaged")
        first, *others = processes.run(start_refused, *[(given,)] * 4, joined=False)
        assert "model.safetensors has 7 bytes, but its manifest says" in first and others == [""] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("way", "world", "workers"), [("ddp", 2, 0), ("fsdp", 3, 0), ("hsdp", 4, 0), ("ddp", 1, 1)])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(processes, data, tmp_path, way, world, workers):
    """Weights, optimizer, generators and losses, with dropout and drawn hard negatives. Sharded runs have bfloat16,
    activation checkpointing, an EMA teacher and a queue, and one of them micro-batches."""
    arguments = [*SMALL, *f"--data {data} --max-steps 5 --save-every 2 --keep-checkpoints 9 --dropout 0.2".split(),
                 "--parallel", way, "--batch-size", "8" if world == 4 else "6",
                 *f"--accumulation-steps {2 if world == 3 else 1} --workers {workers}".split(),
                 *f"--precision {'float32' if way == 'ddp' else 'bfloat16'}".split()]
    if way != "ddp":
        arguments += "--activation-checkpointing --distill-weight 0.4 --queue-size 12".split()
    train_together(processes, world, [*arguments, "--out", str(tmp_path / "whole")])
    whole, resumed = tmp_path / "whole" / "tiny", tmp_path / "resumed" / "tiny"
    copy_until(whole, resumed, 2)
    train_together(processes, world, ["--resume", "--out", str(tmp_path / "resumed")])

    expected, found = (load_file(folder / "last" / "model.safetensors") for folder in (whole, resumed))
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    shards = sorted(path.name for path in (whole / "last").iterdir() if path.suffix != ".json")
    state = [".metadata", *(f"__{rank}_0.distcp" for rank in range(world))] if way != "ddp" else []
    assert shards == [*state, "model.safetensors", "training.pt"]
    assert ("optimizer" in torch.load(whole / "last" / "training.pt")) == (way == "ddp")
    expected, found = load_whole(whole / "last"), load_whole(resumed / "last")
    assert found["step"] == 5 and len(found["generators"]) == world
    for old, new in zip(expected["generators"], found["generators"]):
        assert old["torch"].equal(new["torch"]) and old["python"] == new["python"]
        assert old["numpy"][1].equal(new["numpy"][1])
    assert all(value.equal(found["objectives"][name]) for name, value in expected["objectives"].items())
    assert len(expected["objectives"]) > 50 or way == "ddp"
    for name, state in expected["optimizer"].items():
        assert all(value.equal(found["optimizer"][name][key]) for key, value in state.items()), name
    steps = [[line["loss"] for line in lines(folder)] for folder in (whole, resumed)]
    assert steps[0] == steps[1] and len(steps[0]) == 5


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_ranks_and_another_parallelism(processes, data, tmp_path):
    """From two ranks with a sharded model to one rank, to three, and to two nodes of two; from one rank to two with a
    sharded model. The gradients stay the same. The matching loss is left out: each rank draws its own negatives."""
    arguments = [*SMALL, *f"--data {data} --max-steps 6 --save-every 3 --keep-checkpoints 9 --vtm-weight 0".split()]
    arguments += "--dropout 0 --lr 1e-3 --batch-size 12".split()
    train_together(processes, 2, [*arguments, "--parallel", "fsdp", "--out", str(tmp_path / "two")])
    model = mplug2.load(tmp_path / "two" / "tiny" / "last")  # what eval.py reads
    assert model.model.task == "pretrain"
    expected = [line["grad_norm"] for line in lines(tmp_path / "two" / "tiny")]
    train_together(processes, 1, [*arguments, "--out", str(tmp_path / "one")])
    for start, world, way in (("two", 1, "ddp"), ("two", 3, "fsdp"), ("two", 4, "hsdp"), ("one", 2, "fsdp")):
        copy_until(tmp_path / start / "tiny", tmp_path / str(world) / "tiny", 3)
        train_together(processes, world, ["--resume", "--parallel", way, "--out", str(tmp_path / str(world))])
        found = lines(tmp_path / str(world) / "tiny")
        assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose([line["grad_norm"] for line in found], expected, rtol=2e-3)


def local_bytes(state: TrainState) -> dict[str, bytes]:
    """What this rank has of the optimizer's state and of the EMA teacher."""
    tensors = {f"objectives/{name}": tensor for name, tensor in state.objectives.state_dict().items()}
    for name, parameter in state.objectives.model.named_parameters():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in state.optimizer.state[parameter].items()}
    return {name: getattr(tensor, "_local_tensor", tensor).numpy().tobytes() for name, tensor in tensors.items()}


def shards_there_and_back(rank: int, world: int, way: str, folder: Path) -> tuple[list[str], set[str]]:
    """Write a state after one step and load it into another one. Returns the files that were opened, and those from
    which sharded tensors were read."""
    def make_state() -> TrainState:
        model = make_model()
        model.load_state_dict({name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()})
        module = Objectives(model, EMATeacher(model))
        wrap_model(module, info(rank, world), ParallelSettings(
            parallel="fsdp" if way == "offload" else way, cpu_offload=way == "offload"))
        data = SimpleNamespace(seed=5, files=dict, state_dict=dict, load_state_dict=lambda *_: None)
        return TrainState(module, make_optimizer(model, OptimizerSettings("adamw")), data, info(rank, world))

    torch.manual_seed(1)
    old = make_state()
    for parameter in old.objectives.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    old.optimizer.step()
    old.write_shards()(folder)
    saved = {**old.state_dict(), "shards": ShardReader(folder)}
    new, opened, sources = make_state(), [], set()
    create, read = FileSystem.create_stream, ShardReader.read_data
    templates = dict(new.objectives.model.named_parameters())

    def watched_open(self, path: Path, mode: str):
        opened.append(path.name)
        return create(self, path, mode)

    def watched_read(self, plan, planner):
        sharded = [item.storage_index for item in plan.items if isinstance(planner.state_dict[item.dest_index.fqn],
                                                                           DTensor)]
        assert len(sharded) > 2 * len(templates) - 10
        sources.update(self.storage_data[index].relative_path for index in sharded)
        return read(self, plan, planner)

    with patch.object(FileSystem, "create_stream", watched_open), patch.object(ShardReader, "read_data", watched_read):
        new.load_state_dict(saved)
    found, expected = local_bytes(new), local_bytes(old)
    differ = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
    assert {name for name in differ if not name.startswith("objectives/model.")} == set()  # weights are not in shards
    assert all(distributed.shard_like(parameter, parameter) is parameter for parameter in templates.values())

    whole, expected = read_shards(saved["shards"], {}), whole_state(old.optimizer, old.objectives.model)
    assert whole["optimizer"].keys() == expected.keys()
    assert all(value.equal(whole["optimizer"][name][key]) for name in expected for key, value in expected[name].items())
    part = torch.optim.AdamW(list(templates.values())[1:])
    with pytest.raises(ValueError, match=f"^{next(iter(templates))}: the checkpoint has optimizer state for these"):
        load_optimizer_state(part, new.objectives.model, whole["optimizer"])
    return opened, sources


@pytest.mark.parametrize(("way", "world"), [
    ("fsdp", 2), pytest.param("offload", 2, marks=pytest.mark.slow), pytest.param("hsdp", 4, marks=pytest.mark.slow)])
def test_each_rank_opens_a_file_of_shards_once_and_reads_only_its_own_shards(processes, tmp_path, way, world):
    """More than 900 tensors. Counters, which every rank has, may be in any file."""
    given = [(rank, world, way, tmp_path / "shards") for rank in range(world)]
    files = [f"__{rank}_0.distcp" for rank in range(world)]
    for rank, (opened, sources) in enumerate(processes.run(shards_there_and_back, *given)):
        assert sorted(opened) == sorted(set(opened)) and set(opened) <= set(files), rank
        # With HSDP two ranks have each shard, and either may have written it.
        assert sources <= ({files[rank], files[(rank + 2) % 4]} if way == "hsdp" else {files[rank]}), rank


def train_with_watched_shards(rank: int, arguments: list[str], watch: Callable[[int, Path], object]) -> tuple[int, str]:
    """Train, and call `watch(rank, path)` before each file of shards. Returns the exit code and what was printed."""
    create, printed, code = _HashingFileSystem.create_stream, io.StringIO(), 0

    def watched(self, path: Path, mode: str):
        watch(rank, path)
        return create(self, path, mode)

    with patch.object(_HashingFileSystem, "create_stream", watched), contextlib.redirect_stderr(printed):
        try:
            train.main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    return code, printed.getvalue()


def fail_after_a_slow_save(rank: int, path: Path) -> None:
    """Rank 1 writes the shards of step 2 when step 3 is over, and cannot write those of step 4."""
    if rank == 1 and path.parent.name == ".step_0000002.part":
        end = time.monotonic() + 200
        while len(lines(path.parents[1])) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
    if rank == 1 and path.parent.name == ".step_0000004.part":
        raise OSError("disk full")


def kill_rank_1(rank: int, path: Path) -> None:
    """Kill rank 1 in the middle of the save of step 4, when its file is begun."""
    if rank == 1 and path.parent.name == ".step_0000004.part":
        path.write_bytes(b"begun")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_shards_are_written_while_training_continues_and_a_rank_that_cannot_write_stops_all(processes, data, tmp_path):
    """The shards of the slow save are those of its step, and the checkpoint before the broken one is intact."""
    arguments = [*SMALL, *f"--data {data} --parallel fsdp --max-steps 6 --save-every 2 --distill-weight 0.4".split()]
    train_together(processes, 2, [*arguments, *f"--keep-checkpoints 9 --out {tmp_path / 'whole'}".split()])
    broken = [*arguments, "--out", str(tmp_path / "broken")]
    (code, said), (other, silent) = processes.run(train_with_watched_shards, *[
        (rank, broken, fail_after_a_slow_save) for rank in range(2)], joined=False)
    assert code == other == 1 and "Error" not in silent and "warning" not in silent
    assert "step_0000004 could not be written (rank 1: disk full); the previous one, step_0000002, is intact" in said
    run = tmp_path / "broken" / "tiny"
    assert sorted(path.name for path in run.iterdir() if "step" in path.name) == ["step_0000002"]
    expected, found = (load_whole(folder / "step_0000002") for folder in (tmp_path / "whole" / "tiny", run))
    assert len(found["objectives"]) > 50
    assert all(tensor.equal(found["objectives"][name]) for name, tensor in expected["objectives"].items())
    assert all(tensor.equal(found["optimizer"][name][key]) for name, state in expected["optimizer"].items()
               for key, tensor in state.items())


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_writes_its_shards_leaves_the_checkpoint_before(data, tmp_path):
    """Then the run continues, on one process."""
    arguments = [*SMALL, *f"--data {data} --parallel fsdp --max-steps 6 --save-every 2 --out {tmp_path}".split()]
    two, run = Processes(2), tmp_path / "tiny"
    with pytest.raises((AssertionError, queue.Empty)):  # the connection is closed; there is no result of rank 1
        two.run(train_with_watched_shards, *[(rank, arguments, kill_rank_1) for rank in range(2)], joined=False)
    assert os.readlink(run / "last") == "step_0000002" and not (run / "step_0000004").exists()
    assert load_training(run / "last")["step"] == 2
    train.main(["--resume", "--out", str(tmp_path)])
    assert sorted(path.name for path in run.iterdir() if "step" in path.name) == [
        f"step_000000{step}" for step in (4, 6)]


def test_damaged_shards_are_named_and_an_index_that_could_run_code_is_refused(data, tmp_path, capsys):
    run = tmp_path / "tiny"
    train.main([*SMALL, *f"--data {data} --parallel fsdp --max-steps 2 --save-every 1 --out {tmp_path}".split()])
    before = "continue from the one before it with --resume --resume-from step_0000001"
    for name in (".metadata", "__0_0.distcp"):
        path = run / "step_0000002" / name
        content = path.read_bytes()
        for damaged, problem in ((content[:-1], "has "), (content[:-1] + b"!", "was changed"), (None, "is missing")):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as refused:
                load_training(run / "last")
            assert f"(step_0000002) is damaged: {name} {problem}" in str(refused.value) and before in str(refused.value)
            mplug2.load(run / "last")  # the model does not need them
        path.write_bytes(content)
    path.write_bytes(content[: len(content) // 2])
    manifest = json.loads((run / "step_0000002" / "manifest.json").read_text())
    write_manifest(run / "step_0000002", manifest["step"], {})  # as if it had been damaged before it was written
    saved = load_training(run / "last")
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read \(__0_0.distcp: .*use an older checkpoint with"):
        read_shards(saved["shards"], {})
    (run / "step_0000002" / ".metadata").write_bytes(pickle.dumps(os.system))
    write_manifest(run / "step_0000002", manifest["step"], {})  # by someone who knows the format
    with pytest.raises(CheckpointError, match=r"\.metadata .* names posix.system, which does not belong to an index"):
        load_training(run / "last")
    train.main(["--resume", "--resume-from", "step_0000001", "--out", str(tmp_path)])
    assert load_training(run / "last")["step"] == 2
