"""The ablations of notebook 06: the committed results belong to the models that the code builds today."""

import importlib.util
import json
from pathlib import Path

from mplug2.config import tiny
from mplug2.model.mplug2 import MPLUG2

FILE = Path(__file__).parents[1] / "notebooks/ablations.py"
spec = importlib.util.spec_from_file_location("ablations", FILE)
ablations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablations)


def used(model: MPLUG2) -> int:
    """The number of parameters that the contrastive loss uses."""
    return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in ablations.USED)


def test_the_results_belong_to_these_variants_and_sizes():
    committed = json.loads(ablations.RESULTS.read_text())
    for name, local_temporal in (("full", True), ("no local temporal", False)):
        model = MPLUG2(tiny(vocab_size=227, local_temporal=local_temporal))
        for found in committed["default, 1,500 steps"]["runs"][name].values():
            assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    runs = committed["contrastive, 100 steps"]["runs"]
    assert set(runs) <= set(ablations.VARIANTS)
    for variant, by_seed in runs.items():
        assert set(by_seed) <= {str(seed) for seed in ablations.SEEDS}
        model = MPLUG2(tiny(vocab_size=227, **ablations.VARIANTS[variant][0]), "video_retrieval")
        assert {found["parameters"] for found in by_seed.values()} <= {used(model)}


def test_training_changes_only_the_weights_that_the_contrastive_loss_uses():
    changes, _ = ablations.VARIANTS["no universal layers"]
    trained = ablations.train(changes, {"video": 1, "image": 1}, seed=3).model
    other = ablations.train(changes, {"video": 1}, seed=3).model
    assert not trained.training
    for (name, a), (_, b) in zip(trained.named_parameters(), other.named_parameters(), strict=True):
        if name.startswith("matching_head.weight"):
            assert a.equal(b)
        if name.startswith(("contrastive_vision.weight", "contrastive_text.weight")):
            assert not a.equal(b)
