"""Parallel."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mplug2.distributed import DistInfo, full_tensor, shard_like, world_size
from mplug2.model.layers import BertLayer, Block


@dataclass(frozen=True)
class ParallelSettings:
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto: cuda if there is a GPU, otherwise cpu."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several ranks share: ddp, the gradients; fsdp (FSDP2), also parameters and optimizer state."""
    cpu_offload: bool = False
    """With --parallel fsdp: keep parameters and optimizer state in CPU memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward passes under autocast."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the model (torch.compile); the first steps take minutes."""

    def __post_init__(self):
        if self.cpu_offload and self.parallel != "fsdp":
            raise ValueError(f"cpu_offload with parallel={self.parallel}: only FSDP2 can offload; add --parallel fsdp")
        if self.compile and self.parallel == "fsdp":
            raise ValueError("compile with parallel=fsdp: a sharded model cannot be compiled here; use one of the two")

    @property
    def low_precision(self) -> bool:
        """Whether forward passes run in bfloat16."""
        return self.precision == "bfloat16"


def wrap_model(
    module: nn.Module, process: DistInfo, settings: ParallelSettings, block: type[nn.Module]
) -> nn.Module:
    """`module` on the device of this rank, with gradients that are averaged over the ranks (DDP or FSDP2).

    FSDP2 shards every module of the type `block` on its own: its parameters are gathered when it runs, in bfloat16 with
    `--precision bfloat16`. Parameters outside of blocks stay gathered for the whole step. Build the optimizer
    afterwards: FSDP2 replaces the parameters.
    """
    if settings.parallel == "ddp":
        module.to(process.device)
        if process.world_size == 1:
            return module
        # Buffers are the same everywhere already. (The newer name of this setting; torch 2.13 warns of the older one.)
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        buffers = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True, **buffers)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if process.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
            world_size=1,
        )
    sharding = {
        "mesh": init_device_mesh(process.device.type, (process.world_size,)),
        # FSDP2 cannot share out a single number: these stay whole, see `all_reduce_replicated_grads`.
        "ignored_params": {parameter for parameter in module.parameters() if parameter.dim() == 0},
        "offload_policy": OffloadPolicy(),
    }
    if settings.cpu_offload:
        sharding["offload_policy"] = CPUOffloadPolicy(pin_memory=process.device.type == "cuda")
    if settings.low_precision:
        sharding["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in module.modules():
        if isinstance(part, block):
            fully_shard(part, **sharding)
    fully_shard(module, **sharding)
    for part in module.modules():  # put together once, as accumulation expects of blocks that a batch passes by, too
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()
    for parameter in sharding["ignored_params"]:
        parameter.data = parameter.data.to("cpu" if settings.cpu_offload else process.device)
    for buffers in module.modules():
        for name, buffer in buffers.named_buffers(recurse=False):
            setattr(buffers, name, buffer.to(process.device))
    return module


def checkpoint_activations(model: nn.Module) -> None:
    """Trade time for memory: every block recomputes its activations in the backward pass."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True


def compile_model(model: nn.Module) -> None:
    """Compile the vision encoder as one graph, and every other block for texts of any length.

    In place: parameters keep their names.
    """
    if hasattr(model, "vision_encoder"):
        model.vision_encoder.compile(fullgraph=True)
    for module in model.modules():
        if isinstance(module, BertLayer):
            module.compile(dynamic=True)


def no_sync(module: nn.Module, last: bool) -> AbstractContextManager:
    """Within it, forward and backward of a micro-batch: only the `last` one of a step exchanges gradients."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def all_reduce_replicated_grads(module: nn.Module) -> None:
    """After backward: the gradients that FSDP2 does not average, those of single numbers."""
    if isinstance(module, FSDPModule) and world_size() > 1:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `limit`; returns the norm that it was."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    parts = [p.grad.to_local() for p in parameters if p.grad is not None and isinstance(p.grad, DTensor)]
    wholes = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    squares = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(squares)
    norm = (squares + nn.utils.get_total_norm(wholes).square().to(squares)).sqrt()
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in parts + wholes:
        gradient.mul_(share.to(gradient.device))
    return norm


def split_param_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that are whole groups of their own: an update cannot mix them with sharded ones."""
    for group in list(optimizer.param_groups):
        wholes = [parameter for parameter in group["params"] if not isinstance(parameter, DTensor)]
        if wholes and len(wholes) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if isinstance(parameter, DTensor)]
            optimizer.add_param_group({**group, "params": wholes})


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the optimizer knows, by name of the parameter, put together: the same for any number of processes."""
    return {
        name: {key: full_tensor(value).cpu() for key, value in optimizer.state[parameter].items()}
        for name, parameter in module.named_parameters() if parameter in optimizer.state
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, saved: dict[str, dict[str, Tensor]]
) -> None:
    """The inverse of `optimizer_state`. ValueError for a state of other parameters."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := sorted(set(saved) - {names[parameter] for parameter in ordered}):
        raise ValueError(f"the saved optimizer state is of other parameters: {', '.join(unknown[:8])}")
    state = {
        number: {key: shard_like(value, parameter) for key, value in saved[names[parameter]].items()}
        for number, parameter in enumerate(ordered) if names[parameter] in saved
    }
    groups, number = [], 0
    for group in optimizer.state_dict()["param_groups"]:
        groups.append({**group, "params": list(range(number, number + len(group["params"])))})
        number += len(group["params"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
