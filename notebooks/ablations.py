"""Does modularity help? The runs that docs/modularity.md plans: every claim is an arm and its control, with five seeds.

    python notebooks/ablations.py                 # what is missing, about 2 minutes a run on one core
    python notebooks/ablations.py few             # only the runs of one regime
    python notebooks/ablations.py --effects       # the table of effects, from the runs that exist

A run calls train.py with settings of its own and, through the hook `train.main(arguments, model_class)`, with a model
of its own. Its results are added to notebooks/ablations.json; runs that are in the file are skipped, so the program can
be stopped at any time and goes on where it was. Notebook 06 shows the results.
"""

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # another number of threads gives other roundings

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

import tiny_data
from mplug2.checkpoint import PreprocessConfig
from mplug2.config import ModelConfig
from mplug2.data.media_batches import Medium
from mplug2.data.records import read_records
from mplug2.data.text import Tokenizer
from mplug2.model.mplug2 import MPLUG2, init_weights
from mplug2.model.patch_embed import PatchEmbed
from mplug2.model.universal import UniversalLayers
from mplug2.predictor import Predictor
from tiny_data.world import COLOR_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
PRETRAINED = Path(tiny_data.__file__).parent / "pretrained"  # only its vocabulary is used: the same for all runs
WORK = Path("runs/ablations")
SEEDS = (0, 1, 2, 3, 4)
STEPS = 500
MATTERS = 2.0  # the smallest effect that would matter, in points
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # by number of seeds, two-sided 95 %
FEW = 200  # videos with captions and questions, in the regime "few"
VIDEO, IMAGE = ("video_caption", "video_qa", "video_retrieval"), ("image_caption", "image_qa", "image_retrieval")


# ---- arms: models that differ from MPLUG2 in one respect ------------------------------------------------------------


class Split(nn.Module):
    """Two modules in the place of one: `vision` of the first, `text` of the second."""

    def __init__(self, for_vision: nn.Module, for_text: nn.Module):
        super().__init__()
        self.for_vision, self.for_text = for_vision, for_text

    def vision(self, tokens: Tensor) -> Tensor:
        return self.for_vision.vision(tokens)

    def text(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.for_text.text(x, mask)


class Untied(MPLUG2):
    """Vision has its own copy of the universal layers: the same depth, operations and initial weights, not shared."""

    def __init__(self, *args):
        super().__init__(*args)
        self.universal = Split(copy.deepcopy(self.universal), self.universal)


class TwoVisionEncoders(MPLUG2):
    """Images have a vision encoder of their own: the same operations and initial weights, not shared with videos."""

    def __init__(self, *args):
        super().__init__(*args)
        self.image_encoder = copy.deepcopy(self.vision_encoder)

    def encode_vision(self, pixels: Tensor) -> Tensor:
        encoder = self.image_encoder if pixels.shape[2] == 1 else self.vision_encoder
        return self.universal.vision(encoder(pixels))


class OneStream(MPLUG2):
    """A single network for all modalities: after its embedding, vision passes through the same layers as text.

    Eight shared layers replace the vision encoder, the text encoder and the universal layers, with about as many
    parameters. Patches of all frames attend to each other; a learned position tells the frames apart.
    """

    def __init__(self, config: ModelConfig, *args):
        super().__init__(config, *args)
        layers = ModelConfig(**{**vars(config), "text_layers": 8, "universal_layers": 8})
        self.text_encoder.layers = nn.ModuleList()
        self.universal = UniversalLayers(layers, for_vision=False, for_text=True)
        self.vision_encoder = PatchEmbed(config)
        self.frame_position = nn.Parameter(torch.zeros(tiny_data.world.FRAMES, config.width))
        init_weights(self)
        nn.init.normal_(self.frame_position, std=self.vision_encoder.position.std().item())

    def encode_vision(self, pixels: Tensor) -> Tensor:
        x = self.vision_encoder(pixels)
        t = x.shape[1]
        patches = rearrange(x[:, :, 1:] + self.frame_position[:t, None], "b t n d -> b (t n) d")
        tokens = torch.cat([x[:, 0, :1], patches], dim=1)
        return self.universal.text(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))


class AtOdds:
    """Images and videos contradict each other: red, green and blue of an image change places, its texts do not. What
    is called green in a video is called red in an image."""

    def encode_vision(self, pixels: Tensor) -> Tensor:
        return super().encode_vision(pixels.roll(1, dims=1) if pixels.shape[2] == 1 else pixels)


ARMS: dict[str, tuple[type[MPLUG2], list[str]]] = {
    "full": (MPLUG2, []),
    "untied": (Untied, []),
    "one stream": (OneStream, []),
    "two vision encoders": (TwoVisionEncoders, []),
    "temporal modules for videos only": (MPLUG2, ["--no-temporal-on-images"]),
    "without images": (MPLUG2, ["--video-weight", "0.95", "--image-weight", "0"]),
}
NARROW = "--width 32 --vision-width 32 --vision-head-width 16 --ff-width 128".split()
REGIMES: dict[str, list[str]] = {"plenty": [], "few": [], "at odds": [], "narrow": NARROW}

# Claim -> regime, arm, control, and what is measured: the tasks whose scores are averaged, or the transfer of labels.
CLAIMS = {
    "1a sharing universal layers, plenty": ("plenty", "full", "untied", VIDEO + IMAGE),
    "1b sharing universal layers, few videos": ("few", "full", "untied", VIDEO),
    "2 labels of texts transfer to vision": ("plenty", "full", "untied", ("transfer",)),
    "3a modules of their own, plenty": ("plenty", "full", "one stream", VIDEO + IMAGE),
    "3b modules of their own, narrow model": ("narrow", "full", "one stream", VIDEO + IMAGE),
    "4a one vision encoder, few videos": ("few", "full", "two vision encoders", VIDEO),
    "4b one vision encoder, at odds": ("at odds", "full", "two vision encoders", VIDEO + IMAGE),
    "5 images around temporal modules, at odds": ("at odds", "temporal modules for videos only", "full", IMAGE),
    "6 images help videos, few videos": ("few", "full", "without images", VIDEO),
}
RUNS = list(dict.fromkeys((regime, arm) for regime, *arms, _ in CLAIMS.values() for arm in arms))


# ---- one run --------------------------------------------------------------------------------------------------------


def run(regime: str, arm: str, seed: int, steps: int = STEPS) -> dict:
    """Train and test. Returns the metrics, and per task which records are right (a bit each, as a hexadecimal number).
    """
    model_class, models, name = model_of(arm, regime), [], f"{regime}-{arm}-{seed}".replace(" ", "_")
    root = few_videos() if regime == "few" else tiny_data.ensure()
    shutil.rmtree(WORK / name, ignore_errors=True)
    metrics = train.main([
        "--data", str(root), "--tokenizer", str(PRETRAINED / "tokenizer.json"), "--max-steps", str(steps),
        "--seed", str(seed), "--eval-every", str(10 * steps), "--save-every", str(10 * steps),
        "--out", str(WORK), "--name", name, *ARMS[arm][1], *REGIMES[regime],
    ], lambda *args: models.append(model_class(*args)) or models[-1])
    right: dict[str, str] = {}
    for line in (WORK / name / "predictions.jsonl").read_text().splitlines():
        prediction = json.loads(line)
        right[prediction["task"]] = right.get(prediction["task"], "") + str(int(prediction["right"]))
    right |= transfer(models[0].eval())
    return {
        "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
        "right": {task: pack(bits) for task, bits in right.items()},
    }


def model_of(arm: str, regime: str) -> type[MPLUG2]:
    model_class = ARMS[arm][0]
    return type(model_class.__name__, (AtOdds, model_class), {}) if regime == "at odds" else model_class


def few_videos() -> Path:
    """The tiny world with all its images and sentences, but few videos."""
    world, root = tiny_data.ensure(), WORK / "few_videos"
    root.mkdir(parents=True, exist_ok=True)
    for file in world.iterdir():
        copied = root / file.name
        if file.is_dir():
            copied.exists() or copied.symlink_to(file)
        elif file.name.startswith("video") and ".train." in file.name:
            copied.write_text("".join(file.read_text().splitlines(keepends=True)[:FEW]))
        else:
            shutil.copy(file, copied)
    return root


def transfer(model: MPLUG2) -> dict[str, str]:
    """Classify videos and images with a linear classifier that has only seen texts: in the space after the universal
    layers, without any label of vision. Which records are right, by modality and label.

    The classifier is a ridge regression from the class tokens of training captions to digit and color, both one-hot.
    Texts and vision are each standardized by their own mean and deviation, which needs no labels.
    """
    tokenizer, root = Tokenizer.load(PRETRAINED / "tokenizer.json"), tiny_data.ensure()
    predictor = Predictor(model, tokenizer, PreprocessConfig(frames=4, max_words=30))
    captions = [record for record in read_records(root, "video_caption", "train")[:4000] if named(record)]
    texts = predictor.on_texts([record.captions[0] for record in captions], lambda text, _: text[:, 0])
    x = standardize(torch.stack(texts))
    labels, found = torch.tensor([named(record) for record in captions]), {}
    weights = [torch.linalg.solve(x.T @ x + len(x) * 0.01 * torch.eye(x.shape[1]), x.T @ nn.functional.one_hot(
        labels[:, column], size).float()) for column, size in enumerate((10, len(COLOR_NAMES)))]
    for modality in "video", "image":
        records = [record for record in read_records(root, f"{modality}_caption", "test") if named(record)]
        vision = predictor.encode_media([Medium.of_record(record) for record in records])
        y = standardize(torch.stack([tokens[0] for tokens in vision]).float())
        for column, name in enumerate(("digit", "color")):
            truth = torch.tensor([named(record)[column] for record in records])
            bits = ((y @ weights[column]).argmax(dim=1) == truth).int().tolist()
            found[f"transfer {modality} {name}"] = "".join(map(str, bits))
    return found


def named(record) -> tuple[int, int] | None:
    """Digit and color of a record about a single digit: its `positive_id` is such as "red 7 left"."""
    words = record.positive_id.split()
    return None if set(words) & {"+", ">"} else (int(words[1]), COLOR_NAMES.index(words[0]))


def standardize(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) / x.std(dim=0)


def pack(bits: str) -> str:
    return f"{len(bits)}:{int(bits, 2):x}"


def unpack(packed: str) -> np.ndarray:
    length, number = packed.split(":")
    return np.array(list(f"{int(number, 16):0{length}b}"), float)


# ---- effects --------------------------------------------------------------------------------------------------------


def effect(claim: str, runs: dict, draws: int = 10_000) -> dict:
    """Arm minus control of a claim, in points (percent): the mean of the paired differences, a 95 % interval from a
    bootstrap over seeds and test records, one from Student's t over the seeds, and the difference of each seed."""
    regime, arm, control, tasks = CLAIMS[claim]
    of_arm, of_control = (runs[f"{regime}, {name}"] for name in (arm, control))
    seeds = [seed for seed in of_arm if seed in of_control]
    if tasks == ("transfer",):
        tasks = [task for task in of_arm[seeds[0]]["right"] if task.startswith("transfer")]
    differences = [  # by task: seed x record
        100 * np.stack([unpack(of_arm[seed]["right"][task]) - unpack(of_control[seed]["right"][task])
                        for seed in seeds]) for task in tasks]
    rng, drawn = np.random.default_rng(0), np.zeros(draws)
    for draw in range(draws):
        chosen = rng.integers(len(seeds), size=len(seeds))
        drawn[draw] = np.mean([of_task[chosen][:, rng.integers(of_task.shape[1], size=of_task.shape[1])].mean()
                               for of_task in differences])
    by_seed = np.mean([of_task.mean(axis=1) for of_task in differences], axis=0)
    half = STUDENT_T[len(seeds)] * by_seed.std(ddof=1) / len(seeds) ** 0.5
    mean = by_seed.mean()
    return {"effect": mean, "bootstrap": np.percentile(drawn, [2.5, 97.5]), "student": (mean - half, mean + half),
            "by_seed": by_seed, "arm": level(of_arm, tasks), "control": level(of_control, tasks)}


def level(of_arm: dict, tasks: Sequence[str]) -> float:
    """The mean score over seeds and tasks, in percent."""
    return 100 * float(np.mean([unpack(found["right"][task]).mean() for found in of_arm.values() for task in tasks]))


def main(arguments: list[str]) -> None:
    """Make the missing runs, of all regimes or of those named, or print the effects."""
    results = read()
    if arguments == ["--effects"]:
        print(table(results["runs"]))
        return
    if unknown := set(arguments) - set(REGIMES):
        raise SystemExit(f"unknown: {', '.join(unknown)}; expected regimes ({', '.join(REGIMES)}) or --effects")
    missing = [(regime, arm, seed) for seed in SEEDS for regime, arm in RUNS
               if str(seed) not in results["runs"].get(f"{regime}, {arm}", {})
               and (not arguments or regime in arguments)]
    for done, (regime, arm, seed) in enumerate(missing):
        start = time.time()
        found = run(regime, arm, seed)
        minutes = (time.time() - start) / 60
        results = read()  # another process may have written to it
        results["runs"].setdefault(f"{regime}, {arm}", {})[str(seed)] = {**found, "minutes": round(minutes, 1)}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        left = len(missing) - done - 1
        print(f"{regime}, {arm}, seed {seed}: {minutes:.1f} minutes; {left} runs are left, about {left * minutes:.0f} "
              "minutes", flush=True)


def read() -> dict:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {"command": "python notebooks/ablations.py", "runs": {}} | results


def table(runs: dict) -> str:
    """The effects of all claims whose runs are complete, as a table in Markdown."""
    lines = ["| claim | arm | control | effect | 95 %, bootstrap | 95 %, Student's t | verdict |", "|" + "---|" * 7]
    for claim, (regime, arm, control, _) in CLAIMS.items():
        counts = [len(runs.get(f"{regime}, {name}", {})) for name in (arm, control)]
        if min(counts) < 2:
            lines.append(f"| {claim} | | | {counts} runs | | | |")
            continue
        found = effect(claim, runs)
        cells = [f"{arm} {found['arm']:.1f}", f"{control} {found['control']:.1f}", f"{found['effect']:+.1f}"]
        cells += [f"{low:+.1f} to {high:+.1f}" for low, high in (found["bootstrap"], found["student"])]
        lines.append(f"| {claim} | " + " | ".join(cells) + f" | {verdict(found)} |")
    return "\n".join(lines)


def verdict(found: dict) -> str:
    """What an effect says, by the rule of the plan: both intervals have to agree."""
    low = min(found["bootstrap"][0], found["student"][0])
    high = max(found["bootstrap"][1], found["student"][1])
    if low > 0 or high < 0:
        size = "" if abs(found["effect"]) >= MATTERS else ", but smaller than what matters"
        return ("helps" if low > 0 else "hurts") + size
    return "no effect that matters" if -MATTERS < low and high < MATTERS else "undecided"


if __name__ == "__main__":
    main(sys.argv[1:])
