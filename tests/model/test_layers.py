"""The shared layers equal their formulas: drop path, feed-forward, BERT's layer, embeddings and head."""

import re

import pytest
import torch
from helpers import (
    assert_differs,
    assert_same,
    layer_by_hand,
    noise,
    norm_by_hand,
    parameter_names,
    random_ids,
    random_mask,
    randomized,
    seeds,
    small,
    to_keys,
)
from hypothesis import given
from hypothesis import strategies as st

from mplug2.model.attention import KVCache, causal_mask, padding_mask
from mplug2.model.layers import BertLayer, DropPath, FeedForward, LanguageModelHead, TextEmbeddings

sizes = st.integers(1, 4)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


@given(rate=st.floats(0.05, 0.9), seed=seeds)
def test_drop_path_drops_whole_samples_and_keeps_the_mean(rate, seed):
    torch.manual_seed(seed)
    samples, branch = 4000, noise(4000, 2, 3, seed=seed)
    dropped = DropPath(rate).train()(branch)
    survives = (dropped != 0).any(dim=(1, 2))
    assert_same(dropped, torch.where(survives[:, None, None], branch / (1 - rate), 0))
    deviation = (rate * (1 - rate) / samples) ** 0.5
    assert survives.double().mean().item() == pytest.approx(1 - rate, abs=5 * deviation)


@given(rate=st.floats(0, 0.9), seed=seeds)
def test_drop_path_does_nothing_in_evaluation_or_at_rate_zero(rate, seed):
    branch = noise(5, 2, seed=seed)
    assert torch.equal(DropPath(rate).eval()(branch), branch)
    assert torch.equal(DropPath(0.0).train()(branch), branch)


@given(b=sizes, l=sizes, seed=seeds)
def test_feed_forward_is_linear_exact_gelu_linear(b, l, seed):
    module, x = randomized(FeedForward(6, 10), seed), noise(b, l, 6, seed=seed)
    assert module.up.weight.shape == (10, 6)
    assert_same(module(x), gelu(x @ module.up.weight.T + module.up.bias) @ module.down.weight.T + module.down.bias)


@given(b=sizes, l=sizes, m=sizes, seed=seeds)
def test_the_layer_is_berts_formula(b, l, m, seed):
    layer = randomized(BertLayer(small(), cross=True), seed)
    mask, memory_mask = random_mask(b, l, seed), random_mask(b, m, seed)
    x, memory = noise(b, l, 16, seed=seed), noise(b, m, 16, seed=seed + 1)
    expected = layer_by_hand(layer, x, to_keys(mask), memory, memory_mask[:, None, :].expand(-1, l, -1))
    assert_same(layer(x, padding_mask(mask), memory, padding_mask(memory_mask)), expected)
    assert_same(layer(x, padding_mask(mask)), layer_by_hand(layer, x, to_keys(mask)))


def test_a_layer_without_cross_attention_has_no_weights_for_it():
    with_cross, without = (parameter_names(BertLayer(small(), cross=cross)) for cross in (True, False))
    assert without == {name for name in with_cross if not name.startswith("cross_")} != with_cross


@given(first=st.integers(1, 3), second=st.integers(1, 3), seed=seeds)
def test_a_layer_and_embeddings_continue_after_earlier_tokens(first, second, seed):
    """With a cache, and with the position of the first token."""
    layer, embeddings = randomized(BertLayer(small(), cross=True), seed), randomized(TextEmbeddings(small()), seed)
    ids, memory, cache = random_ids(2, first + second, seed), noise(2, 3, 16, seed=seed), KVCache()
    x, visible = embeddings(ids), causal_mask(torch.ones(2, first + second, dtype=torch.bool))
    assert_same(embeddings(ids[:, first:], first), x[:, first:])
    expected = layer(x, visible, memory)
    assert_same(layer(x[:, :first], visible[..., :first, :first], memory, cache=cache), expected[:, :first])
    assert_same(layer(x[:, first:], visible[..., first:, :], memory, cache=cache), expected[:, first:])


def test_a_block_that_recomputes_runs_twice_and_only_where_gradients_are_needed():
    layer, runs = randomized(BertLayer(small(dropout=0.3))).train(), []
    layer.feed_forward.register_forward_hook(lambda *_: runs.append(None))
    x = noise(2, 3, 16).requires_grad_()

    def gradient(recompute: bool) -> torch.Tensor:
        layer.recompute = recompute
        torch.manual_seed(0)
        return torch.autograd.grad(layer(x).square().sum(), x)[0]

    plain, count = gradient(False), len(runs)
    assert_same(gradient(True), plain)
    assert (count, len(runs)) == (1, 3)
    with torch.no_grad():
        layer(x)
    assert len(runs) == 4


@given(b=sizes, l=st.integers(1, 11), seed=seeds)
def test_embeddings_are_word_plus_position_plus_first_token_type(b, l, seed):
    module, ids = randomized(TextEmbeddings(small()), seed), random_ids(b, l, seed)
    positions = torch.stack([module.position.weight[i] for i in range(l)])
    total = torch.stack([torch.stack([module.word.weight[i] for i in row]) for row in ids]) + positions
    expected = norm_by_hand(module.norm, total + module.token_type.weight[0])
    assert_same(module(ids), expected)
    assert_same(module(module.word(ids)), expected)  # word embeddings in place of ids
    assert module.token_type.weight.shape == (2, 16)  # BERT's two types


def test_a_text_longer_than_the_positions_is_refused():
    module = TextEmbeddings(small(max_positions=11))
    assert module(random_ids(1, 11)).shape == (1, 11, 16)
    with pytest.raises(ValueError, match="a text of 12 tokens: the model has 11 positions; shorten the text or build"):
        module(random_ids(1, 12))


@given(lead=st.lists(sizes, max_size=3), seed=seeds)
def test_the_head_ends_in_the_word_embedding(lead, seed):
    module = randomized(LanguageModelHead(small()), seed)
    word, hidden = noise(29, 16, seed=seed), noise(*lead, 16, seed=seed)
    expected = norm_by_hand(module.norm, gelu(hidden @ module.dense.weight.T + module.dense.bias))
    assert_same(module(hidden, word), expected @ word.T + module.bias)


def test_the_head_has_no_matrix_of_vocabulary_size():
    assert max(parameter.dim() for parameter in LanguageModelHead(small()).parameters() if 29 in parameter.shape) == 1


@given(seed=seeds)
def test_dropout_applies_in_training_only(seed):
    config = small(dropout=0.5)
    layer, embeddings = randomized(BertLayer(config, cross=True), seed), randomized(TextEmbeddings(config), seed)
    x, ids = noise(2, 5, 16, seed=seed), random_ids(2, 5, seed)
    expected = layer(x, memory=x), embeddings(ids)
    torch.manual_seed(seed)
    assert_differs(layer.train()(x, memory=x), expected[0])
    dropped = embeddings.train()(ids)
    assert 0.3 < (dropped == 0).double().mean() < 0.7
    assert_same(torch.where(dropped == 0, 0, dropped), torch.where(dropped == 0, 0, 2 * expected[1]))


def test_dropout_applies_to_every_branch_of_the_layer():
    # A dropout of 1 removes all branches. Only the three norms remain.
    layer, x = randomized(BertLayer(small(dropout=0.5), cross=True)), noise(2, 5, 16)
    layer.dropout.p = 1.0
    expected = x
    for norm in (layer.self_norm, layer.cross_norm, layer.feed_forward_norm):
        expected = norm_by_hand(norm, expected)
    assert_same(layer.train()(x, memory=x), expected)


def test_dropout_applies_to_the_weights_of_both_attentions():
    layer, x = randomized(BertLayer(small(dropout=0.5), cross=True)).train(), noise(2, 5, 16)
    layer.dropout.p = 0.0
    expected = layer.eval()(x, memory=x)
    for dropping, other in ((layer.self_attention, layer.cross_attention),
                            (layer.cross_attention, layer.self_attention)):
        other.train(False), dropping.train()
        assert_differs(layer(x, memory=x), expected)


def test_refuses_wrong_shapes():
    layer = BertLayer(small(), cross=True)
    with pytest.raises(ValueError, match=re.escape("(b l d) with d=16, found (1, 2, 15)")):
        layer(torch.zeros(1, 2, 15))
    with pytest.raises(ValueError, match=re.escape("(b m d) with d=16, found (1, 2, 15)")):
        layer(torch.zeros(1, 2, 16), memory=torch.zeros(1, 2, 15))
    with pytest.raises(ValueError, match=re.escape("expected shape (b l), found (5,)")):
        TextEmbeddings(small())(torch.zeros(5, dtype=torch.long))
