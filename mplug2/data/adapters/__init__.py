"""Adapters for public data sets: they convert published annotation files to our records.

    for record in read("msrvtt_caption", Files("downloads/msrvtt")): ...

`python -m mplug2.data msrvtt_qa ROOT` checks a download, and with `--out DIR` writes JSONL files for training.
`source.py` has what all adapters share; `video.py`, `image.py`, `text.py` and `web.py` have one small function per
data set.
"""

from collections.abc import Callable, Iterator
from functools import partial

from mplug2.data.adapters import image, text, video, web
from mplug2.data.adapters.source import Files, ParsedRecord
from mplug2.did_you_mean import did_you_mean

ADAPTERS: dict[str, Callable[[Files], Iterator[ParsedRecord]]] = {
    "msrvtt_caption": video.msrvtt_caption,
    "msrvtt_qa": video.msrvtt_qa,
    "msrvtt_retrieval": video.msrvtt_retrieval,
    "msrvtt_retrieval_7k": video.msrvtt_retrieval_7k,
    "msvd_caption": video.msvd_caption,
    "msvd_qa": video.msvd_qa,
    "msvd_retrieval": video.msvd_retrieval,
    "tgif_qa": video.tgif_qa,
    "didemo": video.didemo,
    "lsmdc": video.lsmdc,
    "webvid": web.webvid,
    "kinetics": video.kinetics,
    "ssv2": video.ssv2,
    "coco": image.coco,
    "flickr30k": image.flickr30k,
    "nocaps": image.nocaps,
    "visual_genome": image.visual_genome,
    "cc3m": web.cc3m,
    "cc12m": web.cc12m,
    "sbu": web.sbu,
    "vqav2": image.vqav2,
    "snli_ve": image.snli_ve,
    "nlvr2": image.nlvr2,
    "refcoco": image.refcoco,
    "refcoco+": image.refcoco,
    "refcocog": image.refcocog,
    "imagenet": image.imagenet,
    **{f"glue_{name}": partial(text.glue, name=name) for name in text.GLUE},
    "mplug2_caption": video.mplug2_caption,
    "mplug2_qa": video.mplug2_qa,
    "mplug2_retrieval": video.mplug2_retrieval,
}
"""The adapter of each data set, by its name on the command line: a function from the files of a download to records."""

PUBLISHED: dict[str, tuple[str, dict[str, int]]] = {
    # videos by split: the archive's own readme (video0 to video6512, to video7009, to video9999)
    "msrvtt_caption": ("media", {"train": 6513, "val": 497, "test": 2990}),
    # JSFusion's 1k-A split, as in github.com/choisw0823/vr, reranking/new_d/MSR-VTT/README.md
    "msrvtt_retrieval": ("media", {"train": 9000, "test": 1000}),
    "msrvtt_retrieval_7k": ("media", {"train": 7010, "test": 1000}),
    # Xu et al. 2017, "Video question answering via gradually refined attention", table 1: questions
    "msrvtt_qa": ("records", {"train": 158581, "val": 12278, "test": 72821}),
    "msvd_qa": ("records", {"train": 30933, "val": 6415, "test": 13157}),
    # github.com/albanie/collaborative-experts, misc/datasets/{msvd,lsmdc,didemo}/README.md
    "msvd_caption": ("media", {"train": 1200, "val": 100, "test": 670}),
    "msvd_retrieval": ("media", {"train": 1200, "val": 100, "test": 670}),
    "lsmdc": ("records", {"train": 101079, "val": 7408, "test": 1000}),
    "didemo": ("media", {"train": 8395, "val": 1065, "test": 1004}),
    # github.com/YunseokJANG/tgif-qa, README.md, row "Frame QA"
    "tgif_qa": ("records", {"train": 39392, "test": 13691}),
    # github.com/OpenGVLab/VideoMAEv2, docs/DATASET.md, row ssv2
    "ssv2": ("records", {"train": 168913, "val": 24777}),
    # Karpathy's splits, with restval in training, as in huggingface.co/datasets/undefined443/coco-karpathy-wds
    "coco": ("media", {"train": 113287, "val": 5000, "test": 5000}),
    # ai.google.com/research/ConceptualCaptions: captions
    "cc3m": ("records", {"train": 3318333, "val": 15840}),
    # nocaps.org/download
    "nocaps": ("media", {"val": 4500, "test": 10600}),
    # visualqa.org/download.html: questions
    "vqav2": ("records", {"train": 443757, "val": 214354, "test": 447793}),
    # github.com/necla-ml/SNLI-VE, README.md
    "snli_ve": ("records", {"train": 529527, "val": 17858, "test": 17901}),
    # github.com/lil-lab/nlvr, nlvr2/README.md
    "nlvr2": ("records", {"train": 86373, "val": 6982, "test": 6967}),
    # expressions; splits of UNC and UMD, as in the tables of papers that use github.com/lichengunc/refer
    "refcoco": ("records", {"train": 120624, "val": 10834, "testA": 5657, "testB": 5095}),
    "refcoco+": ("records", {"train": 120191, "val": 10758, "testA": 5726, "testB": 4889}),
    "refcocog": ("records", {"train": 80512, "val": 4896, "test": 9602}),
    # ILSVRC 2012, huggingface.co/datasets/mlx-vision/imagenet-1k
    "imagenet": ("media", {"train": 1281167, "val": 50000}),
    # tensorflow.org/datasets/catalog/glue
    "glue_cola": ("records", {"train": 8551, "val": 1043, "test": 1063}),
    "glue_sst2": ("records", {"train": 67349, "val": 872, "test": 1821}),
    "glue_mrpc": ("records", {"train": 3668, "val": 408, "test": 1725}),
    # without the two rows that have no second question (github.com/huggingface/datasets/issues/277)
    "glue_qqp": ("records", {"train": 363844, "val": 40430, "test": 390965}),
    "glue_stsb": ("records", {"train": 5749, "val": 1500, "test": 1379}),
    "glue_mnli": ("records", {"train": 392702, "val": 9815, "val_mismatched": 9832, "test": 9796,
                              "test_mismatched": 9847}),
    "glue_qnli": ("records", {"train": 104743, "val": 5463, "test": 5463}),
    "glue_rte": ("records", {"train": 2490, "val": 277, "test": 3000}),
    "glue_wnli": ("records", {"train": 635, "val": 71, "test": 146}),
    "glue_ax": ("records", {"test": 1104}),
}
"""The published number of records, or of media files, by split; the source is in the line above each. Kinetics and the
web data sets lose files over time, so no count can be expected from a download."""


def check_name(name: str) -> None:
    """Raises ValueError for a data set that has no adapter."""
    if name not in ADAPTERS:
        known = ", ".join(ADAPTERS)
        hint = did_you_mean(name, [*ADAPTERS, "check", "pack"])  # the other commands of `python -m mplug2.data`
        raise ValueError(f"unknown data set {name!r}{hint}; expected one of {known}")


def read(name: str, files: Files) -> Iterator[ParsedRecord]:
    """The records of a data set.

    Raises ValueError for an unknown name, RecordError for an annotation that differs from the published format, and
    FileNotFoundError for a missing annotation file.
    """
    check_name(name)
    files.dataset = name
    return ADAPTERS[name](files)
