"""The universal layers: one set of weights for text and for vision (section 3.1 of the paper).

They are the last S layers of the text encoder. Text passes them like any other layer; vision passes the same
self-attention and the same feed-forward, and a cross-attention that only vision uses, between its v tokens and q
learned latents. Two readings of how the latents are used, `universal_readout`:

    released   the stream starts as the latents; in each layer but the last they attend to V. In the last layer the
               stream is V itself, and attends to what the latents have become. V' = LN(V + stream).
    figure     the latents read V by a cross-attention, pass the S layers, and are read by V with a second one;
               a residual goes round the whole stack, for text as well.

With S = 0 nothing is built, and vision and text leave as they came: no weights are shared (an ablation).

Axes: b batch, v visual tokens, l text tokens, q latents, d width.
"""

import torch
from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.model.attention import CrossAttention, padding_mask
from mplug2.model.layers import EPS, BertLayer
from mplug2.model.shapes import check


class UniversalLayers(nn.Module):
    """S shared layers with two doors, `vision` and `text`; each is only as much built as the task needs."""

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
        """V `b v d` -> V' `b v d`. Nothing is masked."""
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
