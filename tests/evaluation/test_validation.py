"""Validation during a run: on one rank and several, by its main metric, interrupted; what a checkpoint records."""

import io
import json
import os
import shutil
import signal
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import Processes
from runs import FAST, MODEL, SIZES, lines

import eval as evaluation
import train
from mplug2.checkpoint import read_config, read_data
from mplug2.inference import BatchRunner
from mplug2.training import run_checkpoint
from mplug2.training.fault_tolerance import Watchdog
from mplug2.training.run_checkpoint import load_training
from tiny_data import write

pytestmark = pytest.mark.usefixtures("no_curves")
TASK = "--task video_qa,video_caption --max-steps 2 --eval-every 2 --lr 0".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Captions and questions of videos: training and validation split, without a test split."""
    whole = write(tmp_path_factory.mktemp("whole") / "world", seed=0, sizes=SIZES)
    folder = tmp_path_factory.mktemp("world")
    (folder / "media").symlink_to(whole / "media")
    for task in ("video_caption", "video_qa"):
        for split in ("train", "val"):
            shutil.copy(whole / f"{task}.{split}.jsonl", folder)
    return folder


def run_training(arguments: list[str]) -> dict[str, float]:
    return train.main(arguments)


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    return [*MODEL, *FAST, *TASK, "--data", str(world), "--out", str(out), "--name", "run", *more]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_share_a_validation_and_find_what_one_rank_finds(world, tmp_path, parallel):
    one = train.main(arguments(world, tmp_path / "one"))
    processes = Processes(2)
    job = arguments(world, tmp_path / "two", "--parallel", parallel)
    first, second = processes.run(run_training, (job,), (job,), joined=False)
    assert processes.close() == [0, 0]
    assert first == second and set(first) == set(one)
    np.testing.assert_allclose([first[name] for name in one], list(one.values()), atol=1e-5)
    assert "qa_accuracy" in one and "caption_cider" in one
    predictions = [(tmp_path / name / "run/predictions.jsonl").read_text() for name in ("one", "two")]
    assert predictions[0] == predictions[1]


def test_metrics_have_standard_errors_and_the_checkpoint_knows_its_data_and_the_longest_text(world, tmp_path, capsys):
    train.main(arguments(world, tmp_path))
    run = tmp_path / "run"
    (validation, results) = [line for line in lines(run) if "val/qa_accuracy" in line]
    assert set(results["standard_errors"]) == {name for name in results if "/" in name}
    assert validation["step"] == results["step"] == 2
    assert read_data(run / "last") == [world]
    _, _, preprocess = read_config(run / "last")
    records = [json.loads(line) for line in (world / "video_caption.train.jsonl").read_text().splitlines()]
    assert preprocess.max_length > max(len(text.split()) for record in records for text in record["captions"])
    capsys.readouterr()
    found = evaluation.main(["--checkpoint", str(run / "last"), "--splits", "val"])
    assert f"data: {world} (the training data of the checkpoint)" in capsys.readouterr().out
    assert found == pytest.approx({name: value for name, value in results.items() if name.startswith("val/")})


@pytest.mark.slow
def test_a_run_on_the_tiny_world_records_that(world, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_data.ensure", lambda: world)
    train.main([word for word in arguments(world, tmp_path) if word not in ("--data", str(world))])
    assert read_data(tmp_path / "run/last") == []


def test_the_best_step_is_saved_even_if_saving_and_evaluation_never_meet(world, tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(train.Trainer, "validate", lambda *_: {"qa_accuracy": next(scores, 0.0)})
    train.main(arguments(world, tmp_path, *"--task video_qa --max-steps 7 --eval-every 2 --save-every 5".split()))
    run = tmp_path / "run"
    assert os.readlink(run / "best") == "step_0000004"
    assert json.loads((run / "best/manifest.json").read_text())["score"] == 0.3
    assert os.readlink(run / "last") == "step_0000007"
    assert sorted(path.name for path in run.glob("step_*")) == ["step_0000004", "step_0000005", "step_0000007"]


def test_minutes_between_checkpoints_count_from_the_newest_of_any_kind(world, tmp_path, monkeypatch):
    """A step takes 25 seconds. The best steps, 2 and 4, begin the minute again; step 8 is the last."""
    scores, now, backward = iter([0.1, 0.3, 0.2]), [0.0], train.Trainer.backward

    def timed_backward(self, batches):
        now[0] += 25
        return backward(self, batches)

    monkeypatch.setattr(train.Trainer, "backward", timed_backward)
    monkeypatch.setattr(train.Trainer, "validate", lambda *_: {"qa_accuracy": next(scores, 0.0)})
    monkeypatch.setattr(run_checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    more = "--task video_qa --max-steps 8 --eval-every 2 --save-every 1min --keep-checkpoints 9"
    train.main(arguments(world, tmp_path, *more.split()))
    run = tmp_path / "run"
    assert os.readlink(run / "best") == "step_0000004"
    assert sorted(path.name for path in run.glob("step_*")) == [f"step_{step:07d}" for step in (2, 4, 7, 8)]


def test_best_follows_the_metric_that_is_named(world, tmp_path, monkeypatch, capsys):
    found = iter([{"qa_accuracy": 0.9, "qa_order": 0.1}, {"qa_accuracy": 0.1, "qa_order": 0.2}])
    monkeypatch.setattr(train.Trainer, "validate", lambda *_: next(found, {}))
    run = arguments(world, tmp_path, *"--eval-every 1 --best-metric qa_order".split())
    train.main(run)
    assert os.readlink(tmp_path / "run/best") == "step_0000002"
    monkeypatch.setattr(train.Trainer, "validate", lambda *_: {"qa_accuracy": 0.5})
    train.main([*run, "--name", "other", "--best-metric", "t2v_r1"])
    assert "best_metric='t2v_r1' is not among the metrics of the validation: qa_accuracy" in capsys.readouterr().err
    assert not (tmp_path / "other/best").exists()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_signal_during_a_validation_ends_it_and_the_run_is_saved(world, tmp_path, monkeypatch, capfd, step):
    """Also in the evaluation at the end, after step 3."""
    evaluate = train.evaluate

    def interrupted(predictor, data, tasks):
        if data.limit == (0 if step == 3 else 4):
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(predictor, data, tasks)

    monkeypatch.setattr(train, "evaluate", interrupted)
    assert train.main(arguments(world, tmp_path, "--max-steps", "3", "--eval-every", str(min(step, 2)))) == {}
    said = capfd.readouterr()
    assert "stopping after this step; press Ctrl-C again to quit now" in said.err
    if step == 3:
        assert "SIGINT: the training is complete, its evaluation is not; python eval.py --checkpoint" in said.out
        assert os.readlink(tmp_path / "run/last") == "step_0000003"
    else:
        assert f"SIGINT: saved after step {step + 1} of 3" in said.out
        assert os.readlink(tmp_path / "run/last") == f"step_000000{step + 1}"


def test_the_watchdog_covers_start_up_and_every_batch_of_every_evaluation(world, tmp_path, monkeypatch):
    """The final evaluation too. Before each batch, an evaluation that hangs would be noticed."""
    heard, heartbeat, encode = [], Watchdog.heartbeat, BatchRunner.vision_tokens

    def noted(self, step, activity, **more):
        heard.append((step, activity))
        heartbeat(self, step, activity, **more)

    def encoded(self, pixels):
        computed.append(heard[-1])
        heard.append("a batch")
        return encode(self, pixels)

    computed: list[tuple[int, str]] = []
    monkeypatch.setattr(Watchdog, "heartbeat", noted)
    monkeypatch.setattr(BatchRunner, "vision_tokens", encoded)
    monkeypatch.setattr(train, "write_report", lambda *_: None)  # reads a few files again
    train.main(arguments(world, tmp_path, "--eval-every", "1"))
    assert heard[0] == (0, "starting")
    assert set(computed) == {(1, "validating"), (2, "validating")} and len(computed) > 6


def stopped_in_a_validation(rank: int, arguments: list[str], limit: int) -> tuple[dict, str]:
    """Train, and send a SIGINT to rank 1 during the evaluation of `limit` records: the results, and what is printed."""
    encode, printed = BatchRunner.vision_tokens, io.StringIO()

    def interrupted(self, pixels):
        if rank == 1 and (self.description == "val video_qa") and validations[-1] == limit:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, pixels)

    def evaluate(predictor, data, tasks, evaluate=train.evaluate):
        validations.append(data.limit)
        return evaluate(predictor, data, tasks)

    validations: list[int] = []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(BatchRunner, "vision_tokens", interrupted)
        patch.setattr(train, "evaluate", evaluate)
        return train.main(arguments), printed.getvalue()


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_in_a_validation_ends_the_run_on_both(world, tmp_path):
    """In the validation after step 1, and in the evaluation at the end. The run is saved, and can be continued."""
    processes = Processes(2)
    try:
        for limit, step, message in (
            (4, 2, "another rank got a signal: saved after step 2 of 3; continue with --resume from"),
            (0, 3, "another rank got a signal: the training is complete, its evaluation is not; python eval.py"),
        ):
            out = tmp_path / str(limit)
            job = arguments(world, out, *"--max-steps 3 --eval-every 1 --save-every 3".split())
            (main, said), (other, silent) = processes.run(
                stopped_in_a_validation, (0, job, limit), (1, job, limit), joined=False)
            assert main == other == {} and silent == "" and said.count(message) == 1, said
            assert os.readlink(out / "run/last") == f"step_{step:07d}"
            assert load_training(out / "run/last")["step"] == step
        resumed = ["--resume", "--out", str(tmp_path / "4"), "--name", "run"]
        first, second = processes.run(run_training, (resumed,), (resumed,), joined=False)
        assert first == second and "qa_accuracy" in first
        assert [line["step"] for line in lines(tmp_path / "4/run") if "loss" in line] == [1, 2, 3]
    finally:
        assert processes.close() == [0, 0]


def test_an_unreadable_validation_file_is_named_and_costs_nothing(world, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(world, data, symlinks=True)
    first, *others = (world / "video_caption.val.jsonl").read_text().splitlines()
    first = json.dumps({**json.loads(first), "video": "media/none.gif"})
    (data / "video_caption.val.jsonl").write_text("\n".join([first, *others]))
    results = train.main(arguments(data, tmp_path))
    said = capsys.readouterr().err
    assert results["caption_cider"] >= 0 and "val: scored " in said and "none.gif does not exist" in said
    assert os.readlink(tmp_path / "run/last") == "step_0000002"
