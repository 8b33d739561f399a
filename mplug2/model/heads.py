"""The head for visual grounding: a box in an image. All other heads are linear layers or `LanguageModelHead`.

This head is ours. In the lineage (mPLUG; a class of it remains in the released code), the decoder writes the box as
four location tokens.

Axes: b batch, h w rows and columns of patches, n = h*w patches, d width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn


class BoxHead(nn.Module):
    """The center of the box is a soft argmax: the mean position of the patches, weighted by the attention of the class
    token of the fused text to them. An MLP on that token corrects the center and predicts the size.

    An MLP alone would need positions in V', whose tokens have lost them: pre-training only asks what is in an image.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        if side < 2:
            raise ValueError("the image is a single patch, but grounding finds a box among several patches: "
                             "choose a patch_size smaller than image_size")
        self.side = side
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.correct = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """Class token `b d`, patches `b n d`, row by row -> boxes `b 4`: center x, center y, width and height, as
        fractions of the image."""
        scores = torch.einsum("b d, b n d -> b n", self.query(token), self.key(patches)) * token.shape[1] ** -0.5
        weights = rearrange(scores.softmax(dim=1), "b (h w) -> b h w", h=self.side, w=self.side)
        centers = (torch.arange(self.side, device=weights.device, dtype=weights.dtype) + 0.5) / self.side
        # Sums of products instead of matrix products, which autocast would round to bfloat16.
        x = (weights.sum(dim=1) * centers).sum(dim=1)  # summed over the rows, one weight per column is left
        y = (weights.sum(dim=2) * centers).sum(dim=1)
        center = torch.stack([x, y], dim=1)
        # The correction is added before the sigmoid, so that every number stays between 0 and 1.
        return (torch.cat([center.logit(), torch.zeros_like(center)], dim=1) + self.correct(token)).sigmoid()
