"""The planned collectives of a step, against those of real runs of train.py on two and three processes."""

from collections import Counter
from dataclasses import asdict
from unittest.mock import patch

import pytest
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
    muon_flops,
    rows,
    step_collectives,
)
from mplug2.tools.memory_plan import Workload
from mplug2.training.optim import OptimizerSettings
from mplug2.training.parallel import ParallelSettings

Found = Counter[tuple[str, int]]
"""How often each operation runs with each number of bytes."""


@pytest.fixture(scope="module")
def processes():
    three = Processes(3)
    yield three
    assert three.close() == [0, 0, 0]


class Named(Recorder):
    """Keeps the operator of torch in place of the purpose."""

    def purpose(self, name: str, size: int) -> str:
        return name


def counted(found: list[Collective]) -> Found:
    return Counter((one.operation, one.size) for one in found)


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
@pytest.mark.parametrize(("world", "way"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_the_collectives_of_a_plan_are_those_of_a_real_run(processes, tmp_path, world, way):
    """Every call and every byte: of each step, for each type of batch that the run meets, and of the checkpoint."""
    arguments = [*SMALL, "--data", str(write_data(tmp_path / "data")), "--out", str(tmp_path / "runs"),
                 *f"--max-steps 5 --save-every 5 --parallel {way}".split()]
    sizes, steps, saved = processes.run(real_run, *[(arguments,)] * world, joined=False)[0]
    assert {"video", "image", "text"} == {kind for kind, _ in steps}
    plans = {kind: planned(ModelConfig(**sizes), kind, world, way, 6 // world) for kind, _ in steps}
    for kind, found in steps:
        assert found == counted([one for one in plans[kind] if one.purpose not in OUTSIDE_OF_STEPS]), kind
    assert saved == counted([one for one in plans["video"] if one.purpose == "checkpoint"])
    assert bool(saved) == (way == "fsdp")
