"""Settings of the model: what is refused, the presets, and dictionaries."""

import dataclasses
import re

import pytest
from helpers import configs, small
from hypothesis import given

from mplug2.config import MAY_BE_ZERO, PRESETS, ModelConfig, form_fields
from mplug2.dataclass_tools import from_dict

FIELDS = dataclasses.fields(ModelConfig)
CHOICES = dict.fromkeys(("local_temporal_placement", "class_token", "universal_readout"), ("released", "figure"))
CHOICES["boxes"] = ("soft_argmax", "tokens")


def names_of(kind):
    return [field.name for field in FIELDS if field.type is kind]


# ---- the settings of a model


@pytest.mark.parametrize("name", names_of(int))
def test_a_size_is_a_whole_number(name):
    least = 0 if name in MAY_BE_ZERO else 1
    for value in (least - 1, 2.0, "2", True, None):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: expected an integer of at least {least}")):
            small(**{name: value})


@pytest.mark.parametrize("name", names_of(bool))
def test_a_switch_is_true_or_false(name):
    for value in (1, 0, "true", None):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: expected true or false")):
            small(**{name: value})


@pytest.mark.parametrize("name", names_of(float))
def test_a_fraction_is_at_least_zero_and_below_one(name):
    for value in (-0.1, 1.0, float("nan")):
        message = f"{name}={value!r}: expected a fraction of at least 0 and below 1"
        with pytest.raises(ValueError, match=re.escape(message)):
            small(**{name: value})
    assert getattr(small(**{name: 0.0}), name) == 0.0


@pytest.mark.parametrize("name, choices", CHOICES.items())
def test_a_choice_is_one_of_its_values(name, choices):
    for value in choices:
        assert getattr(small(**{name: value}), name) == value
    with pytest.raises(ValueError, match=f"{name}='other': expected one of {', '.join(choices)}"):
        small(**{name: "other"})


def test_the_tests_above_cover_every_setting():
    covered = [*names_of(int), *names_of(bool), *names_of(float), *CHOICES]
    assert sorted(covered) == sorted(field.name for field in FIELDS)


@pytest.mark.parametrize("changes, message", [
    (dict(image_size=9), "patch_size=4 does not divide image_size=9"),
    (dict(vision_head_width=7), "vision_head_width=7 does not divide vision_width=24"),
    (dict(heads=3), "heads=3 does not divide width=16"),
    (dict(vision_width=9, vision_head_width=3), "vision_width=9 is odd: the local temporal modules work at half of it"),
    (dict(local_temporal_groups=5), "local_temporal_groups=5 does not divide vision_width / 2 = 12"),
    (dict(universal_layers=4), "universal_layers=4 is more than text_layers=3"),
])
def test_settings_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**changes)


@given(configs())
def test_derived_sizes(config):
    assert config.vision_heads * config.vision_head_width == config.vision_width
    assert config.patches * config.patch_size**2 == config.image_size**2


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().width = 32


# ---- presets: the published sizes


@pytest.mark.parametrize("preset, sizes", [
    ("base", dict(patch_size=16, vision_layers=12, vision_width=768, vision_heads=12, text_layers=12, fusion_layers=3,
                  decoder_layers=12, width=768, heads=12, ff_width=3072)),
    ("large", dict(patch_size=14, vision_layers=24, vision_width=1024, vision_heads=16, text_layers=24, fusion_layers=6,
                   decoder_layers=12, width=1024, heads=16, ff_width=4096)),
])
def test_published_sizes(preset, sizes):
    config = PRESETS[preset]()
    assert {name: getattr(config, name) for name in sizes} == sizes
    as_released = dict(
        image_size=224, universal_layers=2, latents=50, vocab_size=30522, max_positions=512, contrastive_width=256,
        local_temporal=True, local_temporal_groups=0, local_temporal_placement="released", temporal_on_images=True,
        class_token="released", universal_readout="released", fusion_stride=0, temporal_stride=0, dropout=0.1,
    )
    assert {name: getattr(config, name) for name in as_released} == as_released


def test_the_tiny_preset_has_no_dropout_and_the_others_that_of_bert():
    assert {name: preset().dropout for name, preset in PRESETS.items()} == {
        "tiny": 0.0, "small": 0.1, "base": 0.1, "large": 0.1}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_takes_changes_and_checks_them(preset):
    changed = dataclasses.replace(PRESETS[preset](), latents=7)
    assert PRESETS[preset](latents=7) == changed != PRESETS[preset]()
    with pytest.raises(ValueError, match="heads=5 does not divide width"):
        PRESETS[preset](heads=5)


# ---- the two forms


FIGURE = dict(local_temporal_placement="figure", temporal_on_images=False, class_token="figure",
              universal_readout="figure")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_form_sets_its_fields_and_no_others(preset):
    config = PRESETS[preset]()
    figure = dataclasses.replace(config, **form_fields("figure", config, {}))
    assert figure == dataclasses.replace(config, local_temporal_groups=config.vision_heads, **FIGURE)
    assert dataclasses.replace(figure, **form_fields("released", figure, {})) == config


def test_a_form_takes_settings_that_agree_and_refuses_others():
    assert form_fields("figure", small(), {"local_temporal_groups": 4})["local_temporal_groups"] == 4
    assert form_fields("figure", small(), {**FIGURE, "heads": 2}) == form_fields("figure", small(), {})
    for name in FIGURE:
        released = getattr(small(), name)
        with pytest.raises(ValueError, match=f"{name}={released!r} contradicts form='figure', which sets it to"):
            form_fields("figure", small(), {name: released})
    for name, value in {**FIGURE, "local_temporal_groups": 4}.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} contradicts form='released'"):
            form_fields("released", small(), {name: value})
    with pytest.raises(ValueError, match="local_temporal_groups=0 contradicts form='figure', which sets it to 3"):
        form_fields("figure", small(), {"local_temporal_groups": 0})


# ---- from and to dictionaries


@given(configs())
def test_settings_survive_a_dictionary(config):
    assert from_dict(ModelConfig, dataclasses.asdict(config)) == config


def test_an_unknown_or_missing_setting_is_named():
    whole = dataclasses.asdict(small())
    with pytest.raises(ValueError, match="DIR/config.json: unknown settings height, widht; known are .*, width"):
        from_dict(ModelConfig, whole | {"widht": 3, "height": 1}, "DIR/config.json")
    del whole["heads"], whole["universal_readout"]
    with pytest.raises(ValueError, match="DIR/config.json: no settings heads, universal_readout"):
        from_dict(ModelConfig, whole, "DIR/config.json")
