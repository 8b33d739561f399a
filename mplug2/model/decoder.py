"""The shared decoder: writes captions and answers, a token at a time (section 3.1 of the paper).

BERT layers, causal, each with cross-attention to a memory: V' for captions, [vision, fused text] for answers.

Axes: b batch, r texts that share a memory, l text tokens, p tokens before them, m memory tokens, d width, c heads,
e width of a head, s vocabulary.
"""

import torch
from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.model.attention import KVCache, causal_mask, padding_mask
from mplug2.model.layers import BertLayer, LanguageModelHead, TextEmbeddings
from mplug2.model.shapes import check


class DecoderState:
    """What is kept while r texts about each of b memories are written: for every layer the keys and values of the
    memory, `b c m e`, computed once, and those of the p tokens so far, `(b r) c p e`."""

    def __init__(self, memories: list[tuple[Tensor, Tensor]], memory_mask: Tensor | None):
        self.memories, self.memory_mask, self.length = memories, memory_mask, 0
        self.caches = [KVCache() for _ in memories]

    def reorder_texts(self, rows: Tensor) -> None:
        """Go on with these of the `(b r)` texts: the beams that live on, each perhaps more than once."""
        for cache in self.caches:
            cache.reorder(rows)

    def reorder_memories(self, rows: Tensor) -> None:
        """Go on with these of the b memories; their texts are chosen by `reorder_texts`."""
        self.memories = [(key[rows], value[rows]) for key, value in self.memories]
        self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]


class Decoder(nn.Module):
    """Token ids `(b r) l` and a memory `b m d` -> logits `(b r) l s`: at each place, for the token that comes next."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width, self.vocab_size = config.width, config.vocab_size
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config, cross=True) for _ in range(config.decoder_layers))
        self.head = LanguageModelHead(config)

    def forward(self, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """mask `(b r) l`, memory_mask `b m`: true = real token; without a memory_mask all of the memory is real."""
        logits = self.logits(self.hidden(ids, mask, memory, memory_mask))
        check(logits, "b l s", b=ids.shape[0], l=ids.shape[1], s=self.vocab_size)
        return logits

    def hidden(self, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """The same, before the language-model head: `(b r) l d`."""
        sizes = check(mask, "br l", **check(ids, "br l"))
        shape = check(memory, "b m d", d=self.width)
        if memory_mask is not None:
            check(memory_mask, "b m", **shape)
            memory_mask = padding_mask(memory_mask)
        x, attention_mask = self.embeddings(ids), causal_mask(mask)
        for layer in self.layers:
            x = layer(x, attention_mask, memory, memory_mask)
        check(x, "br l d", **sizes, d=self.width)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `... d` -> `... s`."""
        return self.head(hidden, self.embeddings.word.weight)

    def start(self, memory: Tensor, memory_mask: Tensor | None = None) -> DecoderState:
        """Before the first `step`: what is kept of memory `b m d` with memory_mask `b m`."""
        sizes = check(memory, "b m d", d=self.width)
        if memory_mask is not None:
            check(memory_mask, "b m", **sizes)
            memory_mask = padding_mask(memory_mask)
        # Laid out for being read at every step: each head by itself.
        memories = [
            (key.contiguous(), value.contiguous())
            for key, value in (layer.cross_attention.keys_and_values(memory) for layer in self.layers)
        ]
        return DecoderState(memories, memory_mask)

    def step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """The next l tokens `(b r) l` of every text, none of them padding -> logits `(b r) s` after the last one."""
        sizes = check(ids, "br l")
        l, p = sizes["l"], state.length
        x = self.embeddings(ids, first=p)
        # A single token may look at everything; several (a prompt) at what came before each of them.
        attention_mask = None if l == 1 else torch.ones(l, p + l, dtype=torch.bool, device=ids.device).tril(p)
        for layer, memory, cache in zip(self.layers, state.memories, state.caches):
            x = layer(x, attention_mask, memory, state.memory_mask, cache)
        state.length = p + l
        logits = self.logits(x[:, -1])
        check(logits, "br s", br=sizes["br"], s=self.vocab_size)
        return logits
