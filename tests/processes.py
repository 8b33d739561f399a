"""Several real processes, joined by gloo, that serve a test file: each test sends them a function and arguments."""

import gc
import os
import socket
import time
import traceback
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from mplug2.distributed import init_distributed, shutdown


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(rank: int, world: int, jobs: mp.Queue, results: mp.Queue) -> None:
    """The loop of one process: run each job, inside a process group or, if not `joined`, without one."""
    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported: collections need not look at it
    while (job := jobs.get()) is not None:
        function, arguments, port, size, joined = job
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "LOCAL_WORLD_SIZE": str(2 if size == 4 else size)}  # four processes stand for two nodes of two
        try:
            if joined:
                init_distributed("cpu")
            results.put(function(*arguments))
        except BaseException:  # reported to the test that sent the job
            results.put(Failed(traceback.format_exc()))
        shutdown()
        gc.collect()  # frees the process group, whose threads would keep running


class Failed(str):
    """The traceback of a process that failed."""


LIBRARIES = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.debug", "hypothesis", "pytest"]
"""Imported once, by the server that all processes are forked from. Every optimizer imports `torch._dynamo`. mplug2 is
not among them: mutmut changes it."""


class Processes:
    """`world` processes that run the same function at the same time."""

    def __init__(self, world: int):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self.queues = [(context.Queue(), context.Queue()) for _ in range(world)]
        self.processes = [
            context.Process(target=serve, args=(rank, world, *queues), daemon=True)
            for rank, queues in enumerate(self.queues)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *arguments: tuple, joined: bool = True) -> list:
        """Call `function(*arguments[rank])` on one process per tuple of arguments, and return the results by rank.

        The processes form a group. If not `joined`, only the environment variables of a group are set."""
        try:
            return self._run(function, arguments, joined)
        except BaseException:  # among them the time limit of a test: a process that is stuck would keep a core busy
            self.kill()
            raise

    def _run(self, function: Callable, arguments: tuple, joined: bool) -> list:
        assert all(process.is_alive() for process in self.processes), "an earlier test has ended a process"
        port = free_port()
        for (jobs, _), own in zip(self.queues, arguments):
            jobs.put((function, own, port, len(arguments), joined))
        found = []
        for (_, results), process in zip(self.queues[: len(arguments)], self.processes):
            while results.empty() and process.is_alive() and not any(isinstance(result, Failed) for result in found):
                time.sleep(0.02)
            found.append(results.get(timeout=60 if process.is_alive() else 1))
            assert not isinstance(found[-1], Failed), found[-1]
        return found

    def close(self) -> list[int | None]:
        """End all processes, and return their exit codes."""
        for jobs, _ in self.queues:
            jobs.put(None)
        for process in self.processes:
            process.join(timeout=30)
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """End the processes that are left. Threads of gloo may spin in a process whose peer is gone."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join(timeout=10)
