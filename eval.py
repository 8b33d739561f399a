"""Evaluate a checkpoint, or try it on files of your own.

    python eval.py --checkpoint runs/tiny/last                                # all tasks, test and combos
    python eval.py --checkpoint runs/tiny/last --task video_qa --answers train          # choose answers from a list
    python eval.py --checkpoint runs/tiny/last --json results.json
    python eval.py --checkpoint CHECKPOINT --data DIR --beams 5 --paper-captions        # as captioning papers score
    python eval.py --checkpoint CHECKPOINT --data DIR --task image_qa --splits test-dev --server vqav2
    python eval.py --checkpoint runs/tiny/last --input clip.mp4               # caption an image, GIF or video
    python eval.py --checkpoint runs/tiny/last --input clip.mp4 --question "which digit is it"
    python eval.py --checkpoint runs/tiny/last --input clip.mp4 --question "which digit is it" --attention out.png
    python eval.py --checkpoint runs/tiny/last --input FOLDER --find "a red seven moving left"

The first prints a table and writes CHECKPOINT/eval/: metrics.json, predictions.jsonl and a contact sheet of frames,
predictions and truths for each split. All flags: python eval.py --help
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny_data
from mplug2.data.media import is_media
from mplug2.data.records import available, read_records
from mplug2.data.text import clean
from mplug2.evaluation import submissions
from mplug2.evaluation.chance import chance_level
from mplug2.evaluation.evaluate import Prediction, evaluate, format_table
from mplug2.predictor import Predictor, load
from mplug2.tools.plots import attention, contact_sheet
from mplug2.training.flags import Parser


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""
    """Checkpoint folder, such as runs/tiny/last."""
    task: str = "all"
    """Tasks to evaluate, separated by commas; all: every one that the checkpoint has the modules for."""
    data: str = ""
    """Folder with <task>.<split>.jsonl files; without it the tiny world."""
    splits: str = "test,combos"
    """Splits to evaluate, separated by commas; those that the data lacks are passed over."""
    json: str = ""
    """File for the metrics, flat keys such as test/caption_exact; without it CHECKPOINT/eval/metrics.json."""
    limit: int = 0
    """Evaluate the first records of each task only; 0: all of them."""
    answers: str = ""
    """Questions are answered by ranking a list of answers: a file with one a line, or `train`, those of the training
    questions; without it answers are written."""
    input: str = ""
    """An image, GIF or video to caption, or to ask about; or a folder of them to search."""
    question: str = ""
    """A question about --input."""
    attention: str = ""
    """File for a picture of where the words of --question, and those written about --input, look; such as out.png."""
    find: str = ""
    """A text: list the files of the folder --input that fit it best."""
    beams: int = 1
    """Beams of the search for captions; 1 is greedy, the papers take 5."""
    prompted: bool = True
    """Captions of --input continue the prompt, "a video of"; without, they start from [CLS] alone, as released."""
    paper_captions: bool = False
    """Score captions by the papers' pipeline too (Penn Treebank tokens, METEOR): the extra `eval`, and Java."""
    all_captions: bool = False
    """Retrieval asks for every caption of a record, as COCO and Flickr30k do, not only for the first."""
    server: str = ""
    """Write predictions as a benchmark's server takes them: vqav2, nocaps, glue_cola and the other tasks of GLUE."""
    device: str = "cpu"
    """cpu, cuda, mps."""

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("which model? name a checkpoint folder by --checkpoint, such as runs/tiny/last")
        if (self.question or self.find or self.attention) and not self.input:
            raise ValueError("--question and --find are about files: name one, or a folder, by --input; "
                             "so is --attention")
        if self.attention and self.find:
            raise ValueError("--attention draws where words look in one file, --find searches a folder")
        if self.answers not in ("", "train") and not Path(self.answers).is_file():
            raise ValueError(f"--answers {self.answers}: no such file; expected one answer a line, or the word train")
        if self.question and self.find:
            raise ValueError("--question asks about one file, --find searches a folder: give one of them")
        if self.input and not Path(self.input).exists():
            raise ValueError(f"--input {self.input}: no such file or folder")
        if self.input and bool(self.find) != Path(self.input).is_dir():
            raise ValueError("--find searches a folder, and a folder needs --find; captions are of one file")
        if self.server and self.server not in submissions.BENCHMARKS:
            raise ValueError(f"--server {self.server}: expected one of {', '.join(submissions.BENCHMARKS)}")
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
    if config.attention:
        written, looks = predictor.explain(config.input, config.question)
        attention(config.input, predictor.preprocess.frames, looks, written, config.question, Path(config.attention))
        print(f"{written}\nattention: {config.attention}")
    elif config.find:
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
    tasks = None if config.task == "all" else config.task.split(",")
    answer_list = read_answer_list(config.answers, root)
    folder = Path(config.checkpoint) / "eval"
    folder.mkdir(exist_ok=True)
    by_split, flat, lines = {}, {}, []
    for split in splits:
        by_split[split], predictions = evaluate(
            predictor, root, split, config.limit or None, tasks, answer_list, config.beams, config.paper_captions,
            config.all_captions,
        )
        flat |= {f"{split}/{name}": value for name, value in by_split[split].items()}
        lines += [json.dumps(prediction.line(split)) + "\n" for prediction in predictions]
        if config.server:
            pairs = [(p.id, str(p.prediction)) for p in predictions if p.task == submissions.BENCHMARKS[config.server]]
            file = submissions.write_submission(config.server, folder, split, pairs)
            print(f"for the server of {config.server}: {file}")
        seen = [prediction for prediction in predictions if prediction.media and prediction.truth]
        if seen:
            contact_sheet(sample(seen, 16), predictor.preprocess.frames, folder / f"contact_sheet_{split}.png")
    if not flat and not lines:
        raise ValueError(f"{root} has no data, in the splits {config.splits}, for what this checkpoint can do "
                         f"(task {config.task}, trained for {predictor.model.task})")
    (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    file = Path(config.json) if config.json else folder / "metrics.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(flat, indent=2) + "\n")
    by_chance = chance_level(root, splits[0], config.limit or None)
    print(format_table({**by_split, "chance": {name: by_chance[name]
          for name in by_split[splits[0]] if name in by_chance}}))
    if any("caption_" in name for name in flat):
        print("captions scored: on lower-case words without punctuation, by this repository"
              + ("; caption_paper_*: on Penn Treebank tokens, by pycocoevalcap" if config.paper_captions else ""))
    print(f"metrics: {file}; predictions and contact sheets: {folder}")
    return flat


def read_answer_list(answers: str, root: Path) -> list[str] | None:
    """The different answers, in the order in which they come first."""
    if not answers:
        return None
    if answers != "train":
        found = Path(answers).read_text(encoding="utf-8").splitlines()
    else:
        tasks = [task for task in ("video_qa", "image_qa") if "train" in available(root).get(task, ())]
        found = [answer for task in tasks for record in read_records(root, task, "train")
                 for question in record.qa for answer in question.answers]
    unique = list(dict.fromkeys(cleaned for answer in found if (cleaned := clean(answer))))
    if not unique:
        raise ValueError(f"--answers {answers}: no answers there")
    return unique


def sample(predictions: list[Prediction], count: int) -> list[Prediction]:
    """Some of each task that shows something, always the same ones."""
    chosen = random.Random(0).sample(predictions, len(predictions))
    tasks = sorted({prediction.task for prediction in chosen})
    return [p for task in tasks for p in [q for q in chosen if q.task == task][: max(1, count // len(tasks))]]


if __name__ == "__main__":
    main()
