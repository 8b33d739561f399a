"""Published weights: released mPLUG-2 checkpoints, CLIP and BERT. The command: `python -m mplug2.pretrained --help`."""

from mplug2.pretrained.bert import from_bert
from mplug2.pretrained.clip import from_clip
from mplug2.pretrained.files import open_weights
from mplug2.pretrained.released import from_released, to_released

__all__ = ["from_bert", "from_clip", "from_released", "open_weights", "to_released"]
