"""The shared decoder: writes captions and answers, a token at a time (section 3.1 of the paper).

BERT layers, causal, each with cross-attention to a memory: V' for captions, [vision, fused text] for answers.

Axes: b batch, l text tokens, m memory tokens, d width, s vocabulary.
"""

from torch import Tensor, nn

from mplug2.attention import causal_mask, padding_mask
from mplug2.config import ModelConfig
from mplug2.layers import BertLayer, LanguageModelHead, TextEmbeddings
from mplug2.shapes import check


class Decoder(nn.Module):
    """Token ids `b l` and a memory `b m d` -> logits `b l s`: at each place, for the token that comes next."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width, self.vocab_size = config.width, config.vocab_size
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config, cross=True) for _ in range(config.decoder_layers))
        self.head = LanguageModelHead(config)

    def forward(self, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """mask `b l`, memory_mask `b m`: true = real token; without a memory_mask all of the memory is real."""
        logits = self.head(self.hidden(ids, mask, memory, memory_mask), self.embeddings.word.weight)
        check(logits, "b l s", b=ids.shape[0], l=ids.shape[1], s=self.vocab_size)
        return logits

    def hidden(self, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """The same, before the language-model head: `b l d`."""
        sizes = check(memory, "b m d", d=self.width, **check(mask, "b l", **check(ids, "b l")))
        if memory_mask is not None:
            check(memory_mask, "b m", **sizes)
            memory_mask = padding_mask(memory_mask)
        x, attend = self.embeddings(ids), causal_mask(mask)
        for layer in self.layers:
            x = layer(x, attend, memory, memory_mask)
        check(x, "b l d", **sizes)
        return x
