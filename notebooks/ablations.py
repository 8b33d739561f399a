"""Does modularity help? The runs that docs/modularity.md plans: each claim is an arm and its control, with five seeds,
and in a second round with more of them.

    python notebooks/ablations.py                 # the runs that are missing, about 3 minutes each on one core
    python notebooks/ablations.py few             # only the runs of one regime
    python notebooks/ablations.py --effects       # the tables of effects, from the runs that exist

A run calls train.py with settings of its own and, through the hook `train.main(arguments, model_class)`, with a model
of its own. Its results are added to notebooks/ablations.json, and runs that are in the file are skipped: the program
can be stopped at any time, and the same command makes the rest. Two programs may share the file, if each has its
regime. All runs of a file are of one version of the tiny world. Notebook 06 shows the results.
"""

import copy
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

import tiny_data
from mplug2.checkpoint import PreprocessConfig
from mplug2.config import ModelConfig
from mplug2.data.media_batches import Medium
from mplug2.data.records import Record, read_records
from mplug2.data.text import Tokenizer
from mplug2.did_you_mean import did_you_mean
from mplug2.evaluation.ranking import ranks
from mplug2.flags import parse
from mplug2.inference import repeat_to
from mplug2.model.mplug2 import MPLUG2, init_weights
from mplug2.model.patch_embed import PatchEmbed, patchify
from mplug2.model.universal import UniversalLayers
from mplug2.predictor import Predictor
from tiny_data.world import COLOR_NAMES, FRAMES
from tiny_data.writer import VERSION

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
PRETRAINED = Path(tiny_data.__file__).parent / "pretrained"  # only its vocabulary is used: the same for all runs
WORK = Path("runs/ablations")
SEEDS = range(5)  # of the first round
STEPS = 500
CAPTIONS = 4000  # that the classifier of claim 2 learns from
FEW = 200  # videos with captions and questions, in the regime "few"
MATTERS = 2.0  # the smallest effect that would matter, in points
STUDENT_T = {  # by number of seeds, two-sided
    95.0: {5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262},
    97.5: {6: 3.163, 7: 2.969, 8: 2.841, 9: 2.752, 10: 2.685},
}


# ---- arms and controls: the models ----------------------------------------------------------------------------------


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

    Six shared layers replace the vision encoder, the text encoder and the universal layers. Patches of all frames
    attend to each other; a learned position distinguishes the frames.
    """

    def __init__(self, config: ModelConfig, *args):
        super().__init__(config, *args)
        layers = ModelConfig(**{**vars(config), "text_layers": 6, "universal_layers": 6})
        self.text_encoder.layers = nn.ModuleList()
        self.universal = UniversalLayers(layers, for_vision=False, for_text=True)
        self.vision_encoder = PatchEmbed(config)
        self.frame_position = nn.Parameter(torch.zeros(FRAMES, 1, config.width))
        init_weights(self)
        nn.init.normal_(self.frame_position, std=self.vision_encoder.position.std().item())

    def layers_for_vision(self) -> UniversalLayers:
        return self.universal

    def encode_vision(self, pixels: Tensor) -> Tensor:
        embed, t = self.vision_encoder, pixels.shape[2]
        patches = embed.linear(patchify(pixels, embed.patch)) + embed.position[1:] + self.frame_position[:t]
        first = (embed.class_token + embed.position[0]).expand(len(pixels), 1, -1)
        tokens = embed.norm(torch.cat([first, rearrange(patches, "b t n d -> b (t n) d")], dim=1))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return self.layers_for_vision().text(tokens, mask)


class TwoStreams(OneStream):
    """One stream, but vision has its own copy of all layers: the same depth, operations and initial weights."""

    def __init__(self, *args):
        super().__init__(*args)
        self.vision_layers = copy.deepcopy(self.universal)

    def layers_for_vision(self) -> UniversalLayers:
        return self.vision_layers


ARMS: dict[str, type[MPLUG2]] = {
    "full": MPLUG2, "untied": Untied, "two vision encoders": TwoVisionEncoders, "one stream": OneStream,
    "two streams": TwoStreams,
}
PLANNED = ("--lr 4e-3 --questions-per-sample 2 --vtc-weight 2 --caption-weight 1 --answer-weight 1 --mlm-weight 1 "
           "--video-weight 0.65 --image-weight 0.3 --text-weight 0.05")
"""The defaults of train.py at the time of the plan."""
REGIMES = {  # flags of train.py
    "plenty": "",
    "few": "--video-weight 0.4 --image-weight 0.3 --text-weight 0.3",
    "at odds": "",
    "narrow": "--width 32 --vision-width 32 --vision-head-width 16 --ff-width 128",
}

# ---- claims: a signed sum of scores, and the tasks whose scores are averaged -----------------------------------------

VIDEO, IMAGE = ("video_caption", "video_qa", "video_retrieval"), ("image_caption", "image_qa", "image_retrieval")
COLOR = ("video_qa color", "image_qa color")
SPACE, PROJECTED = (tuple(f"transfer {kind} {of}" for of in ("video", "image")) for kind in ("space", "projected"))
Terms = dict[tuple[str, str], int]


def minus(regime: str, arm: str, control: str) -> Terms:
    return {(regime, arm): 1, (regime, control): -1}


CLAIMS: dict[str, tuple[Terms, tuple[str, ...]]] = {
    "1a": (minus("plenty", "full", "untied"), VIDEO + IMAGE),
    "1b": (minus("few", "full", "untied"), VIDEO),
    "1b - 1a": (minus("few", "full", "untied") | minus("plenty", "untied", "full"), VIDEO),
    "2a": (minus("plenty", "full", "untied"), PROJECTED),
    "2b": (minus("few", "full", "untied"), PROJECTED),
    "2c": (minus("plenty", "full", "untied"), SPACE),
    "3a": (minus("plenty", "two streams", "one stream"), VIDEO + IMAGE),
    "3b": (minus("narrow", "two streams", "one stream"), VIDEO + IMAGE),
    "3c": (minus("plenty", "full", "one stream"), VIDEO + IMAGE),
    "4a": (minus("few", "full", "two vision encoders"), VIDEO),
    "4b": (minus("at odds", "two vision encoders", "full"), VIDEO + IMAGE),
    "4b - plenty": (minus("at odds", "two vision encoders", "full") | minus("plenty", "full", "two vision encoders"),
                    VIDEO + IMAGE),
    "4c": (minus("at odds", "two vision encoders", "full"), COLOR),
}
FIRST_ROUND: dict[str, Sequence[int]] = dict.fromkeys(CLAIMS, SEEDS)

CLAIMS |= {
    "4b in plenty": (minus("plenty", "two vision encoders", "full"), VIDEO + IMAGE),
    "4b - plenty, images": (CLAIMS["4b - plenty"][0], IMAGE),
    "4b - plenty, videos": (CLAIMS["4b - plenty"][0], VIDEO),
}
PRIMARY_AGAIN = {"1b": range(5, 13), "4b - plenty": range(5, 15)}
SECOND_ROUND: dict[str, Sequence[int]] = PRIMARY_AGAIN | {
    "2b": range(5, 13), "4b": range(5, 15), "4b in plenty": range(5, 15), "4b - plenty, images": range(5, 15),
    "4b - plenty, videos": range(5, 15)}
FEWEST = 6  # new seeds for a verdict
RUNS = list(dict.fromkeys((*run, seed) for round_ in (FIRST_ROUND, SECOND_ROUND) for claim, seeds in round_.items()
                          for seed in seeds for run in CLAIMS[claim][0]))


# ---- one run --------------------------------------------------------------------------------------------------------


def run(regime: str, arm: str, seed: int, steps: int = STEPS) -> dict:
    """Train and test. Returns the metrics, and for each task and medium how many of its tests are right, of how many.
    """
    torch.set_num_threads(1)  # another number of threads gives other roundings
    models, name = [], f"{regime}-{arm}-{seed}".replace(" ", "_")
    root = {"few": few_videos, "at odds": other_colors}.get(regime, tiny_data.ensure)()
    shutil.rmtree(WORK / name, ignore_errors=True)
    metrics = train.main([
        "--data", str(root), "--tokenizer", str(PRETRAINED / "tokenizer.json"), "--max-steps", str(steps),
        "--seed", str(seed), "--eval-every", str(10 * steps), "--save-every", str(10 * steps),
        "--out", str(WORK), "--name", name, *PLANNED.split(), *REGIMES[regime].split(),
    ], lambda *args: models.append(ARMS[arm](*args)) or models[-1])
    if not metrics:
        raise SystemExit(f"{regime}, {arm}, seed {seed} was stopped, and starts from scratch next time")
    tokenizer = Tokenizer.load(PRETRAINED / "tokenizer.json")
    predictor = Predictor(models[0].eval(), tokenizer, PreprocessConfig(frames=FRAMES, max_words=30))
    lines = [json.loads(line) for line in (WORK / name / "predictions.jsonl").read_text().splitlines()]
    tests = written(lines, root) | retrieved(predictor, root) | transferred(predictor, root)
    return {
        "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
        "right": {task: pack(right) for task, (right, _) in tests.items()},
        "of": {task: pack(of) for task, (_, of) in tests.items()},
    }


def few_videos() -> Path:
    """The tiny world with all its images and sentences, but few videos."""
    return changed_world("few_videos", lambda name, lines: lines[:FEW] if re.match(r"video.*\.train", name) else lines)


def other_colors() -> Path:
    """The tiny world with the next color's word in all texts about images: "green" for a red digit, and so on."""
    after = dict(zip(COLOR_NAMES, COLOR_NAMES[1:] + COLOR_NAMES[:1]))
    words = re.compile(rf"\b({'|'.join(COLOR_NAMES)})\b")
    return changed_world("other_colors", lambda name, lines: [
        words.sub(lambda word: after[word[0]], line) for line in lines] if name.startswith("image") else lines)


def changed_world(name: str, change: Callable[[str, list[str]], list[str]]) -> Path:
    """A copy of the tiny world with other lines in its files. Images and videos are not copied."""
    world = tiny_data.ensure()
    root = WORK / f"{name}-{world.name}"
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "media").exists():
        (root / "media").symlink_to(world / "media")
    for file in world.glob("*.json*"):
        (root / file.name).write_text("".join(change(file.name, file.read_text().splitlines(keepends=True))))
    return root


# ---- tests: for each task, how many tests of each medium are right, and how many there are --------------------------

Tests = dict[str, tuple[list[int], list[int]]]


def written(lines: list[dict], root: Path) -> Tests:
    """Captions that equal a true one, and right answers: all, and those about colors. From predictions.jsonl."""
    tests: Tests = {}
    for task in "video_caption", "image_caption", "video_qa", "image_qa":
        records = read_records(root, task, "test")
        right = iter([bool(line["right"]) for line in lines if line["task"] == task])
        if task.endswith("caption"):
            tests[task] = [int(next(right)) for _ in records], [1 for _ in records]
            continue
        kinds = [[question.kind for question in record.qa] for record in records]
        answers = [[next(right) for _ in of_record] for of_record in kinds]
        tests[task] = list(map(sum, answers)), list(map(len, answers))
        tests[f"{task} color"] = (
            [sum(yes for yes, kind in zip(*both) if kind == "color") for both in zip(answers, kinds)],
            [of_record.count("color") for of_record in kinds])
    return tests


def retrieved(predictor: Predictor, root: Path) -> Tests:
    """Whether a medium finds its text among 100, and its text finds the medium, by cosine."""
    tests: Tests = {}
    for task in "video_retrieval", "image_retrieval":
        records = read_records(root, task, "test")
        hits = np.zeros(len(records), int)
        for gallery in {record.gallery for record in records}:
            own = [number for number, record in enumerate(records) if record.gallery == gallery]
            media = [Medium.of_record(records[number]) for number in own]
            cosines = predictor.similarity(media, [records[number].captions[0] for number in own]).cpu().numpy()
            ids = np.array([records[number].positive_id for number in own])
            for similarity in cosines, cosines.T:
                hits[own] += ranks(similarity, ids[:, None] == ids[None, :]) == 1
        tests[task] = hits.tolist(), [2] * len(records)
    return tests


def transferred(predictor: Predictor, root: Path) -> Tests:
    """Digit and color of test media, from a linear classifier that has only seen texts; see docs/modularity.md.

    It is a ridge regression from training captions to digit and color (both one-hot). Texts and vision are each
    standardized by their own mean and deviation, which needs no labels.
    """
    model, tests, first = predictor.model, {}, lambda hidden, _: hidden[:, 0]
    readouts = {  # class tokens of texts and vision after the universal layers, or their unit vectors for VTC
        "space": (first, lambda vision: vision[:, 0]),
        "projected": (lambda hidden, _: model.project_text(hidden), model.project_vision),
    }
    for modality in "video", "image":
        captioned, records = (
            [record for record in read_records(root, f"{modality}_caption", split) if named(record)]
            for split in ("train", "test"))
        texts = [(caption, named(record)) for record in captioned for caption in record.captions][:CAPTIONS]
        labels, truths = torch.tensor([label for _, label in texts]), torch.tensor([named(one) for one in records])
        for name, (of_text, of_vision) in readouts.items():
            x = standardize(torch.stack(predictor.on_texts([text for text, _ in texts], of_text)).cpu())
            y = standardize(torch.stack(predictor.on_media(
                [Medium.of_record(record) for record in records],
                lambda vision, _, indices, read=of_vision: repeat_to(read(vision), len(indices)))).cpu())
            right = torch.zeros(len(records), dtype=torch.int64)
            for column, size in enumerate((10, len(COLOR_NAMES))):
                targets = nn.functional.one_hot(labels[:, column], size).float()
                weights = torch.linalg.solve(x.T @ x + len(x) * torch.eye(x.shape[1]), x.T @ targets)
                right += (y @ weights).argmax(dim=1) == truths[:, column]
            tests[f"transfer {name} {modality}"] = right.tolist(), [2] * len(records)
    return tests


def named(record: Record) -> tuple[int, int] | None:
    """Digit and color of a record about a single digit: its `positive_id` is such as "red 7 left"."""
    words = record.positive_id.split()
    return None if set(words) & {"+", ">"} else (int(words[1]), COLOR_NAMES.index(words[0]))


def standardize(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) / x.std(dim=0)


def pack(counts: Sequence[int]) -> str:
    """Counts below 8 as "length:hexadecimal number"."""
    return f"{len(counts)}:{int('0' + ''.join(map(str, counts)), 8):x}"


def unpack(packed: str) -> np.ndarray:
    length, number = packed.split(":")
    return np.array(list(f"{int(number, 16):o}".zfill(int(length))), float)


# ---- effects --------------------------------------------------------------------------------------------------------


def effect(
    claim: str, results: dict, seeds: Sequence[int] = SEEDS, confidence: float = 95.0, draws: int = 2000
) -> dict:
    """The effect of a claim, in points (percent): its mean over seeds, an interval from a bootstrap over seeds and test
    media, one from Student's t over the seeds, the effect of each seed, and the mean score of each term."""
    (terms, tasks), runs = CLAIMS[claim], results["runs"]
    right = {term: {task: np.stack([unpack(runs[", ".join(term)][str(seed)]["right"][task]) for seed in seeds])
                    for task in tasks} for term in terms}
    of = {task: unpack(results["of"][task]) for task in tasks}
    signed = {task: 100 * sum(sign * right[term][task] for term, sign in terms.items()) for task in tasks}
    by_seed = np.mean([signed[task].sum(axis=1) / of[task].sum() for task in tasks], axis=0)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(draws):
        rows, ratios = rng.integers(len(seeds), size=len(seeds)), []
        for task in tasks:
            media = rng.integers(len(of[task]), size=len(of[task]))
            ratios.append(signed[task][rows][:, media].sum(axis=1).mean() / of[task][media].sum())
        drawn.append(np.mean(ratios))
    mean, half = by_seed.mean(), STUDENT_T[confidence][len(seeds)] * by_seed.std(ddof=1) / len(seeds) ** 0.5
    scores = {", ".join(term): 100 * float(np.mean([right[term][task].sum() / len(seeds) / of[task].sum()
                                                    for task in tasks])) for term in terms}
    tail = (100 - confidence) / 2
    return {"effect": mean, "bootstrap": np.percentile(drawn, [tail, 100 - tail]), "by_seed": by_seed,
            "student": (mean - half, mean + half), "scores": scores}


def verdict(found: dict, second_round: bool = False) -> str:
    """What an effect says, by the rule of the plan: both intervals have to agree. The second round also has a verdict
    for one end."""
    low = min(found["bootstrap"][0], found["student"][0])
    high = max(found["bootstrap"][1], found["student"][1])
    if low > 0 or high < 0:
        matters = low >= MATTERS or high <= -MATTERS
        return ("above 0" if low > 0 else "below 0") + (", and it matters" if matters else ", size undecided")
    if -MATTERS < low and high < MATTERS:
        return "no effect that matters"
    if second_round and (high < MATTERS or low > -MATTERS):
        return f"no {'gain' if high < MATTERS else 'loss'} that matters"
    return "undecided"


def complete(claim: str, results: dict, seeds: Sequence[int]) -> list[int]:
    """The seeds for which all models of a claim are there."""
    return [seed for seed in seeds
            if all(str(seed) in results["runs"].get(", ".join(term), {}) for term in CLAIMS[claim][0])]


def intervals(found: dict) -> str:
    return " | ".join(f"{low:+.1f} to {high:+.1f}" for low, high in (found["bootstrap"], found["student"]))


def table(results: dict) -> str:
    """The effects of the first round, as a table in Markdown. A claim is left open until all of its runs are there."""
    lines = ["| claim | scores | effect | 95 %, bootstrap | 95 %, Student's t | verdict |", "|" + "---|" * 6]
    for claim, seeds in FIRST_ROUND.items():
        missing = sum(str(seed) not in results["runs"].get(", ".join(term), {})
                      for term in CLAIMS[claim][0] for seed in seeds)
        if missing:
            lines.append(f"| {claim} | | | | | {missing} runs are missing |")
            continue
        found = effect(claim, results)
        scores = "; ".join(f"{name} {value:.1f}" for name, value in found["scores"].items())
        lines.append(f"| {claim} | {scores} | {found['effect']:+.1f} | {intervals(found)} | {verdict(found)} |")
    return "\n".join(lines)


def second_table(results: dict) -> str:
    """The effects of the new seeds, and the mean of all seeds. A claim is left open with fewer than `FEWEST` of them.
    """
    lines = ["| effect | new seeds | mean | 95 %, bootstrap | 95 %, Student's t | verdict | at 97.5 % | mean of all |",
             "|" + "---|" * 8]
    for claim, planned in SECOND_ROUND.items():
        seeds = complete(claim, results, planned)
        if len(seeds) < FEWEST:
            lines.append(f"| {claim} | {len(seeds)} | | | | at least {FEWEST} are needed | | |")
            continue
        found = effect(claim, results, seeds)
        by_seed = np.concatenate([effect(claim, results)["by_seed"], found["by_seed"]])
        stricter = verdict(effect(claim, results, seeds, 97.5), True) if claim in PRIMARY_AGAIN else ""
        lines.append(f"| {claim} | {len(seeds)} | {found['effect']:+.1f} | {intervals(found)} | "
                     f"{verdict(found, True)} | {stricter} | {by_seed.mean():+.1f} ({len(by_seed)}) |")
    return "\n".join(lines)


@dataclass(frozen=True)
class AblationSettings:
    regime: str = field(default="", metadata={"positional": True, "known": tuple(REGIMES)})
    """Make only the missing runs of this regime."""
    effects: bool = False
    """Make no runs; print the tables of effects, from the runs that exist."""

    def __post_init__(self):
        if self.regime and self.regime not in REGIMES:
            raise ValueError(f"regime={self.regime!r}{did_you_mean(self.regime, REGIMES)}: expected one of "
                             f"{', '.join(REGIMES)}")


def main(arguments: list[str] | None = None) -> None:
    """Make the missing runs, or print the effects."""
    settings, results = parse(AblationSettings, __doc__, "python notebooks/ablations.py", arguments), read()
    if settings.effects:
        print(table(results), second_table(results), sep="\n\n")
        return
    if results["world"] != VERSION:
        raise SystemExit(f"{RESULTS}: these runs were made with version {results['world']} of the tiny world, and "
                         f"this is version {VERSION}; move the file away to start over")
    missing = [(regime, arm, seed) for regime, arm, seed in RUNS
               if str(seed) not in results["runs"].get(f"{regime}, {arm}", {})
               and settings.regime in ("", regime)]
    for done, (regime, arm, seed) in enumerate(missing):
        start = time.time()
        found = run(regime, arm, seed)
        minutes = (time.time() - start) / 60
        results = read()  # another process may have written to it
        results["of"] = found.pop("of")
        results["runs"].setdefault(f"{regime}, {arm}", {})[str(seed)] = {**found, "minutes": round(minutes, 1)}
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(RESULTS)  # a program that is killed while it writes loses no run
        left = len(missing) - done - 1
        print(f"{regime}, {arm}, seed {seed}: {minutes:.1f} minutes; {left} runs are left, about {left * minutes:.0f} "
              "minutes", flush=True)


def read() -> dict:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {"command": "python notebooks/ablations.py", "world": VERSION, "runs": {}} | results


if __name__ == "__main__":
    main()
