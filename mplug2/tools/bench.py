"""Benchmark speed and memory of the vision encoder, caption generation, and a captioning training step.

    python -m mplug2.tools.bench                            # preset base on this machine
    python -m mplug2.tools.bench --reference                # also without KV caches and fused attention
    python -m mplug2.tools.bench --preset large --frames 16 --device cuda --compile --peak-tflops 989 --json bench.json
    python -m mplug2.tools.bench --data DIR                 # samples read per second, and how long training waits
    python -m mplug2.tools.bench --media                    # reading of video files, against decoding in order
    python -m mplug2.tools.bench --evaluation 200           # captions, answers, retrieval; one and two processes
    python -m mplug2.tools.bench --device cuda --all        # every measurement of one GPU (bench_all.py)

Each measurement runs in its own process: a few warmup runs, then the median of the repeats. The rate of a large matrix
product is measured alternately with them, because seconds times that rate are comparable between machines.

FLOPs are counted in a separate run. The product of an m x k and a k x n matrix counts as 2 m n k, in linear layers and
in both products of attention. In training the gradients count twice as much again. Everything else is not counted:
norms, activations, softmax, embeddings, the optimizer. For N vision blocks of width d on t frames of n patches, the
vision encoder has

    t n (2 * 3 p^2 d)  +  N t ( (1+n) * 24 d^2  +  4 (1+n)^2 d  +  n * (4 d^2 + 6 d) )

FLOPs. The first term is the patch embedding. The second has, for each block, the linear layers of attention and MLP,
attention within a frame, and two local temporal modules of 2 d^2 per patch, each with a convolution of 3 d: on a GPU,
which has no matrix product for it, these are not counted.
"""

import dataclasses
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mplug2.comma_list import comma_list
from mplug2.config import PRESETS
from mplug2.data.batches import Collate, MixedBatches, label_positions
from mplug2.data.loader import make_loader, prefetch
from mplug2.data.samples import Samples, check_texts, read_samples
from mplug2.data.text import Tokenizer, clean
from mplug2.distributed import choose_device
from mplug2.flags import check_range, one_line_errors, parse
from mplug2.generation import SpecialTokens, beam_search
from mplug2.model import attention, kernels
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.objectives import Objectives
from mplug2.tools.bench_all import bench_all
from mplug2.tools.bench_eval import bench_evaluation
from mplug2.tools.bench_media import bench_media
from mplug2.tools.pass_cost import CONVOLUTION_FLOPS
from mplug2.training.optim import OptimizerSettings, make_optimizer
from mplug2.training.parallel import checkpoint_activations, compile_model

PROG = "python -m mplug2.tools.bench"
BEAMS = 5
CAPTION = 20  # tokens of a caption, in generation and in training
MATMUL = 2048  # rows and columns of the matrices whose product measures the machine's rate
WARM_UP = 2
DATA_STEPS = 60  # batches of each measurement of the data path


@dataclass(frozen=True)
class BenchSettings:
    preset: Literal["tiny", "small", "base", "large"] | None = None
    """Size of the model. Default: base, and with --all base and large."""
    frames: int = 8
    """Frames of a video."""
    batch_size: int | None = None
    """Videos in a batch. Default: 1, and with --all 8."""
    repeats: int = 7
    """Timed runs of each measurement."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda runs under bfloat16 autocast."""
    compile: bool = False
    """Compile the model."""
    reference: bool = False
    """Also measure without KV caches and fused attention."""
    peak_tflops: float = 0.0
    """Peak rate of the device (dense bf16), to compute the MFU."""
    data: str = ""
    """Measure the reading of this data set instead."""
    workers: int = 0
    """With --data: processes that decode."""
    media: bool = False
    """Measure the reading of video files instead: of files that are written for it, or of --files."""
    files: str = ""
    """With --media: your video files, separated by commas."""
    evaluation: int | None = None
    """Measure the evaluation of this number of videos instead."""
    all: bool = False
    """Make every measurement of one device, with --device cuda in about five minutes."""
    json: str = ""
    """Save the numbers as a JSON object, with --all by default in bench.json."""

    def __post_init__(self):
        check_range(self, "frames batch_size repeats evaluation", 1)
        check_range(self, "peak_tflops workers", 0)


def inputs(model: MPLUG2, options: BenchSettings, device: str) -> tuple[Tensor, Tensor]:
    """Random pixels `b 3 t H W` and captions `b l`."""
    config, b = model.config, options.batch_size
    pixels = torch.randn(b, 3, options.frames, config.image_size, config.image_size, device=device)
    return pixels, torch.randint(5, config.vocab_size, (b, CAPTION + 1), device=device)


def encoder(model: MPLUG2, options: BenchSettings, device: str) -> Callable[[], object]:
    pixels, _ = inputs(model.eval(), options, device)
    return torch.no_grad()(lambda: model.vision_encoder(pixels))


def generation(model: MPLUG2, options: BenchSettings, device: str) -> Callable[[], object]:
    """Beam search of exactly 20 steps from V', which is computed before the clock starts."""
    pixels, ids = inputs(model.eval(), options, device)
    with torch.no_grad():
        vision = model.encode_vision(pixels)
    special = SpecialTokens(cls=1, sep=2, pad=0)
    if options.reference:
        return torch.no_grad()(lambda: uncached_search(model, vision, ids[:, :1]))
    return lambda: beam_search(model, vision, ids[:, :1], special, BEAMS, min_length=CAPTION, max_length=CAPTION)


def uncached_search(model: MPLUG2, vision: Tensor, ids: Tensor) -> Tensor:
    """Beam search without caches. Each step decodes the whole text again, with a copy of the memory for each beam."""
    vision, ids = vision.repeat_interleave(BEAMS, dim=0), ids.repeat_interleave(BEAMS, dim=0)
    total = torch.zeros(len(ids), 1, device=ids.device)
    for _ in range(CAPTION):
        logits = model.decode(ids, torch.ones_like(ids, dtype=torch.bool), vision)[:, -1]
        scores = (total + logits.log_softmax(dim=-1)).unflatten(0, (-1, BEAMS)).flatten(1)
        best, index = scores.topk(BEAMS, dim=1)
        origin = index // logits.shape[1] + BEAMS * torch.arange(len(scores), device=ids.device)[:, None]
        ids = torch.cat([ids[origin.flatten()], (index % logits.shape[1]).reshape(-1, 1)], dim=1)
        total = best.reshape(-1, 1)
    return ids


def train(model: MPLUG2, options: BenchSettings, device: str) -> Callable[[], object]:
    """Forward, backward and AdamW, with dropout."""
    pixels, ids = inputs(model.train(), options, device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = {"pixels": pixels, "prompted_ids": ids, "prompted_mask": mask,
             "prompted_positions": label_positions(mask.cpu()).to(device)}
    objectives = Objectives(model)
    optimizer = make_optimizer(model, OptimizerSettings("adamw", lr=1e-5, weight_decay=0.02, beta2=0.999))

    def step() -> None:
        objectives(batch)["caption"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


MEASUREMENTS = {"encoder": encoder, "generation": generation, "train": train, "train_checkpointed": train}


def unfused_attention() -> AbstractContextManager:
    """Attention computed by its formula instead of the fused kernel."""
    return patch.object(attention, "attention", kernels.reference_attention)


def prepare(name: str, options: BenchSettings) -> Callable[[], object]:
    torch.manual_seed(0)
    with torch.device(options.device):
        model = MPLUG2(PRESETS[options.preset](), "video_caption")
    if name == "train_checkpointed":
        checkpoint_activations(model)
    if options.compile:
        compile_model(model)
    run = MEASUREMENTS[name](model, options, options.device)
    return torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda")(run)


def count_flops(name: str, options: BenchSettings) -> int:
    run = prepare(name, dataclasses.replace(options, compile=False))
    # torch does not count the CPU's fused kernel. The formula has the same products.
    counter = FlopCounterMode(display=False, custom_mapping=CONVOLUTION_FLOPS)
    with unfused_attention() if options.device == "cpu" else nullcontext(), counter:
        run()
    return counter.get_total_flops()


def measure(name: str, options: BenchSettings) -> dict[str, float]:
    """Median seconds, the rate of the matrix product in GFLOP/s, and the peak memory of the process in 1e9 bytes."""
    device = options.device
    run = prepare(name, options)
    if options.reference:
        unfused_attention().start()

    def seconds(function: Callable[[], object]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        run()
    # On the CPU the peak is that of the whole process, so read it before the large matrices are allocated.
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
    square = torch.randn(MATMUL, MATMUL, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    times, rates = [], []
    seconds(lambda: square @ square)
    for _ in range(options.repeats):
        rates.append(2 * MATMUL**3 / seconds(lambda: square @ square) / 1e9)
        times.append(seconds(run))
    rates.append(2 * MATMUL**3 / seconds(lambda: square @ square) / 1e9)
    return {"s": statistics.median(times), "matmul_gflops": statistics.median(rates), "peak_gb": peak / 1e9}


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_new_process(function: Callable, *arguments: object) -> object:
    """`function(*arguments)`, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def bench(options: BenchSettings) -> dict[str, float]:
    """Run all measurements, print a table, and return the flat dictionary that `--json` saves."""
    found: dict[str, float] = {}
    rates = []
    print(f"{options.preset}, {options.frames} frames, batch {options.batch_size}, {options.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"{'':<22}{'seconds':>9}{'samples/s':>11}{'GFLOP':>9}{'of matmul':>11}{'s x GFLOP/s':>13}{'peak GB':>9}")
    for name in MEASUREMENTS:
        for reference in [False, True] if options.reference else [False]:
            variant = dataclasses.replace(options, reference=reference)
            if reference and name == "train_checkpointed":
                continue
            result, flops = in_new_process(measure, name, variant), in_new_process(count_flops, name, variant)
            key = {"train": "train_step"}.get(name, name) + "_reference" * reference
            prefix = name + "_reference" * reference
            found |= {f"{key}_s": result["s"], f"{prefix}_flops": flops, f"{prefix}_peak_gb": result["peak_gb"]}
            rates.append(result["matmul_gflops"])
            share = flops / result["s"] / 1e9 / result["matmul_gflops"]
            print(f"{prefix:<22}{result['s']:>9.3f}{options.batch_size / result['s']:>11.2f}{flops / 1e9:>9.0f}"
                  f"{share:>11.0%}{result['s'] * result['matmul_gflops']:>13.0f}{result['peak_gb']:>9.2f}", flush=True)
            if options.peak_tflops and name == "train" and not reference:
                found["mfu"] = flops / result["s"] / 1e12 / options.peak_tflops
    found["matmul_gflops"] = statistics.median(rates)
    print(f"\nmatrix product of {MATMUL} x {MATMUL}: {found['matmul_gflops']:.0f} GFLOP/s")
    if "mfu" in found:
        print(f"training step: {found['mfu']:.1%} of {options.peak_tflops:g} TFLOP/s")
    return found


def bench_data(options: BenchSettings) -> dict[str, float]:
    """Samples that the loader reads per second, and the share of pre-training time spent waiting for it."""
    samples = read_samples(options.data, "pretrain", "train")
    samples = {kind: samples[kind] for kind in ("video", "image") if kind in samples}
    texts = [clean(caption) for of_kind in samples.values() for sample in of_kind for caption in sample.captions]
    tokenizer = Tokenizer.train(texts, vocab_size=4096)
    config = PRESETS[options.preset](vocab_size=len(tokenizer))
    check_texts(samples, tokenizer, config.max_positions, max_words=30)
    dataset = Samples(samples, config.image_size, options.frames, 2, config.max_positions, max_words=30, seed=0)
    collate = Collate(tokenizer)
    counts = {kind: len(of_kind) for kind, of_kind in samples.items()}

    def loader(weights: dict[str, float], steps: int) -> Iterator[dict]:
        batches = MixedBatches(counts, weights, options.batch_size, steps, seed=0)
        made = make_loader(dataset, batches, collate, options.workers, pin=options.device == "cuda")
        return iter(made) if options.workers else prefetch(made)

    main_kind = next(iter(samples))
    batches = loader({main_kind: 1.0}, DATA_STEPS)
    next(batches)  # starts the workers
    start = time.perf_counter()
    read = sum(len(batch["source"]) for batch in batches)
    rate = read / (time.perf_counter() - start)

    model = MPLUG2(config, "pretrain").to(options.device).train()
    objectives, optimizer = Objectives(model), make_optimizer(model, OptimizerSettings(lr=1e-3))
    waiting, batches = 0.0, loader(dict.fromkeys(samples, 1.0), DATA_STEPS)
    next(batches)
    start = asked = time.perf_counter()
    for batch in batches:
        waiting += time.perf_counter() - asked
        batch = {name: value.to(options.device, non_blocking=True) if torch.is_tensor(value) else value
                 for name, value in batch.items()}
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            loss = sum(objectives(batch).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if options.device == "cuda":
            torch.cuda.synchronize()
        asked = time.perf_counter()
    share = waiting / (time.perf_counter() - start)
    print(f"{options.data}: {options.workers} workers read {rate:.0f} {main_kind} samples per second; pre-training "
          f"(preset {options.preset}, batch size {options.batch_size}) spends {share:.1%} of its time waiting for data")
    return {"read_per_second": rate, "waiting_share": share}


def main(arguments: list[str] | None = None) -> None:
    options = parse(BenchSettings, __doc__, PROG, arguments)
    with one_line_errors(PROG):
        choose_device(options.device, local_rank=0)  # refuses a GPU that is not there
        if options.all:
            presets = [options.preset] if options.preset else ["base", "large"]
            bench_all(options.device, presets, options.batch_size or 8, options.frames, options.repeats, in_new_process,
                      Path(options.json or "bench.json"))
            return
        options = dataclasses.replace(options, preset=options.preset or "base", batch_size=options.batch_size or 1)
        if options.evaluation:
            found = bench_evaluation(options.evaluation)
        elif options.media:
            files = comma_list("files", options.files) if options.files else []
            found = bench_media(list(map(Path, files)), options.repeats, in_new_process)
        else:
            found = bench_data(options) if options.data else bench(options)
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
