"""Choosing scenes: at random, for one split, never mixing what the splits keep apart.

Two things are kept apart. Strokes: the first 1,140 handwritten digits are for training, the next 60 for validation
and the rest for testing. Combinations: the coloured digits that `held_out` names for an axis are shown on it only in
the split "combos", and there at least one in every scene.
"""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from tiny_data.world import (
    AXES,
    AXIS_OF,
    CELL,
    COLOUR_NAMES,
    DIGITS,
    IMAGE_SIZE,
    MOVING,
    ORDER_AXES,
    SCRIPTS,
    Scene,
    Script,
    Thing,
    held_out,
    meaning,
    pick,
    reverse,
    swap_colours,
)

STROKES = {"train": (0, 1140), "val": (1140, 1200), "test": (1200, 1797), "combos": (1200, 1797)}  # rows of digits.npz
SPLITS = tuple(STROKES)

_COMBINATIONS = tuple(product(range(len(DIGITS)), COLOUR_NAMES))


def _positions(scripts: tuple[Script, ...]) -> list[tuple[tuple[int, int], ...]]:
    """All ways to place the digits of a scene: one corner (y, x) on the grid for each, so that none leaves the canvas.

    Two digits do not overlap.
    """
    height, width = (max(getattr(pose, side) + pose.size for pose in scripts[0]) for side in ("y", "x"))
    corners = product(range(0, IMAGE_SIZE - height + 1, CELL), range(0, IMAGE_SIZE - width + 1, CELL))
    if len(scripts) == 1:
        return [(corner,) for corner in corners]
    return [(a, b) for a, b in product(corners, repeat=2) if max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= CELL]


_POSITIONS = {kind: _positions(scripts) for kind, scripts in SCRIPTS.items()}


class SceneSource:
    """Draws random scenes for one split.

    `labels` are the labels of digits.npz; `rng` is the only source of randomness. What is drawn is symmetric in time:
    the mirror of a scene (see `world.reverse`) is exactly as likely as the scene itself.
    """

    def __init__(self, split: str, labels: np.ndarray, rng: np.random.Generator):
        self.split, self.rng = split, rng
        start, stop = STROKES[split]
        self._strokes = [start + np.flatnonzero(labels[start:stop] == digit) for digit in range(len(DIGITS))]

    def allows(self, scene: Scene) -> bool:
        """Whether this split may show the scene: with a held-out combination in "combos", without one elsewhere."""
        return self._allows(scene.kind, [(thing.digit, thing.colour) for thing in scene.things])

    def _allows(self, kind: str, combinations: Sequence[tuple[int, str]]) -> bool:
        held = any(held_out(AXIS_OF[kind], digit, colour) for digit, colour in combinations)
        return held == (self.split == "combos")

    def scene(self, kind: str) -> Scene:
        """A random scene of this kind: two digits differ in digit and in colour, and do not overlap."""
        while True:
            combinations = [pick(_COMBINATIONS, self.rng) for _ in SCRIPTS[kind]]
            if self._allows(kind, combinations) and all(len(set(same)) == len(same) for same in zip(*combinations)):
                break
        strokes = [int(pick(self._strokes[digit], self.rng)) for digit, _ in combinations]
        corners = pick(_POSITIONS[kind], self.rng)
        return Scene(kind, tuple(Thing(*what, stroke, *at) for what, stroke, at in zip(combinations, strokes, corners)))

    def mentions(self, scene: Scene) -> bool:
        """Whether a text of this split may speak of the scene without showing it; "combos" speaks of everything."""
        return self.split == "combos" or self.allows(scene)

    def picture(self) -> Scene:
        """A random image of one digit, every fourth in double size."""
        return self.scene("large" if self.rng.integers(4) == 0 else "picture")

    def moving(self) -> Scene:
        """A random scene of one digit that moves, grows, shrinks, appears or vanishes."""
        return self.scene(pick(MOVING, self.rng))

    def twins(self, kind: str) -> tuple[Scene, Scene]:
        """A scene and its twin, of the same strokes in the same places: reversed, or for a pair, colours swapped."""
        while True:
            scene = self.scene(kind)
            twin = swap_colours(scene) if kind == "pair" else reverse(scene)
            if self.allows(twin):
                return scene, twin

    # --- what a split is made of ---

    def training_clips(self, n: int) -> list[Scene]:
        """Clips to learn from: 68 % move, 7 % stay, 12 % are pairs (colour-swapped twins), 13 % sequences; shuffled."""
        pairs, sequences, stay = 2 * (6 * n // 100), 13 * n // 100, 7 * n // 100
        scenes = self._all_twins(["pair"], pairs // 2)
        scenes += [self.scene("sequence") for _ in range(sequences)] + [self.scene("stay") for _ in range(stay)]
        scenes += [self.moving() for _ in range(n - len(scenes))]
        return self._shuffled(scenes)

    def testing_clips(self, n: int) -> list[Scene]:
        """Clips to examine: one quarter show two digits; all but "stay" are twins, as many of each axis; shuffled."""
        each, pairs = n // 14, n // 18
        scenes = [scene for axis in ORDER_AXES for scene in self._all_twins(AXES[axis], each)]
        scenes += self._all_twins(["pair"], pairs)
        return self._shuffled(scenes + [self.scene("stay") for _ in range(n - len(scenes))])

    def images(self, n: int) -> list[Scene]:
        """Images: two thirds show one digit, a quarter of them large; the rest are colour-swapped twins; shuffled."""
        scenes = self._all_twins(["pair"], n // 6)
        return self._shuffled(scenes + [self.picture() for _ in range(n - len(scenes))])

    def clip_gallery(self) -> list[Scene]:
        """100 clips of different meanings: 40 time-reversed twins, 5 colour-swapped twins, and 10 that stay."""
        meanings: set[str] = set()
        scenes = [scene for axis in ORDER_AXES for scene in self._new_twins(AXES[axis], 8, meanings)]
        scenes += self._new_twins(["pair"], 5, meanings)
        return scenes + self._new(lambda: (self.scene("stay"),), 10, meanings)

    def image_gallery(self) -> list[Scene]:
        """100 images of different meanings: 20 colour-swapped twins, 50 other pairs, and 10 of one digit."""
        meanings: set[str] = set()
        scenes = self._new_twins(["pair"], 20, meanings)
        scenes += self._new(lambda: (self.scene("pair"),), 50, meanings)
        return scenes + self._new(lambda: (self.picture(),), 10, meanings)

    def _all_twins(self, kinds: list[str] | tuple[str, ...], n: int) -> list[Scene]:
        return [scene for _ in range(n) for scene in self.twins(pick(kinds, self.rng))]

    def _new_twins(self, kinds: list[str] | tuple[str, ...], n: int, meanings: set[str]) -> list[Scene]:
        return self._new(lambda: self.twins(pick(kinds, self.rng)), n, meanings)

    def _new(self, draw: Callable[[], tuple[Scene, ...]], n: int, meanings: set[str]) -> list[Scene]:
        """n draws of scenes whose meanings are not yet in `meanings`, which grows by theirs."""
        scenes: list[Scene] = []
        while n:
            drawn = draw()
            if meanings.isdisjoint(map(meaning, drawn)):
                meanings.update(map(meaning, drawn))
                scenes += drawn
                n -= 1
        return scenes

    def _shuffled(self, scenes: list[Scene]) -> list[Scene]:
        return [scenes[i] for i in self.rng.permutation(len(scenes))]
