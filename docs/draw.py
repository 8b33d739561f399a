"""Draws the figures of the README and of docs/, and copies the example videos: python docs/draw.py

It writes, next to itself:
- architecture.svg, the model;
- frames.png, questions about test videos, answered by the checkpoint in tiny_data/pretrained;
- attention.png, where the words of one question and of its answer attend, by the same checkpoint;
- curves.png, drawn from metrics.jsonl, the log of a default run;
- examples/, six videos of the tiny world's test split.

The backgrounds of the first two are transparent, and their colors are readable on white and on dark pages.
"""

import shutil
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt

import mplug2
import tiny_data
from mplug2.data.media import read_media
from mplug2.data.records import read_records
from mplug2.flags import Parser
from mplug2.tools.drawing import overlay
from mplug2.tools.plots import draw_attention, draw_curves

HERE = Path(__file__).parent
FAINT = "#7d8590"
VISION, TIME, TEXT, SHARED, JOINED = "#2f6fb3", "#b3541e", "#2e7d4f", "#7a4fa3", "#55606e"
"""Colors of the boxes: vision only, video only, text only, shared by text and vision, both together."""
EXAMPLES = {
    "blue_seven_left": "blue 7 left", "blue_seven_right": "blue 7 right", "green_two_left": "green 2 left",
    "red_seven_growing": "red 7 grow", "red_eight_then_blue_zero": "red 8 > blue 0",
    "blue_three_and_green_two": "blue 3 + green 2",
}
"""Names of the example videos, and the `positive_id` of the records that they come from."""


def architecture() -> str:
    """The model as SVG: its modules with their files, the data between them, and the losses."""
    vision = [(VISION, "patches and class tokens"), (TIME, "local temporal module"),
              (VISION, "self-attention in each frame"), (TIME, "local temporal module"), (VISION, "MLP")]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 20 1100 408" font-family="system-ui, sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{FAINT}"/></marker></defs>',
        # inputs
        *frames(14, 46), label(84, 206, "video: t frames"), label(84, 223, "(an image: t = 1)"),
        box(14, 322, 136, 34, TEXT, ["which digit is it"]), label(82, 378, "text"),
        # encoders
        panel(190, 34, 220, 202, VISION, "dual-vision encoder", "vision_encoder.py"),
        *[box(202, 78 + 30 * i, 176, 25, color, [text], 11.5) for i, (color, text) in enumerate(vision)],
        f'<path d="M383 110h7v115h-7" fill="none" stroke="{FAINT}"/>', label(399, 172, "×N", 12),
        panel(190, 284, 220, 104, TEXT, "text encoder", "text_encoder.py"),
        box(202, 332, 196, 42, TEXT, ["M − S BERT layers:", "self-attention, feed-forward"], 11.5),
        # universal layers
        panel(452, 34, 176, 354, SHARED, "universal layers", "universal.py"),
        box(464, 84, 152, 76, VISION,
            ["vision only:", "learned latents and", "cross-attention", "between latents and V"], 11.5),
        box(464, 182, 152, 192, SHARED, ["one set of weights", "for text and vision:", "", "self-attention",
                                         "feed-forward", "", "×S, the last layers", "of the text encoder"]),
        # fusion and decoder
        panel(712, 272, 128, 116, JOINED, "fusion", "fusion.py"),
        box(722, 320, 108, 54, JOINED, ["text attends to V':", "cross-attention"], 11.5),
        panel(840, 60, 136, 128, JOINED, "shared decoder", "decoder.py"),
        box(850, 108, 116, 66, JOINED, ["causal; attends to V'", "(captions), or to V'", "and fused text"], 11.5),
        # arrows
        arrow("M160 117H188"), arrow("M150 339H188"),
        arrow("M410 122H450"), label(430, 114, "V"), arrow("M410 339H450"),
        arrow("M628 122H838"), label(664, 114, "V'"), arrow("M744 122V270"), arrow("M628 339H710"),
        arrow("M808 272V160H838"), arrow("M840 339H868"), arrow("M976 124H1000"),
        # outputs and losses
        f'<path d="M664 132V329" stroke="{FAINT}" stroke-dasharray="4 3" marker-start="url(#tip)" '
        'marker-end="url(#tip)"/>',
        loss(670, 235, "VTC"),
        label(1046, 106, "a red seven"), label(1046, 123, "moving left;"), label(1046, 140, "seven"),
        loss(1035, 164, "LM"), label(925, 334, "classes, boxes,", 12), label(925, 350, "match or not,", 12),
        label(925, 366, "masked words", 12), loss(976, 350, "VTM"), loss(976, 366, "MLM"),
        label(545, 418, "Each task builds, loads and runs only the modules that it needs "
                        "(a captioner: no text encoder, no fusion).", 12),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def frames(x: float, y: float) -> list[str]:
    """Four frames of a video with their patches; a seven moves left."""
    drawn = []
    for t in range(4):
        left, top = x + 73 * (t % 2), y + 73 * (t // 2)
        drawn.append(f'<rect x="{left}" y="{top}" width="68" height="68" fill="#101418" stroke="{FAINT}"/>')
        drawn += [f'<path d="M{left + 17 * i} {top}v68M{left} {top + 17 * i}h68" stroke="#3a424c" stroke-width=".7"/>'
                  for i in (1, 2, 3)]
        drawn.append(f'<text x="{left + 53 - 12 * t}" y="{top + 46}" font-size="34" font-weight="bold" fill="#e5484d" '
                     'text-anchor="middle">7</text>')
    return drawn


def panel(x: float, y: float, width: float, height: float, color: str, title: str, file: str) -> str:
    """A module: a frame with the name and the file at the top."""
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{color}" fill-opacity=".14" '
            f'stroke="{color}" stroke-width="1.5"/>' + label(x + width / 2, y + 20, title, 14.5, "bold")
            + label(x + width / 2, y + 37, file, 12))


def box(x: float, y: float, width: float, height: float, color: str, lines: list[str], size: float = 12) -> str:
    first = y + height / 2 - (len(lines) - 1) * (size + 4) / 2 + size * 0.35
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{color}"/>' + "".join(
        label(x + width / 2, first + i * (size + 4), text, size, color="#ffffff") for i, text in enumerate(lines))


def label(x: float, y: float, text: str, size: float = 13, weight: str = "normal", color: str = FAINT) -> str:
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" fill="{color}" '
            f'text-anchor="middle">{escape(text)}</text>')


def loss(x: float, y: float, name: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="13" font-weight="bold" fill="#d9772b">{name}</text>'


def arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{FAINT}" stroke-width="1.6" marker-end="url(#tip)"/>'


def answers(model: mplug2.Predictor, out: Path) -> None:
    """One row per question about a test video: frames, the answer, and where the answer attends."""
    kinds, rows = ["order", "digit", "color"], []
    for record in read_records(tiny_data.ensure(), "video_qa", "test"):
        for question in record.qa:
            if kinds and question.kind == kinds[0]:
                kinds.pop(0)
                rows.append((record, question))
                break
    figure, grid = plt.subplots(len(rows), 9, figsize=(11, 1.35 * len(rows)),
                                gridspec_kw={"width_ratios": [1] * 4 + [2.4] + [1] * 4, "wspace": 0.06, "hspace": 0.08})
    for row, (record, question) in zip(grid, rows):
        written, words = model.explain(record.video, question.question)
        shown = read_media(record.video, model.preprocess.frames)
        row[4].axis("off")
        for axes, frame in zip([*row[:4], *row[5:]], [*shown, *overlay(shown, words[-1])]):
            axes.imshow(frame, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(FAINT)  # gives black frames an edge on a dark page
        row[4].text(0.5, 0.62, f"{question.question}?", ha="center", va="center", fontsize=9, color=FAINT, wrap=True)
        row[4].text(0.5, 0.34, written, ha="center", va="center", fontsize=13, weight="bold",
                    color="#3a9d5d" if written in question.answers else "#d9534f")
    figure.savefig(out, dpi=110, transparent=True, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def attended_words(model: mplug2.Predictor, out: Path) -> None:
    """Where each word of a question about an example video, and the answer, attends."""
    video, question = HERE / "examples" / "blue_seven_left.gif", "does it move left or right"
    written, words = model.explain(video, question)
    draw_attention(video, model.preprocess.frames, words, f"{question}?\n{written}", out)


def examples(folder: Path) -> None:
    """Copies of the test videos listed in `EXAMPLES`."""
    folder.mkdir(exist_ok=True)
    videos = {record.positive_id: record.video for record in read_records(tiny_data.ensure(), "video_caption", "test")}
    for name, positive_id in EXAMPLES.items():
        shutil.copyfile(videos[positive_id], folder / f"{name}.gif")


def main(arguments: list[str] | None = None) -> None:
    Parser(__doc__, "python docs/draw.py").read(arguments)  # it has no flags: any argument is refused
    predictor = mplug2.load(HERE.parent / "tiny_data" / "pretrained")
    (HERE / "architecture.svg").write_text(architecture(), encoding="utf-8")
    draw_curves(HERE / "metrics.jsonl", HERE / "curves.png")
    examples(HERE / "examples")
    answers(predictor, HERE / "frames.png")
    attended_words(predictor, HERE / "attention.png")


if __name__ == "__main__":
    main()
