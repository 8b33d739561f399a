"""Adapters for data sets from the web: pairs of a caption and a URL, whose images or videos a program downloaded.

img2dataset and video2dataset write the caption next to each file, as `.json` or `.txt`. These captions are used, and
compared with the published table. The number in a file name of these programs is no row number: it consists of the
number of the shard and the number within it.

Without such files, the number in a name is taken as the row number of the table, from 0: `train/000000000.jpg`. Names
of the usual downloader of Conceptual Captions, `training/0_1234567890`, also have the checksum of the URL.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mplug2.data.adapters.source import Annotation, Files, ParsedRecord, json_object, table, text_lines
from mplug2.data.records import RecordError

FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
"""Words in the names of the folders of each split."""
TOLERATED = 0.01
"""Fraction of captions that may differ from the published table: programs read quotes in tables in different ways."""


@dataclass(frozen=True)
class Row:
    """A row of a published table."""

    source: str
    caption: str
    url: str = ""
    path: str = ""
    """Where the file should be, if the table says it."""
    id: str = ""


Table = Callable[[], Iterator[Row]]


def cc3m(files: Files) -> Iterator[ParsedRecord]:
    """Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv: caption and URL.

    The images of each split are in a folder of its own, `train` or `val` (or `training`, `validation`).
    """
    names = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
    return _pairs(files, "image", list(names), {
        split: partial(_rows, path, ["caption", "url"])
        for split, name in names.items() if (path := files.optional(name))
    })


def cc12m(files: Files) -> Iterator[ParsedRecord]:
    """cc12m.tsv: URL and caption."""
    path = files.optional("cc12m.tsv")
    return _pairs(files, "image", ["train"], {"train": partial(_rows, path, ["url", "caption"])} if path else {})


def sbu(files: Files) -> Iterator[ParsedRecord]:
    """sbu-captions-all.json (image_urls and captions, two lists), or sbu.tsv (caption and URL), or
    SBU_captioned_photo_dataset_urls.txt and ..._captions.txt, line by line."""
    tables = {}
    if path := files.optional("sbu-captions-all.json"):
        tables["train"] = partial(_sbu_json, path)
    elif path := files.optional("sbu.tsv"):
        tables["train"] = partial(_rows, path, ["caption", "url"])
    elif path := files.optional("SBU_captioned_photo_dataset_urls.txt"):
        tables["train"] = partial(_sbu_lines, path, files.annotation("SBU_captioned_photo_dataset_captions.txt"))
    return _pairs(files, "image", ["train"], tables)


def webvid(files: Files) -> Iterator[ParsedRecord]:
    """results_2M_train.csv and results_2M_val.csv (or 10M): videoid, contentUrl, duration, page_dir, name."""
    return _pairs(files, "video", ["train", "val"], {
        split: partial(_webvid_rows, path) for split in ("train", "val")
        if (path := files.optional(f"results_2M_{split}.csv", f"results_10M_{split}.csv"))
    })


# ---- tables ----------------------------------------------------------------------------------------------------------


def _rows(path: Path, columns: list[str]) -> Iterator[Row]:
    for number, row in enumerate(table(path, "\t", columns, quoted=False)):
        if number or list(row.values.values()) != columns:  # img2dataset requires a header
            yield Row(row.source, row.text("caption"), row.text("url"))


def _sbu_json(path: Path) -> Iterator[Row]:
    content = json_object(path)
    captions, urls = content.texts("captions"), content.texts("image_urls")
    _check_lengths(path, urls, captions)
    return (Row(f"{path}: captions[{k}]", *pair) for k, pair in enumerate(zip(captions, urls)))


def _sbu_lines(path: Path, captions_path: Path) -> Iterator[Row]:
    urls, captions = [line for _, line in text_lines(path)], list(text_lines(captions_path))
    _check_lengths(path, urls, captions)
    return (Row(source, caption, url) for (source, caption), url in zip(captions, urls))


def _check_lengths(path: Path, urls: list, captions: list) -> None:
    if len(urls) != len(captions):
        raise RecordError(f"{path} has {len(urls)} URLs, but there are {len(captions)} captions; download both again")


def _webvid_rows(path: Path) -> Iterator[Row]:
    for row in table(path, ","):
        name = os.path.join(row.text("page_dir"), f"{row.key('videoid')}.mp4")
        yield Row(row.source, row.text("name"), path=name, id=row.key("videoid"))


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _pairs(files: Files, kind: str, splits: list[str], tables: dict[str, Table]) -> Iterator[ParsedRecord]:
    """One record per image or video, with the caption next to it, or else that of its row in the table."""
    paths = files.all_media(kind)
    if not paths and files.tars():
        raise ValueError(f"{files.tars()[0]} is a tar and needs no conversion: give its folder to train.py --data")
    if any(_caption_of(files, path) for path in paths):
        yield from _with_captions(files, kind, paths, splits, tables)
        return
    if not tables:
        raise FileNotFoundError(f"{files.root} has neither the published table of {files.dataset} nor captions (.json, "
                                f".txt) next to its {kind}s; add the table, or name its folder with --annotations")
    files.absent += [split for split in splits if split not in tables]
    for split, rows in tables.items():
        for number, row in enumerate(rows()):
            fields = {"id": row.id} if row.id else {}
            fields |= {kind: _by_row(files, kind, split, len(splits) > 1, number, row), "captions": [row.caption]}
            yield ParsedRecord(f"{kind}_caption", split, row.source, fields)


def _by_row(files: Files, kind: str, split: str, several: bool, number: int, row: Row) -> str:
    """The file of a row: at the path that the table names, or named after the number of the row."""
    if row.path:
        return files.media(kind, row.path, unique=True)
    names = (f"{number:09d}.jpg", f"{number}_{zlib.crc32(row.url.encode())}")
    return files.media(kind, *(os.path.join(folder, name) for folder in (FOLDERS[split] if several else ("",))
                               for name in names))


def _caption_of(files: Files, path: str) -> Annotation | None:
    """What img2dataset or video2dataset wrote next to a file: its `caption`."""
    if other := files.nearby(path, ".json"):
        try:
            content = json.loads(other.read_bytes())
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            content = None
        if isinstance(content, dict) and "caption" in content:
            return Annotation(str(other), content)
    if other := files.nearby(path, ".txt"):
        return Annotation(str(other), {"caption": other.read_text(encoding="utf-8", errors="replace")})
    return None


def _with_captions(
    files: Files, kind: str, paths: list[str], splits: list[str], tables: dict[str, Table]
) -> Iterator[ParsedRecord]:
    """Records from the captions next to the files. RecordError if they are not those of the published table."""
    published = {split: np.unique(np.fromiter((_hash(row.caption) for row in rows()), np.uint64))
                 for split, rows in tables.items()}
    differing, total = [], 0
    for path in paths:
        if (annotation := _caption_of(files, path)) is None:
            files.faulty.append(f"{path}: there is no caption next to it")
            continue
        caption = annotation.values["caption"]
        if not isinstance(caption, str) or not caption.strip():
            files.faulty.append(f"{annotation.source}: caption: found {caption!r:.80}; expected a text")
            continue
        total += 1
        listed = [split for split, hashes in published.items() if _is_in(hashes, _hash(caption))]
        split = _split_of(path, splits) or next(iter(listed or published or splits))
        if split in published and split not in listed:
            differing.append(f"{annotation.source}: caption {caption!r:.80} is not in the published table ({split})")
            continue
        yield ParsedRecord(f"{kind}_caption", split, annotation.source, {kind: path, "captions": [caption.strip()]})
    if len(differing) > TOLERATED * total:
        raise RecordError(f"{differing[0]}; {len(differing):,} of {total:,} captions differ. Check that the table "
                          "belongs to this download")
    files.faulty += differing


def _split_of(path: str, splits: list[str]) -> str | None:
    """The split that a folder of the path is named after, or the only one."""
    if len(splits) == 1:
        return splits[0]
    for folder in reversed(os.path.dirname(path).lower().split("/")):
        words = set(re.split(r"[^a-z]+", folder))
        if found := [split for split in splits if words.intersection(FOLDERS[split])]:
            return found[0]
    return None


def _hash(caption: str) -> int:
    """A 64-bit hash of the letters and digits of a caption."""
    return hash("".join(filter(str.isalnum, caption.lower()))) & (2**64 - 1)


def _is_in(hashes: np.ndarray, value: int) -> bool:
    index = np.searchsorted(hashes, np.uint64(value))
    return bool(index < len(hashes) and hashes[index] == value)
