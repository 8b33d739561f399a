"""Model folders: a model with everything needed to run it.

    model.safetensors    the weights
    config.json          format, task, model settings, preprocessing, class names
    tokenizer.json       the vocabulary

The checkpoints of a run (`training/run_checkpoint.py`) are model folders with more files:

    training.pt          optimizer, schedule, generators: only `--resume` reads it
    .metadata, *.distcp  of a sharded run: its optimizer and EMA teacher (training/sharded_state.py)
    manifest.json        the step, its validation score, and the size and SHA-256 of every other file

A folder without a manifest is loaded as it is. With a manifest, every file is verified before it is used.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mplug2 import hub
from mplug2.config import ModelConfig
from mplug2.data.text import Tokenizer
from mplug2.dataclass_tools import from_dict
from mplug2.did_you_mean import did_you_mean
from mplug2.model.mplug2 import MPLUG2
from mplug2.tasks import COMPONENTS, NEW_HEADS

FORMAT = 1
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
RUN_FILES = (*MODEL_FILES, "training.pt")
SHARDS, SHARD_INDEX = ".distcp", ".metadata"
"""End of the names of shards, and the file that says what they hold."""
NEW_MODULES = tuple(module for name in NEW_HEADS for module in COMPONENTS[name])
"""Modules that fine-tuning may initialize: a pre-training checkpoint does not have them."""
LOCAL_TEMPORAL = re.compile(r"^vision_encoder\.blocks\.\d+\.lt[12]\.")
LISTED = 8
"""An error message names this many parameters and counts the rest."""


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or a checkpoint that is damaged or belongs to another model."""


@dataclass(frozen=True)
class PreprocessConfig:
    """How the inputs of a model are prepared."""

    frames: int = 4
    """Frames sampled from each video."""
    max_words: int = 30
    """Longest text in words; the rest is cut off."""
    max_length: int = 0
    """Tokens of the longest caption or answer in the training data; 0: not known."""


def save_model(
    folder: Path | str, model: MPLUG2, tokenizer: Tokenizer, preprocess: PreprocessConfig,
    dtype: torch.dtype | None = None, data: Sequence[Path | str] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the three files of a model folder, creating `folder`. The weights are saved as `dtype` if one is given.

    `data` are the folders that the model was trained on, none for the tiny world; None leaves them unrecorded.
    `weights` replace those of the model, which may be sharded, or in training.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if weights is None else weights
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "format": FORMAT, "task": model.task, "model": dataclasses.asdict(model.config),
        "preprocess": dataclasses.asdict(preprocess), "classes": model.classes,
    }
    if data is not None:
        config["data"] = [os.path.abspath(folder) for folder in data]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.json")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it private


def real_folder(folder: Path | str) -> Path:
    """The checkpoint folder that a path such as runs/tiny/last names, or an address such as hf://user/name (hub.py).
    On a file system without symbolic links, `last` and `best` are text files with the name of a folder next to them.
    """
    if hub.is_address(str(folder)):
        return hub.download(str(folder))
    path = Path(folder)
    if not path.is_file():
        return path
    named = path.parent / path.read_bytes()[:200].decode(errors="ignore").strip()
    return named if named.is_dir() else path


def read_config(folder: Path | str) -> tuple[str, ModelConfig, PreprocessConfig]:
    """The task, the model settings and the preprocessing that a model was saved with."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        problem = f"it does not contain {path.name}" if path.parent.is_dir() else "there is no such folder"
        raise CheckpointError(f"{folder} is not a checkpoint: {problem}; expected a folder that train.py has written, "
                              "such as runs/tiny/last, or tiny_data/pretrained")
    try:
        saved = json.loads(path.read_text())
        if saved["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {saved['format']}, but this version reads format {FORMAT}")
        if "class_token" not in saved["model"] and saved["model"].get("universal_readout") == "figure":
            raise CheckpointError(f"{path}: universal_readout='figure' of this older checkpoint has no cross-attention "
                                  "inside the universal layers; train it again with --form figure")
        config = from_dict(ModelConfig, renewed(saved["model"]), str(path))
        preprocess = saved["preprocess" if "preprocess" in saved else "preparation"]  # the key of older checkpoints
        preprocess = {"max_length": 0, **preprocess}  # older checkpoints do not know it
        return saved["task"], config, from_dict(PreprocessConfig, preprocess, str(path))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a model ({type(error).__name__}: {error})") from error


def renewed(model: dict) -> dict:
    """The model settings of a checkpoint, with those that older ones did not have or named otherwise."""
    model = {"class_token": "released", "boxes": "soft_argmax", **model}
    if not model.pop("temporal_downsampling", True):
        model["temporal_stride"] = 0
    return model


def read_json_object(path: Path | str) -> dict:
    """The JSON object in a file. ValueError if there is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def checkpoint_classes(folder: Path | str) -> dict[str, tuple[str, ...]]:
    """The class names that a model was trained with, by task."""
    saved = json.loads((Path(folder) / "config.json").read_text())
    return {task: tuple(names) for task, names in saved.get("classes", {}).items()}


def read_data(folder: Path | str) -> list[Path] | None:
    """The folders that a model was trained on; none for the tiny world, and None if they were not recorded."""
    saved = json.loads((Path(folder) / "config.json").read_text())
    return [Path(root) for root in saved["data"]] if "data" in saved else None


def load_model(
    folder: Path | str, task: str | None = None, changes: dict | None = None,
    classes: dict[str, tuple[str, ...]] | None = None, reinit: Sequence[str] = (),
    with_weights: bool = True,
) -> tuple[MPLUG2, Tokenizer, PreprocessConfig]:
    """Load a model folder for the task it was saved with, or for another `task` whose modules it has.

    `changes` are model settings that differ from the saved ones, such as dropout. `classes` are the class names of a
    fine-tuning run that starts here. A head that the checkpoint lacks, or has for other classes, is then initialized,
    and `model.newly_initialized` names its parameters. Without `classes` every parameter must be in the checkpoint,
    except those that match `reinit`: names or patterns of parameters or modules, which are initialized in any case.
    CheckpointError for a pattern that matches nothing. Without `with_weights` the model is on the meta device.
    """
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        verify(folder, MODEL_FILES if with_weights else MODEL_FILES[1:])
    saved_task, saved_config, preprocess = read_config(folder)
    config = dataclasses.replace(saved_config, **(changes or {}))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model has only "
                              f"{config.vocab_size} word embeddings; copy the tokenizer.json that belongs to the model")
    saved_classes = checkpoint_classes(folder)
    with nullcontext() if with_weights else torch.device("meta"):
        model = MPLUG2(config, task or saved_task, saved_classes if classes is None else classes)
    new, may_be_new = tuple(reinit), ()
    for pattern in reinit:
        if not any(matches(name, pattern) for name in model.state_dict()):
            raise CheckpointError(f"reinit={pattern!r} matches no parameter of this model"
                                  f"{did_you_mean(pattern, [name for name, _ in model.named_modules()])}; its modules "
                                  f"are {', '.join(name for name, _ in model.named_children())}")
    if classes is not None:
        new += tuple(f"classifier.{name}" for name, names in model.classes.items() if names != saved_classes.get(name))
        may_be_new = NEW_MODULES
    if not with_weights:
        return model.eval(), tokenizer, preprocess
    try:
        model.newly_initialized = load_weights(model, folder / "model.safetensors", saved_task, new, may_be_new)
    except CheckpointError as error:
        changed = [f"{name}={value}" for name, value in (changes or {}).items() if value != getattr(saved_config, name)]
        if not changed:
            raise
        raise CheckpointError(f"{error}\nIts settings differ from {', '.join(changed)}: leave out what changes the "
                              "shape of its weights, or train from scratch") from error
    return model.eval(), tokenizer, preprocess


def load_weights(
    model: MPLUG2, path: Path, saved_task: str, new: tuple[str, ...] = (), may_be_new: tuple[str, ...] = (),
) -> list[str]:
    """Fill `model` from a file of weights, and return the names of the parameters that keep their initial values.

    These are the parameters that match a pattern of `new`, and those of the modules `may_be_new` where the file lacks
    them. Every other parameter must be in the file, in its shape. Everything else in the file must belong to a module
    that the model's task does not have. CheckpointError lists what does not fit.
    """
    weights = read_weights(path)
    wanted = model.state_dict()
    initialized = [name for name in wanted if any(matches(name, pattern) for pattern in new)
                   or (name not in weights and name.split(".")[0] in may_be_new)]
    for name in initialized:
        del wanted[name]
        weights.pop(name, None)
    lines = [
        f"  {name}: expected {tuple(tensor.shape)}, "
        + (f"found {tuple(weights[name].shape)}" if name in weights else "not in the file")
        for name, tensor in wanted.items() if name not in weights or weights[name].shape != tensor.shape
    ]
    lines += [f"  {name}: not part of this model" for name in weights if name not in wanted and not omits(model, name)]
    if lines:
        listed = "\n".join(lines[:LISTED]) + (f"\n  and {len(lines) - LISTED} more" if len(lines) > LISTED else "")
        new_heads = sorted({name.split(".")[0] for name in wanted if name not in weights} & {*NEW_MODULES})
        if new_heads:
            listed += f"\n{', '.join(new_heads)}: train.py --task {model.task} --init CHECKPOINT trains it"
        raise CheckpointError(f"{path}, saved for {saved_task}, does not fit this model for {model.task}:\n{listed}")
    model.load_state_dict({**model.state_dict(), **{name: weights[name] for name in wanted}})
    return initialized


def matches(name: str, pattern: str) -> bool:
    """Whether the parameter `name`, or a module that it belongs to, matches a shell pattern; `*` may span dots."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete, use another one")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read, it may be truncated ({error}); "
                              "use an older checkpoint") from error


def omits(model: MPLUG2, name: str) -> bool:
    """Whether `model` leaves out the saved parameter `name` because its task does not need it."""
    module = name.split(".")[0]
    if module in {each for component in COMPONENTS.keys() - model.components for each in COMPONENTS[component]}:
        return True
    # The universal layers are built as far as text or vision needs them, and a classifier has one layer per task.
    if module in ("universal", "classifier"):
        return True
    return bool(LOCAL_TEMPORAL.match(name)) and not (
        "temporal" in model.components or model.config.temporal_on_images)


# ---- manifests -------------------------------------------------------------------------------------------------------


class HashingWriter(io.BufferedWriter):
    """A new file, whose SHA-256 is computed while it is written: large files need not be read again.

    `done` gets it, in hexadecimal, when the file is closed.
    """

    def __init__(self, path: Path, done: Callable[[str], object] = str):
        super().__init__(io.FileIO(path, "w"))
        self.digest, self.done = hashlib.sha256(), done

    def fileno(self) -> int:
        """For fsync, which would miss what is still in the buffer."""
        self.flush()
        return super().fileno()

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.done(self.digest.hexdigest())

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        super().__exit__()
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save replaces the error of a full disk by "unexpected pos"

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return super().write(data)


def write_manifest(folder: Path, step: int, hashes: Mapping[str, str]) -> None:
    """Describe every file of `folder`, so that `verify` notices any change. The score follows after validation.

    `hashes` are those that are already known, by the name of the file.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hashes.get(path.name) or sha256(path)}
             for path in sorted(folder.iterdir())}
    manifest = {"step": step, "score": None, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))  # no newline at the end: any cut is noticed


def verify(folder: Path | str, names: tuple[str, ...]) -> None:
    """Compare these files of a checkpoint with its manifest. CheckpointError names the first file that differs, and
    the newest older checkpoint of the run that is intact."""
    folder = Path(folder)
    if problem := find_damage(folder, names):
        real = folder.resolve()
        older = sorted((other for other in real.parent.glob("step_*") if other.name < real.name), reverse=True)
        intact = next((other.name for other in older if not find_damage(other, RUN_FILES)), None)
        advice = f"continue from the one before it with --resume --resume-from {intact}" if intact else (
            "this run has no older checkpoint that is intact")
        raise CheckpointError(f"the checkpoint {folder} ({real.name}) is damaged: {problem}; {advice}")


def find_damage(folder: Path, names: tuple[str, ...]) -> str:
    """What is wrong with these files of a checkpoint, or an empty string. The shards belong to training.pt."""
    path = folder / "manifest.json"
    if not path.is_file():
        return "manifest.json is missing"
    try:
        files = json.loads(path.read_text())["files"]
        shards = [name for name in files if name.endswith((SHARDS, SHARD_INDEX)) and "training.pt" in names]
        for name in (*names, *shards):
            expected = files[name]
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size:,} bytes, but its manifest says {expected['bytes']:,}"
            if sha256(folder / name) != expected["sha256"]:
                return f"{name} was changed after it was saved: its SHA-256 differs from the manifest's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"
    return ""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
