"""Pictures: the curves of a run, contact sheets of frames with what the model said of them, and where words look."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from mplug2.data.media import read_media  # noqa: E402
from mplug2.evaluation import Prediction  # noqa: E402
from mplug2.inference import Look  # noqa: E402


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
        shown = [np.asarray(frame) for frame in read_media(prediction.media, frames)]
        shown += [np.asarray(frame) for frame in read_media(prediction.second, 1)] if prediction.second else []
        for axes, frame in zip(row[:-1], shown):
            axes.imshow(frame, interpolation="nearest")
        for axes in row:
            axes.axis("off")
        right = prediction.prediction in prediction.truth if prediction.right is None else prediction.right
        if prediction.task == "grounding":
            for box, colour in ((prediction.truth[0], "white"), (prediction.prediction, "orange")):
                _draw_box(row[0], box, shown[0].shape, colour)
        question = f"{prediction.question}?\n" if prediction.question else ""
        row[-1].text(
            0, 0.5, f"{question}predicted: {prediction.prediction}\ntruth: {prediction.truth[0]}",
            va="center", fontsize=9, color="black" if right else "firebrick", wrap=True,
        )
    _save(figure, out)


def attention(path: str, frames: int, looks: list[Look], written: str, question: str, out: Path) -> None:
    """A row for each word: the frames in grey, and the warmer the more the word looks there.

    Each row is scaled by its own largest weight."""
    if not looks:
        raise ValueError(f"{path}: nothing was written about it, so that no word looks anywhere")
    shown = [np.asarray(frame) for frame in read_media(path, frames)]
    columns = looks[0].map.shape[0]
    shown = shown[:: max(1, len(shown) // columns)][:columns]  # with temporal down-sampling, every second frame
    figure, grid = plt.subplots(
        len(looks) + 1, columns + 1, figsize=(1.5 * columns + 3, 1.5 * (len(looks) + 1)), squeeze=False,
        gridspec_kw={"width_ratios": [1] * columns + [2]},
    )
    for row, look in zip(grid, [None, *looks]):
        for t, (axes, frame) in enumerate(zip(row, shown)):
            height, width = frame.shape[:2]
            place = (0, width, height, 0)
            # Behind weights the frame is grey, so that every colour is a weight, on dark ground too.
            axes.imshow(frame.max(axis=2) if look else frame, cmap="gray", interpolation="nearest", extent=place)
            if look:
                weights = look.map[t].float().numpy() / max(look.map.max().item(), 1e-9)
                axes.imshow(weights, cmap="inferno", vmin=0, vmax=1, alpha=0.65, interpolation="nearest", extent=place)
        for axes in row:
            axes.axis("off")
        text = f"{question}?\n{written}" if question else written
        if look:
            text = f"{look.word}\n{look.map.sum().item():.0%} on patches\n{look.module}"
        row[-1].text(0, 0.5, text, va="center", fontsize=9 if look is None else 8)
    out.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, out)


def _draw_box(axes: plt.Axes, box: tuple[float, ...], shape: tuple[int, ...], colour: str) -> None:
    """box: centre x, centre y, width, height, as shares of the picture of `shape` (height, width, ...)."""
    cx, cy, w, h = box[0] * shape[1], box[1] * shape[0], box[2] * shape[1], box[3] * shape[0]
    axes.add_patch(plt.Rectangle((cx - w / 2 - 0.5, cy - h / 2 - 0.5), w, h, fill=False, color=colour, linewidth=1.5))


def _save(figure: plt.Figure, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
