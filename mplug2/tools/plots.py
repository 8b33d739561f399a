"""Plots as image files: the curves of a run, and the attention of words over frames.

Figures are made without pyplot, whose backend belongs to the user (a notebook, for example), and matplotlib is imported
when something is drawn: it would cost every start half a second.
"""

import json
from pathlib import Path

from mplug2.data.media import read_media
from mplug2.predictor import WordAttention
from mplug2.tools.drawing import attended_frames, overlay


def draw_curves(metrics_file: Path, out: Path) -> None:
    """Draw the `metrics.jsonl` of a run: losses by objective, and validation metrics, over steps.

    The plots are empty if the file does not exist yet: a run can save, or be stopped, before its first log line.
    """
    text = metrics_file.read_text() if metrics_file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 4.5), layout="tight")
    left, right = figure.subplots(1, 2)
    for name in sorted({key for line in lines for key in line if key.startswith("loss/")}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        left.plot(*zip(*points), label=name.removeprefix("loss/"), linewidth=1.2)
    left.set(xlabel="step", ylabel="loss (nats)", title="training losses")
    colors: dict[str, int] = {}
    for name in sorted({key.removeprefix("val/") for line in lines for key in line if key.startswith("val/")}):
        points = [(line["step"], line[f"val/{name}"]) for line in lines if f"val/{name}" in line]
        # The strictest metric of each kind; images and videos share a color.
        if name.endswith(("exact", "_r1", "accuracy", "_zero_shot")) or "qa_" in name:
            of_video = name.removeprefix("image_").replace("t2i_", "t2v_").replace("i2t_", "v2t_")
            color = f"C{colors.setdefault(of_video, len(colors)) % 10}"
            style = "-" if name == of_video else "--"
            right.plot(*zip(*points), style, color=color, label=name, linewidth=1.2, marker=".")
    right.set(xlabel="step", ylabel="fraction right", ylim=(0, 1.02), title="validation (dashed: images)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out, dpi=110)


def draw_attention(path: str, frames: int, words: list[WordAttention], title: str, out: Path) -> None:
    """Draw one row per word: the frames in gray, and warmer colors where the word attends more.

    Each row is scaled by its own largest weight. Raises ValueError without words.
    """
    if not words:
        raise ValueError(f"{path}: the model wrote nothing about it, so no word has attention; ask a --question")
    from matplotlib.figure import Figure
    shown = attended_frames(read_media(path, frames), words[0])
    columns = len(shown)
    figure = Figure(figsize=(1.5 * columns + 3, 1.5 * (len(words) + 1)), layout="tight")
    grid = figure.subplots(len(words) + 1, columns + 1, squeeze=False, width_ratios=[1] * columns + [2])
    for row, word in zip(grid, [None, *words]):
        for axes, frame in zip(row, overlay(shown, word) if word else shown):
            axes.imshow(frame, interpolation="nearest")
        for axes in row:
            axes.axis("off")
        text = f"{word.word}\n{word.map.sum().item():.0%} on patches\n{word.module}" if word else title
        row[-1].text(0, 0.5, text, va="center", fontsize=8 if word else 9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
