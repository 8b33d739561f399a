"""The fusion module: text attends to vision (Figure 2). Connected-attention layers come from mPLUG (Li et al. 2022).

Axes: b batch, r texts per image or video, v visual tokens, l text tokens, d width.
"""

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2.config import ModelConfig
from mplug2.model.attention import padding_mask
from mplug2.model.layers import BertLayer
from mplug2.model.shapes import check


class Fusion(nn.Module):
    """BERT layers on the text: self-attention, cross-attention to V', feed-forward.

    With `fusion_stride` > 0, layers whose index (from 0) is a positive multiple of it are connected-attention layers
    instead: self-attention and feed-forward over the joint sequence [V', text]. Its output for vision is added to V'.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width, stride = config.width, config.fusion_stride
        self.connected = [stride > 0 and i > 0 and i % stride == 0 for i in range(config.fusion_layers)]
        self.layers = nn.ModuleList(BertLayer(config, cross=not connected) for connected in self.connected)

    def forward(self, vision: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """V' `b v d`, text `(b r) l d`, text_mask `(b r) l` (true = real token) -> V', fused text `(b r) l d`.

        r consecutive texts share one V'. It comes back unchanged, except from connected-attention layers: they change
        it differently for each text, to `(b r) v d`.
        """
        sizes = check(vision, "b v d", d=self.width)
        shape = check(text_mask, "br l", **check(text, "br l d", d=self.width))
        if shape["br"] % sizes["b"]:
            raise ValueError(f"{shape['br']} texts cannot share {sizes['b']} images or videos evenly")
        v, l, r = sizes["v"], shape["l"], shape["br"] // sizes["b"]
        if any(self.connected):
            vision = repeat(vision, "b v d -> (b r) v d", r=r)
        attention_mask, joint_mask = padding_mask(text_mask), padding_mask(F.pad(text_mask, (v, 0), value=True))
        for layer, connected in zip(self.layers, self.connected):
            if connected:
                change, text = layer(torch.cat([vision, text], dim=1), joint_mask).split([v, l], dim=1)
                vision = vision + change
            else:
                text = layer(text, attention_mask, memory=vision)
        check(text, "br l d", **shape)
        return vision, text
