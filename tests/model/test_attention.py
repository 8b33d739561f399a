"""Attention: equal to its formula, blind to what the masks hide, and the same for sequences that share a memory."""

import pytest
import torch
from helpers import (
    assert_differs,
    assert_same,
    attention_by_hand,
    joined,
    noise,
    random_mask,
    randomized,
    seeds,
    shuffled,
    to_keys,
)
from hypothesis import given
from hypothesis import strategies as st

from mplug2.model.attention import CrossAttention, JointMemory, KVCache, SelfAttention, causal_mask, padding_mask

sizes = st.integers(1, 4)
heads_and_widths = st.tuples(st.integers(1, 4), st.integers(1, 5))


@given(b=sizes, l=sizes, c_and_e=heads_and_widths, seed=seeds)
def test_self_attention_is_the_formula_head_by_head(b, l, c_and_e, seed):
    c, e = c_and_e
    module, x, mask = randomized(SelfAttention(c * e, c), seed), noise(b, l, c * e, seed=seed), random_mask(b, l, seed)
    assert_same(module(x), attention_by_hand(module, x, x))
    assert_same(module(x, padding_mask(mask)), attention_by_hand(module, x, x, to_keys(mask)))
    causal = to_keys(mask) & torch.ones(l, l, dtype=torch.bool).tril()
    assert_same(module(x, causal_mask(mask)), attention_by_hand(module, x, x, causal))


@given(b=sizes, l=sizes, m=sizes, c_and_e=heads_and_widths, seed=seeds)
def test_cross_attention_is_the_formula_head_by_head(b, l, m, c_and_e, seed):
    c, e = c_and_e
    module, mask = randomized(CrossAttention(c * e, c), seed), random_mask(b, m, seed)
    x, memory = noise(b, l, c * e, seed=seed), noise(b, m, c * e, seed=seed + 1)
    assert_same(module(x, memory), attention_by_hand(module, x, memory))
    expected = attention_by_hand(module, x, memory, mask[:, None, :].expand(-1, l, -1))
    assert_same(module(x, memory, padding_mask(mask)), expected)


@given(b=sizes, r=sizes, l=sizes, m=sizes, seed=seeds)
def test_sharing_a_memory_is_repeating_it(b, r, l, m, seed):
    module, x = randomized(CrossAttention(6, 2), seed), noise(b * r, l, 6, seed=seed)
    memory, mask = noise(b, m, 6, seed=seed + 1), random_mask(b, m, seed)
    repeated, repeated_mask = memory.repeat_interleave(r, dim=0), mask.repeat_interleave(r, dim=0)
    assert_same(module(x, memory), module(x, repeated))
    assert_same(module(x, memory, padding_mask(mask)), module(x, repeated, padding_mask(repeated_mask)))


@given(b=sizes, r=sizes, l=sizes, v=sizes, m=sizes, seed=seeds)
def test_a_memory_in_two_pieces_is_the_joined_one(b, r, l, v, m, seed):
    """The texts of one image or video share the first piece, which is projected once."""
    module, x = randomized(CrossAttention(6, 2), seed), noise(b * r, l, 6, seed=seed)
    vision, text = noise(b, v, 6, seed=seed + 1), noise(b * r, m, 6, seed=seed + 2)
    memory, rows = JointMemory(vision, text), []
    module.key_value.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][..., 0].numel()))
    whole = torch.cat([vision.repeat_interleave(r, dim=0), text], dim=1)
    assert memory.shape == whole.shape and joined(memory).equal(whole)
    assert_same(torch.stack(module.keys_and_values(memory)), torch.stack(module.keys_and_values(whole)))
    assert rows == [b * v, b * r * m, b * r * (v + m)]
    mask = padding_mask(random_mask(b * r, v + m, seed))
    assert_same(module(x, memory, mask), module(x, whole, mask))


@given(b=sizes, l=sizes, seed=seeds)
def test_masks_follow_their_definition(b, l, seed):
    mask = random_mask(b, l, seed)
    padding, causal = padding_mask(mask), causal_mask(mask)
    assert padding.shape == (b, 1, 1, l) and causal.shape == (b, 1, l, l)
    assert padding.dtype == causal.dtype == torch.bool
    for sample in range(b):
        for query in range(l):
            for key in range(l):
                assert padding[sample, 0, 0, key] == mask[sample, key]
                assert causal[sample, 0, query, key] == (mask[sample, key] and key <= query)


@given(b=sizes, l=st.integers(2, 5), seed=seeds)
def test_masked_tokens_have_no_influence(b, l, seed):
    own, cross = randomized(SelfAttention(6, 2), seed), randomized(CrossAttention(6, 2), seed)
    x, mask = noise(b, l, 6, seed=seed), random_mask(b, l, seed)
    mask[:, -1] = False
    changed = torch.where(mask[..., None], x, x + 1)
    assert_same(own(changed, padding_mask(mask))[mask], own(x, padding_mask(mask))[mask])
    assert_same(cross(x, changed, padding_mask(mask)), cross(x, x, padding_mask(mask)))
    assert_differs(own(changed)[mask], own(x)[mask])
    assert_differs(cross(x, changed), cross(x, x))


@given(l=st.integers(2, 5), position=st.integers(1, 4), seed=seeds)
def test_causal_mask_hides_later_tokens(l, position, seed):
    position = min(position, l - 1)
    module, x = randomized(SelfAttention(6, 2), seed), noise(1, l, 6, seed=seed)
    changed, mask = x.clone(), causal_mask(torch.ones(1, l, dtype=torch.bool))
    changed[:, position] += 1
    before, after = module(x, mask), module(changed, mask)
    assert_same(after[:, :position], before[:, :position])
    for later in range(position, l):
        assert_differs(after[:, later], before[:, later])


@given(b=sizes, pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=seeds)
def test_a_cache_continues_a_sequence_and_can_be_reordered(b, pieces, seed):
    """Keys and values grow by the new tokens, and each row of the batch can move or be repeated."""
    module, l = randomized(SelfAttention(6, 2), seed), sum(pieces)
    x, mask, cache, found, rows = noise(b, l, 6, seed=seed), random_mask(b, l, seed), KVCache(), [], torch.arange(b)
    expected = module(x, causal_mask(mask))
    for piece in x.split(pieces, dim=1):
        start = sum(part.shape[1] for part in found)
        visible = causal_mask(mask)[rows, :, start: start + piece.shape[1], : start + piece.shape[1]]
        found.append(expected[rows, start: start + piece.shape[1]])
        assert_same(module(piece[rows], visible, cache), found[-1])
        assert cache.key.shape == cache.value.shape == (len(rows), 2, start + piece.shape[1], 3)
        kept = torch.randint(len(rows), (len(rows) + 1,), generator=torch.Generator().manual_seed(seed))
        cache.reorder(kept)
        rows = rows[kept]


@given(l=st.integers(2, 5), m=st.integers(2, 5), seed=seeds)
def test_attention_is_equivariant_to_the_order_of_tokens(l, m, seed):
    own, cross = randomized(SelfAttention(6, 2), seed), randomized(CrossAttention(6, 2), seed)
    x, memory = noise(2, l, 6, seed=seed), noise(2, m, 6, seed=seed + 1)
    order, other = shuffled(l, seed), shuffled(m, seed)
    assert_same(own(x[:, order]), own(x)[:, order])
    assert_same(cross(x[:, order], memory[:, other]), cross(x, memory)[:, order])


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_dropout_applies_to_the_attention_weights_in_training_only(kind):
    # With all values one and an identity as output layer, the output is the sum of the attention weights.
    module = kind(4, 1, dropout=0.5).double()
    projection = module.qkv if kind is SelfAttention else module.key_value
    torch.nn.init.zeros_(projection.weight[-4:])
    with torch.no_grad():
        projection.bias[-4:] = 1
        module.out.weight.copy_(torch.eye(4))
        module.out.bias.zero_()
    x = noise(1, 400, 4)
    inputs = (x,) if kind is SelfAttention else (x, x)
    assert_same(module.eval()(*inputs), torch.ones_like(x))
    torch.manual_seed(0)
    sums = module.train()(*inputs).detach()
    assert sums.std() > 0.01
    assert sums.mean().item() == pytest.approx(1, abs=0.05)


def test_refuses_shapes_that_do_not_fit():
    own, cross = SelfAttention(6, 2), CrossAttention(6, 2)
    with pytest.raises(ValueError, match="expected shape .b l d. with d=6, found .1, 3, 5."):
        own(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="expected shape .b l d. with d=6, found .1, 2, 3, 6."):
        own(torch.zeros(1, 2, 3, 6))
    with pytest.raises(ValueError, match="expected shape .br l d. with d=6, found .1, 3, 5."):
        cross(torch.zeros(1, 3, 5), torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="expected shape .b m d. with d=6, found .1, 2, 5."):
        cross(torch.zeros(1, 3, 6), torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="3 sequences cannot share 2 memories evenly"):
        cross(torch.zeros(3, 3, 6), torch.zeros(2, 2, 6))
