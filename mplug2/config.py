"""The settings of a model, `ModelConfig`, and the presets `tiny`, `small`, `base` and `large`.

The docstring under each field is also the help text of its flag. Settings that are impossible, or that do not fit
together, raise ValueError here, before anything is built.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    image_size: int = 224
    """Input resolution in pixels (square)."""
    patch_size: int = 16
    """Height and width of a patch in pixels."""
    vision_width: int = 768
    """Width of the vision encoder; if it differs from `width`, a linear layer follows the encoder."""
    vision_layers: int = 12
    """Blocks of the dual-vision encoder."""
    vision_head_width: int = 64
    """Width of an attention head of the vision encoder (CLIP: always 64)."""
    temporal_stride: int = 0
    """Temporal down-sampling: patches span three frames, and start at every so many frames, such as 2; 0: off.
    """
    local_temporal: bool = True
    """Local temporal modules in the vision encoder; without them it cannot see the order of frames."""
    local_temporal_groups: int = 0
    """Groups of the temporal convolution; 0: as many as channels (depth-wise, as released)."""
    local_temporal_placement: Literal["released", "figure"] = "released"
    """released: before the attention and before the MLP of each block; figure: before the attention only."""
    class_token: Literal["released", "figure"] = "released"
    """released: one class token per frame, averaged at the end; figure: one class token for all frames of a video."""
    temporal_on_images: bool = True
    """Run the local temporal modules on images too, as released; in Figure 2 they are for videos only."""
    width: int = dataclasses.field(default=768, metadata={"title": "model: text, universal layers, fusion, decoder"})
    """Width of text encoder, universal layers, fusion and decoder."""
    heads: int = 12
    """Attention heads of text encoder, universal layers, fusion and decoder."""
    ff_width: int = 3072
    """Hidden width of the feed-forward parts of text encoder, universal layers, fusion and decoder."""
    text_layers: int = 12
    """Layers of the text encoder, including the universal layers."""
    universal_layers: int = 2
    """How many of the last text layers are universal, that is shared with vision; 0: no layer is shared."""
    latents: int = 50
    """Learned latent queries of the universal layers."""
    universal_readout: Literal["released", "figure"] = "released"
    """How vision passes through the universal layers: as in the released code, or as in Figure 2(c)."""
    fusion_layers: int = 3
    """Layers of the fusion module."""
    fusion_stride: int = 0
    """0: cross-attention in every fusion layer, as released; k > 0: every k-th layer joins vision and text instead."""
    decoder_layers: int = 12
    """Layers of the shared decoder."""
    vocab_size: int = 30522
    """Largest size of the vocabulary; a vocabulary trained on few texts is smaller."""
    max_positions: int = 512
    """Longest text in tokens."""
    boxes: Literal["soft_argmax", "tokens"] = "soft_argmax"
    """Grounding: soft_argmax, a head of ours; tokens: the decoder writes four location tokens, as in mPLUG."""
    contrastive_width: int = 256
    """Width of the space in which vision and text are compared."""
    dropout: float = 0.1
    """Dropout of text encoder, universal layers, fusion and decoder, attention weights included."""
    drop_path: float = 0.0
    """Probability that a sample skips a residual branch in the last block of the vision encoder; lower blocks: less."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in MAY_BE_ZERO)
            choices = getattr(field.type, "__args__", ())
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{field.name}={value!r}: expected an integer of at least {least}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name}={value!r}: expected true or false")
            if field.type is float and not 0 <= value < 1:
                raise ValueError(f"{field.name}={value!r}: expected a fraction of at least 0 and below 1")
            if choices and value not in choices:
                raise ValueError(f"{field.name}={value!r}: expected one of {', '.join(choices)}")
        for part, whole in ("patch_size", "image_size"), ("vision_head_width", "vision_width"), ("heads", "width"):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part}={getattr(self, part)} does not divide {whole}={getattr(self, whole)}")
        if self.vision_width % 2:
            raise ValueError(f"vision_width={self.vision_width} is odd: the local temporal modules work at half of it")
        if self.local_temporal_groups and (self.vision_width // 2) % self.local_temporal_groups:
            raise ValueError(f"local_temporal_groups={self.local_temporal_groups} does not divide "
                             f"vision_width / 2 = {self.vision_width // 2}")
        if self.universal_layers > self.text_layers:
            raise ValueError(f"universal_layers={self.universal_layers} is more than text_layers={self.text_layers}: "
                             "the universal layers are the last of them")

    @property
    def vision_heads(self) -> int:
        return self.vision_width // self.vision_head_width

    @property
    def patches(self) -> int:
        """n, patches per frame."""
        return (self.image_size // self.patch_size) ** 2


MAY_BE_ZERO = ("temporal_stride", "local_temporal_groups", "universal_layers", "fusion_stride")

tiny = partial(
    ModelConfig, image_size=32, patch_size=8, vision_width=64, vision_layers=3, vision_head_width=32, width=64, heads=2,
    ff_width=256, text_layers=4, latents=16, fusion_layers=2, decoder_layers=2, vocab_size=4096, max_positions=32,
    contrastive_width=64, dropout=0.0,
)
"""For the tiny world: about 0.74 million parameters, trained in minutes on two CPU cores."""

small = partial(
    ModelConfig, image_size=112, vision_width=384, vision_layers=5, width=256, heads=4, ff_width=1024, text_layers=6,
    latents=32, fusion_layers=2, decoder_layers=3, vocab_size=8192, max_positions=128, contrastive_width=128,
)
"""For one GPU and a data set of one's own: about 26 million parameters."""

base = ModelConfig
"""mPLUG-2 base: ViT-B/16, about 0.38 billion parameters."""

large = partial(ModelConfig, patch_size=14, vision_width=1024, vision_layers=24, width=1024, heads=16, ff_width=4096,
                text_layers=24, fusion_layers=6)
"""mPLUG-2 large, the released size: ViT-L/14, about 1.03 billion parameters."""

PRESETS = {"tiny": tiny, "small": small, "base": base, "large": large}


def nearest_preset(config: ModelConfig) -> str:
    """The name of the widest preset that is not wider than the model."""
    widths = {name: preset().width for name, preset in PRESETS.items()}
    return max((name for name in PRESETS if widths[name] <= config.width), key=widths.get, default="tiny")


def form_fields(form: Literal["released", "figure"], config: ModelConfig, given: Mapping[str, object]) -> dict:
    """The fields of `config` that choose between the released code and Figure 2, all set to one form.

    The figure does not give the number of groups of the temporal convolution. Here it is `local_temporal_groups` of
    the `given` settings, or the number of heads. Raises ValueError if a given setting contradicts the form.
    """
    fields = dict.fromkeys(("local_temporal_placement", "class_token", "universal_readout"), form)
    fields["temporal_on_images"] = form == "released"
    fields["local_temporal_groups"] = 0
    if form == "figure":
        fields["local_temporal_groups"] = given.get("local_temporal_groups") or config.vision_heads
    for name, value in fields.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name}={given[name]!r} contradicts form={form!r}, which sets it to {value!r}: "
                             "give only one of them")
    return fields
