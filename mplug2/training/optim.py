"""Optimizers and their schedule: AdamW, or Muon for the matrices and AdamW for the rest; warm-up, then cosine.

No weight decay on biases, norms and embeddings.
"""

import math

import torch
from torch import Tensor, nn

from mplug2.distributed import full_tensor, shard_like
from mplug2.model.mplug2 import MPLUG2


def freeze(model: MPLUG2, modules: list[str]) -> None:
    """Take modules of the model, named as its attributes ("vision_encoder"), out of the training.

    Raises ValueError for a name that this model does not have, or if nothing would be left to train.
    """
    names = list(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
    for module in modules:
        if module not in names:
            raise ValueError(f"freeze: a model for {model.task} has no {module!r}; it has {', '.join(names)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in modules)
    if set(modules) == set(names):
        raise ValueError(f"freeze={','.join(modules)}: nothing is left to train")


def depth(model: MPLUG2, name: str) -> int:
    """How many layers of the encoders follow the parameter `name`, up to the top of its encoder: 0 for all that is
    above them (fusion, decoder, heads), 1 for the last block of the vision encoder and the last universal layer."""
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


def parameter_groups(
    model: MPLUG2, lr: float, vision_lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Parameters by learning rate (the vision encoder may have its own, and each layer further down in an encoder
    `layer_decay` times that of the one above), by whether they decay, and by whether they are matrices of linear
    layers. These and temporal convolutions decay; biases, LayerNorms, embeddings, positions, latents and the
    temperature do not. Frozen parameters are left out."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups: dict[tuple[float, bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = (vision_lr if name.startswith("vision_encoder.") else lr) * layer_decay ** depth(model, name)
        is_matrix = id(parameter) in matrices
        groups.setdefault((rate, is_matrix or name.endswith("conv.weight"), is_matrix), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": weight_decay * decays, "matrices": matrices}
        for (rate, decays, matrices), parameters in groups.items()
    ]


def make_optimizer(
    model: MPLUG2, lr: float, vision_lr: float, weight_decay: float, betas: tuple[float, float], name: str = "adamw",
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """`name`: "adamw" or "muon"."""
    groups = parameter_groups(model, lr, vision_lr, weight_decay, layer_decay)
    return (Muon if name == "muon" else torch.optim.AdamW)(groups, betas=betas, fused=True)


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024): the step of a matrix is its momentum with all singular values set to about 1. What few
    samples ask for is learned as fast as what all ask for. Everything that is no matrix, and embeddings, take AdamW.

    Steps have the root mean square of AdamW's, 0.2 lr (Moonlight, 2025), so that learning rates carry over.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self) -> None:
        every = self.param_groups
        for group in every:
            if group["matrices"]:
                self._step_matrices(group)
        self.param_groups = [group for group in every if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = every

    def _step_matrices(self, group: dict) -> None:
        by_shape: dict[torch.Size, list] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for (rows, columns), parameters in by_shape.items():
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:  # AdamW's code for loading looks for a step
                    self.state[parameter] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter)}
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
            ahead = torch._foreach_lerp(gradients, momenta, self.momentum)  # Nesterov
            # A sharded matrix is put together for this, by every process: its singular values are those of the whole.
            steps = orthogonalize(torch.stack([full_tensor(matrix)
                                  for matrix in ahead])).to(parameters[0].dtype).unbind()
            steps = [shard_like(step, parameter) for step, parameter in zip(steps, parameters)]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, steps, alpha=-0.2 * group["lr"] * max(rows, columns) ** 0.5)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices `n r c` with singular values of about 1 (0.7 to 1.2) in place of their own: by Newton-Schulz steps of
    fifth order, with the coefficients of Jordan (2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def lr_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """The share of the full learning rate at `step` of `steps`: linear up, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share
