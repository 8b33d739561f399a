"""Generation: caches change nothing; greedy, sampling, beam search and ranking equal their definitions."""

import itertools
from unittest.mock import patch

import pytest
import torch
from helpers import noise, randomized, seeds, small
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.generation import SpecialTokens, beam_search, best_texts, greedy, rank_answers, sample
from mplug2.model.mplug2 import MPLUG2

S, POSITIONS, WIDTH = 7, 9, 16
SPECIAL = SpecialTokens(cls=1, sep=2, pad=0)


def make_model(seed: int, end: float = 0.0) -> MPLUG2:
    """A decoder with random weights over seven tokens; `end` makes [SEP] more likely."""
    config = small(vocab_size=S, max_positions=POSITIONS, width=WIDTH, decoder_layers=1)
    model = randomized(MPLUG2(config, "video_caption"), seed)
    model.decoder.embeddings.word.weight.data.mul_(3)  # so that what follows depends on the token
    model.decoder.head.bias.data[SPECIAL.sep] += end
    return model


def make_memory(seed: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory `b m d` and its mask, with 1 to m real tokens per row."""
    real = torch.randint(1, 5, (b, 1), generator=torch.Generator().manual_seed(seed))
    return 2 * noise(b, 4, WIDTH, seed=seed), torch.arange(4) < real


def log_probs(model: MPLUG2, memory: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens after each of `ids`, for one sample: `l s`."""
    row = torch.tensor([ids])
    with torch.no_grad():
        return model.decode(row, row > -1, memory[None])[0].log_softmax(1)


def log_prob(model: MPLUG2, memory: torch.Tensor, ids: list[int]) -> float:
    """Log-probability of `ids` after the first, for one sample."""
    return sum(float(row[token]) for row, token in zip(log_probs(model, memory, ids), ids[1:]))


def prompts(b: int, *ids: int) -> torch.Tensor:
    return torch.tensor([[SPECIAL.cls, *ids]]).repeat(b, 1)


# ---- caches ----------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans())
def test_steps_with_caches_have_the_logits_of_the_whole_text(seed, b, r, pieces, masked):
    """For any cut of the text into pieces. r texts share each memory, which is never copied."""
    config = small(vocab_size=S, max_positions=12, width=WIDTH, decoder_layers=2)
    decoder = randomized(MPLUG2(config, "video_caption"), seed).decoder
    memory, memory_mask = make_memory(seed, b)
    memory_mask = memory_mask if masked else None
    ids = torch.randint(0, S, (b * r, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    whole = decoder(ids, ids > -1, memory, memory_mask)
    state, done = decoder.init_state(memory, memory_mask), 0
    for piece in pieces:
        found = decoder.step(ids[:, done: done + piece], state)
        done += piece
        torch.testing.assert_close(found, whole[:, done - 1], rtol=1e-9, atol=1e-9)
    assert all(key.shape[0] == b for key, _ in state.memories)


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 3), st.data())
def test_a_state_keeps_the_selected_memories_and_texts(seed, b, r, data):
    decoder, (memory, mask) = make_model(seed).decoder, make_memory(seed, b)
    ids = torch.randint(0, S, (b * r, 3), generator=torch.Generator().manual_seed(seed))
    state = decoder.init_state(memory, mask)
    decoder.step(ids[:, :2], state)
    kept = torch.tensor(data.draw(st.lists(st.integers(0, b - 1), min_size=1, max_size=b, unique=True)))
    # r texts of each kept memory; the same text may be kept twice.
    rows = torch.tensor([r * i + data.draw(st.integers(0, r - 1)) for i in kept.tolist() for _ in range(r)])
    state.reorder_memories(kept)
    state.reorder_texts(rows)
    whole = decoder(ids[rows], ids[rows] > -1, memory[kept], mask[kept])
    torch.testing.assert_close(decoder.step(ids[rows, 2:], state), whole[:, -1], rtol=1e-9, atol=1e-9)


# ---- greedy ----------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 4), st.lists(st.integers(3, S - 1), max_size=3), st.integers(1, 12))
def test_greedy_takes_the_most_likely_token_until_sep_or_the_end(seed, b, prompt, max_length):
    model, (memory, mask) = make_model(seed, end=1.0), make_memory(seed, b)
    found = greedy(model, memory, prompts(b, *prompt), SPECIAL, max_length, mask)
    for i in range(b):  # alone, without padding
        expected = []
        while len(expected) < min(max_length, POSITIONS - 1 - len(prompt)):
            token = int(log_probs(model, memory[i, mask[i]], [SPECIAL.cls, *prompt, *expected])[-1].argmax())
            if token == SPECIAL.sep:
                break
            expected.append(token)
        assert found[i] == expected


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_a_memory_is_no_longer_read_when_all_of_its_texts_have_ended(seed, b, r):
    model, rows = make_model(seed, end=1.0), []
    prompt = torch.randint(3, S, (b * r, 2), generator=generator(seed))
    step = model.decoder.step
    with patch.object(model.decoder, "step", lambda ids, state: rows.append(len(ids)) or step(ids, state)):
        written = greedy(model, make_memory(seed, b)[0], prompt, SPECIAL, max_length=6)
    longest = [max(map(len, written[r * i: r * i + r])) for i in range(b)]
    assert rows == [r * count for j in range(6) if (count := sum(length >= j for length in longest))]


def test_greedy_ends_at_once_or_never_if_the_model_does():
    memory, _ = make_memory(0, 3)
    assert greedy(make_model(0, end=100.0), memory, prompts(3), SPECIAL) == [[], [], []]
    endless = greedy(make_model(0, end=-100.0), memory, prompts(3), SPECIAL, max_length=5)
    assert [len(row) for row in endless] == [5, 5, 5]
    longest = greedy(make_model(0, end=-100.0), memory, prompts(3, 4), SPECIAL, max_length=50)
    assert [len(row) for row in longest] == [POSITIONS - 2] * 3


def test_a_prompt_that_fills_all_positions_and_a_length_of_zero_are_refused():
    memory, _ = make_memory(0, 1)
    full = torch.ones(1, POSITIONS, dtype=torch.long)
    for search in (greedy, beam_search):
        with pytest.raises(ValueError, match="a prompt of 9 tokens leaves no room.* 9 positions"):
            search(make_model(0), memory, full, SPECIAL)
        with pytest.raises(ValueError, match="max_length=0: expected at least 1 token"):
            search(make_model(0), memory, prompts(1), SPECIAL, max_length=0)
    longest = beam_search(make_model(0, end=-100.0), memory, full[:, 1:], SPECIAL, beams=2, min_length=0)
    assert {len(ids) for _, ids in longest[0]} == {1}


# ---- sampling --------------------------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(1, 4), st.sampled_from([dict(temperature=1e-4), dict(top_k=1), dict(top_p=1e-6)]))
def test_sampling_from_only_the_most_likely_token_is_greedy(seed, b, only):
    model, (memory, mask) = make_model(seed, end=1.0), make_memory(seed, b)
    found = sample(model, memory, prompts(b), SPECIAL, 6, generator=generator(seed), memory_mask=mask, **only)
    assert found == greedy(model, memory, prompts(b), SPECIAL, 6, mask)


def test_tokens_are_drawn_with_their_probability_among_the_allowed_ones():
    n, (memory, _) = 3000, make_memory(1, 1)
    model = make_model(1)
    plain = log_probs(model, memory[0], [SPECIAL.cls])[-1]
    order = plain.argsort(descending=True)
    for arguments, temperature, allowed in (
        (dict(), 1.0, S), (dict(temperature=0.5), 0.5, S), (dict(temperature=2.0, top_k=3), 2.0, 3),
        (dict(top_p=float(plain.exp()[order[:2]].sum()) - 1e-6), 1.0, 2),  # the first token alone is below top_p
    ):
        weight = (plain / temperature).softmax(0)
        weight[order[allowed:]] = 0
        expected = weight / weight.sum()
        drawn = sample(model, memory, prompts(n), SPECIAL, 1, generator=generator(0), **arguments)
        counts = torch.tensor([text[0] if text else SPECIAL.sep for text in drawn]).bincount(minlength=S)
        deviation = (expected * (1 - expected) / n).sqrt()
        assert ((counts / n - expected).abs() <= 4 * deviation + 1e-9).all(), (arguments, counts / n, expected)


def test_no_token_is_drawn_after_those_whose_probabilities_sum_to_exactly_top_p():
    model, (memory, _) = make_model(0), make_memory(0, 1)
    model.decoder.embeddings.word.weight.data.zero_()
    model.decoder.head.bias.data[:] = torch.tensor([float("-inf")] * 3 + [0.0] * 4)  # four tokens, 1/4 each
    for top_p, allowed in ((0.25, {3}), (0.5, {3, 4}), (0.75, {3, 4, 5}), (1.0, {3, 4, 5, 6})):
        drawn = sample(model, memory, prompts(200), SPECIAL, 1, top_p=top_p, generator=generator(0))
        assert {text[0] for text in drawn} == allowed


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 3))
def test_a_seed_fixes_the_sample_for_any_other_texts(seed, b, r):
    model, (memory, mask) = make_model(seed, end=1.0), make_memory(seed, b)
    found = sample(model, memory, prompts(b * r), SPECIAL, 6, generator=generator(seed), memory_mask=mask)
    assert found == sample(model, memory, prompts(b * r), SPECIAL, 6, generator=generator(seed), memory_mask=mask)
    other, other_mask = make_memory(seed + 1, b)  # the first memory stays, the others change
    other[0], other_mask[0] = memory[0], mask[0]
    again = sample(model, other, prompts(b * r), SPECIAL, 6, generator=generator(seed), memory_mask=other_mask)
    assert again[:r] == found[:r]


def test_sampling_refuses_invalid_settings():
    memory, _ = make_memory(0, 2)
    for wrong in (dict(temperature=0.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)):
        with pytest.raises(ValueError, match="|".join(f"{name}={value}" for name, value in wrong.items())):
            sample(make_model(0), memory, prompts(2), SPECIAL, **wrong)
    with pytest.raises(ValueError, match="3 texts cannot share 2 memories evenly"):
        sample(make_model(0), memory, prompts(3), SPECIAL)


# ---- beam search -----------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 12), st.booleans())
def test_a_beam_of_one_is_greedy(seed, b, max_length, prompted):
    model, (memory, mask) = make_model(seed, end=1.0), make_memory(seed, b)
    prompt = prompts(b, *[4] * prompted)
    found = beam_search(model, memory, prompt, SPECIAL, 1, 0, max_length, memory_mask=mask)
    assert best_texts(found, SPECIAL) == greedy(model, memory, prompt, SPECIAL, max_length, mask)


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(1, 3), st.booleans(), st.floats(0, 2))
def test_a_beam_as_wide_as_all_texts_of_a_length_is_exhaustive_search(seed, length, prompted, penalty):
    b, words = 2, [token for token in range(S) if token != SPECIAL.sep]
    model, (memory, mask) = make_model(seed, end=1.0), make_memory(seed, b)
    prompt = prompts(b, *[5] * prompted)
    found = beam_search(model, memory, prompt, SPECIAL, len(words) ** length, length, length, penalty, mask)
    first = prompt.shape[1]
    texts = torch.tensor(list(itertools.product(words, repeat=length)))
    for i in range(b):
        ids = torch.cat([prompt[i].expand(len(texts), -1), texts], dim=1)
        with torch.no_grad():
            steps = model.decode(ids, ids > -1, memory[i, mask[i]].expand(len(ids), -1, -1))
        steps = steps[:, first - 1: -1].log_softmax(-1)
        scores = steps.gather(2, texts[:, :, None]).sum((1, 2)) / ((6 + length - 1) / 6) ** penalty
        every = sorted(zip(scores.tolist(), texts.tolist()), reverse=True)
        possible = [(score, ids) for score, ids in found[i] if score > -1e6]  # without hypotheses that ended too early
        assert [ids for _, ids in possible] == [ids for _, ids in every]
        assert [score for score, _ in possible] == pytest.approx([score for score, _ in every], abs=1e-9)


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 4), st.integers(0, 3))
def test_a_batch_is_its_samples_one_by_one(seed, b, beams, min_length):
    model, (memory, mask) = make_model(seed, end=1.5), make_memory(seed, b)
    prompt = prompts(b, 3)
    together = beam_search(model, memory, prompt, SPECIAL, beams, min_length, 6, memory_mask=mask)
    for i in range(b):
        one = slice(i, i + 1)
        # Only the real tokens of the memory: padding must not count.
        (alone,) = beam_search(model, memory[one, mask[i]], prompt[one], SPECIAL, beams, min_length, 6)
        assert [ids for _, ids in together[i]] == [ids for _, ids in alone]
        assert [score for score, _ in together[i]] == pytest.approx([score for score, _ in alone])


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(0, 4))
def test_hypotheses_are_sorted_scored_by_the_model_and_long_enough(seed, beams, min_length):
    model, (memory, _) = make_model(seed, end=2.0), make_memory(seed, 2)
    found = beam_search(model, memory, prompts(2), SPECIAL, beams, min_length, 5)
    for i, hypotheses in enumerate(found):
        assert len(hypotheses) >= beams
        scores = [score for score, _ in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for score, ids in hypotheses:
            if score > -1e6:  # with few continuations, forbidden ones are kept at -1e20
                assert SPECIAL.sep not in ids[:min_length] and len(ids) <= 5
                whole = log_prob(model, memory[i], [SPECIAL.cls, *ids])
                assert score == pytest.approx(whole / ((5 + len(ids)) / 6) ** 0.6, abs=1e-9)


# ---- ranking ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 8))
def test_ranking_scores_the_answers_with_the_most_likely_first_tokens(seed, b, k):
    """Every answer has another first token, so it is clear which k answers are scored."""
    model, (memory, mask), rng = make_model(seed), make_memory(seed, b), torch.Generator().manual_seed(seed)
    lengths, firsts = torch.randint(0, 4, (5,), generator=rng).tolist(), torch.randperm(S, generator=rng).tolist()
    texts = [[first, *torch.randint(3, S, (n,), generator=rng).tolist()] for first, n in zip(firsts, lengths)]
    rows = [[SPECIAL.cls, *text, SPECIAL.sep] for text in texts]
    length = max(map(len, rows))
    answers = torch.tensor([row + [SPECIAL.pad] * (length - len(row)) for row in rows])
    answers_mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    order, probability = rank_answers(model, memory, answers, answers_mask, k, mask)
    assert order.shape == probability.shape == (b, min(k, 5))
    for i in range(b):
        real = memory[i, mask[i]]
        first = [log_prob(model, real, row[:2]) for row in rows]
        best = sorted(range(5), key=lambda a: -first[a])[:k]
        scores = {a: first[a] + log_prob(model, real, rows[a]) for a in best}  # as released, the first counts twice
        expected = sorted(best, key=lambda a: -scores[a])
        assert order[i].tolist() == expected
        expected_probability = torch.tensor([scores[a] for a in expected], dtype=torch.float64).softmax(0)
        torch.testing.assert_close(probability[i], expected_probability)
