"""Pictures: the curves of a run, and contact sheets of frames with what the model said of them."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from mplug2.data.media import read_media  # noqa: E402
from mplug2.evaluation import Prediction  # noqa: E402


def curves(metrics_file: Path, out: Path) -> None:
    """Draw `metrics.jsonl` of a run: losses by objective, and what validation found, over steps."""
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
    for name in sorted({key for line in lines for key in line if key.startswith("loss/")}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        left.plot(*zip(*points), label=name.removeprefix("loss/"), linewidth=1.2)
    left.set(xlabel="step", ylabel="loss (nats)", title="training losses")
    for name in sorted({key for line in lines for key in line if key.startswith("val/")}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if name.endswith(("exact", "_r1")) or "qa_" in name:  # the strictest share of each kind
            style = "--" if "image_" in name else "-"
            right.plot(*zip(*points), style, label=name.removeprefix("val/"), linewidth=1.2, marker=".")
    right.set(xlabel="step", ylabel="share that is right", ylim=(0, 1.02), title="validation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, out)


def contact_sheet(predictions: list[Prediction], frames: int, out: Path) -> None:
    """A row for each prediction: up to `frames` frames, then question, prediction and truth; wrong ones in red."""
    figure, grid = plt.subplots(
        len(predictions), frames + 1, figsize=(1.3 * frames + 5, 1.35 * len(predictions)), squeeze=False,
        gridspec_kw={"width_ratios": [1] * frames + [4]},
    )
    for row, prediction in zip(grid, predictions):
        shown = read_media(prediction.media, frames)
        for axes, frame in zip(row, shown):
            axes.imshow(np.asarray(frame), interpolation="nearest")
        for axes in row:
            axes.axis("off")
        right = prediction.prediction in prediction.truth
        question = f"{prediction.question}?\n" if prediction.question else ""
        row[-1].text(
            0, 0.5, f"{question}predicted: {prediction.prediction}\ntruth: {prediction.truth[0]}",
            va="center", fontsize=9, color="black" if right else "firebrick", wrap=True,
        )
    _save(figure, out)


def _save(figure: plt.Figure, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
