"""What the page of the demo computes: frames in; texts, tables and images out. This file does not need Gradio.

A `Visual` is an image or video in memory: the frames that the model sees. `VisualPredictor` accepts it wherever
`Predictor` accepts a file. `local_temporal_off` silences the local temporal modules.

Axes: t frames, H W pixels, h w patches, c heads, l words, q latents, v visual tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from mplug2.attention_maps import attention_maps
from mplug2.checkpoint import load_model
from mplug2.data.media import MediaError, kind_of, read_media, to_bytes, to_frames, to_pixels
from mplug2.generation import beam_search
from mplug2.model.local_temporal import LocalTemporal
from mplug2.predictor import Generation, Predictor
from tiny_data.render import PALETTE, load_digits, render
from tiny_data.scenes import STROKES
from tiny_data.world import CELL, SCRIPTS, Scene, Thing, questions

MOTIONS = {
    "moves right": "right", "moves left": "left", "moves down": "down", "moves up": "up", "grows": "grow",
    "shrinks": "shrink", "appears": "appear", "vanishes": "vanish", "stands still": "stay",
    "two digits, together": "pair", "two digits, one after the other": "sequence", "image of one digit": "image",
}
"""Names of the kinds of scenes on the page."""

GENERAL_QUESTIONS = ("which digit is it", "what color is it", "does it move left or right", "does it move up or down",
                     "how many digits are there", "which color came first")
"""Suggested for uploaded files, about which nothing is known."""

MOST_TEXTS = 20
"""Texts that are compared with a video at once."""
SCALE = 96
"""Height of a frame on the page, in pixels."""


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: the page asks whether it is another one
class Visual:
    """Frames that the model sees, uint8 `t H W 3`. One frame is an image unless `modality` says that it is a video."""

    frames: np.ndarray
    modality: str = "video"
    asked: tuple[tuple[str, str], ...] = field(default=())
    """Suggested questions and their true answers; an empty answer is not known."""


class VisualPredictor(Predictor):
    """A predictor that also accepts `Visual`s in place of files."""

    def on_media(self, media: Sequence, function: Callable[[Tensor, str, list[int]], Iterable]) -> list:
        if not media or not isinstance(media[0], Visual):
            return super().on_media(media, function)
        found = []
        with torch.no_grad():
            for i, visual in enumerate(media):
                pixels = to_bytes(visual.frames, self.model.config.image_size)
                found += function(self.vision_tokens(pixels[None, None]), visual.modality, [i])
        return found


def open_checkpoint(folder: str | Path) -> VisualPredictor:
    """The model in a checkpoint folder. Raises CheckpointError."""
    return VisualPredictor(*load_model(folder))


@contextmanager
def local_temporal_off(predictor: Predictor, off: bool = True) -> Iterator[None]:
    """The outputs of all local temporal modules are zero inside. Nothing is trained again."""
    handles = [module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
               for module in predictor.model.modules() if off and isinstance(module, LocalTemporal)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- images and videos -----------------------------------------------------------------------------------------------


def stroke_of(drawing: np.ndarray) -> np.ndarray:
    """A drawing, uint8 `H W` (dark on light), `H W 3` or `H W 4`, as a stroke `8 8` from 0 (paper) to 1 (ink). The ink
    is cut out, and centered with its aspect kept, as in the handwriting that the model knows."""
    image = Image.fromarray(drawing).convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    ink = 1 - np.asarray(Image.alpha_composite(paper, image).convert("L"), np.float32) / 255
    rows, columns = (np.flatnonzero((ink > 0.2).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError("the drawing is empty: draw a digit with the brush")
    cut = ink[rows[0]: rows[-1] + 1, columns[0]: columns[-1] + 1]
    side = max(cut.shape)
    square = np.zeros((side, side), np.float32)
    y, x = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[y: y + cut.shape[0], x: x + cut.shape[1]] = cut
    small = np.asarray(Image.fromarray(square).resize((CELL, CELL), Image.Resampling.BOX))
    return np.clip(small / max(small.max(), 1e-6), 0, 1).astype(np.float64)


def draw_scene(
    motion: str, digit: int, color: str, digit2: int = 3, color2: str = "blue", speed: float = 1.0,
    handwriting: int = 0, drawing: np.ndarray | None = None,
) -> Visual:
    """A scene of the tiny world. A `drawing` replaces the first digit's stroke; `handwriting` chooses among the strokes
    of the test split. Speed 2 shows the motion in half of the frames and then holds it, 0.5 shows its first half."""
    kind = MOTIONS[motion]
    images, labels = load_digits()
    start, stop = STROKES["test"]

    def row(label: int) -> int:
        rows = start + np.flatnonzero(labels[start:stop] == label)
        return int(rows[handwriting % len(rows)])

    things = [Thing(digit, color, row(digit), CELL, CELL)]
    if len(SCRIPTS[kind]) == 2:
        if digit == digit2 or color == color2:
            raise ValueError("the two digits are alike: choose another digit and another color for the second one")
        things = [replace(things[0], x=0), Thing(digit2, color2, row(digit2), CELL, 2 * CELL)]
    scene = Scene(kind, tuple(things))
    strokes = images[[thing.stroke for thing in things]]
    if drawing is not None:
        strokes[0] = stroke_of(drawing)
    frames = PALETTE[render(scene, strokes)]
    frames = frames[np.minimum((np.arange(len(frames)) * speed).astype(int), len(frames) - 1)]
    asked = [(each["question"], each["answers"][0]) for each in questions(scene, np.random.default_rng(0), True, True)]
    if drawing is not None:  # nobody knows which digit was drawn
        asked = [(question, "" if answer == things[0].word else answer) for question, answer in asked]
    return Visual(frames, "image" if kind == "image" else "video", tuple(asked))


@contextmanager
def names_only(paths: Sequence[Path]) -> Iterator[None]:
    """A MediaError inside names a file without its folder: the page does not show where uploads are stored."""
    try:
        yield
    except MediaError as error:
        message = str(error)
        for path in paths:
            message = message.replace(str(path), path.name)
        raise MediaError(message) from None


def read_visual(path: str | Path, predictor: Predictor) -> Visual:
    """An image or video file as the model sees it: sampled and resized. Raises MediaError, which names the file without
    its folder."""
    path = Path(path)
    with names_only([path]):
        frames = read_media(path, predictor.preprocess.frames)
        pixels = to_pixels(frames, predictor.model.config.image_size)
        return Visual(to_frames(pixels), kind_of(path), tuple((question, "") for question in GENERAL_QUESTIONS))


def _shuffle(frames: np.ndarray) -> np.ndarray:
    """The frames in an order that is neither theirs nor its reverse; two frames are swapped."""
    return np.concatenate([frames[1::2], frames[0::2]])


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda frames: frames,
    "shuffle": _shuffle,
    "reverse": lambda frames: frames[::-1].copy(),
    "freeze": lambda frames: np.repeat(frames[:1], len(frames), axis=0),
    "repeat": lambda frames: np.repeat(frames, 2, axis=0)[: len(frames)],
}
"""What the buttons do to the frames `t H W 3`: "freeze" shows the first one all the time, "repeat" shows each twice
(and so only the first half of the video)."""


def reorder(visual: Visual | None, order: str) -> Visual:
    """The same frames in another order. Answers that were true may not be true anymore: they are dropped.

    Raises ValueError for None: the page forgets its video after an hour.
    """
    if visual is None:
        raise ValueError("this page has been open for more than an hour: load it again")
    if order == "as they are" or len(visual.frames) == 1:
        return visual
    asked = tuple((question, "") for question, _ in visual.asked)
    return replace(visual, frames=ORDERS[order](visual.frames), asked=asked)


# ---- beam search -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def beam_tree(predictor: Predictor, visual: Visual, question: str = "", beams: int = 5) -> str:
    """The finished hypotheses of a beam search as an HTML list, merged where they begin alike. A word carries its
    probability after the words before it; an end carries the score of the search. The best hypothesis is bold."""
    model, special = predictor.model, predictor.special_tokens

    def search(vision: Tensor, modality: str, _) -> list[str]:
        memory, mask, start, _ = predictor.decoder_inputs(vision, modality, question, Generation())
        length = predictor.preprocess.max_length or 20
        hypotheses = beam_search(model, memory, start, special, beams, 1, length, memory_mask=mask)[0]
        hypotheses = [one for one in hypotheses if special.sep not in one[1][:-1]]  # some continue after their end
        tree: dict = {}
        for rank, (score, ids) in enumerate(hypotheses):
            new = torch.tensor([ids], device=predictor.device)
            whole = torch.cat([start, new], dim=1)[:, : model.config.max_positions]
            logits = model.decode(whole, torch.ones_like(whole, dtype=torch.bool), memory, mask)
            likely = logits[0, start.shape[1] - 1:].softmax(dim=-1)
            node = tree
            for i, number in enumerate(ids):
                word = predictor.tokenizer.decode([[number]])[0] or "end"
                label = f"{escape(word)} {likely[i, number]:.0%}"
                entry = node.setdefault(number, {"label": label, "best": rank == 0, "next": {}})
                node = entry["next"]
            entry["label"] += f" (score {score:.2f})"
        return [_branches(tree)]

    return predictor.on_media([visual], search)[0]


def _branches(tree: dict) -> str:
    """Nested lists; words without a fork stand on one line."""
    items = []
    for entry in tree.values():
        labels = []
        while True:
            labels.append(f"<b>{entry['label']}</b>" if entry["best"] else entry["label"])
            if len(entry["next"]) != 1:
                break
            entry = next(iter(entry["next"].values()))
        items.append(f"<li>{' &rarr; '.join(labels)}{_branches(entry['next']) if entry['next'] else ''}</li>")
    return f"<ul>{''.join(items)}</ul>"


# ---- images and tables -----------------------------------------------------------------------------------------------


def strip(frames: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Frames `t H W 3` side by side, enlarged without smoothing. With weights `t h w`, what has little weight is dark:
    the largest weight keeps its brightness."""
    t, height, width = frames.shape[:3]
    scale = max(1, SCALE // height)
    shown = []
    for i, frame in enumerate(frames):
        pixels = np.kron(frame, np.ones((scale, scale, 1), np.uint8))
        if weights is not None:
            grid = weights[i * len(weights) // t]
            light = Image.fromarray((grid / max(weights.max(), 1e-12)).astype(np.float32))
            light = np.asarray(light.resize(pixels.shape[1::-1], Image.Resampling.NEAREST))[:, :, None]
            pixels = ((0.35 * pixels + 0.65 * 255 * np.array([1, 0.75, 0.2])) * light + pixels * 0.4 * (1 - light))
        shown.append(np.pad(pixels.astype(np.uint8), ((0, 0), (0, 4), (0, 0)), constant_values=128))
    return np.concatenate(shown, axis=1)[:, :-4]


@torch.no_grad()
def latent_images(predictor: Predictor, visual: Visual) -> list[tuple[np.ndarray, str]]:
    """What the latents of the universal layers gather: for each latent the frames, brighter where it attends, in the
    first cross-attention of latents to vision, averaged over the heads."""
    with attention_maps(predictor.model) as maps:
        predictor.encode_media([visual])
    config = predictor.model.config
    names = [name for name, weights in maps.items()
             if name.startswith("universal") and weights.shape[2] == config.latents]
    if not names:
        raise ValueError("this model's universal layers have no latents that read the video (they need two layers)")
    side = config.image_size // config.patch_size
    weights = maps[names[0]].mean(dim=1)[0, :, 1:]
    grids = rearrange(weights, "q (t h w) -> q t h w", h=side, w=side).cpu().numpy()
    return [(strip(visual.frames, grid), f"latent {i}") for i, grid in enumerate(grids)]


def fitting_texts(predictor: Predictor, visual: Visual, texts: Sequence[str]) -> list[tuple[str, float, float]]:
    """Each text with its cosine (contrastive head) and its matching probability, the largest probability first."""
    if not (texts := [text.strip() for text in texts if text.strip()]):
        raise ValueError("no text: write one or more texts, one in each line")
    if len(texts) > MOST_TEXTS:
        raise ValueError(f"{len(texts)} texts: at most {MOST_TEXTS} are compared at once; leave some out")
    cosines = predictor.similarity([visual], texts)[0].tolist()
    (vision,) = predictor.encode_media([visual])
    matching = predictor.match_probability(vision[None], texts).tolist()
    return sorted(zip(texts, cosines, matching), key=lambda row: -row[2])


def answers(predictor: Predictor, visual: Visual) -> list[tuple[str, str, str]]:
    """The suggested questions, with the model's answers and the true ones."""
    asked = [question for question, _ in visual.asked]
    found = predictor.answer([visual] * len(asked), asked)
    return [(question, answer, true) for (question, true), answer in zip(visual.asked, found)]


def boxed(predictor: Predictor, visual: Visual, text: str) -> np.ndarray:
    """The first frame with the box that the text describes. Raises ValueError if the model has no box head."""
    image = replace(visual, frames=visual.frames[:1], modality="image")
    x, y, width, height = predictor.predict_boxes([image], [text])[0].tolist()
    canvas = Image.fromarray(strip(image.frames))
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    sides = (canvas.width, canvas.height) * 2
    low, high = zip(*(sorted((corners[i] * sides[i], corners[i + 2] * sides[i + 2])) for i in (0, 1)))
    ImageDraw.Draw(canvas).rectangle([*low, *high], outline=(255, 160, 0), width=3)
    return np.asarray(canvas)
