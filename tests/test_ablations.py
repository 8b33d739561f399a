"""The ablations of docs/modularity.md: arms differ from the full model as they say, and committed results fit them."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_data
from mplug2.checkpoint import PreprocessConfig, load_model
from mplug2.config import tiny
from mplug2.data.records import read_records
from mplug2.data.text import Tokenizer
from mplug2.model.mplug2 import MPLUG2
from mplug2.predictor import Predictor
from mplug2.training.recipes import PRETRAINING

FILE, DOCS = (Path(__file__).parents[1] / name for name in ("notebooks/ablations.py", "docs/modularity.md"))
spec = importlib.util.spec_from_file_location("ablations", FILE)
ablations = sys.modules["ablations"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablations)
CONFIG = tiny(vocab_size=227)  # of the recorded runs


def build(arm: str) -> MPLUG2:
    torch.manual_seed(0)
    return ablations.ARMS[arm](CONFIG, "pretrain", {}).eval()


def outputs(model: MPLUG2, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """V' of a video of this many frames, and an encoded text."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, frames, 32, 32, generator=generator)
    ids = torch.randint(5, 227, (2, 6), generator=generator)
    return model.encode_vision(pixels), model.encode_text(ids, torch.ones(2, 6, dtype=torch.bool))


@pytest.mark.parametrize(("arm", "of"), [
    ("untied", "full"), ("two vision encoders", "full"), ("two streams", "one stream")])
@pytest.mark.parametrize("frames", [1, 4])
def test_arms_with_copies_start_equal_to_what_they_copy(arm, of, frames):
    for ours, theirs in zip(outputs(build(arm), frames), outputs(build(of), frames), strict=True):
        assert torch.equal(ours, theirs)


def with_gradients(model: MPLUG2, output: torch.Tensor) -> set[str]:
    model.zero_grad()
    output.square().mean().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_vision_and_text_share_no_universal_weight_if_untied_and_every_layer_if_tied():
    shared = {}
    for arm in "full", "untied", "one stream", "two streams":
        model = build(arm)
        vision, text = outputs(model, 4)
        shared[arm] = with_gradients(model, vision[:, 0] @ torch.arange(64.0)) & with_gradients(
            model, text[:, 0] @ torch.arange(64.0))
    assert not shared["untied"] and not shared["two streams"]
    assert {name.split(".")[2] for name in shared["full"]} == {"0", "1"}
    assert {name.split(".")[2] for name in shared["one stream"]} == set("012345")


def test_two_vision_encoders_share_no_weight_between_images_and_videos():
    def encoders(model: MPLUG2, frames: int) -> set[str]:
        used = with_gradients(model, outputs(model, frames)[0][:, 0] @ torch.arange(64.0))
        return {name.split(".")[0] for name in used if "encoder" in name}

    model = build("two vision encoders")
    assert (encoders(model, 1), encoders(model, 4)) == ({"image_encoder"}, {"vision_encoder"})


def test_one_stream_sees_the_order_of_frames_and_takes_images():
    model = build("one stream")
    pixels = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    forward, backward = model.encode_vision(pixels)[:, 0], model.encode_vision(pixels.flip(2))[:, 0]
    assert not torch.allclose(forward, backward, atol=1e-4)
    assert model.encode_vision(pixels[:, :, :1]).shape == (1, 17, 64)


def test_at_odds_every_color_of_an_image_has_the_word_of_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "WORK", tmp_path)
    root, world = ablations.other_colors(), tiny_data.ensure()
    for name in "image_caption", "image_qa", "video_caption":
        ours, theirs = (read_records(folder, name, "test") for folder in (root, world))
        for one, other in zip(ours, theirs, strict=True):
            changed = set(map(str, one.captions or one.qa)) != set(map(str, other.captions or other.qa))
            assert changed if name == "image_caption" else name == "image_qa" or not changed
    ours, theirs = (read_records(folder, "image_caption", "test") for folder in (root, world))
    pairs = {(theirs[i].positive_id.split()[0], ours[i].positive_id.split()[0]) for i in range(len(ours))}
    assert len(pairs) == 6 and all(one != other for one, other in pairs)


def test_few_videos_keeps_images_sentences_and_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "WORK", tmp_path)
    root, world = ablations.few_videos(), tiny_data.ensure()
    assert world.name in root.name  # the media of another version are not taken for those of this one
    for task, split, size in (
        ("video_caption", "train", 200), ("video_qa", "train", 200), ("video_caption", "test", 600),
    ):
        assert len(read_records(root, task, split)) == size
    for name in "image_caption.train.jsonl", "text_only.train.jsonl", "video_qa.test.jsonl":
        assert (root / name).read_bytes() == (world / name).read_bytes()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=50))
def test_counts_survive_packing(counts):
    assert ablations.unpack(ablations.pack(counts)).tolist() == counts


def invented(shares: dict[tuple[str, str], float], seeds=ablations.SEEDS, media: int = 400) -> dict:
    """Runs whose tests are right with these probabilities, with three questions about each medium."""
    rng = np.random.default_rng(0)
    tasks = sorted({task for _, tasks in ablations.CLAIMS.values() for task in tasks})
    return {"of": {task: ablations.pack([3] * media) for task in tasks}, "runs": {", ".join(term): {str(seed): {
        "right": {task: ablations.pack(rng.binomial(3, share, media).tolist()) for task in tasks}}
        for seed in seeds} for term, share in shares.items()}}


def test_an_effect_is_the_signed_sum_of_scores_and_its_intervals_cover_it():
    runs = invented({("few", "full"): 0.7, ("few", "untied"): 0.4, ("plenty", "full"): 0.6, ("plenty", "untied"): 0.6})
    found = ablations.effect("1b", runs, draws=500)
    assert found["effect"] == pytest.approx(
        found["scores"]["few, full"] - found["scores"]["few, untied"]) == pytest.approx(30, abs=2)
    assert ablations.verdict(found) == "above 0, and it matters"
    assert ablations.verdict(ablations.effect("1a", runs, draws=500)) != "above 0, and it matters"
    interaction = ablations.effect("1b - 1a", runs, draws=500)
    assert interaction["effect"] == pytest.approx(30, abs=3)
    for low, high in (found["bootstrap"], found["student"], interaction["bootstrap"], interaction["student"]):
        assert low < 30.5 and high > 29 and high - low < 10


def test_there_is_no_verdict_before_all_runs_are_there():
    results = invented({("few", "full"): 0.7, ("few", "untied"): 0.4})
    del results["runs"]["few, full"]["3"]
    assert "| 1b | | | | | 1 runs are missing |" in ablations.table(results)
    with pytest.raises(KeyError):
        ablations.effect("1b", results)


def test_the_second_round_is_judged_by_its_own_seeds():
    first = invented({("few", "full"): 0.2, ("few", "untied"): 0.8})
    second = invented({("few", "full"): 0.7, ("few", "untied"): 0.4}, seeds=range(5, 10))
    for name, runs in second["runs"].items():
        first["runs"][name] |= runs
    row = "| 1b | 5 | | | | at least 6 are needed | | |"
    assert row in ablations.second_table(first)
    third = invented({("few", "full"): 0.7, ("few", "untied"): 0.4}, seeds=range(10, 13))
    for name, runs in third["runs"].items():
        first["runs"][name] |= runs
    del first["runs"]["few, full"]["11"]  # its control does not count without it
    row, = (line for line in ablations.second_table(first).splitlines() if line.startswith("| 1b |"))
    _, _, seeds, mean, _, _, verdict, stricter, total, _ = (cell.strip() for cell in row.split("|"))
    assert (seeds, verdict, stricter) == ("7", "above 0, and it matters", "above 0, and it matters")
    assert float(mean) == pytest.approx(30, abs=2)
    assert float(total.split()[0]) == pytest.approx((7 * 30 - 5 * 60) / 12, abs=2) and "(12)" in total
    assert "-60" in ablations.table(first)


def test_a_stricter_interval_is_wider():
    runs = invented({("few", "full"): 0.5, ("few", "untied"): 0.5}, seeds=range(5, 13))
    wide, narrow = (ablations.effect("1b", runs, range(5, 13), confidence) for confidence in (97.5, 95.0))
    for name in "bootstrap", "student":
        assert wide[name][0] < narrow[name][0] < narrow[name][1] < wide[name][1]


@pytest.mark.parametrize("confidence", [95.0, 97.5])
def test_quantiles_of_student_t(confidence):
    """Against the density, integrated by hand."""
    for n, quantile in ablations.STUDENT_T[confidence].items():
        x = np.linspace(-quantile, quantile, 20001)
        density = math.gamma(n / 2) / math.gamma((n - 1) / 2) / math.sqrt((n - 1) * math.pi) * (
            1 + x**2 / (n - 1)) ** (-n / 2)
        assert 100 * density.mean() * 2 * quantile == pytest.approx(confidence, abs=0.02)


@pytest.mark.parametrize(("low", "high", "expected"), [
    (-5.0, 1.0, "no gain that matters"), (-1.0, 5.0, "no loss that matters"), (-5.0, 5.0, "undecided"),
    (-1.5, 1.5, "no effect that matters"), (-9.0, -0.5, "below 0, size undecided"),
])
def test_the_second_round_has_a_verdict_for_one_end(low, high, expected):
    assert ablations.verdict({"bootstrap": (low, high), "student": (low, high)}, second_round=True) == expected


@pytest.mark.parametrize(("low", "high", "expected"), [
    (2.5, 9.0, "above 0, and it matters"), (-9.0, -2.5, "below 0, and it matters"), (-1.0, 5.0, "undecided"),
    (-1.5, 1.5, "no effect that matters"), (0.5, 9.0, "above 0, size undecided"),
])
def test_the_verdict_follows_the_rule_of_the_plan(low, high, expected):
    found = {"effect": (low + high) / 2, "bootstrap": (low, high), "student": (low, high)}
    assert ablations.verdict(found) == expected


def test_the_program_makes_the_missing_runs_of_one_world(tmp_path, monkeypatch, capsys):
    made, file = [], tmp_path / "ablations.json"
    monkeypatch.setattr(ablations, "RESULTS", file)
    monkeypatch.setattr(ablations, "run", lambda *run: made.append(run) or {"of": {}, "right": {}})
    ablations.main(["narrow"])
    assert len(made) == len(set(made)) == 10
    results = json.loads(file.read_text())
    del results["runs"]["narrow, one stream"]["2"]
    file.write_text(json.dumps(results))
    ablations.main(["narrow"])
    assert made[10:] == [("narrow", "one stream", 2)]
    assert "narrow, one stream, seed 2: 0.0 minutes; 0 runs are left" in capsys.readouterr().out
    file.write_text(json.dumps(results | {"world": 3}))
    with pytest.raises(SystemExit, match="these runs were made with version 3 of the tiny world, and this is version"):
        ablations.main(["narrow"])
    assert len(made) == 11


def test_a_run_that_is_stopped_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "WORK", tmp_path)
    monkeypatch.setattr(ablations.train, "main", lambda *_: {})  # what it returns after Ctrl-C
    with pytest.raises(SystemExit, match="plenty, full, seed 0 was stopped"):
        ablations.run("plenty", "full", 0)


def test_the_committed_runs_belong_to_these_models():
    committed = json.loads(ablations.RESULTS.read_text())
    assert f"version {committed['world']} of the tiny world" in DOCS.read_text(encoding="utf-8")
    runs = committed.get("runs", {})
    for name, by_seed in runs.items():
        assert {(*name.split(", "), int(seed)) for seed in by_seed} <= set(ablations.RUNS)
        regime, arm = name.split(", ")
        if regime != "narrow":
            size = sum(parameter.numel() for parameter in build(arm).parameters())
            assert {found["parameters"] for found in by_seed.values()} == {size}


@pytest.mark.slow
def test_the_effects_in_the_docs_are_those_of_the_committed_runs():
    text = DOCS.read_text(encoding="utf-8").partition("## Results\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \**(\d[a-c](?: - (?:\d[a-c]|plenty))?)\b[^|]*\|(.*)\|$", text, re.MULTILINE)
    shown = {claim: [cell.strip() for cell in cells.split("|")] for claim, cells in rows}
    computed = {}
    for line in ablations.table(json.loads(ablations.RESULTS.read_text())).splitlines()[2:]:
        claim, scores, *effect = line.strip("| ").split(" | ")
        pair = [score.split()[-1] for score in scores.split("; ")]  # of arm and control; an interaction has four scores
        computed[claim] = [*(pair if len(pair) == 2 else ["", ""]), *effect]
    assert shown == computed


@pytest.mark.slow
def test_the_effects_of_the_second_round_are_in_the_docs():
    assert ablations.second_table(json.loads(ablations.RESULTS.read_text())) in DOCS.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_is_recorded_with_its_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "WORK", tmp_path)
    found = ablations.run("few", "untied", seed=3, steps=2)
    metrics, score = found["metrics"], {}
    for task, right in found["right"].items():
        score[task] = ablations.unpack(right).sum() / ablations.unpack(found["of"][task]).sum()
    expected = {
        "video_caption": metrics["caption_exact"], "image_caption": metrics["image_caption_exact"],
        "video_qa": metrics["qa_accuracy"], "image_qa": metrics["image_qa_accuracy"],
        "video_qa color": metrics["qa_color"], "image_qa color": metrics["image_qa_color"],
        "video_retrieval": (metrics["v2t_r1"] + metrics["t2v_r1"]) / 2,  # by cosine, not re-ranked
        "image_retrieval": (metrics["i2t_r1"] + metrics["t2i_r1"]) / 2,
    }
    assert {task: score.pop(task) for task in expected} == pytest.approx(expected, abs=1e-4)
    assert set(score) == {*ablations.SPACE, *ablations.PROJECTED}


@pytest.mark.slow
def test_labels_transfer_from_texts_to_media_in_the_projected_space():
    tokenizer = Tokenizer.load(ablations.PRETRAINED / "tokenizer.json")
    model = load_model(ablations.PRETRAINED)[0].eval()
    predictor = Predictor(model, tokenizer, PreprocessConfig(frames=4, max_words=30))
    tests = ablations.transferred(predictor, tiny_data.ensure())
    shares = {task: sum(right) / sum(of) for task, (right, of) in tests.items()}
    assert min(shares[task] for task in ablations.PROJECTED) > 0.8
    assert max(shares[task] for task in ablations.SPACE) < 0.3


def test_an_unknown_regime_is_refused(capsys):
    with pytest.raises(SystemExit):
        ablations.main(["fwe"])
    assert "regime='fwe' (did you mean 'few'?): expected one of plenty, few, at odds, narrow" in capsys.readouterr().err


def test_the_settings_of_the_plan_do_not_follow_the_defaults_of_today():
    flags = {flag[2:].replace("-", "_") for flag in ablations.PLANNED.split()[::2]}
    assert set(PRETRAINING["tiny"]) <= flags
