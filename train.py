"""Train mPLUG-2. By default: pre-training of the tiny preset on the tiny world, in minutes, on a laptop's CPU.

    torchrun train.py                                  # or: python train.py
    torchrun train.py --max-steps 20                   # a smoke run, within a minute
    torchrun --nproc-per-node 8 train.py --preset base --data DIR --name web
    torchrun train.py --resume                         # go on where runs/tiny/last stopped

It writes runs/tiny/: settings.json, metrics.jsonl, curves.png and checkpoints, of which `last` is the newest. Then

    python eval.py --checkpoint runs/tiny/last

prints what was learned. All flags: python train.py --help
"""

import dataclasses
import difflib
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import tiny_data
from mplug2 import distributed, optim
from mplug2.checkpoint import Preparation, load_model, load_training, read_config, save_checkpoint
from mplug2.config import PRESETS, ModelConfig
from mplug2.data.loader import (
    INSTRUCTIONS,
    KIND,
    KINDS,
    PROMPTS,
    Collate,
    MixedBatches,
    Samples,
    check_texts,
    make_loader,
    read_classes,
    read_samples,
)
from mplug2.data.records import available
from mplug2.data.transforms import Augmentation
from mplug2.evaluation import evaluate, table
from mplug2.flags import Parser
from mplug2.inference import Predictor
from mplug2.model import MPLUG2, TASKS, checkpoint_activations, compile_model, split_tasks
from mplug2.momentum import Momentum
from mplug2.objectives import Objectives
from mplug2.plots import curves
from mplug2.recipes import RECIPES
from mplug2.self_critical import SelfCritical
from mplug2.tokenizer import Tokenizer, clean


@dataclass(frozen=True)
class TrainConfig:
    recipe: str = ""
    """The settings of a public task, such as msrvtt_caption (mplug2/recipes.py lists them); other flags win over it."""
    task: str = "pretrain"
    """What to train: pretrain, text_classification, text_pair_classification, image_classification,
    video_classification, image_retrieval, video_retrieval, image_caption, video_caption, image_qa, video_qa,
    visual_entailment, image_pair_reasoning, grounding; or several of them, separated by commas."""
    task_weights: str = ""
    """Shares of the steps of several tasks, numbers in their order, separated by commas; without it equal ones."""
    preset: str = "tiny"
    """Size of the model: tiny, base, large; single settings of the model can be changed by the flags below."""
    data: str = ""
    """Folder with <task>.<split>.jsonl files; without it the tiny world, written to a cache when first used."""
    init: str = ""
    """Checkpoint folder to start from: its weights, model settings and tokenizer."""
    tokenizer: str = ""
    """A vocab.txt or tokenizer.json of BERT; without it a small vocabulary is trained on the training texts."""
    out: str = "runs"
    """Folder of all runs."""
    name: str = ""
    """Name of this run, a folder in `out`; without it the name of the preset."""
    resume: bool = False
    """Go on from the newest checkpoint of this run, with its settings."""
    max_steps: int = 1500
    """Training steps; the learning rate falls over them."""
    epochs: float = 0.0
    """In place of max_steps: how often each caption, question or labelled sample is seen; 0: max_steps says."""
    batch_size: int = 32
    """Samples a step, over all processes together."""
    frames: int = 4
    """Frames taken of each clip."""
    augment: Literal["none", "finetune", "pretrain"] = "none"
    """Crops and RandAugment: of half of the area or more (finetune), or as in pre-training on web data."""
    flip: bool = False
    """With --augment: turn half of the samples over; not where texts or classes tell left from right."""
    questions: int = 2
    """Questions asked about each sample in a step."""
    max_words: int = 30
    """Words after which a text is cut."""
    video_weight: float = 0.65
    """Share of the steps that are of clips, in proportion to the other two."""
    image_weight: float = 0.3
    """Share of the steps that are of pictures."""
    text_weight: float = 0.05
    """Share of the steps that are of text only."""
    vtc_weight: float = 2.0
    """Weight of the contrastive loss."""
    vtm_weight: float = 1.0
    """Weight of the matching loss."""
    mlm_weight: float = 1.0
    """Weight of the masked language modelling loss."""
    caption_weight: float = 1.0
    """Weight of the captioning loss."""
    answer_weight: float = 1.0
    """Weight of the loss on answers to questions and instructions."""
    distil: float = 0.0
    """Weight of the soft targets of a momentum copy of the model, for answers and VTC (ALBEF, mPLUG: 0.4), reached over
    the first epoch. 0: no copy."""
    momentum: float = 0.995
    """What the momentum copy keeps of itself at each step."""
    queue: int = 0
    """Vectors of each side that VTC keeps as further negatives, with --distil; 0: VTC has no momentum copy."""
    self_critical: bool = False
    """Train captions by their CIDEr-D (self-critical sequence training): to refine a captioner, by --init."""
    freeze: str = ""
    """Modules that are not trained, separated by commas, such as vision_encoder,text_encoder."""
    layer_decay: float = 1.0
    """Learning rate of each layer of an encoder, as a share of that of the layer above."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices, AdamW for the rest (learns the tiny world in half the steps); adamw: AdamW only."""
    lr: float = 4e-3
    """Highest learning rate."""
    vision_lr: float = 0.0
    """Highest learning rate of the vision encoder; 0: the same as `lr`."""
    min_lr: float = 0.01
    """Share of the learning rates that is left at the end."""
    warmup: float = 0.05
    """Share of the steps over which the learning rates rise."""
    weight_decay: float = 0.05
    """AdamW's weight decay, on matrices only."""
    beta2: float = 0.98
    """AdamW's second beta."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward passes under autocast."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer and compute the rest again in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the model (torch.compile); the first steps take minutes."""
    device: str = "auto"
    """cpu, cuda, mps; auto: cuda where there is one."""
    workers: int = 0
    """Processes that decode media, for each training process; 0: the training process itself."""
    seed: int = 0
    """Seed of everything random."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 375
    """Steps between two validations."""
    eval_limit: int = 120
    """Records of each kind in a validation on the way; the table at the end takes all."""
    save_every: int = 375
    """Steps between two checkpoints; there is always one at the end."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    max_skipped: float = 0.02
    """Share of media files that may fail to decode before the run stops."""

    def __post_init__(self):
        tasks = split_tasks(self.task)
        if self.task_weights and len(self.shares()) != len(tasks):
            raise ValueError(f"task_weights={self.task_weights!r}: expected a number for each of {self.task}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        for name in ("max_steps", "batch_size", "frames", "max_words", "log_every", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for field in dataclasses.fields(self):
            if field.type in (int, float) and getattr(self, field.name) < 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: expected no negative number")
        if self.max_skipped > 1 or self.warmup > 1 or self.min_lr > 1 or self.distil > 1 or self.layer_decay > 1:
            raise ValueError("max_skipped, warmup, min_lr, distil and layer_decay are shares: expected at most 1")
        if self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum}: expected less than 1, else the copy never follows the model")
        if self.queue and not self.distil:
            raise ValueError(f"queue={self.queue}: the queue belongs to a momentum copy, ask for that by --distil 0.4")
        if self.queue and not any(TASKS[task].contrastive for task in tasks):
            raise ValueError(f"queue={self.queue}: {self.task} has no VTC that would use it")
        if self.distil and not self.queue and not any(TASKS[task].fusion and TASKS[task].decoder for task in tasks):
            raise ValueError(f"distil={self.distil}: {self.task} has no answers to distil, and no --queue for VTC")
        if self.self_critical and not any("prompted" in kind.parts for task in tasks for kind in KINDS[task].values()):
            raise ValueError(f"self_critical: {self.task} writes no captions")
        if self.augment != "none" and "grounding" in tasks:
            raise ValueError(f"augment={self.augment!r}: crops and moves would leave the boxes of grounding behind")
        if self.flip and self.augment == "none":
            raise ValueError("flip is a part of augmentation: add --augment finetune")
        if not sum(self.kind_weights().values()):
            raise ValueError("the weights of all kinds of batches are 0: there is nothing to train on; "
                             "see task_weights, video_weight, image_weight and text_weight")
        if Path(self.run_name).name != self.run_name:
            raise ValueError(f"name={self.name!r}: expected a folder name without slashes; --out is the one above")

    @property
    def run_name(self) -> str:
        return self.name or self.recipe or self.preset

    def shares(self) -> list[float]:
        try:
            shares = [float(number) for number in self.task_weights.split(",")]
        except ValueError as error:
            raise ValueError(f"task_weights={self.task_weights!r}: expected numbers, separated by commas") from error
        if any(share < 0 for share in shares):
            raise ValueError(f"task_weights={self.task_weights!r}: expected no negative number")
        return shares

    def kind_weights(self) -> dict[str, float]:
        """Shares of the steps, by kind of batch: a task's share, in pre-training divided among its three kinds."""
        tasks = split_tasks(self.task)
        weights = dict(zip(tasks, self.shares() if self.task_weights else [1.0] * len(tasks)))
        media = {"video": self.video_weight, "image": self.image_weight, "text": self.text_weight}
        return {
            name: weights[task] * (media[kind.medium] / (sum(media.values()) or 1) if task == "pretrain" else 1.0)
            for task in tasks for name, kind in KINDS[task].items()
        }


FINE_TUNING = {
    "text_classification": dict(max_steps=60), "text_pair_classification": dict(max_steps=400),
    "image_classification": dict(max_steps=200), "video_classification": dict(max_steps=200),
    "image_retrieval": dict(max_steps=200), "video_retrieval": dict(max_steps=200),
    "image_caption": dict(max_steps=200), "video_caption": dict(max_steps=200),
    "image_qa": dict(max_steps=200), "video_qa": dict(max_steps=200),
    "visual_entailment": dict(max_steps=400), "image_pair_reasoning": dict(max_steps=400),
    "grounding": dict(max_steps=300),
}
"""Defaults of single tasks, where they differ from those above: a minute or two each on the tiny world."""

MAY_CHANGE = ("resume", "max_steps", "out", "name", "device", "workers", "log_every", "eval_every", "eval_limit",
              "save_every", "keep", "max_skipped")
"""Settings that a resumed run may be given anew; any other is refused."""


def main(arguments: list[str] | None = None) -> dict[str, float]:
    # ---- settings: all of them known, and refused if they do not fit, before any work starts
    parser = Parser(__doc__)
    parser.add(TrainConfig, "training")
    parser.add(ModelConfig, "model", defaults="default: the preset's, or that of --init")
    given = parser.read(arguments)
    try:
        config, changes = resolve(given["TrainConfig"], given["ModelConfig"])
        process = distributed.start(config.device)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    try:
        return run(config, changes, process)
    except (ValueError, FileNotFoundError) as error:
        print(f"\ntrain.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        distributed.stop()


def resolve(given: dict, changes: dict) -> tuple[TrainConfig, dict]:
    """The settings of this run and the changed settings of its model; those of the run itself if it is resumed."""
    defaults = {} if "recipe" in given else FINE_TUNING.get(given.get("task", ""), {})
    config = TrainConfig(**{**defaults, **with_recipe(given)})
    folder = Path(config.out) / config.run_name
    saved_file = folder / "settings.json"
    if config.resume:
        if not (folder / "last").exists():
            raise FileNotFoundError(f"{folder} has no checkpoint to resume from; start it without --resume")
        saved = json.loads(saved_file.read_text())
        refused = [name for name in given if name not in MAY_CHANGE and given[name] != saved["train"][name]]
        refused += [name for name in changes if changes[name] != saved["model"][name]]
        if refused:
            raise ValueError(f"{', '.join(refused)}: a resumed run keeps its settings ({saved_file}); leave them out, "
                             "or start another run with --init and --name")
        kept = {name: value for name, value in given.items() if name in MAY_CHANGE}
        return TrainConfig(**{**saved["train"], **kept}), {}
    if saved_file.exists():
        raise ValueError(f"{folder} holds a run already; go on with it by --resume, or choose another --name or --out")
    if config.init:
        if "preset" in given:
            raise ValueError("--preset and --init exclude each other: the model's settings come from the checkpoint")
        read_config(config.init)
    else:
        PRESETS[config.preset](**changes)
    return config, changes


def with_recipe(given: dict) -> dict:
    """The flags that were given, over those of the recipe that they name."""
    if "recipe" not in given or given.get("resume"):
        return given
    if given["recipe"] not in RECIPES:
        near = difflib.get_close_matches(given["recipe"], RECIPES, n=1)
        raise ValueError(f"recipe={given['recipe']!r}: " + (f"did you mean {near[0]}? " if near else "")
                         + f"There are {', '.join(RECIPES)}")
    recipe = RECIPES[given["recipe"]]
    if "data" not in given:
        raise ValueError(f"recipe {given['recipe']} needs its data: write them by python -m mplug2.data {recipe.data} "
                         "ROOT --out DIR, and give --data DIR")
    if not {"init", "preset"} & set(given):
        raise ValueError(f"recipe {given['recipe']} fine-tunes a checkpoint: name it by --init (or a --preset, to "
                         "train from scratch)")
    if "max_steps" in given:
        given = {"epochs": 0.0, **given}
    return {**recipe.settings, **given}


def run(config: TrainConfig, changes: dict, process: distributed.Process) -> dict[str, float]:
    started = time.time()
    folder = Path(config.out) / config.run_name
    if config.batch_size % process.world:
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {process.world} processes evenly")
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)  # the same weights on every process

    # ---- data
    if config.data:
        root = Path(config.data)
    else:
        if process.is_main:
            print("the tiny world: written to a cache when first used, in seconds", flush=True)
            tiny_data.ensure()
        distributed.barrier()
        root = tiny_data.ensure()
    samples = read_samples(root, config.task, "train")
    weights = {kind: weight for kind, weight in config.kind_weights().items() if kind in samples and weight}
    if not weights:
        raise ValueError(f"{root} has training data of {', '.join(samples)} only, whose weights are 0")
    samples = {kind: samples[kind] for kind in weights}
    if config.epochs:
        texts = sum(max(len(sample.captions), math.ceil(len(sample.qa) / config.questions), 1)
                    for of_kind in samples.values() for sample in of_kind)
        steps = max(1, math.ceil(config.epochs * texts / config.batch_size))
        config = dataclasses.replace(config, max_steps=steps, epochs=0.0)  # what is saved, and resumed
    classes = read_classes(samples)

    # ---- model and tokenizer
    resumed = load_training(folder / "last") if config.resume else None
    if config.resume or config.init:
        model, tokenizer, saved = (
            load_model(folder / "last", config.task, changes) if config.resume
            else load_model(config.init, config.task, changes, classes)
        )
        if model.fresh and process.is_main:
            print(f"not in {config.init}, and therefore trained from scratch: {', '.join(model.fresh)}")
        if saved.frames != config.frames and process.is_main:
            print(f"frames: trained with {saved.frames} a clip so far, now {config.frames}")
    else:
        tokenizer = make_tokenizer(config, samples, changes)
        model = MPLUG2(PRESETS[config.preset](**{**changes, "vocab_size": len(tokenizer)}), config.task, classes)
    check_texts(samples, tokenizer, model.config.max_positions, config.max_words)
    preparation = Preparation(config.frames, config.max_words)
    model.to(process.device).train()
    optim.freeze(model, config.freeze.split(",") if config.freeze else [])
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_model(model)
    optimizer = optim.make_optimizer(
        model, config.lr, config.vision_lr or config.lr, config.weight_decay, (0.9, config.beta2),
        config.optimizer, config.layer_decay,
    )
    momentum, self_critical = None, None
    if config.distil:
        epoch = math.ceil(sum(map(len, samples.values())) / config.batch_size)
        momentum = Momentum(model, config.momentum, config.distil, epoch, config.queue).to(process.device)
    if config.self_critical:
        self_critical = SelfCritical(tokenizer, [
            [clean(caption, config.max_words) for caption in sample.captions]
            for kind, of_kind in samples.items() if "prompted" in KIND[kind].parts for sample in of_kind
            if sample.captions
        ])
    first_step = 0
    torch.manual_seed(config.seed + process.rank)  # but dropout and negatives of its own
    if resumed:
        first_step = resumed["step"]
        optimizer.load_state_dict(resumed["optimizer"])
        if process.rank < len(resumed["generators"]):
            torch.set_rng_state(resumed["generators"][process.rank])
        if momentum:
            momentum.load_state_dict(resumed["momentum"])
    objectives = Objectives(model, momentum, self_critical)
    if process.world > 1:
        # Buffers, those of the momentum copy, are the same on every process by themselves.
        objectives = DistributedDataParallel(objectives, find_unused_parameters=True, broadcast_buffers=False)

    dataset = Samples(
        samples, model.config.image_size, config.frames, config.questions, model.config.max_positions,
        config.max_words, config.seed,
        None if config.augment == "none" else Augmentation(config.augment, config.flip),
    )
    batches = MixedBatches(
        {kind: len(of_kind) for kind, of_kind in samples.items()}, weights, config.batch_size, config.max_steps,
        config.seed, first_step, process.rank, process.world,
    )
    collate = Collate(tokenizer, model.classes)
    loader = make_loader(dataset, batches, collate, config.workers, pin=process.device.type == "cuda")
    loss_weights = {name: getattr(config, f"{name}_weight") for name in ("vtc", "vtm", "mlm", "caption", "answer")}

    if process.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"train": dataclasses.asdict(config), "model": dataclasses.asdict(model.config), "data": str(root)}
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
        count = sum(parameter.numel() for parameter in model.parameters())
        sizes = ", ".join(f"{len(of_kind):,} {kind}" for kind, of_kind in samples.items())
        print(f"{config.task}: {count:,} parameters, vocabulary {len(tokenizer)}, samples: {sizes}, {process.device}")

    # ---- the loop
    log = Log(folder, process)
    predictor = Predictor(model, tokenizer, preparation)
    bar = tqdm(total=config.max_steps, initial=first_step, disable=not process.is_main, unit="step", mininterval=0.5)
    fetched = time.time()
    for step, batch in enumerate(loader, start=first_step):
        log.waited(time.time() - fetched)
        log.skipped(batch["errors"], sum(map(len, samples.values())), config.max_skipped)
        batch = {name: value.to(process.device, non_blocking=True) if torch.is_tensor(value) else value
                 for name, value in batch.items()}
        warmup = math.ceil(config.warmup * config.max_steps)
        optim.set_rates(optimizer, optim.schedule(step, config.max_steps, warmup, config.min_lr))
        with torch.autocast(process.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            losses = objectives(batch)
            loss = sum(loss_weights.get(name, 1.0) * value for name, value in losses.items())
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {step}: " + ", ".join(
                f"{name} {value.item():.3g}" for name, value in losses.items()
            ) + f"; the batch: {', '.join(batch['where'])}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        if momentum:
            momentum.follow(model)
        log.step(losses, loss, norm, len(batch["where"]) * process.world)
        bar.update()

        done = step + 1
        if done % config.log_every == 0 or done == config.max_steps:
            log.write(done, {"lr": optimizer.param_groups[0]["lr"]}, bar)
        if done % config.eval_every == 0 and done != config.max_steps and process.is_main:
            validate(predictor, root, "val", config, config.eval_limit, done, log)
        if done % config.save_every == 0 or done == config.max_steps:
            generators = distributed.collect(torch.get_rng_state())
            if process.is_main:
                training = {"step": done, "optimizer": optimizer.state_dict(), "generators": generators}
                if momentum:
                    training["momentum"] = momentum.state_dict()
                save_checkpoint(folder, f"step_{done:07d}", model, tokenizer, preparation, training, config.keep)
                curves(folder / "metrics.jsonl", folder / "curves.png")
            distributed.barrier()
        fetched = time.time()
    bar.close()

    # ---- what was learned
    results: dict[str, float] = {}
    if process.is_main:
        split = "test" if any("test" in splits for splits in available(root).values()) else "val"
        results = validate(predictor, root, split, config, None, config.max_steps, log)
        curves(folder / "metrics.jsonl", folder / "curves.png")
        print(table({split: results}))
        print(f"{folder / 'last'}: {(time.time() - started) / 60:.1f} minutes in all; "
              f"python eval.py --checkpoint {folder / 'last'} evaluates every split")
    distributed.barrier()
    return results


def make_tokenizer(config: TrainConfig, samples: dict, changes: dict) -> Tokenizer:
    """The tokenizer that was asked for, or a vocabulary trained on the texts of the training samples."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer)
    texts = [text for of_kind in samples.values() for sample in of_kind for text in sample.captions]
    texts += [
        text for of_kind in samples.values() for sample in of_kind for question in sample.qa
        for text in (question.question, *question.answers)
    ]
    texts += [text for of_kind in samples.values() for sample in of_kind for text in sample.texts]
    texts += [*PROMPTS.values(), *INSTRUCTIONS.values()]
    size = PRESETS[config.preset](**changes).vocab_size
    return Tokenizer.train((clean(text, config.max_words) for text in texts), size)


def validate(
    predictor: Predictor, root: Path, split: str, config: TrainConfig, limit: int | None, step: int, log: "Log"
) -> dict[str, float]:
    """Evaluate on a split, if the data has it, and write what was found to metrics.jsonl: after pre-training all that
    the model can do, else the tasks that are trained."""
    tasks = split_tasks(config.task)
    predictor.model.eval()
    state = torch.get_rng_state()
    metrics, _ = evaluate(predictor, root, split, limit, None if "pretrain" in tasks else tasks)
    torch.set_rng_state(state)
    predictor.model.train()
    if metrics:
        log.line({"step": step, **{f"{split}/{name}": value for name, value in metrics.items()}})
    return metrics


class Log:
    """metrics.jsonl and the progress bar, by the main process; sums since the last line."""

    def __init__(self, folder: Path, process: distributed.Process):
        self.path, self.process = folder / "metrics.jsonl", process
        self.failed: set[str] = set()
        self.reset()

    def reset(self) -> None:
        self.losses: dict[str, list[torch.Tensor]] = {}
        self.samples, self.waiting, self.since = 0, 0.0, time.time()

    def waited(self, seconds: float) -> None:
        self.waiting += seconds

    def skipped(self, errors: list[str], files: int, allowed: float) -> None:
        """Count files that could not be decoded, by name; too many of them stop the run."""
        for error in sorted(set(errors) - self.failed):
            tqdm.write(f"skipped: {error}", file=sys.stderr)
        self.failed |= set(errors)
        if len(self.failed) > allowed * files:
            raise ValueError(f"{len(self.failed)} of {files} media files cannot be decoded, more than max_skipped="
                             f"{allowed} allows; mend the data (the files are named above), or raise --max-skipped")

    def step(self, losses: dict, loss: torch.Tensor, norm: torch.Tensor, samples: int) -> None:
        for name, value in {**{f"loss/{name}": value for name, value in losses.items()}, "loss": loss,
                            "grad_norm": norm}.items():
            self.losses.setdefault(name, []).append(value.detach())
        self.samples += samples

    def write(self, step: int, values: dict, bar: tqdm) -> None:
        """One line: means since the last one."""
        seconds = time.time() - self.since
        means = {name: torch.stack(found).mean().item() for name, found in self.losses.items()}
        bar.set_postfix_str(
            " ".join(f"{name.removeprefix('loss/')} {value:.2f}" for name, value in means.items() if "/" in name)
            + f" {self.samples / seconds:.0f} samples/s"
        )
        self.line({
            "step": step, **means, **values, "samples_per_second": self.samples / seconds,
            "waiting_for_data": self.waiting / seconds, "skipped_files": len(self.failed),
        })
        self.reset()

    def line(self, values: dict) -> None:
        if self.process.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
