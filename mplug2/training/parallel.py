"""Sharing a model among ranks: DDP and FSDP2 wrapping, gradient synchronization and clipping, optimizer state.

    ddp     every rank has the whole model; gradients are averaged
    fsdp    every rank has a shard of each parameter, its gradient and its optimizer state; a block's parameters are
            gathered when it runs (FSDP2, `fully_shard`)
    hsdp    the same among the ranks of a node; the nodes are replicas, whose gradients are averaged
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mplug2.distributed import (
    NO_TIMEOUT,
    AllRanksError,
    DistInfo,
    all_gather_object,
    full_tensor,
    shard_group,
    shard_like,
    world_size,
)
from mplug2.model.layers import BertLayer, Block
from mplug2.model.mplug2 import MPLUG2

COMPILED_VERSIONS = 32
"""Versions of a block that Dynamo may compile. The 12 or so uses of a text layer need more than its default of 8."""


@dataclass(frozen=True)
class ParallelSettings:
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto: cuda if there is a GPU, otherwise cpu."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: each rank has the whole model, gradients are averaged; fsdp (FSDP2): all is sharded among the ranks; hsdp:
    all is sharded among the ranks of each node."""
    cpu_offload: bool = False
    """With --parallel fsdp or hsdp: keep parameters and optimizer state in CPU memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward passes under autocast."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile every block of the model (torch.compile); the first steps take minutes."""

    def __post_init__(self):
        if self.cpu_offload and self.parallel == "ddp":
            raise ValueError(f"cpu_offload with parallel={self.parallel}: only FSDP2 can offload; add --parallel fsdp")

    @property
    def low_precision(self) -> bool:
        """Whether forward passes run in bfloat16."""
        return self.precision == "bfloat16"


@torch.no_grad()
def wrap_model(module: nn.Module, process: DistInfo, settings: ParallelSettings) -> nn.Module:
    """`module` on the device of this rank, with gradients that are averaged over the ranks (DDP, FSDP2 or HSDP).

    Build the optimizer afterwards: FSDP2 replaces the parameters. A sharded model gets the weights of the main process,
    so that of any other rank may be on the meta device. AllRanksError if nodes have unequal numbers of ranks (HSDP).
    """
    if settings.parallel == "ddp":
        module.to(process.device)
        if process.world_size == 1:
            return module
        # The buffers are equal on all ranks. The name of this setting depends on the version of torch.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        buffers = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True, **buffers)
    if settings.parallel == "hsdp" and len(sizes := set(all_gather_object(process.local_world_size))) > 1:
        raise AllRanksError(f"parallel=hsdp: the nodes have different numbers of processes, {sizes}; start the same "
                            "number on each node, or use --parallel fsdp")
    mesh, home = device_mesh(process, settings), "cpu" if settings.cpu_offload else process.device
    if not process.is_main:
        shard_model(module, mesh, settings)
        module.to_empty(device=home)
    for tensor in module.state_dict().values():
        full = tensor if process.is_main else torch.empty(tensor.shape, dtype=tensor.dtype, device=process.device)
        full = full.to(process.device).contiguous()
        dist.broadcast(full, 0)
        if not process.is_main:
            tensor.copy_(shard_like(full, tensor))
    if process.is_main:  # only now: shards replace the weights block by block
        shard_model(module, mesh, settings)
    for parameter in module.parameters():
        if parameter.dim() == 0:
            parameter.data = parameter.data.to(home)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(process.device))
    # Gather everything once: gradient accumulation expects it even of blocks that a batch does not use.
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()
    return module


def device_mesh(process: DistInfo, settings: ParallelSettings) -> DeviceMesh:
    """All ranks in a row, or with HSDP as `nodes ranks`: FSDP2 shards among the ranks of a row, and replicates over the
    rows."""
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if process.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
            world_size=1,
        )
    if settings.parallel == "fsdp":
        return init_device_mesh(process.device.type, (process.world_size,))
    local = process.local_world_size or process.world_size
    ranks = torch.arange(process.world_size).view(-1, local)
    columns, rows = (dist.new_subgroups_by_enumeration(groups.tolist(), timeout=NO_TIMEOUT)[0]
                     for groups in (ranks.T, ranks))
    return DeviceMesh.from_group([columns, rows], process.device.type, ranks, mesh_dim_names=("replicate", "shard"))


def shard_model(module: nn.Module, mesh: DeviceMesh, settings: ParallelSettings) -> None:
    """Shard the parameters of `module`, on the device of this rank; on the meta device they stay there.

    FSDP2 shards every transformer block separately: its parameters are gathered when it runs, in bfloat16 with
    `--precision bfloat16`. Parameters outside of blocks stay gathered for the whole step.
    """
    sharding = {
        "mesh": mesh,
        # FSDP2 cannot shard a scalar. Every rank keeps these parameters; see `all_reduce_replicated_grads`.
        "ignored_params": {parameter for parameter in module.parameters() if parameter.dim() == 0},
        "offload_policy": OffloadPolicy(),
    }
    if settings.cpu_offload:
        sharding["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    if settings.low_precision:
        sharding["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in module.modules():
        if isinstance(block, Block):
            fully_shard(block, **sharding)
    if settings.low_precision:  # the root sees the batch, whose labels and boxes would be rounded: 1987 becomes 1984
        sharding["mp_policy"] = dataclasses.replace(sharding["mp_policy"], cast_forward_inputs=False)
    fully_shard(module, **sharding)


def unsharded_copy(model: MPLUG2) -> MPLUG2:
    """A sharded model in one piece, on the CPU of every rank. Every rank has to call it."""
    weights = gathered(model.state_dict(), keep=True)
    with torch.device("meta"):  # this takes neither memory nor random numbers
        copy = MPLUG2(model.config, model.task, model.classes)
    copy.load_state_dict(weights, assign=True)
    return copy


def checkpoint_activations(model: nn.Module) -> None:
    """Trade time for memory: every block recomputes its activations in the backward pass."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True


def compile_model(model: nn.Module) -> None:
    """Compile every block as one graph, those of texts for any length. In place: parameters keep their names.

    Call it before `wrap_model`. All blocks of a class share their compiled code, and Dynamo keeps one version for each
    use of it: with and without a memory, a mask, gradients. It must not run out of versions.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VERSIONS)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True, dynamic=True if isinstance(module, BertLayer) else None)


def no_sync(module: nn.Module, last: bool) -> AbstractContextManager:
    """A context for the passes of a micro-batch: only the `last` one of a step averages gradients over the ranks."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def all_reduce_replicated_grads(module: nn.Module) -> None:
    """After the backward pass: average the gradients that FSDP2 does not, those of scalar parameters."""
    if isinstance(module, FSDPModule) and world_size() > 1:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to a total norm of at most `limit` (0: no limit). Returns the norm before."""
    limit = limit or math.inf
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, limit)
    shards = [parameter.grad.to_local() for parameter in sharded if parameter.grad is not None]
    replicated = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    squares = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(squares, group=shard_group(sharded[0]))
    norm = (squares + nn.utils.get_total_norm(replicated).square().to(squares)).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in shards + replicated:
        gradient.mul_(factor.to(gradient.device))
    return norm


def split_param_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give replicated parameters a group of their own: one update cannot mix them with sharded parameters."""
    for group in list(optimizer.param_groups):
        replicated = [parameter for parameter in group["params"] if not isinstance(parameter, DTensor)]
        if replicated and len(replicated) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if isinstance(parameter, DTensor)]
            optimizer.add_param_group({**group, "params": replicated})


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Copies of the optimizer's state on the CPU, by parameter name: the same for any number of ranks.

    Not for sharded models, whose state would not fit into one process: `TrainState.write_shards` saves that.
    """
    return {name: {key: value.to("cpu", copy=True) for key, value in optimizer.state[parameter].items()}
            for name, parameter in module.named_parameters() if parameter in optimizer.state}


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies of tensors in one piece on the CPU, which training will not change; none if this rank does not `keep`
    them. Every rank has to call it."""
    kept = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if keep:
            kept[name] = full.to("cpu", copy=True)
    return kept


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, saved: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Load what `optimizer_state` or `read_shards` returned: tensors in one piece, or sharded like the parameters here.

    ValueError for the state of parameters that are not trained here.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := sorted(set(saved) - {names[parameter] for parameter in ordered}):
        raise ValueError(f"{', '.join(unknown[:8])}: the checkpoint has optimizer state for these parameters, but this "
                         "run does not train them; resume with the settings that the run was started with")
    state = {
        number: {key: shard_like(value, parameter) for key, value in saved[names[parameter]].items()}
        for number, parameter in enumerate(ordered) if names[parameter] in saved
    }
    groups, number = [], 0
    for group in optimizer.state_dict()["param_groups"]:
        groups.append({**group, "params": list(range(number, number + len(group["params"])))})
        number += len(group["params"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
