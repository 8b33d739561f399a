"""The benchmark: what it counts and reports. Also activation checkpointing and compilation, which it measures."""

import itertools
import json
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from batches import make_batch
from helpers import noise, randomized, seeds, small
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2 import distributed
from mplug2.config import PRESETS
from mplug2.data.media import read_video
from mplug2.data.records import read_records
from mplug2.generation import SpecialTokens, beam_search
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.objectives import Objectives
from mplug2.tools import bench, bench_eval
from mplug2.training.parallel import ParallelSettings, checkpoint_activations, compile_model, wrap_model
from tiny_data.writer import Sizes, write

# ---- activation checkpointing ----------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(task=st.sampled_from(["pretrain", "video_qa"]), dropout=st.sampled_from([0.0, 0.3]), seed=seeds)
def test_activation_checkpointing_changes_no_loss_and_no_gradient(task, dropout, seed):
    """With dropout too: the recomputation draws the same random numbers."""
    batch = make_batch("video", seed=seed)
    found = []
    for recompute in (False, True):
        model = randomized(MPLUG2(small(dropout=dropout, drop_path=dropout), task), seed).train()
        if recompute:
            checkpoint_activations(model)
        torch.manual_seed(seed)
        losses = Objectives(model)(batch)
        torch.manual_seed(seed + 1)  # the backward pass must not depend on the state of the generator
        sum(losses.values()).backward()
        found.append((losses, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*found)


def test_activation_checkpointing_stores_little_more_than_the_inputs_of_a_block():
    def stored(recompute: bool) -> int:
        """Values of three vision blocks that are stored for the backward pass."""
        model, sizes = MPLUG2(small(vision_layers=3), "video_caption").train(), []
        if recompute:
            checkpoint_activations(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.vision_encoder(torch.zeros(2, 3, 4, 8, 8))
        return sum(sizes)

    assert stored(True) < stored(False) / 4


# ---- compilation -----------------------------------------------------------------------------------------------------


PEAK_MEMORY = bench.peak_memory
plain_compile = torch.nn.Module.compile


def compile_eagerly(module: torch.nn.Module, **how) -> None:
    plain_compile(module, backend="eager", **how)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)  # the defaults, and an error
def test_a_compiled_model_trains_and_writes_the_same(way):
    """On one rank, for all batch types, two batch sizes and changing text lengths. The eager backend runs the graphs as
    they are, so this tests that every block is one graph, and that Dynamo does not run out of versions."""
    found = []
    try:
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = randomized(MPLUG2(small(fusion_layers=2), "pretrain")).train()
            if compiled:
                with patch.object(torch.nn.Module, "compile", compile_eagerly):
                    compile_model(model)
            objectives = wrap_model(Objectives(model), distributed.DistInfo(0, 1, torch.device("cpu")),
                                    ParallelSettings(parallel=way))
            losses = []
            for seed, kind in enumerate(("video", "image", "text", "video")):
                torch.manual_seed(seed)
                parts = objectives(make_batch(kind, b=2 + seed // 3, seed=seed))
                sum(parts.values()).backward()
                losses.append(parts)
            written = []
            if way == "ddp":
                state = model.decoder.init_state(noise(2, 3, 16))
                with torch.no_grad():
                    written = [model.decoder.step(torch.full((2, l), 7), state) for l in (3, 1, 1)]
            found.append((losses, [distributed.full_tensor(p.grad) for p in model.parameters()], written))
            assert not any("_orig_mod" in name for name in model.state_dict())
            assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compiled
        assert not torch._dynamo.utils.counters["graph_break"]
    finally:
        distributed.shutdown()
    torch.testing.assert_close(*found)


# ---- the report ------------------------------------------------------------------------------------------------------


def options(*more: str) -> list[str]:
    return ["--preset", "tiny", "--frames", "2", "--repeats", "1", *more]


def encoder_flops(config, frames: int) -> int:
    """The formula in the docstring of bench.py."""
    d, n, p = config.vision_width, config.patches, config.patch_size
    block = (1 + n) * 24 * d**2 + 4 * (1 + n) ** 2 * d + n * (4 * d**2 + 6 * d)
    return frames * n * 2 * 3 * p**2 * d + config.vision_layers * frames * block


def test_the_table_and_its_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(bench, "MATMUL", 64)
    bench.main(options("--json", str(tmp_path / "bench.json"), "--reference", "--peak-tflops", "2"))
    found, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert {"matmul_gflops", "encoder_s", "generation_s", "train_step_s", "encoder_flops", "train_flops",
            "generation_peak_gb", "train_peak_gb", "train_checkpointed_peak_gb", "generation_reference_s",
            "mfu"} <= set(found)
    assert all(value > 0 for value in found.values())
    assert found["encoder_flops"] == encoder_flops(PRESETS["tiny"](), 2) == found["encoder_reference_flops"]
    # Gradients of inputs and weights cost as much again each, except that pixels need none.
    assert 2.8 < found["train_flops"] / (found["encoder_flops"] + decoding_flops()) < 3.0
    assert found["train_checkpointed_flops"] > 1.2 * found["train_flops"]
    assert found["generation_reference_flops"] > 5 * found["generation_flops"]
    assert found["mfu"] == pytest.approx(found["train_flops"] / found["train_step_s"] / 2e12)
    for name in bench.MEASUREMENTS:
        assert f"\n{name} " in printed


def test_a_measurement_is_the_median_of_runs_after_a_warmup(monkeypatch):
    """Products of 10 x 10 matrices in 1, 2, 4 and 8 microseconds, and runs of 1, 5 and 2 seconds between them."""
    seconds, clock, runs = [9, 1e-6, 1, 2e-6, 5, 4e-6, 2, 8e-6], [], []
    for number, duration in enumerate(seconds):
        clock += [100.0 * number, 100.0 * number + duration]
    ticks = iter(clock)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(bench, "prepare", lambda name, options: lambda: runs.append(name))
    monkeypatch.setattr(bench, "peak_memory", lambda: 3_500_000_000)
    monkeypatch.setattr(bench, "MATMUL", 10)
    found = bench.measure("train", bench.BenchSettings(repeats=3))
    assert found == {"s": 2, "matmul_gflops": pytest.approx((1.0 + 0.5) / 2, rel=1e-3), "peak_gb": 3.5}
    assert runs == ["train"] * 5
    for platform, unit in (("linux", 1024), ("darwin", 1)):  # Linux reports KiB, macOS bytes
        monkeypatch.setattr(bench.sys, "platform", platform)
        usage = SimpleNamespace(ru_maxrss=2**30 // unit)
        monkeypatch.setattr(bench.resource, "getrusage", lambda who, usage=usage: usage)
        assert PEAK_MEMORY() == 2**30


def test_a_row_of_the_table_by_hand(monkeypatch, capsys):
    """Four videos in half a second and 10 GFLOP, on a machine with 100 GFLOP/s."""
    rates = itertools.cycle([90.0, 100.0, 140.0, 120.0])

    def computed(function, *_) -> object:
        return 10 * 10**9 if function is bench.count_flops else {
            "s": 0.5, "matmul_gflops": next(rates), "peak_gb": 1.5}

    monkeypatch.setattr(bench, "in_new_process", computed)
    found = bench.bench(bench.BenchSettings(preset="tiny", batch_size=4, peak_tflops=2.0))
    assert (found["matmul_gflops"], found["mfu"]) == (110, pytest.approx(0.01))
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("generation "))
    assert row.split() == ["generation", "0.500", "8.00", "10", "20%", "50", "1.50"]
    assert "training step: 1.0% of 2 TFLOP/s" in printed and "110 GFLOP/s" in printed


def decoding_flops() -> int:
    """FLOPs of universal layers and decoder in a captioning step with 2 frames and 20 labels, from the sizes."""
    config = PRESETS["tiny"]()
    d, q, v, l = config.width, config.latents, 1 + 2 * config.patches, bench.CAPTION
    def layer(x, m): return x * 2 * (4 + 2 + 8) * d**2 + 4 * x * x * d + m * 4 * d**2 + 4 * x * m * d  # noqa: E731
    head = l * 2 * (d**2 + d * config.vocab_size)
    return layer(q, v) + layer(v, q) + config.decoder_layers * layer(l, v) + head


def test_search_with_and_without_caches_returns_the_same_tokens():
    """So `--reference` measures the same task."""
    model = randomized(MPLUG2(small(max_positions=32), "video_caption")).eval()
    vision, start = noise(1, 5, 16), torch.full((1, 1), 1)
    with torch.no_grad():
        model.decoder.head.bias.data[2] = -1e9  # [SEP], which the cached search forbids
        plain = bench.uncached_search(model, vision, start)[:, 1:]
        fast = beam_search(model, vision, start, SpecialTokens(1, 2, 0), bench.BEAMS, bench.CAPTION, bench.CAPTION, 0.0)
    assert fast[0][0][1] == plain[0].tolist()


@pytest.mark.parametrize("reference", [False, True])
def test_generation_is_twenty_steps_of_one_of_the_two_searches_from_a_memory_computed_before(reference, monkeypatch):
    model, searched = MPLUG2(small(max_positions=32), "video_caption"), []
    for name in "beam_search", "uncached_search":
        monkeypatch.setattr(bench, name, lambda _, *given, name=name, **named: searched.append(
            (name, torch.is_grad_enabled(), *given, named)))
    run = bench.generation(model, bench.BenchSettings(frames=2, batch_size=3, reference=reference), "cpu")
    assert not searched and not model.training
    with patch.object(MPLUG2, "encode_vision", side_effect=AssertionError("encoded while the clock runs")):
        run()
    [(name, with_gradients, vision, start, *rest)] = searched
    assert vision.shape == (3, 1 + 2 * model.config.patches, 16) and start.shape == (3, 1) and not vision.requires_grad
    if reference:
        assert name == "uncached_search" and not with_gradients
    else:
        assert name == "beam_search" and rest[1:] == [5, {"min_length": 20, "max_length": 20}]


def test_a_training_step_changes_the_weights_and_leaves_no_gradients():
    model = MPLUG2(small(max_positions=32, dropout=0.2), "video_caption")
    before = [parameter.clone() for parameter in model.parameters()]
    step = bench.train(model, bench.BenchSettings(frames=2, batch_size=2), "cpu")
    for _ in range(2):
        step()
        assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(not parameter.equal(old) for parameter, old in zip(model.parameters(), before) if parameter.ndim > 1)


def test_the_data_path_is_measured(tmp_path, capsys, monkeypatch):
    root = write(tmp_path / "world", sizes=Sizes(*[16] * 12, galleries=1))
    monkeypatch.setattr(bench, "DATA_STEPS", 3)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    bench.main(options("--batch-size", "4", "--data", str(root), "--json", str(tmp_path / "data.json")))
    found = json.loads((tmp_path / "data.json").read_text())
    # A second for each look at the clock. Two batches of four are read in one; of five seconds of training, the second
    # before each of two batches is spent waiting.
    assert found == {"read_per_second": 8, "waiting_share": 0.4}
    assert "waiting for data" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--frames", "0"], "frames=0: expected a number of at least 1"),
    (["--data", "nowhere"], "nowhere"),
    (["--device", "cuda"], "device cuda: this machine or this build of torch has no CUDA; use --device cpu"),
])
def test_impossible_options_are_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_is_measured_on_one_and_on_two_processes(tmp_path, capsys):
    bench.main(["--evaluation", "2", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    for task, unit, count in (("video_caption", "captions", 2), ("video_qa", "answers", 8),
                              ("video_retrieval", "pairs", 8)):
        for processes in ("", "_2_processes"):
            seconds = found[f"{task}{processes}_s"]
            assert found[f"{task}_{unit}_per_second{processes}"] == pytest.approx(count / seconds) and seconds > 0
        assert 0.1 < found[f"{task}_peak_gb"] < 10
    assert min(found["eval_command_s"], found["eval_command_2_processes_s"]) > found["video_caption_s"]
    assert "2 videos of 30 s" in capsys.readouterr().out


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_the_peak_of_an_evaluation_is_in_bytes(platform, unit, monkeypatch, tmp_path):
    process = SimpleNamespace(device=torch.device("cpu"), is_main=True)
    monkeypatch.setattr(bench_eval, "distributed", SimpleNamespace(
        init_distributed=lambda _: process, all_gather_object=lambda one: [one], shutdown=lambda: None))
    monkeypatch.setattr(bench_eval, "load", lambda *_: SimpleNamespace())
    monkeypatch.setattr(bench_eval, "evaluate", lambda *_: None)
    monkeypatch.setattr(bench_eval.os, "environ", {})
    monkeypatch.setattr(bench_eval.sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=5 * 2**30 // unit)
    monkeypatch.setattr(bench_eval.resource, "getrusage", lambda who: usage)
    found = []
    bench_eval.measure(0, tmp_path, "video_qa", 1, 0, SimpleNamespace(put=found.append))
    assert found[0][1] == 5 * 2**30


def test_the_table_of_evaluation_by_hand(monkeypatch, capsys):
    """One process takes 10 s, two take 5 s. A gallery of 3 videos has fewer candidates than are re-ranked."""
    monkeypatch.setattr(bench_eval, "write_data", lambda *_: None)
    monkeypatch.setattr(bench_eval, "on_processes", lambda root, task, processes: (10.0 / processes, 3e9))
    monkeypatch.setattr(bench_eval, "whole_command", lambda root, processes: 12.0 / processes)
    found = bench_eval.bench_evaluation(3)
    rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    for task, unit, count in (("caption", "captions", 3), ("qa", "answers", 12), ("retrieval", "pairs", 18)):
        assert f"{task}, {unit} 10.0 {count / 10:.1f} 5.0 {count / 5:.1f} 2.00 3.00" in rows
        assert found[f"video_{task}_{unit}_per_second"] == count / 10
        assert found[f"video_{task}_{unit}_per_second_2_processes"] == count / 5
    assert "eval.py, all of it 12.0 6.0 2.00" in rows


def test_the_measured_evaluation_reads_videos_of_a_real_size(tmp_path, monkeypatch):
    assert bench_eval.SECONDS == 30
    monkeypatch.setattr(bench_eval, "SECONDS", 1)
    bench_eval.write_data(tmp_path, 2)
    assert [len(list(read_records(tmp_path, task, "test"))) for task in bench_eval.UNITS] == [2, 2, 2]
    for record in read_records(tmp_path, "video_qa", "test"):
        frames = read_video(tmp_path / record.video, None)
        assert frames.shape == (25, 360, 640, 3) and len(record.qa) == 4
