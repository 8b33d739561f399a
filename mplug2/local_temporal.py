"""The local temporal module: the only place where frames meet in the vision encoder (section 3.1 of the paper).

    LT(x) = U( quick_gelu( G( D( LN(x) ) ) ) )        x: the patches of all frames, at every place separately

D: d -> d/2 and U: d/2 -> d are linear; G is a convolution over 3 frames. One module sees one frame to each side, so a
stack of j modules sees j. U starts at zero: a new module changes nothing, and the encoder starts as the image encoder
that it was initialised from.

Axes: b batch, t frames, n patches a frame, d width, r = d/2, k = 3 kernel taps, g groups.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.config import ModelConfig
from mplug2.shapes import check

QUICK = 1.702
"""CLIP's approximation of GELU is quick_gelu(x) = x * sigmoid(1.702 x) = silu(1.702 x) / 1.702. The two factors ride on
the matrix products before and after it, where they cost nothing."""


def scaled_linear(layer: nn.Linear, x: Tensor, factor: float, bias_factor: float = 1.0) -> Tensor:
    """factor * x W^T + bias_factor * bias, for x `... d`."""
    out = torch.addmm(layer.bias * bias_factor, x.flatten(0, -2), layer.weight.T, alpha=factor)
    return out.unflatten(0, x.shape[:-1])


class TemporalConv(nn.Module):
    """A convolution over 3 frames, zero beyond the ends: `b t n r` -> `b t n r`.

    Depth-wise (as many groups as channels, as released) it is three shifted products in the token layout; with fewer
    groups (the paper's figure) it is torch's conv1d at every place.
    """

    taps = 3

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.channels, self.groups = channels, groups
        self.weight = nn.Parameter(torch.empty(channels, channels // groups, self.taps))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        b, t, n = x.shape[:3]
        if self.groups == self.channels:
            out, padded = self.bias, F.pad(x, (0, 0, 0, 0, self.taps // 2, self.taps // 2))
            for tap, weight in enumerate(self.weight[:, 0].unbind(dim=1)):
                out = torch.addcmul(out, padded[:, tap : tap + t], weight)
            return out
        series = rearrange(x, "b t n r -> (b n) r t", b=b, t=t, n=n, r=self.channels)
        series = F.conv1d(series, self.weight, self.bias, padding=self.taps // 2, groups=self.groups)
        return rearrange(series, "(b n) r t -> b t n r", b=b, t=t, n=n, r=self.channels)


class LocalTemporal(nn.Module):
    """`b t n d` -> `b t n d`, to be added to the patches by the caller. Class tokens do not come here."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width = config.vision_width
        channels = self.width // 2
        self.norm = nn.LayerNorm(self.width, eps=1e-5)
        self.down = nn.Linear(self.width, channels)
        self.conv = TemporalConv(channels, config.local_temporal_groups or channels)
        self.up = nn.Linear(channels, self.width)
        self.reset_up()

    def reset_up(self) -> None:
        """Back to the zero start."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        sizes = check(x, "b t n d", d=self.width)
        hidden = F.silu(QUICK * self.conv(self.down(self.norm(x))))
        change = scaled_linear(self.up, hidden, 1 / QUICK)
        check(change, "b t n d", **sizes)
        return change
