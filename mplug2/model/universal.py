"""The universal layers (Figure 2(c)): one set of weights for text and vision. They output V', the vision tokens that
fusion, decoder and heads use.

They are the last S layers of the text encoder. Text W passes through them as through any BERT layer. Vision passes
through the same self-attention and feed-forward weights, and between them through a cross-attention that only vision
has. It connects V, the v tokens of the vision encoder, with q learned latents. `universal_readout` chooses the form:

    released   stream = latents                            figure   stream = CA(latents, V)
               S - 1 times: stream = layer(stream, V)               S times: stream = stream + layer(stream, V)
               stream = last layer(V, stream)                       stream = CA(V, stream)
               V' = LN(V + stream)                                  V' = LN(V + stream)
    text       stream = W                                           stream = W
               S times: stream = layer(stream)                      S times: stream = stream + layer(stream)
               W' = stream                                          W' = LN(W + stream)

layer(x, memory) is self-attention, cross-attention to the memory (vision only) and feed-forward. CA(x, memory) is a
cross-attention outside the layers: x are the queries. The figure draws the last one like the first, with an arrow from
V; that V is the query is our reading, because V + stream needs as many tokens as V has.

With S = 0 nothing is built or changed: vision and text share no weights (an ablation).

Axes: b batch, v visual tokens, l text tokens, q latents, d width.
"""

import torch
from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.model.attention import CrossAttention, padding_mask
from mplug2.model.layers import EPS, BertLayer
from mplug2.model.shapes import check


class UniversalLayers(nn.Module):
    """S shared layers with two entry points, `vision` and `text`; only the parts that the task needs are built."""

    def __init__(self, config: ModelConfig, for_vision: bool, for_text: bool):
        super().__init__()
        self.width, self.figure = config.width, config.universal_readout == "figure"
        self.layers = nn.ModuleList(BertLayer(config, cross=for_vision) for _ in range(config.universal_layers))
        if for_vision and self.layers:
            self.latents = nn.Parameter(torch.zeros(config.latents, config.width))  # drawn by `init_weights`
            self.vision_norm = nn.LayerNorm(config.width, eps=EPS)
            self.dropout = nn.Dropout(config.dropout)
            if self.figure:
                self.read = CrossAttention(config.width, config.heads, config.dropout)
                self.write = CrossAttention(config.width, config.heads, config.dropout)
        if for_text and self.layers and self.figure:
            self.text_norm = nn.LayerNorm(config.width, eps=EPS)

    def vision(self, tokens: Tensor) -> Tensor:
        """V `b v d` -> V' `b v d`. There is no padding and no mask."""
        sizes = check(tokens, "b v d", d=self.width)
        if not self.layers:
            return tokens
        stream = self.latents.expand(sizes["b"], -1, -1)
        if self.figure:
            stream = self.read(stream, tokens)
            for layer in self.layers:
                stream = stream + layer(stream, memory=tokens)
            stream = self.write(tokens, stream)
        else:
            for layer in self.layers[:-1]:
                stream = layer(stream, memory=tokens)
            stream = self.layers[-1](tokens, memory=stream)
        out = self.dropout(self.vision_norm(tokens + stream))
        check(out, "b v d", **sizes)
        return out

    def text(self, x: Tensor, mask: Tensor) -> Tensor:
        """W `b l d`, mask `b l` (true = real token) -> `b l d`."""
        sizes = check(mask, "b l", **check(x, "b l d", d=self.width))
        stream, attention_mask = x, padding_mask(mask)
        for layer in self.layers:
            change = layer(stream, attention_mask)
            stream = stream + change if self.figure else change
        if self.layers and self.figure:
            stream = self.text_norm(x + stream)
        check(stream, "b l d", **sizes)
        return stream
