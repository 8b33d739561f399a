"""The flags of the demo."""

from dataclasses import dataclass
from pathlib import Path

from mplug2.flags import check_range

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class DemoSettings:
    checkpoint: str = str(ROOT / "tiny_data" / "pretrained")
    """Model folder."""
    compare: str = ""
    """A second model folder for the tab Compare. Default: the first one with its local temporal modules off."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts other computers."""
    port: int = 7860
    """Port to listen on."""

    def __post_init__(self):
        check_range(self, "port", 1, 65535)
