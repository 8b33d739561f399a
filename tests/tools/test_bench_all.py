"""`bench --all`: it runs on a CPU with small sizes, and a measurement that fails does not stop the others."""

import json
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import small

from mplug2.tools import bench, bench_all
from mplug2.tools.bench_all import Device, training_step

plain_compile = torch.nn.Module.compile


def test_a_measurement_that_fails_says_so_and_the_others_continue(tmp_path, capsys, monkeypatch):
    """The second is out of memory. The clock then shows that the time is over."""
    def out_of_memory() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    def last() -> dict:
        monkeypatch.setattr(bench_all, "MINUTES", 0.0)
        return {"captions_per_second": 3.14159, "curve": [1.0, 2.0]}

    step = {"ms": 12.34, "samples_per_second": 56.7, "mfu": 0.456, "optimizer_share": 0.1, "gib": 1.5,
            "planned_gib": 1.75}
    rows = {"base, video, bfloat16": lambda: step, "base, video, float32": out_of_memory, "writing": last,
            "compiled": lambda: pytest.fail("the time was over")}
    monkeypatch.setattr(bench_all, "measurements", lambda *_: rows.items())
    bench.main(["--all", "--json", str(tmp_path / "all.json")])
    found, printed = json.loads((tmp_path / "all.json").read_text()), capsys.readouterr().out.splitlines()
    assert found["base, video, bfloat16"] == step and found["device"] == "CPU"
    assert found["base, video, float32"] == {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}
    assert found["compiled"] == {"error": "not started: 0 minutes are over"}
    assert printed[0].endswith("8 videos of 8 frames, 32 images")
    assert printed[3].split() == ["base,", "video,", "bfloat16", "12.3", "56.7", "45.6%", "10.0%", "1.50", "1.75"]
    assert printed[4].split(maxsplit=3)[3].startswith("error OutOfMemoryError") and "3.142" in printed[5]
    assert "curve" not in printed[5]  # curves are in the file only


def test_rows_are_those_of_both_presets_and_compilation_comes_last():
    names = [name for name, _ in bench_all.measurements(Device("cpu"), ["base", "large"], 1, 1, 1, None)]
    assert len(names) == len(set(names)) == 2 + 2 * (2 * 6 + 1) + 3 + 4
    assert names[-4:] == [f"{preset}, {kind}, compiled" for preset in ("large", "base") for kind in ("video", "image")]


@pytest.mark.slow
def test_everything_is_measured_on_a_cpu(tmp_path, capsys, monkeypatch):
    """With a small model, and graphs that run as they are. Training and tests in other processes only seem to run."""
    def seems_to_run(*arguments: str, good: tuple[int, ...] = (0,)) -> str:
        if arguments[0] == "train.py":
            given = dict(zip(arguments[1::2], arguments[2::2]))
            run = Path(given["--out"]) / given["--name"]
            run.mkdir()
            (run / "metrics.jsonl").write_text('{"loss": 3.0}\n{"other": 1}\n{"loss": 2.0}\n')
        return "nothing ran"

    monkeypatch.setattr(bench_all, "run_python", seems_to_run)
    monkeypatch.setattr(bench_all, "PRESETS", {"tiny": partial(small, max_positions=24)})
    for name, value in (("VIDEO_SECONDS", (1, 1)), ("MINUTES", 60.0)):
        monkeypatch.setattr(bench_all, name, value)
    monkeypatch.setattr(bench, "in_new_process", lambda function, *arguments: function(*arguments))
    with patch.object(torch.nn.Module, "compile", lambda block, **how: plain_compile(block, backend="eager", **how)):
        bench.main([*"--all --preset tiny --batch-size 2 --frames 2 --repeats 1 --json".split(), str(tmp_path / "a")])
    found = json.loads((tmp_path / "a").read_text())
    assert {name: row["error"] for name, row in found.items() if "error" in row} == {}
    for kind, samples in (("video", 2), ("image", 8)):
        for variant in bench_all.VARIANTS:
            row = found[f"tiny, {kind}, {variant}"]
            assert row["samples_per_second"] == pytest.approx(1e3 * samples / row["ms"]) and row["planned_gib"] > 0
            assert 0 < row["optimizer_share"] < 1
    assert found["tiny, writing"]["captions_per_second"] > 0 < found["tiny, writing"]["answers_per_second"]
    assert found["loss of the tiny world"] == {
        **{precision: [3.0, 2.0] for precision in ("float32", "bfloat16")}, "last_tenth_float32": 2.0,
        "last_tenth_bfloat16": 2.0}
    assert found["tests marked gpu"] == {"pytest": "nothing ran"}
    assert found["matrix product"]["bfloat16_tflops"] > 0 < found["host to device"]["gb_per_second"]
    assert "1_s_mp4_s" in found["decoding"]


@pytest.mark.slow
def test_a_step_with_its_planned_memory(monkeypatch):
    """Of the seconds of a step, one is the optimizer's; the operations are those of the planner."""
    monkeypatch.setattr(bench_all, "PRESETS", {"tiny": small})
    monkeypatch.setattr(bench_all, "peak_tflops", lambda device, low_precision: 2.0 if low_precision else 1.0)
    device, ticks = Device("cpu"), iter(range(100))
    monkeypatch.setattr(device, "clock", lambda: float(next(ticks)))
    found = training_step(device, "tiny", "image", 2, 1, repeats=2)
    work = bench_all.Workload(small(), 2, 1, low_precision=True)
    flops = bench_all.planned(work, "image", False).flops
    # A step looks at the clock twice, and is itself between two looks.
    assert (found["ms"], found["optimizer_share"]) == (3000, pytest.approx(1 / 3))
    assert found["mfu"] == pytest.approx(flops / 3 / 2e12) and found["samples_per_second"] == pytest.approx(2 / 3)
    memory = bench_all.device_memory(work, bench_all.planned(work, "image", False), 1, False)
    assert found["planned_gib"] == memory["in all"] / 2**30
