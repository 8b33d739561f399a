"""The optimizer and its schedule: AdamW, without weight decay on biases, norms and embeddings; warm-up, then cosine."""

import math

import torch
from torch import nn

from mplug2.model import MPLUG2


def parameter_groups(model: MPLUG2, lr: float, vision_lr: float, weight_decay: float) -> list[dict]:
    """Parameters by learning rate (the vision encoder may have its own) and by whether they decay: matrices of linear
    layers do; biases, LayerNorms, embeddings, positions, latents and the temperature do not."""
    decaying = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)
    } | {id(parameter) for name, parameter in model.named_parameters() if name.endswith("conv.weight")}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        rate = vision_lr if name.startswith("vision_encoder.") else lr
        decay = weight_decay if id(parameter) in decaying else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def make_optimizer(
    model: MPLUG2, lr: float, vision_lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, lr, vision_lr, weight_decay), betas=betas, fused=True)


def schedule(step: int, steps: int, warmup: int, floor: float) -> float:
    """The share of the full learning rate at `step` of `steps`: linear up, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share
