"""The loader: batches do not depend on workers, prefetching, or the random state of the run; faults end it cleanly."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from data_helpers import VIDEOS, assert_equal_batches, batches_of, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.data import loader
from mplug2.data.loader import default_workers, on_device, prefetch
from mplug2.data.media import MediaError, to_bytes, to_pixels


def test_batches_are_the_same_with_any_number_of_workers_and_from_any_step(root, tokenizer):
    expected = batches_of(root, tokenizer, workers=0)
    assert_equal_batches(batches_of(root, tokenizer, workers=2), expected)
    assert_equal_batches(batches_of(root, tokenizer, workers=0, start=4), expected[4:])
    other = batches_of(root, tokenizer, workers=0, seed=1)
    assert any(one["source"] != two["source"] for one, two in zip(expected, other))


def test_the_next_batch_is_computed_while_one_is_in_use():
    second = threading.Event()

    def batches():
        yield {"number": 1}
        second.set()
        yield {"number": 2}

    ahead = prefetch(batches())
    assert next(ahead) == {"number": 1} and second.wait(timeout=20)
    assert list(ahead) == [{"number": 2}]


def test_workers_ignore_the_signals_that_reach_the_whole_process_group(monkeypatch):
    ignored = []
    monkeypatch.setattr(loader.gc, "freeze", lambda: None)
    monkeypatch.setattr(loader.signal, "signal", lambda *given: ignored.append(given))
    loader.start_worker(0)
    assert ignored == [(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]


def test_workers_that_are_left_are_killed_at_the_end_and_other_processes_are_not(monkeypatch):
    killed = []
    children = [SimpleNamespace(daemon=daemon, kill=lambda daemon=daemon: killed.append(daemon))
                for daemon in (True, False)]
    monkeypatch.setattr(loader.multiprocessing, "active_children", lambda: children)
    monkeypatch.setattr(loader.signal, "signal", lambda *_: None)
    loader.end_workers()
    assert killed == [True]


def test_a_loader_does_not_touch_the_global_random_state(root, tokenizer):
    """A resumed run creates its loader again, and must continue with the random numbers of an uninterrupted run."""
    before = torch.get_rng_state()
    batches_of(root, tokenizer, workers=0)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])  # ending the worker takes seconds
def test_a_run_stops_if_all_videos_are_corrupt(tmp_path, tokenizer, workers):
    write_data(tmp_path)
    for i in range(VIDEOS):
        (tmp_path / f"{i}.gif").write_bytes(b"")
    with pytest.raises(MediaError) as stopped:
        batches_of(tmp_path, tokenizer, workers)
    assert "6 files in a row cannot be decoded; the first: " in str(stopped.value)
    assert ".gif is empty (0 bytes)" in str(stopped.value)


@pytest.mark.slow
def test_a_program_that_fails_with_workers_at_work_ends(tmp_path):
    """When Python exits, the traceback of the error still holds the workers, which ignore SIGTERM."""
    write_data(tmp_path)
    for video in tmp_path.glob("*.gif"):
        video.write_bytes(b"GIF89a")
    program = textwrap.dedent(f"""
        from pathlib import Path
        from data_helpers import batches_of
        from mplug2.data.text import Tokenizer
        batches_of(Path({str(tmp_path)!r}), Tokenizer.train(["a"], 120), workers=1)
    """)
    here = os.pathsep.join(map(str, Path(__file__).parents[1:3]))  # the package and tests/
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                           env={**os.environ, "PYTHONPATH": here})
    assert ended.returncode == 1 and "files in a row cannot be decoded" in ended.stderr, ended.stderr


@given(st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_prefetch_computes_one_batch_ahead_and_keeps_the_order(count, taken):
    made = []
    batches = prefetch(made.append(i) or {"step": i} for i in range(count))
    for i in range(min(taken, count)):
        assert next(batches) == {"step": i}
    time.sleep(0.001)
    assert len(made) <= taken + 1
    assert [batch["step"] for batch in batches] == list(range(taken, count))


def test_an_error_in_a_prefetched_batch_is_raised_when_the_batch_is_due():
    def failing():
        yield {"step": 0}
        raise MediaError("broken.gif")

    batches = prefetch(failing())
    assert next(batches) == {"step": 0}
    with pytest.raises(MediaError, match="broken.gif"):
        next(batches)


@pytest.mark.parametrize("cores, ranks, expected", [(1, 1, 1), (6, 1, 5), (16, 1, 8), (64, 8, 7), (208, 8, 8)])
def test_with_gpus_each_rank_has_as_many_workers_as_cores_but_one(monkeypatch, cores, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert default_workers(torch.device("cuda:0")) == expected
    assert default_workers(torch.device("cpu")) == 0


# ---- to the device ---------------------------------------------------------------------------------------------------


def raw_batch(seed: int) -> tuple[dict, torch.Tensor]:
    """A batch with two images as bytes, and its normalized pixels."""
    images = [np.random.default_rng((seed, i)).integers(0, 256, (1, 8, 8, 3), np.uint8) for i in range(2)]
    batch = {"kind": "image", "source": ["a", "b"], "label": torch.tensor([1, 2]),
             "pixels": torch.stack([to_bytes(image, 8) for image in images])}
    return batch, torch.stack([to_pixels(image, 8) for image in images])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_travel_as_bytes_and_are_normalized_on_the_device(device):
    batches, expected = zip(*map(raw_batch, range(3)))
    moved = list(prefetch(on_device(batches, torch.device(device))))
    assert len(moved) == 3
    for batch, found, pixels in zip(batches, moved, expected):
        assert {name: found[name] for name in ("kind", "source")} == {"kind": "image", "source": ["a", "b"]}
        assert found["label"].cpu().equal(batch["label"]) and found["label"].device.type == device
        assert found["pixels"].dtype == torch.float32 and found["pixels"].device.type == device
        if device == "cpu":
            assert found["pixels"].equal(pixels)
        torch.testing.assert_close(found["pixels"].cpu(), pixels)
    text = {"kind": "text", "label": torch.tensor([1])}
    assert list(on_device([text], torch.device("cpu"))) == [text]


def test_copies_to_a_gpu_have_a_stream_of_their_own_and_the_step_waits_for_them():
    """Without a GPU: the calls, in their order."""
    calls, device = [], torch.device("cuda:3")

    @contextmanager
    def stream(one):
        calls.append("copies")
        yield
        calls.append("back")

    steps = Mock(wait_stream=lambda other: calls.append("wait"))
    with (patch("torch.cuda.Stream", return_value="copies"), patch("torch.cuda.stream", stream),
          patch("torch.cuda.default_stream", return_value=steps),
          patch.object(torch.Tensor, "to", lambda self, to, non_blocking: calls.append((to, non_blocking)) or self),
          patch.object(torch.Tensor, "record_stream", lambda self, to: calls.append((self.dtype, to)))):
        next(on_device([raw_batch(0)[0]], device))
    assert calls == ["copies", (device, True), (device, True), "back", "wait", (torch.int64, steps),
                     (torch.float32, steps)]
