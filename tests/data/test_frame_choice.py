"""Which frames of a video are read: one from each segment of time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.data.frame_choice import choose_frames, segment_indices

seeds = st.none() | st.integers(0, 2**32)


def generator(seed: int | None) -> np.random.Generator | None:
    return None if seed is None else np.random.default_rng(seed)


@given(st.integers(1, 500), st.integers(1, 40), seeds)
@settings(max_examples=80, deadline=None)
def test_one_frame_of_each_equal_segment(total, frames, seed):
    numbers = segment_indices(total, frames, generator(seed))
    assert numbers.shape == (frames,)
    if total < frames:
        assert numbers.tolist() == [*range(total), *[total - 1] * (frames - total)]
    else:
        for segment, number in enumerate(numbers.tolist()):  # exact, in integers
            assert segment * total // frames <= number < (segment + 1) * total // frames


@given(st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_without_a_generator_it_is_the_middle_and_with_one_any_frame_of_the_segment(length, frames):
    """In segments of `length` frames, the middle one has as many frames before it as behind it, or one fewer."""
    starts = np.arange(frames) * length
    assert segment_indices(length * frames, frames).tolist() == (starts + (length - 1) // 2).tolist()
    rng = np.random.default_rng(0)
    drawn = {int(segment_indices(length * frames, frames, rng)[-1]) - int(starts[-1]) for _ in range(20 * length)}
    assert min(drawn) == 0 and max(drawn) == length - 1


@pytest.mark.parametrize("total, frames", [(0, 4), (4, 0), (4, -1)])
def test_no_frames_are_refused(total, frames):
    with pytest.raises(ValueError, match=f"{frames} of {total} frames: expected"):
        segment_indices(total, frames)


@given(st.integers(1, 3000), st.integers(1, 40), seeds, st.floats(0.001, 1e6))
@settings(max_examples=80, deadline=None)
def test_at_a_constant_rate_the_choice_is_that_of_equal_segments(total, frames, seed, duration):
    expected = segment_indices(total, frames, generator(seed)).tolist()
    assert choose_frames([duration] * total, frames, generator(seed)) == expected


@given(st.integers(1, 3000), st.integers(1, 40), seeds, st.sampled_from([24, 25, 29.97, 30, 59.94, 120]))
@settings(max_examples=80, deadline=None)
def test_rounded_time_stamps_change_nothing(total, frames, seed, rate):
    """WebM and MKV round the times of a constant rate to ms."""
    times = np.rint(np.arange(total + 1) * 1000 / rate)
    expected = segment_indices(total, frames, generator(seed)).tolist()
    assert choose_frames(np.diff(times), frames, generator(seed)) == expected


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=60), st.data(), seeds)
@settings(max_examples=80, deadline=None)
def test_at_a_variable_rate_the_chosen_frames_are_shown_in_their_segment_of_time(durations, data, seed):
    frames = data.draw(st.integers(1, len(durations) - 1))
    chosen = choose_frames(durations, frames, generator(seed))
    assert len(chosen) == frames and chosen == sorted(chosen)
    ends, total = np.cumsum(durations), len(durations)
    for segment, number in enumerate(chosen):
        # The segments are those of the resampled video: of whole frames of equal duration.
        first, last = (bound * total // frames * ends[-1] / total for bound in (segment, segment + 1))
        assert ends[number] > first and ends[number] - durations[number] < last


def test_a_long_frame_at_the_end_fills_its_share():
    """Nine frames in the first second, the tenth for nine seconds."""
    assert choose_frames([1 / 9] * 9 + [9], 5) == [4, 9, 9, 9, 9]
    assert choose_frames([1] * 9 + [9], 3) == [2, 8, 9]
    assert choose_frames([1, 3], 1) == [1]  # a frame is shown from the moment on at which the one before it ends


@pytest.mark.parametrize("frames", [3, 4, 6])
def test_no_more_frames_than_asked_are_all_shown_whatever_their_durations(frames):
    assert choose_frames([1, 100, 1], frames) == [0, 1, 2, 2, 2, 2][:frames]


def test_none_asks_for_all_frames():
    assert choose_frames([1, 5, 2], None) == [0, 1, 2]
