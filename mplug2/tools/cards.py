"""The cards of a report: images and videos, the predictions about them, and the attention of the words.

A prediction is a line of `predictions.jsonl`. Everything that comes from data is escaped.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from html import escape
from pathlib import Path

import numpy as np

from mplug2.data.media import MediaError, read_image, read_video
from mplug2.data.media_batches import Medium
from mplug2.evaluation.predictions import is_right
from mplug2.evaluation.ranking import box_iou
from mplug2.predictor import Predictor, WordAttention
from mplug2.tasks import EVALUATED, TASKS
from mplug2.tools.drawing import attended_frames, data_uri, draw_box, overlay, scale_down

CARDS = 8
"""Cards with samples, and as many with mistakes."""
LINES = 4
"""Predictions on a card."""
ATTENTION_CARDS = 4
"""Samples that are shown with the attention of the words."""
WORDS = 16
"""Largest number of words whose attention is shown."""
FRAMES = 16
"""Largest number of frames of an animation; half as many next to a word."""
RANKED_MISTAKES = 64
"""Wrong predictions whose probability is computed, of all tasks together: their files are decoded again for that."""


def right(line: dict) -> bool | None:
    """Whether a line of `predictions.jsonl` is right; None for numbers and unlabelled records."""
    if "right" in line:
        return line["right"]
    return is_right(line["task"], line["prediction"], line["truth"])  # a file from before the field existed


def medium_of(line: dict) -> Medium:
    """The image or video of a prediction; the task decides which of them it is."""
    return Medium(tuple(map(Path, line["media"])), TASKS[line["task"]].modality)


def frames_of(path: str, modality: str, frames: int) -> np.ndarray:
    """uint8 `t H W 3`, with t = 1 for an image."""
    return read_image(path) if modality == "image" else read_video(path, frames)


def add_confidence(predictor: Predictor | None, lines: list[dict]) -> list[dict]:
    """Lines of one task with a `confidence` by which mistakes are ranked: the probability of the prediction, 0 if it is
    unknown; of a box, one minus its IoU; of a number, its error."""
    task = lines[0]["task"]
    if isinstance(lines[0]["prediction"], float):
        values = [abs(line["prediction"] - line["truth"][0]) for line in lines]
    elif TASKS[task].output == "box":
        values = 1 - box_iou([line["truth"][0] for line in lines], [line["prediction"] for line in lines])
    else:
        values = [line.get("confidence", 0.0) for line in lines]
        if TASKS[task].output in ("caption", "answer") and predictor and lines[0]["media"]:
            questions = [line["question"] for line in lines] if TASKS[task].output == "answer" else None
            with suppress(MediaError):  # a file that was damaged after the evaluation
                values = predictor.likelihood(
                    list(map(medium_of, lines)), [line["prediction"] for line in lines], questions)
    return [{**line, "confidence": float(value)} for line, value in zip(lines, values)]


# ---- cards -----------------------------------------------------------------------------------------------------------


def sample_cards(predictions: list[dict], predictor: Predictor | None) -> str:
    """Some media of each task, always the same ones, with their predictions and the attention of the words."""
    by_media: dict[tuple, list[dict]] = defaultdict(list)
    for number, line in enumerate(predictions):
        alone = not line["media"] or TASKS[line["task"]].output == "box"  # a card shows one box
        by_media[(number,) if alone else tuple(line["media"])].append(line)
    cards, left = [], ATTENTION_CARDS
    for lines in spread(list(by_media.values()), lambda lines: lines[0]["task"]):
        attention = attention_rows(lines, predictor) if left else ""
        left -= bool(attention)
        cards.append(card(lines[:LINES], attention))
    about = ("The truth is in brackets where the prediction is wrong. Attention of a word: the mean over the heads of "
             "the last cross-attention of fusion (words of the question) or of the decoder (written words). Each row "
             "is scaled by its own largest weight. The percentage is the part of the attention that is on patches; "
             "the rest is on the class token and on text.")
    return f"<p>{about}</p><div class=grid>{''.join(cards)}</div>" if cards else ""


def spread(items: list, task_of: Callable[[object], str]) -> list:
    """Up to CARDS of the items, about as many of each task; always the same ones."""
    shuffled = random.Random(0).sample(items, len(items))
    queues: dict[str, list] = defaultdict(list)
    for item in shuffled:
        queues[task_of(item)].append(item)
    rounds = [queue[turn] for turn in range(CARDS) for queue in queues.values() if turn < len(queue)]
    return sorted(rounds[:CARDS], key=lambda item: EVALUATED.index(task_of(item)))


def mistake_cards(predictions: list[dict], predictor: Predictor | None) -> str:
    """The most confident wrong predictions of each task; of numbers those with the largest errors."""
    by_task: dict[str, list[dict]] = defaultdict(list)
    for line in predictions:
        number = isinstance(line["prediction"], float) and line["truth"]
        if (number or right(line) is False) and all(Path(path).is_file() for path in line["media"]):
            by_task[line["task"]].append(line)
    ranked = []
    for task in sorted(by_task, key=EVALUATED.index):
        lines = by_task[task]
        if not isinstance(lines[0]["prediction"], float):
            lines = random.Random(0).sample(lines, min(RANKED_MISTAKES // len(by_task), len(lines)))
        lines = sorted(add_confidence(predictor, lines), key=lambda line: -line["confidence"])
        ranked.append(lines[: math.ceil(CARDS / len(by_task))])
    count = sum(right(line) is False for line in predictions)
    about = (f"{count:,} of {len(predictions):,} predictions are wrong. From up to {RANKED_MISTAKES} of them, as many "
             "of each task, these are the most confident ones: those with the highest probability, where it is known, "
             "boxes with the smallest overlap, and numbers with the largest error.")
    cards = "".join(card([line]) for lines in ranked for line in lines)
    return f"<p>{about}</p><div class=grid>{cards}</div>" if cards else ""


def card(lines: list[dict], attention: str = "") -> str:
    """Images or a video, and the predictions about them."""
    said = "".join(map(prediction_row, lines))
    shown = "".join(medium(path, lines[0]) for path in lines[0]["media"])
    media = f"<div class=media>{shown}</div>" if shown else ""
    title = escape(f"{lines[0]['task']}, {lines[0]['split']}")
    return f"<div class=card>{media}<div><p>{title}</p>{said}{attention}</div></div>"


def prediction_row(line: dict) -> str:
    """The question, the prediction, and the truth if the prediction is wrong."""
    is_correct, truths = right(line), [format_output(truth) for truth in line["truth"]]
    marks = {True: "<span class=right>&#10003;</span> ", False: "<span class=wrong>&#10007;</span> ", None: ""}
    mark = marks[is_correct]
    question = f"<span class=faint>{escape(line['question'])}</span><br>" if line["question"] else ""
    truth = "" if is_correct or not truths else f" <span class=faint>({escape(truths[0])})</span>"
    note = ""
    if line.get("confidence") and not isinstance(line["prediction"], float):
        value, what = line["confidence"], "probability"
        if TASKS[line["task"]].output == "box":
            value, what = 1 - value, "overlap"
        note = f"<br><span class=faint>{what} {value:.0%}</span>"
    written = escape(format_output(line["prediction"])) or "(nothing)"
    return f"<div class=said>{question}{mark}{written}{truth}{note}</div>"


def format_output(value: str | float | list) -> str:
    if isinstance(value, list):
        return ", ".join(f"{number:.2f}" for number in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# ---- images ----------------------------------------------------------------------------------------------------------


def medium(path: str, line: dict) -> str:
    """A moving video, or an image; with boxes, the true one in white and the predicted one in orange."""
    try:
        frames = scale_down(frames_of(path, TASKS[line["task"]].modality, FRAMES))
    except (MediaError, OSError) as error:
        return f"<p class=wrong>{escape(str(error))}</p>"
    if TASKS[line["task"]].output == "box":
        for box in line["truth"][:1]:
            draw_box(frames[0], box, (255, 255, 255))
        draw_box(frames[0], line["prediction"], (255, 150, 0))
    name = escape(Path(path).name)
    return f"<img src='{data_uri(frames)}' alt='{name}'><div class=faint>{name}</div>"


def attention_rows(lines: list[dict], predictor: Predictor | None) -> str:
    """A row of frames for each word of a question, if there is one, and of the text that the model writes."""
    line = max(lines, key=lambda line: bool(line["question"]))
    built = predictor.model.components if predictor else frozenset()
    if not built or len(line["media"]) != 1 or not Path(line["media"][0]).is_file():
        return ""
    writes = TASKS[line["task"]].output in ("caption", "answer")
    if "decoder" in built and not writes or not built & {"fusion", "decoder"}:
        return ""
    try:
        written, words = predictor.explain(medium_of(line), line["question"])
        frames = frames_of(line["media"][0], TASKS[line["task"]].modality, predictor.preprocess.frames)
    except MediaError:  # damaged after the evaluation; `medium` says so
        return ""
    if not words:
        return ""
    frames = scale_down(attended_frames(frames, words[0]))
    rows = "".join(attention_row(word, frames) for word in words[:WORDS])
    about = f"Attention of the words: {line['question']} {written}".strip()
    return f"<div class=faint>{escape(about)}</div><table class=attention>{rows}</table>"


def attention_row(word: WordAttention, frames: np.ndarray) -> str:
    every = math.ceil(2 * len(frames) / FRAMES)
    strip = np.concatenate(list(overlay(frames, word)[::every]), axis=1)[None]
    return (f"<tr><td>{escape(word.word)}<td class=faint>{escape(word.module.split('.')[0])}<br>"
            f"{word.map.sum().item():.0%}<td><img src='{data_uri(strip)}' alt='attention of {escape(word.word)}'>")
