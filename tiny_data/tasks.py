"""The records of every task: the contents of each line of `<task>.<split>.jsonl`.

Captions and questions describe scenes that are given. Every other task of `mplug2.tasks` has a function of its name
here, which draws its own scenes. Labels are balanced: all of them are equally frequent, up to one record.

Records are dictionaries without the paths of their media, which the writer adds.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice

import numpy as np

from tiny_data.scenes import SceneSource
from tiny_data.world import (
    AXES,
    CELL,
    COLOR_NAMES,
    DIGITS,
    IMAGE_SIZE,
    MOVING,
    ORDER_AXES,
    Scene,
    Thing,
    captions,
    pick,
    positive_id,
    questions,
    reverse,
    sentence,
    swap_colors,
    with_article,
)

Shown = tuple[dict, tuple[Scene, ...]]  # a record, and the scenes that its media show (none for a text)

# --- captions, retrieval and questions about given scenes ------------------------------------------------------------


def caption_records(scenes: Sequence[Scene]) -> list[dict]:
    """One record per scene, for captioning and for retrieval."""
    return [{"captions": list(captions(scene)), "positive_id": positive_id(scene)} for scene in scenes]


def question_records(scenes: Sequence[Scene], rng: np.random.Generator, training: bool = False) -> list[dict]:
    """One record per scene, for question answering.

    "How many" is asked about equally many scenes of one digit and of two digits. Yes and no are equally frequent.
    """
    one = [i for i in rng.permutation(len(scenes)) if len(scenes[i].things) == 1]
    two = [i for i in rng.permutation(len(scenes)) if len(scenes[i].things) == 2]
    rarer = min(len(one), len(two))
    counted = {*one[:rarer], *two[:rarer]}
    yes = rng.permutation(len(scenes)) % 2 == 0
    return [
        {"qa": questions(scene, rng, bool(yes[i]), i in counted, training), "positive_id": positive_id(scene)}
        for i, scene in enumerate(scenes)
    ]


# --- text ------------------------------------------------------------------------------------------------------------


def text_only(source: SceneSource, n: int) -> list[Shown]:
    """Sentences about clips, for language modeling."""
    return [({"text": sentence(scene, source.rng)}, ()) for scene in source.clips_for_texts(n)]


def text_classification(source: SceneSource, n: int) -> list[Shown]:
    """A sentence about one digit; the label is its motion."""
    scenes = [source.scene(motion) for motion in islice(cycle(MOVING), n)]
    return [({"text": sentence(scene, source.rng), "label": scene.kind}, ()) for scene in scenes]


def text_pair_classification(source: SceneSource, n: int) -> list[Shown]:
    """Two captions: "same" if they are paraphrases, "different" if their scenes differ in one respect."""
    records = []
    for scene, label in zip(source.clips_for_texts(n), cycle(("same", "different"))):
        if label == "same":
            a, b = source.rng.permutation(len(captions(scene)))[:2]
            texts = [captions(scene)[a], captions(scene)[b]]
        else:
            texts = [pick(captions(each), source.rng) for each in (scene, _near_miss(scene, source))]
        records.append(({"texts": texts, "label": label}, ()))
    return records


def _near_miss(scene: Scene, source: SceneSource) -> Scene:
    """A scene with a different meaning: reversed in time, with colors swapped, or with one digit or color changed."""
    while True:
        index = int(source.rng.integers(len(scene.things)))
        others = list(scene.things)
        others[index] = _changed(scene.things[index], scene, source.rng)
        candidates = [reverse(scene), replace(scene, things=tuple(others))]
        if len(scene.things) == 2:
            candidates.append(swap_colors(scene))
        miss = pick(candidates, source.rng)
        if positive_id(miss) != positive_id(scene) and source.mentions(miss):
            return miss


def _changed(thing: Thing, scene: Scene, rng: np.random.Generator) -> Thing:
    """The thing in a color, or with a digit, that the scene does not show."""
    if rng.integers(2):
        shown = {each.color for each in scene.things}
        return replace(thing, color=pick([color for color in COLOR_NAMES if color not in shown], rng))
    shown = {each.digit for each in scene.things}
    return replace(thing, digit=pick([digit for digit in range(len(DIGITS)) if digit not in shown], rng))


def text_qa(source: SceneSource, n: int) -> list[Shown]:
    """Questions about a sentence: the words that are to be read follow the question."""
    records = []
    for number, scene in enumerate(source.clips_for_texts(n)):
        said = sentence(scene, source.rng)
        asked = questions(scene, source.rng, yes=number % 2 == 0, count=True)
        records.append(({"qa": [{**one, "question": f"{one['question']} {said}"} for one in asked]}, ()))
    return records


# --- images and clips ------------------------------------------------------------------------------------------------


def image_classification(source: SceneSource, n: int) -> list[Shown]:
    """An image of one digit; the label is the word for it."""
    shown = []
    for digit in islice(cycle(range(len(DIGITS))), n):
        scene = source.image()
        while scene.things[0].digit != digit:
            scene = source.image()
        shown.append(({"label": DIGITS[digit]}, (scene,)))
    return shown


def video_classification(source: SceneSource, n: int) -> list[Shown]:
    """A clip of one digit; the label is its motion. Clips come with their time reversals, so the order of the frames
    matters."""
    motions = cycle(AXES[axis][0] for axis in ORDER_AXES if axis != "sequence")
    scenes = [scene for motion in islice(motions, (n + 1) // 2) for scene in source.twins(motion)]
    return [({"label": scene.kind}, (scene,)) for scene in scenes[:n]]


def class_captions() -> dict[str, dict[str, list[str]]]:
    """The captions that zero-shot classification compares with: task -> class -> captions.

    A class has the captions of all colors; the classes of motions also have those of all digits.
    """
    def every(kind: str, digits: Sequence[int]) -> list[str]:
        things = [Thing(digit, color, 0, 0, 0) for digit in digits for color in COLOR_NAMES]
        return [caption for thing in things for caption in captions(Scene(kind, (thing,)))]

    return {
        "image_classification": {word: every("image", [digit]) for digit, word in enumerate(DIGITS)},
        "video_classification": {kind: every(kind, range(len(DIGITS))) for kind in MOVING},
    }


def visual_entailment(source: SceneSource, n: int) -> list[Shown]:
    """An image and a sentence: true, false, or true except for a motion, which an image cannot show.

    Half of the false sentences mention a motion as well, so that the words alone do not give the answer away.
    """
    shown = []
    for label in islice(cycle(("entailment", "contradiction", "neutral")), n):
        while True:
            scene = source.scene("pair") if source.rng.integers(2) else source.image()
            thing = pick(scene.things, source.rng)
            if label == "contradiction":
                thing = _changed(thing, scene, source.rng)
            moves = label == "neutral" or (label == "contradiction" and source.rng.integers(2) == 1)
            claim = Scene(pick(MOVING, source.rng) if moves else "image", (thing,))
            if source.mentions(claim):
                break
        shown.append(({"text": sentence(claim, source.rng), "label": label}, (scene,)))
    return shown


def image_pair_reasoning(source: SceneSource, n: int) -> list[Shown]:
    """Two images of one digit each, and a statement about both: "true" or "false"."""
    shown = []
    for true in islice(cycle((True, False)), n):
        by_digit = bool(source.rng.integers(2))
        while True:
            scenes = (source.image(), source.image())
            one, two = (scene.things[0] for scene in scenes)
            same = one.digit == two.digit if by_digit else one.color == two.color
            if same == true:
                break
        named = pick((one, two), source.rng)
        if by_digit:
            statements = (f"both pictures show {with_article(named.word)}", "both pictures show the same digit")
        else:
            statements = (f"both digits are {named.color}", "both digits have the same color")
        shown.append(({"text": pick(statements, source.rng), "label": "true" if true else "false"}, scenes))
    return shown


def grounding(source: SceneSource, n: int) -> list[Shown]:
    """An image of two digits, a phrase for one of them, and its box (center x, center y, width, height, as fractions of
    the image size)."""
    shown = []
    for _ in range(n):
        scene = source.scene("pair")
        thing = pick(scene.things, source.rng)
        text = pick((f"the {thing.color} {thing.word}", f"the {thing.word}", f"the {thing.color} digit"), source.rng)
        box = [side / IMAGE_SIZE for side in (thing.x + CELL / 2, thing.y + CELL / 2, CELL, CELL)]
        shown.append(({"text": text, "box": box}, (scene,)))
    return shown
