"""What can be shown, and what is true of it: the scenes of the tiny world, their sentences and their questions.

A `Scene` is one or two coloured digits and what happens to them (its `kind`). Everything that the world says about a
scene, its meaning, captions, questions and answers, is computed here from the scene alone; no pixels are drawn and no
files are written in this file.

Time is symmetric: every kind has a mirror in time (`REVERSED`), and a mirrored scene shows exactly the frames of the
first one in reverse order. A model that cannot see the order of frames therefore cannot tell "left" from "right".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

IMAGE_SIZE = 32  # pixels, height and width of the canvas
FRAMES = 4  # frames of a clip
CELL = 8  # pixels: the digits' own height and width; all stand on a grid of such cells, where a digit is one patch
STEP = 4  # pixels a frame: what moves is half a patch further in each

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 64, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "purple": (210, 0, 255),
}
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Pose:
    """How a digit is drawn in one frame: side length and offset from its corner in pixels, and brightness 0..1."""

    size: int = CELL
    y: int = 0
    x: int = 0
    light: float = 1.0


Script = tuple[Pose, ...]  # one pose a frame

_STAY: Script = (Pose(),) * FRAMES
_RIGHT: Script = tuple(Pose(x=STEP * t) for t in range(FRAMES))
_DOWN: Script = tuple(Pose(y=STEP * t) for t in range(FRAMES))
_GROW: Script = (Pose(4), Pose(8), Pose(12), Pose(16))  # from its upper left corner
_APPEAR: Script = tuple(Pose(light=(t + 1) / FRAMES) for t in range(FRAMES))
_FIRST: Script = (Pose(light=1.0), Pose(light=0.5), Pose(light=0.0), Pose(light=0.0))

# Kind of scene -> one script for each of its digits. "picture" and "large" are images, "pair" is a clip and an image.
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
    "picture": ((Pose(),),),
    "large": ((Pose(16),),),
}
REVERSED = {"left": "right", "up": "down", "grow": "shrink", "appear": "vanish"}
REVERSED |= {after: before for before, after in REVERSED.items()}
MOVING = tuple(REVERSED)  # the eight motions that differ from their mirror in time

# Each kind belongs to one axis; combinations of digit and colour are held out axis by axis.
AXES = {
    "still": ("stay", "pair", "picture", "large"),
    "horizontal": ("left", "right"),
    "vertical": ("up", "down"),
    "size": ("grow", "shrink"),
    "fade": ("appear", "vanish"),
    "sequence": ("sequence",),
}
ORDER_AXES = tuple(AXES)[1:]  # those on which the order of frames matters
AXIS_OF = {kind: axis for axis, kinds in AXES.items() for kind in kinds}


@dataclass(frozen=True)
class Thing:
    """A coloured digit: `stroke` is its row in digits.npz; `y`, `x` the corner in pixels of the ground it moves on."""

    digit: int
    colour: str
    stroke: int
    y: int
    x: int

    @property
    def word(self) -> str:
        return DIGITS[self.digit]


@dataclass(frozen=True)
class Scene:
    """One or two things and what happens to them; in a "sequence" the first thing is shown first."""

    kind: str
    things: tuple[Thing, ...]


def held_out(axis: str, digit: int, colour: str) -> bool:
    """Whether this coloured digit is never shown on this axis in training.

    Every coloured digit is held out on exactly one of the six axes, and every digit in exactly one colour an axis.
    """
    return (digit + COLOUR_NAMES.index(colour) + list(AXES).index(axis)) % len(AXES) == 0


def reverse(scene: Scene) -> Scene:
    """The scene that shows the same frames in reverse order."""
    things = scene.things[::-1] if scene.kind == "sequence" else scene.things
    return Scene(REVERSED.get(scene.kind, scene.kind), things)


def swap_colours(scene: Scene) -> Scene:
    """A two-digit scene with the colours of its digits exchanged: the same digits and colours, bound otherwise."""
    one, two = scene.things
    return replace(scene, things=(replace(one, colour=two.colour), replace(two, colour=one.colour)))


def meaning(scene: Scene) -> str:
    """A name, such as "red 7 left" or "blue 3 + red 7", that scenes share exactly if they have the same captions."""
    names = [f"{thing.colour} {thing.digit}" for thing in scene.things]
    if scene.kind == "pair":
        return " + ".join(sorted(names))
    if scene.kind == "sequence":
        return " > ".join(names)
    return names[0] if scene.kind in ("picture", "large") else f"{names[0]} {scene.kind}"


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
    return f"a {thing.colour} {thing.word}"


def _long(thing: Thing) -> str:
    return f"{with_article(thing.word)} in {thing.colour}"


def captions(scene: Scene) -> tuple[str, ...]:
    """All captions of a scene: paraphrases that continue "a video of" or "a picture of".

    Scenes of different meaning share no caption.
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
    named = f"the digit {one.word} in {one.colour}"
    if scene.kind in ("picture", "large"):
        return (_short(one), _long(one), named, f"a {one.colour} digit {one.word}")
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
_COLOUR_QUESTIONS = ("what colour is the digit", "which colour is it", "what colour is it")
_COUNT_QUESTIONS = ("how many digits are there", "how many digits are shown")
_ORDER_QUESTIONS = {
    "horizontal": ("does it move left or right", "does it move right or left"),
    "vertical": ("does it move up or down", "does it move down or up"),
    "size": ("does it grow or shrink", "does it shrink or grow"),
    "fade": ("does it appear or vanish", "does it vanish or appear"),
    "sequence": ("which colour came first", "which colour is shown first", "what was the first colour"),
}


def questions(scene: Scene, rng: np.random.Generator, yes: bool, count: bool) -> list[dict]:
    """Questions about a scene with their answers, as the `qa` field of a record.

    `digit` and `colour` are asked of single digits; `binding` (which digit has which colour) of two; `order` of what
    changes when time runs backwards; `yesno` of all, with the answer yes if `yes` is set; `count` if `count` is set.
    """
    asked = []

    def ask(kind: str, wordings: tuple[str, ...], answer: str) -> None:
        asked.append({"question": pick(wordings, rng), "answers": [answer], "kind": kind})

    one = scene.things[0]
    if len(scene.things) == 1:
        ask("digit", _DIGIT_QUESTIONS, one.word)
        ask("colour", _COLOUR_QUESTIONS, one.colour)
    else:
        first, second = rng.permutation(2)
        thing, other = scene.things[first], scene.things[second]
        ask("binding", (f"what colour is the {thing.word}", f"which colour is the {thing.word}"), thing.colour)
        ask("binding", (f"which digit is {other.colour}", f"what digit is {other.colour}"), other.word)
    if scene.kind in REVERSED:
        ask("order", _ORDER_QUESTIONS[AXIS_OF[scene.kind]], scene.kind)
    elif scene.kind == "sequence":
        ask("order", _ORDER_QUESTIONS["sequence"], one.colour)
    ask("yesno", _yesno_questions(scene, rng, yes), "yes" if yes else "no")
    if count:
        ask("count", _COUNT_QUESTIONS, "one" if len(scene.things) == 1 else "two")
    return asked


def _yesno_questions(scene: Scene, rng: np.random.Generator, yes: bool) -> tuple[str, ...]:
    if rng.integers(2):
        shown = {thing.word for thing in scene.things}
        word = pick([word for word in DIGITS if (word in shown) == yes], rng)
        return (f"is there {with_article(word)}", f"is {with_article(word)} shown")
    shown = {thing.colour for thing in scene.things}
    colour = pick([colour for colour in COLOUR_NAMES if (colour in shown) == yes], rng)
    return (f"is there a {colour} digit", f"is a {colour} digit shown")


def pick(options: Sequence, rng: np.random.Generator):
    """One of the options, each as likely."""
    return options[rng.integers(len(options))]
