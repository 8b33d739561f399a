"""The heads for visual grounding: a box in an image. All other heads are linear layers or `LanguageModelHead`.

`BoxHead` is ours. In the lineage (mPLUG; a class of it remains in the released code), the decoder writes the box as
four location tokens: `LocationTokens`.

Axes: b batch, h w rows and columns of patches, n = h*w patches, m memory tokens, p locations, d width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from mplug2.model.attention import Memory
from mplug2.model.decoder import Decoder
from mplug2.model.shapes import check


class LocationTokens(nn.Module):
    """Boxes as four tokens of the decoder, left, top, right, bottom: words of their own, one for every pixel border of
    the image (mPLUG: 337 for 336 pixels). The same embedding reads and writes them."""

    def __init__(self, width: int, image_size: int):
        super().__init__()
        self.last = image_size
        self.location = nn.Embedding(image_size + 2, width)  # the last one starts the sequence

    def tokens(self, boxes: Tensor) -> Tensor:
        """Boxes `b 4` (center x, center y, width, height, as fractions of the image) -> the nearest locations `b 4`."""
        check(boxes, "b 4")
        center, size = boxes.chunk(2, dim=1)
        corners = torch.cat([center - size / 2, center + size / 2], dim=1)
        return (corners * self.last).round().long().clamp(0, self.last)

    def boxes(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`, `b 4` -> `b 4`. A right border left of the left one makes an empty box."""
        first, last = (tokens.float() / self.last).chunk(2, dim=1)
        return torch.cat([(first + last) / 2, (last - first).clamp(min=0)], dim=1)

    def logits(self, decoder: Decoder, tokens: Tensor, memory: Memory, memory_mask: Tensor) -> Tensor:
        """At the start and after each of the locations `b l`, the logits of the next one: `b (1+l) p`. The memory is
        that of an answer, `b m d` with memory_mask `b m`."""
        words = self.location(nn.functional.pad(tokens, (1, 0), value=self.last + 1))
        mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        return decoder.hidden(words, mask, memory, memory_mask) @ self.location.weight[:-1].T

    def forward(self, decoder: Decoder, memory: Memory, memory_mask: Tensor) -> Tensor:
        """The boxes `b 4` that the decoder writes, always the most likely location."""
        tokens = torch.zeros(memory.shape[0], 0, dtype=torch.long, device=memory_mask.device)
        for _ in range(4):
            best = self.logits(decoder, tokens, memory, memory_mask)[:, -1:].argmax(dim=-1)
            tokens = torch.cat([tokens, best], dim=1)
        return self.boxes(tokens)


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
