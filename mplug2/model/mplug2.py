r"""MPLUG2 (Figure 2): the modules that a task needs, and how they are connected.

    pixels -> vision encoder -> universal layers -> V' --------------------------> decoder -> caption
                                                    \-> fusion -> [V', fused text] -> decoder -> answer
    ids    -> text encoder   -> universal layers -> text -/ \-------------------> decoder -> word

V' are the visual tokens that leave the universal layers. The first token of V', text and fused text is a class token.
The heads read it: contrastive (VTC), matching (VTM) and the classifier, which reads fused text, V' or text.

Axes: b batch, t frames, v visual tokens, l text tokens, m memory tokens, r texts per image or video, d width.
"""

import dataclasses
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from mplug2.config import ModelConfig
from mplug2.model.attention import JointMemory, Memory
from mplug2.model.decoder import Decoder, Source
from mplug2.model.fusion import Fusion
from mplug2.model.heads import BoxHead, LocationTokens
from mplug2.model.layers import EPS, LanguageModelHead
from mplug2.model.local_temporal import LocalTemporal
from mplug2.model.patch_embed import PatchEmbed
from mplug2.model.shapes import check
from mplug2.model.text_encoder import TextEncoder
from mplug2.model.universal import UniversalLayers
from mplug2.model.vision_encoder import VisionEncoder
from mplug2.tasks import COMPONENTS, TASKS, components, parse_tasks


class MPLUG2(nn.Module):
    """mPLUG-2 for one task (a name in `TASKS`) or for several, separated by commas.

    Only the modules that the task needs are built. A method whose module is missing raises ValueError. `classes` names
    the classes of each task with a classifier; a classifier without classes predicts one number (regression).
    """

    def __init__(self, config: ModelConfig, task: str = "pretrain", classes: Mapping[str, tuple[str, ...]] = {}):
        super().__init__()
        self.config, self.task, width = config, task, config.width
        built = components(task)
        built |= {"decoder"} if "box" in built and config.boxes == "tokens" else set()
        self.components = built
        self.classes = {
            name: tuple(classes.get(name, ())) for name in parse_tasks(task) if "classifier" in components(name)
        }
        if "vision" in built:
            # Local temporal modules that images bypass are not built for image tasks.
            unused = "temporal" not in built and not config.temporal_on_images
            self.vision_encoder = VisionEncoder(dataclasses.replace(config, local_temporal=False) if unused else config)
            if config.vision_width != width:
                self.vision_projection = nn.Linear(config.vision_width, width)
                self.vision_norm = nn.LayerNorm(width, eps=EPS)
                self.vision_dropout = nn.Dropout(config.dropout)
        if "text" in built:
            self.text_encoder = TextEncoder(config)
        self.universal = UniversalLayers(config, for_vision="vision" in built, for_text="text" in built)
        if "fusion" in built:
            self.fusion = Fusion(config)
        if "decoder" in built:
            self.decoder = Decoder(config)
        if "contrastive" in built:
            self.contrastive_vision = nn.Linear(width, config.contrastive_width)
            self.contrastive_text = nn.Linear(width, config.contrastive_width)
            self.temperature = nn.Parameter(torch.tensor(0.07))
        if "matching" in built:
            self.matching_head = nn.Linear(width, 2)
        if "masked" in built:
            self.masked_head = LanguageModelHead(config)
        if "classifier" in built:
            sizes = {name: len(names) or 1 for name, names in self.classes.items()}
            self.classifier = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        if "box" in built:
            tokens = config.boxes == "tokens"
            self.box_head = (LocationTokens(width, config.image_size) if tokens
                             else BoxHead(width, config.image_size // config.patch_size))
        if "pair" in built:
            self.pair_place = nn.Parameter(torch.zeros(2, width))
        # Parameters that the checkpoint did not have, filled in by checkpoint.load_model.
        self.newly_initialized: list[str] = []
        init_weights(self)

    def require(self, name: str) -> nn.Module | nn.Parameter:
        """The module `name`, such as "decoder". Raises ValueError if this model was built without it."""
        if not hasattr(self, name):
            other = next(task for task in TASKS if any(name in COMPONENTS[part] for part in components(task)))
            raise ValueError(f"a model for the task {self.task!r} has no {name}; build it for another task, such as "
                             f"{other!r}")
        return getattr(self, name)

    def encode_vision(self, pixels: Tensor) -> Tensor:
        """Normalized pixels `b 3 t H W` (an image is t = 1) -> V' `b v d`."""
        check(pixels, "b 3 t H W", H=self.config.image_size, W=self.config.image_size)
        tokens = self.require("vision_encoder")(pixels)
        if self.config.vision_width != self.config.width:
            tokens = self.vision_dropout(self.vision_norm(self.vision_projection(tokens)))
        return self.universal.vision(tokens)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and their mask (true = real token), both `b l` -> text `b l d`."""
        return self.universal.text(self.require("text_encoder")(ids, mask), mask)

    def concat_pair(self, vision: Tensor) -> Tensor:
        """V' of two images, `b 2 v d` -> one memory for fusion, `b (2 v) d`. A learned embedding marks each image."""
        check(vision, "b 2 v d", d=self.config.width)
        return rearrange(vision + self.require("pair_place")[:, None], "b two v d -> b (two v) d", two=2)

    def fuse(self, vision: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """V' `b v d`, text `(b r) l d`, text_mask `(b r) l` -> V', fused text `(b r) l d`; see `Fusion`."""
        return self.require("fusion")(vision, text, text_mask)

    def instruction_memory(self, vision: Tensor | None, ids: Tensor, mask: Tensor) -> tuple[Memory, Tensor]:
        """The memory with which the decoder follows instructions or questions, ids and mask `(b r) l`: that of an
        answer about V' `b v d`, or without vision the encoded text alone. In Figure 1 every generative task takes
        this path: "what does the image describe?" -> a caption, a sentence -> "positive"."""
        text = self.encode_text(ids, mask)
        if vision is not None:
            vision, text = self.fuse(vision, text, mask)
        return answer_memory(vision, text, mask)

    def decode(self, ids: Tensor, mask: Tensor, memory: Source, memory_mask: Tensor | None = None) -> Tensor:
        """ids and mask `(b r) l`, memory `b m d`, memory_mask `b m` -> logits of the next tokens, `(b r) l s`."""
        return self.require("decoder")(ids, mask, memory, memory_mask)

    def project_vision(self, vision: Tensor) -> Tensor:
        """V' `b v d` -> unit vectors `b e`, to be compared with those of texts."""
        check(vision, "b v d", d=self.config.width)
        return nn.functional.normalize(self.require("contrastive_vision")(vision[:, 0]), dim=-1)

    def project_text(self, text: Tensor) -> Tensor:
        """Text `b l d` -> unit vectors `b e`, to be compared with those of images and videos."""
        check(text, "b l d", d=self.config.width)
        return nn.functional.normalize(self.require("contrastive_text")(text[:, 0]), dim=-1)

    def itm_logits(self, fused: Tensor) -> Tensor:
        """Fused text `b l d` -> logits `b 2` of image-text or video-text matching (ITM, VTM): (no match, match)."""
        check(fused, "b l d", d=self.config.width)
        return self.require("matching_head")(fused[:, 0])

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Text or fused text `... d` -> vocabulary logits `... s`."""
        return self.require("masked_head")(hidden, self.text_encoder.embeddings.word.weight)

    def classify(self, hidden: Tensor, task: str) -> Tensor:
        """Text, V' or fused text, `b l d` -> logits `b y` of the classes of `task`, or a number `b 1` (regression)."""
        check(hidden, "b l d", d=self.config.width)
        if task not in self.classes:
            raise ValueError(f"a model for the task {self.task!r} has no classifier for {task!r}; fine-tune one for it")
        return self.classifier[task](hidden[:, 0])

    def predict_box(self, fused: Tensor, vision: Tensor, text_mask: Tensor) -> Tensor:
        """Fused text `b l d`, its mask `b l` and V' of images `b v d` -> boxes `b 4`: center x, center y, width and
        height, as fractions of the image. Raises ValueError for V' of a video: a box has no frame."""
        head, sizes = self.require("box_head"), check(vision, "b v d", **check(fused, "b l d", d=self.config.width))
        if sizes["v"] != 1 + self.config.patches:
            raise ValueError(f"{sizes['v']} visual tokens: boxes are predicted in single images, which have "
                             f"1 + {self.config.patches}; pass one frame")
        if self.config.boxes == "soft_argmax":
            return head(fused[:, 0], vision[:, 1:])
        return head(self.require("decoder"), *answer_memory(vision, fused, text_mask))


def answer_memory(vision: Tensor | None, text: Tensor, text_mask: Tensor) -> tuple[Memory, Tensor]:
    """What the decoder attends to for an answer: [V', fused text], as a JointMemory, and the joint mask; or the text.

    V' `b v d` or `(b r) v d`, fused text `(b r) l d`, text_mask `(b r) l` -> `(b r) (v+l) d`, `(b r) (v+l)`.
    """
    if vision is None:
        return text, text_mask
    return JointMemory(vision, text), nn.functional.pad(text_mask, (vision.shape[1], 0), value=True)


def init_weights(model: MPLUG2) -> None:
    """Initialize from scratch: zero biases and normal weights.

    The standard deviation is BERT's and CLIP's 0.02 at width 768, and grows as 1 / sqrt(width) for narrower models.
    Patch embeddings use 1 / sqrt(pixels of a patch); local temporal modules keep their zero start.
    """
    std = 0.02 * (768 / model.config.width) ** 0.5
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("class_token", "position", "latents", "pair_place"):
                nn.init.normal_(parameter, std=std)
    for module in model.modules():  # exceptions from this rule
        if isinstance(module, LocalTemporal):
            module.reset_up()
        if isinstance(module, PatchEmbed):
            nn.init.normal_(module.linear.weight, std=module.linear.in_features**-0.5)
