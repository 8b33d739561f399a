"""An interactive page: make or upload a video, change its frames, and watch caption, answers and attention change.

    pip install -e ".[demo]"
    python -m mplug2.demo                                        # the model in tiny_data/pretrained
    python -m mplug2.demo --checkpoint runs/tiny/last --compare tiny_data/pretrained

Then open http://127.0.0.1:7860.
"""

import signal
import sys

from mplug2.demo.settings import DemoSettings
from mplug2.flags import one_line_errors, parse

PROG = "python -m mplug2.demo"


def main(arguments: list[str] | None = None) -> None:
    settings = parse(DemoSettings, __doc__, PROG, arguments)
    with one_line_errors(PROG):
        try:
            from mplug2.demo.page import serve
        except ModuleNotFoundError as error:
            raise ValueError(f"the page needs {error.name}: pip install -e '.[demo]'") from error
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as after Ctrl-C, uploads are deleted
        serve(settings)


if __name__ == "__main__":
    main()
