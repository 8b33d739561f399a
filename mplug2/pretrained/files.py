"""Weights of others from the disk: memory-mapped, so that only what is used is read, and never running their code."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
SETTINGS = ("open_clip_config.json", "config.json")


def open_weights(path: str | Path) -> Mapping:
    """The contents of a `.safetensors` file or a file of `torch.save` (`.pth`, `.pt`, `.bin`), or of one in a folder.

    Raises FileNotFoundError, and ValueError for a file that is damaged or of another kind, or a pickle that holds more
    than tensors, containers, strings and numbers: unpickling anything else could run the code of a stranger.
    """
    path = weights_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as safetensors, it may be cut off ({error})") from error
    # Files of torch before 1.6 are no zip archives, and cannot be mapped.
    archive = zipfile.is_zipfile(path)
    if archive and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(f"{path}: this is a TorchScript program, not a state dict; write its weights to a file of "
                         "their own: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW_FILE)")
    try:
        contents = torch.load(path, map_location="cpu", mmap=archive, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused: this file is damaged, or holds more than tensors, containers, strings and "
                         f"numbers, and to load that could run any code. ({first_line(error)}) Open it where you trust "
                         "it, and save its state dict alone") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a file of torch.save, it may be cut off "
                         f"({first_line(error)})") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path}: expected a state dict, found {type(contents).__name__}")
    return contents


def open_settings(path: str | Path) -> dict | None:
    """The settings beside a file of weights, or in its folder; None if there are none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    files = [folder / name for name in SETTINGS if (folder / name).is_file()]
    return read_json(files[0]) if files else None


def read_json(path: str | Path) -> dict:
    """A JSON object. ValueError, naming the file, if it is not one."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def weights_file(path: str | Path) -> Path:
    """The file of weights that `path` is, or that the folder `path` holds. FileNotFoundError if there is none."""
    path = Path(path)
    files = [path / name for name in WEIGHTS if (path / name).is_file()] if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path}: expected a file of weights, or a folder with one of {', '.join(WEIGHTS)}")
    return files[0]


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
