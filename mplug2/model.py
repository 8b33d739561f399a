"""MPLUG2: the modules that a task selects, and how they are joined.

    pixels -> vision encoder -> universal layers -> V'  ----------------------> decoder -> caption
                                                     \\-> fusion -> [vision, text] -> decoder -> answer
    text   -> text encoder   -> universal layers -> text -/

A classifier reads the class token of text, of V' or of fused text: whatever is the last of these that its task has.

Axes: b batch, t frames, v = 1 + t*n visual tokens, l text tokens, d width, s vocabulary, y classes.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
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
    classifier: bool = False
    """Head: linear, to the classes of the task, or to a number."""
    box: bool = False
    """Head: a box in the image, where the fused class token finds what it is about."""
    pair: bool = False
    """Two images at once, told apart by a learned embedding."""
    temporal: bool = False
    """There may be more than one frame."""


TEXT = Task(text=True, classifier=True)
IMAGE = Task(vision=True)
VIDEO = Task(vision=True, temporal=True)
CAPTION = dict(decoder=True)
ANSWER = dict(text=True, fusion=True, decoder=True)
RETRIEVAL = dict(text=True, fusion=True, contrastive=True, matching=True)
FUSED = dataclasses.replace(IMAGE, text=True, fusion=True)

TASKS = {
    "text_classification": TEXT,
    "text_pair_classification": TEXT,
    "image_classification": dataclasses.replace(IMAGE, classifier=True),
    "video_classification": dataclasses.replace(VIDEO, classifier=True),
    "image_retrieval": dataclasses.replace(IMAGE, **RETRIEVAL),
    "video_retrieval": dataclasses.replace(VIDEO, **RETRIEVAL),
    "image_caption": dataclasses.replace(IMAGE, **CAPTION),
    "video_caption": dataclasses.replace(VIDEO, **CAPTION),
    "image_qa": dataclasses.replace(IMAGE, **ANSWER),
    "video_qa": dataclasses.replace(VIDEO, **ANSWER),
    "visual_entailment": dataclasses.replace(FUSED, classifier=True),
    "image_pair_reasoning": dataclasses.replace(FUSED, classifier=True, pair=True),
    "grounding": dataclasses.replace(FUSED, box=True),
    "pretrain": dataclasses.replace(VIDEO, **ANSWER | RETRIEVAL, masked=True),
}
"""The task table. Several tasks at once have what any of them has: "video_caption,video_qa"."""

FRESH = ("classifier", "box_head", "pair_place")
"""What pre-training has no weights for: fine-tuning starts it anew."""


def split_tasks(task: str) -> list[str]:
    """The names in "video_caption,video_qa"; ValueError for one that is unknown, or there twice."""
    names = task.split(",")
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; known are {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{task}: a task is named twice")
    return names


class MPLUG2(nn.Module):
    """mPLUG-2 for one task (a name in `TASKS`) or several, separated by commas. Public methods: `encode_vision`,
    `encode_text`, `join_pair`, `fuse`, `decode`, and, with the heads, `project_vision`, `project_text`, `match`,
    `unmask`, `classify`, `locate`.

    `classes` names the classes of each task with a classifier; without, its output is one number (regression).
    A method whose module this task does not have raises ValueError.
    """

    def __init__(self, config: ModelConfig, task: str = "pretrain", classes: Mapping[str, tuple[str, ...]] = {}):
        super().__init__()
        tasks = {name: TASKS[name] for name in split_tasks(task)}
        self.config, self.task, width = config, task, config.width
        self.parts = parts = Task(**{
            field.name: any(getattr(one, field.name) for one in tasks.values()) for field in dataclasses.fields(Task)
        })
        self.classes = {name: tuple(classes.get(name, ())) for name, one in tasks.items() if one.classifier}
        if parts.vision:
            # Local temporal modules that images pass by are not built for tasks of images.
            passed = not parts.temporal and not config.temporal_on_images
            self.vision_encoder = VisionEncoder(dataclasses.replace(config, local_temporal=False) if passed else config)
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
        if parts.classifier:
            self.classifier = nn.ModuleDict({
                name: nn.Linear(width, len(names) or 1) for name, names in self.classes.items()
            })
        if parts.box:
            self.box_head = BoxHead(width, config.image_size // config.patch_size)
        if parts.pair:
            self.pair_place = nn.Parameter(torch.zeros(2, width))
        self.fresh: list[str] = []  # parameters that a checkpoint had no weights for, see checkpoint.load_model
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

    def join_pair(self, vision: Tensor) -> Tensor:
        """V' of two images, `b 2 v d` -> one memory for fusion, `b (2 v) d`: the tokens of the first, then those of
        the second, each with the learned embedding of its image."""
        check(vision, "b 2 v d", d=self.config.width)
        if not self.parts.pair:
            raise ValueError(f"a model for the task {self.task!r} takes no pairs of images; build it for another task")
        return rearrange(vision + self.pair_place[:, None], "b two v d -> b (two v) d", two=2)

    def classify(self, hidden: Tensor, task: str) -> Tensor:
        """Text, V' or fused text, `b l d` -> logits `b y` of the classes of `task`, or `b 1` (regression)."""
        check(hidden, "b l d", d=self.config.width)
        if task not in self.classes:
            raise ValueError(f"a model for the task {self.task!r} has no classifier for {task!r}; fine-tune one for it")
        return self.classifier[task](hidden[:, 0])

    def locate(self, fused: Tensor, vision: Tensor) -> Tensor:
        """Fused text `b l d` and V' of an image `b v d` -> boxes `b 4`: centre x, centre y, width and height, as shares
        of the image. ValueError for V' of a clip: a box has no frame."""
        head, sizes = self.part("box_head"), check(vision, "b v d", **check(fused, "b l d", d=self.config.width))
        if sizes["v"] != 1 + head.side**2:
            raise ValueError(f"boxes are found in single images, whose V' has 1 + {head.side**2} tokens; this one has "
                             f"{sizes['v']}: give images, one frame each")
        return head(fused[:, 0], vision[:, 1:])

    def part(self, name: str) -> nn.Module:
        """A module by name, such as "decoder". ValueError if the task does not have it."""
        if not hasattr(self, name):
            raise ValueError(f"a model for the task {self.task!r} has no {name}; build it for another task")
        return getattr(self, name)


class BoxHead(nn.Module):
    """The class token of fused text asks each of the `side * side` patches whether it is what the text is about; the
    centre of the box is the mean of the patches' places by their attention (a soft argmax), corrected, like the size,
    by an MLP on the token.

    An MLP alone would need places in V', and tokens that only ever had to say what is to be seen have lost them.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        if side < 2:
            raise ValueError("grounding finds a box among the patches of an image, and there is only one: "
                             "patch_size has to be smaller than image_size")
        self.side = side
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.correct = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """token `b d`, patches `b n d`, row by row -> boxes `b 4`, each number between 0 and 1."""
        scores = torch.einsum("b d, b n d -> b n", self.query(token), self.key(patches)) * token.shape[1] ** -0.5
        chances = rearrange(scores.softmax(dim=1), "b (h w) -> b h w", h=self.side, w=self.side)
        middles = (torch.arange(self.side, device=chances.device, dtype=chances.dtype) + 0.5) / self.side
        # Sums of products, not matrix products, which autocast would round to bfloat16.
        x, y = ((chances.sum(dim=other) * middles).sum(dim=1) for other in (1, 2))
        centre = torch.stack([x, y], dim=1)
        return (torch.cat([centre.logit(), torch.zeros_like(centre)], dim=1) + self.correct(token)).sigmoid()


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
            if name in ("class_token", "position", "latents", "pair_place"):
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
