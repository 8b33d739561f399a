"""`check`: right shapes bind the names, wrong ones are refused with both shapes, and it compiles."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplug2.model.shapes import check

AXES = "b t n l d".split()
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=len(AXES))


@given(shapes)
def test_names_are_bound_to_the_sizes_found(shape):
    assert check(torch.empty(shape), " ".join(AXES[: len(shape)])) == dict(zip(AXES, shape))


@given(shapes)
def test_integers_and_bound_names_accept_their_size_and_underscore_any(shape):
    sizes = dict(zip(AXES, shape))
    assert check(torch.empty(shape), " ".join(map(str, shape))) == {}
    assert check(torch.empty(shape), " ".join("_" * len(shape))) == {}
    assert check(torch.empty(shape), " ".join(sizes), **sizes, other=7) == sizes | {"other": 7}


@given(shapes, st.data())
def test_a_wrong_size_is_refused(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    other = [size + (i == axis) for i, size in enumerate(shape)]
    with pytest.raises(ValueError):
        check(torch.empty(other), " ".join(map(str, shape)))
    with pytest.raises(ValueError):
        check(torch.empty(other), " ".join(AXES[: len(shape)]), **dict(zip(AXES, shape)))


@given(shapes)
def test_a_wrong_number_of_axes_is_refused(shape):
    for pattern in (AXES[: len(shape) - 1], [*AXES[: len(shape)], "_"]):
        with pytest.raises(ValueError):
            check(torch.empty(shape), " ".join(pattern))


def test_a_repeated_name_is_one_size():
    assert check(torch.empty(3, 3), "b b") == {"b": 3}
    with pytest.raises(ValueError):
        check(torch.empty(3, 4), "b b")


def test_an_axis_of_size_one_does_not_broadcast():
    with pytest.raises(ValueError):
        check(torch.empty(1, 5), "b l", b=2)


def test_the_error_says_what_was_expected_and_what_was_found():
    with pytest.raises(ValueError, match=re.escape("expected shape (b 3 l d) with b=2, d=8, found (2, 3, 5, 7)")):
        check(torch.empty(2, 3, 5, 7), "b 3 l d", b=2, d=8, unused=1)
    with pytest.raises(ValueError, match=re.escape("expected shape (b l), found (5,)")):
        check(torch.empty(5), "b l")


def test_it_compiles_to_a_full_graph():
    def double(x, y):
        sizes = check(y, "b l d", **check(x, "b l 4"))
        return x.sum() * sizes["b"] + y.sum() * sizes["d"]

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    for b, l in ((2, 3), (5, 7)):  # the second shape makes the sizes symbols
        x, y = torch.randn(b, l, 4), torch.randn(b, l, 6)
        assert torch.equal(compiled(x, y), double(x, y))
