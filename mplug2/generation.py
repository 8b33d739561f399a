"""Writing text with the decoder: greedy, sampling, beam search as released, and ranking of a list of answers.

Nothing is computed twice: the keys and values of the memory are made once and shared by all texts about it, and each
step adds those of one token to the cache (decoder.py). Samples that are done leave the batch.

Axes: b batch, r texts about each memory, l tokens, m memory tokens, d width, k beams, s vocabulary, a answers.

Generation starts from [CLS] (the released behaviour) or from [CLS] and the tokens of a prompt. Results are lists of
token ids a sample, without [CLS] and prompt, up to and without the first [SEP].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from mplug2.model.mplug2 import MPLUG2
from mplug2.model.shapes import check


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that generation has to know."""

    cls: int
    sep: int
    pad: int


@torch.no_grad()
def greedy(
    model: MPLUG2, memory: Tensor, start: Tensor, special: SpecialTokens, max_length: int = 20,
    memory_mask: Tensor | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again, for all samples at once.

    memory `b m d`, start `b l` (the ids to go on from, [CLS] first, no padding), memory_mask `b m`.
    At most `max_length` new tokens, [SEP] included.
    """
    return _write(model, memory, start, special, max_length, memory_mask, lambda logits, _: logits.argmax(dim=-1))


@torch.no_grad()
def sample(
    model: MPLUG2, memory: Tensor, start: Tensor, special: SpecialTokens, max_length: int = 20,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
    memory_mask: Tensor | None = None,
) -> list[list[int]]:
    """Each next token drawn by its probability, after the logits are divided by `temperature`: of the `top_k`
    likeliest tokens (0: all), and of those the fewest that hold `top_p` of the probability.

    Arguments as in `greedy`; start may be `(b r) l`, for r texts about each memory. The generator of the memory's
    device decides all draws.
    """
    if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected a temperature above 0, "
                         "top_k of at least 0 and top_p above 0 and at most 1")

    def draw(logits: Tensor, rows: Tensor) -> Tensor:
        probability, token = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        sum_before = probability.cumsum(dim=-1) - probability
        probability[sum_before >= top_p] = 0.0  # never the first
        probability[:, top_k or token.shape[1]:] = 0.0
        total = probability.cumsum(dim=-1)
        # One number for every text, also of those that are done: what one text draws does not depend on the others.
        point = torch.rand(len(start), generator=generator, device=logits.device, dtype=logits.dtype)[rows]
        place = torch.searchsorted(total, (point * total[:, -1])[:, None], right=True)
        return token.gather(1, place.clamp(max=token.shape[1] - 1))[:, 0]

    return _write(model, memory, start, special, max_length, memory_mask, draw)


def _write(
    model: MPLUG2, memory: Tensor, start: Tensor, special: SpecialTokens, max_length: int, memory_mask: Tensor | None,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> list[list[int]]:
    """`choose(logits n s, rows n)` gives the next token `n` of the texts with these row numbers in `start`."""
    b, first, device = check(memory, "b m d")["b"], check(start, "br l")["l"], memory.device
    r = _share(start, b)
    decoder, steps = model.require("decoder"), _room(model, first, max_length)
    state = decoder.start(memory, memory_mask)
    written = start.new_full((len(start), steps), special.sep)
    rows = torch.arange(len(start), device=device)
    ids, ended = start, torch.zeros(len(start), dtype=torch.bool, device=device)
    for step in range(steps):
        token = torch.where(ended, special.sep, choose(decoder.step(ids, state), rows))
        written[rows, step] = token
        ids, ended = token[:, None], ended | (token == special.sep)
        done = rearrange(ended, "(b r) -> b r", r=r).all(dim=1)
        if step + 1 == steps or done.all():
            break
        if done.any():  # a memory goes when all texts about it have ended
            state.reorder_memories((~done).nonzero()[:, 0])
            keep = repeat(~done, "b -> (b r)", r=r).nonzero()[:, 0]
            state.reorder_texts(keep)
            rows, ids, ended = rows[keep], ids[keep], ended[keep]
    return [_until(row, special.sep) for row in written.tolist()]


@torch.no_grad()
def beam_search(
    model: MPLUG2, memory: Tensor, start: Tensor, special: SpecialTokens, beams: int = 5, min_length: int = 1,
    max_length: int = 20, length_penalty: float = 0.6, memory_mask: Tensor | None = None,
) -> list[list[tuple[float, list[int]]]]:
    """Beam search by the released rules: for each sample its hypotheses as (score, ids), best first.

    Arguments as in `greedy`. At step j (from 0) a hypothesis scores log-probability / ((6 + j) / 6) ** length_penalty,
    [SEP] is forbidden while j < min_length, and the best `beams` of all continuations live on. A beam that ends below
    the top is stored and goes on all the same; once the top beam has ended, or at `max_length` tokens, all beams are
    stored and the sample is done. Here the ids keep their [SEP]s, as released.
    """
    b, first, device = check(memory, "b m d")["b"], check(start, "b l")["l"], memory.device
    decoder, steps = model.require("decoder"), _room(model, first, max_length)
    state = decoder.start(memory, memory_mask)
    stored: list[list[tuple[float, list[int]]]] = [[] for _ in range(b)]
    samples = list(range(b))  # which samples are still at work, in the order of the rows below
    # All beams start alike: they are computed as one, and only the first may be continued in the first step.
    logits = repeat(decoder.step(start, state), "b s -> b k s", k=beams)
    state.reorder_texts(repeat(torch.arange(b, device=device), "b -> (b k)", k=beams))
    ids = start.new_empty(b, beams, 0)
    total = torch.full((b, beams), float("-inf"), device=device)
    total[:, 0] = 0.0
    for step in range(steps):
        log_probs = logits.log_softmax(dim=-1)
        if step < min_length:
            log_probs[:, :, special.sep] = -1e20
        s = log_probs.shape[-1]
        penalty = ((6 + step) / 6) ** length_penalty
        scores = rearrange((total[:, :, None] + log_probs) / penalty, "b k s -> b (k s)", k=beams, s=s)
        best, index = scores.topk(beams, dim=-1)
        total, origin, token = best * penalty, index // s, index % s
        ids = torch.cat([ids.gather(1, repeat(origin, "b k -> b k l", l=step)), token[:, :, None]], dim=2)
        ended = token == special.sep
        done = ended[:, 0] | (step + 1 == steps)
        for row, beam in (ended | done[:, None]).nonzero().tolist():
            stored[samples[row]].append((best[row, beam].item(), ids[row, beam].tolist()))
        keep = (~done).nonzero()[:, 0]
        if len(keep) == 0:
            break
        state.reorder_texts(rearrange(keep[:, None] * beams + origin[keep], "b k -> (b k)", k=beams))
        if len(keep) < len(samples):
            state.reorder_memories(keep)
            samples = [samples[row] for row in keep.tolist()]
            ids, total, token = ids[keep], total[keep], token[keep]
        logits = decoder.step(rearrange(token, "b k -> (b k) 1", k=beams), state)
        logits = rearrange(logits, "(b k) s -> b k s", k=beams, s=s)
    return [sorted(hypotheses, key=lambda hypothesis: -hypothesis[0]) for hypotheses in stored]


def best_texts(hypotheses: list[list[tuple[float, list[int]]]], special: SpecialTokens) -> list[list[int]]:
    """The best hypothesis of each sample, up to its first [SEP]."""
    return [_until(sample[0][1], special.sep) for sample in hypotheses]


@torch.no_grad()
def rank_answers(
    model: MPLUG2, memory: Tensor, answers: Tensor, answers_mask: Tensor, k: int, memory_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score a closed list of answers: indices `b k` into the list, likeliest first, and their probabilities `b k`.

    answers `a l` with [CLS] first and [SEP] last. The k answers whose first token is likeliest are scored whole,
    and re-ranked by the sum of their log-probabilities. As released, the first answer token counts twice.
    """
    b = check(memory, "b m d")["b"]
    count = check(answers_mask, "a l", **check(answers, "a l"))["a"]
    k = min(k, count)
    decoder = model.require("decoder")
    first = decoder.step(repeat(answers[0, :1], "l -> b l", b=b), decoder.start(memory, memory_mask)).softmax(dim=-1)
    first_probability, chosen = first[:, answers[:, 1]].topk(k, dim=-1)  # b k
    ids, mask = (rearrange(x[chosen], "b k l -> (b k) l", b=b, k=k) for x in (answers, answers_mask))
    logits = model.decode(ids, mask, memory, memory_mask)  # k answers share each memory
    token_log_probs = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
    whole = (token_log_probs * mask[:, 1:]).sum(dim=-1)
    scores = first_probability.log() + rearrange(whole, "(b k) -> b k", b=b, k=k)
    probability, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
    return chosen.gather(1, order), probability


def _share(start: Tensor, b: int) -> int:
    if start.shape[0] % b:
        raise ValueError(f"{start.shape[0]} texts cannot share {b} memories evenly")
    return start.shape[0] // b


def _room(model: MPLUG2, first: int, max_length: int) -> int:
    """How many tokens may follow `first` ones: no text is longer than the decoder has positions."""
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: expected at least 1 token")
    room = model.config.max_positions - first
    if room < 1:
        raise ValueError(f"a prompt of {first} tokens leaves no room in the {model.config.max_positions} positions")
    return min(max_length, room)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
