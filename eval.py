"""Evaluate a checkpoint, or try it on files of your own.

    python eval.py --checkpoint runs/tiny/last                                # all tasks, test and combos
    python eval.py --checkpoint runs/tiny/last --json results.json
    python eval.py --checkpoint runs/tiny/last --input clip.mp4               # caption an image, GIF or video
    python eval.py --checkpoint runs/tiny/last --input clip.mp4 --question "which digit is it"
    python eval.py --checkpoint runs/tiny/last --input FOLDER --find "a red seven moving left"

The first prints a table and writes CHECKPOINT/eval/: metrics.json and a contact sheet of frames, predictions and truths
for each split. All flags: python eval.py --help
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny_data
from mplug2.data.media import is_media
from mplug2.data.records import available
from mplug2.evaluation import Prediction, evaluate, table
from mplug2.flags import Parser
from mplug2.inference import Predictor, load
from mplug2.plots import contact_sheet


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""
    """Checkpoint folder, such as runs/tiny/last."""
    data: str = ""
    """Folder with <task>.<split>.jsonl files; without it the tiny world."""
    splits: str = "test,combos"
    """Splits to evaluate, separated by commas; those that the data lacks are passed over."""
    json: str = ""
    """File for the metrics, flat keys such as test/caption_exact; without it CHECKPOINT/eval/metrics.json."""
    limit: int = 0
    """Evaluate the first records of each task only; 0: all of them."""
    input: str = ""
    """An image, GIF or video to caption, or to ask about; or a folder of them to search."""
    question: str = ""
    """A question about --input."""
    find: str = ""
    """A text: list the files of the folder --input that fit it best."""
    beams: int = 1
    """Beams of the caption search for --input; 1 is greedy."""
    prompted: bool = True
    """Captions of --input continue the prompt, "a video of"; without, they start from [CLS] alone, as released."""
    device: str = "cpu"
    """cpu, cuda, mps."""

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("which model? name a checkpoint folder by --checkpoint, such as runs/tiny/last")
        if (self.question or self.find) and not self.input:
            raise ValueError("--question and --find are about files: name one, or a folder, by --input")
        if self.question and self.find:
            raise ValueError("--question asks about one file, --find searches a folder: give one of them")
        if self.input and not Path(self.input).exists():
            raise ValueError(f"--input {self.input}: no such file or folder")
        if self.input and bool(self.find) != Path(self.input).is_dir():
            raise ValueError("--find searches a folder, and a folder needs --find; captions are of one file")
        if self.limit < 0 or self.beams < 1:
            raise ValueError("--limit has to be at least 0 and --beams at least 1")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = Parser(__doc__)
    parser.add(EvalConfig, "evaluation")
    try:
        config = EvalConfig(**parser.read(arguments)["EvalConfig"])
    except ValueError as error:
        parser.error(str(error))
    try:
        predictor = load(config.checkpoint, config.device)
        if config.input:
            try_on(predictor, config)
            return {}
        return score(predictor, config)
    except (ValueError, FileNotFoundError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def try_on(predictor: Predictor, config: EvalConfig) -> None:
    """Caption, answer or search files of the user's."""
    if config.find:
        files = sorted(path for path in Path(config.input).rglob("*") if is_media(path))
        if not files:
            raise ValueError(f"{config.input} holds no image, GIF or video")
        scores = predictor.similarity(files, [config.find])[:, 0]
        for place in scores.argsort(descending=True)[:10].tolist():
            print(f"{scores[place]:6.3f}  {files[place]}")
    elif config.question:
        print(predictor.answer([config.input], [config.question])[0])
    else:
        print(predictor.caption([config.input], config.beams, prompted=config.prompted)[0])


def score(predictor: Predictor, config: EvalConfig) -> dict[str, float]:
    """Evaluate the splits, print the table, write metrics and contact sheets."""
    root = Path(config.data) if config.data else tiny_data.ensure()
    there = {split for splits in available(root).values() for split in splits}
    splits = [split for split in config.splits.split(",") if split in there]
    if not splits:
        raise ValueError(f"{root} has none of the splits {config.splits}; it has {', '.join(sorted(there))}")
    folder = Path(config.checkpoint) / "eval"
    folder.mkdir(exist_ok=True)
    by_split, flat = {}, {}
    for split in splits:
        by_split[split], predictions = evaluate(predictor, root, split, config.limit or None)
        flat |= {f"{split}/{name}": value for name, value in by_split[split].items()}
        if predictions:
            chosen = sample(predictions, 16)
            contact_sheet(chosen, predictor.preparation.frames, folder / f"contact_sheet_{split}.png")
    file = Path(config.json) if config.json else folder / "metrics.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(flat, indent=2) + "\n")
    print(table(by_split))
    print(f"metrics: {file}; contact sheets: {folder}")
    return flat


def sample(predictions: list[Prediction], count: int) -> list[Prediction]:
    """Some of each task, always the same ones."""
    chosen = random.Random(0).sample(predictions, len(predictions))
    tasks = sorted({prediction.task for prediction in chosen})
    return [p for task in tasks for p in [q for q in chosen if q.task == task][: count // len(tasks)]]


if __name__ == "__main__":
    main()
