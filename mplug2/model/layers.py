"""The layers that several modules share: BERT's transformer layer, its embeddings, its language-model head, drop path.

Axes: b batch, l text tokens (or any sequence), m memory tokens, d width, s vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mplug2.config import ModelConfig
from mplug2.model.attention import CrossAttention, KVCache, SelfAttention
from mplug2.model.kernels import Linear, linear
from mplug2.model.shapes import check

EPS = 1e-12
"""LayerNorm epsilon of everything that descends from BERT."""


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, a residual branch is left out with chance `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """branch `b ...`; survivors are scaled up, so that the mean is kept."""
        if not self.training or self.rate == 0.0:
            return branch
        survives = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1)).bernoulli_(1 - self.rate)
        return branch * survives / (1 - self.rate)


class FeedForward(nn.Module):
    """d -> ff_width -> d with exact GELU."""

    def __init__(self, width: int, ff_width: int):
        super().__init__()
        self.up = Linear(width, ff_width)
        self.down = Linear(ff_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A layer of a stack: what compilation, activation checkpointing and sharding go by.

    With `recompute`, training keeps only its inputs, and computes the rest again for the backward pass.
    """

    recompute = False

    def __call__(self, *inputs, **named):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False, **named)
        return super().__call__(*inputs, **named)


class BertLayer(Block):
    """Post-norm transformer layer: self-attention, cross-attention if it has one and gets a memory, feed-forward."""

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
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | tuple[Tensor, Tensor] | None = None,
        memory_mask: Tensor | None = None, cache: KVCache | None = None,
    ) -> Tensor:
        """x `(b r) l d`, mask broadcastable to `(b r) c l l`, memory `b m d`, memory_mask to `b c 1 m` -> `(b r) l d`.

        memory may be the keys and values of the cross-attention, and cache those of the self-attention so far.
        """
        x = self.self_norm(x + self.dropout(self.self_attention(x, mask, cache)))
        if memory is not None:
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, memory, memory_mask)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class TextEmbeddings(nn.Module):
    """Word, position and token-type embedding of token ids, then LayerNorm and dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """ids `b l` -> `b l d`; `first`: how many tokens came before them.

        ValueError for more tokens than there are positions.
        """
        last = first + check(ids, "b l")["l"]
        if last > self.position.num_embeddings:
            raise ValueError(f"a text of {last} tokens: the model has {self.position.num_embeddings} positions; "
                             "shorten the text or build the model with more max_positions")
        # The second token type is BERT's for sentence pairs; mPLUG-2 uses the first for every token.
        positions = self.position.weight[first:last] + self.token_type.weight[0]
        return self.dropout(self.norm(self.word(ids) + positions))


class LanguageModelHead(nn.Module):
    """Hidden states to vocabulary logits: linear, GELU, LayerNorm, then the tied word embedding, plus a bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """hidden `... d`, word_embedding `s d` -> `... s`."""
        return linear(self.norm(F.gelu(self.dense(hidden))), word_embedding, self.bias)
