"""Fault tolerance: signals, the state of the random generators, and a watchdog for ranks that hang.

    with GracefulStop() as stop, Watchdog(process, timeout=600) as watchdog:
        watchdog.heartbeat(step, "waiting for data")
        ...
        if stop.name is set on any rank: save, and leave the loop
"""

import faulthandler
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from mplug2.distributed import DistInfo


class GracefulStop:
    """Within it, SIGTERM and SIGINT do not end the process: `name` is the name of the last signal, or empty.

    The first signal prints what will happen. A second SIGINT ends the process at once, but not within a second: from
    one Ctrl-C a rank gets a SIGINT of the terminal and another one of torchrun.
    """

    def __init__(self, message: str = "stopping after this step"):
        self.name, self.message, self.pressed = "", message, 0.0

    def __enter__(self) -> "GracefulStop":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.pressed and time.monotonic() - self.pressed > 1:
            _kill_workers()
            os._exit(130)
        if not self.name and os.environ.get("RANK", "0") == "0":  # os.write: a signal may interrupt a print
            os.write(2, f"\n{self.message}; press Ctrl-C again to quit now\n".encode())
        if number == signal.SIGINT and not self.pressed:
            self.pressed = time.monotonic()
        self.name = signal.Signals(number).name

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends the process with exit code 70 after `timeout` seconds without a `heartbeat`, and names the rank that hangs.

    A thread on every rank writes the rank's latest heartbeat to a shared store. A rank that times out reads the store
    twice. A rank whose entry did not change has stopped or died; otherwise the ranks that are furthest behind block the
    others. The process also prints its own stack. `torchrun --max-restarts` then restarts the run from its last
    checkpoint.
    """

    EXIT_CODE = 70

    def __init__(self, process: DistInfo, timeout: float, program: str = "train.py"):
        self.process, self.timeout, self.interval = process, timeout, min(1.0, timeout / 4)
        self.program = program
        self.store = None
        if process.world_size > 1:  # its own connection: the process group's connection may be what hangs
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            store.set_timeout(timedelta(seconds=30))
            self.store = dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.over, self.count = threading.Event(), 0
        self.heartbeat(0, "starting", patience=10)

    def heartbeat(self, step: int, activity: str, patience: float = 1.0, names: Callable[[], str] = str) -> None:
        """Report progress: `step` steps are done, and `activity` begins, which may take `patience` timeouts.

        `names` returns the files in use, for the message of a rank that hangs.
        """
        self.latest = (time.monotonic() + self.timeout * patience, step, activity, names)
        self.patience = patience

    def batch_done(self) -> None:
        """The heartbeat of an evaluation: one more batch is done."""
        self.heartbeat(self.latest[1] + 1, "evaluating", patience=10)

    def __enter__(self) -> "Watchdog":
        self._publish()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()

    def _publish(self) -> None:
        self.count += 1
        if self.store:
            _, step, activity, _ = self.latest
            self.store.set(str(self.process.rank), json.dumps([self.count, step, activity]))

    def _watch(self) -> None:
        while not self.over.wait(self.interval):
            late = time.monotonic() > self.latest[0]
            try:
                self._publish()
                report = self._report() if late else ""
            except RuntimeError as error:  # the process that served the store has ended
                report = f"the store of the ranks cannot be reached ({error})" if late else ""
            if late and not self.over.is_set() and time.monotonic() > self.latest[0]:
                self._end(report)

    def _report(self) -> str:
        """Which ranks block the others."""
        _, step, activity, names = self.latest
        if not self.store:
            return f"still at step {step}: {activity} {names()}".rstrip()
        keys = [str(rank) for rank in range(self.process.world_size)]
        before = [json.loads(self.store.get(key)) for key in keys]
        time.sleep(3 * self.interval)
        self._publish()
        after = [json.loads(self.store.get(key)) for key in keys]
        lines = []
        for rank, (old, new) in enumerate(zip(before, after)):
            line = f"rank {rank} of {self.process.world_size}: {new[1]} steps done, {new[2]}"
            if rank == self.process.rank:
                line = f"{line} {names()}".rstrip() + " (this rank)"
            lines.append(line + ("; NO SIGN OF LIFE: stopped, killed or cut off" if old[0] == new[0] else ""))
        silent = [rank for rank in range(len(after)) if before[rank][0] == after[rank][0]]
        progress = [(new[1], new[2] != "waiting for data") for new in after]
        behind = silent or [rank for rank in range(len(after)) if progress[rank] == min(progress)]
        ranks = " and ".join(f"rank {rank}" for rank in behind)
        verdict = "all ranks are equally far" if len(behind) == len(after) else (
            f"{ranks} of {len(after)} block{'s' * (len(behind) == 1)} the others")
        return verdict + "\n  " + "\n  ".join(lines)

    def _end(self, report: str) -> None:
        times = f"{self.patience:g} x " * (self.patience != 1)
        advice = "Continue the run from its last checkpoint with --resume. " * (self.program == "train.py")
        print(f"\n{self.program}: no progress for {times}{self.timeout:g} s (--timeout): {report}\n"
              f"{advice}The stack of this process:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        sys.stderr.flush()
        _kill_workers()
        os._exit(self.EXIT_CODE)


def _kill_workers() -> None:
    """A worker that hangs would outlive this process."""
    for worker in multiprocessing.active_children():
        worker.kill()


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator_states(device: torch.device) -> dict:
    """The states of the generators of this process: Python's, NumPy's, torch's and the GPU's.

    Workers of the loader have no state: their random numbers are a function of seed, epoch and sample.
    """
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(), "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generator_states(states: dict, device: torch.device) -> None:
    """The inverse of `generator_states`."""
    version, numbers, following = states["python"]
    random.setstate((version, tuple(numbers), following))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
