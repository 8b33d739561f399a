"""MPLUG2: the modules that a task selects, and how they are joined.

    pixels -> vision encoder -> universal layers -> V'  ----------------------> decoder -> caption
                                                     \\-> fusion -> [vision, text] -> decoder -> answer
    text   -> text encoder   -> universal layers -> text -/

Axes: b batch, t frames, v = 1 + t*n visual tokens, l text tokens, d width, s vocabulary.
"""

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.decoder import Decoder
from mplug2.fusion import Fusion
from mplug2.layers import EPS, BertLayer, Block, LanguageModelHead
from mplug2.local_temporal import LocalTemporal
from mplug2.patch_embed import PatchEmbed
from mplug2.shapes import check
from mplug2.text_encoder import TextEncoder
from mplug2.universal import UniversalLayers
from mplug2.vision_encoder import VisionEncoder


@dataclass(frozen=True)
class Task:
    """A row of the task table: what is built, and nothing else. The universal layers are in every row."""

    vision: bool = False
    text: bool = False
    fusion: bool = False
    decoder: bool = False
    contrastive: bool = False
    """Head: vision and text, projected into one space."""
    matching: bool = False
    """Head: do these two belong together? on the fused class token."""
    masked: bool = False
    """Head: masked language modelling."""


CAPTION = Task(vision=True, decoder=True)
ANSWER = Task(vision=True, text=True, fusion=True, decoder=True)
RETRIEVAL = Task(vision=True, text=True, fusion=True, contrastive=True, matching=True)
PRETRAIN = Task(vision=True, text=True, fusion=True, decoder=True, contrastive=True, matching=True, masked=True)

TASKS = {
    "image_retrieval": RETRIEVAL, "video_retrieval": RETRIEVAL,
    "image_caption": CAPTION, "video_caption": CAPTION,
    "image_qa": ANSWER, "video_qa": ANSWER,
    "pretrain": PRETRAIN,
}


class MPLUG2(nn.Module):
    """mPLUG-2 for one task (a name in `TASKS`). Public methods: `encode_vision`, `encode_text`, `fuse`, `decode`,
    and, with the heads, `project_vision`, `project_text`, `match`, `unmask`.

    A method whose module this task does not have raises ValueError.
    """

    def __init__(self, config: ModelConfig, task: str = "pretrain"):
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
        self.config, self.task = config, task
        parts, width = TASKS[task], config.width
        if parts.vision:
            self.vision_encoder = VisionEncoder(config)
            if config.vision_width != width:
                self.vision_projection = nn.Linear(config.vision_width, width)
                self.vision_norm = nn.LayerNorm(width, eps=EPS)
                self.vision_dropout = nn.Dropout(config.dropout)
        if parts.text:
            self.text_encoder = TextEncoder(config)
        self.universal = UniversalLayers(config, for_vision=parts.vision, for_text=parts.text)
        if parts.fusion:
            self.fusion = Fusion(config)
        if parts.decoder:
            self.decoder = Decoder(config)
        if parts.contrastive:
            self.contrastive_vision = nn.Linear(width, config.contrastive_width)
            self.contrastive_text = nn.Linear(width, config.contrastive_width)
            self.temperature = nn.Parameter(torch.tensor(0.07))
        if parts.matching:
            self.matching_head = nn.Linear(width, 2)
        if parts.masked:
            self.masked_head = LanguageModelHead(config)
        init_weights(self)

    def encode_vision(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `b 3 t H W` (an image is t = 1) -> V' `b v d`, class token first."""
        check(pixels, "b 3 t H W", H=self.config.image_size, W=self.config.image_size)
        tokens = self.part("vision_encoder")(pixels)
        if self.config.vision_width != self.config.width:
            tokens = self.vision_dropout(self.vision_norm(self.vision_projection(tokens)))
        return self.universal.vision(tokens)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (true = real token), both `b l`, -> `b l d`, class token first."""
        return self.universal.text(self.part("text_encoder")(ids, mask), mask)

    def fuse(self, vision: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """V' `b v d`, text `b l d`, text_mask `b l` -> vision `b v d`, fused text `b l d`.

        r texts in a row may share an image or a video: text `(b r) l d`, see `Fusion`.
        """
        return self.part("fusion")(vision, text, text_mask)

    def decode(self, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """ids and mask `b l`, memory `b m d`, memory_mask `b m` -> logits of the next tokens, `b l s`.

        r texts in a row may share a memory: ids and mask `(b r) l`.
        """
        return self.part("decoder")(ids, mask, memory, memory_mask)

    def project_vision(self, vision: Tensor) -> Tensor:
        """V' `b v d` -> unit vectors `b e` to compare with those of texts."""
        check(vision, "b v d", d=self.config.width)
        return nn.functional.normalize(self.part("contrastive_vision")(vision[:, 0]), dim=-1)

    def project_text(self, text: Tensor) -> Tensor:
        """Text `b l d` -> unit vectors `b e` to compare with those of images and videos."""
        check(text, "b l d", d=self.config.width)
        return nn.functional.normalize(self.part("contrastive_text")(text[:, 0]), dim=-1)

    def match(self, fused: Tensor) -> Tensor:
        """Fused text `b l d` -> logits `b 2`: (no match, match)."""
        check(fused, "b l d", d=self.config.width)
        return self.part("matching_head")(fused[:, 0])

    def unmask(self, hidden: Tensor) -> Tensor:
        """Text or fused text `... d` -> vocabulary logits `... s`."""
        return self.part("masked_head")(hidden, self.text_encoder.embeddings.word.weight)

    def part(self, name: str) -> nn.Module:
        """A module by name, such as "decoder". ValueError if the task does not have it."""
        if not hasattr(self, name):
            raise ValueError(f"a model for the task {self.task!r} has no {name}; build it for another task")
        return getattr(self, name)


def answer_memory(vision: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the decoder attends to when it answers: [vision, fused text] and the joined mask.

    vision `b v d` or `(b r) v d`, text `(b r) l d`, text_mask `(b r) l` -> `(b r) (v+l) d`, `(b r) (v+l)`.
    """
    vision = repeat(vision, "b v d -> (b r) v d", r=text.shape[0] // vision.shape[0])
    return torch.cat([vision, text], dim=1), nn.functional.pad(text_mask, (vision.shape[1], 0), value=True)


def init_weights(model: MPLUG2) -> None:
    """From scratch: zero biases, and normal weights, as BERT and CLIP have them: of deviation 0.02 at a width of 768,
    and more in narrower models, in proportion to 1 / sqrt(width). Patches start at deviation 1 / sqrt(their pixels),
    and local temporal modules keep their zero start."""
    std = 0.02 * (768 / model.config.width) ** 0.5
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("class_token", "position", "latents"):
                nn.init.normal_(parameter, std=std)
    for module in model.modules():  # what differs from the rule above
        if isinstance(module, LocalTemporal):
            module.reset_up()
        if isinstance(module, PatchEmbed):
            nn.init.normal_(module.linear.weight, std=module.linear.in_features**-0.5)


def checkpoint_activations(model: MPLUG2) -> None:
    """Training memory for time: every block computes its activations again in the backward pass."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True


def compile_model(model: MPLUG2) -> None:
    """Compile the vision encoder as one graph, and every layer of the rest, for texts of any length.

    In place: parameters keep their names.
    """
    if hasattr(model, "vision_encoder"):
        model.vision_encoder.compile(fullgraph=True)
    for module in model.modules():
        if isinstance(module, BertLayer):
            module.compile(dynamic=True)
