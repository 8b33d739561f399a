"""Distributed helpers: rank and world size, collectives (with gradients), means over the samples of all ranks.

Every rank computes its loss so that the average over the ranks is the loss of one process with the whole batch. DDP
and FSDP2 take this average of the gradients, so the gradients agree too.

Axes: b samples of this rank, B samples of all ranks.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

NO_TIMEOUT = timedelta(days=7)
"""Process groups never time out. The watchdog of `training.fault_tolerance` finds and names a hung rank."""


@dataclass(frozen=True)
class DistInfo:
    """This process's rank, the world size, the device and the number of ranks on each node."""

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int | None = None
    """None: all ranks are on one node."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_distributed(device: str = "auto") -> DistInfo:
    """Join the process group if torchrun started more than one process. `device`: auto, cpu, cuda, cuda:N or mps.

    ValueError for an unknown device, or one that this machine does not have.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if world_size > 1:
        # gloo next to NCCL: flags, sample names and offloaded gradients travel on the CPU without waiting for the GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", store=rendezvous_store(rank, world_size),
            rank=rank, world_size=world_size, timeout=NO_TIMEOUT,
        )
    return DistInfo(rank, world_size, chosen, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device called `name`. "auto" is CUDA where there is one, and "cuda" is the GPU of this local rank.

    Products of float32 matrices then use TF32 on the GPU: 10 bits of each factor's mantissa, float32 sums.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name}: this machine or this build of torch has no CUDA; use --device cpu")
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0; "
                             "start at most one process per GPU, or use --device cpu")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {device}: this machine or this build of torch has no MPS; use --device cpu")
    return device


def rendezvous_store(rank: int, world_size: int) -> dist.Store:
    """The store through which the ranks of this attempt find each other.

    torchrun's own store survives its restarts (--max-restarts). It still holds the addresses of processes that have
    ended, and a new process would wait for them forever (pytorch issue 135712). So rank 0 opens a new store and writes
    its port into the old one. A rank that reads a port where nobody answers has read an old one and tries again.
    """
    shared, _, _ = next(dist.rendezvous("env://", rank, world_size))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        own = dist.TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
        shared.set("port of this attempt", str(own.port))
        return own
    while True:
        port = int(shared.get("port of this attempt"))
        try:
            own = dist.TCPStore(host, port, world_size, is_master=False, timeout=timedelta(seconds=2))
        except dist.DistError:
            time.sleep(0.1)
        else:
            own.set_timeout(NO_TIMEOUT)
            return own


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """The tensors of all ranks, concatenated. The gradient of a rank's part is the sum over all ranks that used it."""

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
    """`b ...` of each rank -> `B ...` of all ranks, with gradients. b must be the same on every rank."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over all ranks, without gradients."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def global_mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of the valid `values` of all ranks, or 0 if none is valid.

    It returns this rank's part of the sum, times the world size, over the count of all ranks. The average of that over
    the ranks is the mean.
    """
    count = all_reduce_sum(valid.sum()).clamp(min=1)
    return (values * valid).sum() * world_size() / count


def all_gather_object(value) -> list:
    """`value` of every rank, in order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_to_all(vectors: list[Tensor], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Send one vector to each rank of a group. Returns the vectors from all of them, which have these sizes."""
    sent = torch.cat(vectors)
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [len(vector) for vector in vectors], group)
    return [*received.split(sizes)]


def all_gather_vectors(vector: Tensor, sizes: list[int]) -> list[Tensor]:
    """The vectors of all ranks, which have these sizes."""
    padded = torch.nn.functional.pad(vector, (0, max(sizes) - len(vector)))
    gathered = padded.new_empty(len(sizes) * len(padded))
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # older torch
    getattr(dist, name)(gathered, padded)
    return [part[:size] for part, size in zip(gathered.chunk(len(sizes)), sizes)]


class AllRanksError(ValueError):
    """An error that every rank raises, so only one of them has to print it."""


def first_to_report(error: Exception | str) -> bool:
    """Whether this rank prints an error: under torchrun, only the first of the ranks that find the same one.

    It needs no process group, and no other rank has to call it.
    """
    if isinstance(error, AllRanksError) and os.environ.get("RANK", "0") != "0":
        return False
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    key = f"error of attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}: {error}"
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=10)).add(key, 1) == 1
    except dist.DistError:  # the launcher has ended
        return True


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on any rank."""
    if world_size() == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return counts.bool().tolist()


def run_on_main(action: Callable[[], object], dist_info: DistInfo) -> None:
    """Run `action` on the main process while the others wait. If it fails, every rank raises AllRanksError."""
    message = ""
    if dist_info.is_main:
        try:
            action()
        except (ValueError, OSError) as error:
            message = f"{error}"
    if failed := all_gather_object(message)[0]:
        raise AllRanksError(failed)


# ---- sharded tensors -------------------------------------------------------------------------------------------------


def full_tensor(tensor: Tensor) -> Tensor:
    """A parameter or optimizer state in one piece, assembled from its shards. Every rank has to call it."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def shard_group(tensor: Tensor) -> dist.ProcessGroup:
    """The ranks that share a sharded tensor: all, or with HSDP those of this node."""
    return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `full_tensor`: shard a `tensor` that every rank has as `like` is sharded. One that is sharded like
    that already stays as it is."""
    if hasattr(like, "full_tensor") and tensor.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor  # takes a second, so only where tensors are sharded
        tensor = tensor.to(like.device, like.dtype)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor
