"""Writing text with the decoder: greedy, sampling-free beam search as released, and ranking of an answer list.

Axes: b batch, l tokens written so far, m memory tokens, k beams, s vocabulary, a answers.

Generation starts from [CLS] (the released behaviour) or from [CLS] and the tokens of a prompt. Results are lists of
token ids a sample, without [CLS] and prompt, up to and without the first [SEP].
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from mplug2.model import MPLUG2
from mplug2.shapes import check


@dataclass(frozen=True)
class Special:
    """Ids of the tokens that generation has to know."""

    cls: int
    sep: int
    pad: int


@torch.no_grad()
def greedy(
    model: MPLUG2, memory: Tensor, start: Tensor, special: Special, max_length: int = 20,
    memory_mask: Tensor | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again, for all samples at once.

    memory `b m d`, start `b l` (the ids to go on from, [CLS] first, no padding), memory_mask `b m`.
    At most `max_length` new tokens, [SEP] included.
    """
    b = check(memory, "b m d")["b"]
    ids, ended = start, torch.zeros(b, dtype=torch.bool, device=start.device)
    first = start.shape[1]
    for _ in range(_room(model, first, max_length)):
        logits = model.decode(ids, torch.ones_like(ids, dtype=torch.bool), memory, memory_mask)[:, -1]
        token = torch.where(ended, special.sep, logits.argmax(dim=-1))
        ids, ended = torch.cat([ids, token[:, None]], dim=1), ended | (token == special.sep)
        if ended.all():
            break
    return [_until(row, special.sep) for row in ids[:, first:].tolist()]


@torch.no_grad()
def beam_search(
    model: MPLUG2, memory: Tensor, start: Tensor, special: Special, beams: int = 5, min_length: int = 1,
    max_length: int = 20, length_penalty: float = 0.6, memory_mask: Tensor | None = None,
) -> list[list[tuple[float, list[int]]]]:
    """Beam search by the released rules: for each sample its hypotheses as (score, ids), best first.

    Arguments as in `greedy`. At step j (from 0) a hypothesis scores log-probability / ((6 + j) / 6) ** length_penalty,
    [SEP] is forbidden while j < min_length, and the best `beams` of all continuations live on. A beam that ends below
    the top is stored and goes on all the same; once the top beam has ended, or at `max_length` tokens, all beams are
    stored and the sample is done. Here the ids keep their [SEP]s, as released.
    """
    sizes = check(memory, "b m d")
    b, device, first = sizes["b"], memory.device, start.shape[1]
    stored: list[list[tuple[float, list[int]]]] = [[] for _ in range(b)]
    samples = list(range(b))  # which samples are still at work, in the order of the rows below
    ids = repeat(start, "b l -> b k l", k=beams)
    # All beams start alike: only the first may be continued in the first step.
    total = torch.full((b, beams), float("-inf"), device=device)
    total[:, 0] = 0.0
    steps = _room(model, first, max_length)
    for step in range(steps):
        n = len(samples)
        rows = rearrange(ids, "b k l -> (b k) l", b=n, k=beams)
        logits = model.decode(
            rows, torch.ones_like(rows, dtype=torch.bool), repeat(memory, "b m d -> (b k) m d", k=beams),
            None if memory_mask is None else repeat(memory_mask, "b m -> (b k) m", k=beams),
        )[:, -1]
        log_probs = rearrange(logits.log_softmax(dim=-1), "(b k) s -> b k s", b=n, k=beams)
        if step < min_length:
            log_probs[:, :, special.sep] = -1e20
        s = log_probs.shape[-1]
        penalty = ((6 + step) / 6) ** length_penalty
        scores = rearrange((total[:, :, None] + log_probs) / penalty, "b k s -> b (k s)", b=n, k=beams, s=s)
        best, index = scores.topk(beams, dim=-1)
        total, origin, token = best * penalty, index // s, index % s
        ids = torch.cat([ids.gather(1, repeat(origin, "b k -> b k l", l=ids.shape[2])), token[:, :, None]], dim=2)
        ended = token == special.sep
        done = ended[:, 0] | (step + 1 == steps)
        for row, beam in (ended | done[:, None]).nonzero().tolist():
            stored[samples[row]].append((best[row, beam].item(), ids[row, beam, first:].tolist()))
        keep = (~done).nonzero()[:, 0]
        if len(keep) == 0:
            break
        samples = [samples[row] for row in keep.tolist()]
        ids, total, memory = ids[keep], total[keep], memory[keep]
        memory_mask = None if memory_mask is None else memory_mask[keep]
    return [sorted(hypotheses, key=lambda hypothesis: -hypothesis[0]) for hypotheses in stored]


def best_texts(hypotheses: list[list[tuple[float, list[int]]]], special: Special) -> list[list[int]]:
    """The best hypothesis of each sample, up to its first [SEP]."""
    return [_until(sample[0][1], special.sep) for sample in hypotheses]


@torch.no_grad()
def rank(
    model: MPLUG2, memory: Tensor, answers: Tensor, answers_mask: Tensor, k: int, memory_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score a closed list of answers: indices `b k` into the list, likeliest first, and their probabilities `b k`.

    answers `a l` with [CLS] first and [SEP] last. The k answers whose first token is likeliest are scored whole,
    and re-ranked by the sum of their log-probabilities. As released, the first answer token counts twice.
    """
    b = check(memory, "b m d")["b"]
    count = check(answers_mask, "a l", **check(answers, "a l"))["a"]
    k = min(k, count)
    start = repeat(answers[0, :1], "l -> b l", b=b)
    first = model.decode(start, torch.ones_like(start, dtype=torch.bool), memory, memory_mask)[:, -1].softmax(dim=-1)
    first_probability, chosen = first[:, answers[:, 1]].topk(k, dim=-1)  # b k
    ids, mask = (rearrange(x[chosen], "b k l -> (b k) l", b=b, k=k) for x in (answers, answers_mask))
    logits = model.decode(
        ids, mask, repeat(memory, "b m d -> (b k) m d", k=k),
        None if memory_mask is None else repeat(memory_mask, "b m -> (b k) m", k=k),
    )
    token_log_probs = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
    whole = (token_log_probs * mask[:, 1:]).sum(dim=-1)
    scores = first_probability.log() + rearrange(whole, "(b k) -> b k", b=b, k=k)
    probability, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
    return chosen.gather(1, order), probability


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
