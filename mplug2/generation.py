"""Writing text with the decoder: greedy decoding, sampling, beam search, and ranking a closed list of answers.

All functions take a memory, which the decoder attends to, and prompts: token ids that start with [CLS] (the released
code starts from [CLS] alone). They return the ids after the prompt, one list per text. `DecoderState` keeps keys and
values, so every step computes one new token per text. Finished texts leave the batch.

Axes: b batch, m memory tokens, d width, l tokens of a prompt, r texts (or beams) per memory, s vocabulary, a answers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from mplug2.model.attention import Memory
from mplug2.model.mplug2 import MPLUG2
from mplug2.model.shapes import check


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning of their own."""

    cls: int
    sep: int
    pad: int


@torch.no_grad()
def greedy(
    model: MPLUG2, memory: Memory, prompt: Tensor, special_tokens: SpecialTokens, max_length: int = 20,
    memory_mask: Tensor | None = None,
) -> list[list[int]]:
    """Take the most likely token at each step, until [SEP] or `max_length` tokens.

    memory `b m d`, memory_mask `b m`, prompt `(b r) l` without padding. The ids end before [SEP].
    """
    return _generate(model, memory, prompt, special_tokens, max_length, memory_mask, lambda logits, _: logits.argmax(1))


@torch.no_grad()
def sample(
    model: MPLUG2, memory: Memory, prompt: Tensor, special_tokens: SpecialTokens, max_length: int = 20,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
    memory_mask: Tensor | None = None,
) -> list[list[int]]:
    """Draw each token from softmax(logits / temperature), until [SEP] or `max_length` tokens.

    Only the `top_k` most likely tokens (0: all) can be drawn, and of them only the fewest whose probabilities sum to
    `top_p`. The other arguments are those of `greedy`; `generator` must be on the device of the memory.
    """
    if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected a temperature above 0, "
                         "top_k of at least 0 and top_p above 0 and at most 1")

    def draw(logits: Tensor, rows: Tensor) -> Tensor:
        probability, token = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        sum_before = probability.cumsum(dim=-1) - probability
        probability[sum_before >= top_p] = 0.0  # never the most likely token
        probability[:, top_k or token.shape[1]:] = 0.0
        total = probability.cumsum(dim=-1)
        # One number for every text, finished ones too: then the draws of a text do not depend on the others.
        point = torch.rand(len(prompt), generator=generator, device=logits.device, dtype=logits.dtype)[rows]
        drawn = torch.searchsorted(total, (point * total[:, -1])[:, None], right=True)
        return token.gather(1, drawn.clamp(max=token.shape[1] - 1))[:, 0]

    return _generate(model, memory, prompt, special_tokens, max_length, memory_mask, draw)


def _generate(
    model: MPLUG2, memory: Memory, prompt: Tensor, special_tokens: SpecialTokens, max_length: int,
    memory_mask: Tensor | None, choose: Callable[[Tensor, Tensor], Tensor],
) -> list[list[int]]:
    """The loop of `greedy` and `sample`. `choose(logits, rows)` returns the next tokens of the texts in these rows of
    `prompt`; logits are `rows s`."""
    b, texts, device = check(memory, "b m d")["b"], check(prompt, "br l")["br"], prompt.device
    if texts % b:
        raise ValueError(f"{texts} texts cannot share {b} memories evenly")
    decoder, steps = model.require("decoder"), _max_new_tokens(model, prompt, max_length)
    state = decoder.init_state(memory, memory_mask)
    written = prompt.new_full((texts, steps), special_tokens.sep)
    rows = torch.arange(texts, device=device)
    ids, ended = prompt, torch.zeros(texts, dtype=torch.bool, device=device)
    for step in range(steps):
        token = torch.where(ended, special_tokens.sep, choose(decoder.step(ids, state), rows))
        written[rows, step] = token
        ids, ended = token[:, None], ended | (token == special_tokens.sep)
        done = rearrange(ended, "(b r) -> b r", r=texts // b).all(dim=1)
        if step + 1 == steps or done.all():
            break
        if done.any():  # drop the memories whose texts have all ended
            state.reorder_memories((~done).nonzero()[:, 0])
            keep = repeat(~done, "b -> (b r)", r=texts // b).nonzero()[:, 0]
            state.reorder_texts(keep)
            rows, ids, ended = rows[keep], ids[keep], ended[keep]
    return [_before_sep(row, special_tokens) for row in written.tolist()]


@torch.no_grad()
def beam_search(
    model: MPLUG2, memory: Memory, prompt: Tensor, special_tokens: SpecialTokens, beams: int = 5,
    min_length: int = 1, max_length: int = 20, length_penalty: float = 0.6, memory_mask: Tensor | None = None,
) -> list[list[tuple[float, list[int]]]]:
    """Beam search with the rules of the released code: the hypotheses of each sample as (score, ids), best first.

    The arguments are those of `greedy`, with one prompt per memory. Step j (from 0) scores a hypothesis as
    log-probability / ((6 + j) / 6) ** length_penalty, forbids [SEP] while j < min_length, and keeps the best `beams`
    continuations. A beam that ends below the top is stored, but also continues. When the top beam ends, or after
    `max_length` tokens, all beams are stored and the sample is done. As in the released code, ids include [SEP].
    """
    b, device = check(memory, "b m d")["b"], prompt.device
    check(prompt, "b l", b=b)
    decoder, steps = model.require("decoder"), _max_new_tokens(model, prompt, max_length)
    state = decoder.init_state(memory, memory_mask)
    stored: list[list[tuple[float, list[int]]]] = [[] for _ in range(b)]
    samples = list(range(b))  # the samples that are not done, in the order of the rows below
    # All beams start alike: compute one of them, and let the first step continue only the first.
    logits = repeat(decoder.step(prompt, state), "b s -> b r s", r=beams)
    state.reorder_texts(repeat(torch.arange(b, device=device), "b -> (b r)", r=beams))
    ids = prompt.new_empty(b, beams, 0)
    total = torch.full((b, beams), float("-inf"), device=device)
    total[:, 0] = 0.0
    for step in range(steps):
        log_probs = logits.log_softmax(dim=-1)
        if step < min_length:
            log_probs[:, :, special_tokens.sep] = -1e20
        s = log_probs.shape[-1]
        penalty = ((6 + step) / 6) ** length_penalty
        scores = rearrange((total[:, :, None] + log_probs) / penalty, "b r s -> b (r s)", r=beams, s=s)
        best, index = scores.topk(beams, dim=-1)
        total, origin, token = best * penalty, index // s, index % s
        ids = torch.cat([ids.gather(1, repeat(origin, "b r -> b r l", l=step)), token[:, :, None]], dim=2)
        ended = token == special_tokens.sep
        done = ended[:, 0] | (step + 1 == steps)
        for row, beam in (ended | done[:, None]).nonzero().tolist():
            stored[samples[row]].append((best[row, beam].item(), ids[row, beam].tolist()))
        keep = (~done).nonzero()[:, 0]
        if len(keep) == 0:
            break
        state.reorder_texts(rearrange(keep[:, None] * beams + origin[keep], "b r -> (b r)", r=beams))
        if len(keep) < len(samples):
            state.reorder_memories(keep)
            samples = [samples[row] for row in keep.tolist()]
            ids, total, token = ids[keep], total[keep], token[keep]
        logits = decoder.step(rearrange(token, "b r -> (b r) 1", r=beams), state)
        logits = rearrange(logits, "(b r) s -> b r s", r=beams, s=s)
    return [sorted(hypotheses, key=lambda hypothesis: -hypothesis[0]) for hypotheses in stored]


def best_texts(hypotheses: list[list[tuple[float, list[int]]]], special_tokens: SpecialTokens) -> list[list[int]]:
    """The ids of each sample's best hypothesis, up to its first [SEP]."""
    return [_before_sep(ranked[0][1], special_tokens) for ranked in hypotheses]


@torch.no_grad()
def rank_answers(
    model: MPLUG2, memory: Memory, answers: Tensor, answers_mask: Tensor, candidates: int,
    memory_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank a closed list of answers: indices into the list, most likely first, and probabilities, each `b r`.

    answers `a l`, from [CLS] to [SEP]. The r = `candidates` answers with the most likely first tokens are scored
    whole, by the sum of their log-probabilities. As in the released code, the first token counts twice.
    """
    b, a = check(memory, "b m d")["b"], check(answers_mask, "a l", **check(answers, "a l"))["a"]
    r, decoder = min(candidates, a), model.require("decoder")
    cls_only = repeat(answers[0, :1], "l -> b l", b=b)
    state = decoder.init_state(memory, memory_mask)
    first = decoder.step(cls_only, state).softmax(dim=-1)
    first_probability, chosen = first[:, answers[:, 1]].topk(r, dim=-1)
    ids, mask = (rearrange(x[chosen], "b r l -> (b r) l", b=b, r=r) for x in (answers, answers_mask))
    logits = decoder(ids, mask, state)
    token_log_probs = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
    whole = (token_log_probs * mask[:, 1:]).sum(dim=-1)
    scores = first_probability.log() + rearrange(whole, "(b r) -> b r", b=b, r=r)
    probability, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
    return chosen.gather(1, order), probability


def _max_new_tokens(model: MPLUG2, prompt: Tensor, max_length: int) -> int:
    """`max_length`, or fewer if the decoder has no positions left after the prompt."""
    first, positions = prompt.shape[1], model.config.max_positions
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: expected at least 1 token")
    if first >= positions:
        raise ValueError(f"a prompt of {first} tokens leaves no room in the {positions} positions; shorten it")
    return min(max_length, positions - first)


def _before_sep(ids: list[int], special_tokens: SpecialTokens) -> list[int]:
    return ids[: ids.index(special_tokens.sep)] if special_tokens.sep in ids else ids
