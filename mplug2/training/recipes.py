"""Recipes: the settings of each public task, by name, for `train.py --recipe NAME --init CHECKPOINT --data DIR`.

A recipe is a set of values for flags of train.py. Flags that are given next to it take precedence. Sources: "mPLUG-2"
is the released settings for videos (16 frames, 10 epochs, 4 samples on each of 8 GPUs). Where they are silent, the
published settings of its lineage stand in: mPLUG, ALBEF, and BERT for GLUE. Where a source gives the batch per GPU and
no number of GPUs, the batch is 256 for images and 128 for videos. Images keep the size of the checkpoint, 224 pixels
(the lineage fine-tunes at 336 or 384). The warmup is the default of train.py, except BERT's. None of the recipes has
been run here.
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
    """What the mPLUG-2 paper reports for its large model, if it does."""
    settings: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Values of settings of train.py, by name."""


def _recipe(
    data: str, task: str, metric: str, source: str, lr: float, vision_lr: float, epochs: int, batch: int,
    paper: str = "", **more: Any,
) -> Recipe:
    augmented = task.startswith(("video", "image", "visual"))
    settings = dict(
        task=task, lr=lr, vision_lr=vision_lr, min_lr_ratio=round(1e-6 / lr, 4), epochs=epochs, batch_size=batch,
        weight_decay=0.02, beta2=0.999, augment="finetune" if augmented else "none", hflip=augmented,
        frames=16, precision="bfloat16", optimizer="adamw", vtc_weight=1.0,
    )
    return Recipe(data, task, metric, source, paper, MappingProxyType(settings | more))


def _mplug2(data: str, task: str, metric: str, paper: str = "", source: str = "mPLUG-2", **more: Any) -> Recipe:
    return _recipe(data, task, metric, source, 2e-5, 2e-6, 10, 32, paper, **more)


def _glue(name: str, metric: str) -> Recipe:
    task = "text_classification" if name in ("cola", "sst2") else "text_pair_classification"
    return _recipe(f"glue_{name}", task, metric, "BERT", 2e-5, 0.0, 3, 32, max_words=64, warmup_ratio=0.1)


CLASSIFICATION = "mPLUG-2, for videos"
"""The source for classification: no settings are published, so those of the video fine-tuning stand in."""

RECIPES: dict[str, Recipe] = {
    "msrvtt_caption": _mplug2("msrvtt_caption", "video_caption", "CIDEr", "80.3"),
    "msvd_caption": _mplug2("msvd_caption", "video_caption", "CIDEr", "165.8"),
    "msrvtt_qa": _mplug2("msrvtt_qa", "video_qa", "accuracy", "48.0", questions_per_sample=1, distill_weight=0.4),
    "msvd_qa": _mplug2("msvd_qa", "video_qa", "accuracy", "58.1", questions_per_sample=1, distill_weight=0.4),
    "tgif_qa": _mplug2("tgif_qa", "video_qa", "accuracy", questions_per_sample=1, distill_weight=0.4),
    "msrvtt_retrieval": _recipe(
        "msrvtt_retrieval", "video_retrieval", "text-to-video R@1", "mPLUG", 1e-5, 1e-6, 5, 128, "53.1", frames=12),
    "didemo": _recipe(
        "didemo", "video_retrieval", "text-to-video R@1", "mPLUG, for MSR-VTT", 1e-5, 1e-6, 5, 128, "56.4", frames=12,
        max_words=64),
    "lsmdc": _recipe(
        "lsmdc", "video_retrieval", "text-to-video R@1", "mPLUG, for MSR-VTT", 1e-5, 1e-6, 5, 128, frames=12),
    "kinetics400": _mplug2("kinetics", "video_classification", "top-1", "87.1", CLASSIFICATION),
    "ssv2": _mplug2("ssv2", "video_classification", "top-1", "", CLASSIFICATION, hflip=False),
    "imagenet": _mplug2("imagenet", "image_classification", "top-1", "88.5", CLASSIFICATION, batch_size=1024),
    "coco_caption": _recipe("coco", "image_caption", "CIDEr", "mPLUG", 1e-5, 5e-6, 5, 256),
    "coco_retrieval": _recipe("coco", "image_retrieval", "R@1", "mPLUG", 1e-5, 2e-6, 8, 256),
    "flickr30k_retrieval": _recipe("flickr30k", "image_retrieval", "R@1", "mPLUG", 1e-5, 2e-6, 8, 256),
    "vqav2": _recipe(
        "vqav2", "image_qa", "VQA accuracy", "mPLUG, batch of ALBEF", 3e-5, 5e-6, 8, 256, questions_per_sample=1,
        distill_weight=0.4),
    "snli_ve": _recipe("snli_ve", "visual_entailment", "accuracy", "ALBEF", 2e-5, 0.0, 5, 256),
    "nlvr2": _recipe("nlvr2", "image_pair_reasoning", "accuracy", "ALBEF", 2e-5, 0.0, 10, 128, hflip=False),
    "refcoco": _recipe("refcoco", "grounding", "IoU > 0.5", "mPLUG", 2e-5, 5e-6, 120, 192),
    "refcoco+": _recipe("refcoco+", "grounding", "IoU > 0.5", "mPLUG", 2e-5, 5e-6, 120, 192),
    "refcocog": _recipe("refcocog", "grounding", "IoU > 0.5", "mPLUG", 2e-5, 5e-6, 120, 192),
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
        rates = f"{s['lr']:.0e} / {s['vision_lr'] or s['lr']:.0e}".replace("e-0", "e-")
        lines.append(f"| `{name}` | `{recipe.data}` | `{recipe.task}` | {recipe.metric} | {recipe.source} | {rates} | "
                     f"{s['epochs']} | {s['batch_size']} | {recipe.paper} |")
    return "\n".join(lines)
