"""Charts as SVG: ticks on the axes, and values that no line can show."""

import re

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


def test_ticks_are_the_fewest_round_numbers_with_at_most_five_steps():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1] and ticks(0, 0.5) == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert ticks(0, 12) == [0, 2.5, 5, 7.5, 10, 12.5]


def test_larger_values_are_drawn_higher_and_the_legend_has_the_last_one():
    drawn = chart("a <title>", {"loss/a": [(1, 4.0), (3, 1.0), (4, float("inf")), (5, 2.0)]})
    (points,) = re.findall("points='(.*?)'", drawn)
    (x, first), (_, lowest), (end, last) = (map(float, point.split(",")) for point in points.split())
    assert first < last < lowest < 197 and x < end == 412 and drawn.count("<circle") == 3
    assert "</i>a 2</span>" in drawn and "a: 2 at step 5" in drawn and "a &lt;title&gt;" in drawn
    many = chart("t", {"a": [(step, 1.0) for step in range(1, 20)]})
    assert "<circle" not in many and "<polyline" in many


def test_values_of_zero_have_no_logarithmic_axis():
    assert ", logarithmic" not in chart("a", {"a": [(1, 0.0), (2, 10.0)]}, log=True)
    assert ", logarithmic" in chart("a", {"a": [(1, 0.1), (2, 10.0)]}, log=True)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(allow_nan=True, allow_infinity=True)), max_size=5),
       st.booleans())
def test_any_values_can_be_drawn(points, log):
    drawn = chart("a title", {"a": points}, log)
    assert "nan" not in drawn and "inf" not in drawn
