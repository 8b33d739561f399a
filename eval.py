"""Evaluate a checkpoint, or try it on your own files.

    python eval.py --checkpoint runs/tiny/last                                # all tasks, splits test and combos
    python eval.py --checkpoint runs/tiny/last --task video_qa --answers train          # rank a list of answers
    python eval.py --checkpoint runs/tiny/last --json results.json
    python eval.py --checkpoint CHECKPOINT --data DIR --beams 5 --paper-captions        # score as captioning papers do
    python eval.py --checkpoint CHECKPOINT --data DIR --task image_qa --splits test-dev --server vqav2
    python eval.py --checkpoint runs/tiny/last --input docs/examples/blue_seven_left.gif    # caption any image or video
    python eval.py --checkpoint runs/tiny/last --input docs/examples/blue_seven_left.gif --question "which digit is it"
    python eval.py --checkpoint runs/tiny/last --input docs/examples/blue_seven_left.gif --attention out.png
    python eval.py --checkpoint runs/tiny/last --input docs/examples --find "a blue seven moving left"

The first command prints a table and writes CHECKPOINT/eval/: metrics.json, predictions.jsonl, and report.html with
predictions, truths, and mistakes. All flags: python eval.py --help
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny_data
from mplug2.data.media import is_media
from mplug2.data.records import available, read_records
from mplug2.data.text import clean
from mplug2.evaluation import submissions
from mplug2.evaluation.chance import chance_level
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.evaluate import evaluate
from mplug2.evaluation.metric_names import format_table
from mplug2.flags import Parser
from mplug2.predictor import Predictor, load
from mplug2.tasks import TASKS
from mplug2.tools.plots import draw_attention
from mplug2.tools.report import write_evaluation_report


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""
    """Checkpoint folder, such as runs/tiny/last."""
    task: str = "all"
    """Tasks to evaluate, separated by commas; all: every task that the checkpoint has the modules for."""
    data: str = ""
    """Folder with <task>.<split>.jsonl files; without it the tiny world."""
    splits: str = "test,combos"
    """Splits to evaluate, separated by commas; splits that the data does not have are skipped."""
    json: str = ""
    """File for the metrics, with flat keys such as test/caption_exact; without it CHECKPOINT/eval/metrics.json."""
    limit: int = 0
    """Evaluate only the first records of each task; 0: all of them."""
    answers: str = ""
    """Rank a list of answers instead of writing them: a file with one answer per line, or `train` for the answers of
    the training questions."""
    beams: int = 1
    """Beams of the search for captions; 1 is greedy, the papers use 5."""
    paper_captions: bool = False
    """Also score captions with the pipeline of the papers (Penn Treebank, METEOR); needs the extra `eval`, and Java."""
    all_captions: bool = False
    """In retrieval, every caption of a record is a query, as in COCO and Flickr30k, not only the first."""
    server: str = ""
    """Also write the predictions for the evaluation server of a benchmark: vqav2, nocaps, glue_cola, ..."""
    device: str = "cpu"
    """cpu, cuda, mps."""

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("no checkpoint: name its folder with --checkpoint, such as runs/tiny/last")
        if self.answers not in ("", "train") and not Path(self.answers).is_file():
            raise ValueError(f"--answers {self.answers}: no such file; expected one answer per line, or the word train")
        if self.server and self.server not in submissions.BENCHMARKS:
            raise ValueError(f"--server {self.server}: expected one of {', '.join(submissions.BENCHMARKS)}")
        if self.limit < 0:
            raise ValueError(f"--limit {self.limit}: expected at least 0")
        if self.beams < 1:
            raise ValueError(f"--beams {self.beams}: expected at least 1")


@dataclass(frozen=True)
class InputConfig:
    input: str = ""
    """An image, GIF, or video to caption or to ask about; or a folder to search with --find."""
    question: str = ""
    """A question about --input."""
    find: str = ""
    """A text: list the files of the folder --input that match it best."""
    attention: str = ""
    """Image file, such as out.png, for the attention of the words of --question and of the written text."""
    prompted: bool = True
    """Captions of --input continue the prompt "a video of"; otherwise they start from [CLS] alone, as released."""

    def __post_init__(self):
        if (self.question or self.find or self.attention) and not self.input:
            raise ValueError("--question, --find, and --attention need a file or folder: name it with --input")
        if self.find and (self.question or self.attention):
            raise ValueError("--find searches a folder, --question and --attention are about one file: give only one "
                             "of them")
        if self.input and not Path(self.input).exists():
            raise ValueError(f"--input {self.input}: no such file or folder")
        if self.input and bool(self.find) != Path(self.input).is_dir():
            raise ValueError(f"--input {self.input}: expected a folder with --find, and one file without it")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = Parser(__doc__, "eval.py")
    parser.add(EvalConfig, "evaluation")
    parser.add(InputConfig, "your own files")
    given = parser.read(arguments)
    try:
        config, files = EvalConfig(**given["EvalConfig"]), InputConfig(**given["InputConfig"])
    except ValueError as error:
        parser.error(str(error))
    try:
        predictor = load(config.checkpoint, config.device)
        if files.input:
            describe(predictor, files, config.beams)
            return {}
        return score(predictor, config)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def describe(predictor: Predictor, files: InputConfig, beams: int) -> None:
    """Print the caption of a file, the answer to a question about it, or the files of a folder that match a text."""
    if files.attention:
        written, words = predictor.explain(files.input, files.question)
        title = f"{files.question}?\n{written}" if files.question else written
        draw_attention(files.input, predictor.preprocess.frames, words, title, Path(files.attention))
        print(f"{written}\nattention: {files.attention}")
    elif files.find:
        media = sorted(path for path in Path(files.input).rglob("*") if is_media(path))
        if not media:
            raise ValueError(f"{files.input} contains no image, GIF, or video")
        scores = predictor.similarity(media, [files.find])[:, 0]
        for i in scores.argsort(descending=True)[:10].tolist():
            print(f"{scores[i]:6.3f}  {media[i]}")
    elif files.question:
        print(predictor.answer([files.input], [files.question])[0])
    else:
        print(predictor.caption([files.input], beams, prompted=files.prompted)[0])


def score(predictor: Predictor, config: EvalConfig) -> dict[str, float]:
    """Evaluate the splits, print the table, and write metrics, predictions, and a report."""
    root = Path(config.data) if config.data else tiny_data.ensure()
    there = {split for splits in available(root).values() for split in splits}
    splits = [EvalSplit(root, split, config.limit) for split in config.splits.split(",") if split in there]
    if not splits:
        raise ValueError(f"{root} has none of the splits {config.splits}; it has {', '.join(sorted(there))}")
    tasks = None if config.task == "all" else config.task.split(",")
    options = EvalOptions(
        read_answer_list(config.answers, root), config.beams, config.paper_captions, config.all_captions)
    folder = Path(config.checkpoint) / "eval"
    folder.mkdir(exist_ok=True)
    by_split, lines = {}, []
    for data in splits:
        by_split[data.split], predictions = evaluate(predictor, data, tasks, options)
        lines += [json.dumps(prediction.line(data.split)) + "\n" for prediction in predictions]
        if config.server:
            pairs = [(p.id, str(p.prediction)) for p in predictions if p.task == submissions.BENCHMARKS[config.server]]
            file = submissions.write_submission(config.server, folder, data.split, pairs)
            print(f"for the server of {config.server}: {file}")
    flat = {f"{split}/{name}": value for split, metrics in by_split.items() for name, value in metrics.items()}
    if not lines:
        raise ValueError(f"{root} has no records, in the splits {config.splits}, of a task that this checkpoint can do "
                         f"(--task {config.task}; it was trained for {predictor.model.task})")
    (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    file = Path(config.json) if config.json else folder / "metrics.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(flat, indent=2) + "\n")
    chance = {name: value for name, value in chance_level(splits[0]).items() if name in by_split[splits[0].split]}
    print(format_table({**by_split, "chance": chance}))
    if any("caption_" in name for name in flat):
        print("caption metrics: this repository, on lower-case words without punctuation"
              + ("; caption_paper_*: pycocoevalcap, on Penn Treebank tokens" if config.paper_captions else ""))
    report = write_evaluation_report(folder, by_split, chance, predictor)
    print(f"metrics: {file}; predictions: {folder / 'predictions.jsonl'}; on one page: {report}")
    return flat


def read_answer_list(answers: str, root: Path) -> tuple[str, ...] | None:
    """The different answers, in the order of their first occurrence."""
    if not answers:
        return None
    if answers != "train":
        found = Path(answers).read_text(encoding="utf-8").splitlines()
    else:
        tasks = [task for task, splits in available(root).items()
                 if "train" in splits and task in TASKS and TASKS[task].output == "answer"]
        found = [answer for task in tasks for record in read_records(root, task, "train")
                 for question in record.qa for answer in question.answers]
    unique = tuple(dict.fromkeys(cleaned for answer in found if (cleaned := clean(answer))))
    if not unique:
        raise ValueError(f"--answers {answers}: found no answers there; expected at least one")
    return unique


if __name__ == "__main__":
    main()
