"""The log: means, MFU, TensorBoard, wandb, skipped files, and the lines that a resumed run removes."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from mplug2.distributed import AllRanksError, DistInfo
from mplug2.training import logs
from mplug2.training.logs import Log, peak_memory_gib, peak_tflops

ALONE = DistInfo(0, 1, torch.device("cpu"))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_means_since_the_previous_one(tmp_path, monkeypatch):
    clock = iter([100.0, 104.0, 110.0, 120.0, 120.0])
    monkeypatch.setattr(logs, "time", types.SimpleNamespace(time=lambda: next(clock)))
    log = Log(tmp_path, ALONE, 0, 9, peak=2.0, flops={"video": 0.75e12, "image": 0.25e12}.get)
    for loss in (1.0, 2.0):
        log.waited(0.5)
        losses = {"loss": torch.tensor(loss), "loss/mlm": torch.tensor(2.0), "loss/vtc": torch.tensor(3 * loss)}
        log.step(losses, torch.tensor(7.0), 8, ["video", "image"])
    log.skipped_files(["b: gone"], 100, 0.02)
    log.write(3, {"lr": 0.1})
    assert log.bar.postfix == "mlm 2.00 vtc 4.50 4 samples/s"
    log.step({"loss": torch.tensor(5.0)}, torch.tensor(7.0), 8, [])
    log.write(4, {"lr": 0.1})
    log.close()
    first, second = lines(tmp_path)
    assert first.pop("memory_gib") > 0.01
    assert first == {
        "step": 3, "loss": 1.5, "loss/mlm": 2.0, "loss/vtc": 4.5, "grad_norm": 7.0, "lr": 0.1,
        "samples_per_second": 4.0, "waiting_for_data": 0.25, "skipped_files": 1, "mfu": 2e12 / 4 / 2e12,
    }
    assert second["loss"] == 5.0 and second["samples_per_second"] == 8 / 10 and "loss/vtc" not in second


def test_values_of_a_step_keep_no_graph(tmp_path):
    log = Log(tmp_path, ALONE, 0, 9)
    log.step({"loss": torch.ones((), requires_grad=True) * 2}, torch.ones((), requires_grad=True) * 3, 8, [])
    assert len(log.values) == 2 and not any(value.requires_grad for values in log.values.values() for value in values)
    log.close()


def test_a_resumed_run_removes_the_lines_of_steps_that_it_repeats(tmp_path):
    text = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4))
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "lo')  # killed while it wrote
    Log(tmp_path, ALONE, 2, 9).close()
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]
    Log(tmp_path, ALONE, 0, 9).close()
    assert lines(tmp_path) == []


def test_lines_are_removed_all_at_once(tmp_path, monkeypatch):
    """A run that is killed before the rename has lost nothing."""
    text = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(logs.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Log(tmp_path, ALONE, 1, 9)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_means_are_those_of_all_ranks_and_memory_is_that_of_the_rank_with_most(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.distributed, "all_reduce_sum", lambda x: x + 10)
    monkeypatch.setattr(logs.distributed, "all_gather_object", lambda one: [([], 0.25), one, ([], 0.5)])
    for own, most in ((0.75, 0.75), (0.0, 0.5)):
        monkeypatch.setattr(logs, "peak_memory_gib", lambda device, own=own: own)
        log = Log(tmp_path, DistInfo(0, 4, torch.device("cpu")), 0, 9)
        log.step({"loss": torch.tensor(2.0)}, torch.tensor(6.0), 8, [])
        log.write(1, {})
        log.close()
        line = lines(tmp_path)[-1]
        assert (line["loss"], line["grad_norm"], line["memory_gib"]) == (3.0, 4.0, most) and "mfu" not in line


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "TensorBoard", lambda *_: pytest.fail("opened on another rank"))
    log = Log(tmp_path, DistInfo(1, 2, torch.device("cpu")), 0, 9)
    log.line({"step": 1})
    assert list(tmp_path.iterdir()) == [] and log.bar.disable
    monkeypatch.undo()
    assert not Log(tmp_path, ALONE, 0, 9).bar.disable


def test_files_that_cannot_be_decoded_are_counted_over_all_ranks(tmp_path, monkeypatch, capsys):
    """Each of two ranks is within the limit, but both together are not. The line is written first."""
    monkeypatch.setattr(logs.distributed, "all_gather_object", lambda one: [one, (["c: gone", "d: gone"], 0.5)])
    log = Log(tmp_path, ALONE, 0, 9)
    log.skipped_files(["a: gone", "a: gone"], 100, 0.03)
    log.write(1, {})
    log.skipped_files(["b: gone", "a: gone"], 100, 0.03)
    log.skipped_files([], 100, 0.03)
    assert re.findall("skipped: (.*)", capsys.readouterr().err) == ["a: gone", "b: gone"]  # each once
    with pytest.raises(AllRanksError, match="4 of 100 media files cannot be decoded, more than max_skipped=0.03"):
        log.write(2, {})
    log.close()
    assert [line["skipped_files"] for line in lines(tmp_path)] == [3, 4]


def test_a_step_that_is_not_finite_is_reported_with_the_samples_of_the_ranks_that_saw_it(tmp_path, monkeypatch, capsys):
    other = False, ["b:2", "b:3"], {"vtc": 3.0, "mlm": 1.0}
    monkeypatch.setattr(logs.distributed, "all_gather_object", lambda one: [one, other])
    for finite, losses, names in ((True, "vtc 3, mlm 1", "b:2, b:3"), (False, "vtc inf", "a:1, b:2, b:3")):
        log = Log(tmp_path, ALONE, 0, 9)
        message = log.nonfinite(4, {"loss/vtc": torch.tensor(float("inf"))}, torch.tensor(7.0), ["a:1"], finite)
        assert message == f"step 4 is not finite: {losses}, gradient norm 7; samples: {names}"
        assert f"skipped: {message}" in capsys.readouterr().err
        log.close()


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_gets_the_same_numbers_if_it_is_installed(tmp_path, monkeypatch, installed):
    written = []

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int):
            written.append((folder, purge_step))

        def add_scalar(self, *values) -> None:
            written.append(values)

        def flush(self) -> None:
            written.append("on disk")

        close = flush

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter) if installed else None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = Log(tmp_path, ALONE, 4, 9)
    log.line({"step": 5, "loss": 2.0})
    log.close()
    assert lines(tmp_path) == [{"step": 5, "loss": 2.0}]
    calls = [(tmp_path / "tensorboard", 5), ("loss", 2.0, 5), "on disk", "on disk"]  # after the line, and at the end
    assert written == (calls if installed else [])


@pytest.mark.parametrize("name, peaks", [
    ("NVIDIA A100-SXM4-80GB", (312, 156)), ("NVIDIA H100 80GB HBM3", (989, 494.5)), ("NVIDIA H200", (989, 494.5)),
    ("NVIDIA B200", (2250, 1125)), ("NVIDIA L40S", (362, 183)), ("NVIDIA GeForce RTX 4090", (165, 82.6)),
    ("Another GPU", (0, 0)),
])
def test_the_peak_of_a_device_is_known_by_its_name(monkeypatch, name, peaks):
    """In bfloat16 and float32. The data sheets name twice as much for some of them, with 2:4 sparsity."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert tuple(peak_tflops(torch.device("cuda"), low_precision=low) for low in (True, False)) == peaks
    assert peak_tflops(torch.device("cpu"), low_precision=True) == 0


def test_memory_is_in_gib(monkeypatch):
    """Linux reports KiB, macOS bytes; so does CUDA."""
    for platform, unit in (("linux", 2**10), ("darwin", 1)):
        monkeypatch.setattr(logs.sys, "platform", platform)
        usage = types.SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
        monkeypatch.setattr(logs.resource, "getrusage", lambda who, usage=usage: usage)
        assert peak_memory_gib(torch.device("cpu")) == 3
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**30 * device.index)
    assert peak_memory_gib(torch.device("cuda:1")) == 5


@pytest.mark.parametrize("fails_at", ["init", "write", "close"])
def test_a_logger_that_fails_costs_one_warning_and_no_line(tmp_path, monkeypatch, capsys, fails_at):
    class Broken:
        def __init__(self, *_):
            self.fail("init")

        def fail(self, at: str) -> None:
            if at == fails_at:
                raise OSError("disk full")

        def write(self, *_) -> None:
            self.fail("write")

        def close(self) -> None:
            self.fail("close")

    monkeypatch.setattr(logs, "TensorBoard", Broken)
    log = Log(tmp_path, ALONE, 0, 9)
    for step in (1, 2):
        log.line({"step": step})
    log.close()
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]
    assert capsys.readouterr().err.count("failed: OSError: disk full") == 1


def test_wandb_is_asked_for_by_its_environment_variable(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "settings.json").write_text("{}")
    Log(tmp_path, ALONE, 0, 9).close()
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setenv("WANDB_PROJECT", "tiny")
    log = Log(tmp_path, ALONE, 0, 9)
    log.line({"step": 1})
    assert "WANDB_PROJECT is set, but wandb is not installed: pip install -e '.[wandb]'" in capsys.readouterr().err
    assert lines(tmp_path) == [{"step": 1}]


def test_only_a_resumed_run_continues_its_wandb_run_and_lines_have_their_step(tmp_path, monkeypatch):
    """With a stand-in for the package, whose runs are called new1, new2, ..."""
    asked, logged, ids = [], [], iter(("new1", "new2", "new3"))

    def init(**settings):
        asked.append(settings["id"])
        run = types.SimpleNamespace(id=settings["id"] or next(ids), log=logged.append, finish=lambda: None)
        run.define_metric = lambda *given, **more: logged.append((given, more))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_PROJECT", "tiny")
    (tmp_path / "settings.json").write_text("{}")
    for first in (0, 2, 0):
        log = Log(tmp_path, ALONE, first, 9)
        log.line({"step": first + 1, "loss": 3.0})
        log.close()
    assert asked == [None, "new1", None] and (tmp_path / "wandb_id").read_text() == "new2\n"
    assert logged[:2] == [(("*",), {"step_metric": "step"}), {"step": 1, "loss": 3.0}]


@pytest.mark.slow
def test_a_resumed_run_continues_its_wandb_run_offline(tmp_path, monkeypatch):
    """With the real package: two folders of the same run, which `wandb sync` uploads as one."""
    wandb = pytest.importorskip("wandb", reason="the logger needs its extra: pip install -e '.[wandb]'")
    for name, value in {"PROJECT": "tiny", "MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "settings.json").write_text(json.dumps({"train": {"lr": 0.515625}}))
    Log(tmp_path, DistInfo(1, 2, torch.device("cpu")), 0, 9).line({"step": 1})
    assert not (tmp_path / "wandb").exists()  # only the main process writes
    for first in (0, 2, 0):
        log = Log(tmp_path, ALONE, first, 9)
        log.line({"step": first + 1, "loss": 3.0625 + first, "standard_errors": {"loss": 0.1}})
        log.close()
    wandb.teardown()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda run: run.stat().st_mtime_ns)
    first, resumed, again = (run.name.split("-")[-1] for run in runs)
    assert first == resumed != again == (tmp_path / "wandb_id").read_text().strip()
    written = [(run / f"run-{run.name.split('-')[-1]}.wandb").read_bytes() for run in runs]
    assert [[b"3.0625" in one, b"5.0625" in one] for one in written] == [[True, False], [False, True], [True, False]]
    assert all(b"standard_errors" not in one and b"0.515625" in one for one in written)  # the settings are there
