"""The local temporal module: by default the only place in the vision encoder where frames exchange information.

    LT(x) = U( quick_gelu( G( D( LN(x) ) ) ) )

D and U are linear, from width d to d/2 and back. G is a convolution over 3 frames, for every patch position
separately. One module therefore reaches one frame to each side, and a stack of j modules reaches j frames. U starts at
zero, so a new module changes nothing: the encoder starts as the image encoder that it is initialized from.

Figure 2(b) draws G in groups. The released code makes it depth-wise: it is UniFormerV2's local module (Li et al. 2022;
`lmhra1` and `lmhra2` in the released files) with LayerNorm in place of BatchNorm, a reduction of 2 and a QuickGELU.

Axes: b batch, t frames, n patches per frame, d vision width, z = d/2 channels of the convolution.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.config import ModelConfig
from mplug2.model.kernels import depthwise_conv, quick_gelu_linear
from mplug2.model.shapes import check


class TemporalConv(nn.Module):
    """Convolution over 3 frames, zero-padded at both ends: `b t n z` -> `b t n z`.

    With as many groups as channels (depth-wise) it uses `kernels.depthwise_conv`, otherwise torch's conv1d.
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
        series = rearrange(x, "b t n z -> (b n) z t", b=b, t=t, n=n, z=self.channels)
        series = F.conv1d(series, self.weight, self.bias, padding=self.kernel_size // 2, groups=self.groups)
        return rearrange(series, "(b n) z t -> b t n z", b=b, t=t, n=n, z=self.channels)


class LocalTemporal(nn.Module):
    """Patches `b t n d` -> their change `b t n d`, which the caller adds to them. Class tokens bypass the module."""

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
        """Set U to zero, weight and bias."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        sizes = check(x, "b t n d", d=self.width)
        change = quick_gelu_linear(self.conv(self.down(self.norm(x))), self.up)
        check(change, "b t n d", **sizes)
        return change
