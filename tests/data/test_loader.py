"""The loader: batches do not depend on workers, prefetching, or the random state of the run; faults end it cleanly."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from data_helpers import VIDEOS, assert_equal_batches, batches_of, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.data.loader import prefetch
from mplug2.data.media import MediaError


def test_batches_are_the_same_with_any_number_of_workers_and_from_any_step(root, tokenizer):
    expected = batches_of(root, tokenizer, workers=0)
    assert_equal_batches(batches_of(root, tokenizer, workers=2), expected)
    assert_equal_batches(batches_of(root, tokenizer, workers=0, start=4), expected[4:])
    other = batches_of(root, tokenizer, workers=0, seed=1)
    assert any(one["source"] != two["source"] for one, two in zip(expected, other))


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
