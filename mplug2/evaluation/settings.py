"""Settings that every use of a trained model shares: how it writes, and how it runs."""

from dataclasses import dataclass
from typing import Literal

from mplug2.distributed import DistInfo
from mplug2.flags import check_range
from mplug2.inference import Inference
from mplug2.predictor import Generation

PROTOCOLS = {
    "default": {"caption": Generation(), "answer": Generation()},
    "released": {"caption": Generation(5, 4, 20, prompted=False), "answer": Generation(5, 1, 10)},
    "figure": {"caption": Generation(instructed=True), "answer": Generation()},
}
"""How captions and answers are written: as this model was trained to, as the released evaluation scripts do it (a
caption starts from [CLS] alone), and as in Figure 1 of the paper (a caption answers an instruction)."""


@dataclass(frozen=True)
class WritingSettings:
    protocol: Literal["default", "released", "figure"] = "default"
    """released: 5 beams, as in the released scripts (captions of 4 to 20 tokens without a prompt, answers of 1 to 10);
    figure: captions answer an instruction, "what does the video describe", as in Figure 1."""
    beams: int | None = None
    """Beams of the search for captions and answers; 1 is greedy, the papers use 5. Default: 1."""
    min_length: int | None = None
    """Smallest number of tokens of a caption or answer. Default: 0."""
    max_length: int | None = None
    """Largest number of tokens. Default: that of the longest text in the training data."""
    prompted: bool | None = None
    """Captions continue the prompt "a video of"; otherwise they start from [CLS] alone. Default: they do."""

    def __post_init__(self):
        check_range(self, "beams max_length", 1)
        check_range(self, "min_length", 0)
        if self.protocol == "figure" and self.prompted is not None:
            raise ValueError("protocol=figure: its captions answer an instruction and have no prompt; leave out "
                             "--prompted and --no-prompted")
        lengths = self.generation("caption"), self.generation("answer")
        if any(how.max_length and how.min_length > how.max_length for how in lengths):
            raise ValueError(f"min_length={self.min_length} with max_length={self.max_length}: expected a smaller one")

    def generation(self, output: Literal["caption", "answer"]) -> Generation:
        """The search for one kind of text: single settings win over the protocol."""
        base = PROTOCOLS[self.protocol][output]
        given = {name: value for name in ("beams", "min_length", "max_length", "prompted")
                 if (value := getattr(self, name)) is not None}
        return Generation(**{**vars(base), **given})


@dataclass(frozen=True)
class RuntimeSettings:
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, mps."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward passes run under autocast."""
    batch_size: int = 64
    """Questions, captions, or files that are computed at a time, per process."""
    workers: int = 0
    """Processes that decode images and videos, per process of torchrun; 0: a thread."""
    timeout: float = 1800.0
    """After ten times as many seconds without a batch, the rank that hangs is reported, and the evaluation ends."""

    def __post_init__(self):
        check_range(self, "batch_size", 1)
        check_range(self, "workers", 0)
        check_range(self, "timeout", 0.1)

    def inference(self, process: DistInfo, **more) -> Inference:
        return Inference(self.batch_size, self.workers, self.precision, process.rank, process.world_size, **more)
