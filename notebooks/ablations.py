"""Small ablations in the tiny world, with three seeds each. Does it help to share weights between text and vision, and
to learn from videos and images together?

    python notebooks/ablations.py          # about 6 minutes on one core

Every variant is trained from scratch with the vision-text contrastive loss (VTC) alone, because this loss sends both
modalities through the universal layers. Training takes 100 steps of 32 samples: 65 steps of videos and 35 of images.
The model then ranks texts and media of the test split.

Each run adds its results to notebooks/ablations.json; runs that are in the file are skipped. The file also has results
of full-length runs of train.py, with the commands that made them. Notebook 06 shows both.
"""

import json
from pathlib import Path

import numpy as np
import torch

import tiny_data
from mplug2.checkpoint import PreprocessConfig
from mplug2.config import tiny
from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.loader import make_loader
from mplug2.data.records import read_records
from mplug2.data.samples import Samples, read_samples
from mplug2.data.text import Tokenizer
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.labels import evaluate_labels
from mplug2.evaluation.ranking import ranks
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.losses import contrastive_loss
from mplug2.predictor import Predictor
from mplug2.training import optim

RESULTS = Path(__file__).with_suffix(".json")
PRETRAINED = Path(tiny_data.__file__).parent / "pretrained"  # only its vocabulary is used
SEEDS = (0, 1, 2)
BOTH = {"video": 65, "image": 35}
VARIANTS = {  # changed settings of the model, and steps by type of batch
    "full": ({}, BOTH),
    "no universal layers": ({"universal_layers": 0}, BOTH),
    "all text layers universal": ({"universal_layers": 4}, BOTH),
    "videos alone": ({}, {"video": 65}),
    "images alone": ({}, {"image": 35}),
}
USED = ("vision_encoder", "text_encoder", "universal", "contrastive_vision", "contrastive_text", "temperature")


def train(changes: dict, steps_by_type: dict[str, int], seed: int) -> Predictor:
    """A variant after training: `changes` to the model, and the number of steps for each type of batch."""
    root, tokenizer = tiny_data.ensure(), Tokenizer.load(PRETRAINED / "tokenizer.json")
    samples = read_samples(root, "pretrain", "train")
    samples = {name: samples[name] for name in samples if name in steps_by_type}
    torch.manual_seed(seed)
    model = MPLUG2(tiny(vocab_size=len(tokenizer), **changes), "video_retrieval").train()
    steps = sum(steps_by_type.values())
    settings = optim.OptimizerSettings(warmup_steps=steps // 20)
    optimizer = optim.make_optimizer(model, settings)
    dataset = Samples(samples, 32, 4, 1, model.config.max_positions, 30, seed)
    batches = MixedBatches({name: len(samples[name]) for name in steps_by_type}, steps_by_type, 32, steps, seed)
    for step, batch in enumerate(make_loader(dataset, batches, Collate(tokenizer), workers=0, pin=False)):
        optim.set_lr(optimizer, settings, step, steps)
        vision = model.project_vision(model.encode_vision(batch["pixels"]))
        text = model.project_text(model.encode_text(batch["caption_ids"], batch["caption_mask"]))
        contrastive_loss(vision, text, model.temperature, batch["positive_id"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Predictor(model.eval(), tokenizer, PreprocessConfig(frames=4, max_words=30))


def test(predictor: Predictor) -> dict[str, float]:
    """Results by modality: R@1 among 100 in both directions, averaged over the galleries, and zero-shot accuracy (the
    digit of an image, the motion of a video)."""
    found, root = {}, tiny_data.ensure()
    for modality in ("video", "image"):
        to_text, from_text = f"{modality[0]}2t", f"t2{modality[0]}"
        records, r1 = read_records(root, f"{modality}_retrieval", "test"), {to_text: [], from_text: []}
        for gallery in sorted({record.gallery for record in records}):
            own = [record for record in records if record.gallery == gallery]
            texts, media = [record.captions[0] for record in own], [record.video or record.image for record in own]
            cosines = predictor.similarity(media, texts).numpy()
            ids = np.array([record.positive_id for record in own])
            positives = ids[:, None] == ids[None, :]
            r1[to_text].append((ranks(cosines, positives) == 1).mean())
            r1[from_text].append((ranks(cosines.T, positives) == 1).mean())
        found |= {f"{modality} {direction} R@1": float(np.mean(values)) for direction, values in r1.items()}
        task = f"{modality}_classification"
        metrics, _ = evaluate_labels(predictor, task, EvalSplit(root, "test"), EvalOptions())
        found[f"{modality} class"] = metrics["zero_shot"].value
    return found


def main() -> None:
    for seed in SEEDS:
        for variant, (changes, steps_by_type) in VARIANTS.items():
            if str(seed) in read()[1].get(variant, {}):
                continue
            predictor = train(changes, steps_by_type, seed)
            parameters = [p for name, p in predictor.model.named_parameters() if name.split(".")[0] in USED]
            found = {"parameters": sum(p.numel() for p in parameters),
                     **{name: round(value, 4) for name, value in test(predictor).items()}}
            results, runs = read()
            runs.setdefault(variant, {})[str(seed)] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(variant, seed, found, flush=True)


def read() -> tuple[dict, dict]:
    """The contents of the file, and the part with the runs of this program."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    own = results.setdefault("contrastive, 100 steps", {"command": "python notebooks/ablations.py", "runs": {}})
    return results, own["runs"]


if __name__ == "__main__":
    main()
