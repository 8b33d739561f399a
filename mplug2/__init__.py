"""mPLUG-2 (ICML 2023), a modular foundation model over text, images and video, from scratch in PyTorch."""

from mplug2.config import PRESETS, ModelConfig
from mplug2.model.mplug2 import MPLUG2
from mplug2.predictor import Predictor, load
from mplug2.tasks import TASKS

__all__ = ["MPLUG2", "PRESETS", "TASKS", "ModelConfig", "Predictor", "load"]
__version__ = "0.1.0"
