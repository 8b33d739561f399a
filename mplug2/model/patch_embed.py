"""Pixels to tokens, and back (architecture: section 3.1 of the paper; CLIP's ViT for the numbers).

Axes: b batch, T frames of pixels, t frames of tokens, H W pixels, h w patch rows and columns, n = h*w patches a frame,
p side of a patch, k frames that a patch spans (1, or 3 with temporal down-sampling), d width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.model.shapes import check


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """Cut every frame into patches: `b 3 t H W` -> `b t n (3 p p)`, rows first. ValueError if `patch` does not fit."""
    sizes = check(pixels, "b 3 t H W")
    b, t, height, width = (sizes[name] for name in ("b", "t", "H", "W"))
    if height % patch or width % patch:
        raise ValueError(f"frames of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}")
    h, w = height // patch, width // patch
    return rearrange(
        pixels, "b three t (h p) (w p2) -> b t (h w) (three p p2)", b=b, three=3, t=t, h=h, w=w, p=patch, p2=patch
    )


def unpatchify(patches: Tensor, patch: int, rows: int) -> Tensor:
    """The inverse of `patchify`, for pictures: `b t n (3 p p)` -> `b 3 t H W`, with `rows` patch rows."""
    sizes = check(patches, "b t n values", values=3 * patch**2)
    if sizes["n"] % rows:
        raise ValueError(f"{sizes['n']} patches cannot stand in {rows} rows")
    return rearrange(
        patches, "b t (h w) (three p p2) -> b three t (h p) (w p2)",
        b=sizes["b"], t=sizes["t"], h=rows, w=sizes["n"] // rows, three=3, p=patch, p2=patch,
    )


class PatchEmbed(nn.Module):
    """A video `b 3 T H W` (an image is T = 1) becomes `b t (1+n) d`: a class token and n patch tokens for every frame.

    Each place has a learned position, the same in all frames: nothing here tells the frames apart.
    With temporal down-sampling a patch spans 3 frames, one before and one after its own (black, that is zero, beyond
    the ends), and only every `temporal_stride`-th frame has patches.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch, self.image_size = config.patch_size, config.image_size
        self.span, self.stride = (3, config.temporal_stride) if config.temporal_downsampling else (1, 1)
        width, self.positions = config.vision_width, 1 + config.patches
        self.linear = nn.Linear(self.span * 3 * self.patch**2, width, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(self.positions, width))
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, pixels: Tensor) -> Tensor:
        sizes = check(pixels, "b 3 T H W", H=self.image_size, W=self.image_size)
        patches = patchify(pixels, self.patch)
        if self.span == 3:
            patches = self.neighbours(patches)
        tokens = self.linear(patches)
        b, t = tokens.shape[:2]
        tokens = torch.cat([self.class_token.expand(b, t, 1, -1), tokens], dim=2) + self.position
        check(tokens, "b t m d", b=sizes["b"], m=self.positions, d=self.position.shape[1])
        return self.norm(tokens)

    def neighbours(self, patches: Tensor) -> Tensor:
        """Each patch with the one before and the one after it in time: `b T n (3 p p)` -> `b t n (k 3 p p)`."""
        black = torch.zeros_like(patches[:, :1])
        windows = torch.cat([black, patches, black], dim=1).unfold(1, self.span, self.stride)
        b, t, n, values, _ = windows.shape
        return rearrange(windows, "b t n values k -> b t n (k values)", b=b, t=t, n=n, values=values, k=self.span)
