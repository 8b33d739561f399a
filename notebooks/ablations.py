"""Small ablations in the tiny world, three seeds each: does it help to share weights between text and vision, and to
learn from clips and pictures together?

    python notebooks/ablations.py          # about 6 minutes on one core

Every variant is trained from scratch by the contrastive loss alone, the one that takes both modalities through the
universal layers, for 100 steps of 32 samples, 65 of clips and 35 of pictures; then it ranks texts and media of the
test split. Results go to notebooks/ablations.json, run by run; those that are there already are kept. The file also has
results of full-length runs by train.py, with the commands that made them. Notebook 06 shows both.
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
from mplug2.evaluation.ranking import retrieval
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.losses import contrastive_loss
from mplug2.predictor import Predictor
from mplug2.training import optim

RESULTS = Path(__file__).with_suffix(".json")
PRETRAINED = Path(tiny_data.__file__).parent / "pretrained"  # for its vocabulary only
SEEDS = (0, 1, 2)
BOTH = {"video": 65, "image": 35}
VARIANTS = {  # changed settings of the model, and steps by kind of batch
    "full": ({}, BOTH),
    "no universal layers": ({"universal_layers": 0}, BOTH),
    "all text layers universal": ({"universal_layers": 4}, BOTH),
    "clips alone": ({}, {"video": 65}),
    "pictures alone": ({}, {"image": 35}),
}
USED = ("vision_encoder", "text_encoder", "universal", "contrastive_vision", "contrastive_text", "temperature")


def train(changes: dict, kinds: dict[str, int], seed: int) -> Predictor:
    root, tokenizer = tiny_data.ensure(), Tokenizer.load(PRETRAINED / "tokenizer.json")
    samples = {kind: of_kind for kind, of_kind in read_samples(root, "pretrain", "train").items() if kind in kinds}
    torch.manual_seed(seed)
    model = MPLUG2(tiny(vocab_size=len(tokenizer), **changes), "video_retrieval").train()
    steps = sum(kinds.values())
    settings = optim.OptimizerSettings(warmup_steps=steps // 20)
    optimizer = optim.make_optimizer(model, settings)
    dataset = Samples(samples, 32, 4, 1, model.config.max_positions, 30, seed)
    batches = MixedBatches({kind: len(samples[kind]) for kind in kinds}, kinds, 32, steps, seed)
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
    """By medium: R@1 of 100, both directions, mean over the galleries; and classes told by captions (zero-shot): the
    digit of a picture, the motion of a clip."""
    found, root = {}, tiny_data.ensure()
    for medium in ("video", "image"):
        records, r1 = read_records(root, f"{medium}_retrieval", "test"), {"v2t": [], "t2v": []}
        for gallery in sorted({record.gallery for record in records}):
            those = [record for record in records if record.gallery == gallery]
            texts, media = [record.captions[0] for record in those], [record.video or record.image for record in those]
            cosines = predictor.similarity(media, texts).numpy()
            meaning = np.array([record.positive_id for record in those])
            right = meaning[:, None] == meaning[None, :]
            r1["v2t"].append(retrieval(cosines, right)["r1"])
            r1["t2v"].append(retrieval(cosines.T, right)["r1"])
        found |= {f"{medium} {direction} R@1": float(np.mean(values)) for direction, values in r1.items()}
        task = f"{medium}_classification"
        metrics, _ = evaluate_labels(predictor, task, EvalSplit(root, "test"), EvalOptions())
        found[f"{medium} class"] = metrics["zero_shot"]
    return found


def main() -> None:
    for seed in SEEDS:
        for variant, (changes, kinds) in VARIANTS.items():
            if str(seed) in read()[1].get(variant, {}):
                continue
            predictor = train(changes, kinds, seed)
            parameters = [p for name, p in predictor.model.named_parameters() if name.split(".")[0] in USED]
            found = {"parameters": sum(p.numel() for p in parameters),
                     **{name: round(value, 4) for name, value in test(predictor).items()}}
            results, runs = read()
            runs.setdefault(variant, {})[str(seed)] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(variant, seed, found, flush=True)


def read() -> tuple[dict, dict]:
    """All that is in the file, and of that the runs of this program."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    ours = results.setdefault("contrastive, 100 steps", {"command": "python notebooks/ablations.py", "runs": {}})
    return results, ours["runs"]


if __name__ == "__main__":
    main()
