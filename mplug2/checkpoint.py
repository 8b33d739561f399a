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
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mplug2.config import ModelConfig
from mplug2.data.text import Tokenizer
from mplug2.dataclass_tools import from_dict
from mplug2.model.mplug2 import MPLUG2
from mplug2.tasks import COMPONENTS, NEW_HEADS

FORMAT = 1
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
NEW_MODULES = tuple(part for name in NEW_HEADS for part in COMPONENTS[name])
"""Modules that fine-tuning may initialize, because the checkpoint of a pre-training lacks them."""
LOCAL_TEMPORAL = re.compile(r"^vision_encoder\.blocks\.\d+\.lt[12]\.")


class CheckpointError(ValueError):
    """A folder that is no checkpoint, a damaged one, or one of another model. The message names the folder."""


@dataclass(frozen=True)
class PreprocessConfig:
    """How media and text have to be prepared for a model."""

    frames: int = 4
    """Frames that are taken of a clip."""
    max_words: int = 30
    """Words after which a text is cut."""


def save_model(
    folder: Path | str, model: MPLUG2, tokenizer: Tokenizer, preprocess: PreprocessConfig,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the three files that inference needs into `folder`, which is made; the weights as `dtype`, if one is given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "format": FORMAT, "task": model.task, "model": dataclasses.asdict(model.config),
        "preparation": dataclasses.asdict(preprocess), "classes": model.classes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.json")


def read_config(folder: Path | str) -> tuple[str, ModelConfig, PreprocessConfig]:
    """The task, the model's settings and the preprocess that a checkpoint was saved with."""
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
        return saved["task"], config, from_dict(PreprocessConfig, saved["preparation"], str(path))
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
) -> tuple[MPLUG2, Tokenizer, PreprocessConfig]:
    """Load a checkpoint, as the task it was saved with or as another `task` whose modules it has.

    `changes` are settings of the model that differ from the saved ones (dropout, say). `classes` are those of a
    fine-tuning that starts: a head that the checkpoint lacks, or has for other classes, then starts anew, and
    `model.newly_initialized` names its parameters. Without `classes` nothing may be missing.
    """
    if (Path(folder) / "manifest.json").exists():
        verify(folder, MODEL_FILES)
    saved_task, config, preprocess = read_config(folder)
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
        missing = NEW_MODULES
    model.newly_initialized = load_weights(model, Path(folder) / "model.safetensors", saved_task, anew, missing)
    return model.eval(), tokenizer, preprocess


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
    new = [name for name in wanted if name.startswith(tuple(f"{part}." for part in anew))
           or (name not in weights and name.split(".")[0] in missing)]
    for name in new:
        del wanted[name]
        weights.pop(name, None)
    lines = [
        f"  {name}: expected {tuple(tensor.shape)}, "
        + (f"found {tuple(weights[name].shape)}" if name in weights else "not in the file")
        for name, tensor in wanted.items() if name not in weights or weights[name].shape != tensor.shape
    ]
    absent = {part for name, parts in COMPONENTS.items() if name not in model.components for part in parts}
    # A caption model has the universal layers, but not what only text or only vision needs of them; a classifier has
    # a part for each task; and a model of images may do without local temporal modules.
    partly = ("universal.", "classifier.")
    lines += [
        f"  {name}: not part of this model" for name in weights
        if name not in wanted and name.split(".")[0] not in absent and not name.startswith(partly)
        and ("temporal" in model.components or model.config.temporal_on_images or not LOCAL_TEMPORAL.search(name))
    ]
    if lines:
        shown = "\n".join(lines[:8]) + (f"\n  and {len(lines) - 8} more" if len(lines) > 8 else "")
        new_heads = sorted({name.split(".")[0] for name in wanted if name not in weights} & {*NEW_MODULES})
        hint = f"\n{', '.join(new_heads)}: train.py --task {model.task} --init trains it" if new_heads else ""
        raise CheckpointError(
            f"{path}, saved for {saved_task}, does not fit this model for {model.task}:\n{shown}{hint}"
        )
    model.load_state_dict({**model.state_dict(), **{name: weights[name] for name in wanted}})
    return new


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
