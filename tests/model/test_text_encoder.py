"""The text encoder: embeddings and lower layers; padding and other texts of the batch have no influence."""

import re

import pytest
import torch
from helpers import (
    assert_differs,
    assert_same,
    configs,
    layer_by_hand,
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

from mplug2.model.text_encoder import TextEncoder

lengths = st.integers(2, 8)
at_least_one_layer = {"text_layers": 4}


@given(config=configs(), l=lengths, seed=seeds)
def test_it_is_the_embeddings_and_the_layers_below_the_universal_ones(config, l, seed):
    encoder, ids, mask = randomized(TextEncoder(config), seed), random_ids(2, l, seed), random_mask(2, l, seed)
    assert len(encoder.layers) == config.text_layers - config.universal_layers
    expected = encoder.embeddings(ids)
    for layer in encoder.layers:
        expected = layer_by_hand(layer, expected, to_keys(mask))
    assert_same(encoder(ids, mask), expected)


@given(config=configs(**at_least_one_layer), l=lengths, seed=seeds)
def test_padding_has_no_influence(config, l, seed):
    encoder, ids, mask = randomized(TextEncoder(config), seed), random_ids(2, l, seed), random_mask(2, l, seed)
    mask[:, -1] = False
    other_padding = torch.where(mask, ids, (ids + 1) % config.vocab_size)
    assert_same(encoder(other_padding, mask)[mask], encoder(ids, mask)[mask])
    assert_differs(encoder(other_padding, torch.ones_like(mask))[mask], encoder(ids, torch.ones_like(mask))[mask])


@given(config=configs(), l=lengths, padding=st.integers(1, 3), seed=seeds)
def test_padding_can_be_omitted(config, l, padding, seed):
    encoder, ids, mask = randomized(TextEncoder(config), seed), random_ids(2, l, seed), random_mask(2, l, seed)
    longer = torch.cat([ids, random_ids(2, padding, seed + 1)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(2, padding, dtype=torch.bool)], dim=1)
    assert_same(encoder(longer, longer_mask)[:, :l][mask], encoder(ids, mask)[mask])


@given(config=configs(**at_least_one_layer), l=lengths, position=st.integers(0, 7), seed=seeds)
def test_every_token_sees_all_others(config, l, position, seed):
    position = min(position, l - 1)
    encoder, ids = randomized(TextEncoder(config), seed), random_ids(1, l, seed)
    mask, other = torch.ones(1, l, dtype=torch.bool), ids.clone()
    other[:, position] = (ids[:, position] + 1) % config.vocab_size
    before, after = encoder(ids, mask), encoder(other, mask)
    for i in range(l):
        assert_differs(after[:, i], before[:, i])


@given(config=configs(), l=lengths, seed=seeds)
def test_texts_are_independent(config, l, seed):
    encoder, ids, mask = randomized(TextEncoder(config), seed), random_ids(3, l, seed), random_mask(3, l, seed)
    order = shuffled(3, seed)
    assert_same(encoder(ids[order], mask[order]), encoder(ids, mask)[order])


def test_refuses_wrong_shapes():
    encoder, ids, mask = TextEncoder(small()), random_ids(2, 5), random_mask(2, 5)
    with pytest.raises(ValueError, match="a text of 12 tokens: the model has 11 positions"):
        encoder(random_ids(2, 12), random_mask(2, 12))
    with pytest.raises(ValueError, match=re.escape("expected shape (b l), found (5,)")):
        encoder(ids[0], mask[0])
    with pytest.raises(ValueError, match=re.escape("expected shape (b l) with b=2, l=5, found (1, 5)")):
        encoder(ids, mask[:1])
