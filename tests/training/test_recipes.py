"""Recipes: settings that fit together, data sets that exist, and flags that take precedence."""

import dataclasses
import json
from pathlib import Path

import pytest

from mplug2.config import PRESETS, ModelConfig, nearest_preset
from mplug2.data.adapters import ADAPTERS
from mplug2.data.build import DataSettings
from mplug2.data.records import RECORD_FIELDS
from mplug2.training.recipes import PRETRAINING, RECIPES, recipe_table
from mplug2.training.settings import Settings, resolve_settings, with_defaults


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_of_a_recipe_fit_together(name):
    recipe = RECIPES[name]
    assert recipe.task == "pretrain" or (recipe.data in ADAPTERS and recipe.task in RECORD_FIELDS)
    assert recipe.task == recipe.settings["task"]
    settings = Settings.from_flat(with_defaults({"recipe": name, "init": "c", "data": "d"}))
    assert (settings.data.task, settings.data.epochs) == (recipe.task, recipe.settings["epochs"])
    assert settings.optimizer.lr == recipe.settings["lr"]
    for peak in {settings.optimizer.lr, settings.optimizer.vision_lr} - {0}:
        assert peak * settings.optimizer.floor(peak) == pytest.approx(2e-6 if name == "pretrain_large" else 1e-6)
    assert settings.folder.name == name
    assert settings.data.micro_batch_size(8) * 8 * settings.data.accumulation_steps == settings.data.batch_size


def test_the_paper_s_numbers_and_settings():
    """The numbers that the paper and papers that cite it report, and no others."""
    papers = {name: recipe.paper for name, recipe in RECIPES.items() if recipe.paper}
    assert papers == {
        "msrvtt_qa": "48.0", "msvd_qa": "58.1", "msrvtt_caption": "80.3", "msvd_caption": "165.8", "imagenet": "88.5",
        "kinetics400": "87.1", "msrvtt_retrieval": "53.1", "didemo": "56.4",
        "refcoco": "90.1 / 92.8 / 86.1", "refcocog": "84.7 / 85.1",
    }
    settings = RECIPES["msrvtt_caption"].settings
    expected = dict(frames=16, epochs=10, lr=2e-5, vision_lr=2e-6, weight_decay=0.02, beta2=0.999, min_lr=1e-6,
                    batch_size=64, accumulation_steps=2, clip_grad=0)
    assert {name: settings[name] for name in expected} == expected
    assert "80.3" in next(line for line in recipe_table().splitlines() if "`msrvtt_caption` |" in line)
    assert recipe_table() in (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_recipes_cannot_be_changed():
    with pytest.raises(TypeError):
        RECIPES["msrvtt_qa"].settings["lr"] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["msrvtt_qa"].task = "x"


def test_flags_take_precedence_over_the_recipe():
    given = {"recipe": "msrvtt_qa", "init": "c", "data": "d", "lr": 0.5}
    assert with_defaults(given)["lr"] == 0.5 and with_defaults(given)["epochs"] == 10
    assert "epochs" not in with_defaults({**given, "max_steps": 7})
    assert with_defaults({"lr": 0.5}) == PRETRAINING["tiny"] | {"lr": 0.5}


@pytest.mark.parametrize("given, message", [
    ({"recipe": "msrvt_qa", "init": "c", "data": "d"}, "did you mean 'msrvtt_qa'?"),
    ({"recipe": "msrvtt_qa", "init": "c"}, "python -m mplug2.data msrvtt_qa"),
    ({"recipe": "msrvtt_qa", "data": "d"}, "add --init CHECKPOINT"),
])
def test_a_recipe_names_what_it_needs(tmp_path, given, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        resolve_settings({**given, "out": str(tmp_path)}, {})


def test_augmentation_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="crops would not move the boxes of grounding"):
        DataSettings(task="grounding", augment="finetune")
    with pytest.raises(ValueError, match="add --augment finetune"):
        DataSettings(hflip=True)


def test_released_settings_that_differ_between_tasks():
    """Questions: 200 warmup steps, no distillation. Retrieval: 1,024 pairs, paragraphs of 256 words."""
    questions = RECIPES["msrvtt_qa"].settings
    assert {name: questions.get(name) for name in ("warmup_steps", "batch_size", "distill_weight")} == {
        "warmup_steps": 200, "batch_size": 32, "distill_weight": None}
    assert all(RECIPES[f"{name}_retrieval"].settings["batch_size"] == 1024 for name in ("coco", "flickr30k"))
    assert RECIPES["didemo"].settings["max_words"] == 256
    mirrored = {name for name, recipe in RECIPES.items() if recipe.settings.get("hflip")}
    assert mirrored > {"kinetics400", "imagenet"} and not mirrored & {"ssv2", "nlvr2"}  # these tell left from right
    assert all("zero-shot" in RECIPES[name].source for name in ("msrvtt_retrieval", "didemo", "lsmdc"))


# ---- defaults of a size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, rates, batch, optimizer, frames", [
    ("tiny", (2.5e-3, 0.0), 32, "muon", 4), ("small", (1e-3, 0.0), 128, "muon", 8),
    ("base", (1e-4, 1e-5), 1024, "adamw", 4), ("large", (5e-5, 5e-6), 1024, "adamw", 4),
])
def test_each_preset_pre_trains_at_settings_of_its_size(preset, rates, batch, optimizer, frames):
    settings = Settings.from_flat(with_defaults({"preset": preset}))
    assert (settings.optimizer.lr, settings.optimizer.vision_lr) == rates
    assert (settings.data.batch_size, settings.optimizer.optimizer, settings.data.frames) == (batch, optimizer, frames)
    if preset in ("base", "large"):
        recipe = Settings.from_flat(with_defaults({"recipe": f"pretrain_{preset}"}))
        assert recipe.flat() == {**settings.flat(), "recipe": f"pretrain_{preset}"}


def saved(folder: Path, preset: str, frames: int, max_words: int) -> str:
    """A checkpoint folder as far as its config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "format": 1, "task": "pretrain", "model": dataclasses.asdict(PRESETS[preset]()),
        "preprocess": {"frames": frames, "max_words": max_words, "max_length": 0},
    }))
    return str(folder)


@pytest.mark.parametrize("preset, lr, epochs, optimizer", [
    ("tiny", 1e-3, None, "muon"), ("small", 5e-4, None, "muon"),
    ("base", 2e-5, 10, "adamw"), ("large", 2e-5, 10, "adamw"),
])
def test_fine_tuning_inherits_frames_and_words_and_takes_settings_of_the_checkpoint_s_size(
    tmp_path, preset, lr, epochs, optimizer
):
    given = {"task": "video_qa", "init": saved(tmp_path / "c", preset, 12, 50)}
    settings = Settings.from_flat(with_defaults(given))
    assert (settings.data.frames, settings.data.max_words) == (12, 50)
    assert (settings.optimizer.lr, settings.data.epochs, settings.optimizer.optimizer) == (lr, epochs, optimizer)
    assert with_defaults({**given, "frames": 3, "lr": 1.0})["frames"] == 3
    assert with_defaults({**given, "max_steps": 9}).get("epochs") is None
    assert with_defaults({**given, "recipe": "msrvtt_qa"})["frames"] == 16


def test_a_checkpoint_has_the_size_of_the_widest_preset_that_is_not_wider():
    assert [nearest_preset(ModelConfig(width=width, heads=4)) for width in (32, 64, 512, 768, 1000, 1024, 2048)] == [
        "tiny", "tiny", "small", "base", "base", "large", "large"]


def test_without_init_no_checkpoint_is_read_not_even_one_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(saved(tmp_path / "c", "large", 12, 50))
    assert "frames" not in with_defaults({"task": "video_qa"})
