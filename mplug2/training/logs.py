"""Logging on the main process: metrics.jsonl, the loggers of loggers.py, and a progress bar."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from mplug2 import distributed
from mplug2.distributed import DistInfo
from mplug2.flags import warning_only
from mplug2.training.loggers import TensorBoard, WandB

PEAK_TFLOPS = {"A100": (312, 156), "H100": (989, 494.5), "H200": (989, 494.5), "B200": (2250, 1125),
               "L40S": (362, 183), "RTX 4090": (165, 82.6)}
"""Peak dense TFLOP/s in bfloat16 and in float32, by a part of the device's name. Source: NVIDIA's data sheets. Matrix
products in float32 use TF32 (`distributed.choose_device`)."""


def peak_tflops(device: torch.device, low_precision: bool) -> float:
    """Peak TFLOP/s of the device, for passes in bfloat16 or float32; 0 if its name is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    bfloat16, float32 = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), (0, 0))
    return bfloat16 if low_precision else float32


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: on its GPU, or in CPU memory without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Log:
    """Collects the values of each step, and writes their means as a line of metrics.jsonl.

    A resumed run starts at `first_step`: lines of later steps, which it repeats, are removed. `peak` is the peak
    TFLOP/s of a device and `flops` the FLOPs of a micro-batch on it, by batch type: with them, lines have an MFU.
    """

    def __init__(
        self, folder: Path, process: DistInfo, first_step: int, steps: int, peak: float = 0.0,
        flops: Callable[[str], float] = lambda kind: 0.0,
    ):
        self.path, self.process, self.peak, self.flops = folder / "metrics.jsonl", process, peak, flops
        self.failed: set[str] = set()
        self.failed_anywhere: set[str] = set()
        self.files, self.allowed = 0, 0.0
        self.loggers: list[TensorBoard | WandB] = []
        self.bar = tqdm(total=steps, initial=first_step, disable=not process.is_main, unit="step", mininterval=0.5)
        if process.is_main:
            self._remove_lines_after(first_step)
            with warning_only("TensorBoard"), suppress(ImportError):  # metrics.jsonl has the same numbers
                self.loggers.append(TensorBoard(folder, first_step))
            if os.environ.get("WANDB_PROJECT"):
                with warning_only("WandB"):
                    self.loggers.append(WandB(folder, first_step))
        self._reset()

    def _remove_lines_after(self, step: int) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # The last line may be incomplete, if the run was killed while it wrote.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        if kept != lines:
            part = self.path.with_suffix(".part")
            part.write_text("".join(line + "\n" for line in kept))
            os.replace(part, self.path)

    def _reset(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}
        self.samples, self.operations, self.waiting, self.since = 0, 0.0, 0.0, time.time()

    def waited(self, seconds: float) -> None:
        """Count time that the training process waited for data."""
        self.waiting += seconds

    def skipped_files(self, errors: list[str], files: int, allowed: float) -> None:
        """Count the files, of `files` in all, that could not be decoded, and print each once.

        Raises ValueError if more than the fraction `allowed` failed on this rank, or in `write` on all ranks together.
        """
        for error in sorted(set(errors) - self.failed):
            tqdm.write(f"skipped: {error}", file=sys.stderr)
        self.failed |= set(errors)
        self.files, self.allowed = files, allowed
        self._refuse_too_many(self.failed, ValueError)

    def _refuse_too_many(self, failed: set[str], error: type[ValueError]) -> None:
        if len(failed) > self.allowed * self.files:
            raise error(f"{len(failed)} of {self.files} media files cannot be decoded, more than max_skipped="
                        f"{self.allowed} allows; fix the files named above, or raise --max-skipped")

    def step(self, losses: dict[str, torch.Tensor], norm: torch.Tensor, samples: int, kinds: list[str]) -> None:
        """Add a step: its losses and gradient norm, its samples on all ranks, and the batch types of its micro-batches.
        """
        for name, value in {**losses, "grad_norm": norm}.items():
            self.values.setdefault(name, []).append(value.detach())
        self.samples += samples
        if self.peak:
            self.operations += sum(map(self.flops, kinds))

    def nonfinite(
        self, step: int, losses: dict[str, torch.Tensor], norm: torch.Tensor, sources: list[str], finite: bool
    ) -> str:
        """Report a step that is skipped: the losses of the first rank that is not `finite`, and the sources of the
        samples on all such ranks. Returns the message. Every rank has to call it.
        """
        reports = distributed.all_gather_object(
            (finite, sources, {name.removeprefix("loss/"): value.item() for name, value in losses.items()}))
        culprits = [report for report in reports if not report[0]] or reports
        values = ", ".join(f"{name} {value:.3g}" for name, value in culprits[0][2].items())
        names = ", ".join(name for _, of_rank, _ in culprits for name in of_rank)
        message = f"step {step} is not finite: {values}, gradient norm {norm.item():.3g}; samples: {names}"
        if self.process.is_main:
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        return message

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write a line: `values`, and the means over all ranks since the previous line. Every rank has to call it."""
        seconds = time.time() - self.since
        means = {
            name: (distributed.all_reduce_sum(torch.stack(found).mean()) / self.process.world_size).item()
            for name, found in sorted(self.values.items())
        }
        shared = distributed.all_gather_object((sorted(self.failed), peak_memory_gib(self.process.device)))
        self.failed_anywhere = self.failed_anywhere.union(*(failed for failed, _ in shared))
        self.bar.set_postfix_str(
            " ".join(f"{name.removeprefix('loss/')} {value:.2f}" for name, value in means.items() if "/" in name)
            + f" {self.samples / seconds:.0f} samples/s"
        )
        line = {
            "step": step, **means, **values, "samples_per_second": self.samples / seconds,
            "waiting_for_data": self.waiting / seconds, "skipped_files": len(self.failed_anywhere),
            "memory_gib": max(memory for _, memory in shared),
        }
        if self.peak:
            line["mfu"] = self.operations / seconds / (self.peak * 1e12)
        self.line(line)
        self._refuse_too_many(self.failed_anywhere, distributed.AllRanksError)
        self._reset()

    def line(self, values: dict[str, float]) -> None:
        """Write a line as it is."""
        if not self.process.is_main:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")
        # Standard errors are a dictionary: the loggers show numbers.
        numbers = {name: value for name, value in values.items() if name != "step" and not isinstance(value, dict)}
        loggers, self.loggers = self.loggers, []
        for logger in loggers:
            with warning_only(f"{type(logger).__name__}, which gets no more lines,"):
                logger.write(values["step"], numbers)
                self.loggers.append(logger)

    def close(self) -> None:
        """Close the loggers, after the last line."""
        self.bar.close()
        for logger in self.loggers:
            with warning_only(type(logger).__name__):
                logger.close()
