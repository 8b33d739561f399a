"""The tiny world: splits stay apart, time is symmetric, and every answer is true of the pixels."""

import hashlib
import json
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from itertools import chain, product
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mplug2.tasks import RECORD_FIELDS
from tiny_data import Sizes, ensure, tasks, write, writer
from tiny_data.render import LEVELS, PALETTE, load_digits, render, vary
from tiny_data.scenes import SPLITS, STROKES, SceneSource
from tiny_data.world import (
    AXES,
    AXIS_OF,
    COLOR_NAMES,
    COLORS,
    DIGITS,
    MOVING,
    REVERSED,
    SCRIPTS,
    Scene,
    Thing,
    captions,
    held_out,
    positive_id,
    questions,
    reverse,
    sentence,
)

STROKE_IMAGES, LABELS = load_digits()
SMALL = Sizes(
    **dict(clips=42, images=24, texts=20, labelled=20),
    **dict(val_clips=16, val_images=16, val_texts=16, val_labelled=16),
    **dict(test_clips=56, test_images=36, test_texts=16, test_labelled=40, galleries=1),
)
OPPOSITES = {frozenset(pair) for pair in REVERSED.items()}

splits = st.sampled_from(SPLITS)
kinds = st.sampled_from(list(SCRIPTS))
seeds = st.integers(0, 2**32 - 1)


def source(split: str, seed: int = 0) -> SceneSource:
    return SceneSource(split, LABELS, np.random.default_rng(seed))


def drawn(scene: Scene) -> np.ndarray:
    return render(scene, STROKE_IMAGES[[thing.stroke for thing in scene.things]])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A small world on disk."""
    return write(tmp_path_factory.mktemp("tiny") / "world", seed=3, sizes=SMALL)


def records(root: Path, task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (root / f"{task}.{split}.jsonl").read_text().splitlines()]


def frames_of(root: Path, path: str) -> np.ndarray:
    """RGB frames (t, h, w, 3) of an image or a clip."""
    with Image.open(root / path) as file:
        frames = []
        for t in range(getattr(file, "n_frames", 1)):
            file.seek(t)
            frames.append(np.array(file.convert("RGB")))
    return np.stack(frames)


def levels_of(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Which colors are lit, judged by hue alone: color -> brightness (t, h, w) in levels."""
    lit = frames.any(-1)
    hues = np.array(list(COLORS.values())) / 255
    value = frames / 255
    brightness = value.max(-1, keepdims=True)
    nearest = np.abs(value[..., None, :] - brightness[..., None] * hues).sum(-1).argmin(-1)
    return {
        color: np.where(lit & (nearest == i), np.rint(LEVELS * brightness[..., 0]), 0).astype(np.uint8)
        for i, color in enumerate(COLORS)
        if (lit & (nearest == i)).any()
    }


ROW_OF = {np.rint(LEVELS * stroke).astype(np.uint8).tobytes(): row for row, stroke in enumerate(STROKE_IMAGES)}


def recognized(levels: np.ndarray) -> int | None:
    """The row of the stroke that is alone in a frame (h, w), unchanged or at double size."""
    for size in (1, 2):
        for y, x in product(range(0, 32 - 8 * size + 1, 8), repeat=2):
            cell = levels[y: y + 8 * size, x: x + 8 * size]
            same_pixels = (np.repeat(np.repeat(cell[::size, ::size], size, 0), size, 1) == cell).all()
            if same_pixels and cell.any() and np.count_nonzero(cell) == np.count_nonzero(levels):
                row = ROW_OF.get(np.ascontiguousarray(cell[::size, ::size]).tobytes())
                if row is not None:
                    return row
    return None


def contents(frames: np.ndarray) -> set[tuple[str, int]]:
    """The (color, digit) pairs that test media show, read from their pixels. Each one must be a test stroke."""
    found = set()
    for color, levels in levels_of(frames).items():
        (row,) = {recognized(frame) for frame in levels} - {None}
        assert STROKES["test"][0] <= row < STROKES["test"][1]
        found.add((color, int(LABELS[row])))
    return found


# --- what the splits keep apart --------------------------------------------------------------------------------------


def test_test_strokes_are_never_trained_on():
    rows = {split: set(range(*bounds)) for split, bounds in STROKES.items()}
    assert not rows["train"] & rows["val"] and not (rows["train"] | rows["val"]) & (rows["test"] | rows["combos"])
    assert rows["train"] | rows["val"] | rows["test"] == set(range(len(LABELS)))


@settings(max_examples=60, deadline=None)
@given(splits, kinds, seeds)
def test_scenes_show_only_what_their_split_may(split, kind, seed):
    scene = source(split, seed).scene(kind)
    for thing in scene.things:
        assert STROKES[split][0] <= thing.stroke < STROKES[split][1]
        assert LABELS[thing.stroke] == thing.digit
    held = [held_out(AXIS_OF[kind], thing.digit, thing.color) for thing in scene.things]
    assert any(held) == (split == "combos")
    if len(scene.things) == 2:
        one, two = scene.things
        assert one.digit != two.digit and one.color != two.color
        assert max(abs(one.y - two.y), abs(one.x - two.x)) >= 8


def test_each_combination_is_held_out_on_one_axis_and_each_digit_in_one_color():
    for digit in range(10):
        for axis in AXES:
            assert sum(held_out(axis, digit, color) for color in COLORS) == 1
        for color in COLORS:
            assert sum(held_out(axis, digit, color) for axis in AXES) == 1
    for axis, color in product(AXES, COLORS):
        assert 1 <= sum(held_out(axis, digit, color) for digit in range(10)) <= 2


def test_training_shows_every_other_combination_often():
    seen = Counter()
    groups = source("train").training_clips(12000) + source("train").training_images(6000)
    for scene in chain.from_iterable(groups):
        seen.update((AXIS_OF[scene.kind], thing.digit, thing.color) for thing in scene.things)
    for axis, digit, color in product(AXES, range(10), COLORS):
        number = seen[axis, digit, color]
        assert (number == 0) if held_out(axis, digit, color) else (number >= 12), (axis, digit, color, number)


def names_held_out(positive_id: str) -> bool:
    """Whether "red 7 left" or "blue 3 + red 7" names a combination that is held out on its axis."""
    color, digit, *rest = positive_id.split()
    things, kind = [(color, digit)], rest[0] if rest else "image"
    if len(rest) == 3:
        things, kind = [*things, (rest[1], rest[2])], {"+": "pair", ">": "sequence"}[kind]
    return any(held_out(AXIS_OF[kind], int(digit), color) for color, digit in things)


def test_files_keep_combinations_apart(root):
    for split in SPLITS:
        for task in ("caption", "qa", "retrieval"):
            for record in records(root, f"video_{task}", split) + records(root, f"image_{task}", split):
                assert names_held_out(record["positive_id"]) == (split == "combos"), record


# --- time ------------------------------------------------------------------------------------------------------------


def test_two_digits_stand_in_any_two_cells_of_the_grid():
    drawn_at = {tuple((thing.y, thing.x) for thing in one.things)
                for one in (source("train", seed).scene("pair") for seed in range(400))}
    neighbors = {pair for pair in drawn_at if sum(abs(a - b) for a, b in zip(*pair)) == 8}
    assert len(neighbors) > 20 and all(one != other for one, other in drawn_at)


def test_the_digits_of_a_sequence_are_never_seen_together():
    frames = drawn(source("train").scene("sequence"))
    colors = [{int(color) for color in (frame[frame > 0] - 1) // LEVELS} for frame in frames]
    assert [len(of_frame) for of_frame in colors] == [1, 1, 1, 1] and colors[0] == colors[1] != colors[2] == colors[3]


@settings(max_examples=40, deadline=None)
@given(kinds, seeds)
def test_reversed_scenes_show_reversed_frames(kind, seed):
    scene = source("train", seed).scene(kind)
    mirror = reverse(scene)
    assert reverse(mirror) == scene
    assert (drawn(mirror) == drawn(scene)[::-1]).all()
    ordered = kind in MOVING or kind == "sequence"
    assert ordered == (positive_id(mirror) != positive_id(scene))
    assert source("train").allows(mirror)
    if ordered:
        for before, after in zip(drawn(scene), drawn(scene)[1:]):
            assert (before != after).any()


def test_both_twins_are_asked_about_order_and_have_opposite_answers():
    for split in ("test", "combos", "val"):
        scenes = source(split).testing_clips(600)
        assert Counter(scenes) == Counter(map(reverse, scenes))
        rng = np.random.default_rng(0)
        for scene in scenes:
            now, then = (
                [qa["answers"] for qa in questions(s, rng, yes=True, count=False) if qa["kind"] == "order"]
                for s in (scene, reverse(scene))
            )
            if scene.kind == "sequence":
                assert {now[0][0], then[0][0]} == {thing.color for thing in scene.things}
            elif scene.kind in MOVING:
                assert frozenset((now[0][0], then[0][0])) in OPPOSITES
            else:
                assert now == then == []


def test_order_cannot_be_told_from_frames_without_their_order(root):
    for split in ("val", "test", "combos"):
        answers = defaultdict(list)
        for record in records(root, "video_qa", split):
            shown = tuple(sorted(frame.tobytes() for frame in frames_of(root, record["video"])))
            answers[shown] += [qa["answers"][0] for qa in record["qa"] if qa["kind"] == "order"]
        asked = [given for given in answers.values() if given]
        assert len(asked) >= 5 * SMALL.val_clips // 14
        for given_answers in asked:
            assert len(given_answers) % 2 == 0
            assert set(Counter(given_answers).values()) == {len(given_answers) // 2}


def test_training_is_balanced_in_time():
    kinds = Counter(scene.kind for group in source("train").training_clips(12000) for scene in group)
    for before, after in REVERSED.items():
        assert abs(kinds[before] - kinds[after]) < 5 * np.sqrt(kinds[before] + kinds[after])
        assert kinds[before] > 0.9 * kinds["stay"]
    assert kinds["pair"] == 2640 and kinds["sequence"] == 3600 and kinds.total() == 12000


def test_hard_negatives_have_the_same_digits_and_colors_and_another_meaning():
    """Handwriting and places of the twins are drawn separately, so that they do not give a group away."""
    for groups in source("train").training_clips(1200), source("train").training_images(600):
        twins = [group for group in groups if len(group) > 1]
        assert {group[0].kind for group in groups if len(group) == 1}.isdisjoint({"pair", "sequence"})
        assert {scene.kind for group in twins for scene in group} <= {"pair", "sequence"}
        for one, other in twins:
            assert positive_id(one) != positive_id(other)
            for part in "digit", "color":
                assert sorted(getattr(thing, part) for thing in one.things) == sorted(
                    getattr(thing, part) for thing in other.things)
        same = [one.things[0].stroke in {thing.stroke for thing in other.things} for one, other in twins]
        assert sum(same) < len(same) / 10


def test_only_training_has_batch_groups(root):
    for path in root.glob("*.jsonl"):
        groups = Counter(json.loads(line).get("batch_group") for line in path.open())
        if path.name.split(".")[:2] in (["video_caption", "train"], ["video_retrieval", "train"],
                                        ["image_caption", "train"], ["image_retrieval", "train"]):
            assert groups.pop(None) and set(groups.values()) == {2}
        else:
            assert set(groups) == {None}, path


# --- sentences -------------------------------------------------------------------------------------------------------


def every_scene() -> list[Scene]:
    things = [Thing(digit, color, 0, 0, 0) for digit in range(10) for color in COLORS]
    scenes = [Scene(kind, (thing,)) for kind in SCRIPTS for thing in things if len(SCRIPTS[kind]) == 1]
    couples = [(a, b) for a, b in product(things, things) if a.digit != b.digit and a.color != b.color]
    return scenes + [Scene(kind, couple) for kind in ("pair", "sequence") for couple in couples]


def test_captions_distinguish_meanings():
    captions_of, id_of_caption = defaultdict(set), {}
    for scene in every_scene():
        assert 4 <= len(captions(scene)) == len(set(captions(scene)))
        captions_of[positive_id(scene)].add(frozenset(captions(scene)))
        for caption in captions(scene):
            assert id_of_caption.setdefault(caption, positive_id(scene)) == positive_id(scene), caption
    assert all(len(sets) == 1 for sets in captions_of.values())


def test_the_vocabulary_is_small_and_plain():
    rng = np.random.default_rng(0)
    words = set()
    for scene in every_scene():
        texts = [*captions(scene), sentence(scene, rng)]
        for qa in questions(scene, rng, yes=bool(rng.integers(2)), count=True):
            texts += [qa["question"], *qa["answers"]]
        words.update(word for text in texts for word in text.split(" "))
    assert all(word.isalpha() and word.isascii() and word.islower() for word in words)
    assert "an" in words and len(words) <= 100


# --- questions and pixels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "combos"])
def test_default_sizes_have_enough_questions_of_each_kind(split):
    sizes, scenes_from = Sizes(), source(split)
    answers = defaultdict(Counter)
    for modality, scenes in (
        ("video", scenes_from.testing_clips(sizes.test_clips)),
        ("image", scenes_from.testing_images(sizes.test_images)),
    ):
        for record in tasks.question_records(scenes, scenes_from.rng):
            for qa in record["qa"]:
                answers[modality, qa["kind"]].update(qa["answers"])
    for (modality, kind), given_answers in answers.items():
        assert sum(given_answers.values()) >= (400 if kind == "order" else 200), (modality, kind)
        if kind in ("yesno", "count"):
            assert len(given_answers) == 2 and len(set(given_answers.values())) == 1
    assert set(answers) == {
        (m, k) for m in ("video", "image") for k in ("digit", "color", "binding", "order", "yesno", "count")
    } - {("image", "order")}


def test_answers_are_true_of_the_pixels(root):
    checked = Counter()
    for split, modality in product(("train", "test", "combos"), ("video", "image")):
        for record in records(root, f"{modality}_qa", split):
            frames = frames_of(root, record[modality])
            assert len(frames) == (4 if modality == "video" else 1) and frames.shape[1:] == (32, 32, 3)
            shown = None if split == "train" else contents(frames)
            for qa in record["qa"]:
                kind = qa["kind"].split("_")[0]
                assert (kind != qa["kind"]) == (split == "train" and kind == "binding")  # binding_color, binding_digit
                check_answer(qa["question"], kind, qa["answers"][0], frames, shown)
                checked[qa["kind"]] += 1
    asked = {"digit", "color", "binding", "binding_color", "binding_digit", "order", "yesno", "count"}
    assert set(checked) == asked and min(checked.values()) > 20


def check_answer(question: str, kind: str, answer: str, frames: np.ndarray, shown: set | None) -> None:
    """Check one answer against the frames. Digits are checked only if `shown` has them."""
    lit = levels_of(frames)
    named = set(question.split())
    digits = None if shown is None else {DIGITS[digit]: color for color, digit in shown}
    if kind == "color":
        assert set(lit) == {answer}
    elif kind == "count":
        assert len(lit) == {"one": 1, "two": 2}[answer]
    elif kind == "digit":
        assert digits is None or set(digits) == {answer}
    elif kind == "binding" and digits is not None:
        (key,) = named & {*DIGITS, *COLORS}
        assert digits[key] == answer if key in DIGITS else digits[answer] == key
    elif kind == "yesno":
        (key,) = named & {*DIGITS, *COLORS}
        if key in COLORS or digits is not None:
            assert (key in (lit if key in COLORS else digits)) == (answer == "yes")
    elif kind == "order":
        assert motion(lit) == answer


def motion(lit: dict[str, np.ndarray]) -> str:
    """What happens, judged by the pixels alone: the motion of one digit, or which of two colors came first."""
    if len(lit) == 2:
        return max(lit, key=lambda color: int(lit[color][0].sum()))
    (levels,) = lit.values()
    weight = levels.astype(float)
    area = (weight > 0).sum((1, 2))
    if area[-1] > 3 * area[0] or area[0] > 3 * area[-1]:
        return "grow" if area[-1] > area[0] else "shrink"
    total = weight.sum((1, 2))
    if not np.isclose(total[0], total[-1]):
        return "appear" if total[-1] > total[0] else "vanish"
    position = np.arange(32)
    down, right = ((weight.sum(axis) * position).sum(1) / total for axis in (2, 1))
    if down[0] != down[-1]:
        return "down" if down[-1] > down[0] else "up"
    return "right" if right[-1] > right[0] else "left"


# --- retrieval and the labeled tasks ---------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(st.sampled_from(["test", "combos"]), seeds)
def test_galleries_have_100_meanings_and_many_twins(split, seed):
    scenes_from = source(split, seed)
    clips, images = scenes_from.clip_gallery(), scenes_from.image_gallery()
    assert len({positive_id(scene) for scene in clips}) == len(clips) == 100
    assert len({positive_id(scene) for scene in images}) == len(images) == 100
    assert all(scenes_from.allows(scene) for scene in clips + images)
    ordered = [scene for scene in clips if positive_id(reverse(scene)) != positive_id(scene)]
    assert sum(reverse(scene) in clips for scene in ordered) == 2 * 40
    drawings = Counter(frozenset((thing.stroke, thing.y, thing.x) for thing in scene.things) for scene in images)
    assert sum(number == 2 for number in drawings.values()) >= 20


def test_retrieval_files_have_galleries(root):
    for split, modality in product(("test", "combos"), ("video", "image")):
        assert Counter(record["gallery"] for record in records(root, f"{modality}_retrieval", split)) == {"0": 100}


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced(root, split):
    for task, labels in {
        "text_classification": 8,
        "text_pair_classification": 2,
        "image_classification": 10,
        "video_classification": 8,
        "visual_entailment": 3,
        "image_pair_reasoning": 2,
    }.items():
        numbers = Counter(record["label"] for record in records(root, task, split))
        assert len(numbers) == labels and max(numbers.values()) - min(numbers.values()) <= 1, (task, numbers)


ID_OF_CAPTION = {caption: positive_id(scene) for scene in every_scene() for caption in captions(scene)}


def claimed(text: str) -> str:
    """The `positive_id` of what a sentence says. Without its two opening words, it is a caption."""
    return ID_OF_CAPTION[text.split(" ", 2)[2]]


@pytest.mark.parametrize("split", SPLITS)
def test_labels_of_text_are_true(root, split):
    for record in records(root, "text_classification", split):
        assert claimed(record["text"]).split()[2] == record["label"]
    for record in records(root, "text_pair_classification", split):
        one, two = record["texts"]
        assert one != two
        assert (ID_OF_CAPTION[one] == ID_OF_CAPTION[two]) == (record["label"] == "same")
    if split != "combos":
        assert all(claimed(record["text"]) for record in records(root, "text_only", split))


@pytest.mark.parametrize("split", SPLITS)
def test_answers_about_sentences_are_true(root, split):
    kinds = Counter()
    for record in records(root, "text_qa", split):
        for one in record["qa"]:
            words = one["question"].split()
            start = min(i for i, _ in enumerate(words) if " ".join(words[i:]).split(" ", 2)[-1] in ID_OF_CAPTION)
            named, asked = claimed(" ".join(words[start:])).split(), " ".join(words[:start])
            kinds[one["kind"]] += 1
            answer = one["answers"][0]
            if one["kind"] == "digit":
                assert DIGITS[int(named[1])] == answer
            elif one["kind"] == "color":
                assert named[0] == answer
            elif one["kind"] == "count":
                assert answer == ("two" if {"+", ">"} & set(named) else "one")
            elif one["kind"] == "yesno":
                shown = {DIGITS[int(word)] if word.isdigit() else word for word in named}
                assert (answer == "yes") == bool(shown & set(asked.split()) & {*DIGITS, *COLORS})
    assert {"digit", "color", "count", "yesno", "order", "binding"} <= set(kinds)


def test_texts_never_mention_held_out_combinations():
    scenes_from, found = source("train"), []
    for make in (tasks.text_only, tasks.text_classification, tasks.visual_entailment):
        found += [claimed(record["text"]) for record, _ in make(scenes_from, 300)]
    for record, _ in tasks.text_pair_classification(scenes_from, 300):
        found += [ID_OF_CAPTION[text] for text in record["texts"]]
    assert len(found) == 5 * 300 and not any(map(names_held_out, found))


@pytest.mark.parametrize("split", ["test", "combos"])
def test_labels_of_images_are_true(root, split):
    for record in records(root, "image_classification", split):
        ((_, digit),) = contents(frames_of(root, record["image"]))
        assert DIGITS[digit] == record["label"]
    for record in records(root, "video_classification", split):
        assert motion(levels_of(frames_of(root, record["video"]))) == record["label"]
    for record in records(root, "visual_entailment", split):
        color, digit, *moving = claimed(record["text"]).split()
        right = (color, int(digit)) in contents(frames_of(root, record["image"]))
        assert record["label"] == ("contradiction" if not right else "neutral" if moving else "entailment")
    for record in records(root, "image_pair_reasoning", split):
        shown = [contents(frames_of(root, path)) for path in record["images"]]
        (one,), (two,) = shown
        last = record["text"].split()[-1]
        if last in DIGITS:
            right = one[1] == two[1] == DIGITS.index(last)
        elif last in COLORS:
            right = one[0] == two[0] == last
        else:
            right = one[["color", "digit"].index(last)] == two[["color", "digit"].index(last)]
        assert record["label"] == ("true" if right else "false"), record


def test_false_sentences_mention_motion_as_well(root):
    moving = Counter(
        len(claimed(record["text"]).split()) == 3
        for record in records(root, "visual_entailment", "train") + records(root, "visual_entailment", "test")
        if record["label"] == "contradiction"
    )
    assert len(moving) == 2


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_contain_exactly_the_digit_that_is_named(root, split):
    for record in records(root, "grounding", split):
        frame = frames_of(root, record["image"])[0]
        cx, cy, w, h = record["box"]
        left, top, right, bottom = (round(32 * edge, 6) for edge in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        assert (right - left, bottom - top) == (8, 8) and 0 <= left and 0 <= top and right <= 32 and bottom <= 32
        inside = np.zeros((32, 32), bool)
        inside[int(top): int(bottom), int(left): int(right)] = True
        lit = levels_of(frame[None])
        (color,) = [color for color, levels in lit.items() if (levels[0] > 0)[inside].any()]
        (other,) = set(lit) - {color}
        assert not (lit[color][0] > 0)[~inside].any()
        words = record["text"].split()
        assert other not in words
        if words[1] in COLORS:
            assert words[1] == color
        if split in ("test", "combos") and words[-1] in DIGITS:
            assert DIGITS[LABELS[recognized(lit[color][0])]] == words[-1]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), seeds, st.sampled_from([1, len(PALETTE)]))
def test_clips_decode_to_the_exact_pixels(t, seed, colors):
    frames = np.random.default_rng(seed).integers(0, colors, (t, 32, 32), dtype=np.uint8)
    data = writer.gif(frames)
    decoded = iio.imread(data, plugin="pillow", extension=".gif", mode="RGB")
    assert decoded.shape == (t, 32, 32, 3) and (decoded == PALETTE[frames]).all()
    again = iio.imread(data, plugin="pyav", extension=".gif", format="rgb24")
    assert again.shape == (t, 32, 32, 3) and (again == PALETTE[frames]).all()
    assert (iio.imread(writer.png(frames[0]), extension=".png") == PALETTE[frames[0]]).all()


def test_clips_have_four_frames_at_four_per_second_and_repeat_forever(root):
    for record in records(root, "video_caption", "test"):
        with Image.open(root / record["video"]) as file:
            assert (file.n_frames, file.info["duration"], file.info["loop"], file.size) == (4, 250, 0, (32, 32))


def test_another_hand_turns_slants_scales_and_moves_a_digit_a_little():
    """Judged by a bar: its tilt is at most 10 degrees and a slant of 0.1, its center moves by half a pixel at most."""
    bar = np.zeros((1000, 8, 8))
    bar[:, 2:6, 3:5] = 1
    ink = vary(bar, np.random.default_rng(0))
    assert ink.min() >= 0 and 0.99 < ink.max() <= 1 + 1e-9
    axis, total = np.arange(8) - 3.5, ink.sum(axis=(1, 2))
    y, x = ((ink * side).sum(axis=(1, 2)) / total for side in (axis[:, None], axis))
    for center in (y, x):
        assert abs(center.mean()) < 0.05 and 0.5 < np.abs(center).max() < 0.65
    down, right = axis[:, None] - y[:, None, None], axis - x[:, None, None]
    variance, other, both = ((ink * product).sum(axis=(1, 2)) for product in (down**2, right**2, down * right))
    tilt = np.degrees(np.arctan2(2 * both, variance - other)) / 2
    assert abs(tilt.mean()) < 1 and 11 < np.abs(tilt).max() < 18
    assert 0.75 < total.min() / 8 < 0.9 < 1.1 < total.max() / 8 < 1.3


def test_the_palette_has_distinct_colors():
    assert len(np.unique(PALETTE, axis=0)) == len(PALETTE) == 1 + LEVELS * len(COLOR_NAMES)


def test_the_files_are_those_of_the_task_table_with_their_fields(root):
    names = {path.name.removesuffix(".jsonl") for path in root.glob("*.jsonl")}
    # Other tests read the files of every task. A new task may do without records in the tiny world.
    assert names <= {f"{task}.{split}" for task in RECORD_FIELDS for split in SPLITS} - {"text_only.combos"}
    media = set()
    for name in names:
        for record in records(root, *name.split(".")):
            assert set(RECORD_FIELDS[name.split(".")[0]]) <= set(record), name
            media.update(record.get("images", [record.get("image", record.get("video"))]))
    for split in SPLITS:
        clips, images, texts, labelled = SMALL.for_split(split)
        count = {task: len(list(records(root, task, split))) for task in ("video_caption", "image_qa", "text_qa")}
        assert count == {"video_caption": clips, "image_qa": images, "text_qa": labelled}
        assert split == "combos" or len(list(records(root, "text_only", split))) == texts
    assert (SMALL.for_split("train"), SMALL.for_split("val")) == ((42, 24, 20, 20), (16, 16, 16, 16))
    assert SMALL.for_split("test") == SMALL.for_split("combos") == (56, 36, 16, 40)
    assert media - {None} == {path.relative_to(root).as_posix() for path in root.glob("media/*/*")}


def digest(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_the_seed_decides_every_byte(root, tmp_path, monkeypatch):
    assert digest(write(tmp_path / "same", seed=3, sizes=SMALL)) == digest(root)
    monkeypatch.setattr(writer, "SPLITS", ("val",))
    one, two = (digest(write(tmp_path / str(seed), seed, SMALL)) for seed in (1, 2))
    assert one.keys() == two.keys()
    assert sum(one[name] == two[name] for name in one) < len(one) / 20


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"exists and is not an empty folder; remove it or choose another one"):
        write(tmp_path, sizes=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_writer_leaves_nothing(tmp_path, monkeypatch):
    def stop(source, n):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "grounding", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "world", sizes=SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("field", "value"), [("clips", 15), ("galleries", 0), ("test_labelled", -1)])
def test_sizes_that_are_too_small_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {value}, but the world needs at least"):
        Sizes(**{field: value})


def test_ensure_writes_once_even_if_two_race(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path / "cache"))
    begin, calls, found = threading.Barrier(2), [], []

    def small(out, seed):
        calls.append(seed)
        begin.wait(timeout=20)
        return write(out, seed, SMALL)

    monkeypatch.setattr(writer, "SPLITS", ("val",))
    monkeypatch.setattr(writer, "write", small)
    racers = [threading.Thread(target=lambda: found.append(ensure(seed=5))) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    expected = tmp_path / "cache" / "tiny-v6-seed5"
    assert found == [expected, expected] and calls == [5, 5]
    assert list((tmp_path / "cache").iterdir()) == [expected]
    assert ensure(seed=5) == expected and len(calls) == 2
    about = json.loads((expected / "about.json").read_text())
    assert (about["image_size"], about["frames"], about["seed"], about["sizes"]["clips"]) == (32, 4, 5, 42)


def test_ensure_refuses_a_folder_of_another_world(root, tmp_path):
    assert ensure(root, seed=3) == root
    with pytest.raises(ValueError, match=r"about.json: seed is 3, expected 0; remove the folder"):
        ensure(root)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "about.json").write_text(json.dumps({"name": "tiny", "version": 5, "seed": 0}))
    with pytest.raises(ValueError, match=r"about.json: version is 5, expected 6; remove the folder"):
        ensure(tmp_path / "old")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        ensure(tmp_path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MPLUG2_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/tiny-v6-seed0"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/mplug2/tiny-v6-seed0"),
        ({"HOME": "/c"}, "/c/.cache/mplug2/tiny-v6-seed0"),
    ],
)
def test_the_cache_folder_follows_the_environment(environment, expected, monkeypatch):
    for name in ("MPLUG2_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(writer, "write", lambda out, seed: out)
    assert ensure() == Path(expected)


@pytest.mark.slow
def test_command_line(tmp_path):
    small = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SMALL).items()]
    command = [sys.executable, "-m", "tiny_data", f"--out={tmp_path / 'world'}", "--seed=9", *small]
    repository = Path(__file__).parents[1]
    first = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert first.stdout.startswith(f"wrote {tmp_path / 'world'} in ")
    about = json.loads((tmp_path / "world" / "about.json").read_text())
    assert about["seed"] == 9 and about["sizes"] == vars(SMALL)
    second = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "not an empty folder" in second.stderr
