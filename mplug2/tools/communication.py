"""Communication of a training step on many devices: which collectives, how many bytes, and how long they take.

The step of train.py runs on fake tensors, on rank 0 of a process group that sends nothing, and every collective is
recorded. Only the buckets of DDP, which belong to a compiled part of torch, are computed here. Times are estimates from
the rates of the links below. No run on several GPUs has confirmed them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mplug2.distributed import DistInfo, any_rank, full_tensor, world_size
from mplug2.training.muon import Muon, assign_owners, orthogonalization_flops
from mplug2.training.optim import OptimizerSettings, make_optimizer
from mplug2.training.parallel import (
    ParallelSettings,
    all_reduce_replicated_grads,
    clip_grad_norm,
    device_mesh,
    shard_model,
)

NODE = 8
"""GPUs of a node, joined by NVLink. Each has its own InfiniBand adapter (DGX H100 and H200)."""
NVLINK, INFINIBAND = 450e9, 50e9
"""Bytes per second that a GPU sends: NVLink 4 has 900 GB/s in both directions together (NVIDIA's data sheet of the
H100), and NDR InfiniBand 400 Gb/s (that of the DGX H100)."""
EFFICIENCY = 0.8
"""Assumed fraction of these rates that large collectives reach."""
LATENCY = 10e-6
"""Assumed seconds of a collective, apart from its bytes, for each doubling of the number of GPUs."""
OPERATIONS = {
    "allgather_": "all_gather", "_allgather_base_": "all_gather", "all_gather_into_tensor": "all_gather",
    "allreduce_": "all_reduce", "_reduce_scatter_base_": "reduce_scatter", "alltoall_base_": "all_to_all",
}
"""The operators of torch that a step calls."""


EVERY_MICRO_BATCH = ("parameters, forward", "parameters, backward", "VTC", "means of losses")
OUTSIDE_OF_STEPS = ("checkpoint", "validation")
"""Purposes of collectives that each micro-batch repeats, and of those that belong to no step."""


@dataclass(frozen=True)
class Collective:
    purpose: str
    operation: str
    size: int
    """Bytes: of the result of an all_gather, of the input of the others, on each rank."""
    gpus: int
    """Ranks that take part."""
    nodes: int
    """Nodes that these ranks are spread over."""

    @property
    def seconds(self) -> float:
        """A ring passes each rank everything that the other ranks have (all_reduce: twice). Between nodes, the adapters
        of a node share the work; in an all_to_all each GPU's own adapter carries what leaves the node."""
        gpus, nodes, passes = self.gpus, self.nodes, 1 + (self.operation == "all_reduce")
        local = gpus / nodes
        if self.operation == "all_to_all":
            inside, outside = self.size * (local - 1) / gpus, self.size * (gpus - local) / gpus
        else:
            inside, outside = (passes * self.size * part for part in ((gpus - 1) / gpus, (nodes - 1) / nodes / local))
        return LATENCY * math.log2(gpus) + max(inside / NVLINK, outside / INFINIBAND) / EFFICIENCY


class Recorder(TorchDispatchMode):
    """Records the collectives of this process, in the phase of the step that is set at the time."""

    def __init__(self):
        super().__init__()
        self.phase, self.found = "", []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace not in ("c10d", "_c10d_functional"):
            return function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name not in ("wait_tensor", "_wrap_tensor_autograd"):
            own = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)][-1]  # results come first
            ranks = ranks_of(args)
            size = own.numel() * own.element_size() * (len(ranks) if OPERATIONS[name] == "all_gather" else 1)
            nodes = len({rank // NODE for rank in ranks})
            self.found.append(Collective(self.purpose(name, size, ranks), OPERATIONS[name], size, len(ranks), nodes))
        return function(*args, **(kwargs or {}))

    def purpose(self, name: str, size: int, ranks: Sequence[int]) -> str:
        """What a collective of the passes is for; those of other phases have the name of the phase."""
        if self.phase not in ("forward", "backward"):
            return self.phase
        if name == "_allgather_base_":
            return f"parameters, {self.phase}"
        if len(ranks) < world_size():
            return "gradients, between nodes" if name == "allreduce_" else "gradients"
        return "gradients" if name == "_reduce_scatter_base_" else "means of losses" if size <= 8 else "VTC"


def ranks_of(arguments: tuple) -> Sequence[int]:
    """The ranks of the process group that a collective was called with."""
    group = next((argument for argument in arguments if isinstance(argument, torch.ScriptObject)), None)
    if group is None:  # `full_tensor` names its group, the first ranks of a sharded tensor, and says how many there are
        return range(arguments[1])
    return dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))


@contextmanager
def fake_ranks(gpus: int) -> Iterator[DistInfo]:
    """Rank 0 of a process group whose other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # private: training has to do without it

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        yield DistInfo(0, gpus, torch.device("cpu"), min(NODE, gpus))
    finally:
        dist.destroy_process_group()


def step_collectives(
    make: Callable[[], tuple[nn.Module, dict]], gpus: int, parallel: ParallelSettings, optimizer: OptimizerSettings
) -> list[Collective]:
    """The collectives of the second step of a run, of a checkpoint and of a validation.

    `make` returns the objectives and a batch of one micro-batch.
    """
    fake, recorder = FakeTensorMode(allow_non_fake_inputs=True), Recorder()
    sharded = parallel.parallel != "ddp"
    with fake_ranks(gpus) as process:
        with fake:
            objectives, batch = make()
        with patch("torch.chunk", first_chunk):
            if sharded:
                shard_model(objectives, device_mesh(process, parallel), parallel)
        autocast = torch.autocast("cpu", torch.bfloat16) if parallel.low_precision else nullcontext()
        with fake, recorder:
            stepper = make_optimizer(objectives.model, optimizer)
            recorder.phase = "forward"
            with autocast:
                loss = sum(objectives(batch).values())
            recorder.phase = "backward"
            loss.backward()
            recorder.phase = "gradient norm, flags"
            all_reduce_replicated_grads(objectives)
            clip_grad_norm([parameter for group in stepper.param_groups for parameter in group["params"]], 1.0)
        with recorder:  # the flags are real: their values are read
            any_rank(False, False, False)
        with fake, recorder:
            recorder.phase = "Muon"
            step_of_matrices(stepper)
            if sharded:
                weights = [*objectives.model.state_dict().values()]
                for recorder.phase in OUTSIDE_OF_STEPS:
                    gather_distinct(weights, recorder.found)
    found = recorder.found
    if not sharded:
        after = 1 + max(number for number, one in enumerate(found) if one.purpose in ("means of losses", "VTC"))
        trained = [parameter for parameter in objectives.parameters() if parameter.requires_grad]
        found[after:after] = buckets(trained, gpus)
    return found


def first_chunk(tensor: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """torch.chunk for rank 0, which uses the first chunk only: hundreds of fake tensors a parameter would take minutes.
    """
    return [tensor.narrow(dim, 0, math.ceil(tensor.shape[dim] / chunks))] * chunks


def like(tensor: Tensor) -> tuple:
    """Tensors for which this is the same are gathered in the same way."""
    return tensor.shape, tensor.dtype, isinstance(tensor, DTensor)


def step_of_matrices(stepper: torch.optim.Optimizer) -> None:
    """Update the matrices of Muon. The other parameters are left out: AdamW sends nothing."""
    for group in stepper.param_groups:
        if not (isinstance(stepper, Muon) and group["matrices"]):
            for parameter in group["params"]:
                parameter.grad = None
    stepper.step()


def gather_distinct(tensors: list[Tensor], found: list[Collective]) -> None:
    """Gather one tensor of each shape, and repeat in `found` what that has recorded for all others of this shape."""
    firsts = {like(tensor): tensor for tensor in tensors}
    for key, copies in Counter(map(like, tensors)).items():
        start = len(found)
        full_tensor(firsts[key])
        found += found[start:] * (copies - 1)


def buckets(parameters: list[Tensor], gpus: int, limits: tuple[int, int] = (2**20, 25 * 2**20)) -> list[Collective]:
    """What DDP reduces: its buckets, the last parameters first, and which parameters were used on any rank.

    A bucket is full when it has reached the limit, which is lower for the first parameters.
    """
    sizes = [0]
    for parameter in parameters:
        if sizes[-1] >= limits[min(len(sizes), len(limits)) - 1]:
            sizes.append(0)
        sizes[-1] += parameter.numel() * parameter.element_size()
    return [Collective("gradients", "all_reduce", size, gpus, math.ceil(gpus / NODE))
            for size in (*reversed(sizes), 4 * len(parameters))]


# ---- times -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """All collectives of a step with the same purpose."""

    purpose: str
    calls: int
    size: int
    seconds: float
    exposed: float
    """Seconds in which the device has nothing to compute."""


def rows(found: list[Collective], forward: float, backward: float, micro_batches: int = 1) -> list[Row]:
    """The collectives by purpose, for passes of these seconds.

    Parameters are gathered ahead of their block, and gradients are reduced during the backward pass. So only the first
    gather and the last reduction are exposed, and what takes longer than the pass. All other collectives are exposed.
    """
    table = []
    for purpose in dict.fromkeys(one.purpose for one in found):
        own = [one for one in found if one.purpose == purpose]
        if purpose == "Muon":  # sent in bfloat16 from a GPU, in float32 from the fake CPU
            own = [replace(one, size=one.size // 2) for one in own]
        times = micro_batches if purpose in EVERY_MICRO_BATCH else 1
        seconds = [one.seconds for one in own] * times
        exposed = sum(seconds)
        if purpose == "parameters, forward":
            exposed = max(seconds[0], exposed - forward)
        elif purpose == "parameters, backward":
            backward, exposed = backward - exposed, max(0.0, exposed - backward)
        elif purpose in ("gradients", "gradients, between nodes"):
            exposed = max(seconds[-1], exposed - max(0.0, backward))
        table.append(Row(purpose, len(seconds), times * sum(one.size for one in own), sum(seconds), exposed))
    return table


def muon_flops(model: nn.Module, gpus: int) -> int:
    """FLOPs of orthogonalization on the rank that has most of it, of `gpus` that divide the work."""
    shapes = tuple(tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear))
    load = [0] * gpus
    for shape, owner in zip(shapes, assign_owners(shapes, gpus)):
        load[owner] += orthogonalization_flops(*shape)
    return max(load)


def format_step(name: str, table: list[Row], passes: float, products: float, samples: int) -> list[str]:
    """The table as lines. `passes` and `products` are the seconds of the passes and of Muon's matrix products."""
    lines = [f"{name:<34}{'calls':>11}{'MB':>11}{'ms':>11}{'exposed ms':>13}"]
    for row in table:
        lines.append(f"{row.purpose:<34}{row.calls:>11,}{row.size / 1e6:>11,.1f}{1e3 * row.seconds:>11.1f}"
                     f"{1e3 * row.exposed:>13.1f}")
    exposed = step_exposed(table)
    step = passes + products + exposed
    muon = f" + {1e3 * products:,.0f} ms of Muon" * (products > 0)
    return [*lines, f"a step: {1e3 * passes:,.0f} ms of passes{muon} + {1e3 * exposed:,.0f} ms exposed = "
            f"{1e3 * step:,.0f} ms, {samples / step:,.0f} samples per second, {exposed / step:.1%} communication"]


def step_exposed(table: list[Row]) -> float:
    """Exposed seconds of a step."""
    return sum(row.exposed for row in table if row.purpose not in OUTSIDE_OF_STEPS)
