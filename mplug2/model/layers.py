"""Layers that several modules share: BERT's transformer layer, its embeddings and its language-model head; drop path.

Axes: b batch, l tokens, m memory tokens, r sequences that share a memory, d width, s vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mplug2.config import ModelConfig
from mplug2.model.attention import CrossAttention, KVCache, Memory, SelfAttention
from mplug2.model.kernels import Linear, linear
from mplug2.model.shapes import check

EPS = 1e-12
"""BERT's LayerNorm epsilon: text encoder, universal layers, fusion and decoder."""


class Block(nn.Module):
    """A transformer block: the unit of compilation, activation checkpointing and FSDP sharding.

    With `recompute`, training stores only the block's inputs and recomputes its activations in the backward pass.
    """

    recompute = False

    def __call__(self, *inputs, **named):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False, **named)
        return super().__call__(*inputs, **named)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, each sample skips a residual branch with probability `rate`.

    The branch of the other samples is scaled up, so the mean stays the same.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """branch `b ...` -> the same shape."""
        if not self.training or self.rate == 0.0:
            return branch
        survives = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1)).bernoulli_(1 - self.rate)
        return branch * survives / (1 - self.rate)


class FeedForward(nn.Module):
    """Linear to ff_width, exact GELU, linear back to d."""

    def __init__(self, width: int, ff_width: int):
        super().__init__()
        self.up = Linear(width, ff_width)
        self.down = Linear(ff_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class BertLayer(Block):
    """BERT's layer, post-norm (`x = LN(x + branch(x))`): self-attention, cross-attention, feed-forward.

    The cross-attention exists only with `cross`, and runs only if `forward` gets a memory.
    """

    def __init__(self, config: ModelConfig, cross: bool = False):
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.self_attention = SelfAttention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width, eps=EPS)
        if cross:
            self.cross_attention = CrossAttention(width, heads, dropout)
            self.cross_norm = nn.LayerNorm(width, eps=EPS)
        self.feed_forward = FeedForward(width, config.ff_width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, memory: Memory | tuple[Tensor, Tensor] | None = None,
        memory_attention_mask: Tensor | None = None, cache: KVCache | None = None,
    ) -> Tensor:
        """x `(b r) l d` -> `(b r) l d`. attention_mask broadcasts to `(b r) c l l`, memory_attention_mask to `b c 1 m`;
        `cache` holds the self-attention's keys and values of earlier tokens."""
        x = self.self_norm(x + self.dropout(self.self_attention(x, attention_mask, cache)))
        if memory is not None:
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, memory, memory_attention_mask)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class TextEmbeddings(nn.Module):
    """Word, position and token-type embeddings of token ids, then LayerNorm and dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """ids `b l`, or word embeddings `b l d` -> `b l d`; `first` is the position of the first token. Raises
        ValueError beyond the last one."""
        end = first + check(ids, "b l d" if ids.dim() == 3 else "b l")["l"]
        if end > self.position.num_embeddings:
            raise ValueError(f"a text of {end} tokens: the model has {self.position.num_embeddings} positions; "
                             "shorten the text or build the model with more max_positions")
        # BERT's second token type marks the second sentence of a pair; mPLUG-2 uses the first type for every token.
        positions = self.position.weight[first:end] + self.token_type.weight[0]
        return self.dropout(self.norm((ids if ids.dim() == 3 else self.word(ids)) + positions))


class LanguageModelHead(nn.Module):
    """Hidden states to vocabulary logits: linear, GELU, LayerNorm, then the tied word embedding plus a bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """hidden `... d`, word_embedding `s d` -> `... s`."""
        return linear(self.norm(F.gelu(self.dense(hidden))), word_embedding, self.bias)
