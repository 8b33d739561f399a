"""The plan: what a step costs, counted on fake tensors, against a real step; and what sharding leaves to a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mplug2.config import ModelConfig, large, tiny
from mplug2.data.build import build_data
from mplug2.distributed import DistInfo
from mplug2.model.attention import CrossAttention, SelfAttention
from mplug2.model.layers import Block
from mplug2.model.mplug2 import MPLUG2
from mplug2.tools import memory_plan
from mplug2.tools.communication import Collective, muon_flops
from mplug2.tools.memory_plan import PlanSettings, device_memory, main, parameter_counts, training_load
from mplug2.tools.pass_cost import CONVOLUTION_FLOPS, Cost, Workload, _Counter, cost
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
from mplug2.model.kernels import depthwise_conv
from mplug2.tools.pass_cost import Workload
from mplug2.training.parallel import checkpoint_activations
torch.set_num_threads(1)
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
work, checkpointing = Workload(ModelConfig(**eval(sys.argv[1])), b=24, questions=1), eval(sys.argv[2])
tokens, taps, bias = torch.ones(1, 2, 2, 8), torch.ones(8, 1, 3), torch.ones(8)
depthwise_conv(tokens.requires_grad_(), taps.requires_grad_(), bias.requires_grad_()).sum().backward()
(torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)).sum().backward()  # what the first step loads
before = memory("VmRSS")
objectives, batch = work.objectives(), work.batch("video")
if checkpointing:
    checkpoint_activations(objectives.model)
optimizer = torch.optim.AdamW(objectives.parameters(), fused=True)
for _ in range(2):
    optimizer.zero_grad(set_to_none=True)
    sum(objectives(batch).values()).backward()
    optimizer.step()
print(memory("VmHWM") - before)
"""


@pytest.fixture(autouse=True)
def no_collectives(monkeypatch, request):
    """Quick tests do without the steps on fake ranks; test_communication.py has them."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(memory_plan, "step_collectives", lambda *_: [Collective("Muon", "all_gather", 10**9, 4, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_step_is_that_of_a_real_one_within_a_fifth(checkpointing):
    """The peak of a real process of its own, two steps of training on the CPU."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, repr(SIZES), str(checkpointing)], capture_output=True, text=True, timeout=500,
        cwd=Path(__file__).parents[2],  # blocks of any size go back to the system as soon as they are free
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout)
    work = Workload(ModelConfig(**SIZES), b=24, questions=1)
    planned = device_memory(work, cost(work, "video", checkpointing), 1, sharded=False)["in all"]
    assert measured > 150e6
    assert planned == pytest.approx(measured, rel=0.2), planned / measured


@pytest.mark.slow
def test_operations_are_those_of_a_real_step_and_checkpointing_gives_memory_for_more_of_them():
    """All matrix products; torch's counter does not know the CPU's attention, so it is told to use another."""
    work = Workload(tiny(), b=2)
    counted = cost(work, "image")
    real = FlopCounterMode(display=False, custom_mapping=CONVOLUTION_FLOPS)
    with real, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
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
                  "DDP, activation checkpointing", "FSDP2, activation checkpointing", "days at 40% of 494.5 TFLOP/s",
                  "FSDP2, a step of video", "parameters, backward", "nothing of this table has been measured"):
        assert words in said
    main([*SHALLOW, *"--gpus 4 --batch-size 8 --images 0 --videos 800 --epochs 3 --precision bfloat16".split()])
    said = capsys.readouterr().out
    assert "800 videos, 3 times: 300 steps" in said and "of 989 TFLOP/s" in said
    with pytest.raises(ValueError, match="expected one of them above 0"):
        PlanSettings(images=0, videos=0)


def test_every_task_has_a_plan_of_what_it_sees(capsys, monkeypatch):
    planned, objectives = [], Workload.objectives
    monkeypatch.setattr(Workload, "objectives", lambda self: planned.append(objectives(self)) or planned[-1])
    main([*SHALLOW, *"--task grounding --gpus 4 --batch-size 8 --images 100 --epochs 2 --dropout 0.1".split()])
    said = capsys.readouterr().out
    rates = {m.dropout for m in planned[0].modules() if isinstance(m, (SelfAttention, CrossAttention))}
    assert rates == {0.0} and planned[0].model.config.dropout == 0.1  # kernels of a GPU do not store that mask
    assert "100 images, 2 times: 25 steps" in said and "video" not in said
    with pytest.raises(SystemExit):
        main("--task text_classification --batch-size 8".split())
    assert "without --data the plan is for images and videos; text_classification" in capsys.readouterr().err


def test_a_recipe_and_data_give_the_steps_that_training_would_take(tmp_path, capsys, monkeypatch):
    """Three questions for each of two videos: at one question a sample and 10 epochs, 60 samples."""
    monkeypatch.setattr(memory_plan, "cost", lambda *_, **__: Cost(1e9, 2**28, 2**29))
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
    (tmp_path / "image_qa.train.jsonl").write_text(
        '{"image": "a.png", "qa": [{"question": "a", "answers": ["b"]}]}\n')
    both = Settings.from_flat({"data": str(tmp_path), "task": "image_caption,image_qa", "task_weights": "6,2"})
    assert training_load(PlanSettings(), both).shares == pytest.approx({"image_caption": 0.75, "image_qa": 0.25})


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_from_the_birth_of_a_tensor_to_its_death_and_gradients_apart():
    with FakeTensorMode(allow_non_fake_inputs=True), _Counter() as counter:
        first = torch.zeros(100)
        second = first + 1
        second.view(10, 10)  # no memory of its own
        del first
        third = torch.zeros(50, dtype=torch.int8)
        assert (counter.alive, counter.peak) == (450, 800)
        parameter = torch.nn.Parameter(torch.zeros(30))
        parameter.grad = torch.ones(30)
        counter.is_gradient(parameter)
        assert (counter.alive, counter.gradients) == (690, 120)
        fourth = torch.zeros(100)
        assert (counter.peak, counter.activation_peak) == (1090, 970)
        parameter.grad = None
        assert (counter.alive, counter.gradients) == (970, 0)
        del second, third, fourth


@pytest.mark.parametrize("kind, frames", [("video", 3), ("image", 1)])
def test_the_batch_of_a_plan_has_the_shapes_of_a_real_one(kind, frames):
    batch = Workload(small(max_positions=11), b=4, frames=3, questions=2, words=7).batch(kind)
    shapes = {name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)}
    assert shapes == {
        "pixels": (4, 3, frames, 8, 8), "positive_id": (4,), "masked_ids": (4, 9),
        "masked_positions": (6,),  # 15 % of 4 x 9, rounded up
        **{f"{name}_{part}": (rows, 9) for name, rows in (("caption", 4), ("prompted", 4), ("question", 8),
                                                          ("answer", 8)) for part in ("ids", "mask")},
        "prompted_positions": (32,), "answer_positions": (64,),  # every token after [CLS]
    }
    assert Workload(small(max_positions=11), b=1, words=30).batch(kind)["caption_ids"].shape == (1, 11)


def test_each_device_keeps_four_bytes_of_each_number_or_its_share():
    """AdamW has two numbers for each parameter, Muon one for those in matrices. Passes in bfloat16 halve what is
    gathered for them: all that is in no block with its gradients, and two blocks with the gradients of one."""
    costs, (whole, outside, block, matrices) = Cost(1.0, 7000, 9000), parameter_counts(small())
    model = MPLUG2(small())
    blocks = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block)]
    assert whole == sum(p.numel() for p in model.parameters())
    assert (outside, block) == (whole - sum(blocks), max(blocks))

    def memory(gpus: int, sharded: bool, **changes) -> dict[str, int]:
        return device_memory(Workload(small(), b=1, **changes), costs, gpus, sharded)

    shared = {"parameters": 4 * whole, "optimizer": 8 * whole, "gradients": 4 * whole, "activations": 7000}
    assert memory(4, False) == {**shared, "in all": 16 * whole + 7000}
    assert memory(1, False) == {**shared, "gradients": 2000, "in all": 12 * whole + 9000}
    assert memory(4, False)["optimizer"] - memory(4, False, optimizer="muon")["optimizer"] == 4 * matrices
    many = 10**9  # devices: what is left is there for the passes alone
    assert memory(many, True) == {"parameters": 4 * (outside + 2 * block), "optimizer": 0,
                                  "gradients": 4 * (outside + block), "activations": 7000,
                                  "in all": 8 * outside + 12 * block + 7000}
    assert memory(many, True, low_precision=True)["in all"] == 4 * outside + 6 * block + 7000
    assert memory(4, True)["in all"] - memory(many, True)["in all"] == 2 * (4 * whole // 4) + 8 * whole // 4


def test_the_numbers_of_a_plan(monkeypatch, capsys):
    """A video costs 2 TFLOP and an image 1; a device computes 989 TFLOP/s in bfloat16, 40 % of them used."""
    monkeypatch.setattr(memory_plan, "parameter_counts", lambda config: (2**30, 0, 0, 0))
    monkeypatch.setattr(memory_plan, "cost", lambda work, kind, checkpointing=False: Cost(
        1e12 * work.b * (1 + (kind == "video")), 2**(28 if checkpointing else 29), 2**30))
    main("--gpus 4 --batch-size 16 --accumulation-steps 2 --precision bfloat16".split())
    said = capsys.readouterr().out
    assert "1,073.7 M parameters; 4 devices, 2 samples each at a time, x 2 = 16 a step" in said
    table = {line[:34].strip(): line[34:].split() for line in said.splitlines()}
    assert table["DDP"] == ["4.00", "8.00", "4.00", "0.50", "16.50"]
    assert table["FSDP2, activation checkpointing"] == ["1.00", "2.00", "1.00", "0.25", "4.25"]
    assert "2.000 TFLOP per video, 1.000 TFLOP per image" in said
    days = 30 * (2_500_000 * 2 + 14_000_000) / (4 * 989 * 0.4) / (24 * 3600)
    steps = 30 * 16_500_000 // 16
    products = muon_flops(MPLUG2(tiny()), 4) / 989e12 / 0.4
    assert f"2,500,000 videos and 14,000,000 images, 30 times: {steps:,} steps, {days:.1f} days at 40% of 989" in said
    seconds = 1e-5 * 2 + 5e8 * 3 / 4 / 450e9 / 0.8  # of 500 MB among 4 ranks
    assert f"{'Muon':<34}{1:>11}{500:>11.1f}{1e3 * seconds:>11.1f}{1e3 * seconds:>13.1f}" in said
    days += steps * (seconds + products) / 86400
    assert "DDP, a step of video" in said and "HSDP" not in said and said.count(f"the whole run: {days:.1f} days") == 2
    main("--gpus 16 --batch-size 16".split())  # two nodes
    said = capsys.readouterr().out
    table = {line[:34].strip(): line[34:].split() for line in said.splitlines()}
    assert table["FSDP2"][:3] == ["0.25", "0.50", "0.25"] and table["HSDP"][:3] == ["0.50", "1.00", "0.50"]
    assert "HSDP, a step of video" in said
    main("--gpus 4 --batch-size 16 --device-tflops 100 --utilization 0.5 --images 0 --epochs 1".split())
    days = 2_500_000 * 2 / (4 * 100 * 0.5) / (24 * 3600)
    assert f"2,500,000 videos, 1 times: 156,250 steps, {days:.1f} days at 50% of 100" in capsys.readouterr().out
    main("--gpus 4 --batch-size 16 --images 0 --epochs 1".split())
    assert "days at 40% of 494.5 TFLOP/s" in capsys.readouterr().out  # of an H100 in float32


def test_the_backward_pass_takes_twice_as_long_as_the_forward_pass_and_muon_takes_its_own_time(monkeypatch, capsys):
    """Of 3 and 5 seconds, in 86,400 steps."""
    passes, given = [], []
    monkeypatch.setattr(memory_plan, "muon_flops", lambda *_: 5 * 989e12 * 0.5)
    monkeypatch.setattr(memory_plan, "cost", lambda *_, **__: Cost(3e12, 1, 1))
    monkeypatch.setattr(memory_plan, "rows", lambda found, *seconds: given.append(seconds) or [])
    monkeypatch.setattr(memory_plan, "format_step", lambda name, table, seconds, *_: passes.append(seconds) or [])
    main("--gpus 2 --batch-size 2 --images 0 --videos 172800 --epochs 1 --device-tflops 2 --utilization 0.5".split())
    assert capsys.readouterr().out.count("the whole run: 8.0 days") == 2
    assert given == [pytest.approx((1.0, 2.0, 1))] * 2 and passes == [3.0] * 2
