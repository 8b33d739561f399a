"""Several real processes, joined by gloo, which serve a test file: each test hands them a function and arguments."""

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
    """The life of one of the processes: do what is asked, within a group, or by something that joins one itself."""
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        function, arguments, port, size, joined = job
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if joined:
            init_distributed("cpu")
        try:
            results.put(function(*arguments))
        except BaseException:  # the test that asked has to hear of it, whatever it is
            results.put(Failed(traceback.format_exc()))
        shutdown()


class Failed(str):
    """What a process said when it failed."""


class Processes:
    """Up to `world` processes, which do the same at the same time."""

    def __init__(self, world: int):
        context = mp.get_context("spawn")
        self.queues = [(context.Queue(), context.Queue()) for _ in range(world)]
        self.processes = [
            context.Process(target=serve, args=(rank, world, *queues), daemon=True)
            for rank, queues in enumerate(self.queues)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *arguments: tuple, joined: bool = True) -> list:
        """`function` of `arguments[rank]` on as many processes as there are arguments; what each of them returned.
        They are joined in a group, or, if not `joined`, only told how to meet."""
        port = free_port()
        for (jobs, _), own in zip(self.queues, arguments):
            jobs.put((function, own, port, len(arguments), joined))
        found = []
        for (_, results), process in zip(self.queues[: len(arguments)], self.processes):
            while results.empty() and process.is_alive() and not any(isinstance(one, Failed) for one in found):
                time.sleep(0.02)
            found.append(results.get(timeout=60))
            assert not isinstance(found[-1], Failed), found[-1]
        return found

    def close(self) -> list[int | None]:
        """Let all end; their exit codes."""
        for jobs, _ in self.queues:
            jobs.put(None)
        for process in self.processes:
            process.join(timeout=60)
        return [process.exitcode for process in self.processes]
