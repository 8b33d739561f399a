"""Recipes: settings that fit together, data sets that exist, and flags that take precedence."""

import dataclasses
from pathlib import Path

import pytest

from mplug2.data.adapters import ADAPTERS
from mplug2.data.build import DataSettings
from mplug2.data.records import RECORD_FIELDS
from mplug2.training.recipes import RECIPES, recipe_table
from mplug2.training.settings import Settings, resolve_settings, with_defaults


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_of_a_recipe_fit_together(name):
    recipe = RECIPES[name]
    assert recipe.data in ADAPTERS and recipe.task in RECORD_FIELDS and recipe.task == recipe.settings["task"]
    settings = Settings.from_flat(with_defaults({"recipe": name, "init": "c", "data": "d"}))
    assert (settings.data.task, settings.data.epochs) == (recipe.task, recipe.settings["epochs"])
    assert settings.optimizer.lr == recipe.settings["lr"]
    assert settings.optimizer.lr * settings.optimizer.floor(settings.optimizer.lr) == pytest.approx(1e-6, rel=0.01)
    assert settings.folder.name == name


def test_the_paper_s_numbers_and_settings():
    """The numbers that the paper and papers that cite it report, and no others."""
    papers = {name: recipe.paper for name, recipe in RECIPES.items() if recipe.paper}
    assert papers == {
        "msrvtt_qa": "48.0", "msvd_qa": "58.1", "msrvtt_caption": "80.3", "msvd_caption": "165.8", "imagenet": "88.5",
        "kinetics400": "87.1", "msrvtt_retrieval": "53.1", "didemo": "56.4",
    }
    settings = RECIPES["msrvtt_caption"].settings
    expected = dict(frames=16, epochs=10, lr=2e-5, vision_lr=2e-6, weight_decay=0.02, beta2=0.999, min_lr_ratio=0.05)
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
    assert with_defaults({"lr": 0.5}) == {"lr": 0.5}


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
