"""Recipes: the settings of each public task, by name, for `train.py --recipe NAME --init CHECKPOINT --data DIR`; and
the defaults of each size of model where no recipe is named.

A recipe is a set of values for flags of train.py. Flags that are given next to it take precedence. Sources: "mPLUG-2"
is the released settings for videos (16 frames, 10 epochs, 4 samples on each of 8 GPUs). Where they are silent, the
published settings of its lineage stand in: mPLUG, ALBEF, and BERT for GLUE. Where a source gives the batch per GPU and
no number of GPUs, the batch is 256 for images and 128 for videos. Images keep the size of the checkpoint, 224 pixels
(the lineage fine-tunes at 336 or 384). The warmup is the default of train.py where a source gives none. None of the
recipes has been run here.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Recipe:
    data: str
    """The data set, for `python -m mplug2.data`."""
    task: str
    metric: str
    """The metric that the literature reports."""
    source: str
    """Where the settings come from."""
    paper: str = ""
    """What the mPLUG-2 paper, or a paper that cites it, reports for the large model."""
    settings: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Values of settings of train.py, by name."""


def _recipe(
    data: str, task: str, metric: str, source: str, lr: float, vision_lr: float, epochs: int, batch: int,
    paper: str = "", **more: Any,
) -> Recipe:
    augmented = task.startswith(("video", "image", "visual"))
    settings = dict(
        task=task, lr=lr, vision_lr=vision_lr, min_lr=1e-6, epochs=epochs, batch_size=batch, weight_decay=0.02,
        beta2=0.999, augment="finetune" if augmented else "none", hflip=augmented, frames=16, precision="bfloat16",
        optimizer="adamw", vtc_weight=1.0,
    )
    return Recipe(data, task, metric, source, paper, MappingProxyType(settings | more))


def _mplug2(data: str, task: str, metric: str, paper: str = "", source: str = "mPLUG-2", **more: Any) -> Recipe:
    """The released code clips no gradients; its distillation has an effective weight of 0."""
    return _recipe(data, task, metric, source, 2e-5, 2e-6, 10, paper=paper, **{"batch": 32, "clip_grad": 0.0} | more)


def _caption(data: str, paper: str) -> Recipe:
    """Two accumulated steps of 32 samples."""
    return _mplug2(data, "video_caption", "CIDEr", paper, batch=64, accumulation_steps=2)


def _question(data: str, paper: str = "") -> Recipe:
    return _mplug2(data, "video_qa", "accuracy", paper, questions_per_sample=1, warmup_steps=200)


def _retrieval(data: str, paper: str = "", **more: Any) -> Recipe:
    """The only published file with settings for these data sets belongs to a zero-shot program of mPLUG."""
    return _recipe(data, "video_retrieval", "text-to-video R@1", "mPLUG, zero-shot file", 1e-5, 1e-6, 5, 128, paper,
                   frames=12, **more)


def _pretrain(preset: str) -> Recipe:
    """Pre-training on images and videos of the web, as mPLUG's; mPLUG-2's settings are not published."""
    return Recipe("", "pretrain", "losses", "mPLUG", "", MappingProxyType(
        {"task": "pretrain", "preset": preset, **PRETRAINING[preset]}))


def _glue(name: str, metric: str) -> Recipe:
    task = "text_classification" if name in ("cola", "sst2") else "text_pair_classification"
    return _recipe(f"glue_{name}", task, metric, "BERT", 2e-5, 0.0, 3, 32, max_words=64, warmup_ratio=0.1)


_WEB = dict(
    batch_size=1024, epochs=30, frames=4, image_weight=0.85, video_weight=0.15, text_weight=0.0, vtc_weight=1.0,
    augment="pretrain", optimizer="adamw", weight_decay=0.02, beta2=0.999, warmup_steps=2000, precision="bfloat16",
)
PRETRAINING: dict[str, dict[str, Any]] = {
    "tiny": dict(
        lr=2.5e-3, questions_per_sample=4, vtc_weight=3.0, caption_weight=2.0, answer_weight=4.0, mlm_weight=0.5,
        video_weight=0.55, image_weight=0.42, text_weight=0.03,
    ),
    "small": dict(max_steps=20_000, batch_size=128, frames=8, lr=1e-3, warmup_steps=1000),
    "base": _WEB | dict(lr=1e-4, vision_lr=1e-5, min_lr=1e-6),
    "large": _WEB | dict(lr=5e-5, vision_lr=5e-6, min_lr=2e-6),
}
"""Defaults of pre-training for each preset. `tiny`: see docs/speed.md. `small`: a starting point, not tuned. `base` and
`large`: mPLUG's (pretrain_mplug_base.yaml and pretrain_mplug_large.yaml), with images and videos in proportion to the
14 M and 2.5 M of mPLUG-2."""

FINE_TUNING: dict[str, dict[str, Any]] = {
    "tiny": dict(lr=1e-3), "small": dict(lr=5e-4),
    **dict.fromkeys(("base", "large"), dict(
        lr=2e-5, vision_lr=2e-6, min_lr=1e-6, epochs=10, frames=16, weight_decay=0.02, beta2=0.999, clip_grad=0.0,
        precision="bfloat16", optimizer="adamw", vtc_weight=1.0,
    )),
}
"""Defaults of fine-tuning for each preset, and for checkpoints of about its size. `base` and `large`: those of
mPLUG-2's released code for videos. `small`: not tuned. Without `epochs`, the task table gives the steps."""

CLASSIFICATION = "mPLUG-2, for videos"
"""The source for classification: no settings are published, so those of the video fine-tuning stand in."""

RECIPES: dict[str, Recipe] = {
    "pretrain_base": _pretrain("base"),
    "pretrain_large": _pretrain("large"),
    "msrvtt_caption": _caption("msrvtt_caption", "80.3"),
    "msvd_caption": _caption("msvd_caption", "165.8"),
    "msrvtt_qa": _question("msrvtt_qa", "48.0"),
    "msvd_qa": _question("msvd_qa", "58.1"),
    "tgif_qa": _question("tgif_qa"),
    "msrvtt_retrieval": _retrieval("msrvtt_retrieval", "53.1"),
    "didemo": _retrieval("didemo", "56.4", max_words=256),
    "lsmdc": _retrieval("lsmdc"),
    "kinetics400": _mplug2("kinetics", "video_classification", "top-1", "87.1", CLASSIFICATION),
    "kinetics600": _mplug2("kinetics", "video_classification", "top-1", "", CLASSIFICATION),
    "ssv2": _mplug2("ssv2", "video_classification", "top-1", "", f"{CLASSIFICATION}; lineage", hflip=False),
    "imagenet": _mplug2("imagenet", "image_classification", "top-1", "88.5", CLASSIFICATION, batch=1024),
    "flowers102": _mplug2("imagenet", "image_classification", "top-1", "", CLASSIFICATION),
    "coco_caption": _recipe("coco", "image_caption", "CIDEr", "mPLUG", 1e-5, 5e-6, 5, 256),
    "coco_retrieval": _recipe("coco", "image_retrieval", "R@1", "mPLUG", 1e-5, 2e-6, 8, 1024),
    "flickr30k_retrieval": _recipe("flickr30k", "image_retrieval", "R@1", "mPLUG", 1e-5, 2e-6, 8, 1024),
    "vqav2": _recipe(
        "vqav2", "image_qa", "VQA accuracy", "mPLUG, batch of ALBEF", 3e-5, 5e-6, 8, 256, questions_per_sample=1,
        distill_weight=0.4),
    "snli_ve": _recipe("snli_ve", "visual_entailment", "accuracy", "ALBEF; lineage", 2e-5, 0.0, 5, 256),
    "nlvr2": _recipe("nlvr2", "image_pair_reasoning", "accuracy", "ALBEF; lineage", 2e-5, 0.0, 10, 128, hflip=False),
    "refcoco": _recipe("refcoco", "grounding", "IoU > 0.5", "mPLUG", 2e-5, 5e-6, 120, 192, "90.1 / 92.8 / 86.1"),
    "refcoco+": _recipe("refcoco+", "grounding", "IoU > 0.5", "mPLUG", 2e-5, 5e-6, 120, 192),
    "refcocog": _recipe("refcocog", "grounding", "IoU > 0.5", "mPLUG", 2e-5, 5e-6, 120, 192, "84.7 / 85.1"),
    "glue_cola": _glue("cola", "Matthews"),
    "glue_sst2": _glue("sst2", "accuracy"),
    "glue_mrpc": _glue("mrpc", "F1, accuracy"),
    "glue_qqp": _glue("qqp", "F1, accuracy"),
    "glue_stsb": _glue("stsb", "Pearson, Spearman"),
    "glue_mnli": _glue("mnli", "accuracy"),
    "glue_qnli": _glue("qnli", "accuracy"),
    "glue_rte": _glue("rte", "accuracy"),
    "glue_wnli": _glue("wnli", "accuracy"),
}


def recipe_table() -> str:
    """The recipes as the table of docs/recipes.md."""
    lines = ["| recipe | data | task | metric | settings from | lr / vision | epochs | batch | paper, not run here |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, recipe in RECIPES.items():
        s = recipe.settings
        data = f"`{recipe.data}`" if recipe.data else "images, videos"
        rates = f"{s['lr']:.0e} / {s['vision_lr'] or s['lr']:.0e}".replace("e-0", "e-")
        lines.append(f"| `{name}` | {data} | `{recipe.task}` | {recipe.metric} | {recipe.source} | {rates} | "
                     f"{s['epochs']} | {s['batch_size']} | {recipe.paper} |")
    return "\n".join(lines)
