"""The number of CPU threads of a step, while other programs use the machine too.

The threads of torch wait for each other many times per step, and spin while they wait. If one of them shares its core
with another program, all of them wait for that core: with two threads on two cores, one busy program makes a step ten
times as slow. A single thread then loses nothing. So a training run compares, again and again.
"""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

RATE_SIZE = 1024
"""Rows and columns of the matrices of `matrix_rate`."""
REPEATS, PRODUCTS = 2, 100
"""Everything is timed this often. This many products of small matrices are one timing: 10 to 20 ms, several turns of
the scheduler. In less time, a program on the same core may happen to be out of turn."""


class CPUThreads:
    """Uses as many threads as are fastest at the moment. The environment variable OMP_NUM_THREADS fixes the number, and
    so does compilation: torch would compile every block again for another number."""

    def __init__(self, device: torch.device, compiled: bool = False):
        fixed = compiled or device.type != "cpu" or "OMP_NUM_THREADS" in os.environ
        most = torch.get_num_threads()
        self.choices = [most] if fixed else sorted({1, max(1, most // 2), max(1, most - 1), most}, reverse=True)
        self.small = torch.ones(1024, 64), torch.ones(64, 256)

    def choose(self) -> int:
        """Set the number of threads of torch, and return it."""
        if len(self.choices) > 1:
            torch.set_num_threads(min(self.choices, key=lambda number: products_seconds(number, *self.small)))
        return torch.get_num_threads()


def products_seconds(threads: int, a: Tensor, b: Tensor) -> float:
    """The longest time of these products with this number of threads: other programs do not disturb every try."""
    torch.set_num_threads(threads)
    return max(timings(lambda: [a @ b for _ in range(PRODUCTS)]))


def matrix_rate() -> float:
    """FLOP/s of a product of large matrices on this CPU now: a run's minutes times this rate can be compared
    between machines."""
    square = torch.ones(RATE_SIZE, RATE_SIZE)
    return 2 * RATE_SIZE**3 / min(timings(lambda: square @ square))


def timings(run: Callable[[], object]) -> list[float]:
    """Seconds of each of REPEATS runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds
