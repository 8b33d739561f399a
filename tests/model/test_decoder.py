"""The shared decoder: causal, blind to padding in text and memory, with a head tied to the word embedding."""

import re

import pytest
import torch
from helpers import (
    assert_differs,
    assert_same,
    configs,
    layer_by_hand,
    noise,
    random_ids,
    random_mask,
    randomized,
    seeds,
    shuffled,
    small,
    to_keys,
)
from hypothesis import given
from hypothesis import strategies as st

from mplug2.model.decoder import Decoder

lengths = st.integers(2, 6)


def inputs(config, b, l, m, seed):
    """ids, mask, memory and memory_mask. Text and memory end in padding."""
    mask, memory_mask = random_mask(b, l, seed), random_mask(b, m, seed + 1)
    mask[:, -1], memory_mask[:, -1] = False, False
    return random_ids(b, l, seed), mask, noise(b, m, config.width, seed=seed), memory_mask


@given(config=configs(), l=lengths, m=lengths, seed=seeds)
def test_it_is_embeddings_causal_layers_and_tied_head(config, l, m, seed):
    module, (ids, mask, memory, memory_mask) = randomized(Decoder(config), seed), inputs(config, 2, l, m, seed)
    x, causal = module.embeddings(ids), to_keys(mask) & torch.ones(l, l, dtype=torch.bool).tril()
    for layer in module.layers:
        x = layer_by_hand(layer, x, causal, memory, memory_mask[:, None, :].expand(-1, l, -1))
    assert len(module.layers) == config.decoder_layers
    assert_same(module.hidden(ids, mask, memory, memory_mask), x)
    assert_same(module.hidden(module.embeddings.word(ids), mask, memory, memory_mask), x)
    assert_same(module(ids, mask, memory, memory_mask), module.head(x, module.embeddings.word.weight))


@given(config=configs(), l=lengths, position=st.integers(0, 5), seed=seeds)
def test_no_token_sees_later_tokens(config, l, position, seed):
    position = min(position, l - 1)
    module, (ids, _, memory, memory_mask) = randomized(Decoder(config), seed), inputs(config, 2, l, 4, seed)
    mask, other = torch.ones(2, l, dtype=torch.bool), ids.clone()
    other[:, position] = (ids[:, position] + 1) % config.vocab_size
    before, after = module(ids, mask, memory, memory_mask), module(other, mask, memory, memory_mask)
    assert_same(after[:, :position], before[:, :position])
    for later in range(position, l):
        assert_differs(after[:, later], before[:, later])


@given(config=configs(), l=lengths, prefix=st.integers(1, 5), seed=seeds)
def test_a_prefix_alone_has_the_same_logits(config, l, prefix, seed):
    module, (ids, mask, memory, memory_mask) = randomized(Decoder(config), seed), inputs(config, 2, l, 4, seed)
    prefix = min(prefix, l)
    expected = module(ids, mask, memory, memory_mask)[:, :prefix]
    assert_same(module(ids[:, :prefix], mask[:, :prefix], memory, memory_mask), expected)


@given(config=configs(), l=lengths, m=lengths, seed=seeds)
def test_padding_has_no_influence(config, l, m, seed):
    module, (ids, mask, memory, memory_mask) = randomized(Decoder(config), seed), inputs(config, 2, l, m, seed)
    other_ids = torch.where(mask, ids, (ids + 1) % config.vocab_size)
    other_memory = torch.where(memory_mask[..., None], memory, memory + noise(config.width, seed=seed + 1))
    expected = module(ids, mask, memory, memory_mask)
    assert_same(module(other_ids, mask, other_memory, memory_mask)[mask], expected[mask])
    assert_differs(module(ids, mask, other_memory), module(ids, mask, memory))


@given(config=configs(), l=lengths, m=lengths, seed=seeds)
def test_a_memory_without_mask_is_all_real_and_its_order_does_not_count(config, l, m, seed):
    module, (ids, mask, memory, _) = randomized(Decoder(config), seed), inputs(config, 2, l, m, seed)
    expected = module(ids, mask, memory, torch.ones(2, m, dtype=torch.bool))
    assert_same(module(ids, mask, memory), expected)
    assert_same(module(ids, mask, memory[:, shuffled(m, seed)]), expected)


@given(config=configs(), l=lengths, m=lengths, seed=seeds)
def test_samples_are_independent(config, l, m, seed):
    module, given_inputs = randomized(Decoder(config), seed), inputs(config, 3, l, m, seed)
    order = shuffled(3, seed)
    assert_same(module(*(tensor[order] for tensor in given_inputs)), module(*given_inputs)[order])


def test_word_embedding_and_head_are_one_matrix():
    module, (ids, mask, memory, _) = randomized(Decoder(small())), inputs(small(), 1, 3, 4, 0)
    ids[:] = 1
    before = module(ids, mask, memory)
    with torch.no_grad():
        module.embeddings.word.weight[7] += 1  # not in the text, so only its own logit changes
    moved = (module(ids, mask, memory) != before).any(dim=(0, 1))
    assert moved.nonzero().flatten().tolist() == [7]


def test_refuses_wrong_shapes():
    module, (ids, mask, memory, memory_mask) = Decoder(small()), inputs(small(), 2, 5, 4, 0)
    memory = memory.float()
    with pytest.raises(ValueError, match="a text of 12 tokens: the model has 11 positions"):
        module(random_ids(2, 12), random_mask(2, 12), memory)
    with pytest.raises(ValueError, match=re.escape("(br l), found (5,)")):
        module(ids[0], mask[0], memory)
    with pytest.raises(ValueError, match=re.escape("(br l) with br=2, l=5, found (2, 4)")):
        module(ids, mask[:, 1:], memory)
    with pytest.raises(ValueError, match=re.escape("(br l) with br=2, l=5, found (2, 4)")):
        module.hidden(module.embeddings.word(ids), mask[:, 1:], memory)
    with pytest.raises(ValueError, match=re.escape("(b m d) with d=16, found (2, 4, 15)")):
        module(ids, mask, memory[..., 1:])
    with pytest.raises(ValueError, match="2 sequences cannot share 3 memories evenly"):
        module(ids, mask, memory[[0, 1, 1]])
    with pytest.raises(ValueError, match=re.escape("(b m) with b=2, m=4, found (2, 3)")):
        module(ids, mask, memory, memory_mask[:, 1:])
