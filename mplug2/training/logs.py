"""What a run tells: metrics.jsonl always, TensorBoard if it is installed, one progress bar; by the main process."""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from mplug2 import distributed
from mplug2.distributed import DistInfo

PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "RTX 4090": 165}
"""Dense bfloat16 operations a second, in 10^12, by a part of the device's name. Source: NVIDIA's data sheets."""


def peak_tflops(device: torch.device) -> float:
    """What the device can do at most, or 0 if that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has had: on the GPU, or, without one, of the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Log:
    """Collects what each step gives, and writes a line of means every now and then.

    A resumed run goes on from `first_step`: lines of later steps, which it does again, are taken out.
    """

    def __init__(self, folder: Path, process: DistInfo, first_step: int, steps: int, peak: float = 0.0):
        self.path, self.process, self.peak = folder / "metrics.jsonl", process, peak
        self.failed: set[str] = set()
        self.failed_anywhere: set[str] = set()
        self.files, self.allowed, self.nonfinite_steps, self.board = 0, 0.0, 0, None
        self.bar = tqdm(total=steps, initial=first_step, disable=not process.is_main, unit="step", mininterval=0.5)
        if process.is_main:
            self._take_back(first_step)
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
            except ImportError:  # an extra: metrics.jsonl has the same numbers
                self.board = None
        self._reset()

    def _take_back(self, step: int) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # The last line may be cut off, if the run was killed while it wrote.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        if kept != lines:
            aside = self.path.with_suffix(".part")
            aside.write_text("".join(line + "\n" for line in kept))
            os.replace(aside, self.path)

    def _reset(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}
        self.samples, self.flops, self.waiting, self.since = 0, 0.0, 0.0, time.time()

    def waited(self, seconds: float) -> None:
        self.waiting += seconds

    def skipped(self, errors: list[str], files: int, allowed: float) -> None:
        """Count files that could not be decoded, by name; too many of them stop the run: at once if one process has
        them all, else when the next line is written."""
        for error in sorted(set(errors) - self.failed):
            tqdm.write(f"skipped: {error}", file=sys.stderr)
        self.failed |= set(errors)
        self.files, self.allowed = files, allowed
        self._refuse_too_many(self.failed, ValueError)

    def _refuse_too_many(self, failed: set[str], error: type[ValueError]) -> None:
        if len(failed) > self.allowed * self.files:
            raise error(f"{len(failed)} of {self.files} media files cannot be decoded, more than max_skipped="
                        f"{self.allowed} allows; mend the data (the files are named above), or raise --max-skipped")

    def step(self, losses: dict, norm: torch.Tensor, samples: int, flops: float) -> None:
        """A step that was taken; `flops` of this process."""
        for name, value in {**losses, "grad_norm": norm}.items():
            self.values.setdefault(name, []).append(value.detach())
        self.samples += samples
        self.flops += flops

    def nonfinite(self, step: int, losses: dict[str, float], norm: float, where: list[str]) -> str:
        """A step that was not taken; `source` are the samples of the processes that saw it. Returns what was said."""
        self.nonfinite_steps += 1
        values = ", ".join(f"{name.removeprefix('loss/')} {value:.3g}" for name, value in losses.items())
        message = (f"step {step} is not finite: {values}, gradient norm {norm:.3g}; the samples: {', '.join(where)}")
        if self.process.is_main:
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        return message

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line: means since the last one, over all processes. All of them have to call it."""
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
            "nonfinite_steps": self.nonfinite_steps, "memory_gib": max(memory for _, memory in shared),
        }
        if self.peak:
            line["mfu"] = self.flops / seconds / (self.peak * 1e12)
        self.line(line)
        self._refuse_too_many(self.failed_anywhere, distributed.AllRanksError)
        self._reset()

    def line(self, values: dict[str, float]) -> None:
        if not self.process.is_main:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")
        if self.board:
            for name, value in values.items():
                if name != "step":
                    self.board.add_scalar(name, value, values["step"])
            self.board.flush()

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()
