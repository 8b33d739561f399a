"""The plan: what a step costs, counted on fake tensors, against a real step; and what sharding leaves to a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mplug2.config import ModelConfig, large, tiny
from mplug2.data.build import build_data
from mplug2.distributed import DistInfo
from mplug2.model.mplug2 import MPLUG2
from mplug2.tools.memory_plan import (
    PlanSettings,
    Workload,
    cost,
    device_memory,
    main,
    parameter_counts,
    training_load,
)
from mplug2.training.settings import Settings, with_defaults

SIZES = dict(
    image_size=48, patch_size=8, vision_width=192, vision_layers=2, vision_head_width=32, width=192, heads=4,
    ff_width=768, text_layers=2, universal_layers=1, latents=8, fusion_layers=1, decoder_layers=1, vocab_size=2000,
    max_positions=32, contrastive_width=64, dropout=0.0,
)
SHALLOW = "--vision-layers 1 --text-layers 2 --universal-layers 1 --fusion-layers 1 --decoder-layers 1".split()
MEASURE = """
import sys, torch
from mplug2.config import ModelConfig
from mplug2.tools.memory_plan import Workload
torch.set_num_threads(1)
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
work = Workload(ModelConfig(**eval(sys.argv[1])), b=24, questions=1)
(torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)).sum().backward()  # what the first step loads
before = memory("VmRSS")
objectives, batch = work.objectives(), work.batch("video")
optimizer = torch.optim.AdamW(objectives.parameters(), fused=True)
for _ in range(2):
    optimizer.zero_grad(set_to_none=True)
    sum(objectives(batch).values()).backward()
    optimizer.step()
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_the_memory_of_a_step_is_that_of_a_real_one_within_a_fifth():
    """The peak of a real process of its own, two steps of training on the CPU."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, repr(SIZES)], capture_output=True, text=True, timeout=500,
        cwd=Path(__file__).parents[2],  # blocks of any size go back to the system as soon as they are free
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout)
    work = Workload(ModelConfig(**SIZES), b=24, questions=1)
    planned = device_memory(work, cost(work, "video"), 1, sharded=False)["in all"]
    assert measured > 150e6
    assert planned == pytest.approx(measured, rel=0.2), planned / measured


@pytest.mark.slow
def test_operations_are_those_of_a_real_step_and_checkpointing_gives_memory_for_more_of_them():
    """All matrix products; torch's counter does not know the CPU's attention, so it is told to use another."""
    work = Workload(tiny(), b=2)
    counted = cost(work, "image")
    with FlopCounterMode(display=False) as real, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        sum(work.objectives()(work.batch("image")).values()).backward()
    assert counted.flops == pytest.approx(real.get_total_flops(), rel=0.03)
    again = cost(work, "image", checkpointing=True)
    assert again.activations < 0.85 * counted.activations and 1.1 < again.flops / counted.flops < 1.5
    assert counted.activations <= counted.peak


@pytest.mark.slow
def test_sharding_divides_what_a_device_keeps():
    whole, outside, block, matrices = parameter_counts(large())
    with torch.device("meta"):
        model = MPLUG2(large())
    assert whole == sum(p.numel() for p in model.parameters()) > 1e9 and block < outside < whole / 5
    work, costs = Workload(large(), b=1), cost(Workload(tiny(), b=1), "text")
    one, many = (device_memory(work, costs, gpus, sharded=True) for gpus in (1, 64))
    assert many["optimizer"] == one["optimizer"] // 64 == 8 * whole // 64
    assert many["activations"] == one["activations"] and sum(many.values()) < sum(one.values()) / 4
    shared = device_memory(work, costs, 64, sharded=False)
    assert shared["optimizer"] == 2 * shared["gradients"] == 8 * whole  # the buckets of DDP
    assert device_memory(work, costs, 1, sharded=False)["gradients"] == costs.peak - costs.activations
    muon = Workload(large(), b=1, optimizer="muon")
    assert device_memory(muon, costs, 64, sharded=False)["optimizer"] == 8 * whole - 4 * matrices
    assert 0.8 * whole < matrices < whole


@pytest.mark.slow
def test_the_plan_is_printed(capsys):
    """Nothing else happens: no data, no folder."""
    main([*SHALLOW, *"--gpus 4 --batch-size 8 --images 0 --videos 800 --epochs 2".split()])
    said = capsys.readouterr().out
    for words in ("4 devices, 2 samples each at a time, x 1 = 8 a step", "800 videos, 2 times: 200 steps",
                  "DDP, activation checkpointing", "FSDP2, activation checkpointing", "days at 40% of 67 TFLOP/s"):
        assert words in said
    main([*SHALLOW, *"--gpus 4 --batch-size 8 --images 0 --videos 800 --epochs 3 --precision bfloat16".split()])
    said = capsys.readouterr().out
    assert "800 videos, 3 times: 300 steps" in said and "of 989 TFLOP/s" in said
    with pytest.raises(ValueError, match="expected one of them above 0"):
        PlanSettings(images=0, videos=0)


def test_every_task_has_a_plan_of_what_it_sees(capsys):
    main([*SHALLOW, *"--task grounding --gpus 4 --batch-size 8 --images 100 --epochs 2".split()])
    said = capsys.readouterr().out
    assert "100 images, 2 times: 25 steps" in said and "video" not in said
    with pytest.raises(SystemExit):
        main("--task text_classification --batch-size 8".split())
    assert "without --data the plan is for images and videos; text_classification" in capsys.readouterr().err


def test_a_recipe_and_data_give_the_steps_that_training_would_take(tmp_path, capsys):
    """Three questions for each of two videos: at one question a sample and 10 epochs, 60 samples."""
    questions = [{"question": f"what is {number}", "answers": ["a"], "kind": "k"} for number in range(3)]
    (tmp_path / "video_qa.train.jsonl").write_text("".join(
        json.dumps({"video": f"{number}.gif", "qa": questions}) + "\n" for number in range(2)))
    small = [*SHALLOW, *"--preset tiny --recipe msrvtt_qa --gpus 2 --batch-size 4 --frames 2".split()]
    main([*small, "--data", str(tmp_path)])
    said = capsys.readouterr().out
    assert "2 samples of video_qa, 10 times: 15 steps, 0.0 days at 40% of 989 TFLOP/s" in said
    settings = Settings.from_flat(with_defaults(
        {"recipe": "msrvtt_qa", "preset": "tiny", "batch_size": 4, "data": str(tmp_path)}))
    data = build_data(settings.data, tiny(), DistInfo(0, 1, torch.device("cpu")), 0)
    assert data.steps == 15
    with pytest.raises(SystemExit):
        main(small)
    assert "recipe='msrvtt_qa' trains on msrvtt_qa: add --data DIR" in capsys.readouterr().err


def test_batches_of_text_count_with_their_share_of_the_steps(tmp_path):
    (tmp_path / "text_only.train.jsonl").write_text('{"text": "a"}\n' * 3)
    (tmp_path / "image_caption.train.jsonl").write_text('{"image": "a.png", "captions": ["a", "b"]}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "text_only.train.jsonl").write_text('{"text": "b"}\n')
    settings = Settings.from_flat({"data": f"{tmp_path},{tmp_path / 'other'}=2", "max_steps": 7, "image_weight": 0.6,
                                   "text_weight": 0.2, "video_weight": 0.0})
    load = training_load(PlanSettings(), settings)
    assert load.shares == pytest.approx({"image": 0.75, "text": 0.25}) and list(load.shares) == ["image", "text"]
    assert load.steps == 7 and load.description == "1 samples of image and 4 samples of text"
