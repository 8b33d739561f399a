"""Processes: who am I, what do the others have, means that count everybody's samples, and models that are shared.

Every loss of a process is written so that the average over the processes, which DDP and FSDP2 take of the gradients, is
the loss (and the gradient) of a single process with the whole batch.

    ddp     each process has the whole model and sums the gradients with the others
    fsdp    each process has a part of every parameter, its gradient and its optimizer state; the parameters of a block
            are put together when the block runs, and taken apart after it (FSDP2, `fully_shard`)

Axes: b samples of this process, B samples of all processes.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class DistInfo:
    """This process among those that torchrun started."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_distributed(device: str = "auto") -> DistInfo:
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
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", store=rendezvous_store(rank, world), rank=rank,
            world_size=world, timeout=timedelta(days=7),
        )
    return DistInfo(rank, world, chosen)


def rendezvous_store(rank: int, world: int) -> dist.Store:
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


def shutdown() -> None:
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


def all_gather_with_grad(x: Tensor) -> Tensor:
    """`b ...` of each process -> `B ...` of all, with gradients. Every process must bring the same b."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over the processes, without gradients."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def global_mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of `values` where `valid`, over the valid ones of all processes; 0 if there is none.

    Returned is this process's share of it, times the number of processes: the average over the processes is the mean.
    """
    count = all_reduce_sum(valid.sum()).clamp(min=1)
    return (values * valid).sum() * world_size() / count


def all_gather_object(value) -> list:
    """`value` of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class AllRanksError(ValueError):
    """Raised by all processes alike, so that one of them has to say it."""


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on any process."""
    if world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool().tolist()


def run_on_main(action, process: DistInfo) -> None:
    """Let the main process do something while the others wait; if it fails, all of them raise AllRanksError."""
    message = ""
    if process.is_main:
        try:
            action()
        except (ValueError, OSError) as error:
            message = f"{error}"
    if failed := all_gather_object(message)[0]:
        raise AllRanksError(failed)


# ---- models that processes share -------------------------------------------------------------------------------------


def full_tensor(tensor: Tensor) -> Tensor:
    """A parameter or optimizer state put together of its parts. All processes have to call it at the same time."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `whole`, for a `tensor` that every process has: sharded as `like` is."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        tensor = tensor.to(like.device, like.dtype)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor
