"""A run, or an evaluation, on one HTML page, without any file or link outside of it.

    python -m mplug2.tools.report runs/tiny          # rewrites runs/tiny/report.html from the files of the run

train.py writes the page after each evaluation and at the end, eval.py writes one for its evaluation. It shows the
command, the metrics, the curves, images and videos with the predictions about them and the attention of the words, the
most confident mistakes, and all settings. A section whose file is missing is left out. The predictions are those of the
newest evaluation: `predictions.jsonl` of the run, or of `last/eval`.

The page is built by plain functions that return HTML; everything that comes from data is escaped. Its
Content-Security-Policy forbids the browser to load or to run anything.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from mplug2.checkpoint import real_folder
from mplug2.evaluation.chance import chance_level
from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.evaluate import EvalResult
from mplug2.evaluation.metric_names import by_heading, format_value, group_by_split, is_fraction
from mplug2.evaluation.results import write_whole
from mplug2.flags import one_line_errors, parse
from mplug2.predictor import Predictor, load
from mplug2.tools.cards import mistake_cards, sample_cards
from mplug2.tools.charts import chart

PROG = "python -m mplug2.tools.report"

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the browser may load: only the images inside the page."""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f4f5f7; --text: #1d2127; --faint: #667080;
        --line: #d5d9df; --bar: #a9c8ef; --right: #1f7a3d; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --panel: #1e2329; --text: #e4e7eb; --faint: #9aa4b1; --line: #39414b;
          --bar: #2d5384; --right: #6fcf8b; --wrong: #ff8a80; } }
body { background: var(--ground); color: var(--text); font: 15px/1.45 system-ui, sans-serif; max-width: 1120px;
       margin: 0 auto; padding: 24px; }
h1 { margin: 0 0 4px; } h2 { margin: 36px 0 8px; border-bottom: 1px solid var(--line); } h3 { margin: 12px 0 4px; }
p, figcaption, .faint { color: var(--faint); margin: 4px 0; }
pre { background: var(--panel); padding: 10px 12px; border-radius: 6px; white-space: pre-wrap;
      overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px;
        align-items: start; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0; }
.tiles div, .card { background: var(--panel); border-radius: 6px; padding: 8px 12px; }
.tiles b { display: block; font-size: 1.15em; }
table { border-collapse: collapse; width: 100%; } th { font-weight: 600; color: var(--faint); }
td, th { text-align: left; padding: 2px 8px 2px 0; border-bottom: 1px solid var(--line); vertical-align: top;
         overflow-wrap: anywhere; }
th { overflow-wrap: normal; }
td.number { white-space: nowrap; width: 19%; } td.number i { display: block; height: 4px; border-radius: 2px;
            background: var(--bar); }
.packed { columns: 420px 2; column-gap: 16px; } .packed h3 { margin-top: 0; }
.packed > div { break-inside: avoid; padding-bottom: 12px; }
.card { display: flex; gap: 14px; align-items: flex-start; }
.card > div { flex: 1; min-width: 0; overflow-wrap: anywhere; }
.card .media { flex: none; width: 128px; } img { display: block; image-rendering: pixelated; }
.media img { width: 128px; border: 1px solid var(--line); margin-bottom: 4px; }
.media .faint, .media p { font-size: 11px; }
.attention { display: block; border: 0; font-size: 12px; margin-top: 10px; width: auto; }
.attention td { border: 0; padding: 1px 8px 1px 0; vertical-align: middle; }
.attention img { height: 44px; max-width: 100%; }
.said { margin: 0 0 8px; } .right { color: var(--right); } .wrong { color: var(--wrong); }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
.legend span { display: inline-block; margin-right: 12px; white-space: nowrap; font-size: 13px; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 4px;
            vertical-align: middle; }
"""


def write_report(run: Path, predictor: Predictor | None = None) -> Path:
    """Write `run`/report.html and return its path.

    `predictor` is the model that made the predictions; without it, `last` of the run is loaded if there are
    predictions. Raises FileNotFoundError if `run` is not the folder of a run.
    """
    file = run / "settings.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no settings.json: expected the folder of a run, such as runs/tiny")
    settings = json.loads(file.read_text(encoding="utf-8"))
    metrics = read_lines(run / "metrics.jsonl")
    evaluations = [folder / "predictions.jsonl" for folder in (run, real_folder(run / "last") / "eval")]
    newest = max(filter(Path.is_file, evaluations), key=lambda path: path.stat().st_mtime, default=None)
    predictions = read_lines(newest) if newest else []
    if predictions and predictor is None and (run / "last").exists():
        predictor = load(run / "last")
    by_split, errors = latest(metrics)
    if newest and newest.parent.name == "eval" and (newest.parent / "metrics.json").is_file():
        by_split, errors = latest([json.loads((newest.parent / "metrics.json").read_text(encoding="utf-8"))])
    name = f"{run.resolve().name}: {settings['train'].get('task', '')}"
    return write_page(run / "report.html", name, [
        header(name, settings, metrics),
        section("Results", metric_tables(by_split, errors, chance_of_run(settings, by_split))),
        section("Curves", curve_charts(metrics)),
        *prediction_sections(predictions, predictor),
        section("Settings", "<div class=grid>" + "".join(
            f"<div><h3>{part}</h3>{settings_table(settings[part])}</div>" for part in ("train", "model")
        ) + "</div>"),
    ])


def write_evaluation_report(
    folder: Path, results: Mapping[str, EvalResult], chance: dict[str, float], predictor: Predictor
) -> Path:
    """Write `folder`/report.html about an evaluation whose predictions are in that folder, and return its path."""
    by_split = {split: result.metrics for split, result in results.items()}
    errors = {split: result.errors for split, result in results.items()}
    name = f"{folder.resolve().parent.name}: {predictor.model.task}"
    predictions = read_lines(folder / "predictions.jsonl")
    return write_page(folder / "report.html", name, [
        f"<h1>{escape(name)}</h1>", section("Results", metric_tables(by_split, errors, chance)),
        *prediction_sections(predictions, predictor),
    ])


def write_page(file: Path, title: str, parts: list[str]) -> Path:
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
    )
    write_whole(file, page)
    return file


# ---- what is in the files --------------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSONL file, without a last line that was cut off; none if there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def latest(metrics: list[dict]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """The newest value of each metric and its standard error, by split."""
    flat = {key: value for line in metrics for key, value in line.items() if "/" in key and not key.startswith("loss/")}
    errors = {key: value for line in metrics for key, value in line.get("standard_errors", {}).items()}
    return group_by_split(flat), group_by_split(errors)


def chance_of_run(settings: dict, by_split: dict) -> dict[str, float]:
    """The chance level on the split that was evaluated last, if the data are still there."""
    split = next(reversed(by_split), "")
    for root in map(Path, filter(None, [settings["train"].get("eval_data", ""), *settings.get("data", {})])):
        if split and any(root.glob(f"*.{split}.jsonl")):  # false for a folder of shards, and for one that is gone
            return chance_level(EvalSplit(root, split))
    return {}


# ---- the sections of the page ----------------------------------------------------------------------------------------


def section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}" if content else ""


def header(name: str, settings: dict, metrics: list[dict]) -> str:
    steps = [line for line in metrics if "loss" in line]
    tiles = {
        "steps": f"{metrics[-1]['step'] if metrics else 0:,} of {settings['train'].get('max_steps', 0):,}",
        "parameters": f"{settings['parameters']:,}" if "parameters" in settings else "",
        "preset": settings["train"].get("preset", ""),
        "processes": settings.get("processes", ""),
        "loss": f"{steps[-1]['loss']:.3f}" if steps else "",
        "samples per second": f"{np.median([line['samples_per_second'] for line in steps]):.0f}" if steps else "",
        "files skipped": steps[-1].get("skipped_files", "") if steps else "",
        "memory (GiB)": f"{steps[-1]['memory_gib']:.1f}" if steps and "memory_gib" in steps[-1] else "",
        "torch": settings.get("torch", ""),
    }
    shown = "".join(f"<div><b>{escape(str(value))}</b>{title}</div>" for title, value in tiles.items() if value != "")
    commands = "\n".join(settings.get("commands", []))
    return f"<h1>{escape(name)}</h1><div class=tiles>{shown}</div>" + (
        f"<p>Reproduce it with:</p><pre>{escape(commands)}</pre>" if commands else "")


def settings_table(values: dict) -> str:
    return "<table>" + "".join(
        f"<tr><td>{escape(str(key))}<td>{escape(str(value))}" for key, value in values.items()) + "</table>"


def metric_tables(
    by_split: dict[str, dict[str, float]], errors: dict[str, dict[str, float]], chance: dict[str, float]
) -> str:
    """A table under each heading: one row per metric, one column per split, and the chance level."""
    def cell(split: str, name: str) -> str:
        value, error = columns[split].get(name), errors.get(split, {}).get(name)
        if value is None:
            return "<td class=number>"
        text = format_value(name, value) + (f" &plusmn; {format_value(name, error)}" if error else "")
        if not is_fraction(name) or not math.isfinite(value):
            return f"<td class=number>{text}"
        return f"<td class=number>{text} %<i style='width: {max(0.0, min(1.0, value)):.1%}'></i>"

    columns = {**by_split, **({"chance": chance} if chance else {})}
    tables = []
    for title, names in by_heading(name for values in by_split.values() for name in values).items():
        rows = "".join(
            f"<tr><td>{escape(name)}" + "".join(cell(split, name) for split in columns) for name in names
        )
        heads = "".join(f"<th>{escape(column)}" for column in columns)
        tables.append(f"<div><h3>{title}</h3><table><tr><th>{heads}{rows}</table></div>")
    about = "<p>&plusmn;: standard error, from a bootstrap over records. Chance: without looking at the image or " \
            "video.</p>" if chance else ""
    return f"{about}<div class=packed>{''.join(tables)}</div>" if tables else ""


def curve_charts(metrics: list[dict]) -> str:
    """Losses, validation metrics, and the progress of training, over steps."""
    def points(names: list[str]) -> dict[str, list[tuple[float, float]]]:
        return {name: [(line["step"], line[name]) for line in metrics if name in line] for name in names}

    keys = list(dict.fromkeys(key for line in metrics for key in line))
    charts = [chart("training loss by objective", points([key for key in keys if key.startswith("loss/")]), log=True)]
    fractions = [key.removeprefix("val/") for key in keys if key.startswith("val/") and is_fraction(key)]
    for title, names in by_heading(fractions).items():
        charts.append(chart(f"validation: {title[0].lower()}{title[1:]}", points([f"val/{name}" for name in names])))
    others = {"lr": "learning rate", "grad_norm": "gradient norm, before clipping",
              "samples_per_second": "samples per second", "waiting_for_data": "fraction of time waiting for data"}
    charts += [chart(title, points([key]), log=key == "grad_norm") for key, title in others.items()]
    return f"<div class=grid>{''.join(charts)}</div>" if any(charts) else ""


def prediction_sections(predictions: list[dict], predictor: Predictor | None) -> list[str]:
    return [section("Samples", sample_cards(predictions, predictor)),
            section("Hardest mistakes", mistake_cards(predictions, predictor))]


@dataclass(frozen=True)
class ReportSettings:
    run: str
    """Folder of a run, such as runs/tiny."""


def main(arguments: list[str] | None = None) -> None:
    settings = parse(ReportSettings, __doc__, PROG, arguments)
    with one_line_errors(PROG):
        print(write_report(Path(settings.run)))


if __name__ == "__main__":
    main()
