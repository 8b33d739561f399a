"""The tensors of a sharded run in its checkpoints: every rank writes its own shards (torch.distributed.checkpoint).

    __0_0.distcp, __1_0.distcp, ...    the shards of each rank
    .metadata                          the shape of each tensor, and where its shards are

Any number of ranks can read them, however they share the model.
"""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from mplug2.checkpoint import SHARD_INDEX, CheckpointError, HashingWriter
from mplug2.distributed import NO_TIMEOUT

WriteShards = Callable[..., dict[str, str]]
"""`write(folder, prepare)` of ShardWriter, with the tensors to write."""


class ShardWriter:
    """Writes shards without disturbing the collectives of training: in a process group of its own (gloo).

    The constructor and `write` are collective: every rank has to call them.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)

    def stage(self, tensors: Mapping[str, Tensor]) -> WriteShards:
        """Copy this rank's shards to the CPU, where training will not change them. Returns what writes them."""
        return partial(self.write, {name: _copy_to_cpu(tensor) for name, tensor in tensors.items()})

    def write(self, staged: dict[str, Tensor], folder: Path, prepare: Callable[[], object] = str) -> dict[str, str]:
        """Write the shards of all ranks, flushed to disk, to a folder that all ranks see. A thread may call it.

        The main process calls `prepare` first. It gets the SHA-256 of each file; the other ranks get an empty
        dictionary. If a rank failed, the main process raises its OSError, or a RuntimeError for any other error.
        """
        is_main, writer = dist.get_rank(self.group) == 0, _HashingWriter(folder, prepare)
        try:
            dcp.save(staged, storage_writer=writer, process_group=self.group)
        except CheckpointException as error:  # on every rank; it is not an Exception
            if not is_main:
                return {}
            rank, (cause, _) = next(iter(error.failures.items()))
            raise (OSError if isinstance(cause, OSError) else RuntimeError)(f"rank {rank}: {cause}") from error
        found = [None] * dist.get_world_size(self.group) if is_main else None
        dist.gather_object(writer.fs.hashes, found, group=self.group)
        return {name: digest for hashes in found or () for name, digest in hashes.items()}


@torch.no_grad()
def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy whose shard is in CPU memory. `FileSystemWriter.stage` of torch takes several times as long on a CPU."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    copied = tensor.detach()  # of the same mesh, which may be one of GPUs: `DTensor.from_local` would go back to it
    copied._local_tensor = tensor.to_local().to("cpu", copy=True)
    return copied


class _HashingWriter(dcp.FileSystemWriter):
    def __init__(self, folder: Path, prepare: Callable[[], object]):
        super().__init__(folder, per_thread_copy_ahead=0)  # the shards are on the CPU
        self.fs, self.prepare = _HashingFileSystem(), prepare

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:  # here, and not before, because all ranks learn of an error
            self.prepare()
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def storage_meta(self) -> None:
        """Not the path of the folder, which will have another name."""


class _HashingFileSystem(FileSystem):
    """Files whose SHA-256 is computed while they are written: `hashes`, by name."""

    def __init__(self):
        self.hashes: dict[str, str] = {}

    def create_stream(self, path: Path, mode: str) -> HashingWriter:
        return HashingWriter(path, lambda digest: self.hashes.update({path.name.removesuffix(".tmp"): digest}))


class ShardReader(dcp.FileSystemReader):
    """The shards in a folder. It reads their index, once, and raises CheckpointError for one that could run code."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.fs = _NamingFileSystem()
        with open(folder / SHARD_INDEX, "rb") as file:
            _Unpickler(file).load()
        self.metadata = super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata


class _NamingFileSystem(FileSystem):
    """Errors name the file that was read."""

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except Exception as error:
            raise OSError(f"{path.name}: {error}") from error


def read_shards(shards: ShardReader, templates: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors that `TrainState.write_shards` has written, like those of `TrainState.state_dict`.

    `templates` are this run's tensors: `objectives/NAME`, and for the optimizer's state `optimizer/PARAMETER`. A saved
    tensor gets the device and the sharding of its template if the shapes are equal, so this rank reads its own shards
    only. Any other is read in one piece, to the CPU. Each file is opened once. CheckpointError if one cannot be read.
    """
    tensors = {}
    for key, saved in shards.metadata.state_dict_metadata.items():
        like = templates.get(key, templates.get(key.rpartition("/")[0]))
        fits = like is not None and like.shape == saved.size and like.dim() > 0  # counters stay on the CPU
        tensors[key] = (torch.empty_like(like, dtype=saved.properties.dtype, requires_grad=False) if fits else
                        torch.empty(saved.size, dtype=saved.properties.dtype))
    try:
        with warnings.catch_warnings():  # it warns that it is not collective
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=shards, no_dist=True)
    except CheckpointException as error:  # it is not an Exception
        cause, _ = next(iter(error.failures.values()))
        raise CheckpointError(f"the shards in {shards.path} cannot be read ({cause}); use an older checkpoint with "
                              "--resume-from") from error
    found: dict[str, Any] = {"objectives": {}, "optimizer": {}}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        if kind == "objectives":
            found[kind][name] = tensor
        else:
            parameter, _, name = name.rpartition("/")
            found[kind].setdefault(parameter, {})[name] = tensor
    return found


class _Unpickler(pickle.Unpickler):
    """It creates objects of these classes only."""

    ALLOWED = {
        "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.metadata": (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise CheckpointError(f"{SHARD_INDEX} of the checkpoint names {module}.{name}, which does not belong to an "
                                  "index of tensors; do not use this checkpoint")
        return super().find_class(module, name)
