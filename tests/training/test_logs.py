"""The log: means, MFU, TensorBoard, skipped files, and the lines that a resumed run removes."""

import json
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
        losses = {"loss": torch.tensor(loss), "loss/vtc": torch.tensor(3 * loss)}
        log.step(losses, torch.tensor(7.0), 8, ["video", "image"])
    log.skipped_files(["b: gone"], 100, 0.02)
    log.write(3, {"lr": 0.1})
    log.step({"loss": torch.tensor(5.0)}, torch.tensor(7.0), 8, [])
    log.write(4, {"lr": 0.1})
    log.close()
    first, second = lines(tmp_path)
    assert first.pop("memory_gib") > 0.01
    assert first == {
        "step": 3, "loss": 1.5, "loss/vtc": 4.5, "grad_norm": 7.0, "lr": 0.1, "samples_per_second": 4.0,
        "waiting_for_data": 0.25, "skipped_files": 1, "mfu": 2e12 / 4 / 2e12,
    }
    assert second["loss"] == 5.0 and second["samples_per_second"] == 8 / 10 and "loss/vtc" not in second


def test_a_resumed_run_removes_the_lines_of_steps_that_it_repeats(tmp_path):
    text = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4))
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "lo')  # killed while it wrote
    Log(tmp_path, ALONE, 2, 9).close()
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]
    Log(tmp_path, ALONE, 0, 9).close()
    assert lines(tmp_path) == []


def test_only_the_main_process_writes(tmp_path):
    log = Log(tmp_path, DistInfo(1, 2, torch.device("cpu")), 0, 9)
    log.line({"step": 1})
    assert list(tmp_path.iterdir()) == [] and log.bar.disable
    assert not Log(tmp_path, ALONE, 0, 9).bar.disable


def test_files_that_cannot_be_decoded_are_counted_over_all_ranks(tmp_path, monkeypatch):
    """Each of two ranks is within the limit, but both together are not. The line is written first."""
    monkeypatch.setattr(logs.distributed, "all_gather_object", lambda one: [one, (["c: gone", "d: gone"], 0.5)])
    log = Log(tmp_path, ALONE, 0, 9)
    log.skipped_files(["a: gone"], 100, 0.03)
    log.write(1, {})
    log.skipped_files(["a: gone", "b: gone"], 100, 0.03)
    with pytest.raises(AllRanksError, match="4 of 100 media files cannot be decoded, more than max_skipped=0.03"):
        log.write(2, {})
    log.close()
    assert [line["skipped_files"] for line in lines(tmp_path)] == [3, 4]


def test_a_step_that_is_not_finite_is_reported_with_the_samples_of_the_ranks_that_saw_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs.distributed, "all_gather_object", lambda one: [one, (False, ["b:2"], {"vtc": 3.0})])
    for finite, losses, names in ((True, "vtc 3", "b:2"), (False, "vtc inf", "a:1, b:2")):
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
            pass

        close = flush

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter) if installed else None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = Log(tmp_path, ALONE, 4, 9)
    log.line({"step": 5, "loss": 2.0})
    log.close()
    assert lines(tmp_path) == [{"step": 5, "loss": 2.0}]
    assert written == ([(tmp_path / "tensorboard", 5), ("loss", 2.0, 5)] if installed else [])


def test_the_peak_of_a_device_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert (peak_tflops(cuda, low_precision=True), peak_tflops(cuda, low_precision=False)) == (989, 67)
    assert peak_tflops(cpu, low_precision=True) == 0
    assert 0.01 < peak_memory_gib(torch.device("cpu")) < 1000
