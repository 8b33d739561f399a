"""Muon: an optimizer for matrices that divides its work among the ranks.

Muon (Jordan 2024) takes the momentum of a matrix and sets all its singular values to about 1: that is the step. Rare
directions of the gradient are then learned as fast as common ones. Embeddings, and everything that is not a matrix, use
AdamW.

Orthogonalization is the expensive part, so every matrix has an owner, the only rank that orthogonalizes it. All else is
elementwise, and every rank does it for its own shards:

    1. each rank updates the momentum
    2. FSDP2: each rank sends its shards of the momentum to their owners (one all-to-all)
    3. the owner orthogonalizes
    4. FSDP2: the owner sends each rank its shard of the step (one all-to-all); DDP: all get all steps (one all-gather)
    5. each rank applies the steps

With HSDP the ranks of each node divide the work among themselves, as if the other nodes were not there.

Momentum and steps are sent in the type in which they are orthogonalized: bfloat16 on a GPU, the parameter's on a CPU.

Axes: n matrices of the same shape, r rows, c columns.
"""

from collections.abc import Iterable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mplug2.distributed import all_gather_vectors, all_to_all, shard_group, world_size

Matrices = dict[Tensor, Tensor]
"""A matrix, or this rank's shard of it, for each parameter."""


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups with `matrices`, AdamW for the others.

    A step has the root mean square of AdamW's, 0.2 lr (Moonlight, 2025), so learning rates carry over.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self) -> None:
        all_groups = self.param_groups
        self._step_matrices([group for group in all_groups if group["matrices"]])
        self.param_groups = [group for group in all_groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = all_groups

    def _step_matrices(self, groups: list[dict]) -> None:
        steps = divided_steps(self._look_ahead(groups))
        for group in groups:
            for parameters in by_shape(parameter for parameter in group["params"] if parameter in steps):
                weights, factor = [local(p) for p in parameters], 0.2 * max(parameters[0].shape) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, [steps[p].to(p.dtype) for p in parameters], alpha=-group["lr"] * factor)

    def _look_ahead(self, groups: list[dict]) -> Matrices:
        """Update the momentum of every matrix that has a gradient. Returns Nesterov's momentum, ready to be sent."""
        ahead: Matrices = {}
        for parameters in by_shape(p for group in groups for p in group["params"] if p.grad is not None):
            for parameter in parameters:
                if not self.state[parameter]:  # AdamW's loading code expects a "step"
                    self.state[parameter] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter)}
            momenta = [local(self.state[parameter]["momentum"]) for parameter in parameters]
            gradients = [local(parameter.grad) for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
            nesterov = torch._foreach_lerp(gradients, momenta, self.momentum)
            ahead |= {p: matrix.bfloat16() if matrix.is_cuda else matrix for p, matrix in zip(parameters, nesterov)}
        return ahead


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Set all singular values of the matrices `n r c` to about 1 (0.7 to 1.2), with Newton-Schulz steps of fifth order
    and the coefficients of Jordan (2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def orthogonalization_flops(rows: int, columns: int, steps: int = 5) -> int:
    """FLOPs of `orthogonalize` for one matrix: with r <= c, each step has two products of r r c and one of r r r."""
    r, c = sorted((rows, columns))
    return steps * (4 * r * r * c + 2 * r**3)


# ---- the division of the work ----------------------------------------------------------------------------------------


def divided_steps(ahead: Matrices) -> Matrices:
    """Orthogonalize each matrix on its owner, and return the steps. Every rank has to call it.

    With FSDP2 both are shards.
    """
    if not ahead or world_size() == 1:
        return orthogonalize_all(ahead)
    parameters = [*ahead]
    group = shard_group(parameters[0]) if isinstance(parameters[0], DTensor) else dist.group.WORLD
    ranks = dist.get_world_size(group)
    owners = assign_owners(tuple(tuple(parameter.shape) for parameter in parameters), ranks)
    owned = [[p for p, owner in zip(parameters, owners) if owner == rank] for rank in range(ranks)]
    if isinstance(parameters[0], DTensor):
        steps = orthogonalize_all(send_to_owners(ahead, owned, group))
        return send_back(steps, owned, group, like=ahead[parameters[0]])
    steps = orthogonalize_all({parameter: ahead[parameter] for parameter in owned[dist.get_rank()]})
    sizes = [[parameter.numel() for parameter in of_rank] for of_rank in owned]
    vectors = all_gather_vectors(flat(steps.values(), like=ahead[parameters[0]]), [*map(sum, sizes)])
    return unflatten(vectors, owned, sizes)


def orthogonalize_all(matrices: Matrices) -> Matrices:
    """`orthogonalize`, for all matrices of the same shape at once."""
    steps: Matrices = {}
    for parameters in by_shape(matrices):
        steps |= zip(parameters, orthogonalize(torch.stack([matrices[p] for p in parameters])).unbind())
    return steps


@cache
def assign_owners(shapes: tuple[tuple[int, int], ...], ranks: int) -> list[int]:
    """The owner of each matrix. The most expensive come first, and each goes to the rank with the least work so far."""
    load, owners, flops = [0] * ranks, [0] * len(shapes), [orthogonalization_flops(*shape) for shape in shapes]
    for number in sorted(range(len(shapes)), key=lambda number: -flops[number]):
        owners[number] = load.index(min(load))
        load[owners[number]] += flops[number]
    return owners


def send_to_owners(shards: Matrices, owned: list[list[Tensor]], group: dist.ProcessGroup) -> Matrices:
    """From this rank's shards of all matrices to the whole matrices that this rank owns."""
    mine, like = owned[dist.get_rank(group)], next(iter(shards.values()))
    sizes = [[shard_size(parameter, rank, len(owned)) for parameter in mine] for rank in range(len(owned))]
    vectors = all_to_all([flat((shards[p] for p in of_rank), like) for of_rank in owned], [*map(sum, sizes)], group)
    pieces = zip(*(vector.split(of_rank) for vector, of_rank in zip(vectors, sizes)))
    return {parameter: torch.cat(of_ranks).view(parameter.shape) for parameter, of_ranks in zip(mine, pieces)}


def send_back(steps: Matrices, owned: list[list[Tensor]], group: dist.ProcessGroup, like: Tensor) -> Matrices:
    """The inverse of `send_to_owners`: from the whole steps on their owners to this rank's shards of all steps."""
    rank, ranks = dist.get_rank(group), len(owned)
    sent = [flat((step[shard_rows(len(step), to, ranks)] for step in steps.values()), like) for to in range(ranks)]
    sizes = [[shard_size(parameter, rank, ranks) for parameter in of_rank] for of_rank in owned]
    return unflatten(all_to_all(sent, [*map(sum, sizes)], group), owned, sizes)


def shard_rows(rows: int, rank: int, ranks: int) -> slice:
    """The rows of a matrix that FSDP2 keeps on a rank: equally many on each, fewer or none on the last."""
    share = -(-rows // ranks)
    return slice(min(rank * share, rows), min((rank + 1) * share, rows))


def shard_size(parameter: Tensor, rank: int, ranks: int) -> int:
    """Number of elements of a parameter that FSDP2 keeps on a rank."""
    rows = shard_rows(len(parameter), rank, ranks)
    return (rows.stop - rows.start) * parameter.shape[1]


def flat(matrices: Iterable[Tensor], like: Tensor) -> Tensor:
    """The matrices as one vector, in the type of `like`."""
    return torch.cat([like.new_empty(0), *(matrix.flatten() for matrix in matrices)])


def unflatten(vectors: list[Tensor], owned: list[list[Tensor]], sizes: list[list[int]]) -> Matrices:
    """The matrices in the vectors that came from their owners."""
    return {parameter: piece.view(-1, parameter.shape[1]) for vector, parameters, of_rank in zip(vectors, owned, sizes)
            for parameter, piece in zip(parameters, vector.split(of_rank))}


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_shape(matrices: Iterable[Tensor]) -> list[list[Tensor]]:
    """Matrices of the same shape together."""
    found: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        found.setdefault(matrix.shape, []).append(matrix)
    return list(found.values())
