"""Self-critical training: the reward is CIDEr-D, the baseline is the greedy caption, and rewards rise."""

from unittest.mock import patch

import torch
from helpers import noise, randomized, seeds, small
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.data.text import Tokenizer
from mplug2.evaluation.captions import CiderD
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives import self_critical
from mplug2.objectives.self_critical import SelfCritical

REFERENCES = [["a red one", "one in red"], ["a blue two moving left"], ["a two"], ["green three"]]
TOKENIZER = Tokenizer.train([text for texts in REFERENCES for text in texts], 60)


def make(seed: int = 0) -> MPLUG2:
    return randomized(MPLUG2(small(vocab_size=len(TOKENIZER), dropout=0.3), "video_caption"), seed)


def make_batch(prompt: str = "a", b: int = 3) -> dict:
    ids, mask = TOKENIZER.encode([f"{prompt} {texts[0]}" for texts in REFERENCES[:b]])
    return {"prompted_ids": ids, "prompted_mask": mask, "prompt_length": 2, "references": REFERENCES[:b]}


@settings(max_examples=10)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.lists(st.integers(0, 3), min_size=3, max_size=3), seeds)
def test_the_loss_is_the_advantage_over_the_greedy_caption_times_its_log_probability(drawn, greedy, seed):
    model, batch, vision = make(seed), make_batch(), noise(3, 4, 16, seed=seed)
    texts = ["red one", "a two moving left", "two", "green"]
    written = [TOKENIZER.encode([text], special=False)[0][0].tolist() for text in texts]
    with (
        patch.object(self_critical, "sample", return_value=[written[i] for i in drawn]),
        patch.object(self_critical, "greedy", return_value=[written[i] for i in greedy]),
    ):
        found = SelfCritical(TOKENIZER, REFERENCES, max_length=8).loss(model, vision, batch)
    scorer, terms = CiderD(REFERENCES), []
    for i in range(3):
        reward, baseline = (scorer.scores([REFERENCES[i]], [texts[j]])[0] for j in (drawn[i], greedy[i]))
        ids = torch.tensor([batch["prompted_ids"][i, :2].tolist() + written[drawn[i]] + [TOKENIZER.sep]])
        log_probs = model.decode(ids[:, :-1], ids[:, :-1] > -1, vision[i: i + 1])[0].log_softmax(-1)
        terms += [-(reward - baseline) * log_probs[i - 1, ids[0, i]] for i in range(2, ids.shape[1])]
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)  # rewards are float32


def test_the_reward_of_the_samples_rises():
    """One caption scores, whatever the input: the tokens that lead to it become more likely."""
    torch.manual_seed(0)
    model = MPLUG2(small(vocab_size=len(TOKENIZER), decoder_layers=1), "video_caption").train()
    critic, one, vision = SelfCritical(TOKENIZER, REFERENCES, max_length=4), make_batch(b=1), noise(1, 2, 16).float()
    ids, mask = (one[name].repeat(48, 1) for name in ("prompted_ids", "prompted_mask"))
    batch = {"prompted_ids": ids, "prompted_mask": mask, "prompt_length": 2, "references": REFERENCES[:1] * 48}
    optimizer, rewards = torch.optim.Adam(model.parameters(), lr=1e-2), []
    drawn = self_critical.sample
    with patch.object(self_critical, "sample", side_effect=lambda *given: rewards.append(drawn(*given)) or rewards[-1]):
        for _ in range(25):
            loss = critic.loss(model, vision.expand(48, -1, -1), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    means = [critic.reward(batch["references"], ids, vision.device).mean().item() for ids in rewards]
    assert sum(means[-5:]) > 2 * sum(means[:5]) + 1, means


def test_captions_are_written_without_dropout_and_training_mode_returns():
    model, critic = make().train(), SelfCritical(TOKENIZER, REFERENCES)
    modes = []
    with patch.object(self_critical, "greedy", side_effect=lambda model, *_: modes.append(model.training) or [[6]] * 3):
        critic.loss(model, noise(3, 4, 16), make_batch())
    assert modes == [False] and model.training


def test_under_autocast_the_same_weights_have_gradients():
    """Captions are written without gradients. Autocast keeps a bfloat16 copy of each weight, and torch before 2.10 uses
    this copy, which has no gradient, in the pass after it."""
    found = {}
    for low_precision in False, True:
        model, critic = make().float(), SelfCritical(TOKENIZER, REFERENCES, max_length=4)
        vision = noise(3, 4, 16).float()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=low_precision),
            patch.object(critic, "reward", side_effect=[torch.ones(3), torch.zeros(3)]),
        ):
            loss = critic.loss(model, vision, make_batch())
        loss.backward()
        found[low_precision] = {name for name, value in model.named_parameters() if value.grad is not None}
    assert found[True] == found[False] and any("decoder" in name and "weight" in name for name in found[True])
