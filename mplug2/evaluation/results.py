"""The results of an evaluation as files and as text."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mplug2.evaluation.evaluate import EvalResult
from mplug2.evaluation.metric_names import format_table


def flat_metrics(results: Mapping[str, EvalResult]) -> dict[str, float]:
    """{"test/qa_order": 0.5, ...} from the results by split."""
    return {f"{split}/{name}": value for split, result in results.items() for name, value in result.metrics.items()}


def flat_errors(results: Mapping[str, EvalResult]) -> dict[str, float]:
    """The standard errors of `flat_metrics`."""
    return {f"{split}/{name}": error for split, result in results.items() for name, error in result.errors.items()}


def check_writable(*files: Path) -> None:
    """Create the folders of files that will be written at the end. Raises ValueError if one could not be written."""
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                file.open("a").close()
            if file.is_file() or not file.exists():
                tempfile.TemporaryFile(dir=file.parent).close()
        except OSError as error:
            raise ValueError(f"{file} cannot be written ({error.strerror}): choose another place with --out or --json"
                             ) from error


def write_whole(file: Path, text: str) -> None:
    """Write a file in one step: after an error, such as a full disk, an older file is still there, and complete."""
    if file.exists() and not file.is_file():  # /dev/stdout
        file.write_text(text, encoding="utf-8")
        return
    file = Path(os.path.realpath(file))  # behind a link
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def write_metrics(file: Path, results: Mapping[str, EvalResult]) -> None:
    """Write the flat metrics and, under keys of their own, their standard errors and the number of scored records."""
    contents = {
        **flat_metrics(results),
        "standard_errors": flat_errors(results),
        "records": {split: {"scored": result.scored, "total": result.records} for split, result in results.items()},
    }
    write_whole(file, json.dumps(contents, indent=2) + "\n")


def write_predictions(file: Path, results: Mapping[str, EvalResult]) -> None:
    """Write one line per prediction."""
    lines = [json.dumps(prediction.line(split)) + "\n" for split, result in results.items()
             for prediction in result.predictions]
    write_whole(file, "".join(lines))


def write_results(file: Path, folder: Path, results: Mapping[str, EvalResult]) -> str:
    """Write the metrics into `file` and the predictions into `folder`. Returns a line that names both."""
    predictions = folder / "predictions.jsonl"
    write_predictions(predictions, results)
    write_metrics(file, results)
    return f"metrics: {file}; predictions: {predictions}"


def refusal(results: Mapping[str, EvalResult], max_skipped: float) -> str:
    """An error message if no record was evaluated, or if more than the fraction `max_skipped` of them was skipped;
    otherwise an empty string."""
    records = sum(result.records for result in results.values())
    if not records:
        return "no record was evaluated, for the reasons above"
    skipped = sum(len(result.skipped) for result in results.values())
    return (f"{skipped:,} of {records:,} records were skipped, more than max_skipped={max_skipped} allows; repair the "
            "files above, or raise --max-skipped") if skipped > max_skipped * records else ""


def describe_skipped(results: Mapping[str, EvalResult]) -> str:
    """A line for each skipped record, for each note, and for each split that is not complete; empty if all is well."""
    lines = []
    for split, result in results.items():
        lines += [f"skipped: {source}: {error}" for source, error in result.skipped.items()]
        lines += [f"{split}: {note}" for note in result.notes]
        if result.skipped:
            lines.append(f"{split}: scored {result.scored:,} of {result.records:,} records")
    return "\n".join(lines)


def format_results(results: Mapping[str, EvalResult], chance: dict[str, float]) -> str:
    """The table of the metrics with their standard errors and the chance level, and what the numbers mean."""
    names = {name for result in results.values() for name in result.scores}
    columns = {split: result.metrics for split, result in results.items()}
    errors = {split: result.errors for split, result in results.items()}
    text = format_table({**columns, "chance": {name: value for name, value in chance.items() if name in names}}, errors)
    text += "\n±: standard error, from a bootstrap over records. chance: without looking at the image or video."
    if any("caption_" in name for name in names):
        text += "\ncaption metrics: this repository, on lower-case words without punctuation"
        text += "; caption_paper_*: pycocoevalcap" if any("caption_paper" in name for name in names) else ""
    return text
