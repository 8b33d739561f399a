"""Data from the command line: check a download of a public data set and convert it, check or pack your own files.

    python -m mplug2.data msrvtt_caption downloads/msrvtt
    python -m mplug2.data msrvtt_caption downloads/msrvtt --out data/msrvtt      # then: train.py --data data/msrvtt

The check prints the number of records of each split next to the published one, lists media that are missing or cannot
be decoded, and draws one sample of each task. --out writes one file per task and split, and a link `media` to the
download. Records with missing media are left out and counted.

Annotations may be in another folder than the media: --annotations DIR. If several media files have the same name, they
are counted, and --prefer chooses among them.

    python -m mplug2.data check DIR              # a folder of your own JSONL files: everything that is wrong with it
    python -m mplug2.data pack DIR OUT           # pre-training records as tar shards, for train.py --data OUT
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from mplug2.data.adapters import ADAPTERS, check_name
from mplug2.data.adapters.source import Files
from mplug2.data.check import check_dataset
from mplug2.data.check_folder import check_folder
from mplug2.data.shards import pack
from mplug2.flags import check_range, one_line_errors, parse

PROG = "python -m mplug2.data"


@dataclass(frozen=True)
class DownloadSettings:
    name: str = field(metadata={"known": tuple(ADAPTERS)})
    """The data set."""
    root: str
    """Folder of the download: annotations and media."""
    annotations: str = ""
    """Folder of the annotation files, if they are not in ROOT."""
    prefer: str = ""
    """Folder whose file is used where several have the same name. Default: the shortest path."""
    out: str = ""
    """Folder for the JSONL files."""
    decode: int = 32
    """Number of media files of each split to decode; 0: all."""
    preview: str = ""
    """Image file for one drawn sample per task. Default: NAME.png, in --out if given."""

    def __post_init__(self):
        check_name(self.name)
        check_range(self, "decode", 0)


@dataclass(frozen=True)
class FolderSettings:
    root: str
    """Folder with <task>.<split>.jsonl files."""
    decode: int = 32
    """Number of media files per file of records to decode; 0: all."""
    tokenizer: str = ""
    """vocab.txt, tokenizer.json, or checkpoint folder: report unknown words."""

    def __post_init__(self):
        check_range(self, "decode", 0)


@dataclass(frozen=True)
class PackSettings:
    root: str
    """Folder with <task>.<split>.jsonl files."""
    out: str
    """Folder for the shards."""
    split: str = "train"
    """Split to pack."""
    samples_per_shard: int = 1000
    """Samples in each tar."""

    def __post_init__(self):
        check_range(self, "samples_per_shard", 1)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_errors(PROG):
        {"pack": pack_command, "check": folder_command}.get(next(iter(arguments), ""), download_command)(arguments)


def pack_command(arguments: list[str]) -> None:
    given = parse(PackSettings, __doc__, f"{PROG} pack", arguments[1:])
    counts = pack(Path(given.root), Path(given.out), given.split, given.samples_per_shard)
    print(f"{given.out}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))


def folder_command(arguments: list[str]) -> None:
    given = parse(FolderSettings, __doc__, f"{PROG} check", arguments[1:])
    check_folder(Path(given.root), given.decode, Path(given.tokenizer) if given.tokenizer else None)


def download_command(arguments: list[str]) -> None:
    given = parse(DownloadSettings, __doc__, PROG, arguments)
    annotations, out, preview = (Path(path) if path else None for path in (given.annotations, given.out, given.preview))
    check_dataset(given.name, Files(Path(given.root), annotations, given.prefer), out, given.decode, preview)


if __name__ == "__main__":
    main()
