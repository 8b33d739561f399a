"""Heads."""

import torch
from einops import rearrange
from torch import Tensor, nn


class BoxHead(nn.Module):
    """The class token of fused text asks each of the `side * side` patches whether it is what the text is about; the
    centre of the box is the mean of the patches' places by their attention (a soft argmax), corrected, like the size,
    by an MLP on the token.

    An MLP alone would need places in V', and tokens that only ever had to say what is to be seen have lost them.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        if side < 2:
            raise ValueError("grounding finds a box among the patches of an image, and there is only one: "
                             "patch_size has to be smaller than image_size")
        self.side = side
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.correct = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """token `b d`, patches `b n d`, row by row -> boxes `b 4`, each number between 0 and 1."""
        scores = torch.einsum("b d, b n d -> b n", self.query(token), self.key(patches)) * token.shape[1] ** -0.5
        chances = rearrange(scores.softmax(dim=1), "b (h w) -> b h w", h=self.side, w=self.side)
        middles = (torch.arange(self.side, device=chances.device, dtype=chances.dtype) + 0.5) / self.side
        # Sums of products, not matrix products, which autocast would round to bfloat16.
        x, y = ((chances.sum(dim=other) * middles).sum(dim=1) for other in (1, 2))
        centre = torch.stack([x, y], dim=1)
        return (torch.cat([centre.logit(), torch.zeros_like(centre)], dim=1) + self.correct(token)).sigmoid()
