"""The planned collectives of a step, against those of real runs of train.py on two, three and four processes."""

import math
from collections import Counter
from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch
from data_helpers import write_data
from helpers import small
from processes import Processes
from runs import SMALL

import train
from mplug2.config import ModelConfig
from mplug2.tools import communication
from mplug2.tools.communication import (
    OUTSIDE_OF_STEPS,
    Collective,
    Recorder,
    buckets,
    format_step,
    gather_distinct,
    muon_flops,
    rows,
    step_collectives,
)
from mplug2.tools.pass_cost import Workload
from mplug2.training.optim import OptimizerSettings
from mplug2.training.parallel import ParallelSettings

Found = Counter[tuple[str, int, int]]
"""How often each operation runs with each number of bytes, among how many ranks."""


@pytest.fixture(scope="module")
def processes():
    four = Processes(4)
    yield four
    assert four.close() == [0, 0, 0, 0]


class Named(Recorder):
    """Keeps the operator of torch in place of the purpose."""

    def purpose(self, name: str, *_) -> str:
        return name


def counted(found: list[Collective]) -> Found:
    return Counter((one.operation, one.size, one.gpus) for one in found)


def real_run(arguments: list[str]) -> tuple[dict, list[tuple[str, Found]], Found]:
    """The sizes of the model, the batch type and collectives of each step, and the collectives of the checkpoint."""
    steps, saved, sizes = [], Counter(), {}
    backward, update, save = train.Trainer.backward, train.Trainer.update, train.Trainer.save

    def recorded_backward(self, batches):
        sizes.update(asdict(self.model.config))
        with Named() as recorder:
            found = backward(self, batches)
        steps.append((found[2][0], counted(recorder.found)))
        return found

    def recorded_update(self, *inputs):
        with Named() as recorder:
            found = update(self, *inputs)
        steps[-1][1].update(counted(recorder.found))
        return found

    def recorded_save(self):
        with Named() as recorder:
            save(self)
        # Objects (generators, error messages) travel as pickles, whose length the plan does not know.
        saved.update(counted([one for one in recorder.found if one.purpose != "allgather_"]))

    with patch.multiple(train.Trainer, backward=recorded_backward, update=recorded_update, save=recorded_save):
        train.main(arguments)
    return sizes, steps, saved


def planned(config: ModelConfig, kind: str, gpus: int, way: str, b: int, **more) -> list[Collective]:
    work = Workload(config, b=b, frames=2, questions=2)
    return step_collectives(lambda: (work.objectives(), work.batch(kind)), gpus,
                            ParallelSettings(parallel=way, **more), OptimizerSettings())


@pytest.mark.slow
@pytest.mark.parametrize(("world", "way"), [(2, "ddp"), (3, "fsdp"), (4, "hsdp")])
def test_the_collectives_of_a_plan_are_those_of_a_real_run(processes, tmp_path, monkeypatch, world, way):
    """Every call and every byte: of each step, for each type of batch that the run meets, and of the checkpoint. Four
    processes are two nodes of two."""
    monkeypatch.setattr(communication, "NODE", 2)
    arguments = [*SMALL, "--data", str(write_data(tmp_path / "data")), "--out", str(tmp_path / "runs"),
                 *f"--max-steps 5 --save-every 5 --parallel {way} --batch-size {2 * world}".split()]
    sizes, steps, saved = processes.run(real_run, *[(arguments,)] * world, joined=False)[0]
    assert {"video", "image", "text"} == {kind for kind, _ in steps}
    plans = {kind: planned(ModelConfig(**sizes), kind, world, way, 2) for kind, _ in steps}
    for kind, found in steps:
        assert found == counted([one for one in plans[kind] if one.purpose not in OUTSIDE_OF_STEPS]), kind
    assert saved == counted([one for one in plans["video"] if one.purpose == "checkpoint"])
    assert bool(saved) == (way != "ddp")
    if way == "hsdp":
        nodes = {one.purpose: (one.gpus, one.nodes) for one in plans["video"]}
        assert nodes["gradients, between nodes"] == (2, 2) and nodes["VTC"] == (4, 2)
        assert all(nodes[purpose] == (2, 1) for purpose in ("parameters, forward", "gradients", "Muon", "checkpoint"))


def by_purpose(found: list[Collective]) -> dict[str, Found]:
    return {purpose: counted([one for one in found if one.purpose == purpose])
            for purpose in {one.purpose for one in found}}


def test_the_collectives_of_ddp_by_hand():
    """VTC gathers an integer of 8 bytes and two vectors of 5 numbers for each of 4 x 3 samples, and adds up the
    gradients of the vectors. Four losses count their samples. The flags are three integers of 4 bytes."""
    found = by_purpose(planned(small(), "video", 4, "ddp", 3))
    assert found["VTC"] == {("all_gather", 4 * 3 * 8, 4): 1, ("all_gather", 4 * 3 * 5 * 4, 4): 2,
                            ("all_reduce", 4 * 3 * 5 * 4, 4): 2}
    assert found["means of losses"] == {("all_reduce", 8, 4): 4}
    assert found["gradient norm, flags"] == {("all_reduce", 12, 4): 1}
    assert set(found) == {"VTC", "means of losses", "gradients", "gradient norm, flags", "Muon"}
    parameters = [*Workload(small(), b=1).objectives().parameters()]
    assert found["gradients"] == {("all_reduce", 4 * sum(p.numel() for p in parameters), 4): 1,
                                  ("all_reduce", 4 * len(parameters), 4): 1}


def test_one_tensor_of_each_shape_is_gathered_and_stands_for_all_of_them(monkeypatch):
    tensors, found, gathered = [torch.zeros(size) for size in (2, 3, 2, 2)], [], []

    def gather(tensor):
        gathered.append(len(tensor))
        found.extend([Collective("", "all_gather", len(tensor), 4, 1)] * 2)  # as if it took two collectives

    monkeypatch.setattr(communication, "full_tensor", gather)
    gather_distinct(tensors, found)
    assert sorted(gathered) == [2, 3]
    assert Counter(one.size for one in found) == {2: 6, 3: 2}


def test_a_bucket_is_full_when_it_reaches_its_limit():
    """Of parameters of 8, 4, 4, 12, 40 and 4 bytes; the last parameters are reduced first."""
    parameters = [torch.zeros(size) for size in (2, 1, 1, 3, 10, 1)]
    found = buckets(parameters, 12, (8, 16))
    assert [one.size for one in found] == [4, 40, 20, 8, 24] and {(one.gpus, one.nodes) for one in found} == {(12, 2)}


def test_seconds_of_a_collective_by_hand(monkeypatch):
    """Links of 100 and 10 bytes a second, all of them used, and a second for each doubling of the GPUs."""
    for name, value in (("NVLINK", 100.0), ("INFINIBAND", 10.0), ("EFFICIENCY", 1.0), ("LATENCY", 1.0)):
        monkeypatch.setattr(communication, name, value)
    assert Collective("", "all_gather", 800, 8, 1).seconds == 3 + 800 * 7 / 8 / 100
    assert Collective("", "all_reduce", 800, 8, 1).seconds == 3 + 2 * 800 * 7 / 8 / 100
    assert Collective("", "reduce_scatter", 800, 16, 2).seconds == 4 + 800 * 15 / 16 / 100  # outside: 800 / 2 / 8 / 10
    assert Collective("", "reduce_scatter", 800, 64, 8).seconds == 6 + 800 * 7 / 8 / 8 / 10
    assert Collective("", "all_reduce", 800, 8, 8).seconds == 3 + 2 * 800 * 7 / 8 / 10  # one of each node (HSDP)
    assert Collective("", "all_to_all", 800, 16, 2).seconds == 4 + 800 * 8 / 16 / 10
    five = Collective("", "all_gather", 800, 36, 5).seconds  # 7.2 on each node
    assert five == pytest.approx(math.log2(36) + 800 * 4 / 5 / 7.2 / 10)
    monkeypatch.setattr(communication, "EFFICIENCY", 0.5)
    assert Collective("", "all_to_all", 800, 16, 2).seconds == 4 + 2 * 800 * 8 / 16 / 10


def test_what_is_exposed_by_hand(monkeypatch):
    """A collective takes one second for each byte."""
    monkeypatch.setattr(Collective, "seconds", property(lambda self: float(self.size)))
    purposes = {"parameters, forward": (2, 5), "VTC": (1,), "parameters, backward": (4,), "gradients": (3, 2),
                "gradients, between nodes": (1, 1), "Muon": (8,), "checkpoint": (50,)}
    found = [Collective(purpose, "all_gather", size, 4, 1) for purpose, sizes in purposes.items() for size in sizes]

    def exposed(forward: float, backward: float, **more) -> list[float]:
        return [row.exposed for row in rows(found, forward, backward, **more)]

    assert exposed(100, 100) == [2, 1, 0, 2, 1, 4, 50]  # the first gather, the last reduction; Muon in half precision
    assert exposed(4, 100) == [3, 1, 0, 2, 1, 4, 50]  # 7 seconds of gathers in a pass of 4
    assert exposed(100, 6) == [2, 1, 0, 3, 1, 4, 50]  # 4 of gathers and 5 of reductions in a pass of 6
    assert exposed(100, 3) == [2, 1, 1, 5, 2, 4, 50]  # the gathers alone are longer
    assert exposed(100, 100, micro_batches=2) == [2, 2, 0, 2, 1, 4, 50]
    table = rows(found, 100, 100, micro_batches=2)
    assert [row.calls for row in table] == [4, 2, 2, 2, 2, 1, 1]
    assert [row.size for row in table] == [14, 2, 8, 5, 2, 4, 50]
    lines = format_step("DDP", table, passes=84.0, products=5.0, samples=300)
    assert lines[-1].startswith("a step: 84,000 ms of passes + 5,000 ms of Muon + 11,000 ms exposed = 100,000 ms, 3 ")
    assert lines[-1].endswith("11.0% communication")
    assert lines[4].split() == ["gradients", "2", "0.0", "5000.0", "2000.0"]


def test_the_busiest_rank_has_its_share_of_the_products():
    """Of three matrices on two ranks: each of 5 steps multiplies 2 x 2 by 2 x 3 twice, and 2 x 2 by 2 x 2 once."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 2) for _ in range(3)), torch.nn.LayerNorm(3))
    one = 5 * (2 * 2 * 2 * 2 * 3 + 2 * 2 * 2 * 2)
    assert [muon_flops(model, gpus) for gpus in (1, 2, 3)] == [3 * one, 2 * one, one]
