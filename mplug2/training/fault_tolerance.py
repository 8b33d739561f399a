"""What keeps a run from losing work: signals that ask it to stop, generators that go on where they were, and a watchdog
for processes that hang.

    with GracefulStop() as stop, Watchdog(process, timeout=600) as watchdog:
        watchdog.heartbeat(step, "waiting for data")
        ...
        if any process has a stop.name: save, and leave the loop
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
    """SIGTERM and SIGINT are noted instead of obeyed: `name` is that of the last one, or empty."""

    def __init__(self):
        self.name = ""

    def __enter__(self) -> "GracefulStop":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _frame) -> None:
        self.name = signal.Signals(number).name

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends the process with exit code 70 when it has not called `heartbeat` for `timeout` seconds, and names who hangs.

    Every process tells a shared store, from a thread of its own, where it is. Whoever waits in vain reads the store,
    twice: a process whose word has not changed is stopped or dead; else those that are furthest behind hold up the
    others. It also prints its own stack. `torchrun --max-restarts` then starts again from the last checkpoint.
    """

    EXIT_CODE = 70

    def __init__(self, process: DistInfo, timeout: float):
        self.process, self.timeout, self.interval = process, timeout, min(1.0, timeout / 4)
        self.store = None
        if process.world_size > 1:  # a connection of its own: the group's may be what hangs
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            store.set_timeout(timedelta(seconds=30))
            self.store = dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.over, self.count = threading.Event(), 0
        self.heartbeat(0, "starting")

    def heartbeat(self, step: int, doing: str, patience: float = 1.0, names: Callable[[], str] = str) -> None:
        """Something goes on: `step` is the number of steps done, `patience` a factor for what may take longer than a
        step, `names` says, if it comes to that, which files were at work."""
        self.position = (time.monotonic() + self.timeout * patience, step, doing, names)

    def __enter__(self) -> "Watchdog":
        self._tell()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()

    def _tell(self) -> None:
        self.count += 1
        if self.store:
            _, step, doing, _ = self.position
            self.store.set(str(self.process.rank), json.dumps([self.count, step, doing]))

    def _watch(self) -> None:
        while not self.over.wait(self.interval):
            late = time.monotonic() > self.position[0]
            try:
                self._tell()
                report = self._report() if late else ""
            except RuntimeError as error:  # the store went with the process that had it
                report = f"the store of all processes cannot be reached ({error})" if late else ""
            if late and not self.over.is_set() and time.monotonic() > self.position[0]:
                self._end(report)

    def _report(self) -> str:
        """Who holds up whom."""
        _, step, doing, names = self.position
        if not self.store:
            return f"the process has been at the same place since step {step}: {doing} {names()}".rstrip()
        keys = [str(rank) for rank in range(self.process.world_size)]
        before = [json.loads(self.store.get(key)) for key in keys]
        time.sleep(3 * self.interval)
        self._tell()
        now = [json.loads(self.store.get(key)) for key in keys]
        lines = []
        for rank, (old, new) in enumerate(zip(before, now)):
            line = f"process {rank} of {self.process.world_size}: {new[1]} steps done, {new[2]}"
            if rank == self.process.rank:
                line = f"{line} {names()}".rstrip() + " (this process)"
            lines.append(line + ("; NO SIGN OF LIFE: stopped, killed or cut off" if old[0] == new[0] else ""))
        silent = [rank for rank in range(len(now)) if before[rank][0] == now[rank][0]]
        place = [(new[1], new[2] != "waiting for data") for new in now]
        behind = silent or [rank for rank in range(len(now)) if place[rank] == min(place)]
        who = " and ".join(f"process {rank}" for rank in behind)
        told = f"{who} of {len(now)} hold{'s' * (len(behind) == 1)} up the others" if len(behind) < len(now) else (
            "all processes are at the same place")
        return told + "\n  " + "\n  ".join(lines)

    def _end(self, report: str) -> None:
        print(f"\ntrain.py: nothing went on for {self.timeout:g} seconds (--timeout): {report}\n"
              "The run goes on from its last checkpoint by --resume. What this process is doing:",
              file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        sys.stderr.flush()
        for worker in multiprocessing.active_children():  # one that hangs would not notice that nobody waits for it
            worker.kill()
        os._exit(self.EXIT_CODE)


def generator_states(device: torch.device) -> dict:
    """All random generators of this process: Python's, NumPy's, torch's and the GPU's. (The workers of the loader have
    none: what they draw is a function of seed, epoch and sample.)"""
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
