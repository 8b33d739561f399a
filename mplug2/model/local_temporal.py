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
from mplug2.model.kernels import depthwise_conv, quick_gelu_linear
from mplug2.model.shapes import check


class TemporalConv(nn.Module):
    """A convolution over 3 frames, zero beyond the ends: `b t n r` -> `b t n r`.

    Depth-wise (as many groups as channels, as released) it is three shifted products in the token layout; with fewer
    groups (the paper's figure) it is torch's conv1d at every place.
    """

    kernel_size = 3

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.channels, self.groups = channels, groups
        self.weight = nn.Parameter(torch.empty(channels, channels // groups, self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == self.channels:
            return depthwise_conv(x, self.weight, self.bias)
        b, t, n = x.shape[:3]
        series = rearrange(x, "b t n r -> (b n) r t", b=b, t=t, n=n, r=self.channels)
        series = F.conv1d(series, self.weight, self.bias, padding=self.kernel_size // 2, groups=self.groups)
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
        change = quick_gelu_linear(self.conv(self.down(self.norm(x))), self.up)
        check(change, "b t n d", **sizes)
        return change
