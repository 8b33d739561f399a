"""The state of a run: all that changes while it trains, except for the weights of the model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mplug2.checkpoint import CheckpointError
from mplug2.data.build import TrainingData
from mplug2.distributed import DistInfo, all_gather_object, shard_like
from mplug2.objectives.objectives import Objectives
from mplug2.training.fault_tolerance import generator_states, set_generator_states
from mplug2.training.parallel import gathered, load_optimizer_state, optimizer_state
from mplug2.training.sharded_state import ShardWriter, WriteShards, read_shards


class TrainState:
    """Step, optimizer, position in the data, EMA teacher, counters and random generators.

    A run that loads the state which it saved continues bit-identically. `state_dict` and `load_state_dict` are
    collective: every rank has to call them. The number of ranks may change in between; the generators are then seeded
    again. Only the main process gets the tensors of `state_dict`, which it saves. Of a sharded model it gets none:
    `write_shards` saves them.
    """

    def __init__(
        self, objectives: Objectives, optimizer: torch.optim.Optimizer, data: TrainingData, process: DistInfo
    ):
        self.objectives, self.optimizer, self.data, self.process = objectives, optimizer, data, process
        self.step = 0
        """Number of steps done."""
        self.nonfinite_steps = 0
        """Number of steps that were skipped because a loss or gradient was not finite."""
        self.nonfinite_in_a_row = 0
        sharded = any(isinstance(parameter, DTensor) for parameter in objectives.parameters())
        self.shard_writer = ShardWriter() if sharded else None

    def state_dict(self) -> dict[str, Any]:
        saved = {
            "step": self.step,
            "files": self.data.files(),
            "positions": self.data.state_dict(),
            "nonfinite_steps": self.nonfinite_steps,
            "generators": all_gather_object(generator_states(self.process.device)),
        }
        if not self.shard_writer:
            saved["optimizer"] = optimizer_state(self.optimizer, self.objectives.model) if self.process.is_main else {}
            saved["objectives"] = gathered(_extra_tensors(self.objectives), self.process.is_main)
        return saved

    def write_shards(self) -> WriteShards | None:
        """Of a sharded model: copies the tensors of optimizer and teacher, and returns what writes them to a folder."""
        if not self.shard_writer:
            return None
        tensors = {f"objectives/{name}": tensor for name, tensor in _extra_tensors(self.objectives).items()}
        for name, parameter in self.objectives.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
        return self.shard_writer.stage(tensors)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        check_files(saved.get("files"), self.data.files())
        if "shards" in saved:
            parameters = self.objectives.model.named_parameters()
            templates = {f"optimizer/{name}": parameter for name, parameter in parameters}
            templates |= {f"objectives/{name}": tensor for name, tensor in _extra_tensors(self.objectives).items()}
            saved = {**saved, **read_shards(saved["shards"], templates)}
        self.step, self.nonfinite_steps = saved["step"], saved["nonfinite_steps"]
        load_optimizer_state(self.optimizer, self.objectives.model, saved["optimizer"])
        load_extra_state(self.objectives, saved["objectives"])
        self.data.load_state_dict(self.step, saved["positions"])
        rank, states = self.process.rank, saved["generators"]
        if len(states) == self.process.world_size:
            set_generator_states(states[rank], self.process.device)
        else:  # no rank continues one of the old ranks
            torch.manual_seed(int(np.random.default_rng((self.data.seed, self.step, rank)).integers(2**63)))


def check_files(saved: dict[str, list[tuple[str, int]]] | None, own: dict[str, list[tuple[str, int]]]) -> None:
    """CheckpointError if a run is resumed with other records than it was started with (None: an older checkpoint)."""
    if saved is None:
        return
    before, now = ({(stream, *file) for stream in files for file in files[stream]} for files in (saved, own))
    if before != now:
        names = sorted({f"{name} ({size:,} bytes)" for _, name, size in before - now})
        raise CheckpointError(f"the run was started with other records: {', '.join(names[:5]) or 'fewer files'}; a "
                              "resumed run needs the same ones, which --data may find in another place. To train on "
                              "other data, start a run with --init and --name")


@torch.no_grad()
def load_extra_state(objectives: Objectives, saved: Mapping[str, Tensor]) -> None:
    """Load what was saved of `_extra_tensors`. CheckpointError if the run was started with other settings."""
    own = _extra_tensors(objectives)
    # Runs that were saved before the teacher was renamed call it "momentum".
    names = {name.replace("momentum.", "ema_teacher.", 1): name for name in saved}
    if own.keys() != names.keys():
        raise CheckpointError(f"{', '.join(sorted(names.keys() ^ own.keys()))}: in the checkpoint or in this run, but "
                              "not in both; resume with the settings that the run was started with")
    for name, tensor in own.items():
        tensor.copy_(shard_like(saved[names[name]], tensor))
    if objectives.ema_teacher:
        counters = {name: saved[names[name]] for name, tensor in own.items() if not tensor.dim()}
        objectives.ema_teacher.load_counters(counters, "ema_teacher.")


def _extra_tensors(objectives: nn.Module) -> dict[str, Tensor]:
    """What is trained along with the model: the weights and the queue of the EMA teacher."""
    return {name: tensor for name, tensor in objectives.state_dict().items() if not name.startswith("model.")}
