"""A run on one page: `runs/NAME/report.html`, without a single file or link outside of it.

    python -m mplug2.tools.report runs/tiny          # writes it anew, from the files of the run

train.py writes it after each evaluation and at the end. It shows the command, the results by kind, the curves, clips
and pictures with what the model says of them and where its words look, the mistakes it was surest of, and all settings.
A part whose file is missing is left out. Predictions and results are those of the newest evaluation: train.py's
(`predictions.jsonl`), or one of `last` by eval.py.

The page is made of plain functions that return HTML; whatever comes from data goes through `escape`. Its policy
(Content-Security-Policy) forbids the browser to load or to run anything.
"""

import base64
import io
import json
import math
import os
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mplug2.data.media import MediaError, read_media
from mplug2.data.text import clean
from mplug2.evaluation.chance import chance_level
from mplug2.evaluation.evaluate import EVALUATED
from mplug2.objectives.losses import generalized_iou
from mplug2.predictor import Predictor, WordAttention, load
from mplug2.tools.plots import overlay, seen

CARDS = 8
"""Clips and pictures of the samples, and as many of the mistakes."""
LINES = 4
"""Predictions shown about each of them."""
LOOKS = 4
"""Of the samples, how many are shown with where words look."""
WORDS = 16
"""Words whose look is drawn, at most."""
FRAMES = 16
"""Frames of an animation, at most; beside words at most half of them."""
SIDE = 128
"""Larger pictures are made as small as this, in pixels."""
SUREST_OF = 64
"""Wrong texts of each task whose probability is looked up."""
COLOURS = ("#4c8dd6", "#e8813a", "#46a862", "#d9534f", "#9b77cf", "#a5785c", "#db6fae", "#8a8f98", "#b5a52a", "#2fb0bd")
"""Of curves; they can be told from a white ground and from a dark one."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the browser may load: nothing but the pictures inside the page."""

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
.looks { display: block; border: 0; font-size: 12px; margin-top: 10px; width: auto; }
.looks td { border: 0; padding: 1px 8px 1px 0; vertical-align: middle; } .looks img { height: 44px; max-width: 100%; }
.said { margin: 0 0 8px; } .right { color: var(--right); } .wrong { color: var(--wrong); }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
.legend span { display: inline-block; margin-right: 12px; white-space: nowrap; font-size: 13px; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 4px;
            vertical-align: middle; }
"""


def write_report(run: Path, predictor: Predictor | None = None) -> Path:
    """Write `run`/report.html and return its path. `predictor`: the model that made the predictions; without it `last`
    of the run is opened, if there are predictions. Raises FileNotFoundError if `run` is not the folder of a run."""
    file = run / "settings.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run, such as runs/tiny: it has no settings.json")
    settings = json.loads(file.read_text(encoding="utf-8"))
    metrics = read_lines(run / "metrics.jsonl")
    evaluations = [folder / "predictions.jsonl" for folder in (run, run / "last" / "eval")]
    newest = max(filter(Path.is_file, evaluations), key=lambda path: path.stat().st_mtime, default=None)
    predictions = read_lines(newest) if newest else []
    if predictions and predictor is None and (run / "last").exists():
        predictor = load(run / "last")
    by_split = latest(metrics)
    if newest and newest.parent.name == "eval" and (newest.parent / "metrics.json").is_file():
        by_split = split_up(json.loads((newest.parent / "metrics.json").read_text(encoding="utf-8")))
    name = f"{run.resolve().name}: {settings['train'].get('task', '')}"
    parts = [
        header(name, settings, metrics),
        section("Results", results(by_split, by_chance(settings, by_split))),
        section("Curves", curves(metrics)),
        section("Samples", samples(predictions, predictor)),
        section("Hardest mistakes", mistakes(predictions, predictor)),
        section("Settings", "<div class=grid>" + "".join(
            f"<div><h3>{part}</h3>{settings_table(settings[part])}</div>" for part in ("train", "model")
        ) + "</div>"),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(name)}</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
    )
    aside = run / "report.html.part"
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, run / "report.html")
    return run / "report.html"


# ---- what is in the files --------------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict]:
    """The objects of a jsonl file, without a last line that was cut off; none if there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def split_up(flat: dict[str, float]) -> dict[str, dict[str, float]]:
    """{"test/qa_order": x} -> {"test": {"qa_order": x}}"""
    by_split: dict[str, dict[str, float]] = defaultdict(dict)
    for key, value in flat.items():
        split, _, name = key.partition("/")
        by_split[split][name] = value
    return dict(by_split)


def latest(metrics: list[dict]) -> dict[str, dict[str, float]]:
    """What was found last on each split, by the name of the split."""
    flat = {key: value for line in metrics for key, value in line.items() if "/" in key and not key.startswith("loss/")}
    return split_up(flat)


def by_chance(settings: dict, by_split: dict) -> dict[str, float]:
    """What a model that looks at nothing gets on the last split that was evaluated, if the data are still there."""
    split = next(reversed(by_split), "")
    for root in map(Path, filter(None, [settings["train"].get("eval_data", ""), *settings.get("data", {})])):
        if split and any(root.glob(f"*.{split}.jsonl")):  # not so in a folder of shards, or one that is gone
            return chance_level(root, split)
    return {}


def is_right(line: dict) -> bool | None:
    """Whether a prediction is one of the truths; None if it has none, or is a number, which is more or less right."""
    if not line["truth"] or isinstance(line["prediction"], float):
        return None
    if line["task"] == "grounding":
        return overlap(line) >= 0.5
    return clean(line["prediction"]) in map(clean, line["truth"])


def overlap(line: dict) -> float:
    """Intersection over union of the predicted box and the true one."""
    boxes = torch.tensor([line["prediction"]]), torch.tensor(line["truth"][:1])
    return generalized_iou(*boxes)[0].item()


def confidence(predictor: Predictor | None, lines: list[dict]) -> list[float]:
    """How sure the model was of each prediction of one task: its probability, or 0 where that is not known; of boxes
    and numbers, how far they are off."""
    task = lines[0]["task"]
    if isinstance(lines[0]["prediction"], float):
        return [abs(line["prediction"] - line["truth"][0]) for line in lines]
    if task == "grounding":
        return [1 - overlap(line) for line in lines]
    if task.endswith(("_caption", "_qa")) and predictor:
        questions = [line["question"] for line in lines] if task.endswith("_qa") else None
        texts = [line["prediction"] for line in lines]
        with suppress(MediaError):  # damaged since the evaluation
            return predictor.likelihood([line["media"][0] for line in lines], texts, questions)
    return [line.get("confidence", 0.0) for line in lines]


# ---- the parts of the page -------------------------------------------------------------------------------------------


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
        "samples a second": f"{np.median([line['samples_per_second'] for line in steps]):.0f}" if steps else "",
        "files skipped": steps[-1].get("skipped_files", "") if steps else "",
        "memory, GiB": f"{steps[-1]['memory_gib']:.1f}" if steps and "memory_gib" in steps[-1] else "",
        "torch": settings.get("torch", ""),
    }
    shown = "".join(f"<div><b>{escape(str(value))}</b>{title}</div>" for title, value in tiles.items() if value != "")
    commands = "\n".join(settings.get("commands", []))
    return f"<h1>{escape(name)}</h1><div class=tiles>{shown}</div>" + (
        f"<p>To do it again:</p><pre>{escape(commands)}</pre>" if commands else "")


def settings_table(values: dict) -> str:
    return "<table>" + "".join(
        f"<tr><td>{escape(str(key))}<td>{escape(str(value))}" for key, value in values.items()) + "</table>"


def kind_of_metric(name: str) -> str:
    """The heading that a metric stands under."""
    if "qa_" in name:
        what = "Answers by kind of question"
    elif "caption_" in name:
        what = "Captions"
    elif re.search("(t2v|v2t|t2i|i2t)_", name):
        what = "Retrieval"
    else:
        return "Classes, labels and boxes"
    return f"{what}, {'pictures' if name.startswith('image_') else 'clips'}"


def is_share(name: str) -> bool:
    """Whether a metric is a share, from 0 to 1: all but CIDEr and ranks (a correlation is drawn as one)."""
    return not name.endswith(("cider", "median_rank"))


def by_kind(names: list[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        grouped[kind_of_metric(name)].append(name)
    return grouped


def results(by_split: dict[str, dict[str, float]], guessed: dict[str, float]) -> str:
    """A table for each kind of metric: a row for each, a column for each split, and what chance gives."""
    def cell(name: str, value: float | None) -> str:
        if value is None:
            return "<td class=number>"
        if not is_share(name) or not math.isfinite(value):
            return f"<td class=number>{value:.2f}"
        bar = f"<i style='width: {max(0.0, min(1.0, value)):.1%}'></i>"
        return f"<td class=number>{100 * value:.1f} %{bar}"

    columns = {**by_split, **({"chance": guessed} if guessed else {})}
    tables = []
    for kind, names in by_kind([name for values in by_split.values() for name in values]).items():
        rows = "".join(
            f"<tr><td>{escape(name)}" + "".join(cell(name, values.get(name)) for values in columns.values())
            for name in names
        )
        heads = "".join(f"<th>{escape(column)}" for column in columns)
        tables.append(f"<div><h3>{kind}</h3><table><tr><th>{heads}{rows}</table></div>")
    about = "<p>Chance: the commonest answer or label, a gallery ranked at random, the mean box.</p>" if guessed else ""
    return f"{about}<div class=packed>{''.join(tables)}</div>" if tables else ""


def curves(metrics: list[dict]) -> str:
    """Losses, what validation found, and how training went, over steps."""
    def points(names: list[str]) -> dict[str, list[tuple[float, float]]]:
        return {name: [(line["step"], line[name]) for line in metrics if name in line] for name in names}

    keys = list(dict.fromkeys(key for line in metrics for key in line))
    charts = [chart("training loss by objective", points([key for key in keys if key.startswith("loss/")]), log=True)]
    shares = [key.removeprefix("val/") for key in keys if key.startswith("val/") and is_share(key)]
    for kind, names in by_kind(shares).items():
        charts.append(chart(f"validation: {kind[0].lower()}{kind[1:]}", points([f"val/{name}" for name in names])))
    others = {"lr": "learning rate", "grad_norm": "gradient norm, before clipping",
              "samples_per_second": "samples a second", "waiting_for_data": "share of time waiting for data"}
    charts += [chart(title, points([key]), log=key == "grad_norm") for key, title in others.items()]
    return f"<div class=grid>{''.join(charts)}</div>" if any(charts) else ""


def chart(title: str, series: dict[str, list[tuple[float, float]]], log: bool = False) -> str:
    """Lines over steps, as SVG; `log`: a logarithmic axis, if all values are above 0."""
    series = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs, ys = zip(*(point for points in series.values() for point in points))
    log = log and min(ys) > 0
    scaled = math.log10 if log else float
    marks = ticks(min(ys), max(ys), log)
    low, high, last = min(scaled(min(ys)), scaled(marks[0])), max(scaled(max(ys)), scaled(marks[-1])), max(xs)

    def x_of(step: float) -> float:
        return 48 + 364 * step / last

    def y_of(value: float) -> float:
        return 196 - 184 * (scaled(value) - low) / ((high - low) or 1)

    drawn = [
        f"<path d='M48 {y_of(mark):.1f}H412' stroke='var(--line)'/>"
        f"<text x=42 y={y_of(mark) + 4:.1f} text-anchor=end>{mark:.4g}</text>" for mark in marks
    ] + [f"<text x={x_of(step):.1f} y=212 text-anchor=middle>{step:.6g}</text>"
         for step in ticks(0, last) if step % 1 == 0]
    legend = []
    for number, (name, points) in enumerate(series.items()):
        colour, label = COLOURS[number % len(COLOURS)], escape(name.removeprefix("loss/").removeprefix("val/"))
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        dots = "".join(f"<circle cx={x_of(x):.1f} cy={y_of(y):.1f} r=2.5 fill='{colour}'/>" for x, y in points)
        drawn.append(f"<g><title>{label}: {points[-1][1]:.4g} at step {points[-1][0]:,}</title>"
                     f"<polyline points='{path}' fill=none stroke='{colour}' stroke-width=1.6 />"
                     f"{dots if len(points) < 16 else ''}</g>")
        legend.append(f"<span><i style='background: {colour}'></i>{label} {points[-1][1]:.3g}</span>")
    return (f"<figure style='margin: 0'><h3>{escape(title)}{', logarithmic' if log else ''}</h3>"
            f"<svg viewBox='0 0 432 228'>{''.join(drawn)}<text x=230 y=226 text-anchor=middle>step</text></svg>"
            f"<div class=legend>{''.join(legend)}</div></figure>")


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers from `low` to `high`, whose ends lie inside of them or a little off."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [10.0**power * digit for power in powers for digit in (1, 2, 5)]
        inside = [mark for mark in marks if low <= mark <= high]
        return inside[:: max(1, len(inside) // 6)] or [low]
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    return [round(number * step, 10) for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def samples(predictions: list[dict], predictor: Predictor | None) -> str:
    """Some media of each task, always the same ones, each with all that was said of it; and where words look."""
    by_media: dict[tuple, list[dict]] = defaultdict(list)
    for number, line in enumerate(predictions):
        alone = not line["media"] or line["task"] == "grounding"  # a card shows one box
        by_media[(number,) if alone else tuple(line["media"])].append(line)
    cards, left = [], LOOKS
    for lines in spread(list(by_media.values()), lambda lines: lines[0]["task"]):
        looks = where_words_look(lines, predictor) if left else ""
        left -= bool(looks)
        cards.append(card(lines[:LINES], looks))
    about = ("Truth in brackets where it is another. Where words look: the mean over the heads of the last "
             "cross-attention of fusion (words of the question) or of the decoder (words that were written), each row "
             "scaled by its own largest weight; the number is the share of the attention that is on patches, the rest "
             "is on the class token and on text.")
    return f"<p>{about}</p><div class=grid>{''.join(cards)}</div>" if cards else ""


def spread(items: list, task_of: Callable[[object], str]) -> list:
    """Up to CARDS of the items, of each task about as many; always the same ones."""
    shuffled = random.Random(0).sample(items, len(items))
    queues: dict[str, list] = defaultdict(list)
    for item in shuffled:
        queues[task_of(item)].append(item)
    rounds = [queue[turn] for turn in range(CARDS) for queue in queues.values() if turn < len(queue)]
    return sorted(rounds[:CARDS], key=lambda item: EVALUATED.index(task_of(item)))


def mistakes(predictions: list[dict], predictor: Predictor | None) -> str:
    """Of each task the wrong predictions that the model was surest of; of numbers those that are farthest off."""
    by_task: dict[str, list[dict]] = defaultdict(list)
    for line in predictions:
        number = isinstance(line["prediction"], float) and line["truth"]
        if (number or is_right(line) is False) and all(Path(path).is_file() for path in line["media"]):
            by_task[line["task"]].append(line)
    ranked = []
    for task in sorted(by_task, key=EVALUATED.index):
        lines = by_task[task]
        if not isinstance(lines[0]["prediction"], float):
            lines = random.Random(0).sample(lines, min(SUREST_OF, len(lines)))
        scored = [{**line, "confidence": value} for line, value in zip(lines, confidence(predictor, lines))]
        ranked.append(sorted(scored, key=lambda line: -line["confidence"])[: math.ceil(CARDS / len(by_task))])
    count = sum(is_right(line) is False for line in predictions)
    about = (f"{count:,} of {len(predictions):,} predictions are wrong. Of up to {SUREST_OF} wrong ones of each task, "
             "those that the model was surest of: that it gave the highest probability, where that is known; of boxes "
             "those that miss by most, of numbers the largest errors.")
    cards = "".join(card([line]) for lines in ranked for line in lines)
    return f"<p>{about}</p><div class=grid>{cards}</div>" if cards else ""


def card(lines: list[dict], looks: str = "") -> str:
    """Media, and what was said about them."""
    said = "".join(map(sentence, lines))
    pictures = "".join(picture(path, lines[0]) for path in lines[0]["media"])
    media = f"<div class=media>{pictures}</div>" if pictures else ""
    title = escape(f"{lines[0]['task']}, {lines[0]['split']}")
    return f"<div class=card>{media}<div><p>{title}</p>{said}{looks}</div></div>"


def sentence(line: dict) -> str:
    """One prediction: question, what was predicted, and the truth if it is another."""
    right, predicted, truths = is_right(line), shown(line["prediction"]), [shown(truth) for truth in line["truth"]]
    mark = {True: "<span class=right>&#10003;</span> ", False: "<span class=wrong>&#10007;</span> ", None: ""}[right]
    question = f"<span class=faint>{escape(line['question'])}</span><br>" if line["question"] else ""
    truth = "" if right or not truths else f" <span class=faint>({escape(truths[0])})</span>"
    sure = ""
    if line.get("confidence") and not isinstance(line["prediction"], float):
        value, what = line["confidence"], "probability"
        if line["task"] == "grounding":
            value, what = 1 - value, "overlap"
        sure = f"<br><span class=faint>{what} {value:.0%}</span>"
    return f"<div class=said>{question}{mark}{escape(predicted) or '(nothing)'}{truth}{sure}</div>"


def shown(value: str | float | list) -> str:
    if isinstance(value, list):
        return ", ".join(f"{number:.2f}" for number in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture(path: str, line: dict) -> str:
    """A clip, moving, or a picture; with boxes, the true one in white and the predicted one in orange."""
    try:
        frames = shrunk(read_media(path, FRAMES))
    except (MediaError, OSError) as error:
        return f"<p class=wrong>{escape(str(error))}</p>"
    if line["task"] == "grounding":
        for box, colour in ((line["truth"][:1], (255, 255, 255)), ([line["prediction"]], (255, 150, 0))):
            for one in box:
                draw_box(frames[0], one, colour)
    name = escape(Path(path).name)
    return f"<img src='{data_uri(frames)}' alt='{name}'><div class=faint>{name}</div>"


def where_words_look(lines: list[dict], predictor: Predictor | None) -> str:
    """A row of frames for each word of a question, if there is one, and of what the model writes."""
    line = max(lines, key=lambda line: bool(line["question"]))
    built = predictor.model.components if predictor else frozenset()
    if not built or len(line["media"]) != 1 or not Path(line["media"][0]).is_file():
        return ""
    if "decoder" in built and not line["task"].endswith(("_caption", "_qa")) or not built & {"fusion", "decoder"}:
        return ""
    try:
        written, looks = predictor.explain(line["media"][0], line["question"])
        frames = read_media(line["media"][0], predictor.preprocess.frames)
    except MediaError:  # damaged since the evaluation; `picture` says so
        return ""
    if not looks:
        return ""
    frames = shrunk(seen(frames, looks[0]))
    rows = "".join(look_row(look, frames) for look in looks[:WORDS])
    about = f"Where the words look: {line['question']} {written}".strip()
    return f"<div class=faint>{escape(about)}</div><table class=looks>{rows}</table>"


def look_row(look: WordAttention, frames: np.ndarray) -> str:
    every = math.ceil(2 * len(frames) / FRAMES)
    strip = np.concatenate(list(overlay(frames, look)[::every]), axis=1)[None]
    return (f"<tr><td>{escape(look.word)}<td class=faint>{escape(look.module.split('.')[0])}<br>"
            f"{look.map.sum().item():.0%}<td><img src='{data_uri(strip)}' alt='where {escape(look.word)} looks'>")


def shrunk(frames: np.ndarray) -> np.ndarray:
    """Frames `t H W 3`, made as small as SIDE if they are larger."""
    height, width = frames.shape[1:3]
    if max(height, width) <= SIDE:
        return frames.copy()
    size = (max(1, round(width * SIDE / max(height, width))), max(1, round(height * SIDE / max(height, width))))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def draw_box(frame: np.ndarray, box: list[float], colour: tuple[int, int, int]) -> None:
    """Draw a box (centre x, y, width, height, as shares) into `H W 3`, one pixel wide."""
    height, width = frame.shape[:2]
    cx, cy, w, h = box
    left, right = (int(np.clip(x * width, 0, width - 1)) for x in (cx - w / 2, cx + w / 2))
    top, bottom = (int(np.clip(y * height, 0, height - 1)) for y in (cy - h / 2, cy + h / 2))
    frame[[top, bottom], left: right + 1] = colour
    frame[top: bottom + 1, [left, right]] = colour


def data_uri(frames: np.ndarray) -> str:
    """uint8 `t H W 3` as a WebP, moving if there are many: two seconds a round or less, and a rest at the end."""
    images = [Image.fromarray(frame) for frame in frames]
    while len(images) > 1 and images[-1].tobytes() == images[-2].tobytes():  # a short clip repeats its last frame
        images.pop()
    duration = [int(np.clip(2000 / len(images), 100, 400))] * len(images)
    duration[-1] += 600
    file = io.BytesIO()
    many = dict(save_all=True, append_images=images[1:], duration=duration, loop=0) if len(images) > 1 else {}
    images[0].save(file, "WEBP", lossless=frames.shape[1] <= 64, quality=80, **many)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m mplug2.tools.report runs/NAME", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(arguments[0])))
    except (ValueError, OSError) as error:
        print(f"mplug2.tools.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
