"""Checkpoints of a run."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from mplug2.checkpoint import CheckpointError, PreprocessConfig, save_model, verify, write_manifest
from mplug2.data.text import Tokenizer
from mplug2.distributed import DistInfo, full_tensor, shard_like
from mplug2.model.mplug2 import MPLUG2


def save_checkpoint(
    run: Path, name: str, model: MPLUG2, tokenizer: Tokenizer, preprocess: PreprocessConfig, training: dict, keep: int,
    score: float | None = None,
) -> Path:
    """Write `run/name` whole or not at all, let `run/last` point to it, and remove all but the newest `keep` and the
    best. `score`: what validation found at this step, if it was asked; higher is better.

    Raises CheckpointError if the disk is full or the files cannot be written; what was there before is untouched.
    """
    folder, aside, old = run / name, run / f".{name}.part", run / f".{name}.old"
    clean_partial(run)
    try:
        save_model(aside, model, tokenizer, preprocess)
        torch.save(training, aside / "training.pt")
        write_manifest(aside, training["step"], score)
        for path in (*aside.iterdir(), aside):
            _flush(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        last = run / "last"
        before = f"{os.readlink(last)} is whole" if last.exists() else "there is none"
        raise CheckpointError(f"{folder} could not be written ({error}). The checkpoint before it: {before}. Make room "
                              "on the disk, then go on with --resume") from error
    if folder.exists():
        os.rename(folder, old)
    os.rename(aside, folder)
    update_symlink(run / "last", name)
    if score is not None and ((best := _score(run / "best")) is None or score >= best):
        update_symlink(run / "best", name)
    _flush(run)
    # Never the one just written, though it may be of an earlier step than others, where a run was taken back.
    kept = {folder, (run / "best").resolve()}
    others = sorted((other for other in run.glob("step_*") if other != folder), reverse=True)
    for other in [*(other for other in others[keep - 1:] if other.resolve() not in kept), old]:
        shutil.rmtree(other, ignore_errors=other == old)
    return folder


def clean_partial(run: Path) -> None:
    """Clean up after a run that was killed while it saved. A checkpoint that was moved out of the way is put back,
    if the new one did not get its name yet."""
    for old in run.glob(".step_*.old"):
        folder = run / old.name[1: -len(".old")]
        with suppress(FileNotFoundError):  # another process of this run was faster
            if folder.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, folder)
    for part in run.glob(".step_*.part"):
        shutil.rmtree(part, ignore_errors=True)


def load_training(folder: Path) -> dict:
    """What `save_checkpoint` got as `training`. CheckpointError if the folder cannot be resumed or is damaged."""
    path = folder / "training.pt"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no training.pt: it can be evaluated, or start a new run by --init, "
                              "but not be resumed")
    verify(folder, ("training.pt",))
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _score(folder: Path) -> float | None:
    """The score in the manifest of a checkpoint; none if there is no such checkpoint."""
    path = folder / "manifest.json"
    return json.loads(path.read_text())["score"] if path.is_file() else None


def unsharded_copy(model: MPLUG2, process: DistInfo) -> MPLUG2 | None:
    """A model that is sharded (FSDP2), put together on the main process, in the memory of the CPU; None on the others.
    All of them have to call it."""
    weights = {}
    for name, tensor in model.state_dict().items():
        one_piece = full_tensor(tensor)
        if process.is_main:
            weights[name] = one_piece.cpu()
    if not process.is_main:
        return None
    with torch.device("meta"):  # neither memory nor random numbers
        one = MPLUG2(model.config, model.task, model.classes)
    one.load_state_dict(weights, assign=True)
    return one


def extra_state(objectives: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained along with the model: momentum copies, queues. All processes have to call it."""
    return {name: full_tensor(tensor).cpu() for name, tensor in objectives.state_dict().items() if name[:6] != "model."}


@torch.no_grad()
def load_extra_state(objectives: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """The inverse of `extra_state`. CheckpointError if the run has other parts now."""
    own = {name: tensor for name, tensor in objectives.state_dict().items() if name[:6] != "model."}
    # Runs saved before the teacher was renamed call it "momentum".
    saved = {name.replace("momentum.", "ema_teacher.", 1): tensor for name, tensor in saved.items()}
    if own.keys() != saved.keys():
        raise CheckpointError(f"the checkpoint has {', '.join(sorted(saved)) or 'nothing'} beside the model, this run "
                              f"{', '.join(sorted(own)) or 'nothing'}: it was saved with other settings")
    for name, tensor in own.items():
        tensor.copy_(shard_like(saved[name], tensor))


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def update_symlink(link: Path, name: str) -> None:
    """Let the symbolic link `link` point to `name`, in one step."""
    aside = link.with_name(f".{link.name}.part")
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, link)
