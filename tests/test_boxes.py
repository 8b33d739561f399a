"""Overlap of boxes, counted in the cells of a grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.boxes import generalized_iou


def cells_of(box: list[float], size: int = 40) -> set[tuple[int, int]]:
    """The cells of a fine grid that a box of whole cells covers."""
    cx, cy, w, h = (value * size for value in box)
    xs, ys = range(round(cx - w / 2), round(cx + w / 2)), range(round(cy - h / 2), round(cy + h / 2))
    return {(x, y) for x in xs for y in ys}


@st.composite
def boxes_of_cells(draw) -> list[float]:
    x, y = draw(st.integers(0, 38)), draw(st.integers(0, 38))
    w, h = 2 * draw(st.integers(1, max(1, (40 - x) // 2))), 2 * draw(st.integers(1, max(1, (40 - y) // 2)))
    return [(x + w / 2) / 40, (y + h / 2) / 40, w / 40, h / 40]


@settings(max_examples=60)
@given(boxes_of_cells(), boxes_of_cells())
def test_iou_and_giou_are_counts_of_cells_and_symmetric(one, other):
    cells, others = cells_of(one), cells_of(other)
    xs, ys = zip(*(cells | others))
    enclosing, union = (max(xs) - min(xs) + 1) * (max(ys) - min(ys) + 1), len(cells | others)
    boxes, other_boxes = torch.tensor([one], dtype=torch.double), torch.tensor([other], dtype=torch.double)
    iou, giou = generalized_iou(boxes, other_boxes)
    assert iou.item() == pytest.approx(len(cells & others) / union)
    assert giou.item() == pytest.approx(len(cells & others) / union - (enclosing - union) / enclosing)
    assert generalized_iou(other_boxes, boxes)[1].item() == pytest.approx(giou.item())


def test_small_boxes_overlap_like_large_ones():
    one, other = torch.tensor([[0.5, 0.5, 0.4, 0.2]]), torch.tensor([[0.6, 0.5, 0.4, 0.2]])
    for scale in (1.0, 0.05, 1e-3):
        iou, giou = generalized_iou(one * scale, other * scale)
        assert iou.item() == pytest.approx(0.6, rel=1e-4) and giou.item() == pytest.approx(0.6, rel=1e-4)


def test_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"expected shape \(b 4\), found \(2, 3\)"):
        generalized_iou(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected shape \(b 4\) with b=2, found \(3, 4\)"):
        generalized_iou(torch.zeros(2, 4), torch.zeros(3, 4))
