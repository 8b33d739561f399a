"""Processes: who am I, what do the others have, and means that count everybody's samples.

Every loss of a process is written so that the average over the processes, which DistributedDataParallel takes of the
gradients, is the loss (and the gradient) of a single process with the whole batch.

Axes: b samples of this process, B samples of all processes.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=world)
    return Process(rank, world, chosen)


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
