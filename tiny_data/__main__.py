"""Write the tiny world:  python -m tiny_data --out DIR [--seed N] [--clips N] ..."""

import argparse
import time
from dataclasses import fields
from pathlib import Path

from tiny_data.writer import Sizes, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tiny_data", description="Write the tiny world into a new folder.")
    parser.add_argument("--out", type=Path, required=True, help="output folder, which must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes (default 0)")
    for field in fields(Sizes):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default, help=f"default {field.default}")
    values = vars(parser.parse_args())
    out, seed = values.pop("out"), values.pop("seed")
    start = time.perf_counter()
    try:
        write(out, seed, Sizes(**values))
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {out} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
