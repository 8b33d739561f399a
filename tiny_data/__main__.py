"""Write the tiny world into a new folder.

    python -m tiny_data --out DIR --seed 0 --clips 1000
"""

import time
from dataclasses import dataclass

from mplug2.flags import Parser, one_line_errors
from tiny_data.writer import Sizes, write


@dataclass(frozen=True)
class WorldSettings:
    out: str = ""
    """Output folder, which must be new or empty."""
    seed: int = 0
    """Equal seeds give equal bytes."""

    def __post_init__(self):
        if not self.out:
            raise ValueError("no output folder: name a new one with --out")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, "python -m tiny_data")
    parser.add(WorldSettings, "world")
    parser.add(Sizes, "sizes")
    given = parser.read(arguments)
    try:
        settings, sizes = WorldSettings(**given["WorldSettings"]), Sizes(**given["Sizes"])
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    with one_line_errors("python -m tiny_data"):
        write(settings.out, settings.seed, sizes)
    print(f"wrote {settings.out} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
