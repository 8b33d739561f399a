"""Several texts about the same images or videos as one tensor, so that one large pass encodes all of them.

Axes: b images or videos, r texts about each of them, l tokens.
"""

import torch
from torch import Tensor


def pad_and_concat(texts: list[Tensor], b: int) -> Tensor:
    """Several texts about the same b images or videos, each `(b r) l ...` with its own r and l -> one `(b r) l ...`,
    padded with zeros. The texts about one image or video are consecutive."""
    length = max(text.shape[1] for text in texts)
    padded = [torch.cat([text, text.new_zeros(text.shape[0], length - text.shape[1], *text.shape[2:])], dim=1)
              for text in texts]
    return torch.cat([text.unflatten(0, (b, -1)) for text in padded], dim=1).flatten(0, 1)


def split_padded(joined: Tensor, counts: list[int], b: int) -> list[Tensor]:
    """The inverse of `pad_and_concat`, padding kept: `(b r) ...` for each r of `counts`."""
    return [part.flatten(0, 1) for part in joined.unflatten(0, (b, -1)).split(counts, dim=1)]
