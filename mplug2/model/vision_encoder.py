"""The dual-vision encoder (Figure 2(b)): one ViT for images and videos, with local temporal modules (LT) for videos.

Attention and MLP work within each frame, so images and videos share them. Only LT sees the order of the frames.

The released code has one class token per frame, and averages them at the end. Figure 2(b) draws one class token for all
frames, but not how it takes part in attention within frames. Our reading: in every frame it attends to the patches and
they attend to it, and its change is the mean over the frames. The code stores it once per frame, with equal values.

Axes: b batch, t frames, n patches per frame, f = 1 + n tokens per frame, v = 1 + t*n visual tokens, d vision width.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.config import ModelConfig
from mplug2.model.attention import SelfAttention
from mplug2.model.kernels import quick_gelu_mlp
from mplug2.model.layers import Block, DropPath
from mplug2.model.local_temporal import LocalTemporal
from mplug2.model.patch_embed import PatchEmbed
from mplug2.model.shapes import check


class VisionBlock(Block):
    """Pre-norm transformer block on `b t f d`. Every change passes drop path before it is added.

        x[patches] += LT1(x[patches])
        x          += MHSA(LN(x))            multi-head self-attention within each frame
        x[patches] += LT2(x[patches])        released code only; Figure 2(b) has LT1 alone
        x          += MLP(LN(x))
    """

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        width = config.vision_width
        self.lt1 = LocalTemporal(config) if config.local_temporal else None
        self.lt2 = LocalTemporal(config) if self.lt1 and config.local_temporal_placement == "released" else None
        self.temporal_on_images, self.one_class_token = config.temporal_on_images, config.class_token == "figure"
        self.attention_norm = nn.LayerNorm(width, eps=1e-5)
        self.attention = SelfAttention(width, config.vision_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-5)
        self.mlp_up = nn.Linear(width, 4 * width)
        self.mlp_down = nn.Linear(4 * width, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, is_image: bool) -> Tensor:
        """x `b t f d` -> `b t f d`; `is_image`: the pixels were a single frame."""
        b, t, f, d = x.shape
        exchange_frames = self.temporal_on_images or not is_image
        if self.lt1 is not None and exchange_frames:
            x = self.add_to_patches(x, self.lt1)
        frames = rearrange(self.attention_norm(x), "b t f d -> (b t) f d", b=b, t=t, f=f, d=d)
        change = rearrange(self.attention(frames), "(b t) f d -> b t f d", b=b, t=t, f=f, d=d)
        if self.one_class_token:
            shared = reduce(change[:, :, :1], "b t 1 d -> b 1 1 d", "mean", b=b, t=t, d=d)
            change = torch.cat([shared.expand(b, t, 1, d), change[:, :, 1:]], dim=2)
        x = x + self.drop_path(change)
        if self.lt2 is not None and exchange_frames:
            x = self.add_to_patches(x, self.lt2)
        return x + self.drop_path(quick_gelu_mlp(self.mlp_norm(x), self.mlp_up, self.mlp_down))

    def add_to_patches(self, x: Tensor, module: LocalTemporal) -> Tensor:
        """x plus the module's change of the patches; the class token, first in f, stays as it is."""
        return x + F.pad(self.drop_path(module(x[:, :, 1:])), (0, 0, 1, 0))


class VisionEncoder(nn.Module):
    """Pixels `b 3 T H W` -> visual tokens `b v d`: the mean of the class tokens of all frames, then all patches, frame
    by frame. With temporal down-sampling t < T, otherwise t = T."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width = config.vision_width
        self.patch_embed = PatchEmbed(config)
        rates = [config.drop_path * i / max(1, config.vision_layers - 1) for i in range(config.vision_layers)]
        self.blocks = nn.ModuleList(VisionBlock(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(self.width, eps=1e-5)

    def forward(self, pixels: Tensor) -> Tensor:
        sizes = check(pixels, "b 3 T H W")
        x = self.patch_embed(pixels)
        for block in self.blocks:
            x = block(x, is_image=sizes["T"] == 1)
        b, t, f, d = x.shape
        class_token = reduce(x[:, :, :1], "b t 1 d -> b 1 d", "mean", b=b, t=t, d=d)
        patches = rearrange(x[:, :, 1:], "b t n d -> b (t n) d", b=b, t=t, n=f - 1, d=d)
        tokens = self.norm(torch.cat([class_token, patches], dim=1))
        check(tokens, "b v d", b=sizes["b"], v=1 + t * (f - 1), d=self.width)
        return tokens
