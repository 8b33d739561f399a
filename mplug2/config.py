"""What a model is made of: one frozen dataclass, and the sizes of section "Sizes" of the paper as presets.

Settings that are impossible, or do not fit each other, are refused here, before anything is built.
"""

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    image_size: int = 224
    """Height and width of the pixels, in pixels."""
    patch_size: int = 16
    """Height and width of a patch, in pixels."""
    vision_width: int = 768
    """Width of the vision encoder; if it differs from `width`, a linear layer joins them."""
    vision_layers: int = 12
    """Blocks of the dual-vision encoder."""
    vision_head_width: int = 64
    """Width of one attention head of the vision encoder (CLIP: always 64)."""
    temporal_downsampling: bool = False
    """Patches span three frames and start at every `temporal_stride`-th frame."""
    temporal_stride: int = 2
    """Frames between two patches in time; only with `temporal_downsampling`."""
    local_temporal: bool = True
    """Local temporal modules in the vision encoder; without them it cannot see the order of frames."""
    local_temporal_groups: int = 0
    """Groups of the temporal convolution; 0: as many as channels (depth-wise, as released)."""
    local_temporal_placement: Literal["released", "figure"] = "released"
    """released: before the attention and before the MLP of each block; figure: before the attention only."""
    temporal_on_images: bool = True
    """Run the local temporal modules on single images too (released); the paper's figure has them for video only."""
    width: int = 768
    """Width of text encoder, universal layers, fusion and decoder."""
    heads: int = 12
    """Attention heads of text encoder, universal layers, fusion and decoder."""
    ff_width: int = 3072
    """Hidden width of their feed-forward parts."""
    text_layers: int = 12
    """Layers of the text encoder, the universal ones included."""
    universal_layers: int = 2
    """How many of the last text layers are universal: shared with vision; 0: none, vision goes on as it is encoded."""
    latents: int = 50
    """Learned latent queries of the universal layers."""
    universal_readout: Literal["released", "figure"] = "released"
    """How the universal layers see vision: as in the released code, or as in Figure 2 of the paper."""
    fusion_layers: int = 3
    """Layers of the fusion module."""
    fusion_stride: int = 0
    """0: cross-attention in every fusion layer (released). k > 0: every k-th layer after the first is a
    connected-attention layer over the joint sequence of vision and text."""
    decoder_layers: int = 12
    """Layers of the shared decoder."""
    vocab_size: int = 30522
    """Entries of the vocabulary, at most; a vocabulary trained on few texts has fewer."""
    max_positions: int = 512
    """Longest text, in tokens."""
    contrastive_width: int = 256
    """Width of the space in which vision and text are compared."""
    dropout: float = 0.1
    """Dropout of text encoder, universal layers, fusion and decoder; of attention weights too."""
    drop_path: float = 0.0
    """Chance with which a residual branch of the vision encoder is skipped for a sample (last block; less before)."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < (0 if field.name in MAY_BE_ZERO else 1)):
                least = 0 if field.name in MAY_BE_ZERO else 1
                raise ValueError(f"{field.name}={value!r}: expected an integer of at least {least}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name}={value!r}: expected true or false")
            if field.type is float and not 0 <= value < 1:
                raise ValueError(f"{field.name}={value!r}: expected a share of at least 0 and below 1")
            choices = getattr(field.type, "__args__", ())
            if choices and value not in choices:
                raise ValueError(f"{field.name}={value!r}: expected one of {', '.join(choices)}")
        self._divides("patch_size", "image_size")
        self._divides("vision_head_width", "vision_width")
        self._divides("heads", "width")
        if self.vision_width % 2:
            raise ValueError(f"vision_width={self.vision_width} is odd: the local temporal modules work at half of it")
        if self.local_temporal_groups and (self.vision_width // 2) % self.local_temporal_groups:
            raise ValueError(f"local_temporal_groups={self.local_temporal_groups} does not divide "
                             f"vision_width / 2 = {self.vision_width // 2}")
        if self.universal_layers > self.text_layers:
            raise ValueError(f"universal_layers={self.universal_layers} is more than text_layers={self.text_layers}, "
                             "which they are the last of")

    def _divides(self, part: str, whole: str) -> None:
        if getattr(self, whole) % getattr(self, part):
            raise ValueError(f"{part}={getattr(self, part)} does not divide {whole}={getattr(self, whole)}")

    @property
    def vision_heads(self) -> int:
        return self.vision_width // self.vision_head_width

    @property
    def patches(self) -> int:
        """Patches a frame, n."""
        return (self.image_size // self.patch_size) ** 2


MAY_BE_ZERO = ("local_temporal_groups", "universal_layers", "fusion_stride")


def tiny(**changes) -> ModelConfig:
    """The size for the tiny world: about 0.74 million parameters, trained in minutes on two CPU cores."""
    sizes = dict(
        image_size=32, patch_size=8, vision_width=64, vision_layers=3, vision_head_width=32, width=64, heads=2,
        ff_width=256, text_layers=4, universal_layers=2, latents=16, fusion_layers=2, decoder_layers=2,
        vocab_size=4096, max_positions=32, contrastive_width=64, dropout=0.0,
    )
    return ModelConfig(**{**sizes, **changes})


def base(**changes) -> ModelConfig:
    """mPLUG-2 base: ViT-B/16, about 0.38 B parameters in use."""
    return ModelConfig(**changes)


def large(**changes) -> ModelConfig:
    """mPLUG-2 large, the released size: ViT-L/14, about 1.03 B parameters in use."""
    sizes = dict(
        patch_size=14, vision_width=1024, vision_layers=24, width=1024, heads=16, ff_width=4096, text_layers=24,
        fusion_layers=6,
    )
    return ModelConfig(**{**sizes, **changes})


PRESETS = {"tiny": tiny, "base": base, "large": large}


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, by field name: one text serves the reader and `--help`."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    docs = {}
    for field, doc in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[field.target.id] = " ".join(doc.value.value.split())
    return docs


def from_dict(cls: type, values: dict, source: str = "settings"):
    """Build the dataclass `cls` from a dictionary; an unknown or missing name is an error that says which."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{source}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if missing := sorted(known - set(values)):
        raise ValueError(f"{source}: no settings {', '.join(missing)}; expected all of {', '.join(sorted(known))}")
    return cls(**values)
