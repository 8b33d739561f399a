"""The ablations of docs/modularity.md: arms differ from the full model as they say, and committed results fit them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mplug2.config import tiny
from mplug2.model.mplug2 import MPLUG2

FILE = Path(__file__).parents[1] / "notebooks/ablations.py"
spec = importlib.util.spec_from_file_location("ablations", FILE)
ablations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablations)
CONFIG = tiny(vocab_size=227)


def build(arm: str, regime: str = "plenty") -> MPLUG2:
    torch.manual_seed(0)
    return ablations.model_of(arm, regime)(CONFIG, "pretrain", {}).eval()


def outputs(model: MPLUG2, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """V' of a video of this many frames, and an encoded text."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, frames, 32, 32, generator=generator)
    ids = torch.randint(5, 227, (2, 6), generator=generator)
    return model.encode_vision(pixels), model.encode_text(ids, torch.ones(2, 6, dtype=torch.bool))


@pytest.mark.parametrize("arm", ["untied", "two vision encoders"])
@pytest.mark.parametrize("frames", [1, 4])
def test_arms_with_copies_start_equal_to_the_full_model(arm, frames):
    for ours, theirs in zip(outputs(build(arm), frames), outputs(build("full"), frames), strict=True):
        assert torch.equal(ours, theirs)


def with_gradients(model: MPLUG2, output: torch.Tensor) -> set[str]:
    model.zero_grad()
    output.square().mean().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_vision_and_text_share_no_universal_weight_if_untied_and_every_layer_if_tied():
    shared = {}
    for arm in "full", "untied", "one stream":
        model = build(arm)
        vision, text = outputs(model, 4)
        shared[arm] = with_gradients(model, vision[:, 0] @ torch.arange(64.0)) & with_gradients(
            model, text[:, 0] @ torch.arange(64.0))
    assert not shared["untied"]
    assert {name.split(".")[2] for name in shared["full"]} == {"0", "1"}
    assert {name.split(".")[2] for name in shared["one stream"]} == set("01234567")


def test_two_vision_encoders_share_no_weight_between_images_and_videos():
    def encoders(model: MPLUG2, frames: int) -> set[str]:
        used = with_gradients(model, outputs(model, frames)[0][:, 0] @ torch.arange(64.0))
        return {name.split(".")[0] for name in used if "encoder" in name}

    model = build("two vision encoders")
    assert (encoders(model, 1), encoders(model, 4)) == ({"image_encoder"}, {"vision_encoder"})


def test_one_stream_sees_the_order_of_frames_and_has_about_as_many_parameters():
    model = build("one stream")
    pixels = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    forward, backward = model.encode_vision(pixels)[:, 0], model.encode_vision(pixels.flip(2))[:, 0]
    assert not torch.allclose(forward, backward, atol=1e-4)
    sizes = [sum(p.numel() for p in build(arm).parameters()) for arm in ("one stream", "full")]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02


def test_at_odds_changes_images_but_not_videos():
    plain, at_odds = build("full"), build("full", "at odds")
    assert torch.equal(outputs(plain, 4)[0], outputs(at_odds, 4)[0])
    red = torch.zeros(1, 3, 1, 32, 32)
    red[:, 0] = 1
    assert torch.equal(at_odds.encode_vision(red), plain.encode_vision(red[:, [2, 0, 1]]))  # red is shown as green


def test_bits_survive_packing():
    bits = "0010110"
    assert "".join(str(int(bit)) for bit in ablations.unpack(ablations.pack(bits))) == bits


def test_an_effect_is_the_paired_difference_and_its_intervals_cover_it():
    rng, regime, runs = np.random.default_rng(0), "few", {}
    for arm, share in ("full", 0.7), ("without images", 0.4):
        runs[f"{regime}, {arm}"] = {
            str(seed): {"right": {task: ablations.pack("".join(map(str, (rng.random(400) < share).astype(int))))
                                  for task in ablations.VIDEO}} for seed in ablations.SEEDS}
    claim = next(name for name in ablations.CLAIMS if name.startswith("6"))
    found = ablations.effect(claim, runs, draws=500)
    assert found["effect"] == pytest.approx(found["arm"] - found["control"]) and 25 < found["effect"] < 35
    for low, high in (found["bootstrap"], found["student"]):
        assert low < found["effect"] < high and high - low < 10
    assert ablations.verdict(found) == "helps"


@pytest.mark.parametrize(("low", "high", "expected"), [
    (1.0, 9.0, "helps"), (-9.0, -1.0, "hurts"), (-1.5, 1.5, "no effect that matters"), (-1.0, 5.0, "undecided"),
    (0.5, 1.5, "helps, but smaller than what matters"),
])
def test_the_verdict_follows_the_rule_of_the_plan(low, high, expected):
    found = {"effect": (low + high) / 2, "bootstrap": (low, high), "student": (low, high)}
    assert ablations.verdict(found) == expected


def test_the_committed_runs_belong_to_these_models():
    committed = json.loads(ablations.RESULTS.read_text())
    for name, local_temporal in (("full", True), ("no local temporal", False)):
        model = MPLUG2(tiny(vocab_size=227, local_temporal=local_temporal))
        for found in committed["default, 1,500 steps"]["runs"][name].values():
            assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    runs = committed.get("runs", {})
    assert set(runs) <= {f"{regime}, {arm}" for regime, arm in ablations.RUNS}
    for name, by_seed in runs.items():
        assert set(map(int, by_seed)) <= set(ablations.SEEDS)
        regime, arm = name.split(", ")
        if regime != "narrow":
            size = sum(parameter.numel() for parameter in build(arm).parameters())
            assert {found["parameters"] for found in by_seed.values()} == {size}


@pytest.mark.slow
def test_a_run_is_recorded_with_its_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "WORK", tmp_path)
    found = ablations.run("few", "untied", seed=3, steps=2)
    assert found["parameters"] > 800_000
    assert {"video_caption", "image_qa", "transfer video digit", "transfer image color"} <= set(found["right"])
    assert ablations.unpack(found["right"]["video_caption"]).mean() == found["metrics"]["caption_exact"]
    assert len((tmp_path / "few_videos/video_qa.train.jsonl").read_text().splitlines()) == ablations.FEW
