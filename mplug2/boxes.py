"""Overlap of boxes (center x, center y, width, height), for the loss and the metrics of visual grounding."""

import torch
from torch import Tensor

from mplug2.model.shapes import check


def generalized_iou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU (Rezatofighi et al. 2019), each `b`, of boxes, both `b 4`.

    GIoU is IoU minus the fraction of the smallest enclosing box that neither box covers. It has a gradient even for
    boxes that do not overlap.
    """
    check(others, "b 4", **check(boxes, "b 4"))
    (low, high), (other_low, other_high) = (
        (box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2) for box in (boxes, others)
    )
    shared = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(dim=1)
    union = boxes[:, 2:].prod(dim=1) + others[:, 2:].prod(dim=1) - shared
    enclosing = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(dim=1)
    iou = shared / union.clamp(min=1e-9)
    return iou, iou - (enclosing - union) / enclosing.clamp(min=1e-9)
