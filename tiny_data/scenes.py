"""Drawing random scenes for one split, without mixing what the splits keep apart.

Two things are kept apart. Strokes: the first 1,140 handwritten digits are for training, the next 60 for validation,
and the rest for testing. Combinations: a colored digit that `held_out` names for an axis appears on that axis only in
the split "combos", where every scene has at least one such digit.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import TypeVar

import numpy as np

from tiny_data.world import (
    AXES,
    AXIS_OF,
    CELL,
    COLOR_NAMES,
    DIGITS,
    IMAGE_SIZE,
    MOVING,
    ORDER_AXES,
    SCRIPTS,
    Scene,
    Script,
    Thing,
    held_out,
    pick,
    positive_id,
    reverse,
    swap_colors,
)

STROKES = {"train": (0, 1140), "val": (1140, 1200), "test": (1200, 1797), "combos": (1200, 1797)}  # rows of digits.npz
SPLITS = tuple(STROKES)

Drawn = TypeVar("Drawn", Scene, tuple[Scene, ...])

_COMBINATIONS = tuple(product(range(len(DIGITS)), COLOR_NAMES))


def _positions(scripts: tuple[Script, ...]) -> list[tuple[tuple[int, int], ...]]:
    """All ways to place the digits of a scene: for each digit a corner (y, x) on the grid.

    No digit leaves the canvas, and two digits do not overlap.
    """
    height, width = (max(getattr(pose, side) + pose.size for pose in scripts[0]) for side in ("y", "x"))
    corners = product(range(0, IMAGE_SIZE - height + 1, CELL), range(0, IMAGE_SIZE - width + 1, CELL))
    if len(scripts) == 1:
        return [(corner,) for corner in corners]
    return [(a, b) for a, b in product(corners, repeat=2) if max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= CELL]


_POSITIONS = {kind: _positions(scripts) for kind, scripts in SCRIPTS.items()}


class SceneSource:
    """Draws random scenes for one split.

    `labels` are the labels of digits.npz. `rng` is the only source of randomness. Draws are symmetric in time: a scene
    and its time reversal (`world.reverse`) are equally likely.
    """

    def __init__(self, split: str, labels: np.ndarray, rng: np.random.Generator):
        self.split, self.rng = split, rng
        start, stop = STROKES[split]
        self._strokes = [start + np.flatnonzero(labels[start:stop] == digit) for digit in range(len(DIGITS))]

    def allows(self, scene: Scene) -> bool:
        """Whether this split may show the scene: "combos" requires a held-out combination, other splits forbid it."""
        return self._allows(scene.kind, [(thing.digit, thing.color) for thing in scene.things])

    def _allows(self, kind: str, combinations: Sequence[tuple[int, str]]) -> bool:
        held = any(held_out(AXIS_OF[kind], digit, color) for digit, color in combinations)
        return held == (self.split == "combos")

    def scene(self, kind: str) -> Scene:
        """A random scene of this kind. Two digits never share digit, color or place."""
        while True:
            combinations = [pick(_COMBINATIONS, self.rng) for _ in SCRIPTS[kind]]
            if self._allows(kind, combinations) and all(len(set(same)) == len(same) for same in zip(*combinations)):
                break
        return self._drawn(kind, combinations)

    def _drawn(self, kind: str, combinations: Sequence[tuple[int, str]]) -> Scene:
        """A scene of these digits and colors, in random handwriting and at random places."""
        strokes = [int(pick(self._strokes[digit], self.rng)) for digit, _ in combinations]
        corners = pick(_POSITIONS[kind], self.rng)
        return Scene(kind, tuple(Thing(*what, stroke, *at) for what, stroke, at in zip(combinations, strokes, corners)))

    def mentions(self, scene: Scene) -> bool:
        """Whether a text of this split may describe the scene without showing it. "combos" may describe anything."""
        return self.split == "combos" or self.allows(scene)

    def image(self) -> Scene:
        """A random image of one digit; one in four is drawn at double size."""
        return self.scene("large" if self.rng.integers(4) == 0 else "image")

    def moving(self) -> Scene:
        """A random scene of one digit that moves, grows, shrinks, appears or vanishes."""
        return self.scene(pick(MOVING, self.rng))

    def twins(self, kind: str) -> tuple[Scene, Scene]:
        """A scene and its twin: the same strokes in the same places, but reversed in time or, in a pair, with the
        colors swapped."""
        while True:
            scene = self.scene(kind)
            twin = swap_colors(scene) if kind == "pair" else reverse(scene)
            if self.allows(twin):
                return scene, twin

    def hard_negatives(self, kind: str) -> tuple[Scene, Scene]:
        """A scene and its twin, each in its own handwriting and at its own place: only the meaning tells them apart."""
        scene, twin = self.twins(kind)
        return scene, self._drawn(kind, [(thing.digit, thing.color) for thing in twin.things])

    # --- the contents of a split ---

    def training_clips(self, n: int) -> list[tuple[Scene, ...]]:
        """Clips for training, in groups that should meet in a batch: 22% are pairs with hard negatives (colors
        swapped), 30% are sequences with hard negatives (the other order), 5% stay and 43% move, each of them alone;
        shuffled.

        Two digits are frequent because it takes many samples to learn which digit has which color, or comes first.
        """
        twins = [self.hard_negatives(kind) for kind, percent in (("pair", 11), ("sequence", 15))
                 for _ in range(percent * n // 100)]
        alone = [(self.scene("stay"),) for _ in range(5 * n // 100)]
        alone += [(self.moving(),) for _ in range(n - 2 * len(twins) - len(alone))]
        return self._shuffled(twins + alone)

    def clips_for_texts(self, n: int) -> list[Scene]:
        """Clips that texts describe, without showing them: 55% move, 5% stay, 22% are pairs (color-swapped twins),
        18% are sequences; shuffled."""
        scenes = self._all_twins(["pair"], 11 * n // 100)
        scenes += [self.scene("sequence") for _ in range(18 * n // 100)]
        scenes += [self.scene("stay") for _ in range(5 * n // 100)]
        return self._shuffled(scenes + [self.moving() for _ in range(n - len(scenes))])

    def testing_clips(self, n: int) -> list[Scene]:
        """Clips for testing: a quarter show two digits. All except "stay" come as twins, equally many for each axis;
        shuffled."""
        each, pairs = n // 14, n // 18
        scenes = [scene for axis in ORDER_AXES for scene in self._all_twins(AXES[axis], each)]
        scenes += self._all_twins(["pair"], pairs)
        return self._shuffled(scenes + [self.scene("stay") for _ in range(n - len(scenes))])

    def training_images(self, n: int) -> list[tuple[Scene, ...]]:
        """Images for training, in groups that should meet in a batch: 44% are pairs with hard negatives (colors
        swapped), 20% show one large digit, 36% one digit; shuffled."""
        twins = [self.hard_negatives("pair") for _ in range(22 * n // 100)]
        large = [(self.scene("large"),) for _ in range(n // 5)]
        return self._shuffled(twins + large + [(self.scene("image"),) for _ in range(n - 2 * len(twins) - len(large))])

    def testing_images(self, n: int) -> list[Scene]:
        """Images for testing: two thirds show one digit, a quarter of these large. The rest are color-swapped twins;
        shuffled."""
        scenes = self._all_twins(["pair"], n // 6)
        return self._shuffled(scenes + [self.image() for _ in range(n - len(scenes))])

    def clip_gallery(self) -> list[Scene]:
        """100 clips with different meanings: 40 time-reversed twins, 5 color-swapped twins, and 10 that stay."""
        taken: set[str] = set()
        scenes = [scene for axis in ORDER_AXES for scene in self._new_twins(AXES[axis], 8, taken)]
        scenes += self._new_twins(["pair"], 5, taken)
        return scenes + self._new(lambda: (self.scene("stay"),), 10, taken)

    def image_gallery(self) -> list[Scene]:
        """100 images with different meanings: 20 color-swapped twins, 50 other pairs, and 10 of one digit."""
        taken: set[str] = set()
        scenes = self._new_twins(["pair"], 20, taken)
        scenes += self._new(lambda: (self.scene("pair"),), 50, taken)
        return scenes + self._new(lambda: (self.image(),), 10, taken)

    def _all_twins(self, kinds: list[str] | tuple[str, ...], n: int) -> list[Scene]:
        return [scene for _ in range(n) for scene in self.twins(pick(kinds, self.rng))]

    def _new_twins(self, kinds: list[str] | tuple[str, ...], n: int, taken: set[str]) -> list[Scene]:
        return self._new(lambda: self.twins(pick(kinds, self.rng)), n, taken)

    def _new(self, draw: Callable[[], tuple[Scene, ...]], n: int, taken: set[str]) -> list[Scene]:
        """n draws of scenes whose `positive_id` is not yet in `taken`, to which theirs are added."""
        scenes: list[Scene] = []
        while n:
            drawn = draw()
            if taken.isdisjoint(map(positive_id, drawn)):
                taken.update(map(positive_id, drawn))
                scenes += drawn
                n -= 1
        return scenes

    def _shuffled(self, scenes: list[Drawn]) -> list[Drawn]:
        return [scenes[i] for i in self.rng.permutation(len(scenes))]
