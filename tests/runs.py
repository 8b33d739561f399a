"""Small runs of train.py that several test files make."""

import json
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tiny_data import Sizes

SIZES = Sizes(*[96, 32, 32, 16], *[16, 16, 16, 16], *[28, 24, 16, 16], galleries=1)
MODEL = (
    "--vision-width 32 --vision-layers 1 --vision-head-width 16 --width 32 --heads 2 --ff-width 64 --text-layers 2 "
    "--universal-layers 1 --latents 4 --fusion-layers 1 --decoder-layers 1 --contrastive-width 16"
).split()
FAST = "--batch-size 8 --log-every 1 --eval-limit 4 --workers 0 --device cpu".split()

SMALL = (
    "--image-size 8 --patch-size 4 --vision-width 16 --vision-layers 1 --vision-head-width 8 --width 16 --heads 2 "
    "--ff-width 32 --text-layers 2 --universal-layers 1 --latents 3 --fusion-layers 1 --decoder-layers 1 "
    "--contrastive-width 8 --max-positions 24 --batch-size 6 --log-every 1 --device cpu --text-weight 0.3"
).split()
"""The settings of an even smaller run."""

KNOWN = "--shutdown-timeout" in get_args_parser()._option_string_actions
SHUTDOWN_TIMEOUT = ("--shutdown-timeout", "150") if KNOWN else ()
"""The flag of torchrun for ranks that need time to save; older versions do not have it."""


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, main, arguments: list[str], code: int) -> str:
    """The message with which `main` refuses `arguments`, on one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == code
    return " ".join(capsys.readouterr().err.split())
