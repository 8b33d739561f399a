"""The universal layers (Figure 2(c)): one set of weights for text and vision. They output V', the vision tokens that
fusion, decoder and heads use.

They are the last S layers of the text encoder. Text passes through them as through any BERT layer. Vision passes
through the same self-attention and feed-forward weights, and through cross-attentions that only vision has: between V,
the v tokens of the vision encoder, and q learned latents. `universal_readout` chooses between two forms:

    released   All layers but the last update the latents: self-attention, cross-attention to V, feed-forward. In the
               last layer V takes their place, with cross-attention to the latents. V' = LN(V + output).
    figure     The latents read V by a cross-attention, pass through the S layers, and are read by V with a second
               cross-attention. A residual surrounds all of this, for text as well.

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
        self.width, self.readout = config.width, config.universal_readout
        released = self.readout == "released"
        self.layers = nn.ModuleList(
            BertLayer(config, cross=for_vision and released) for _ in range(config.universal_layers)
        )
        if for_vision and self.layers:
            self.latents = nn.Parameter(torch.zeros(config.latents, config.width))
            self.vision_norm = nn.LayerNorm(config.width, eps=EPS)
            self.dropout = nn.Dropout(config.dropout)
            if not released:
                self.read = CrossAttention(config.width, config.heads, config.dropout)
                self.write = CrossAttention(config.width, config.heads, config.dropout)
        if for_text and self.layers and not released:
            self.text_norm = nn.LayerNorm(config.width, eps=EPS)

    def vision(self, tokens: Tensor) -> Tensor:
        """V `b v d` -> V' `b v d`. There is no padding and no mask."""
        sizes = check(tokens, "b v d", d=self.width)
        if not self.layers:
            return tokens
        stream = self.latents.expand(sizes["b"], -1, -1)
        if self.readout == "released":
            for layer in self.layers[:-1]:
                stream = layer(stream, memory=tokens)
            stream = self.layers[-1](tokens, memory=stream)
        else:
            stream = stream + self.read(stream, tokens)
            for layer in self.layers:
                stream = layer(stream)
            stream = self.write(tokens, stream)
        out = self.dropout(self.vision_norm(tokens + stream))
        check(out, "b v d", **sizes)
        return out

    def text(self, x: Tensor, mask: Tensor) -> Tensor:
        """x `b l d`, mask `b l` (true = real token) -> `b l d`."""
        sizes = check(mask, "b l", **check(x, "b l d", d=self.width))
        stream, attention_mask = x, padding_mask(mask)
        for layer in self.layers:
            stream = layer(stream, attention_mask)
        if self.layers and self.readout == "figure":
            stream = self.text_norm(x + stream)
        check(stream, "b l d", **sizes)
        return stream
