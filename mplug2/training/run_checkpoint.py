"""Checkpoints of a run: `step_0000375/`, ..., with the links `last` (the newest) and `best` (the highest score). Where
the file system has no symbolic links, these are text files with the name of the folder.

A checkpoint is written to a hidden folder, flushed to disk and then renamed. So a folder with its proper name is
complete, and a run that is killed while it saves keeps the checkpoint before. `BackgroundSave` does this while training
continues.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mplug2.checkpoint import (
    SHARD_INDEX,
    CheckpointError,
    HashingWriter,
    PreprocessConfig,
    real_folder,
    save_model,
    verify,
    write_manifest,
)
from mplug2.data.text import Tokenizer
from mplug2.model.mplug2 import MPLUG2
from mplug2.training.sharded_state import ShardReader, WriteShards


def save_checkpoint(
    run: Path, name: str, model: MPLUG2, tokenizer: Tokenizer, preprocess: PreprocessConfig, training: dict[str, Any],
    keep: int, data: Sequence[Path] | None = None, weights: Mapping[str, torch.Tensor] | None = None,
    write_shards: WriteShards | None = None,
) -> Path:
    """Write the checkpoint `run/name`, point `run/last` to it, and remove all except the newest `keep` and the best.

    `training` is the state of the run (`TrainState.state_dict`), `data` and `weights` are those of `save_model`. In a
    sharded run every other rank calls `write_shards` at the same time, with the same folder. Raises CheckpointError if
    the files cannot be written, on a full disk for example; older checkpoints are not touched then.
    """
    folder, part, old = run / name, partial_folder(run, name), run / f".{name}.old"
    try:
        prepare = partial(clean_partial, run)
        hashes = write_shards(part, prepare) if write_shards else prepare() or {}
        if missing := [shard for shard in hashes if not (part / shard).exists()]:
            raise OSError(f"{', '.join(missing)}: not in the folder; all nodes have to see the same disk")
        save_model(part, model, tokenizer, preprocess, data=data, weights=weights)
        with HashingWriter(part / "training.pt") as file:
            torch.save(training, file)
        write_manifest(part, training["step"], {**hashes, "training.pt": file.digest.hexdigest()})
        for path in (*part.iterdir(), part):
            _flush(path)
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        last = real_folder(run / "last")
        name = last.resolve().name
        previous = f"the previous one, {name}, is intact" if last.exists() else "there is no previous one"
        disk = isinstance(error, (OSError, SafetensorError))  # safetensors has an error of its own for a full disk
        advice = ". Free some disk space, then continue with --resume" if disk else ""
        cause = str(error) or type(error).__name__
        raise CheckpointError(f"{folder} could not be written ({cause}); {previous}{advice}") from error
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    update_symlink(run / "last", name)
    _flush(run)
    shutil.rmtree(old, ignore_errors=True)
    _prune(run, folder, keep)
    return folder


def partial_folder(run: Path, name: str) -> Path:
    """Where the checkpoint `run/name` is written before it gets its name."""
    return run / f".{name}.part"


class SaveSchedule:
    """When a checkpoint is due: `every` is a number of steps, such as 500, or of minutes, such as "15min".

    Minutes count from the start of the program or from its newest checkpoint. Each process has a clock of its own, so
    the main process decides. ValueError if `every` is neither.
    """

    def __init__(self, every: int | str):
        found = re.fullmatch(r"(\d+)|(\d+\.?\d*)min", str(every))
        self.steps, self.minutes = (int(found[1] or 0), float(found[2] or 0)) if found else (0, 0.0)
        if not self.steps and not self.minutes:
            raise ValueError(f"save_every={every!r}: expected a number of steps, such as 500, or of minutes, such as "
                             "15min")
        self.restart()

    def restart(self) -> None:
        """A checkpoint begins."""
        self.since = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the checkpoint of this step is to be saved."""
        if self.minutes:
            return time.monotonic() - self.since >= 60 * self.minutes
        return step % self.steps == 0


class BackgroundSave:
    """Runs one `save_checkpoint` at a time in a thread. As a context manager it ends with the last of them."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def start(self, action: Callable[[], object]) -> None:
        """`wait` first."""
        self.pending = self.thread.submit(action)

    @property
    def failed(self) -> bool:
        """Whether the action has failed; `wait` raises its error."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait for the action, if there is one, and raise its error."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def __enter__(self) -> "BackgroundSave":
        return self

    def __exit__(self, *_) -> None:
        self.thread.shutdown()  # waits
        if self.failed:  # another error ends the run
            print(f"\nwarning: {self.pending.exception()}", file=sys.stderr)


def record_score(run: Path, name: str, score: float, keep: int) -> None:
    """Store the validation score of the checkpoint `run/name` (higher is better). `run/best` points to the highest."""
    manifest = run / name / "manifest.json"
    part = manifest.with_suffix(".part")
    part.write_text(json.dumps({**json.loads(manifest.read_text()), "score": score}, indent=2))
    _flush(part)
    os.replace(part, manifest)
    if is_best(run, score):
        update_symlink(run / "best", name)
    _prune(run, run / name, keep)


def is_best(run: Path, score: float) -> bool:
    """Whether no checkpoint of the run has a higher validation score."""
    best = _score(run / "best")
    return best is None or score >= best


def _score(folder: Path) -> float | None:
    """The score in the manifest of a checkpoint, if there is one."""
    path = real_folder(folder) / "manifest.json"
    return json.loads(path.read_text())["score"] if path.is_file() else None


def _prune(run: Path, newest: Path, keep: int) -> None:
    """Remove all checkpoints except `newest`, the best, and as many others that `keep` remain.

    `newest` was written last, but a run that went back to an older checkpoint may have others of later steps.
    """
    others = sorted((folder for folder in run.glob("step_*") if folder != newest), reverse=True)
    for folder in others[keep - 1:]:
        if folder.resolve() != real_folder(run / "best").resolve():
            shutil.rmtree(folder)


def clean_partial(run: Path) -> None:
    """Clean up after a run that was killed while it saved.

    A checkpoint that was moved aside is moved back if the new one did not get its name yet.
    """
    for old in run.glob(".step_*.old"):
        folder = run / old.name[1: -len(".old")]
        with suppress(FileNotFoundError):  # another rank of this run was faster
            if folder.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, folder)
    for part in run.glob(".step_*.part"):
        shutil.rmtree(part, ignore_errors=True)


def load_training(folder: Path) -> dict[str, Any]:
    """The state of the run that `save_checkpoint` saved. CheckpointError if the folder has none or is damaged.

    The tensors of a sharded run are not read yet: `shards` is what `read_shards` reads them from.
    """
    path = folder / "training.pt"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no training.pt, so it cannot be resumed; evaluate it, or start a new run "
                              "from it with --init")
    verify(folder, ("training.pt",))
    training = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {**training, "shards": ShardReader(folder)} if (folder / SHARD_INDEX).is_file() else training


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def update_symlink(link: Path, name: str) -> None:
    """Point the link `link` to `name`, atomically: a symbolic link, or a text file where there are none."""
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    try:
        part.symlink_to(name)
    except OSError:  # exFAT, Google Drive, Windows without the privilege
        part.write_text(f"{name}\n")
    os.replace(part, link)
