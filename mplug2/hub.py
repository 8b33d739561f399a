"""Sharing models on the Hugging Face Hub: addresses such as hf://user/name, and the model card of an exported model.

Wherever a checkpoint folder is named, an address works too (`checkpoint.real_folder`):

    mplug2.load("hf://user/name")
    python eval.py --checkpoint hf://user/name
    python train.py --task video_qa --init hf://user/name@v1      # a tag, branch or commit
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from mplug2.evaluation.metric_names import format_table, group_by_split
from mplug2.model.mplug2 import MPLUG2
from mplug2.tasks import TASKS, parse_tasks

ADDRESS = re.compile(r"hf:/{1,2}(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
FILES = ("*.json", "*.safetensors", "README.md")
"""What is downloaded: never a file that could run code."""


def is_address(text: str) -> bool:
    return text.startswith("hf:/")


@lru_cache
def download(address: str) -> Path:
    """The folder of a model on the Hub, from the local cache if it is there. Needs `pip install -e ".[hub]"`.

    Raises ValueError for a malformed address, a missing package, or a model that cannot be reached.
    """
    match = ADDRESS.fullmatch(address)
    if not match:
        raise ValueError(f"{address}: expected hf://user/name, or hf://user/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f'{address}: install huggingface_hub, with pip install -e ".[hub]"') from error
    try:
        return Path(snapshot_download(match["name"], revision=match["revision"], allow_patterns=FILES))
    except Exception as error:  # the package has errors of its own for each kind: offline, private, no such model
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{address} cannot be read; check the name, and that this machine is online and has access, "
                         f"or name a folder ({why})") from error


def model_card(
    name: str, model: MPLUG2, data: list[Path] | None, results: Mapping[str, object], settings: Mapping[str, object],
    license: str,
) -> str:
    """The README.md of an exported model, with the header that the Hub reads.

    `results` are the contents of a metrics.json of eval.py, and `settings` those of the settings.json of the run; both
    may be empty. What is not known is said to be unknown.
    """
    count, config, tasks = sum(p.numel() for p in model.parameters()), model.config, parse_tasks(model.task)
    modalities = sorted({TASKS[task].modality for task in tasks})
    header = ["---", f"license: {license or 'unknown'}", "library_name: mplug2",
              "tags:", *(f"- {tag}" for tag in ("mplug2", *tasks, *modalities)), "---"]
    trained_on = "unknown" if data is None else ", ".join(folder.name for folder in data) or "the tiny world"
    train = settings.get("train", {})
    trained = {key: train[key] for key in ("preset", "recipe", "max_steps", "batch_size", "optimizer", "lr", "frames",
                                           "seed") if train.get(key) not in (None, "")}
    lines = [
        *header, "", f"# {name}", "",
        f"An mPLUG-2 with {count:,} parameters for {', '.join(tasks)}: {config.image_size} pixels, width "
        f"{config.width}, {config.vision_layers} vision blocks, {config.text_layers} text layers of which "
        f"{config.universal_layers} are universal.", "",
        "```python", "import mplug2", "", f'model = mplug2.load("hf://USER/{name}")', "```", "",
        f"**Training data**: {trained_on}.", "",
        f"**Training settings**: {', '.join(f'{key} {value}' for key, value in trained.items()) or 'unknown'}.", "",
        f"**License**: {license or 'not stated: ask the author before you use it'}.", "", "## Results", "",
    ]
    if scores := group_by_split({name: value for name, value in results.items() if isinstance(value, float | int)}):
        lines += ["Percent (CIDEr and ranks as they are), by `eval.py`.", "", "```", format_table(scores), "```", ""]
    else:
        lines += ["No evaluation was recorded: run `eval.py` before exporting.", ""]
    return "\n".join(lines)


def recorded(checkpoint: Path) -> tuple[dict[str, object], dict[str, object]]:
    """The results and the settings that lie next to a checkpoint: of eval.py, and of the run. Empty if they do not."""
    files = checkpoint / "eval" / "metrics.json", checkpoint.resolve().parent / "settings.json"
    return tuple(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files)
