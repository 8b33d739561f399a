"""train.py and eval.py end to end: a few steps on a small tiny world, on one rank and on two, and their errors."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from data_helpers import write_data
from PIL import Image
from runs import FAST, MODEL, SIZES, SMALL, lines, refused
from safetensors.torch import load_file

import eval as evaluation
import train
from mplug2 import distributed
from mplug2.checkpoint import read_config
from mplug2.data.build import TrainingData
from mplug2.distributed import DistInfo
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.predictor import Generation
from mplug2.tools import report
from mplug2.training.optim import OptimizerSettings
from mplug2.training.recipes import PRETRAINING
from mplug2.training.run_checkpoint import load_training
from mplug2.training.settings import GROUPS
from tiny_data import write
from tiny_data.writer import VERSION

pytestmark = pytest.mark.usefixtures("no_curves")  # except in the session's `run`
HERE = Path(train.__file__).parent
KEYS = (
    ["caption_exact", "caption_cider", "caption_bleu4", "caption_rouge_l"]
    + [f"qa_{kind}" for kind in ("accuracy", "order", "color", "digit", "count", "yesno", "binding")]
    + [f"{way}_{key}" for way in ("t2v", "v2t") for key in ("r1", "r5", "r10", "median_rank", "r1_rerank")]
)
"""The metrics of videos. Those of images have a prefix, except in retrieval, and there are no questions about order."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache with a small tiny world in the place of the default one."""
    folder = tmp_path_factory.mktemp("cache")
    write(folder / f"tiny-v{VERSION}-seed0", seed=0, sizes=SIZES)
    return folder


@pytest.fixture(autouse=True)
def small_world_by_default(cache, monkeypatch):
    """Keep the tests of this file from writing outside of their temporary folders."""
    monkeypatch.setenv("MPLUG2_CACHE", str(cache))
    monkeypatch.chdir(cache)


@pytest.fixture(scope="session")
def light(cache, tmp_path_factory) -> Path:
    """The same world without test splits: evaluating them takes longer than a few steps of training."""
    folder, world = tmp_path_factory.mktemp("light"), cache / f"tiny-v{VERSION}-seed0"
    (folder / "media").symlink_to(world / "media")
    for name in (f"{medium}_{task}" for medium in ("video", "image") for task in ("caption", "qa")):
        for split in ("train", "val"):
            shutil.copy(world / f"{name}.{split}.jsonl", folder)
    shutil.copy(world / "text_only.train.jsonl", folder)
    return folder


@pytest.fixture(scope="session")
def run(cache, tmp_path_factory) -> Path:
    """The folder of a small run with otherwise default settings: pre-training on the tiny world of the cache."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLUG2_CACHE", str(cache))
        patch.chdir(out)
        train.main([*MODEL, *FAST, *"--workers 1 --max-steps 4 --save-every 2 --eval-every 2 --out .".split()])
    return out / "tiny"


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_writes_settings_metrics_a_curve_and_checkpoints(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "best", "curves.png", "last", "metrics.jsonl", "predictions.jsonl", "report.html", "settings.json",
        "step_0000002", "step_0000004",
    ]
    assert os.readlink(run / "last") == "step_0000004"
    scores = [json.loads((run / f"step_000000{step}" / "manifest.json").read_text())["score"] for step in (2, 4)]
    assert all(0 <= score <= 1 for score in scores)
    assert os.readlink(run / "best") == f"step_000000{4 if scores[1] >= scores[0] else 2}"
    for step in (2, 4):
        folder = run / f"step_{step:07d}"
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json", "manifest.json", "model.safetensors", "tokenizer.json", "training.pt",
        ]
        assert load_training(folder)["step"] == step
    settings = json.loads((run / "settings.json").read_text())
    assert settings["commands"] == ["python train.py " + " ".join([*MODEL, *FAST, "--workers 1 --max-steps 4 "
                                                                   "--save-every 2 --eval-every 2 --out ."])]
    assert settings["train"]["max_steps"] == 4 and settings["train"]["lr"] == PRETRAINING["tiny"]["lr"]
    assert settings["model"]["width"] == 32 and settings["model"]["patch_size"] == 8
    task, config, preprocess = read_config(run / "last")
    assert (task, config.width, preprocess.frames, preprocess.max_words) == ("pretrain", 32, 4, 30)
    with Image.open(run / "curves.png") as picture:
        picture.load()


def test_the_report_can_be_written_again_from_the_files_of_the_run(run):
    """It equals the page that train.py wrote at the end, with the model in memory."""
    page = (run / "report.html").read_text()
    for part in ("Results", "Curves", "Samples", "Hardest mistakes", "Settings", "Attention of the words"):
        assert part in page
    assert "python train.py --vision-width 32" in page and page.count("data:image/webp") >= 16
    report.main([str(run)])
    assert (run / "report.html").read_text() == page


def test_metrics_have_a_line_per_step_the_validations_and_the_results(run):
    found = lines(run)
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert {"grad_norm", "lr", "samples_per_second", "waiting_for_data", "skipped_files", "memory_gib"} <= set(line)
        assert 0.001 <= line["temperature"] <= 0.5
    losses = {key.removeprefix("loss/") for line in steps for key in line if key.startswith("loss/")}
    assert losses == {"vtc", "vtm", "mlm", "caption", "answer"}
    validated = [line for line in found if "val/caption_exact" in line]
    assert [line["step"] for line in validated] == [2, 4] and "val/t2i_r1" in validated[0]
    (results,) = [line for line in found if "test/caption_exact" in line]
    assert {f"test/{key}" for key in KEYS} <= set(results)


def test_a_run_can_save_before_the_first_line_of_metrics(light, tmp_path):
    train.main([*MODEL, *FAST, *f"--data {light} --out {tmp_path} --max-steps 4 --save-every 2 --log-every 20".split()])
    run = tmp_path / "tiny"
    assert sorted(path.name for path in run.glob("step_*")) == ["step_0000002", "step_0000004"]
    assert [line["step"] for line in lines(run) if "loss" in line] == [4]  # the last step is always logged


def test_a_run_saves_before_it_validates_and_survives_a_plot_that_fails(light, tmp_path, monkeypatch, capsys):
    def fail(*_) -> None:
        raise RuntimeError("no fonts")

    saved = []
    evaluate = train.evaluate
    monkeypatch.setattr(train, "draw_curves", fail)
    monkeypatch.setattr(train, "write_report", fail)
    run = tmp_path / "tiny"

    def note_and_evaluate(*given):
        name, limit = f"step_{min(len(saved) + 1, 2):07d}", time.monotonic() + 60
        while not ((run / "last").exists() and os.readlink(run / "last") == name):  # it is written in the background
            assert time.monotonic() < limit
            time.sleep(0.01)
        saved.append(name)
        return evaluate(*given)

    monkeypatch.setattr(train, "evaluate", note_and_evaluate)
    train.main([*MODEL, *FAST, *f"--data {light} --out {tmp_path} --max-steps 2 --save-every 1 --eval-every 1".split()])
    assert saved[:2] == ["step_0000001", "step_0000002"]
    printed = capsys.readouterr()
    assert "warning: the report failed: RuntimeError: no fonts" in printed.err
    assert "pretrain: preset tiny, 32 pixels, 4 frames, " in printed.out
    assert not (run / "curves.png").exists() and (run / "best").exists()
    with monkeypatch.context() as broken:
        broken.setattr(train, "evaluate", fail)
        with pytest.raises(RuntimeError):  # a broken evaluation costs no training
            train.main([*MODEL, *FAST, *f"--data {light} --out {tmp_path} --name broken --max-steps 1".split(),
                        "--eval-every", "1"])
    assert load_training(tmp_path / "broken" / "last")["step"] == 1


@pytest.mark.parametrize("device, message", [
    ("tpu", "device 'tpu': expected auto, cpu, cuda, cuda:N or mps"), ("cuda:99", "device cuda:99: this machine"),
])
def test_a_missing_device_is_one_line(capsys, tmp_path, device, message):
    error = refused(capsys, train.main, ["--device", device, "--out", tmp_path], 1)
    assert error.startswith(f"train.py: {message}") and "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_run_can_be_stopped_before_the_first_line_of_metrics(light, tmp_path, number):
    """It saves and exits normally, the report can be written, and the run can be resumed."""
    run = tmp_path / "tiny"
    arguments = f"--data {light} --out {tmp_path} --max-steps 100000 --save-every 2 --log-every 100000".split()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *MODEL, *FAST, *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        limit = time.monotonic() + 120
        while not (run / "last").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    step = load_training(run / "last")["step"]
    assert f"{number.name}: saved after step {step} of 100000; continue with --resume from {run / 'last'}" in output
    assert not (run / "metrics.jsonl").exists()
    with Image.open(run / "curves.png") as picture:
        picture.load()
    report.main([str(run)])
    page = (run / "report.html").read_text()
    assert "<b>0 of 100,000</b>steps" in page and "Curves" not in page
    train.main(["--resume", "--out", str(tmp_path), "--max-steps", str(step + 1)])
    assert [line["step"] for line in lines(run) if "loss" in line] == [step + 1]


@pytest.mark.slow
def test_the_loss_of_captions_falls_by_half_in_forty_steps(light, tmp_path, capsys):
    size = "--vision-width 48 --vision-head-width 24 --width 48 --heads 2 --ff-width 96 --vision-layers 2".split()
    train.main([*MODEL, *size, *FAST, *f"--data {light} --out {tmp_path} --task video_caption --max-steps 40".split(),
                *"--lr 4e-3 --batch-size 24".split()])
    losses = [line["loss/caption"] for line in lines(tmp_path / "video_caption") if "loss/caption" in line]
    assert len(losses) == 40
    assert np.mean(losses[-3:]) < losses[0] / 2, losses
    printed = capsys.readouterr().out
    assert "video_caption: " in printed and "samples: 96 video" in printed and "caption_exact" in printed


@pytest.mark.slow
@pytest.mark.parametrize("form", ["released", "figure"])
def test_both_forms_of_the_model_train_resume_bit_for_bit_and_are_fine_tuned(form, light, tmp_path):
    arguments = [*MODEL, *FAST, "--data", light, "--form", form, "--eval-every", 9, "--save-every", 2]
    train.main([*arguments, "--out", tmp_path / "whole", "--max-steps", 3])
    whole, split = tmp_path / "whole/tiny", tmp_path / "split/tiny"
    config = read_config(whole / "last")[1]
    assert (config.class_token, config.universal_readout, config.local_temporal_groups) == (
        (form, form, 2 if form == "figure" else 0))
    shutil.copytree(whole, split, symlinks=True)
    shutil.rmtree(split / "step_0000003")
    (split / "last").unlink()
    (split / "last").symlink_to("step_0000002")
    train.main(["--out", tmp_path / "split", "--resume"])
    expected, found = (load_file(run / "step_0000003/model.safetensors") for run in (whole, split))
    assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in expected)
    train.main([*FAST, "--data", light, "--out", tmp_path, "--task", "video_qa", "--init", whole / "last",
                "--form", form, "--max-steps", 1])
    assert read_config(tmp_path / "video_qa/last")[1] == config
    other = {"released": "figure", "figure": "released"}[form]
    with pytest.raises(SystemExit):
        train.main([*FAST, "--data", light, "--out", tmp_path / "other", "--task", "video_qa", "--init", whole / "last",
                    "--form", other, "--max-steps", 1])


def test_a_finished_run_can_be_resumed_to_train_longer(light, tmp_path, monkeypatch):
    """Its wandb run continues, too. It ends after the evaluation, and so gets every line of metrics.jsonl."""
    started, logged = [], []

    def init(**given):
        started.append(given)
        return types.SimpleNamespace(id="abc", define_metric=lambda *_, **__: None, finish=lambda: logged.append("end"),
                                     log=lambda values: logged.append(values["step"]))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_PROJECT", "tiny")
    arguments = ["--out", str(tmp_path), "--task", "video_qa"]
    train.main([*MODEL, *FAST, *arguments, "--data", str(light), "--max-steps", "1"])
    train.main([*arguments, "--resume"])  # nothing left to do but to evaluate
    train.main([*arguments, "--resume", "--max-steps", "2"])
    assert os.readlink(tmp_path / "video_qa" / "last") == "step_0000002"
    assert [line["step"] for line in lines(tmp_path / "video_qa") if "loss" in line] == [1, 2]
    assert logged == [1, 1, "end", 1, "end", 2, 2, "end"]
    assert [given["id"] for given in started] == [None, "abc", "abc"]
    assert [len(given["config"]["commands"]) for given in started] == [1, 2, 3]


def test_another_task_starts_from_the_weights_of_a_checkpoint(run, light, tmp_path):
    train.main([*FAST, *f"--init {run / 'last'} --task video_caption --name captions --lr 0 --max-steps 1".split(),
                *f"--data {light} --out {tmp_path} --dropout 0.25".split()])
    folder = tmp_path / "captions" / "last"
    task, config, _ = read_config(folder)
    assert (task, config.width, config.dropout) == ("video_caption", 32, 0.25)
    before, after = load_file(run / "last" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in after} == {"vision_encoder", "universal", "decoder"}
    assert all(tensor.equal(before[name]) for name, tensor in after.items())  # at a learning rate of zero
    assert (folder / "tokenizer.json").read_text() == (run / "last" / "tokenizer.json").read_text()


@pytest.mark.slow
def test_two_ranks_train_like_one(light, tmp_path):
    """The same gradients at every step and for every batch type, and one set of files. Without the matching loss,
    because each rank draws its own negatives."""
    arguments = [*MODEL, *FAST, *f"--data {light} --max-steps 4 --vtm-weight 0 --text-weight 0.3".split()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
         "--nproc-per-node", "2",
         str(HERE / "train.py"), *arguments, "--out", str(tmp_path / "two")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pretrain: ") == 1  # only one of them prints
    train.main([*arguments, "--out", str(tmp_path / "one")])
    one, two = ([line for line in lines(tmp_path / name / "tiny") if "loss" in line] for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    assert any("loss/caption" not in line for line in one)  # a step of text alone
    np.testing.assert_allclose([line["grad_norm"] for line in two], [line["grad_norm"] for line in one], rtol=1e-3)
    training = load_training(tmp_path / "two" / "tiny" / "last")
    assert training["step"] == 4 and len(training["generators"]) == 2


# ---- the steps of a run ----------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
PLAIN = [*SMALL, *"--task video_caption --dropout 0 --text-weight 0 --max-steps 2".split()]


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("records"))


@pytest.fixture
def spy(monkeypatch):
    """`spy(owner, name)`: the positional arguments with which a function is called from now on."""
    def start(owner, name: str) -> list[tuple]:
        calls, function = [], getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **how: (calls.append(given), function(*given, **how))[1])
        return calls

    return start


def test_two_equal_micro_batches_have_the_loss_and_the_gradient_of_one(records, tmp_path, monkeypatch, spy):
    """At a learning rate of 0 the second step has them again, so gradients do not add up over steps."""
    batches, next_batch = {}, train.Trainer.next_batch

    def same_batch(self, source) -> dict:
        batch = next_batch(self, source)
        return batches.setdefault(0, batch)

    monkeypatch.setattr(train.Trainer, "next_batch", same_batch)
    logged, advanced, norms = spy(train.Log, "step"), spy(TrainingData, "advance"), spy(train, "clip_grad_norm")
    synchronized, no_sync = [], train.no_sync
    monkeypatch.setattr(train, "no_sync", lambda model, last: synchronized.append(last) or no_sync(model, last=last))
    for count in (1, 2):
        train.main([*PLAIN, *f"--data {records} --out {tmp_path} --name {count} --lr 0 --clip-grad 0.7".split(),
                    *f"--batch-size {3 * count} --accumulation-steps {count}".split()])
    one, two = (lines(tmp_path / name) for name in "12")
    for key in ("loss", "loss/caption", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([one[0][key]] * 2, rel=1e-5), key
    assert [(samples, kinds) for _, _, _, samples, kinds in logged] == [
        *[(3, ["video_caption"])] * 2, *[(6, ["video_caption"] * 2)] * 2]
    assert synchronized == [True] * 2 + [False, True] * 2 and len(advanced) == 6
    assert [limit for _, limit in norms] == [0.7] * 4


def test_the_rates_of_each_step_are_those_of_the_schedule(records, tmp_path):
    """One step of warmup, then half a cosine from the peak, down to a hundredth of it after the last step."""
    train.main([*PLAIN, *f"--data {records} --out {tmp_path} --lr 0.2 --vision-lr 0.1 --max-steps 4".split()])
    steps = lines(tmp_path / "video_caption")
    factors = [1, *(0.01 + 0.99 * (1 + math.cos(math.pi * progress / 3)) / 2 for progress in (0, 1, 2))]
    assert [line["lr"] for line in steps] == pytest.approx([0.2 * factor for factor in factors])
    assert [line["lr_lowest"] for line in steps] == pytest.approx([0.1 * factor for factor in factors])
    assert all(line["waiting_for_data"] > 0 for line in steps)


def test_ranks_start_with_the_same_weights_and_then_draw_other_random_numbers(records, tmp_path, monkeypatch, spy):
    """Dropout and hard negatives differ, initial weights do not."""
    found, planned = [], spy(train, "step_flops")
    monkeypatch.setattr(train, "wrap_model", lambda objectives, *_: objectives)  # without a process group ...
    monkeypatch.setattr(train, "Watchdog", lambda *_: nullcontext())  # ... and its store
    monkeypatch.setattr(train.Trainer, "train", lambda self: found.append(
        (self.model.state_dict(), torch.rand(4).tolist())) or {})
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "init_distributed", lambda _, rank=rank: DistInfo(rank, 2, CPU))
        train.main([*SMALL, "--data", str(records), "--out", str(tmp_path), "--name", f"rank{rank}"])
    (first, drawn), (second, others) = found
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert not set(drawn) & set(others)
    assert [world_size for _, _, world_size in planned] == [2, 2]


def test_the_teacher_follows_after_the_update_of_the_weights(records, tmp_path):
    """With a decay of 0 it is a copy of the model."""
    train.main([*PLAIN, *f"--data {records} --out {tmp_path} --task video_qa --distill-weight 0.4".split(),
                *"--ema-decay 0".split()])
    folder = tmp_path / "video_qa" / "last"
    saved, weights = load_training(folder)["objectives"], load_file(folder / "model.safetensors")
    assert saved["ema_teacher.steps"] == 2
    assert all(saved[f"ema_teacher.teacher.{name}"].equal(tensor) for name, tensor in weights.items())


def test_a_validation_has_the_settings_of_the_run_and_changes_nothing_that_is_trained_after_it(
    records, tmp_path, monkeypatch, spy
):
    """On records of a sample of `val` after each step, and on all of `test` at the end. The losses of a run without
    validation are the same: the random numbers of dropout continue where they were."""
    data, precisions, autocast = tmp_path / "data", [], set()
    shutil.copytree(records, data)
    for split in ("val", "test"):
        shutil.copy(data / "video_caption.train.jsonl", data / f"video_caption.{split}.jsonl")
    encode, inference, evaluate = train.MPLUG2.encode_vision, train.Inference, train.evaluate

    def note_and_encode(model, pixels):
        if model.training:
            autocast.add(torch.is_autocast_enabled("cpu"))
        return encode(model, pixels)

    monkeypatch.setattr(train.MPLUG2, "encode_vision", note_and_encode)
    monkeypatch.setattr(train, "Inference", lambda **how: precisions.append(how.get("precision")) or inference(**how))
    monkeypatch.setattr(train, "evaluate", lambda *given: (torch.rand(9), evaluate(*given))[1])  # as sampling does
    for name in ("draw_curves", "write_report"):
        monkeypatch.setattr(train, name, lambda *_: None)
    splits, evaluated = spy(train, "EvalSplit"), spy(train, "evaluate")
    arguments = [*PLAIN, *f"--data {data} --out {tmp_path} --dropout 0.3 --precision bfloat16 --save-every 9".split()]
    train.main([*arguments, *"--name often --eval-every 1 --eval-limit 2".split()])
    assert [given[1:] for given in splits] == [("val", 2), ("val", 2), ("test", 0)]
    assert [tasks for _, _, tasks in evaluated] == [["video_caption"]] * 3
    assert autocast == {True} and precisions[::2] == ["bfloat16"] * 3  # and one for each report
    run = tmp_path / "often"
    assert json.loads((run / "best" / "manifest.json").read_text())["score"] is not None
    assert read_config(run / "last")[2].max_length == 1 + len("a blue seven moving left".split())
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: {})
    train.main([*arguments, *"--name never --eval-every 9".split()])
    runs = (lines(tmp_path / name) for name in ("often", "never"))
    found, expected = ([line["loss"] for line in of_run if "loss" in line] for of_run in runs)
    assert found == expected


def update_by_hand(finite: bool, **state) -> SimpleNamespace:
    """The trainer after one update of a model of one number, with gradient 1 or NaN, on rank 1 of 3."""
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1) if finite else torch.full((1,), math.nan)
    trainer = SimpleNamespace(
        state=SimpleNamespace(step=5, **state), wrapped=torch.nn.Identity(), parameters=[weight], stepped=[],
        settings=SimpleNamespace(optimizer=OptimizerSettings()), process=DistInfo(1, 3, CPU),
        objectives=SimpleNamespace(after_step=lambda skipped: None), optimizer=torch.optim.SGD([weight], lr=0.5),
    )
    trainer.log = SimpleNamespace(step=lambda *given: trainer.stepped.append(given[2:]), nonfinite=lambda *_: "message")
    train.Trainer.update(trainer, {"loss": torch.tensor(2.0)}, ["a", "b"], ["video"], False)
    return trainer


def test_an_update_counts_the_samples_of_all_ranks_and_ends_a_row_of_skipped_steps():
    trainer = update_by_hand(True, nonfinite_steps=7, nonfinite_in_a_row=3)
    assert trainer.stepped == [(6, ["video"])] and trainer.parameters[0].item() == pytest.approx(0.5, abs=1e-4)
    assert (trainer.state.nonfinite_steps, trainer.state.nonfinite_in_a_row) == (7, 0)
    assert trainer.parameters[0].grad is None
    trainer = update_by_hand(False, nonfinite_steps=7, nonfinite_in_a_row=3)
    assert trainer.stepped == [] and trainer.parameters[0].item() == 1
    assert (trainer.state.nonfinite_steps, trainer.state.nonfinite_in_a_row) == (8, 4)
    with pytest.raises(distributed.AllRanksError, match="5 steps in a row were not finite; the last: message"):
        update_by_hand(False, nonfinite_steps=7, nonfinite_in_a_row=4)


@pytest.mark.parametrize("main_says", [True, False])
def test_the_main_process_decides_what_is_the_best_checkpoint(tmp_path, monkeypatch, main_says):
    """The others may see an older state of a shared disk."""
    saved, scored = [], []
    monkeypatch.setattr(distributed, "all_gather_object", lambda own: [main_says, not main_says])
    monkeypatch.setattr(distributed, "run_on_main", lambda action, process: scored.append(action.args))
    trainer = SimpleNamespace(
        settings=SimpleNamespace(run=SimpleNamespace(best_metric="", keep_checkpoints=2),
                                 data=SimpleNamespace(task="video_caption")),
        folder=tmp_path, checkpoint_name="step_0000003", process=DistInfo(1, 2, CPU),
        save=lambda: saved.append(True), finish_saving=lambda: None,
    )
    train.Trainer.keep_best(trainer, {"val/caption_cider": 0.5, "caption_cider": 0.5}, saved=False)
    assert len(saved) == len(scored) == main_says


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_every_setting_is_explained(capsys):
    training = [cls for cls, _ in GROUPS.values()]
    for main, classes in ((train.main, training), (evaluation.main, evaluation.GROUPS)):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        for name in (name for cls in classes for name in cls.__dataclass_fields__):
            flag = name.replace("_", "-")
            assert f"--{flag}" in text or f"--[no-]{flag}" in text, name


@pytest.mark.parametrize(("arguments", "message"), [
    ("--max-step 3", "unknown argument --max-step (did you mean '--max-steps'?)"),
    ("--task captions", "unknown task 'captions'"),
    ("--preset huge", "preset='huge': expected one of tiny, small, base, large"),
    ("--max-steps 0", "max_steps=0: expected a number of at least 1"),
    ("--batch-size many", "--batch-size: invalid int value: 'many'"),
    ("--lr -1", "lr=-1.0: expected a number of at least 0"),
    ("--max-skipped 2", "max_skipped=2.0: expected a number from 0 to 1"),
    ("--video-weight 0 --image-weight 0 --text-weight 0", "have weight 0, so there is nothing to train on"),
    ("--name a/b", "name='a/b': expected a folder name without slashes"),
    ("--width 100 --heads 3", "heads=3 does not divide width=100"),
    ("--patch-size 7", "patch_size=7 does not divide image_size=32"),
    ("--init nowhere", "nowhere is not a checkpoint: there is no such folder"),
    ("--init tiny_data/pretrained/model.safetensors", "model.safetensors is not a checkpoint: there is no such folder"),
    ("--precision float16", "--precision: invalid choice: 'float16'"),
    ("--cpu-offload", "cpu_offload with parallel=ddp: only FSDP2 can offload; add --parallel fsdp"),
    ("--timeout 0", "timeout=0.0: expected more than 0 seconds"),
    ("--resume-from step_0000001", "resume_from='step_0000001' without resume: add --resume"),
    ("--gpus 8", "unknown argument --gpus"),
    ("--epochs 2 --max-steps 9", "epochs=2.0 and max_steps=9: give one of the two"),
    ("--epochs 0", "epochs=0.0: expected a number above 0"),
    ("--min-lr 0 --min-lr-ratio 0.1", "min_lr=0.0 and min_lr_ratio=0.1: give one of the two"),
    ("--warmup-steps 2 --warmup-ratio 0", "warmup_steps=2 and warmup_ratio=0.0: give one of the two"),
    ("--resume", "tiny has no checkpoint to resume from; start it without --resume"),
])
def test_impossible_settings_are_refused_and_the_message_names_the_reason(capsys, tmp_path, arguments, message):
    assert message in refused(capsys, train.main, [*arguments.split(), "--out", tmp_path], 2)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_into_the_same_folder_is_refused(capsys, run):
    before = (run / "metrics.jsonl").read_text()
    message = refused(capsys, train.main, ["--out", run.parent], 2)
    assert f"{run} already contains a run; continue it with --resume, or choose another --name or --out" in message
    assert (run / "metrics.jsonl").read_text() == before


def test_a_folder_without_a_checkpoint_is_not_a_run(light, tmp_path, capsys):
    """The same command starts it again: there is nothing to lose."""
    arguments = [*FAST, *f"--task video_caption --data {light} --out {tmp_path} --max-steps 2".split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", lambda *_: (_ for _ in ()).throw(ValueError("killed here")))
        assert "killed here" in refused(capsys, train.main, arguments, 1)
    assert (tmp_path / "video_caption" / "settings.json").exists()
    train.main(arguments)
    assert [line["step"] for line in lines(tmp_path / "video_caption") if "loss" in line] == [1, 2]
    assert "already contains a run" in refused(capsys, train.main, arguments, 2)


def test_named_modules_start_from_scratch(run, light, tmp_path, capsys):
    arguments = [*FAST, *f"--init {run / 'last'} --task video_caption --lr 0 --max-steps 1 --data {light}".split(),
                 "--out", str(tmp_path)]
    train.main([*arguments, "--reinit", "decoder.layers.*, vision_encoder.blocks.0.lt1"])
    printed = capsys.readouterr().out
    assert f"not from {run / 'last'}, so trained from scratch: vision_encoder.blocks.0.lt1.norm.weight" in printed
    before = load_file(run / "last" / "model.safetensors")
    after = load_file(tmp_path / "video_caption" / "last" / "model.safetensors")
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert {".".join(name.split(".")[:2]) for name in changed} == {"decoder.layers", "vision_encoder.blocks"}
    message = refused(capsys, train.main, [*arguments, "--name", "b", "--reinit", "decodr"], 1)
    assert "reinit='decodr' matches no parameter" in message
    message = refused(capsys, train.main, [*arguments, "--name", "b", "--reinit", "decoder,"], 1)
    assert "reinit='decoder,': name 2 of the list is empty" in message
    assert "add --init CHECKPOINT" in refused(capsys, train.main, ["--out", tmp_path / "c", "--reinit", "decoder"], 2)


@pytest.mark.slow
def test_a_run_without_symbolic_links_is_resumed_fine_tuned_and_evaluated(light, tmp_path, monkeypatch):
    """As on exFAT: `last` and `best` are text files."""

    def no_links(self, *_, **__):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    arguments = [*FAST, *f"--task video_caption --data {light} --out {tmp_path} --eval-every 1 --eval-limit 4".split()]
    train.main([*arguments, "--max-steps", "2"])
    run = tmp_path / "video_caption"
    assert (run / "last").read_text() == "step_0000002\n" and (run / "best").is_file()
    train.main([*arguments, "--max-steps", "3", "--resume"])
    assert (run / "last").read_text() == "step_0000003\n"
    train.main([*arguments, "--max-steps", "1", "--init", str(run / "last"), "--name", "more"])
    found = evaluation.main(f"--checkpoint {run / 'best'} --splits val --limit 2 --out {tmp_path / 'found'}".split())
    assert found and evaluation.load(run / "last").preprocess.frames == 4


def test_a_resumed_run_keeps_its_settings(capsys, run):
    message = refused(capsys, train.main, ["--out", run.parent, "--resume", "--lr", "0.5", "--width", "48"], 2)
    assert "lr, width: a resumed run keeps its settings" in message
    assert "leave these flags out, or start another" in message


@pytest.mark.slow
def test_the_data_of_a_resumed_run_may_lie_elsewhere_but_must_be_the_same(capsys, light, tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved, with=a comma"
    shutil.copytree(light, first, symlinks=True)
    out = ["--out", str(tmp_path), "--name", "run"]
    train.main([*FAST, "--task", "video_caption", "--data", str(first), *out, "--max-steps", "1"])
    first.rename(moved)
    train.main(["--resume", *out, "--max-steps", "2", "--data", str(moved)])
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["train"]["data"] == str(moved)
    train.main(["--resume", *out, "--max-steps", "3"])  # from where it lies now
    with (moved / "video_caption.train.jsonl").open("a") as file:
        file.write((moved / "video_caption.train.jsonl").read_text().splitlines()[0] + "\n")
    message = refused(capsys, train.main, ["--resume", *out, "--max-steps", "4"], 1)
    assert "the run was started with other records: video_caption.train.jsonl (" in message
    assert (tmp_path / "run" / "last").resolve().name == "step_0000003"


def test_init_and_preset_exclude_each_other_and_sizes_come_from_the_checkpoint(capsys, run, light, tmp_path):
    arguments = ["--init", run / "last", "--out", tmp_path, "--data", light]
    message = refused(capsys, train.main, [*arguments, "--preset", "tiny"], 2)
    assert "the model's sizes come from the checkpoint; leave --preset out" in message
    message = refused(capsys, train.main, [*arguments, "--width", "64"], 1)
    assert "does not fit this model for pretrain" in message and "expected (64,), found (32,)" in message
    assert list(tmp_path.iterdir()) == []


def test_data_that_does_not_fit_is_refused_and_the_message_names_file_and_line(capsys, light, tmp_path):
    arguments = ["--out", tmp_path / "runs", *MODEL, *FAST]
    message = refused(capsys, train.main, [*arguments, "--data", tmp_path / "nowhere"], 1)
    assert "nowhere is not a folder: expected one with files named <task>.<split>.jsonl" in message
    message = refused(capsys, train.main, [*arguments, "--data", light, "--task", "video_retrieval"], 1)
    assert "video_retrieval, split train: expected one or more of video_retrieval.train.jsonl" in message
    message = refused(capsys, train.main, [*arguments, "--data", light, "--max-positions", "8"], 1)
    assert "video_caption.train.jsonl:" in message and "the model takes 8; shorten it" in message
    data = tmp_path / "data"
    data.mkdir()
    (data / "video_caption.train.jsonl").write_text('{"video": "a.gif", "captions": ["..."]}\n')
    message = refused(capsys, train.main, [*arguments, "--data", data], 1)
    assert "video_caption.train.jsonl:1: the text '...' has no words; remove it" in message
    (data / "video_caption.train.jsonl").write_text('{"video": "a.gif", "captions": []}\n')
    message = refused(capsys, train.main, [*arguments, "--data", data], 1)
    assert "video_caption.train.jsonl:1: captions: found []; expected a list of one or more strings" in message
    assert not (tmp_path / "runs").exists()


def test_corrupt_videos_are_skipped_and_counted_and_too_many_stop_the_run(capsys, light, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    videos = [json.loads(line) for line in (light / "video_caption.train.jsonl").read_text().splitlines()[:16]]
    for i, video in enumerate(videos):
        shutil.copy(light / video["video"], data / f"{i}.gif")
        video["video"] = f"{i}.gif"
    (data / "video_caption.train.jsonl").write_text("".join(json.dumps(video) + "\n" for video in videos))
    (data / "video_caption.val.jsonl").write_text(json.dumps(videos[0]) + "\n")
    for i in (3, 9):
        (data / f"{i}.gif").write_bytes(b"GIF89a")
    arguments = [*MODEL, *FAST, *f"--data {data} --task video_caption --max-steps 4".split()]
    message = refused(capsys, train.main, [*arguments, "--out", tmp_path / "strict"], 1)
    assert "of 16 media files cannot be decoded, more than max_skipped=0.02 allows" in message
    assert "or raise --max-skipped" in message
    train.main([*arguments, "--out", str(tmp_path / "lenient"), "--max-skipped", "0.2"])
    printed = capsys.readouterr().err
    assert lines(tmp_path / "lenient" / "video_caption")[3]["skipped_files"] == 2
    for i in (3, 9):  # two epochs, but each is reported once
        assert printed.count(f"video_caption.train.jsonl:{i + 1}: {data / f'{i}.gif'} cannot be decoded") == 1


# ---- eval.py ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_reports_every_metric_of_both_splits_and_writes_a_report(run, tmp_path, capsys):
    found = evaluation.main(["--checkpoint", str(run / "last"), "--json", str(tmp_path / "results" / "all.json"),
                             "--limit", "28"])
    expected = {f"{split}/{key}" for split in ("test", "combos") for key in KEYS}
    of_images = {f"image_{key}" for key in KEYS if key != "qa_order"}
    of_images = {key.replace("image_t2v", "t2i").replace("image_v2t", "i2t") for key in of_images}
    expected |= {f"{split}/{key}" for split in ("test", "combos") for key in of_images}
    expected |= {f"{split}/{kind}_classification_zero_shot" for split in ("test", "combos")
                 for kind in ("image", "video")}
    assert set(found) == expected
    assert json.loads((tmp_path / "results" / "all.json").read_text()).items() >= found.items()
    for key, value in found.items():
        assert value >= 0 and (value <= 1 or key.endswith(("cider", "median_rank"))), key
    page = (run / "last" / "eval" / "report.html").read_text()
    for part in ("Results", "Samples", "Hardest mistakes", "Retrieval, images", "combos", "chance"):
        assert part in page, part
    assert "Curves" not in page and page.count("data:image/webp") >= 16
    printed = capsys.readouterr().out
    for part in ("(the tiny world)", "i2t_r1_rerank", "±", "chance", "on one page:"):
        assert part in printed, part


def test_evaluation_of_one_split_is_written_into_the_checkpoint(run, light):
    found = evaluation.main(f"--checkpoint {run / 'last'} --data {light} --splits val,test --limit 4".split())
    written = json.loads((run / "last" / "eval" / "metrics.json").read_text())
    assert written.items() >= found.items() and written["records"] == {"val": {"scored": 16, "total": 16}}
    assert set(written["standard_errors"]) == set(found)
    assert {key.split("/")[0] for key in found} == {"val"} and "val/caption_exact" in found


def test_an_evaluation_has_the_options_of_its_command_and_ranks_the_answers_of_the_training_split(
    records, tmp_path, monkeypatch, spy
):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(records, data)
    for split in ("val", "test"):
        shutil.copy(data / "video_caption.train.jsonl", data / f"video_caption.{split}.jsonl")
        text = (data / "video_qa.train.jsonl").read_text()
        (data / f"video_qa.{split}.jsonl").write_text(text.replace('"three"', '"seven"').replace("scarlet", "blue"))
    for module, name in ((train, "write_report"), (evaluation, "write_evaluation_report"), (train, "draw_curves")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: {})
    train.main([*PLAIN, *f"--data {data} --out {tmp_path} --name run --task video_caption,video_qa".split()])
    evaluated, chances, checked = (spy(evaluation, name) for name in ("evaluate", "chance_level", "check_data"))
    arguments = f"--checkpoint {tmp_path / 'run/last'} --data {data} --out {out} --splits val,test --limit 2".split()
    found = evaluation.main([*arguments, *"--protocol released --all-captions --answers train".split(),
                             "--task", " video_qa", "--json", str(tmp_path / "flat.json")])
    splits = [EvalSplit(data, "val", 2), EvalSplit(data, "test", 2)]
    assert [split for _, split, _, _ in evaluated] == checked[0][1] == splits and chances[0][0].split == "val"
    assert evaluated[0][2:] == (["video_qa"], EvalOptions(
        Generation(5, 4, 20, prompted=False), Generation(5, 1, 10), ("red", "scarlet", "three"), False, True))
    assert {key.split("/")[0] for key in found} == {"val", "test"}
    assert json.loads((tmp_path / "flat.json").read_text())["records"]["test"] == {"scored": 2, "total": 2}


def test_results_of_a_read_only_checkpoint_are_written_elsewhere(run, light, tmp_path):
    out = tmp_path / "results" / "of_mine"
    evaluation.main(f"--checkpoint {run / 'last'} --data {light} --splits val --limit 2 --out {out}".split())
    assert {"metrics.json", "predictions.jsonl", "report.html"} <= {path.name for path in out.iterdir()}


def test_an_evaluation_names_every_text_that_cannot_be_read_before_it_starts(run, light, tmp_path, capsys):
    shutil.copy(light / json.loads((light / "video_caption.val.jsonl").read_text().splitlines()[0])["video"],
                tmp_path / "a.gif")
    long = "extraordinarily unpredictable neuroscientists " * 5
    for task, texts in {
        "video_caption": {"captions": ["a red seven", "!!!"]}, "video_retrieval": {"captions": [long]},
        "video_qa": {"qa": [{"question": "???", "answers": ["seven"], "kind": "digit"}]},
    }.items():
        (tmp_path / f"{task}.test.jsonl").write_text(json.dumps({"video": "a.gif", **texts}) + "\n")
    with pytest.raises(SystemExit):
        evaluation.main(f"--checkpoint {run / 'last'} --data {tmp_path} --splits test --out {tmp_path / 'out'}".split())
    said = capsys.readouterr().err
    assert "video_caption.test.jsonl:1: the text '!!!' has no words" in said
    assert "video_qa.test.jsonl:1: the text '???' has no words" in said
    assert "video_retrieval.test.jsonl:1" in said and "the model takes 32" in said
    assert not (tmp_path / "out").exists()


def test_captions_that_several_records_share_are_reported_by_an_evaluation(run, cache, tmp_path, capsys):
    world = cache / f"tiny-v{VERSION}-seed0"
    lines = [json.loads(line) for line in (world / "video_retrieval.val.jsonl").read_text().splitlines()[:3]]
    for number, line in enumerate(lines):
        shutil.copy(world / line["video"], tmp_path / f"{number}.gif")
        line |= {"video": f"{number}.gif", "positive_id": str(number), "captions": ["a red seven"]}
    lines[2]["captions"] = ["a blue one"]
    (tmp_path / "video_retrieval.test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation.main(f"--checkpoint {run / 'last'} --data {tmp_path} --splits test --out {tmp_path / 'out'}".split())
    said = capsys.readouterr().err
    assert "video_retrieval, test: 1 captions belong to several records, such as 'a red seven'" in said


def test_words_that_the_vocabulary_lacks_are_reported(run, light, tmp_path, capsys):
    """In the data of an evaluation, in questions, and in texts to find."""
    record = json.loads((light / "video_caption.val.jsonl").read_text().splitlines()[0])
    shutil.copy(light / record["video"], tmp_path / "a.gif")
    record |= {"video": "a.gif", "captions": ["狗 a red seven"]}
    (tmp_path / "video_caption.test.jsonl").write_text(json.dumps(record) + "\n")
    evaluation.main(f"--checkpoint {run / 'last'} --data {tmp_path} --splits test --out {tmp_path / 'out'} "
                    "--max-unknown 0.25".split())
    said = capsys.readouterr().err
    assert "video_caption, test: 25.0% of the words are unknown to the vocabulary, such as '狗'" in said
    asked = ["--checkpoint", str(run / "last"), "--input", str(tmp_path / "a.gif")]
    evaluation.main([*asked, "--question", "is it a 狗"])
    assert "'is it a 狗': 25.0% of the words are unknown" in capsys.readouterr().err
    evaluation.main([*asked, "--find", "a red seven"])
    assert "unknown" not in capsys.readouterr().err


@pytest.fixture(scope="session")
def own_files(tmp_path_factory) -> Path:
    """A GIF, an image, and a video of a user, larger than those of the tiny world, and a note."""
    folder = tmp_path_factory.mktemp("own")
    frames = np.zeros((10, 48, 64, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[20:30, 5 * t: 5 * t + 10] = (255, 0, 0)
    iio.imwrite(folder / "clip.mp4", frames, plugin="pyav", codec="libx264", fps=10)
    iio.imwrite(folder / "clip.gif", frames, loop=0)
    (folder / "more").mkdir()
    iio.imwrite(folder / "more" / "picture.png", frames[3])
    (folder / "note.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("name", ["clip.gif", "more/picture.png", "clip.mp4"])
def test_your_own_files_are_captioned_and_asked_about(run, own_files, capsys, name):
    arguments = ["--checkpoint", str(run / "last"), "--input", str(own_files / name)]
    model = evaluation.load(run / "last")
    assert evaluation.main(arguments) == {}
    assert capsys.readouterr().out == model.caption([own_files / name])[0] + "\n"
    evaluation.main([*arguments, "--beams", "2"])
    assert capsys.readouterr().out == model.caption([own_files / name], beams=2)[0] + "\n"
    evaluation.main([*arguments, "--question", "Which digit is it?"])
    assert capsys.readouterr().out == model.answer([own_files / name], ["which digit is it"])[0] + "\n"


def test_a_single_file_that_cannot_be_read_is_refused(capsys, run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    message = refused(capsys, evaluation.main, ["--checkpoint", run / "last", "--input", tmp_path / "a.png"], 1)
    assert "a.png cannot be decoded" in message


def test_a_folder_is_searched_for_the_best_matches(run, own_files, capsys):
    evaluation.main(["--checkpoint", str(run / "last"), "--input", str(own_files), "--find", "a red seven"])
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    files = [own_files / name for name in ("clip.gif", "clip.mp4", "more/picture.png")]
    scores = evaluation.load(run / "last").similarity(files, ["a red seven"])[:, 0].tolist()
    assert [Path(path) for _, path in found] == [file for _, file in sorted(zip(scores, files), reverse=True)]
    assert [float(score) for score, _ in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-3)


def test_all_files_of_a_folder_are_captioned_or_asked_about_and_a_second_call_continues(
    run, own_files, tmp_path, capsys
):
    folder, out = tmp_path / "files", tmp_path / "found.jsonl"
    shutil.copytree(own_files, folder)
    (folder / "broken.png").write_bytes(b"no image")
    arguments = ["--checkpoint", str(run / "last"), "--input", str(folder), "--output", str(out)]
    evaluation.main(arguments)
    printed = capsys.readouterr().out
    assert "skipped:" in printed and "broken.png cannot be decoded" in printed and "jsonl: 3 of 4 files" in printed
    model = evaluation.load(run / "last")
    found = {line["file"]: line["caption"] for line in map(json.loads, out.read_text().splitlines())}
    files = [folder / name for name in ("clip.gif", "clip.mp4", "more/picture.png")]
    assert found == {str(file): caption for file, caption in zip(files, model.caption(files))}
    first = out.read_text()
    shutil.copy(folder / "clip.gif", folder / "new.gif")
    out.write_text(first[:-30])  # the last line was cut off
    evaluation.main(arguments)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == list(map(str, [*files, folder / "new.gif"]))
    evaluation.main([*arguments, "--question", "which digit is it"])  # other questions have answers of their own
    evaluation.main(["--checkpoint", str(run / "last"), "--input", str(folder / "*.gif"), "--output", str(out)])
    assert "2 of 2 files" in capsys.readouterr().out.splitlines()[-1]
    answers = [json.loads(line) for line in out.read_text().splitlines()][4:]
    assert len(answers) == 4 and all(set(line) == {"file", "question", "answer", "checkpoint"} for line in answers)


def test_too_many_unreadable_files_fail_an_evaluation_after_its_results(run, light, tmp_path, capsys):
    shutil.copytree(light, tmp_path / "data", symlinks=True)
    records = [json.loads(line) for line in (light / "video_caption.val.jsonl").read_text().splitlines()]
    records[1]["video"] = "media/none.gif"
    (tmp_path / "data/video_caption.val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    arguments = ["--checkpoint", str(run / "last"), "--data", str(tmp_path / "data"), "--splits", "val", "--task",
                 "video_caption"]
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "1 of 16 records were skipped, more than max_skipped=0.02" in said.err
    assert "caption_exact" in said.out and "video_caption.val.jsonl:2" in said.out and "does not exist" in said.out
    assert "val: scored 15 of 16 records" in said.out
    assert evaluation.main([*arguments, "--max-skipped", "0.0625"])["val/caption_exact"] >= 0  # exactly 1 of 16


@pytest.mark.slow
def test_two_processes_of_torchrun_evaluate_like_one_and_write_each_file_once(run, light, tmp_path):
    arguments = f"--checkpoint {run / 'last'} --data {light} --splits val --limit 12 --device cpu".split()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
         "--nproc-per-node", "2", str(HERE / "eval.py"), *arguments, "--json", str(tmp_path / "two.json")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("caption_exact") == 2 and done.stdout.count("data: ") == 1  # of videos and of images
    two = (run / "last" / "eval" / "predictions.jsonl").read_text()
    found = evaluation.main([*arguments, "--json", str(tmp_path / "one.json")])
    assert (run / "last" / "eval" / "predictions.jsonl").read_text() == two
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    assert len(found) > 10


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)],
                         ids=["SIGINT", "SIGTERM", "SIGINT to torchrun and both ranks"])
def test_an_evaluation_can_be_stopped(run, cache, tmp_path, number, ranks):
    """One line says so, and nothing is written. The exit code of torchrun is 1, whatever its ranks return."""
    torchrun = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()
    process = subprocess.Popen(
        [sys.executable, *(torchrun if ranks > 1 else ()), str(HERE / "eval.py"), "--checkpoint", str(run / "last"),
         "--batch-size", "1", "--device", "cpu", "--out", str(tmp_path / "out")], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, bufsize=1,
    )
    try:
        assert process.stdout.readline().startswith("data: ")
        os.killpg(process.pid, number)  # as Ctrl-C does
        _, said = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (130 if ranks == 1 else 1)
    assert said.count(f"eval.py: stopped by {number.name}; the evaluation is not written") == 1, said
    assert said.count("stopping after this batch") == 1 and ("Traceback" not in said or ranks > 1)
    assert not (tmp_path / "out/metrics.json").exists()


@pytest.mark.slow
def test_eval_runs_from_the_command_line(run, own_files):
    arguments = ["--checkpoint", str(run / "last"), "--input", str(own_files / "clip.mp4")]
    done = subprocess.run(
        [sys.executable, str(HERE / "eval.py"), *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == evaluation.load(run / "last").caption([own_files / "clip.mp4"])[0] + "\n"


@pytest.mark.parametrize(("arguments", "code", "message"), [
    ("", 2, "no checkpoint: name its folder with --checkpoint"),
    ("--checkpoint {run} --question why", 2, "question='why': name the file or folder with --input"),
    ("--checkpoint {run} --input {own}/clip.gif --question a --find b", 2, "find searches a folder; question, "),
    ("--checkpoint {run} --input {own}/missing.gif", 2, "missing.gif': found no image, GIF, or video there"),
    ("--checkpoint {run} --input {own} --attention a.png", 2, "attention='a.png': expected one file as --input"),
    ("--checkpoint {run} --beams 0", 2, "beams=0: expected a number of at least 1"),
    ("--checkpoint {run} --max-skipped 2", 2, "max_skipped=2.0: expected a number from 0 to 1"),
    ("--checkpoint {run} --answers {own}/none.txt", 2, "none.txt': no such file"),
    ("--checkpoint {run} --device tpu", 2, "device 'tpu'"),
    ("--checkpoint {run} --dta x", 2, "unknown argument --dta (did you mean '--data'?)"),
    ("--checkpoint {own}", 2, "is not a checkpoint: it does not contain config.json"),
    ("--checkpoint {own}/note.txt", 2, "note.txt is not a checkpoint: there is no such folder"),
    ("--checkpoint {run}/model.safetensors", 2, "model.safetensors is not a checkpoint: there is no such folder"),
    ("--checkpoint {run} --input {own}/note.txt", 1, "note.txt: suffix '.txt' is not that of an image or a video"),
    ("--checkpoint {run} --input {empty} --find red", 2, "found no image, GIF, or video there"),
    ("--checkpoint {run} --splits dev", 1, "has none of the splits dev; it has combos, test, train, val"),
    ("--checkpoint {run} --data {own}", 1, "has no data: expected files named <task>.<split>.jsonl"),
    ("--checkpoint {run} --input {own}/clip.gif --question ?", 1, "text 0 of 1 is empty"),
])
def test_eval_refuses_and_names_the_reason(capsys, run, own_files, tmp_path, arguments, code, message):
    filled = [word.format(run=run / "last", own=own_files, empty=tmp_path) for word in arguments.split()]
    assert message in refused(capsys, evaluation.main, filled, code)


def test_a_model_without_the_modules_for_a_question_says_so(capsys, light, own_files, tmp_path):
    train.main([*MODEL, *FAST, *f"--data {light} --out {tmp_path} --task image_caption --max-steps 1".split()])
    arguments = ["--checkpoint", tmp_path / "image_caption" / "last", "--input", own_files / "clip.gif"]
    message = refused(capsys, evaluation.main, [*arguments, "--question", "why"], 1)
    assert "a model for the task 'image_caption' has no text_encoder" in message
