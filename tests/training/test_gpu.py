"""What only a GPU can show. Each test also runs on a CPU, as a slow one, so that its code is known to work."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from batches import make_batch
from data_helpers import write_data
from helpers import randomized, small
from runs import SMALL, lines
from safetensors.torch import load_file

import mplug2
from mplug2 import distributed
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.objectives import Objectives
from mplug2.training.parallel import ParallelSettings, checkpoint_activations, compile_model, wrap_model

ROOT = Path(__file__).parents[2]
DETERMINISTIC = """
import sys, torch, train
torch.use_deterministic_algorithms(True, warn_only=True)  # an operation without such an algorithm still has to agree
train.main(sys.argv[1:])
"""
plain_compile = torch.nn.Module.compile


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def step(device: str, kind: str = "video", compiled: bool = False, checkpointing: bool = False, **parallel
         ) -> tuple[dict, dict]:
    """The losses and gradients of a small model in single precision."""
    settings = ParallelSettings(device=device, **parallel)
    # On a CPU the graphs run as they are: Inductor would need a C++ compiler, and a minute.
    backend = {} if device == "cuda" else {"backend": "eager"}
    model = randomized(MPLUG2(small(), "pretrain")).float().train()
    if checkpointing:
        checkpoint_activations(model)
    if compiled:
        with patch.object(torch.nn.Module, "compile", lambda block, **how: plain_compile(block, **backend, **how)):
            compile_model(model)
    try:
        objectives = wrap_model(Objectives(model), distributed.DistInfo(0, 1, torch.device(device)), settings)
        batch = {name: value.to(device, torch.float32 if value.is_floating_point() else None)
                 if torch.is_tensor(value) else value for name, value in make_batch(kind, b=4).items()}
        torch.manual_seed(0)  # draws the hard negatives
        with torch.autocast(device, torch.bfloat16) if settings.low_precision else nullcontext():
            losses = objectives(batch)
        sum(losses.values()).backward()
        gradients = {name: distributed.full_tensor(parameter.grad).cpu()
                     for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {name: loss.detach().cpu() for name, loss in losses.items()}, gradients
    finally:
        distributed.shutdown()
        torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["video", "image", "text"])
def test_a_step_in_bfloat16_is_finite_and_near_one_in_float32(device, kind):
    (exact, _), (rounded, gradients) = step(device, kind), step(device, kind, precision="bfloat16")
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("changes", [{"compiled": True}, {"parallel": "fsdp"}, {"checkpointing": True}])
def test_compilation_sharding_and_checkpointing_change_no_loss_and_no_gradient(device, changes):
    torch.testing.assert_close(step(device, **changes), step(device), rtol=1e-3, atol=1e-3)


def test_the_shipped_model_writes_the_caption_that_it_writes_on_a_cpu(device):
    model = mplug2.load(ROOT / "tiny_data" / "pretrained", device)
    video = ROOT / "docs" / "examples" / "blue_seven_left.gif"
    assert model.caption([video]) == ["a blue seven that moves to the left"]


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(device, tmp_path):
    """Six steps, the last three of them again, with deterministic algorithms."""
    def train(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", DETERMINISTIC, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
            timeout=500, env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr

    whole, resumed = tmp_path / "whole" / "tiny", tmp_path / "resumed" / "tiny"
    train(*SMALL, "--device", device, "--data", write_data(tmp_path / "data"), "--out", whole.parent,
          *"--max-steps 6 --save-every 3 --dropout 0.2 --precision bfloat16".split())
    shutil.copytree(whole, resumed, symlinks=True)
    train("--resume", "--resume-from", "step_0000003", "--out", resumed.parent)
    expected, found = (load_file(run / "step_0000006" / "model.safetensors") for run in (whole, resumed))
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(resumed)]
    assert len(lines(resumed)) == 6
