"""Processes: who am I, what do the others have, means that count everybody's samples, and models that are shared.

Every loss of a process is written so that the average over the processes, which DDP and FSDP2 take of the gradients, is
the loss (and the gradient) of a single process with the whole batch.

    ddp     each process has the whole model and sums the gradients with the others
    fsdp    each process has a part of every parameter, its gradient and its optimizer state; the parameters of a block
            are put together when the block runs, and taken apart after it (FSDP2, `fully_shard`)

Axes: b samples of this process, B samples of all processes.
"""

import inspect
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto") -> Process:
    """Join the process group if torchrun started more than one process. `device`: auto, cpu, cuda, cuda:1, mps."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: expected auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device}: this machine or this build of torch has no CUDA; use --device cpu")
        torch.cuda.set_device(chosen)
    if world > 1:
        # gloo beside NCCL: flags and names of samples travel without waiting for the GPU, offloaded gradients too.
        # No operation of the group times out: a process that hangs is found, and named, by survival.Watchdog.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", store=meeting_point(rank, world), rank=rank,
            world_size=world, timeout=timedelta(days=7),
        )
    return Process(rank, world, chosen)


def meeting_point(rank: int, world: int) -> dist.Store:
    """The store through which the processes find each other, of this attempt alone. The one that torchrun shares with
    them lives on over its restarts (--max-restarts) and still holds the addresses of processes that are gone, for which
    a new process would wait for ever (pytorch issue 135712). So process 0 opens a new one and leaves its port in the
    old; who reads a port where nobody answers has read an old one, and reads again."""
    shared, _, _ = next(dist.rendezvous("env://", rank, world))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        own = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
        shared.set("port of this attempt", str(own.port))
        return own
    while True:
        port = int(shared.get("port of this attempt"))
        try:
            own = dist.TCPStore(host, port, world, is_master=False, timeout=timedelta(seconds=2))
        except dist.DistError:
            time.sleep(0.1)
        else:
            own.set_timeout(timedelta(days=7))
            return own


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """All processes' tensors, one after the other; the gradient of a part is summed over all who used it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """`b ...` of each process -> `B ...` of all, with gradients. Every process must bring the same b."""
    return _Gather.apply(x) if world_size() > 1 else x


def total(x: Tensor) -> Tensor:
    """The sum over the processes, without gradients."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def global_mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of `values` where `valid`, over the valid ones of all processes; 0 if there is none.

    Returned is this process's share of it, times the number of processes: the average over the processes is the mean.
    """
    count = total(valid.sum()).clamp(min=1)
    return (values * valid).sum() * world_size() / count


def collect(value) -> list:
    """`value` of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class EverywhereError(ValueError):
    """Raised by all processes alike, so that one of them has to say it."""


def anywhere(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on any process."""
    if world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool().tolist()


def together(action, process: Process) -> None:
    """Let the main process do something while the others wait; if it fails, all of them raise EverywhereError."""
    message = ""
    if process.is_main:
        try:
            action()
        except (ValueError, OSError) as error:
            message = f"{error}"
    if failed := collect(message)[0]:
        raise EverywhereError(failed)


# ---- models that processes share -------------------------------------------------------------------------------------


def parallelise(
    module: nn.Module, process: Process, sharded: bool, block: type[nn.Module], low_precision: bool,
    offload: bool,
) -> nn.Module:
    """`module` on the device of `process`, with gradients that are averaged over the processes.

    With `sharded` by FSDP2: every `block` (module of this type) is put together when it runs, in bfloat16 if
    `low_precision`; what is in no block stays together for the whole step. With `offload` parts and optimizer state
    are kept, and updated, in the memory of the CPU. Make the optimizer afterwards: FSDP2 replaces the parameters.
    """
    if not sharded:
        module.to(process.device)
        if process.world == 1:
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
    settings = {
        "mesh": init_device_mesh(process.device.type, (process.world,)),
        # FSDP2 cannot share out a single number: these stay whole, see `average_replicated`.
        "ignored_params": {parameter for parameter in module.parameters() if parameter.dim() == 0},
        "offload_policy": CPUOffloadPolicy(pin_memory=process.device.type == "cuda") if offload else OffloadPolicy(),
    }
    if low_precision:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in module.modules():
        if isinstance(part, block):
            fully_shard(part, **settings)
    fully_shard(module, **settings)
    for part in module.modules():  # put together once, as accumulation expects of blocks that a batch passes by, too
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()
    for parameter in settings["ignored_params"]:
        parameter.data = parameter.data.to("cpu" if offload else process.device)
    for buffers in module.modules():
        for name, buffer in buffers.named_buffers(recurse=False):
            setattr(buffers, name, buffer.to(process.device))
    return module


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager:
    """Within it, forward and backward of a micro-batch: only the `last` one of a step exchanges gradients."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def average_replicated(module: nn.Module) -> None:
    """After backward: the gradients that FSDP2 does not average, those of single numbers."""
    if isinstance(module, FSDPModule) and world_size() > 1:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


def clip_gradient(parameters: list[nn.Parameter], limit: float) -> Tensor:
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


def separate(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that are whole groups of their own: an update cannot mix them with sharded ones."""
    for group in list(optimizer.param_groups):
        wholes = [parameter for parameter in group["params"] if not isinstance(parameter, DTensor)]
        if wholes and len(wholes) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if isinstance(parameter, DTensor)]
            optimizer.add_param_group({**group, "params": wholes})


def whole(tensor: Tensor) -> Tensor:
    """A parameter or optimizer state put together of its parts. All processes have to call it at the same time."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `whole`, for a `tensor` that every process has: sharded as `like` is."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        tensor = tensor.to(like.device, like.dtype)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the optimizer knows, by name of the parameter, put together: the same for any number of processes."""
    return {
        name: {key: whole(value).cpu() for key, value in optimizer.state[parameter].items()}
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
        number: {key: part_of(value, parameter) for key, value in saved[names[parameter]].items()}
        for number, parameter in enumerate(ordered) if names[parameter] in saved
    }
    groups, number = [], 0
    for group in optimizer.state_dict()["param_groups"]:
        groups.append({**group, "params": list(range(number, number + len(group["params"])))})
        number += len(group["params"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
