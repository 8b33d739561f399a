"""Loader: runs `Samples` and `Collate` in worker processes, or, without workers, in one thread ahead of training, and
moves the batches to the device."""

import atexit
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch.utils.data import DataLoader

from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.media import normalize
from mplug2.data.samples import Samples


def make_loader(dataset: Samples, batches: MixedBatches, collate: Collate, workers: int, pin: bool) -> DataLoader:
    """A DataLoader over `batches`. `pin` puts the tensors into pinned memory, for faster copies to a GPU."""
    # The loader gets a generator of its own. Otherwise it would draw from torch's global generator, and a resumed run,
    # which creates its loader again, would continue with other random numbers than an uninterrupted run.
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None, generator=torch.Generator(), worker_init_fn=start_worker,
    )


def default_workers(device: torch.device) -> int:
    """Worker processes of a rank. On a CPU the model needs the cores: none. With GPUs, the cores of a rank but one."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


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


def on_device(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Batches on a device. Pixels arrive as bytes, and are normalized there.

    On CUDA this has a stream of its own: inside `prefetch`, the next batch is copied while a step runs.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(copies) if copies else nullcontext():
            batch = {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                     for name, value in batch.items()}
            if "pixels" in batch:
                batch["pixels"] = normalize(batch["pixels"])
        if copies:
            steps = torch.cuda.default_stream(device)
            steps.wait_stream(copies)
            for value in batch.values():
                if torch.is_tensor(value):
                    value.record_stream(steps)  # so that its memory is not used again before the step is over
        yield batch


@atexit.register
def end_workers() -> None:
    """Kill the workers that are left when Python exits. Python would send them SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the killed workers as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
