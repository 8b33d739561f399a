"""What a run will need, before a GPU is asked for: memory of each device, communication, steps, days.

The cost of a pass is counted on tensors without memory (pass_cost.py). What FSDP2 shares out is then divided by the
number of devices, what HSDP shares out by that of a node.

    python -m mplug2.tools.memory_plan --preset large --gpus 64 --batch-size 1024 --frames 4 --precision bfloat16
    python -m mplug2.tools.memory_plan --preset base --recipe msrvtt_qa --data DIR --gpus 8
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from mplug2.config import ModelConfig
from mplug2.data.build import number_of_steps, read_sources, read_streams
from mplug2.data.samples import stream_kind
from mplug2.flags import Parser, check_range
from mplug2.model.layers import Block
from mplug2.model.mplug2 import MPLUG2
from mplug2.tasks import BATCH_TYPES, batch_types, parse_tasks
from mplug2.tools.communication import (
    EFFICIENCY,
    INFINIBAND,
    LATENCY,
    NODE,
    NVLINK,
    format_step,
    muon_flops,
    rows,
    step_collectives,
    step_exposed,
)
from mplug2.tools.pass_cost import Cost, Workload, cost
from mplug2.training.logs import PEAK_TFLOPS
from mplug2.training.recipes import RECIPES
from mplug2.training.settings import GROUPS, Settings, default_values, run_flags, with_defaults


@dataclass(frozen=True)
class PlanSettings:
    gpus: int = 8
    """Number of devices."""
    images: int = 14_000_000
    """Without --data: images of the training data; the default is the paper's (COCO, Visual Genome, SBU, CC3M, CC12M).
    """
    videos: int = 2_500_000
    """Without --data: videos of the training data; the default is the paper's (WebVid-2M)."""
    device_tflops: float | None = None
    """Peak TFLOP/s of a device. Default: that of an H100 or H200 in the precision of the passes, 989 or 494.5."""
    utilization: float = 0.4
    """Assumed fraction of peak FLOP/s (MFU)."""

    def __post_init__(self):
        check_range(self, "gpus", 1)
        check_range(self, "images videos", 0)
        if not self.images + self.videos:
            raise ValueError("images=0 and videos=0: expected one of them above 0")
        for name in ("device_tflops", "utilization"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= (1 if name == "utilization" else math.inf):
                raise ValueError(f"{name}={value}: expected a number above 0"
                                 + " and of at most 1" * (name == "utilization"))


def parameter_counts(config: ModelConfig) -> tuple[int, int, int, int]:
    """All parameters, those outside of blocks, those of the largest block, and those in matrices of linear layers."""
    with torch.device("meta"):
        model = MPLUG2(config)
    blocks = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block)]
    whole = sum(p.numel() for p in model.parameters())
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return whole, whole - sum(blocks), max(blocks), matrices


def device_memory(work: Workload, costs: Cost, gpus: int, sharded: bool) -> dict[str, int]:
    """Bytes on each device, at the moment of a step when most is needed.

    Parameters, gradients and optimizer state are float32. DDP keeps its buckets, which all gradients lie in, from the
    first step on. FSDP2 keeps 1 / gpus of everything (for HSDP these are the gpus of a node), and at work, in the
    precision of the pass: what is in no block, with its gradients, and two blocks, one at work and the next one.
    """
    whole, outside, block, matrices = parameter_counts(work.config)
    state = 8 * whole - 4 * matrices * (work.optimizer == "muon")
    if not sharded:
        parts = {"parameters": 4 * whole, "optimizer": state,
                 "gradients": costs.peak - costs.activations if gpus == 1 else 4 * whole,
                 "activations": costs.activations}
    else:
        width = 2 if work.low_precision else 4
        parts = {"parameters": 4 * whole // gpus + width * (outside + 2 * block), "optimizer": state // gpus,
                 "gradients": 4 * whole // gpus + width * (outside + block), "activations": costs.activations}
    return {**parts, "in all": sum(parts.values())}


def ways(gpus: int) -> list[tuple[str, str, int]]:
    """The name, the value of --parallel, and the number of devices that divide the sharded model and Muon's work."""
    hsdp = [("HSDP", "hsdp", NODE)] if gpus > NODE and gpus % NODE == 0 else []
    return [("DDP", "ddp", gpus), ("FSDP2", "fsdp", gpus), *hsdp]


def workload(settings: Settings, config: ModelConfig, world_size: int) -> Workload:
    """What each of `world_size` devices computes at a time. ValueError if they cannot share a batch evenly."""
    data = settings.data
    return Workload(config, data.micro_batch_size(world_size), data.frames, data.questions_per_sample, data.max_words,
                    data.task, settings.parallel.low_precision, settings.optimizer.optimizer)


def step_flops(settings: Settings, config: ModelConfig, world_size: int) -> Callable[[str], float]:
    """The FLOPs of a micro-batch on one device, as a function of its batch type. Each type is counted once."""
    work = workload(settings, config, world_size)
    return cache(lambda kind: cost(work, kind).flops)


@dataclass(frozen=True)
class Load:
    """What a whole run trains on."""

    shares: dict[str, float]
    """Share of the samples by batch type; their sum is 1. The type that needs most memory is the first."""
    steps: int
    description: str


def training_load(plan: PlanSettings, settings: Settings) -> Load:
    """The samples and steps of a run: those that train.py would take with --data, or those of --images and --videos.

    Raises what reading the data raises, and ValueError for a task without images and videos, or a recipe without data.
    """
    data, recipe = settings.data, RECIPES.get(settings.run.recipe)
    if data.data:
        samples, shards, weights = read_streams(data, read_sources(data.data))
        sizes, shares = Counter(), Counter()
        for stream, of_stream in {**samples, **shards}.items():
            sizes[stream_kind(stream)] += len(of_stream)
            shares[stream_kind(stream)] += weights[stream] / sum(weights.values())
        kinds = sorted(sizes, key=lambda kind: ("video", "image", "text").index(BATCH_TYPES[kind].modality))
        passes = f", {data.epochs:g} times" if data.epochs else ""
        return Load({kind: shares[kind] for kind in kinds}, number_of_steps(data, samples, shards),
                    " and ".join(f"{sizes[kind]:,} samples of {kind}" for kind in kinds) + passes)
    if recipe and recipe.data and (plan.images, plan.videos) == (PlanSettings.images, PlanSettings.videos):
        raise ValueError(f"recipe={settings.run.recipe!r} trains on {recipe.data}: add --data DIR, the folder that "
                         f"python -m mplug2.data {recipe.data} ROOT --out DIR writes, or --images and --videos")
    kinds = {kind.modality: name for task in parse_tasks(data.task) for name, kind in batch_types(task).items()}
    counts = {kinds[modality]: count for modality, count in (("video", plan.videos), ("image", plan.images))
              if count and modality in kinds}
    if not counts:
        raise ValueError(f"without --data the plan is for images and videos; {data.task} with --images {plan.images} "
                         f"and --videos {plan.videos} has none of them")
    total, passes = sum(counts.values()), data.epochs or PASSES
    described = " and ".join(f"{count:,} {BATCH_TYPES[kind].modality}s" for kind, count in counts.items())
    return Load({kind: count / total for kind, count in counts.items()}, int(passes * total // data.batch_size),
                f"{described}, {passes:g} times")


def format_plan(plan: PlanSettings, settings: Settings) -> str:
    """The plan as text."""
    work, accumulate = workload(settings, settings.model_config(), plan.gpus), settings.data.accumulation_steps
    whole, batch_size = parameter_counts(work.config)[0], settings.data.batch_size
    lines = [f"{whole / 1e6:,.1f} M parameters; {plan.gpus} devices, {work.b} samples each at a time, x {accumulate} "
             f"= {batch_size} a step;",
             f"{work.frames} frames of {work.config.image_size} pixels, texts of {work.words} words; "
             f"{'bfloat16' if work.low_precision else 'float32'} passes",
             "", f"{'GiB on each device':<34}{'parameters':>11}{'optimizer':>11}{'gradients':>11}{'activations':>13}"
                 f"{'in all':>9}"]
    load = training_load(plan, settings)
    costs = {recompute: cost(work, next(iter(load.shares)), recompute) for recompute in (False, True)}
    for name, way, divided in ways(plan.gpus):
        for recompute in (False, True):
            memory = device_memory(work, costs[recompute], divided, way != "ddp")
            cells = [f"{memory[key] / 2**30:>{width}.2f}" for key, width in
                     (("parameters", 11), ("optimizer", 11), ("gradients", 11), ("activations", 13), ("in all", 9))]
            lines.append(f"{name + ', activation checkpointing' * recompute:<34}" + "".join(cells))
    flops = {kind: (costs[False] if number == 0 else cost(work, kind)).flops / work.b
             for number, kind in enumerate(load.shares)}
    peak = plan.device_tflops or PEAK_TFLOPS["H100"][0 if settings.parallel.low_precision else 1]
    operations = load.steps * batch_size * sum(share * flops[kind] for kind, share in load.shares.items())
    days = operations / (plan.gpus * peak * 1e12 * plan.utilization) / 86400
    names = {kind: BATCH_TYPES[kind].modality for kind in load.shares}
    if plan.gpus > 1:
        lines += ["", *format_communication(plan, settings, work, flops, peak, load)]
    lines += ["", ", ".join(f"{flops[kind] / 1e12:.3f} TFLOP per {names[kind]}" for kind in load.shares)
              + " (forward and backward, all losses)",
              f"{load.description}: {load.steps:,} steps, {days:.1f} days at {plan.utilization:.0%} of {peak:g} "
              "TFLOP/s",
              "A step that recomputes activations takes about a third longer. Not counted: buffers of libraries, and",
              "memory that is free, but in pieces: leave a tenth."]
    return "\n".join(lines)


def format_communication(
    plan: PlanSettings, settings: Settings, work: Workload, flops: dict[str, float], peak: float, load: Load
) -> list[str]:
    """Tables of the collectives of a step, and of its time, for each way to divide the work."""
    kind, repeats, samples = next(iter(load.shares)), settings.data.accumulation_steps, settings.data.batch_size
    rate, lines = peak * 1e12 * plan.utilization, []
    with torch.device("meta"):
        model = MPLUG2(work.config, work.task)
    for name, way, divided in ways(plan.gpus):
        products = 0.0
        if work.optimizer == "muon":
            products = muon_flops(model, divided) / (PEAK_TFLOPS["H100"][0] * 1e12 * plan.utilization)
        found = step_collectives(lambda: (work.objectives(), work.batch(kind)), plan.gpus,
                                 dataclasses.replace(settings.parallel, parallel=way), settings.optimizer)
        seconds, days = {of_kind: flops[of_kind] * work.b * repeats / rate for of_kind in flops}, 0.0
        for of_kind, passes in seconds.items():
            table = rows(found, passes / 3, 2 * passes / 3, repeats)
            days += load.steps * load.shares[of_kind] * (passes + products + step_exposed(table)) / 86400
            if of_kind == kind:
                lines += format_step(f"{name}, a step of {kind}", table, passes, products, samples)
        lines += [f"the whole run: {days:.1f} days", ""]
    return [*lines, f"NVLink at {NVLINK / 1e9:g} GB/s in nodes of {NODE}, InfiniBand at {INFINIBAND / 1e9:g} GB/s for "
            f"each GPU, {EFFICIENCY:.0%} of both, {1e6 * LATENCY:g} us for each", "doubling of the number of GPUs. "
            "These are assumptions: nothing of this table has been measured."]


PASSES = 30
"""Passes through --images and --videos, without --epochs and a recipe or preset that has them: those of mPLUG."""
FLAGS_OF_TRAINING = {
    "recipe", "preset", "init", "task", "data", "epochs", "batch_size", "accumulation_steps", "frames", "max_words",
    "questions_per_sample", "optimizer", "precision",
}
"""The flags of train.py that change the plan."""


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, "python -m mplug2.tools.memory_plan")
    parser.add(PlanSettings, "plan (devices and data)")
    for cls, title in GROUPS.values():
        if FLAGS_OF_TRAINING & {field.name for field in dataclasses.fields(cls)}:
            parser.add(cls, title, FLAGS_OF_TRAINING)
    parser.add(ModelConfig, "model: vision encoder")
    given = parser.read(arguments, default_values)
    try:
        settings = Settings.from_flat(with_defaults(run_flags(given)), given["ModelConfig"])
        print(format_plan(PlanSettings(**given["PlanSettings"]), settings))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
