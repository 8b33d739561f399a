"""Pixels to tokens, and back: CLIP's patch embedding, applied to every frame. An image is a video of one frame.

    tokens = LN([class token, linear(patches)] + positions)

Without temporal down-sampling nothing here distinguishes the frames: they have the same class token and positions.

Axes: as in shapes.py, and p: height and width of a patch in pixels. Here k counts the frames that a patch spans.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.model.shapes import check


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """Cut frames into patches, row by row: `b 3 t H W` -> `b t n (3 p p)`. Raises ValueError if they do not fit."""
    sizes = check(pixels, "b 3 t H W")
    b, t, height, width = (sizes[name] for name in ("b", "t", "H", "W"))
    if height % patch or width % patch:
        raise ValueError(f"frames of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}")
    h, w = height // patch, width // patch
    return rearrange(
        pixels, "b three t (h p) (w p2) -> b t (h w) (three p p2)", b=b, three=3, t=t, h=h, w=w, p=patch, p2=patch
    )


def unpatchify(patches: Tensor, patch: int, rows: int) -> Tensor:
    """The inverse of `patchify`, for plots: `b t n (3 p p)` -> `b 3 t H W`, with `rows` rows of patches."""
    sizes = check(patches, "b t n values", values=3 * patch**2)
    if sizes["n"] % rows:
        raise ValueError(f"{sizes['n']} patches cannot be arranged in {rows} rows")
    return rearrange(
        patches, "b t (h w) (three p p2) -> b three t (h p) (w p2)",
        b=sizes["b"], t=sizes["t"], h=rows, w=sizes["n"] // rows, three=3, p=patch, p2=patch,
    )


class PatchEmbed(nn.Module):
    """Pixels `b 3 T H W` -> `b t f d`: for every frame a class token, then n patch tokens.

    With temporal down-sampling a patch spans three frames: its own, the one before and the one after (black beyond the
    ends of the video). Only every `temporal_stride`-th frame then has tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch, self.image_size = config.patch_size, config.image_size
        self.span, self.stride = (3, config.temporal_stride) if config.temporal_stride else (1, 1)
        width, self.positions = config.vision_width, 1 + config.patches
        self.linear = nn.Linear(self.span * 3 * self.patch**2, width, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))  # drawn by `init_weights` in mplug2.py, like `position`
        self.position = nn.Parameter(torch.zeros(self.positions, width))
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, pixels: Tensor) -> Tensor:
        sizes = check(pixels, "b 3 T H W", H=self.image_size, W=self.image_size)
        patches = patchify(pixels, self.patch)
        if self.span == 3:
            patches = self.with_neighbors(patches)
        tokens = self.linear(patches)
        b, t = tokens.shape[:2]
        tokens = torch.cat([self.class_token.expand(b, t, 1, -1), tokens], dim=2) + self.position
        check(tokens, "b t f d", b=sizes["b"], f=self.positions, d=self.position.shape[1])
        return self.norm(tokens)

    def with_neighbors(self, patches: Tensor) -> Tensor:
        """Join each patch with those before and after it in time: `b T n (3 p p)` -> `b t n (k 3 p p)`."""
        black = torch.zeros_like(patches[:, :1])
        windows = torch.cat([black, patches, black], dim=1).unfold(1, self.span, self.stride)
        b, t, n, values, _ = windows.shape
        return rearrange(windows, "b t n values k -> b t n (k values)", b=b, t=t, n=n, values=values, k=self.span)
