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

import argparse
import sys
from pathlib import Path

from mplug2.data.adapters import ADAPTERS
from mplug2.data.adapters.source import Files
from mplug2.data.check import check_dataset
from mplug2.data.check_folder import check_folder
from mplug2.data.shards import pack


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        {"pack": pack_command, "check": folder_command}.get(next(iter(arguments), ""), download_command)(arguments)
    except (ValueError, OSError) as error:
        print(f"python -m mplug2.data: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def pack_command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mplug2.data pack", allow_abbrev=False)
    parser.add_argument("root", metavar="DIR", type=Path, help="folder with <task>.<split>.jsonl files")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    parser.add_argument("--split", default="train", help="split to pack (default train)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="samples in each tar (default 1000)")
    given = parser.parse_args(arguments[1:])
    counts = pack(given.root, given.out, given.split, given.samples_per_shard)
    print(f"{given.out}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))


def folder_command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mplug2.data check", allow_abbrev=False)
    parser.add_argument("root", metavar="DIR", type=Path, help="folder with <task>.<split>.jsonl files")
    parser.add_argument("--decode", type=int, default=32,
                        help="number of media files per file of records to decode; 0: all (default 32)")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path,
                        help="vocab.txt, tokenizer.json, or checkpoint folder: report unknown words")
    given = parser.parse_args(arguments[1:])
    check_folder(given.root, given.decode, given.tokenizer)


def download_command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mplug2.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help=f"the data set: {', '.join(ADAPTERS)}")
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder of the download: annotations and media")
    parser.add_argument("--annotations", metavar="DIR", type=Path,
                        help="folder of the annotation files, if they are not in ROOT")
    parser.add_argument("--prefer", metavar="FOLDER", default="",
                        help="folder whose file is used where several have the same name (default: the shortest path)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for the JSONL files")
    parser.add_argument("--decode", type=int, default=32,
                        help="number of media files per split to decode; 0: all (default 32)")
    parser.add_argument("--preview", metavar="FILE", type=Path,
                        help="image file for one drawn sample per task (default: NAME.png, in --out if given)")
    given = parser.parse_args(arguments)
    files = Files(given.root, given.annotations, given.prefer)
    check_dataset(given.name, files, given.out, given.decode, given.preview)


if __name__ == "__main__":
    main()
