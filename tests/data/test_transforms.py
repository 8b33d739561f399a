"""Augmentation: sizes, properties, and the same parameters for all frames; test inputs are only resized."""

import numpy as np
import pytest
import torch
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mplug2.data.media import CLIP_MEAN, CLIP_STD, to_pixels
from mplug2.data.samples import Sample, Samples
from mplug2.data.transforms import (
    GRAY,
    IMAGE_OPERATIONS,
    VIDEO_OPERATIONS,
    Augmentation,
    apply,
    augment,
    crop_box,
    draw_operations,
)

sides = st.integers(5, 60)
kinds = st.sampled_from(["image", "video"])
styles = st.sampled_from(["finetune", "pretrain"])


def noise(t: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (t, height, width, 3), dtype=np.uint8)


@given(sides, sides, st.integers(4, 24), kinds, styles, st.booleans(), seeds)
def test_all_frames_share_the_parameters(height, width, size, kind, style, flip, seed):
    """Each frame equals the result of augmenting it alone with the same seed."""
    frames, augmentation = noise(3, height, width), Augmentation(style, flip)
    made = augment(frames, size, kind, augmentation, np.random.default_rng(seed))
    assert made.shape == (3, size, size, 3) and made.dtype == np.uint8
    for number in range(3):
        alone = augment(frames[number: number + 1], size, kind, augmentation, np.random.default_rng(seed))
        np.testing.assert_array_equal(made[number], alone[0])


@given(sides, sides, st.sampled_from([0.2, 0.5]), seeds)
def test_crops_lie_inside_and_have_an_allowed_area_and_aspect(height, width, least, seed):
    left, top, right, bottom = crop_box(height, width, least, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    share, ratio = (right - left) * (bottom - top) / (height * width), (right - left) / (bottom - top)
    if 3 / 4 <= width / height <= 4 / 3 and min(height, width) > 20:  # other shapes may take the fallback
        assert share >= least - 0.1
        assert 0.65 < ratio < 1.5


def test_a_long_strip_falls_back_to_a_centered_crop():
    assert crop_box(10, 1000, 0.5, np.random.default_rng(0)) == (493, 0, 506, 10)
    assert crop_box(1000, 10, 0.5, np.random.default_rng(0)) == (0, 493, 10, 506)


def test_crops_cover_the_whole_range_of_areas():
    rng = np.random.default_rng(0)
    for least in (0.2, 0.5):
        boxes = [crop_box(100, 100, least, rng) for _ in range(400)]
        shares = [(right - left) * (bottom - top) / 1e4 for left, top, right, bottom in boxes]
        assert least - 0.02 < min(shares) < least + 0.05 and 0.9 < max(shares) <= 1


def test_the_area_is_drawn_evenly_and_the_aspect_evenly_by_its_logarithm():
    """Of crops so small that none is rejected for being wider or higher than the image."""
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(1000, 1000, 0.2, rng) for _ in range(3000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    fits = w * h < 0.7e6
    area, ratio = (w * h)[fits] / 1e6, np.log(w / h)[fits] / np.log(4 / 3)
    for found, low, high in ((area, 0.2, 0.7), (ratio, -1, 1)):
        counts = np.histogram(found, 4, (low, high))[0]
        assert counts.sum() > 0.998 * fits.sum() > 1500
        assert counts / counts.sum() == pytest.approx([0.25] * 4, abs=0.04)


def test_a_crop_is_anywhere_in_the_image_up_to_its_edges():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(12, 12, 0.5, rng) for _ in range(2000)])
    for first, last in ((0, 2), (1, 3)):  # left and right, top and bottom
        for side in np.unique(boxes[:, last] - boxes[:, first]):
            starts = boxes[boxes[:, last] - boxes[:, first] == side, first]
            assert len(starts) < 100 or set(starts) == set(range(int(12 - side) + 1))
        assert {0, 1, 2, 3} <= set(boxes[:, first]) and {12, 11, 10, 9} <= set(boxes[:, last])


def test_pretraining_videos_are_cropped_up_to_the_edges(monkeypatch):
    """14 of 15 pixels: two positions in each direction."""
    monkeypatch.setattr("mplug2.data.transforms.draw_operations", lambda *_: [])
    style, frames = Augmentation("pretrain", flip=False), noise(1, 15, 15)
    made = {augment(frames, 14, "video", style, np.random.default_rng(s)).tobytes() for s in range(60)}
    assert made == {frames[:, top: top + 14, left: left + 14].tobytes() for top in (0, 1) for left in (0, 1)}


@pytest.mark.parametrize("flip, expected", [(True, {0, 1}), (False, {0})])
def test_flips_are_a_setting(flip, expected, monkeypatch):
    monkeypatch.setattr("mplug2.data.transforms.draw_operations", lambda *_: [])
    monkeypatch.setattr("mplug2.data.transforms.crop_box", lambda height, width, *_: (0, 0, width, height))
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    frames[:, :, :4] = 255
    made = [augment(frames, 8, "image", Augmentation("finetune", flip), np.random.default_rng(s)) for s in range(30)]
    assert {int(one[0, 0, 0, 0] == 0) for one in made} == expected


@pytest.mark.parametrize("style, least", [("finetune", 0.5), ("pretrain", 0.2)])
def test_crops_of_images_have_at_least_the_area_of_their_style(style, least, monkeypatch):
    asked = []
    monkeypatch.setattr("mplug2.data.transforms.crop_box", lambda h, w, area, rng: asked.append(area) or (0, 0, w, h))
    augment(noise(1, 8, 8), 8, "image", Augmentation(style), np.random.default_rng(0))
    assert asked == [least]


def test_pretraining_videos_are_flipped_by_an_operation(monkeypatch):
    """Two of ten operations are drawn, so 18 % of the videos are flipped (two flips cancel), not half of them."""
    monkeypatch.setattr("mplug2.data.transforms.GEOMETRIC", ())
    frames = np.zeros((1, 100, 100, 3), np.uint8)
    frames[:, :, :50] = 255

    def share(flip: bool) -> float:
        made = [augment(frames, 20, "video", Augmentation("pretrain", flip), np.random.default_rng(s))[0, 10]
                for s in range(300)]
        return float(np.mean([row[0, 0] < 10 < 245 < row[-1, 0] for row in made]))

    assert share(False) == 0 and 0.1 < share(True) < 0.26


def test_pretraining_videos_are_cropped_from_a_slightly_larger_one(monkeypatch):
    """Resized to 1.14 times the size, then cropped at a random position: never the whole frame, no random area."""
    monkeypatch.setattr("mplug2.data.transforms.draw_operations", lambda *_: [])
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (1, 200, 200, 3))
    style = Augmentation("pretrain", flip=False)
    made = [augment(ramp, 100, "video", style, np.random.default_rng(s))[0] for s in range(20)]
    widths = {int(one[50, -1, 0]) - int(one[50, 0, 0]) for one in made}
    assert widths <= set(range(170, 178))  # 100 of 114 pixels of 200 steps
    assert len({int(one[50, 0, 0]) for one in made}) > 5


@given(seeds)
def test_operations_and_their_values(seed):
    for kind, operations, color in (("image", IMAGE_OPERATIONS, 1.36), ("video", VIDEO_OPERATIONS, 1.0)):
        drawn = draw_operations(kind, 224, np.random.default_rng(seed))
        assert len(drawn) == 2 if kind == "video" else len(drawn) <= 2
        level = {"image": 0.7, "video": 0.5}[kind]
        for name, value in drawn:
            assert name in operations
            largest = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 10, "translate_y": 10, "rotate": 30}.get(name)
            assert abs(value) == pytest.approx(largest * level if largest else color)


def test_the_operations_are_those_of_the_released_code():
    """ALBEF's for images; videos have contrast in place of the two that look at all pixels at once."""
    shared = ["identity", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"]
    assert sorted(IMAGE_OPERATIONS) == sorted([*shared, "autocontrast", "equalize"])
    assert sorted(VIDEO_OPERATIONS) == sorted([*shared, "contrast"])


def test_crops_are_resized_bicubically(monkeypatch):
    monkeypatch.setattr("mplug2.data.transforms.draw_operations", lambda *_: [])
    monkeypatch.setattr("mplug2.data.transforms.crop_box", lambda *_: (2, 1, 18, 20))
    frames = noise(1, 20, 20)
    made = augment(frames, 8, "image", Augmentation("finetune", flip=False), np.random.default_rng(0))
    expected = Image.fromarray(frames[0]).resize((8, 8), Image.Resampling.BICUBIC, box=(2, 1, 18, 20))
    np.testing.assert_array_equal(made[0], np.asarray(expected))


def test_every_operation_is_drawn_and_images_skip_half_of_them():
    rng = np.random.default_rng(0)
    drawn = [draw_operations("image", 224, rng) for _ in range(500)]
    assert {name for of_one in drawn for name, _ in of_one} == set(IMAGE_OPERATIONS)
    assert 0.45 < np.mean([len(of_one) for of_one in drawn]) / 2 < 0.55
    signs = [np.sign(value) for of_one in drawn for name, value in of_one if name.startswith(("shear", "tr", "rot"))]
    assert abs(np.mean(signs)) < 0.2  # to either side
    of_videos = {name for _ in range(300) for name, _ in draw_operations("video", 224, rng)}
    assert of_videos == set(VIDEO_OPERATIONS)


def test_what_each_operation_does():
    image = Image.fromarray(noise(1, 20, 20)[0] // 2 + 40)
    pixels = np.asarray(image).astype(int)

    def after(name: str, value: float) -> np.ndarray:
        made = apply(image, name, value)
        assert made.size == image.size
        return np.asarray(made).astype(int)

    np.testing.assert_array_equal(after("identity", 1), pixels)
    for name in ("brightness", "contrast", "sharpness"):
        np.testing.assert_array_equal(after(name, 1.0), pixels)  # the factor of videos changes nothing
    np.testing.assert_allclose(after("brightness", 0.5), pixels * 0.5, atol=1)
    assert after("contrast", 1.36).std() > pixels.std() * 1.2
    gray = image.convert("L").convert("RGB")
    assert np.asarray(apply(gray, "contrast", 1.36)).std() > np.asarray(gray).std() * 1.2
    assert after("autocontrast", 1).min() == 0 and after("autocontrast", 1).max() == 255
    assert after("equalize", 1).max() == 255 and after("equalize", 1).min() < 10
    np.testing.assert_array_equal(after("translate_x", 3)[:, :17], pixels[:, 3:])
    assert (after("translate_x", 3)[:, 17:] == GRAY).all()
    np.testing.assert_array_equal(after("translate_y", -3)[3:], pixels[:17])
    np.testing.assert_allclose(after("shear_x", 0.3)[0, :19], pixels[0, :19], atol=20)  # shifted by 0.15 of a pixel
    assert (after("shear_x", 0.3)[19, 15:] == GRAY).all()
    across = np.asarray(apply(image.transpose(Image.Transpose.TRANSPOSE), "shear_x", 0.3)).astype(int)
    np.testing.assert_array_equal(after("shear_y", 0.3), across.transpose(1, 0, 2))
    np.testing.assert_array_equal(after("rotate", 90), np.rot90(pixels))
    assert GRAY == (128, 128, 128) and (after("rotate", 45)[[0, 0, -1, -1], [0, -1, 0, -1]] == GRAY).all()
    np.testing.assert_array_equal(after("flip", 1), pixels[:, ::-1])


def test_training_samples_are_augmented_with_their_own_seed(tmp_path):
    """The same sample and epoch give the same pixels, another epoch gives others; without augmentation the image is
    only resized."""
    for number in range(2):
        Image.fromarray(noise(1, 30, 30, number)[0]).save(tmp_path / f"{number}.png")
    kinds = {
        "image_caption": [Sample("a:1", 1, tmp_path / "0.png", ("a dog",))],
        "image_pair_reasoning": [Sample("b:1", 1, images=(tmp_path / "0.png", tmp_path / "1.png"), texts=("both",),
                                        label="true")],
    }
    made = Samples(kinds, 16, 2, 1, 8, 30, 0, Augmentation())
    for kind in kinds:
        first, again, later = (made[kind, epoch, 0]["pixels"] for epoch in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, later)
        plain = Samples(kinds, 16, 2, 1, 8, 30, 0)[kind, 0, 0]["pixels"]
        assert plain.shape == first.shape and not torch.equal(plain, first)
    torch.testing.assert_close(plain[0], to_pixels(noise(1, 30, 30, 0), 16))


@given(sides, sides, st.integers(4, 24))
def test_test_inputs_are_resized_without_cropping_and_normalized(height, width, size):
    frames = noise(2, height, width)
    whole = [Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC) for frame in frames]
    expected = (np.stack([np.asarray(one) for one in whole]) / 255 - CLIP_MEAN) / CLIP_STD
    found = to_pixels(frames, size)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32).permute(3, 0, 1, 2))
