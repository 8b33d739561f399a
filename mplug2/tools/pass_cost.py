"""What a training pass costs on one device: FLOPs and memory, counted on tensors that have shapes but no memory.

Every tensor that a pass makes is counted from its birth to its death. The planner (memory_plan.py), the benchmarks and
`train.py` use it.

Axes: b samples of a micro-batch on one device, r questions a sample, t frames, l text tokens.
"""

import math
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mplug2.config import ModelConfig
from mplug2.model.attention import CrossAttention, SelfAttention
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.objectives import Objectives
from mplug2.tasks import BATCH_TYPES, TASKS
from mplug2.training.parallel import checkpoint_activations

aten = torch.ops.aten
CONVOLUTION_FLOPS = {
    aten.convolution_backward:
        lambda grad, x, weight, *_, out_shape=None, **__: 4 * math.prod(grad) * math.prod(weight[1:]),
}
"""The gradients of input and weight cost as much as the convolution each; torch's own formula ignores the groups."""
FLOPS = FlopCounterMode(display=False, custom_mapping={  # torch does not know the attention kernels of fake tensors
    **CONVOLUTION_FLOPS,
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v),
}).flop_registry
"""The formula of each operator that has matrix products. The mode itself would double the time of a plan."""


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass of a micro-batch on one device."""

    flops: float
    """Operations; a multiplication and an addition are two."""
    activations: int
    """Most bytes alive at once of all but parameters, optimizer state and gradients of parameters."""
    peak: int
    """The same with the gradients, which grow while the activations shrink."""


class _Counter(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the FLOPs of matrix products."""

    def __init__(self):
        super().__init__()
        self.known: dict[int, tuple[weakref.ref, int]] = {}
        self.alive = self.gradients = self.activation_peak = self.peak = self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if formula := FLOPS.get(function._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.born(tensor.untyped_storage())
        return out

    def born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = (weakref.ref(storage, partial(self.died, key)), size)
        self.alive += size
        self._note()

    def died(self, key: int, _) -> None:
        _, size = self.known.pop(key)
        self.alive -= abs(size)
        self.gradients -= max(0, -size)

    def is_gradient(self, parameter: Tensor) -> None:
        """From now on the gradient of a parameter counts as such."""
        key = parameter.grad.untyped_storage()._cdata
        if key in self.known and self.known[key][1] > 0:
            reference, size = self.known[key]
            self.known[key] = (reference, -size)  # the sign marks it
            self.gradients += size
            self._note()

    def _note(self) -> None:
        self.peak = max(self.peak, self.alive)
        self.activation_peak = max(self.activation_peak, self.alive - self.gradients)


@dataclass(frozen=True)
class Workload:
    """What a device does at a time."""

    config: ModelConfig
    b: int
    """Samples of a micro-batch."""
    frames: int = 4
    questions: int = 2
    words: int = 30
    """Tokens of every text, without [CLS] and [SEP]."""
    task: str = "pretrain"
    low_precision: bool = False
    """Passes under bfloat16 autocast."""
    optimizer: str = "adamw"
    """muon keeps one number for each number of a matrix, adamw two for every number."""

    def batch(self, kind: str) -> dict:
        """A batch as `Collate` makes it; of the words of a caption 15 % are masked."""
        b, l, size = self.b, min(self.words + 2, self.config.max_positions), self.config.image_size
        task, modality, parts = BATCH_TYPES[kind].task, BATCH_TYPES[kind].modality, BATCH_TYPES[kind].fields
        batch = {"kind": kind, "task": task, "positive_id": torch.zeros(b, dtype=torch.long)}

        def text(name: str, rows: int) -> dict:
            return {f"{name}_ids": torch.zeros(rows, l, dtype=torch.long),
                    f"{name}_mask": torch.ones(rows, l, dtype=torch.bool)}

        for name in {"caption", "text"} & parts:
            batch |= text(name, b)
        if "masked" in parts:
            positions = torch.arange(math.ceil(0.15 * b * l))
            batch |= {"masked_ids": batch["caption_ids"], "masked_positions": positions}
        if modality != "text":
            images = (2,) if "pair" in TASKS[task].components else ()
            batch["pixels"] = torch.zeros(b, *images, 3, self.frames if modality == "video" else 1, size, size)
        if "prompted" in parts and modality != "text":
            batch |= {**text("prompted", b), "prompted_positions": torch.arange(b * (l - 1))}
        if "question" in parts and modality != "text":
            rows = b * self.questions
            batch |= text("question", rows) | text("answer", rows) | {"answer_positions": torch.arange(rows * (l - 1))}
        if "label" in parts:
            batch["label"] = torch.zeros(b)
        if "box" in parts:
            batch["box"] = torch.full((b, 4), 0.5)
        return batch

    def objectives(self) -> Objectives:
        return Objectives(MPLUG2(self.config, self.task)).train()


def cost(work: Workload, kind: str, checkpointing: bool = False) -> Cost:
    """What a micro-batch costs. Dropout of attention weights is left out: kernels on a GPU do not store its mask."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        objectives, batch = work.objectives(), work.batch(kind)
        for module in objectives.modules():
            if isinstance(module, (SelfAttention, CrossAttention)):
                module.dropout = 0.0
        if checkpointing:
            checkpoint_activations(objectives.model)
        counter = _Counter()
        for parameter in objectives.parameters():
            parameter.register_post_accumulate_grad_hook(counter.is_gradient)
        autocast = torch.autocast("cpu", torch.bfloat16) if work.low_precision else nullcontext()
        with counter:
            with autocast:
                loss = sum(objectives(batch).values())
            loss.backward()
    return Cost(counter.flops, counter.activation_peak, counter.peak)
