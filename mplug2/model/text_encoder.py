"""The text encoder: BERT's embeddings and layers, except the last S layers. Those are the universal layers.

Axes: b batch, l text tokens, d width.
"""

from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.model.attention import padding_mask
from mplug2.model.layers import BertLayer, TextEmbeddings
from mplug2.model.shapes import check


class TextEncoder(nn.Module):
    """Token ids and their mask (true = real token), both `b l` -> `b l d`, the input of the universal layers."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width = config.width
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.text_layers - config.universal_layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        sizes = check(mask, "b l", **check(ids, "b l"))
        x, attention_mask = self.embeddings(ids), padding_mask(mask)
        for layer in self.layers:
            x = layer(x, attention_mask)
        check(x, "b l d", d=self.width, **sizes)
        return x
