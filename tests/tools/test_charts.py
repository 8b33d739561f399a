"""Charts as SVG: ticks on the axes, and values that no line can show."""

from hypothesis import given
from hypothesis import strategies as st

from mplug2.tools.charts import chart, ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_cover_the_values(low, size):
    marks = ticks(low, low + size)
    assert 2 <= len(marks) <= 8 and marks == sorted(set(marks))
    assert marks[0] <= low + 1e-6 * abs(low) + 1e-9 and marks[-1] >= (low + size) * (1 - 1e-6) - 1e-9 or low + size < 0


def test_a_constant_has_one_tick():
    assert ticks(0.002, 0.002) == [0.002] and ticks(0.0, 0.0) == [0.0]


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(allow_nan=True, allow_infinity=True)), max_size=5),
       st.booleans())
def test_any_values_can_be_drawn(points, log):
    drawn = chart("a title", {"a": points}, log)
    assert "nan" not in drawn and "inf" not in drawn
