"""Loader: runs `Samples` and `Collate` in worker processes, or, without workers, in one thread ahead of training."""

import atexit
import gc
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader

from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.samples import Samples


def make_loader(dataset: Samples, batches: MixedBatches, collate: Collate, workers: int, pin: bool) -> DataLoader:
    """A DataLoader over `batches`. `pin` puts the tensors into pinned memory, for faster copies to a GPU."""
    # The loader gets a generator of its own. Otherwise it would draw from torch's global generator, and a resumed run,
    # which creates its loader again, would continue with other random numbers than an uninterrupted run.
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None, generator=torch.Generator(), worker_init_fn=start_worker,
    )


def start_worker(_: int) -> None:
    """Prepare a worker process.

    Freezing the garbage collector keeps collections cheap: they pass over everything that the process began with.
    Workers ignore SIGINT and SIGTERM, which reach the whole process group: the training process needs its batches until
    it has saved a checkpoint, and the workers end with it.
    """
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def prefetch(batches: Iterable[dict]) -> Iterator[dict]:
    """Compute each batch in a thread while the previous one is in use. This replaces workers where there are none."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = thread.submit(next, batches, None)
            yield batch


@atexit.register
def end_workers() -> None:
    """Kill the workers that are left when Python exits. Python would send them SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the killed workers as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
