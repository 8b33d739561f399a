"""The shared decoder: causal BERT layers that write captions and answers, one token at a time.

Every layer cross-attends to a memory: V' for captions, [V', fused text] for answers. `Decoder.forward` scores whole
texts, for training. `init_state` and `step` compute the same logits token by token, for generation.

Axes: b batch, r texts per memory, l text tokens, m memory tokens, d width, c heads, e width of a head, s vocabulary.
"""

import torch
from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.model.attention import KVCache, Memory, causal_mask, padding_mask
from mplug2.model.layers import BertLayer, LanguageModelHead, TextEmbeddings
from mplug2.model.shapes import check


class DecoderState:
    """Everything that `step` needs while r texts are written about each of b memories.

    Per layer: keys and values of the memory, `b c m e`, computed once, and a cache of those of the tokens so far.
    """

    def __init__(self, memories: list[tuple[Tensor, Tensor]], memory_attention_mask: Tensor | None):
        self.memories, self.memory_attention_mask, self.length = memories, memory_attention_mask, 0
        self.caches = [KVCache() for _ in memories]

    def reorder_texts(self, rows: Tensor) -> None:
        """Keep these of the `(b r)` texts, in this order; a beam may appear more than once."""
        for cache in self.caches:
            cache.reorder(rows)

    def reorder_memories(self, rows: Tensor) -> None:
        """Keep these of the b memories. Call `reorder_texts` as well, with r texts for each."""
        self.memories = [(key[rows], value[rows]) for key, value in self.memories]
        if self.memory_attention_mask is not None:
            self.memory_attention_mask = self.memory_attention_mask[rows]


Source = Memory | DecoderState  # a state has the keys and values of its memory


class Decoder(nn.Module):
    """Token ids `(b r) l` and a memory `b m d` -> logits `(b r) l s`: at each position, for the next token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width, self.vocab_size = config.width, config.vocab_size
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config, cross=True) for _ in range(config.decoder_layers))
        self.head = LanguageModelHead(config)

    def forward(self, ids: Tensor, mask: Tensor, memory: Source, memory_mask: Tensor | None = None) -> Tensor:
        """mask `(b r) l` and memory_mask `b m`: true = real token. Without memory_mask all memory tokens are real."""
        logits = self.logits(self.hidden(ids, mask, memory, memory_mask))
        check(logits, "br l s", **check(ids, "br l"), s=self.vocab_size)
        return logits

    def hidden(self, ids: Tensor, mask: Tensor, memory: Source, memory_mask: Tensor | None = None) -> Tensor:
        """`forward` without the language-model head: hidden states `(b r) l d`. ids may be embeddings `(b r) l d`."""
        sizes = check(ids, "br l d" if ids.dim() == 3 else "br l", d=self.width)
        check(mask, "br l", **sizes)
        if isinstance(memory, DecoderState):
            memories, memory_attention_mask = memory.memories, memory.memory_attention_mask
        else:
            memories, memory_attention_mask = [memory] * len(self.layers), self._check_memory(memory, memory_mask)
        x, attention_mask = self.embeddings(ids), causal_mask(mask)
        for layer, of_layer in zip(self.layers, memories):
            x = layer(x, attention_mask, of_layer, memory_attention_mask)
        check(x, "br l d", **sizes)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `... d` -> logits `... s`."""
        return self.head(hidden, self.embeddings.word.weight)

    def init_state(self, memory: Memory, memory_mask: Tensor | None = None) -> DecoderState:
        """The state before the first `step`, for memory `b m d` with memory_mask `b m`."""
        memory_attention_mask = self._check_memory(memory, memory_mask)
        memories = [layer.cross_attention.keys_and_values(memory) for layer in self.layers]
        # Contiguous per head, because every step reads them again.
        memories = [(key.contiguous(), value.contiguous()) for key, value in memories]
        return DecoderState(memories, memory_attention_mask)

    def step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """Append l tokens `(b r) l`, none of them padding, to every text -> logits `(b r) s` of the next token."""
        sizes = check(ids, "br l")
        l, past = sizes["l"], state.length
        x = self.embeddings(ids, first=past)
        # A single token may attend to everything so far. Several tokens (a prompt) need the causal mask.
        attention_mask = None if l == 1 else torch.ones(l, past + l, dtype=torch.bool, device=ids.device).tril(past)
        for layer, memory, cache in zip(self.layers, state.memories, state.caches):
            x = layer(x, attention_mask, memory, state.memory_attention_mask, cache)
        state.length = past + l
        logits = self.logits(x[:, -1])
        check(logits, "br s", br=sizes["br"], s=self.vocab_size)
        return logits

    def _check_memory(self, memory: Memory, memory_mask: Tensor | None) -> Tensor | None:
        """Check memory `b m d` and memory_mask `b m`, and return the attention mask `b 1 1 m`."""
        sizes = check(memory, "b m d", d=self.width)
        if memory_mask is None:
            return None
        check(memory_mask, "b m", **sizes)
        return padding_mask(memory_mask)
