"""Evaluate a checkpoint, or try it on your own files.

    python eval.py --checkpoint runs/tiny/last                                # all tasks, splits test and combos
    torchrun --nproc-per-node 8 eval.py --checkpoint CHECKPOINT --precision bfloat16 --workers 4
    python eval.py --checkpoint runs/tiny/last --task video_qa --answers train          # rank a list of answers
    python eval.py --checkpoint CHECKPOINT --data DIR --protocol released --paper-captions
    python eval.py --checkpoint CHECKPOINT --data DIR --task image_qa --splits test-dev --server vqav2
    python eval.py --checkpoint runs/tiny/last --input docs/examples/blue_seven_left.gif    # caption any image or video
    python eval.py --checkpoint runs/tiny/last --input docs/examples/blue_seven_left.gif --question "which digit is it"
    python eval.py --checkpoint runs/tiny/last --input docs/examples    # caption all files: captions.jsonl
    python eval.py --checkpoint runs/tiny/last --input docs/examples --find "a blue seven moving left"

The first command prints a table and writes CHECKPOINT/eval/: metrics.json, predictions.jsonl, and report.html with
predictions, truths, and mistakes. All flags: python eval.py --help
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tiny_data
from mplug2 import distributed
from mplug2.checkpoint import read_config, read_data, real_folder
from mplug2.comma_list import comma_list
from mplug2.data.text import clean
from mplug2.data.text_check import describe_unknown, unknown_words
from mplug2.evaluation import own_files, results
from mplug2.evaluation.captions import check_paper_captions
from mplug2.evaluation.chance import chance_level
from mplug2.evaluation.data import EvalOptions, choose_splits, find_data, read_answer_list
from mplug2.evaluation.evaluate import check_data, evaluate, evaluated_tasks
from mplug2.evaluation.own_files import InputSettings
from mplug2.evaluation.settings import RuntimeSettings, WritingSettings
from mplug2.evaluation.submissions import BENCHMARKS, check_submission, write_submissions
from mplug2.flags import Parser, check_range, warning_only
from mplug2.hub import is_address
from mplug2.inference import Inference, Stopped
from mplug2.predictor import Predictor, load
from mplug2.tools.plots import draw_attention
from mplug2.tools.report import write_evaluation_report
from mplug2.training.fault_tolerance import GracefulStop, Watchdog


@dataclass(frozen=True)
class EvalSettings:
    checkpoint: str = ""
    """Checkpoint folder, such as runs/tiny/last."""
    task: str = "all"
    """Tasks to evaluate, separated by commas; all: every task that the checkpoint has the modules for."""
    data: str = ""
    """Folder with <task>.<split>.jsonl files. Default: the data that the checkpoint was trained on."""
    splits: str = "test,combos"
    """Splits to evaluate, separated by commas; splits that the data does not have are skipped."""
    limit: int = 0
    """Evaluate a random sample of this many records of each task, always the same one; galleries stay whole."""
    max_skipped: float = 0.02
    """Fail if more than this fraction of the records has an image or video that cannot be read."""
    max_unknown: float = 0.2
    """Fraction of the words of a split that may be unknown to the vocabulary ([UNK])."""
    answers: str = ""
    """Rank answers instead of writing them: a file with one answer per line, or `train` for the training answers."""
    all_captions: bool = False
    """In retrieval, every caption of a record is a query, as in COCO and Flickr30k, not only the first."""
    paper_captions: bool = False
    """Also score captions with the pipeline of the papers (Penn Treebank, METEOR); needs the extra `eval`, and Java."""
    json: str = ""
    """File for the metrics, with flat keys such as test/caption_exact. Default: metrics.json in the folder of --out."""
    out: str = ""
    """Folder for metrics, predictions and report. Default: CHECKPOINT/eval, or runs/NAME/eval of hf://user/NAME."""
    server: str = ""
    """Also write the predictions for the evaluation server of a benchmark: vqav2, nocaps, glue_cola, ..."""

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("no checkpoint: name its folder with --checkpoint, such as runs/tiny/last")
        if self.answers not in ("", "train") and not Path(self.answers).is_file():
            raise ValueError(f"answers={self.answers!r}: no such file; expected one answer per line, or the word train")
        if self.paper_captions:
            check_paper_captions()
        if self.server and self.server not in BENCHMARKS:
            raise ValueError(f"server={self.server!r}: expected one of {', '.join(BENCHMARKS)}")
        check_range(self, "limit", 0)
        check_range(self, "max_skipped max_unknown", 0, 1)


GROUPS = {EvalSettings: "evaluation", InputSettings: "your own files", WritingSettings: "captions and answers",
          RuntimeSettings: "device and speed"}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = Parser(__doc__, "eval.py")
    for cls, title in GROUPS.items():
        parser.add(cls, title)
    given = parser.read(arguments)
    try:
        config, files, writing, runtime = (cls(**given[cls.__name__]) for cls in GROUPS)
        if files.input and (scoring := given["EvalSettings"].keys() - {"checkpoint"}):
            raise ValueError(f"{', '.join(sorted(scoring))}: only for records; leave out with --input")
        if is_address(config.checkpoint) and not config.out:  # not into the cache of the Hub
            config = dataclasses.replace(config, out=f"runs/{Path(config.checkpoint).name}/eval")
        config = dataclasses.replace(config, checkpoint=str(real_folder(config.checkpoint)))
        read_config(config.checkpoint)
        process = distributed.init_distributed(runtime.device)
    except ValueError as error:
        parser.error(str(error))
    say = print if process.is_main else (lambda *_, **__: None)
    try:
        with GracefulStop("stopping after this batch") as stop, Watchdog(process, runtime.timeout, "eval.py") as dog:
            predictor = load(config.checkpoint, process.device)
            predictor.inference = runtime.inference(
                process, skip_unreadable=not files.input or files.many, progress=True,
                on_batch=lambda: bool(dog.batch_done() or stop.name))
            if files.input:
                use_files(predictor, config.checkpoint, files, writing, say)
                return {}
            return score(predictor, config, writing, process, say)
    except Stopped as error:
        lost = "" if files.input else "; the evaluation is not written"
        say(f"eval.py: stopped by {stop.name or 'a signal to another rank'}{lost}", file=sys.stderr)
        raise SystemExit(130) from error
    except (ValueError, OSError) as error:
        if distributed.first_to_report(error):
            print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        distributed.shutdown()


def use_files(
    predictor: Predictor, checkpoint: str, files: InputSettings, writing: WritingSettings, say: Callable
) -> None:
    """Caption one file or many, answer a question about them, or search them."""
    output, (first, *_) = "answer" if files.question else "caption", files.files
    how, asked = writing.generation(output), files.question or files.find
    if unknown := unknown_words([asked], predictor.tokenizer):
        say(describe_unknown(repr(asked), unknown, len(clean(asked).split())), file=sys.stderr)
    if files.find:
        own_files.print_best(predictor, files.files, files.find, say)
    elif files.many:
        out = Path(files.output or f"{output}s.jsonl")
        own_files.write(predictor, files.files, files.question, how, out, str(Path(checkpoint).resolve()), say)
    elif files.attention:
        written, words = predictor.explain(first, files.question)
        title = f"{files.question}?\n{written}" if files.question else written
        if predictor.is_main:
            draw_attention(first, predictor.preprocess.frames, words, title, Path(files.attention))
        say(f"{written}\nattention: {files.attention}")
    elif files.question:
        say(predictor.answer([first], [files.question], **vars(how))[0])
    else:
        say(predictor.caption([first], **vars(how))[0])


def score(
    predictor: Predictor, config: EvalSettings, writing: WritingSettings, process: distributed.DistInfo, say: Callable
) -> dict[str, float]:
    """Evaluate the splits, print the table, and write metrics, predictions, and a report."""
    names = comma_list("splits", config.splits)
    tasks = None if config.task == "all" else comma_list("task", config.task)
    root, why = find_data(config.data, read_data(config.checkpoint), names)
    if root is None:
        distributed.run_on_main(tiny_data.ensure, process)
        root = tiny_data.ensure()
    splits, missing = choose_splits(root, names, config.limit)
    say(f"data: {root} ({why})" + (f"; it has no split {', '.join(missing)}" if missing else ""), flush=True)
    options = EvalOptions(writing.generation("caption"), writing.generation("answer"),
                          read_answer_list(config.answers, root) if config.answers else None,
                          config.paper_captions, config.all_captions)
    folder = Path(config.out or Path(config.checkpoint) / "eval")
    file, server = Path(config.json or folder / "metrics.json"), config.server
    distributed.run_on_main(partial(check_data, predictor, splits, tasks, config.max_unknown), process)
    distributed.run_on_main(partial(results.check_writable, file, folder / "predictions.jsonl"), process)
    if server:
        distributed.run_on_main(partial(check_submission, server, folder, splits, tasks, predictor.model), process)
    found = {data.split: evaluate(predictor, data, tasks, options) for data in splits}
    if refused := results.refusal(found, config.max_skipped):  # an earlier evaluation keeps its files
        folder = folder / "refused"
        file = folder / "metrics.json"
    if process.is_main:
        chance: dict[str, float] = {}
        with warning_only("the chance level"):
            chance = chance_level(splits[0], evaluated_tasks(found))
        print("\n".join(filter(None, [results.format_results(found, chance), results.describe_skipped(found)])))
        print(results.write_results(file, folder, found))
        with warning_only("the report"):
            predictor.inference = Inference()  # of this process alone
            print(f"on one page: {write_evaluation_report(folder, found, chance, predictor)}")
        if server and not refused:
            write_submissions(server, folder, splits, {split: result.predictions for split, result in found.items()})
    if refused:
        raise distributed.AllRanksError(refused)
    return results.flat_metrics(found)


if __name__ == "__main__":
    main()
