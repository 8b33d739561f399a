"""Self-critical sequence training (Rennie et al. 2017): captions are trained for the CIDEr-D that they are scored by.

A caption is sampled and another is written greedily; the words of the sampled one become likelier if it scores higher
than the greedy one, and less likely if lower. The greedy caption is what the model does when it is used: it serves as
baseline, so that no second network has to guess one.

Axes: b clips or images, l tokens, v visual tokens.
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
    """The reward of a run: CIDEr-D with the document frequencies of its training captions, one list for each sample,
    cleaned (`tokenizer.clean`) like all training text. `max_length`: tokens a caption may have."""

    def __init__(self, tokenizer: Tokenizer, references: list[list[str]], max_length: int = 20):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cider = CiderD(references)
        self.special_tokens = SpecialTokens(tokenizer.cls, tokenizer.sep, tokenizer.pad)

    def loss(self, model: MPLUG2, vision: Tensor, batch: dict) -> Tensor:
        """-(reward of the sampled caption - reward of the greedy one) * log-probability, averaged over the tokens.

        vision `b v d`; of the batch: the prompt that starts every row of `prompted_ids`, and `references`.
        """
        start = batch["prompted_ids"][:, : batch["prompt_length"]]
        training = model.training
        model.eval()  # a caption is written without dropout
        baseline = greedy(model, vision.detach(), start, self.special_tokens, self.max_length)
        drawn = sample(model, vision.detach(), start, self.special_tokens, self.max_length)
        model.train(training)
        rewards = self.reward(batch["references"], drawn, vision.device)
        advantage = rewards - self.reward(batch["references"], baseline, vision.device)
        # A caption that is shorter than it may be has ended by itself: its [SEP] was drawn, too.
        room = min(self.max_length, model.config.max_positions - start.shape[1])
        rows = [torch.tensor(row + [self.special_tokens.sep] * (len(row) < room), device=start.device) for row in drawn]
        written = pad_sequence(rows, batch_first=True, padding_value=self.special_tokens.pad)
        valid = torch.arange(written.shape[1], device=start.device) < torch.tensor(
            [len(row) for row in rows], device=start.device
        )[:, None]
        ids, mask = torch.cat([start, written], dim=1), torch.cat([torch.ones_like(start).bool(), valid], dim=1)
        logits = model.decode(ids[:, :-1], mask[:, :-1], vision)[:, start.shape[1] - 1:]
        log_probs = -F.cross_entropy(logits.transpose(1, 2), written, reduction="none")
        return global_mean(-advantage[:, None] * log_probs, valid)

    def reward(self, references: list[list[str]], ids: list[list[int]], device: torch.device) -> Tensor:
        """CIDEr-D of each caption, `b`."""
        scores = self.cider.scores(references, self.tokenizer.decode(ids))
        return torch.tensor(scores, dtype=torch.float32, device=device)
