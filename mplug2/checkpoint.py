"""Checkpoints: a folder that says by itself what it is.

    model.safetensors    the weights
    config.json          task, settings of the model, how media and text were prepared
    tokenizer.json       the vocabulary
    training.pt          optimizer, schedule, generators: what `--resume` needs and nothing else does
    manifest.json        size and SHA-256 of each of these files, the step, and what validation found there

A folder is written aside, flushed to the disk and renamed, so that one with its right name is whole. In a run, `last`
points to the newest and `best` to the one with the highest score.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mplug2.config import ModelConfig, from_dict
from mplug2.distributed import Process, part_of, whole
from mplug2.model import FRESH, MPLUG2
from mplug2.tokenizer import Tokenizer

FORMAT = 1
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
HEADS_AND_MODULES = (
    "vision_encoder", "vision_projection", "vision_norm", "text_encoder", "universal", "fusion", "decoder",
    "contrastive_vision", "contrastive_text", "temperature", "matching_head", "masked_head",
    *FRESH,
)
LOCAL_TEMPORAL = re.compile(r"^vision_encoder\.blocks\.\d+\.lt[12]\.")


class CheckpointError(ValueError):
    """A folder that is no checkpoint, a damaged one, or one of another model. The message names the folder."""


@dataclass(frozen=True)
class Preparation:
    """How media and text have to be prepared for a model."""

    frames: int = 4
    """Frames that are taken of a clip."""
    max_words: int = 30
    """Words after which a text is cut."""


def save_model(
    folder: Path | str, model: MPLUG2, tokenizer: Tokenizer, preparation: Preparation, dtype: torch.dtype | None = None
) -> None:
    """Write the three files that inference needs into `folder`, which is made; the weights as `dtype`, if one is given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "format": FORMAT, "task": model.task, "model": dataclasses.asdict(model.config),
        "preparation": dataclasses.asdict(preparation), "classes": model.classes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.json")


def read_config(folder: Path | str) -> tuple[str, ModelConfig, Preparation]:
    """The task, the model's settings and the preparation that a checkpoint was saved with."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: there is no {path.name} in it; "
                              "expected a folder such as runs/tiny/last")
    try:
        saved = json.loads(path.read_text())
        found = saved["format"]
        if found != FORMAT:
            raise CheckpointError(f"{path}: format {found}, this version reads format {FORMAT}")
        config = from_dict(ModelConfig, saved["model"], str(path))
        return saved["task"], config, from_dict(Preparation, saved["preparation"], str(path))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a model ({type(error).__name__}: {error})") from error


def read_classes(folder: Path | str) -> dict[str, tuple[str, ...]]:
    """The names of the classes that a checkpoint tells apart, by task."""
    saved = json.loads((Path(folder) / "config.json").read_text())
    return {task: tuple(names) for task, names in saved.get("classes", {}).items()}


def load_model(
    folder: Path | str, task: str | None = None, changes: dict | None = None,
    classes: dict[str, tuple[str, ...]] | None = None,
) -> tuple[MPLUG2, Tokenizer, Preparation]:
    """Load a checkpoint, as the task it was saved with or as another `task` whose modules it has.

    `changes` are settings of the model that differ from the saved ones (dropout, say). `classes` are those of a
    fine-tuning that starts: a head that the checkpoint lacks, or has for other classes, then starts anew, and
    `model.fresh` names its parameters. Without `classes` nothing may be missing.
    """
    if (Path(folder) / "manifest.json").exists():
        verify(folder, MODEL_FILES)
    saved_task, config, preparation = read_config(folder)
    if changes:
        config = dataclasses.replace(config, **changes)
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer.json")
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    saved_classes = read_classes(folder)
    model = MPLUG2(config, task or saved_task, saved_classes if classes is None else classes)
    anew, missing = (), ()
    if classes is not None:
        anew = tuple(f"classifier.{name}" for name, names in model.classes.items() if names != saved_classes.get(name))
        missing = FRESH
    model.fresh = load_weights(model, Path(folder) / "model.safetensors", saved_task, anew, missing)
    return model.eval(), tokenizer, preparation


def load_weights(model: MPLUG2, path: Path, saved_task: str, anew: tuple[str, ...] = (), missing: tuple[str, ...] = ()
                 ) -> list[str]:
    """Fill `model` from a file. Every parameter must be there in its shape; what is left over must belong to modules
    that the model's task does not have. Left as they are, and returned by name, are parameters of the modules `anew`,
    and of the modules `missing` if the file lacks them."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the checkpoint is not whole")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read, it may be cut off ({error}); use an older checkpoint") from error
    wanted = model.state_dict()
    fresh = [name for name in wanted if name.startswith(tuple(f"{part}." for part in anew))
             or (name not in weights and name.split(".")[0] in missing)]
    for name in fresh:
        del wanted[name]
        weights.pop(name, None)
    lines = [
        f"  {name}: expected {tuple(tensor.shape)}, "
        + (f"found {tuple(weights[name].shape)}" if name in weights else "not in the file")
        for name, tensor in wanted.items() if name not in weights or weights[name].shape != tensor.shape
    ]
    absent = {part for part in HEADS_AND_MODULES if not hasattr(model, part)}
    # A caption model has the universal layers, but not what only text or only vision needs of them; a classifier has
    # a part for each task; and a model of images may do without local temporal modules.
    partly = ("universal.", "classifier.")
    lines += [
        f"  {name}: not part of this model" for name in weights
        if name not in wanted and name.split(".")[0] not in absent and not name.startswith(partly)
        and (model.parts.temporal or model.config.temporal_on_images or not LOCAL_TEMPORAL.search(name))
    ]
    if lines:
        shown = "\n".join(lines[:8]) + (f"\n  and {len(lines) - 8} more" if len(lines) > 8 else "")
        new_heads = sorted({name.split(".")[0] for name in wanted if name not in weights} & {*FRESH})
        hint = f"\n{', '.join(new_heads)}: train.py --task {model.task} --init trains it" if new_heads else ""
        raise CheckpointError(
            f"{path}, saved for {saved_task}, does not fit this model for {model.task}:\n{shown}{hint}"
        )
    model.load_state_dict({**model.state_dict(), **{name: weights[name] for name in wanted}})
    return fresh


def save_checkpoint(
    run: Path, name: str, model: MPLUG2, tokenizer: Tokenizer, preparation: Preparation, training: dict, keep: int,
    score: float | None = None,
) -> Path:
    """Write `run/name` whole or not at all, let `run/last` point to it, and remove all but the newest `keep` and the
    best. `score`: what validation found at this step, if it was asked; higher is better.

    Raises CheckpointError if the disk is full or the files cannot be written; what was there before is untouched.
    """
    folder, aside, old = run / name, run / f".{name}.part", run / f".{name}.old"
    recover(run)
    try:
        save_model(aside, model, tokenizer, preparation)
        torch.save(training, aside / "training.pt")
        _write_manifest(aside, training["step"], score)
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
    point(run / "last", name)
    if score is not None and ((best := _score(run / "best")) is None or score >= best):
        point(run / "best", name)
    _flush(run)
    # Never the one just written, though it may be of an earlier step than others, where a run was taken back.
    kept = {folder, (run / "best").resolve()}
    others = sorted((other for other in run.glob("step_*") if other != folder), reverse=True)
    for other in [*(other for other in others[keep - 1 :] if other.resolve() not in kept), old]:
        shutil.rmtree(other, ignore_errors=other == old)
    return folder


def recover(run: Path) -> None:
    """Clean up after a run that was killed while it saved. A checkpoint that was moved out of the way is put back,
    if the new one did not get its name yet."""
    for old in run.glob(".step_*.old"):
        folder = run / old.name[1 : -len(".old")]
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
    if not (folder / "manifest.json").is_file():
        raise _damaged(folder, "there is no manifest.json")
    verify(folder, ("training.pt",))
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def verify(folder: Path | str, names: tuple[str, ...]) -> None:
    """Compare files of a checkpoint with its manifest. CheckpointError names the first that differs, and offers the
    newest whole checkpoint before it."""
    if problem := _problem(Path(folder), names):
        raise _damaged(Path(folder), problem)


def _problem(folder: Path, names: tuple[str, ...]) -> str:
    """What is wrong with some files of a checkpoint that has a manifest, or nothing."""
    path = folder / "manifest.json"
    try:
        files = json.loads(path.read_text())["files"]
        for name in names:
            expected = files[name]
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size:,} bytes, its manifest says {expected['bytes']:,}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} is not what was saved: its SHA-256 differs from the manifest's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"
    return ""


def _whole(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and not _problem(folder, (*MODEL_FILES, "training.pt"))


def _damaged(folder: Path, problem: str) -> CheckpointError:
    real = folder.resolve()
    older = sorted((other for other in real.parent.glob("step_*") if other.name < real.name), reverse=True)
    whole = next((other for other in older if _whole(other)), None)
    offer = f"the one before it is whole: go on from it by --resume --resume-from {whole.name}" if whole else (
        "there is no whole one before it in this run")
    return CheckpointError(f"the checkpoint {folder} ({real.name}) is damaged: {problem}; {offer}")


def _write_manifest(folder: Path, step: int, score: float | None) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
    }
    manifest = {"step": step, "score": score, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))  # without an end, any cut shows


def _score(folder: Path) -> float | None:
    """The score in the manifest of a checkpoint; none if there is no such checkpoint."""
    path = folder / "manifest.json"
    return json.loads(path.read_text())["score"] if path.is_file() else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def whole_model(model: MPLUG2, process: Process) -> MPLUG2 | None:
    """A model that is sharded (FSDP2), put together on the main process, in the memory of the CPU; None on the others.
    All of them have to call it."""
    weights = {}
    for name, tensor in model.state_dict().items():
        one_piece = whole(tensor)
        if process.is_main:
            weights[name] = one_piece.cpu()
    if not process.is_main:
        return None
    with torch.device("meta"):  # neither memory nor random numbers
        one = MPLUG2(model.config, model.task, model.classes)
    one.load_state_dict(weights, assign=True)
    return one


def state_beside(objectives: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained along with the model: momentum copies, queues. All processes have to call it."""
    return {name: whole(tensor).cpu() for name, tensor in objectives.state_dict().items() if name[:6] != "model."}


@torch.no_grad()
def load_beside(objectives: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """The inverse of `state_beside`. CheckpointError if the run has other parts now."""
    own = {name: tensor for name, tensor in objectives.state_dict().items() if name[:6] != "model."}
    if own.keys() != saved.keys():
        raise CheckpointError(f"the checkpoint has {', '.join(sorted(saved)) or 'nothing'} beside the model, this run "
                              f"{', '.join(sorted(own)) or 'nothing'}: it was saved with other settings")
    for name, tensor in own.items():
        tensor.copy_(part_of(saved[name], tensor))


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point(link: Path, name: str) -> None:
    """Let the symbolic link `link` point to `name`, in one step."""
    aside = link.with_name(f".{link.name}.part")
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, link)
