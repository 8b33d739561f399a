"""The scenes of the tiny world, and the captions, questions and answers that are true of them.

A `Scene` is one or two colored digits and what happens to them (its `kind`). Its captions, questions and answers are
computed here from the scene alone. This file draws no pixels and writes no files.

Time is symmetric: every kind has a time-reversed counterpart (`REVERSED`), which shows exactly the same frames in
reverse order. A model that cannot see the order of the frames therefore cannot tell "left" from "right".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

IMAGE_SIZE = 32  # height and width of the canvas, in pixels
FRAMES = 4  # frames per clip
CELL = 8  # height and width of a digit, in pixels; digits stand on a grid of such cells, so that each fills one patch
STEP = 4  # pixels per frame: a moving digit advances by half a patch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 64, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "purple": (210, 0, 255),
}
COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Pose:
    """How a digit is drawn in one frame: side length and offset from its corner, in pixels, and brightness (0 to 1)."""

    size: int = CELL
    y: int = 0
    x: int = 0
    light: float = 1.0


Script = tuple[Pose, ...]  # one pose per frame

_STAY: Script = (Pose(),) * FRAMES
_RIGHT: Script = tuple(Pose(x=STEP * t) for t in range(FRAMES))
_DOWN: Script = tuple(Pose(y=STEP * t) for t in range(FRAMES))
_GROW: Script = tuple(Pose(round(4 + 12 * t / (FRAMES - 1))) for t in range(FRAMES))  # 4 to 16 pixels from one corner
_APPEAR: Script = tuple(Pose(light=(t + 1) / FRAMES) for t in range(FRAMES))
_FIRST: Script = tuple(Pose(light=max(0.0, 1 - 2 * t / FRAMES)) for t in range(FRAMES))  # fades out by the middle

# Kind of scene -> one script for each of its digits. "image" and "large" are images; "pair" can be a clip or an image.
SCRIPTS: dict[str, tuple[Script, ...]] = {
    "stay": (_STAY,),
    "right": (_RIGHT,),
    "left": (_RIGHT[::-1],),
    "down": (_DOWN,),
    "up": (_DOWN[::-1],),
    "grow": (_GROW,),
    "shrink": (_GROW[::-1],),
    "appear": (_APPEAR,),
    "vanish": (_APPEAR[::-1],),
    "pair": (_STAY, _STAY),
    "sequence": (_FIRST, _FIRST[::-1]),
    "image": ((Pose(),),),
    "large": ((Pose(16),),),
}
REVERSED = {"left": "right", "up": "down", "grow": "shrink", "appear": "vanish"}
REVERSED |= {after: before for before, after in REVERSED.items()}
MOVING = tuple(REVERSED)  # the eight motions that differ from their time reversal

# Each kind belongs to one axis. Combinations of digit and color are held out separately on each axis.
AXES = {
    "still": ("stay", "pair", "image", "large"),
    "horizontal": ("left", "right"),
    "vertical": ("up", "down"),
    "size": ("grow", "shrink"),
    "fade": ("appear", "vanish"),
    "sequence": ("sequence",),
}
ORDER_AXES = tuple(AXES)[1:]  # the axes on which the order of frames matters
AXIS_OF = {kind: axis for axis, kinds in AXES.items() for kind in kinds}


@dataclass(frozen=True)
class Thing:
    """A colored digit. `stroke` is its row in digits.npz; `y` and `x` are the upper left corner, in pixels, of the area
    that it moves in."""

    digit: int
    color: str
    stroke: int
    y: int
    x: int

    @property
    def word(self) -> str:
        return DIGITS[self.digit]


@dataclass(frozen=True)
class Scene:
    """One or two things and what happens to them. In a "sequence", the first thing is shown first."""

    kind: str
    things: tuple[Thing, ...]


def held_out(axis: str, digit: int, color: str) -> bool:
    """Whether training never shows this digit in this color on this axis.

    Every colored digit is held out on exactly one of the six axes, and on each axis every digit is held out in exactly
    one color.
    """
    return (digit + COLOR_NAMES.index(color) + list(AXES).index(axis)) % len(AXES) == 0


def reverse(scene: Scene) -> Scene:
    """The scene that shows the same frames in reverse order."""
    things = scene.things[::-1] if scene.kind == "sequence" else scene.things
    return Scene(REVERSED.get(scene.kind, scene.kind), things)


def swap_colors(scene: Scene) -> Scene:
    """The same scene of two digits with their colors exchanged: the same digits and colors, bound differently."""
    one, two = scene.things
    return replace(scene, things=(replace(one, color=two.color), replace(two, color=one.color)))


def positive_id(scene: Scene) -> str:
    """What a scene means, as a name such as "red 7 left" or "blue 3 + red 7".

    Two scenes have the same name if and only if they have the same captions. Records carry it, so that the losses never
    take a sample with the same meaning as a negative.
    """
    names = [f"{thing.color} {thing.digit}" for thing in scene.things]
    if scene.kind == "pair":
        return " + ".join(sorted(names))
    if scene.kind == "sequence":
        return " > ".join(names)
    return names[0] if scene.kind in ("image", "large") else f"{names[0]} {scene.kind}"


# --- sentences -------------------------------------------------------------------------------------------------------

_MOTION_WORDS = {  # kind -> "a red seven ..." and "a red seven that ..."
    "stay": ("standing still", "does not move"),
    "right": ("moving right", "moves to the right"),
    "left": ("moving left", "moves to the left"),
    "down": ("moving down", "goes down"),
    "up": ("moving up", "goes up"),
    "grow": ("growing", "gets bigger"),
    "shrink": ("shrinking", "gets smaller"),
    "appear": ("appearing", "fades in"),
    "vanish": ("vanishing", "fades out"),
}


def with_article(word: str) -> str:
    """A digit's word with its article: "a seven", "an eight"."""
    return f"an {word}" if word == "eight" else f"a {word}"


def _short(thing: Thing) -> str:
    return f"a {thing.color} {thing.word}"


def _long(thing: Thing) -> str:
    return f"{with_article(thing.word)} in {thing.color}"


def captions(scene: Scene) -> tuple[str, ...]:
    """All captions of a scene: paraphrases that continue "a video of" or "a picture of".

    Scenes with different meanings share no caption.
    """
    one, two = scene.things[0], scene.things[-1]
    if scene.kind == "pair":
        return (
            f"{_short(one)} and {_short(two)}",
            f"{_short(two)} and {_short(one)}",
            f"{_long(one)} and {_long(two)}",
            f"{_long(two)} and {_long(one)}",
        )
    if scene.kind == "sequence":
        return (
            f"{_short(one)} and then {_short(two)}",
            f"{_short(two)} after {_short(one)}",
            f"{_short(one)} before {_short(two)}",
            f"{_short(one)} followed by {_short(two)}",
            f"{_long(one)} and then {_long(two)}",
        )
    named = f"the digit {one.word} in {one.color}"
    if scene.kind in ("image", "large"):
        return (_short(one), _long(one), named, f"a {one.color} digit {one.word}")
    moving, moves = _MOTION_WORDS[scene.kind]
    return (
        f"{_short(one)} {moving}",
        f"{_short(one)} that {moves}",
        f"{_long(one)} {moving}",
        f"{_long(one)} that {moves}",
        f"{named} {moving}",
    )


_OPENINGS = ("there is", "here is", "we see")


def sentence(scene: Scene, rng: np.random.Generator) -> str:
    """A full sentence that is true of the scene, such as "there is a red seven moving left"."""
    return f"{pick(_OPENINGS, rng)} {pick(captions(scene), rng)}"


# --- questions -------------------------------------------------------------------------------------------------------

_DIGIT_QUESTIONS = ("which digit is it", "which digit is shown", "what digit is this")
_COLOR_QUESTIONS = ("what color is the digit", "which color is it", "what color is it")
_COUNT_QUESTIONS = ("how many digits are there", "how many digits are shown")
_ORDER_QUESTIONS = {
    "horizontal": ("does it move left or right", "does it move right or left"),
    "vertical": ("does it move up or down", "does it move down or up"),
    "size": ("does it grow or shrink", "does it shrink or grow"),
    "fade": ("does it appear or vanish", "does it vanish or appear"),
    "sequence": ("which color came first", "which color is shown first", "what was the first color"),
}


def questions(scene: Scene, rng: np.random.Generator, yes: bool, count: bool, training: bool = False) -> list[dict]:
    """Questions about a scene with their answers: the `qa` field of a record.

    Scenes of one digit get `digit` and `color` questions; scenes of two digits get `binding` questions (which digit
    has which color). `order` asks about what changes when time runs backward. Every scene gets a `yesno` question,
    whose answer is set by `yes`. `count` adds the question how many digits there are.

    Training draws kinds evenly, then one question of a kind. For `training`, `binding` is therefore two kinds, and the
    color of both digits is asked: a model finds "which digit is red" long before "what color is the seven".
    """
    asked = []

    def ask(kind: str, wordings: tuple[str, ...], answer: str) -> None:
        asked.append({"question": pick(wordings, rng), "answers": [answer], "kind": kind})

    one = scene.things[0]
    if len(scene.things) == 1:
        ask("digit", _DIGIT_QUESTIONS, one.word)
        ask("color", _COLOR_QUESTIONS, one.color)
    else:
        first, second = rng.permutation(2)
        thing, other = scene.things[first], scene.things[second]
        for named in (thing, other) if training else (thing,):
            ask("binding_color" if training else "binding",
                (f"what color is the {named.word}", f"which color is the {named.word}"), named.color)
        ask("binding_digit" if training else "binding",
            (f"which digit is {other.color}", f"what digit is {other.color}"), other.word)
    if scene.kind in REVERSED:
        ask("order", _ORDER_QUESTIONS[AXIS_OF[scene.kind]], scene.kind)
    elif scene.kind == "sequence":
        ask("order", _ORDER_QUESTIONS["sequence"], one.color)
    ask("yesno", _yesno_questions(scene, rng, yes), "yes" if yes else "no")
    if count:
        ask("count", _COUNT_QUESTIONS, "one" if len(scene.things) == 1 else "two")
    return asked


def _yesno_questions(scene: Scene, rng: np.random.Generator, yes: bool) -> tuple[str, ...]:
    if rng.integers(2):
        shown = {thing.word for thing in scene.things}
        word = pick([word for word in DIGITS if (word in shown) == yes], rng)
        return (f"is there {with_article(word)}", f"is {with_article(word)} shown")
    shown = {thing.color for thing in scene.things}
    color = pick([color for color in COLOR_NAMES if (color in shown) == yes], rng)
    return (f"is there a {color} digit", f"is a {color} digit shown")


def pick(options: Sequence, rng: np.random.Generator):
    """One of the options, all equally likely."""
    return options[rng.integers(len(options))]
