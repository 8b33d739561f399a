"""Every measurement of one GPU, in one run.

    python -m mplug2.tools.bench --device cuda --all                       # presets base and large; writes bench.json
    python -m mplug2.tools.bench --all --preset tiny --batch-size 2 --frames 2 --repeats 1    # the same code on a CPU

Steps of pre-training are measured in bfloat16, eager, without a wrapper, with AdamW. Each variant changes one of these;
all combinations would take an hour. A measurement that fails, for example because memory is too small, says so in its
row, and the others continue. After MINUTES no further one starts: the slowest, those with compilation, are the last.
The numbers are saved after each row.
"""

import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import tiny_data
from mplug2 import distributed
from mplug2.config import PRESETS
from mplug2.generation import SpecialTokens, beam_search, greedy
from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.tools.bench_media import bench_media
from mplug2.tools.memory_plan import device_memory
from mplug2.tools.pass_cost import Cost, Workload, cost
from mplug2.training.logs import peak_memory_gib, peak_tflops
from mplug2.training.optim import OptimizerSettings, make_optimizer
from mplug2.training.parallel import ParallelSettings, checkpoint_activations, compile_model, wrap_model

MINUTES = 5.0
"""Time after which no measurement starts."""
REPOSITORY = Path(tiny_data.__file__).parents[1]
IMAGES = 4
"""Images of a batch for each video of a batch."""
CURVE_STEPS = 200
QUESTION, CAPTION, ANSWER = 12, 20, 5
"""Tokens of the questions that are read, and of the captions and answers that are written."""
VIDEO_SECONDS = (10, 30)
"""Lengths of the videos that are decoded."""
VARIANTS: dict[str, dict] = {
    "bfloat16": {}, "float32": {"precision": "float32"}, "checkpointing": {"activation_checkpointing": True},
    "DDP wrapper": {"wrapper": True}, "FSDP2": {"parallel": "fsdp"}, "Muon": {"optimizer": "muon"},
    "compiled": {"compile": True},
}
"""What differs from the first: settings of ParallelSettings, the optimizer, or the wrapper of DDP."""


class Device:
    """The device that is measured."""

    def __init__(self, name: str):
        self.process = distributed.DistInfo(0, 1, distributed.choose_device(name, local_rank=0))
        self.name = self.process.device.type
        self.cuda = self.name == "cuda"

    def clock(self) -> float:
        """Seconds, when all work so far is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """The median time of a run, after one to warm up."""
        run()
        times = []
        for _ in range(repeats):
            start = self.clock()
            run()
            times.append(self.clock() - start)
        return statistics.median(times)


@functools.cache
def planned(work: Workload, kind: str, checkpointing: bool) -> Cost:
    return cost(work, kind, checkpointing)


def matrix_products(device: Device, repeats: int) -> dict:
    size, found = 8192 if device.cuda else 512, {}
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.randn(size, size, device=device.name, dtype=dtype)
        seconds = device.seconds(functools.partial(torch.mm, square, square), repeats)
        found[f"{str(dtype).removeprefix('torch.')}_tflops"] = 2 * size**3 / seconds / 1e12
    return found


def host_to_device(device: Device, repeats: int) -> dict:
    source = torch.empty(2**28 if device.cuda else 2**24, dtype=torch.uint8, pin_memory=device.cuda)
    target = torch.empty_like(source, device=device.name)
    seconds = device.seconds(lambda: target.copy_(source, non_blocking=True), repeats)
    return {"gb_per_second": len(source) / seconds / 1e9}


def random_batch(work: Workload, kind: str, device: Device) -> dict:
    """Noise: products of zeros need less power, so a GPU would compute them faster."""
    batch = work.batch(kind)
    for name, value in batch.items():
        if torch.is_tensor(value):
            value = value.to(device.name)
            if name == "pixels":
                value = torch.randn_like(value)
            elif name.endswith("_ids"):
                value = torch.randint_like(value, 5, work.config.vocab_size)
            batch[name] = torch.arange(len(value), device=device.name) if name == "positive_id" else value
    return batch


def training_step(
    device: Device, preset: str, kind: str, b: int, frames: int, repeats: int, optimizer: str = "adamw",
    wrapper: bool = False, **changes,
) -> dict:
    """Times, rates and memory of a step of pre-training, next to the memory that the planner predicts."""
    parallel = ParallelSettings(**{"device": device.name, "precision": "bfloat16", **changes})
    work = Workload(PRESETS[preset](), b, frames, low_precision=parallel.low_precision, optimizer=optimizer)
    if device.cuda:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    try:
        with torch.device(device.name):
            objectives = work.objectives()
        if parallel.activation_checkpointing:
            checkpoint_activations(objectives.model)
        if parallel.compile:
            compile_model(objectives.model)
        wrapped = wrap_model(objectives, device.process, parallel)
        if wrapper:
            torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
            of_two = distributed.DistInfo(0, 2, device.process.device)  # a run of one rank has no wrapper
            wrapped = wrap_model(objectives, of_two, parallel)
            assert isinstance(wrapped, DistributedDataParallel)
        stepper = make_optimizer(objectives.model, OptimizerSettings(optimizer, lr=1e-5))
        batch, updates = random_batch(work, kind, device), []

        def step() -> None:
            with torch.autocast(device.name, torch.bfloat16, enabled=parallel.low_precision):
                loss = sum(wrapped(batch).values())
            loss.backward()
            start = device.clock()
            stepper.step()
            updates.append(device.clock() - start)
            stepper.zero_grad(set_to_none=True)

        step()  # makes the state of the optimizer
        seconds = device.seconds(step, repeats)
    finally:
        distributed.shutdown()
        torch._dynamo.reset()
    costs = planned(work, kind, parallel.activation_checkpointing)
    flops = planned(work, kind, False).flops
    found = {"ms": 1e3 * seconds, "samples_per_second": b / seconds,
             "optimizer_share": statistics.median(updates[2:]) / seconds,
             "gib": peak_memory_gib(device.process.device),
             "planned_gib": device_memory(work, costs, 1, parallel.parallel == "fsdp")["in all"] / 2**30}
    peak = peak_tflops(device.process.device, parallel.low_precision)
    return found | ({"mfu": flops / seconds / peak / 1e12} if peak else {})


@torch.no_grad()
def writing(device: Device, preset: str, b: int, frames: int, repeats: int) -> dict:
    """Captions by beam search and answers by greedy search per second, from pixels, in bfloat16."""
    config = PRESETS[preset]()
    with torch.device(device.name):
        model = MPLUG2(config, "pretrain").eval()
        pixels = torch.randn(b, 3, frames, config.image_size, config.image_size)
        ids = torch.randint(5, config.vocab_size, (b, QUESTION))
    special, mask = SpecialTokens(cls=1, sep=2, pad=0), torch.ones_like(ids, dtype=torch.bool)
    model.decoder.head.bias[special.sep] = -1e9  # so that all texts have the same length

    def captions() -> None:
        beam_search(model, model.encode_vision(pixels), ids[:, :1], special, 5, CAPTION, CAPTION)

    def answers() -> None:
        vision, fused = model.fuse(model.encode_vision(pixels), model.encode_text(ids, mask), mask)
        memory, memory_mask = answer_memory(vision, fused, mask)
        greedy(model, memory, ids[:, :1], special, ANSWER, memory_mask)

    with torch.autocast(device.name, torch.bfloat16):
        return {"captions_per_second": b / device.seconds(captions, repeats),
                "answers_per_second": b / device.seconds(answers, repeats)}


def loss_curves(device: Device) -> dict:
    """The loss of the tiny world's default run, in both precisions."""
    curves, world = {}, tiny_data.ensure()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        for path in world.iterdir():  # without the other splits, there is nothing to evaluate at the end
            if path.suffix != ".jsonl" or ".train." in path.name:
                (data / path.name).symlink_to(path)
        for precision in ("float32", "bfloat16"):
            run_python("train.py", *f"--data {data} --device {device.name} --precision {precision} --log-every 1 "
                       f"--max-steps {CURVE_STEPS} --out {folder} --name {precision}".split())
            lines = (Path(folder) / precision / "metrics.jsonl").read_text().splitlines()
            curves[precision] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    last = {f"last_tenth_{name}": statistics.mean(curve[-max(1, len(curve) // 10):]) for name, curve in curves.items()}
    return last | curves


def gpu_tests(_: Device) -> dict:
    """All tests marked `gpu`, which deselect themselves without one. ValueError if one fails."""
    return {"pytest": run_python(*"-m pytest -q -m gpu -n 0 -p no:cacheprovider tests".split(), good=(0, 5))}


def run_python(*arguments: str, good: tuple[int, ...] = (0,)) -> str:
    """Run Python in the repository. Returns the last line that it prints; ValueError if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
    if done.returncode not in good:
        raise ValueError(f"{' '.join(arguments[:3])}: exit code {done.returncode}: {''.join(last)}")
    return "".join(last)


def measurements(
    device: Device, presets: list[str], b: int, frames: int, repeats: int, in_new_process: Callable[..., dict]
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The names of all rows and how each is measured, in their order."""
    def step(preset: str, kind: str, variant: str) -> tuple[str, Callable[[], dict]]:
        size = b * IMAGES if kind == "image" else b
        return f"{preset}, {kind}, {variant}", lambda: training_step(
            device, preset, kind, size, frames, repeats, **VARIANTS[variant])

    yield "matrix product", lambda: matrix_products(device, repeats)
    yield "host to device", lambda: host_to_device(device, repeats)
    for preset in presets:
        for kind in ("video", "image"):
            yield from (step(preset, kind, variant) for variant in VARIANTS if variant != "compiled")
        yield f"{preset}, writing", lambda preset=preset: writing(device, preset, b, frames, repeats)
    yield "tests marked gpu", lambda: gpu_tests(device)
    yield "loss of the tiny world", lambda: loss_curves(device)
    yield "decoding", lambda: bench_media([], repeats, in_new_process, VIDEO_SECONDS)
    for preset in reversed(presets):
        yield from (step(preset, kind, "compiled") for kind in ("video", "image"))


def bench_all(
    name: str, presets: list[str], b: int, frames: int, repeats: int, in_new_process: Callable[..., dict], file: Path
) -> dict[str, dict]:
    """Measure everything, print a row of each, and save the numbers in `file`."""
    device, start, found = Device(name), time.monotonic(), {}
    model = torch.cuda.get_device_name() if device.cuda else "CPU"
    print(f"{model}, torch {torch.__version__}; {b} videos of {frames} frames, {IMAGES * b} images\n")
    print(f"{'':<30}{'ms':>10}{'samples/s':>11}{'MFU':>8}{'optimizer':>11}{'GiB':>8}{'planned':>9}")
    for row, measure in measurements(device, presets, b, frames, repeats, in_new_process):
        if time.monotonic() - start > 60 * MINUTES:
            found[row] = {"error": f"not started: {MINUTES:g} minutes are over"}
        else:
            try:
                found[row] = measure()
            except Exception as error:  # out of memory, for example: the other rows do not depend on it
                found[row] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        gc.collect()
        if device.cuda:
            torch.cuda.empty_cache()
        print(format_row(row, found[row]), flush=True)
        file.write_text(json.dumps({"device": model, "torch": torch.__version__, **found}, indent=2) + "\n")
    print(f"\n{time.monotonic() - start:.0f} s; all numbers: {file}")
    return found


def format_row(row: str, found: dict) -> str:
    if "ms" in found:
        mfu = f"{found['mfu']:.1%}" if "mfu" in found else "-"
        return (f"{row:<30}{found['ms']:>10.1f}{found['samples_per_second']:>11.1f}{mfu:>8}"
                f"{found['optimizer_share']:>11.1%}{found['gib']:>8.2f}{found['planned_gib']:>9.2f}")
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()
             if isinstance(value, float | str)}
    return f"{row:<30}  " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
