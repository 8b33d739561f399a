"""Open files of published weights: memory-mapped, so only the used entries are read, and without running their code."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mplug2.checkpoint import read_json_object

WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
SETTINGS = ("open_clip_config.json", "config.json")


def open_weights(path: str | Path) -> Mapping:
    """The contents of a `.safetensors` file or a file of `torch.save` (`.pth`, `.pt`, `.bin`), or of one in a folder.

    Raises FileNotFoundError, and ValueError for a file that is damaged or of another type. A pickle may contain only
    tensors, containers, strings and numbers: unpickling anything else could run foreign code.
    """
    path = weights_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as safetensors, it may be truncated ({error})") from error
    # Files from torch < 1.6 are not zip archives and cannot be mapped.
    is_archive = zipfile.is_zipfile(path)
    if is_archive and is_torchscript(path):
        raise ValueError(f"{path}: a TorchScript program, not a state dict; extract its weights with "
                         "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW_FILE)")
    try:
        contents = torch.load(path, map_location="cpu", mmap=is_archive, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: damaged, or it contains more than tensors, containers, strings and numbers, which "
                         f"could run any code ({first_line(error)}); if you trust it, open it elsewhere and save its "
                         "state dict alone") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a file of torch.save, it may be truncated "
                         f"({first_line(error)})") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path}: expected a state dict, found {type(contents).__name__}")
    return contents


def is_torchscript(path: Path) -> bool:
    """Whether a zip archive was written by torch.jit.save."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def open_settings(path: str | Path) -> dict | None:
    """The settings file in the folder of a file of weights, or None."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    files = [folder / name for name in SETTINGS if (folder / name).is_file()]
    return read_json_object(files[0]) if files else None


def weights_file(path: str | Path) -> Path:
    """`path` itself, or the file of weights in the folder `path`. FileNotFoundError if there is none."""
    path = Path(path)
    files = [path / name for name in WEIGHTS if (path / name).is_file()] if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path}: expected a file of weights, or a folder with one of {', '.join(WEIGHTS)}")
    return files[0]


def first_line(error: Exception) -> str:
    """The reason that torch gives, without its advice."""
    return str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0].split(" Please use")[0]
