"""From records to batches: what a training step of each kind sees, and in which order.

A step has one kind of batch, the same on every process, in proportion to given weights: `video`, `image` or `text` in
pre-training; else a kind is a task.
Everything random about a sample (frames, caption, questions, masked words) comes from (seed, kind, epoch, index): a
batch is a function of the step number alone, however many workers and processes there are.

Axes: b samples of this process, r questions a sample, t frames, l text tokens, y classes.
"""

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
    # A generator of its own: else every new loader would draw from torch's, and a resumed run would go on with other
    # random numbers than the run that never stopped.
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None, generator=torch.Generator(), worker_init_fn=start_worker,
    )


def start_worker(_: int) -> None:
    """imageio collects garbage whenever it closes a video: what is there at the start need not be looked at again.

    Signals that ask the run to stop reach its workers too: they go on until the training process has what it needs, and
    end with it."""
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def prefetch(batches: Iterable[dict]) -> Iterator[dict]:
    """Each batch is made by a thread while the one before it is used: what workers do, where there are none."""
    coming = iter(batches)
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(next, coming, None)
        while (batch := made.result()) is not None:
            made = thread.submit(next, coming, None)
            yield batch


@atexit.register
def end_workers() -> None:
    """Python ends what workers are left when it exits by SIGTERM, which they do not hear: it would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
