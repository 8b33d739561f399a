"""Self-critical sequence training (Rennie et al. 2017): fine-tune captions directly for their CIDEr-D score.

    loss = -(CIDEr-D of a sampled caption - CIDEr-D of the greedy caption) * log p(sampled caption)

A sampled caption becomes more likely if it scores higher than the greedy one, and less likely if it scores lower. The
greedy caption is the baseline, so no second network has to predict one.

Axes: b images or videos, l tokens, v visual tokens, d width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mplug2.data.text import Tokenizer
from mplug2.distributed import global_mean
from mplug2.evaluation.captions import CiderD
from mplug2.generation import SpecialTokens, greedy, sample
from mplug2.model.mplug2 import MPLUG2


class SelfCritical:
    """The reward of a run: CIDEr-D with the document frequencies of its training captions.

    `references` has a list of captions per sample, cleaned like all training text (`data.text.clean`). `max_length` is
    the longest caption in tokens.
    """

    def __init__(self, tokenizer: Tokenizer, references: list[list[str]], max_length: int = 20):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cider = CiderD(references)
        self.special_tokens = SpecialTokens(tokenizer.cls, tokenizer.sep, tokenizer.pad)

    def loss(self, model: MPLUG2, vision: Tensor, batch: dict) -> Tensor:
        """The loss above, averaged over the tokens, for V' `b v d`.

        The batch holds the prompt, at the start of every row of `prompted_ids`, and the `references`.
        """
        prompt = batch["prompted_ids"][:, : batch["prompt_length"]]
        training = model.training
        model.eval()  # captions are written without dropout
        baseline = greedy(model, vision.detach(), prompt, self.special_tokens, self.max_length)
        drawn = sample(model, vision.detach(), prompt, self.special_tokens, self.max_length)
        model.train(training)
        torch.clear_autocast_cache()  # torch < 2.10 would reuse the weights that autocast cast without gradients
        rewards = self.reward(batch["references"], drawn, vision.device)
        advantage = rewards - self.reward(batch["references"], baseline, vision.device)
        # A caption below the longest length ended by itself: its [SEP] was drawn too.
        longest = min(self.max_length, model.config.max_positions - prompt.shape[1])
        rows = [row + [self.special_tokens.sep] * (len(row) < longest) for row in drawn]
        lengths = torch.tensor([len(row) for row in rows], device=prompt.device)
        written = pad_sequence([torch.tensor(row, device=prompt.device) for row in rows], batch_first=True,
                               padding_value=self.special_tokens.pad)
        valid = torch.arange(written.shape[1], device=prompt.device) < lengths[:, None]
        ids, mask = torch.cat([prompt, written], dim=1), torch.cat([torch.ones_like(prompt).bool(), valid], dim=1)
        logits = model.decode(ids[:, :-1], mask[:, :-1], vision)[:, prompt.shape[1] - 1:]
        log_probs = -F.cross_entropy(logits.transpose(1, 2), written, reduction="none")
        return global_mean(-advantage[:, None] * log_probs, valid)

    def reward(self, references: list[list[str]], ids: list[list[int]], device: torch.device) -> Tensor:
        """CIDEr-D of each caption, `b`."""
        scores = self.cider.scores(references, self.tokenizer.decode(ids))
        return torch.tensor(scores, dtype=torch.float32, device=device)
