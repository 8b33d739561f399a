"""Pictures: the curves of a run, contact sheets of frames with what the model said of them, and where words look."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from mplug2.data.media import read_media  # noqa: E402
from mplug2.evaluation.evaluate import Prediction  # noqa: E402
from mplug2.predictor import WordAttention  # noqa: E402


def curves(metrics_file: Path, out: Path) -> None:
    """Draw `metrics.jsonl` of a run: losses by objective, and what validation found, over steps.

    A run can save, or be stopped, before it writes the first line and thereby creates the file: the plots are then
    empty.
    """
    text = metrics_file.read_text() if metrics_file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
    for name in sorted({key for line in lines for key in line if key.startswith("loss/")}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        left.plot(*zip(*points), label=name.removeprefix("loss/"), linewidth=1.2)
    left.set(xlabel="step", ylabel="loss (nats)", title="training losses")
    colours: dict[str, int] = {}
    for name in sorted({key.removeprefix("val/") for line in lines for key in line if key.startswith("val/")}):
        points = [(line["step"], line[f"val/{name}"]) for line in lines if f"val/{name}" in line]
        # The strictest share of each kind; clips and pictures in one colour.
        if name.endswith(("exact", "_r1", "accuracy", "_zero_shot")) or "qa_" in name:
            colour = f"C{colours.setdefault(name.removeprefix('image_'), len(colours)) % 10}"
            style = "--" if name.startswith("image_") else "-"
            right.plot(*zip(*points), style, color=colour, label=name, linewidth=1.2, marker=".")
    right.set(xlabel="step", ylabel="share that is right", ylim=(0, 1.02), title="validation (dashed: pictures)")
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


def attention(path: str, frames: int, words: list[WordAttention], written: str, question: str, out: Path) -> None:
    """A row for each word: the frames in grey, and the warmer the more the word words there.

    Each row is scaled by its own largest weight."""
    if not words:
        raise ValueError(f"{path}: nothing was written about it, so that no word words anywhere")
    shown = seen(read_media(path, frames), words[0])
    columns = len(shown)
    figure, grid = plt.subplots(
        len(words) + 1, columns + 1, figsize=(1.5 * columns + 3, 1.5 * (len(words) + 1)), squeeze=False,
        gridspec_kw={"width_ratios": [1] * columns + [2]},
    )
    for row, look in zip(grid, [None, *words]):
        for axes, frame in zip(row, overlay(shown, look) if look else shown):
            axes.imshow(frame, interpolation="nearest")
        for axes in row:
            axes.axis("off")
        text = f"{question}?\n{written}" if question else written
        if look:
            text = f"{look.word}\n{look.map.sum().item():.0%} on patches\n{look.module}"
        row[-1].text(0, 0.5, text, va="center", fontsize=9 if look is None else 8)
    out.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, out)


def seen(frames: np.ndarray, look: WordAttention) -> np.ndarray:
    """Those of the frames `t H W 3` that `look` has a map of: with temporal down-sampling, every second one."""
    columns = look.map.shape[0]
    return frames[:: max(1, len(frames) // columns)][:columns]


def overlay(frames: np.ndarray, look: WordAttention) -> np.ndarray:
    """The frames `t H W 3` in grey, and the warmer the more the word words there: uint8 `t H W 3`.

    Scaled by the largest weight of all frames; grey, so that every colour is a weight, on dark ground too."""
    weights = look.map.float().numpy() / max(look.map.max().item(), 1e-9)
    (height, width), (h, w) = frames.shape[1:3], weights.shape[1:]
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    warm = matplotlib.colormaps["inferno"](weights[:, rows][:, :, columns])[..., :3] * 255
    return (0.65 * warm + 0.35 * frames.max(axis=3, keepdims=True)).round().astype(np.uint8)


def _draw_box(axes: plt.Axes, box: tuple[float, ...], shape: tuple[int, ...], colour: str) -> None:
    """box: centre x, centre y, width, height, as shares of the picture of `shape` (height, width, ...)."""
    cx, cy, w, h = box[0] * shape[1], box[1] * shape[0], box[2] * shape[1], box[3] * shape[0]
    axes.add_patch(plt.Rectangle((cx - w / 2 - 0.5, cy - h / 2 - 0.5), w, h, fill=False, color=colour, linewidth=1.5))


def _save(figure: plt.Figure, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
