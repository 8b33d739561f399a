"""Optimizers and their schedule: AdamW, or Muon for matrices and AdamW for the rest; linear warmup, then a cosine.

Biases, norms and embeddings have no weight decay.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mplug2.flags import check_range
from mplug2.model.mplug2 import MPLUG2
from mplug2.training.muon import Muon
from mplug2.training.parallel import split_param_groups


@dataclass(frozen=True)
class OptimizerSettings:
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for matrices, AdamW for the rest (learns the tiny world in half the steps); adamw: AdamW for all."""
    lr: float = 4e-3
    """Peak learning rate."""
    vision_lr: float = 0.0
    """Peak learning rate of the vision encoder; 0: that of --lr."""
    temporal_lr: float = 0.0
    """Peak learning rate of the local temporal modules, if they are new in a trained encoder; 0: the encoder's."""
    min_lr_ratio: float = 0.01
    """Final learning rate as a fraction of the peak."""
    min_lr: float | None = None
    """Final learning rate of every parameter group, in place of --min-lr-ratio."""
    warmup_ratio: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly to its peak."""
    warmup_steps: int | None = None
    """Number of warmup steps, in place of --warmup-ratio."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases, norms and embeddings have none."""
    beta2: float = 0.98
    """AdamW's second beta."""
    clip_grad: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0: no limit."""
    layer_decay: float = 1.0
    """Layer-wise learning-rate decay: each encoder layer gets this fraction of the rate of the layer above it."""
    freeze: str = ""
    """Modules that are not trained, separated by commas, such as vision_encoder,text_encoder."""

    def __post_init__(self):
        check_range(self, "lr vision_lr temporal_lr min_lr warmup_steps weight_decay clip_grad", 0)
        check_range(self, "min_lr_ratio warmup_ratio beta2 layer_decay", 0, 1)

    def floor(self, peak: float) -> float:
        """The final learning rate of a group as a fraction of its `peak`."""
        if self.min_lr is None:
            return self.min_lr_ratio
        return min(1.0, self.min_lr / peak) if peak else 1.0

    def warmup(self, steps: int) -> int:
        """Number of warmup steps in a run of `steps` steps."""
        return math.ceil(self.warmup_ratio * steps) if self.warmup_steps is None else self.warmup_steps


def freeze(model: MPLUG2, modules: list[str]) -> None:
    """Exclude modules of the model from training, by their attribute names ("vision_encoder").

    Raises ValueError for a module that this model does not have, or if no module would be left to train.
    """
    names = list(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
    for module in modules:
        if module not in names:
            raise ValueError(f"freeze={module!r}: the modules of a model for {model.task} "
                             f"are {', '.join(names)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in modules)
    if set(modules) == set(names):
        raise ValueError(f"freeze={','.join(modules)}: no module is left to train; freeze fewer modules")


def depth(model: MPLUG2, name: str) -> int:
    """Distance of the parameter `name` from the top of its encoder, in layers.

    It is 1 for the last block of the vision encoder and the last universal layer, and 0 for everything above the
    encoders (fusion, decoder, heads).
    """
    config, parts = model.config, name.split(".")
    if parts[0] == "vision_encoder":
        if parts[1] == "blocks":
            return config.vision_layers - int(parts[2])
        return config.vision_layers + 1 if parts[1] == "patch_embed" else 1
    if parts[0] == "text_encoder":
        return config.text_layers - int(parts[2]) if parts[1] == "layers" else config.text_layers + 1
    if parts[0] == "universal" and parts[1] == "layers":
        return config.universal_layers - int(parts[2])
    return 0


def parameter_groups(model: MPLUG2, settings: OptimizerSettings) -> list[dict]:
    """The trained parameters, grouped by learning rate, by weight decay, and by whether Muon may update them.

    The vision encoder and its local temporal modules can have learning rates of their own. Each layer of an encoder has
    `layer_decay` times the rate of the layer above it. Matrices of linear layers and temporal convolutions decay;
    biases, LayerNorms, embeddings, positions, latents and the temperature do not. Muon updates matrices of linear
    layers.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups: dict[tuple[float, bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        peak = settings.lr
        if name.startswith("vision_encoder."):
            is_temporal = ".lt1." in name or ".lt2." in name
            peak = (is_temporal and settings.temporal_lr) or settings.vision_lr or settings.lr
        rate = peak * settings.layer_decay ** depth(model, name)
        is_matrix = id(parameter) in matrices
        groups.setdefault((rate, is_matrix or name.endswith("conv.weight"), is_matrix), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": settings.weight_decay * decays,
         "matrices": matrices}
        for (rate, decays, matrices), parameters in groups.items()
    ]


def make_optimizer(model: MPLUG2, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Muon (a subclass of AdamW) or AdamW over the parameter groups of `model`, at their peak learning rates."""
    cls = Muon if settings.optimizer == "muon" else torch.optim.AdamW
    optimizer = cls(parameter_groups(model, settings), betas=(0.9, settings.beta2), fused=True)
    split_param_groups(optimizer)
    return optimizer


def lr_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """The learning rate at `step` as a fraction of its peak: linear warmup, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int, steps: int) -> None:
    """Set the learning rate of every parameter group for `step` of `steps`."""
    for group in optimizer.param_groups:
        peak = group["base_lr"]
        group["lr"] = peak * lr_factor(step, steps, settings.warmup(steps), settings.floor(peak))
