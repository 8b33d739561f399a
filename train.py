"""Train mPLUG-2. By default: pre-training of the tiny preset on the tiny world, in minutes, on a laptop's CPU.

    torchrun train.py                                  # or: python train.py
    torchrun train.py --max-steps 20                   # a smoke run, within a minute
    torchrun --nproc-per-node 8 train.py --preset base --data DIR --name web
    torchrun train.py --task video_qa --init runs/tiny/last     # fine-tuning of a task, into runs/video_qa/
    torchrun train.py --resume                         # go on where runs/tiny/last stopped
    python train.py --plan --preset large --gpus 64    # memory, steps and days, before a GPU is asked for

It writes runs/tiny/: settings.json, metrics.jsonl, curves.png, report.html (all of it on one page) and checkpoints, of
which `last` is the newest. Then

    python eval.py --checkpoint runs/tiny/last

prints what was learned. All flags: python train.py --help
"""

import copy
import dataclasses
import difflib
import functools
import json
import math
import os
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import tiny_data
from mplug2 import distributed
from mplug2.checkpoint import PreprocessConfig, load_model, read_config
from mplug2.config import PRESETS, ModelConfig
from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.loader import make_loader, prefetch
from mplug2.data.records import available
from mplug2.data.samples import Sample, Samples, check_texts, read_classes, read_samples, stream_kind
from mplug2.data.shards import ReaderState, ShardSet, is_shards, read_shards, stream_batches
from mplug2.data.text import Tokenizer, clean
from mplug2.data.transforms import Augmentation
from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.evaluate import evaluate
from mplug2.evaluation.metric_names import format_table, mean_score
from mplug2.model.layers import Block
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.objectives import Objectives
from mplug2.objectives.self_critical import SelfCritical
from mplug2.predictor import Predictor
from mplug2.tasks import BATCH_TYPES, INSTRUCTIONS, PROMPTS, TASKS, batch_types, parse_tasks
from mplug2.tools.memory_plan import PlanConfig, Workload, cost, format_plan
from mplug2.tools.plots import draw_curves
from mplug2.tools.report import write_report
from mplug2.training import optim
from mplug2.training.fault_tolerance import GracefulStop, Watchdog, generator_states, set_generator_states
from mplug2.training.flags import Parser
from mplug2.training.logs import Log, peak_tflops
from mplug2.training.parallel import (
    all_reduce_replicated_grads,
    checkpoint_activations,
    clip_grad_norm,
    compile_model,
    load_optimizer_state,
    no_sync,
    optimizer_state,
    split_param_groups,
    wrap_model,
)
from mplug2.training.recipes import RECIPES
from mplug2.training.run_checkpoint import (
    clean_partial,
    extra_state,
    load_extra_state,
    load_training,
    save_checkpoint,
    unsharded_copy,
    update_symlink,
)


@dataclass(frozen=True)
class TrainConfig:
    recipe: str = ""
    """The settings of a public task, such as msrvtt_caption (mplug2/training/recipes.py has all); flags win over it."""
    task: str = "pretrain"
    """What to train: pretrain, text_classification, text_pair_classification, image_classification,
    video_classification, image_retrieval, video_retrieval, image_caption, video_caption, image_qa, video_qa,
    visual_entailment, image_pair_reasoning, grounding; or several of them, separated by commas."""
    task_weights: str = ""
    """Shares of the steps of several tasks, numbers in their order, separated by commas; without it equal ones."""
    preset: str = "tiny"
    """Size of the model: tiny, base, large; single settings of the model can be changed by the flags below."""
    data: str = ""
    """Folder with <task>.<split>.jsonl files or tar shards, or several with their weights: DIR=2,OTHER=1; without it
    the tiny world, written to a cache when first used."""
    eval_data: str = ""
    """Folder with <task>.<split>.jsonl files to validate on; without it the first of `data` that has such files."""
    init: str = ""
    """Checkpoint folder to start from: its weights, model settings and tokenizer."""
    tokenizer: str = ""
    """A vocab.txt or tokenizer.json of BERT; without it a small vocabulary is trained on the training texts."""
    out: str = "runs"
    """Folder of all runs."""
    name: str = ""
    """Name of this run, a folder in `out`; without it that of the recipe, the task, or, in pre-training, the preset."""
    resume: bool = False
    """Go on from the newest checkpoint of this run, with its settings. A run that torchrun or Slurm starts again does
    so by itself."""
    resume_from: str = ""
    """With --resume: go on from this checkpoint of the run, such as step_0000375, in place of the newest."""
    max_steps: int = 1500
    """Training steps; the learning rate falls over them."""
    epochs: float = 0.0
    """In place of max_steps: how often each caption, question or labelled sample is seen; 0: max_steps says."""
    batch_size: int = 32
    """Samples a step, over all processes and micro-batches together."""
    accumulate: int = 1
    """Micro-batches a step: so many forward and backward passes, then one update. Each is a batch of its own to the
    contrastive and matching losses; the gradient is the mean of theirs."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes share: ddp, the gradients; fsdp, also parameters and optimizer state (FSDP2)."""
    offload: bool = False
    """With --parallel fsdp: keep parameters and optimizer state in the memory of the CPU."""
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
    """Weight of the soft targets of an EMA teacher, for answers and VTC (ALBEF, mPLUG: 0.4), reached over
    the first epoch. 0: no copy."""
    ema_decay: float = 0.995
    """What the EMA teacher keeps of itself at each step."""
    queue: int = 0
    """Vectors of each side that VTC keeps as further negatives, with --distil; 0: VTC has no EMA teacher."""
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
    """Checkpoints that are kept, the newest ones; and the one of the best validation (mean of its shares)."""
    max_skipped: float = 0.02
    """Share of media files that may fail to decode before the run stops."""
    max_nonfinite: int = 5
    """Steps in a row whose loss or gradient is not finite, each of which is skipped, before the run stops."""
    timeout: float = 1800.0
    """Seconds without a step (ten times as many for a validation), after which the run names who hangs, and ends."""
    shuffle_buffer: int = 256
    """Samples that a reader of tar shards shuffles at a time; they are in memory, as files."""
    peak_tflops: float = 0.0
    """Operations that the device can do, in 10^12 a second, for the model FLOPs utilisation (mfu) in the log; 0: from
    its name, where that is known."""

    def __post_init__(self):
        tasks = parse_tasks(self.task)
        if self.task_weights and len(self.shares()) != len(tasks):
            raise ValueError(f"task_weights={self.task_weights!r}: expected a number for each of {self.task}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        for name in ("max_steps", "batch_size", "frames", "max_words", "log_every", "eval_every", "save_every", "keep",
                     "accumulate", "max_nonfinite", "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for field in dataclasses.fields(self):
            if field.type in (int, float) and getattr(self, field.name) < 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: expected no negative number")
        if self.max_skipped > 1 or self.warmup > 1 or self.min_lr > 1 or self.distil > 1 or self.layer_decay > 1:
            raise ValueError("max_skipped, warmup, min_lr, distil and layer_decay are shares: expected at most 1")
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay={self.ema_decay}: expected less than 1, else the copy never follows the model")
        if self.queue and not self.distil:
            raise ValueError(f"queue={self.queue}: the queue belongs to an EMA teacher, ask for that by --distil 0.4")
        if self.queue and not any("contrastive" in TASKS[task].components for task in tasks):
            raise ValueError(f"queue={self.queue}: {self.task} has no VTC that would use it")
        if self.distil and not self.queue and not any("question" in TASKS[task].batch for task in tasks):
            raise ValueError(f"distil={self.distil}: {self.task} has no answers to distil, and no --queue for VTC")
        if self.self_critical and not any("prompted" in TASKS[task].batch for task in tasks):
            raise ValueError(f"self_critical: {self.task} writes no captions")
        if self.augment != "none" and "grounding" in tasks:
            raise ValueError(f"augment={self.augment!r}: crops and moves would leave the boxes of grounding behind")
        if self.flip and self.augment == "none":
            raise ValueError("flip is a part of augmentation: add --augment finetune")
        if self.offload and self.parallel != "fsdp":
            raise ValueError("offload needs --parallel fsdp")
        if self.self_critical and self.parallel == "fsdp":
            raise ValueError("self_critical writes captions of another length on each process, and FSDP2 would wait "
                             "for the longest in vain: use --parallel ddp")
        if self.compile and self.parallel == "fsdp":
            raise ValueError("compile and --parallel fsdp do not go together: use one of them")
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout}: expected more than 0 seconds")
        if self.resume_from and not self.resume:
            raise ValueError("--resume-from names the checkpoint of a run that goes on: give --resume, too")
        if not sum(self.kind_weights().values()):
            raise ValueError("the weights of all kinds of batches are 0: there is nothing to train on; "
                             "see task_weights, video_weight, image_weight and text_weight")
        if Path(self.run_name).name != self.run_name:
            raise ValueError(f"name={self.name!r}: expected a folder name without slashes; --out is the one above")

    @property
    def run_name(self) -> str:
        return self.name or self.recipe or (self.preset if self.task == "pretrain" else self.task)

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
        tasks = parse_tasks(self.task)
        weights = dict(zip(tasks, self.shares() if self.task_weights else [1.0] * len(tasks)))
        media = {"video": self.video_weight, "image": self.image_weight, "text": self.text_weight}
        return {
            name: weights[task] * (media[kind.modality] / (sum(media.values()) or 1) if task == "pretrain" else 1.0)
            for task in tasks for name, kind in batch_types(task).items()
        }


MAY_CHANGE = ("resume", "resume_from", "max_steps", "epochs", "out", "name", "device", "workers", "accumulate",
              "parallel", "offload", "activation_checkpointing", "compile", "log_every", "eval_every", "eval_limit",
              "eval_data", "save_every", "keep", "max_skipped", "max_nonfinite", "timeout", "shuffle_buffer",
              "peak_tflops")
"""Settings that a resumed run may be given anew; any other is refused."""


def main(arguments: list[str] | None = None) -> dict[str, float]:
    # ---- settings: all of them known, and refused if they do not fit, before any work starts
    parser = Parser(__doc__)
    parser.add(TrainConfig, "training")
    parser.add(ModelConfig, "model", defaults="default: the preset's, or that of --init")
    parser.add(PlanConfig, "plan")
    given = parser.read(arguments)
    try:
        if given["PlanConfig"].get("plan"):
            print(planned(PlanConfig(**given["PlanConfig"]), TrainConfig(**given["TrainConfig"]), given["ModelConfig"]))
            return {}
        if given["PlanConfig"]:
            raise ValueError(f"{', '.join(given['PlanConfig'])}: settings of a plan, which is asked for by --plan")
        config, changes = resolve(given["TrainConfig"], given["ModelConfig"])
        process = distributed.init_distributed(config.device)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    try:
        return run(config, changes, process, typed(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that may not be written to
        if process.is_main or not isinstance(error, distributed.AllRanksError):
            print(f"\ntrain.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        distributed.shutdown()


def typed(arguments: list[str]) -> str:
    """The command of this run, as one would type it again."""
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = ["--nnodes", str(world // local)] if world > local else []
    processes = ["--nproc-per-node", str(local)] if local > 1 else []
    launcher = ["torchrun", *nodes, *processes] if "WORLD_SIZE" in os.environ else ["python"]
    return shlex.join([*launcher, "train.py", *map(str, arguments)])


def planned(plan: PlanConfig, config: TrainConfig, changes: dict) -> str:
    """What this run would need on many devices."""
    if config.init:
        model = dataclasses.replace(read_config(config.init)[1], **changes)
    else:
        model = PRESETS[config.preset](**changes)
    return format_plan(plan, workload(config, model, plan.gpus), config.accumulate)


def workload(config: TrainConfig, model: ModelConfig, world: int) -> Workload:
    """What each of `world` processes does at a time. ValueError if they cannot share a batch."""
    if config.batch_size % (world * config.accumulate):
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {world} processes evenly"
                         + (f", in {config.accumulate} micro-batches" if config.accumulate > 1 else ""))
    return Workload(model, config.batch_size // world // config.accumulate, config.frames, config.questions,
                    config.max_words, config.task, config.precision == "bfloat16", config.optimizer)


def resolve(given: dict, changes: dict) -> tuple[TrainConfig, dict]:
    """The settings of this run and the changed settings of its model; those of the run itself if it is resumed."""
    tasks, defaults = parse_tasks(given.get("task", TrainConfig.task)), {}
    if "recipe" not in given and "pretrain" not in tasks:
        defaults = dict(max_steps=sum(TASKS[task].steps for task in tasks), lr=2e-3)
    config = TrainConfig(**{**defaults, **with_recipe(given)})
    folder = Path(config.out) / config.run_name
    saved_file = folder / "settings.json"
    clean_partial(folder)
    again = started_again(saved_file)
    if again and (folder / "last").exists():
        config = dataclasses.replace(config, resume=True)
        given = {**given, "resume": True, "resume_from": ""}  # where it was asked to start from, it has been already
    elif again:
        config = dataclasses.replace(config, resume=False, resume_from="")  # it was stopped before its first checkpoint
    if config.resume:
        if not (folder / "last").exists():
            raise FileNotFoundError(f"{folder} has no checkpoint to resume from; start it without --resume")
        if config.resume_from and not (folder / config.resume_from).is_dir():
            raise FileNotFoundError(f"{folder} has no checkpoint {config.resume_from}; it has "
                                    f"{', '.join(sorted(path.name for path in folder.glob('step_*')))}")
        saved = json.loads(saved_file.read_text())
        refused = [name for name in given if name not in MAY_CHANGE and given[name] != saved["train"][name]]
        refused += [name for name in changes if changes[name] != saved["model"][name]]
        if refused:
            raise ValueError(f"{', '.join(refused)}: a resumed run keeps its settings ({saved_file}); leave them out, "
                             "or start another run with --init and --name")
        kept = {name: value for name, value in given.items() if name in MAY_CHANGE}
        return TrainConfig(**{**saved["train"], **kept}), {}
    if saved_file.exists() and not again:
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


def started_again(saved_file: Path) -> bool:
    """Whether torchrun (after a process failed) or Slurm (after a node did) started this run before."""
    if not saved_file.exists():
        return False
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    same = launch != "none" and launch == json.loads(saved_file.read_text()).get("launch")
    return same or any(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def run(config: TrainConfig, changes: dict, process: distributed.DistInfo, command: str) -> dict[str, float]:
    started = time.time()
    folder = Path(config.out) / config.run_name
    workload(config, PRESETS[config.preset](), process.world_size)  # refuses what cannot be shared
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)  # the same weights on every process

    # ---- data: a stream for each kind of batch and each source
    if not config.data:
        if process.is_main:
            print("the tiny world: written to a cache when first used, in seconds", flush=True)
        distributed.run_on_main(tiny_data.ensure, process)
    roots = read_sources(config.data) if config.data else {tiny_data.ensure(): 1.0}
    samples, shards, weights = read_streams(config, roots)
    root = Path(config.eval_data) if config.eval_data else next((root for root in roots if not is_shards(root)), None)
    merged: dict[str, list[Sample]] = {}
    for stream, of_stream in samples.items():
        merged.setdefault(stream_kind(stream), []).extend(of_stream)
    if config.epochs:
        texts = sum(max(len(sample.captions), math.ceil(len(sample.qa) / config.questions), 1)
                    for of_kind in merged.values() for sample in of_kind)
        texts += sum(map(len, shards.values()))
        steps = max(1, math.ceil(config.epochs * texts / config.batch_size))
        config = dataclasses.replace(config, max_steps=steps, epochs=0.0)  # what is saved, and resumed
    classes = read_classes(merged)

    # ---- model and tokenizer
    checkpoint = folder / (config.resume_from or "last")
    resumed = load_training(checkpoint) if config.resume else None
    if config.resume or config.init:
        model, tokenizer, saved = (
            load_model(checkpoint, config.task, changes) if config.resume
            else load_model(config.init, config.task, changes, classes)
        )
        if model.newly_initialized and process.is_main:
            print(f"not in {config.init}, and therefore trained from scratch: {', '.join(model.newly_initialized)}")
        if saved.frames != config.frames and process.is_main:
            print(f"frames: trained with {saved.frames} a clip so far, now {config.frames}")
    else:
        tokenizer = make_tokenizer(config, samples, changes)
        model = MPLUG2(PRESETS[config.preset](**{**changes, "vocab_size": len(tokenizer)}), config.task, classes)
    check_texts(merged, tokenizer, model.config.max_positions, config.max_words)
    preprocess = PreprocessConfig(config.frames, config.max_words)
    optim.freeze(model.train(), config.freeze.split(",") if config.freeze else [])
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_model(model)
    ema_teacher, self_critical = None, None
    if config.distil:
        epoch = math.ceil(sum(map(len, [*samples.values(), *shards.values()])) / config.batch_size)
        ema_teacher = EMATeacher(model, config.ema_decay, config.distil, epoch, config.queue)
    if config.self_critical:
        self_critical = SelfCritical(tokenizer, [
            [clean(caption, config.max_words) for caption in sample.captions]
            for kind, of_kind in merged.items() if "prompted" in BATCH_TYPES[kind].fields for sample in of_kind
            if sample.captions
        ])
    objectives = Objectives(model, ema_teacher, self_critical)
    parallel = wrap_model(
        objectives, process, config.parallel == "fsdp", Block, config.precision == "bfloat16", config.offload
    )
    optimizer = optim.make_optimizer(
        model, config.lr, config.vision_lr or config.lr, config.weight_decay, (0.9, config.beta2),
        config.optimizer, config.layer_decay,
    )
    split_param_groups(optimizer)
    first_step = resumed["step"] if resumed else 0
    torch.manual_seed(config.seed + process.rank)  # but dropout and negatives of its own
    if resumed:
        load_optimizer_state(optimizer, model, resumed["optimizer"])
        load_extra_state(objectives, resumed["objectives"])
        if len(resumed["generators"]) == process.world_size:
            set_generator_states(resumed["generators"][process.rank], process.device)
        else:  # no process is any of the old ones
            torch.manual_seed(int(np.random.default_rng((config.seed, first_step, process.rank)).integers(2**63)))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    dataset = Samples(
        samples, model.config.image_size, config.frames, config.questions, model.config.max_positions,
        config.max_words, config.seed,
        None if config.augment == "none" else Augmentation(config.augment, config.flip),
    )
    sizes = {stream: len(of_stream) for stream, of_stream in {**samples, **shards}.items()}
    batches = MixedBatches(
        sizes, weights, config.batch_size, config.max_steps, config.seed, first_step, process.rank, process.world_size,
        config.accumulate,
    )
    collate, pin = Collate(tokenizer, model.classes), process.device.type == "cuda"
    positions = ReaderState(
        shards, process.world_size * max(1, config.workers), config.shuffle_buffer, config.seed,
        resumed["positions"] if resumed else {},
    )
    if shards:
        loader = stream_batches(dataset, shards, batches, collate, positions, config.max_words, config.workers, pin)
    else:
        loader = make_loader(dataset, batches, collate, config.workers, pin)
    loss_weights = {name: getattr(config, f"{name}_weight") for name in ("vtc", "vtm", "mlm", "caption", "answer")}

    def start_folder() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        before = json.loads(file.read_text()).get("commands", []) if file.exists() else []
        count = sum(parameter.numel() for parameter in model.parameters())
        settings = {
            "train": dataclasses.asdict(config), "model": dataclasses.asdict(model.config),
            "data": {str(root): weight for root, weight in roots.items()},
            "launch": os.environ.get("TORCHELASTIC_RUN_ID", "none"),
            "parameters": count, "processes": process.world_size, "torch": torch.__version__,
            "commands": list(dict.fromkeys([*before, command])),
        }
        file.write_text(json.dumps(settings, indent=2) + "\n")
        counts = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
        print(f"{config.task}: {count:,} parameters, vocabulary {len(tokenizer)}, samples: {counts}, {process.device}"
              + (f" x {process.world_size}, {config.parallel}" if process.world_size > 1 else ""))

    distributed.run_on_main(start_folder, process)
    peak = config.peak_tflops or peak_tflops(process.device)
    log = Log(folder, process, first_step, config.max_steps, peak)
    work = workload(config, model.config, process.world_size)
    flops = functools.cache(lambda kind: cost(work, kind).flops if peak else 0.0)

    def unsharded() -> MPLUG2 | None:
        """The model in one piece; if it is sharded, only on the main process, None on others. All have to call it."""
        return unsharded_copy(model, process) if config.parallel == "fsdp" else model

    def save(step: int, score: float | None) -> None:
        """All processes together write a checkpoint."""
        watchdog.heartbeat(step, "saving", patience=10)
        one = unsharded()
        state = positions.collected(distributed.all_gather_object(positions))
        training = {
            "step": step, "optimizer": optimizer_state(optimizer, model), "positions": state,
            "objectives": extra_state(objectives), "nonfinite_steps": log.nonfinite_steps,
            "generators": distributed.all_gather_object(generator_states(process.device)),
        }
        distributed.run_on_main(lambda: save_checkpoint(
            folder, f"step_{step:07d}", one, tokenizer, preprocess, training, config.keep, score
        ), process)

    # ---- the loop
    if config.resume_from:
        distributed.run_on_main(lambda: update_symlink(folder / "last", config.resume_from), process)
    log.nonfinite_steps = resumed["nonfinite_steps"] if resumed else 0
    in_a_row, warmup = 0, math.ceil(config.warmup * config.max_steps)
    with GracefulStop() as stop, Watchdog(process, config.timeout) as watchdog:
        coming = iter(loader) if config.workers else prefetch(loader)
        for step in range(first_step, config.max_steps):
            optim.set_lr(optimizer, optim.lr_factor(step, config.max_steps, warmup, config.min_lr))
            sources, operations, means = [], 0.0, {}
            for micro in range(config.accumulate):
                watchdog.heartbeat(step, "waiting for data", names=functools.partial(
                    batch_names, batches, dataset, step))
                asked = time.time()
                batch = next(coming)
                log.waited(time.time() - asked)
                log.skipped(batch["errors"], sum(sizes.values()), config.max_skipped)
                positions.advance(batch)
                sources += batch["source"]
                watchdog.heartbeat(step, "in a step", names=functools.partial(", ".join, batch["source"]))
                batch = {name: value.to(process.device, non_blocking=True) if torch.is_tensor(value) else value
                         for name, value in batch.items()}
                with no_sync(parallel, last=micro == config.accumulate - 1):
                    with torch.autocast(process.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                        losses = parallel(batch)
                        loss = sum(loss_weights.get(name, 1.0) * value for name, value in losses.items())
                    (loss / config.accumulate).backward()
                losses = {"loss": loss, **{f"loss/{name}": value for name, value in losses.items()}}
                for name, value in losses.items():
                    means[name] = means.get(name, 0.0) + value.detach() / config.accumulate
                operations += flops(batch["kind"])
            all_reduce_replicated_grads(parallel)
            norm = clip_grad_norm(parameters, config.clip_grad)

            # One process may see what the others do not: they skip, and they stop, together.
            # To ask is to wait for the device, once a step: the weights may change only when the answer is known.
            local, whole_norm = torch.stack([means["loss"], norm.to(means["loss"])]).isfinite().tolist()
            skip, leave = distributed.any_rank(not (local and whole_norm), bool(stop.name))
            if skip:
                seen = distributed.all_gather_object(
                    (local, sources, {name: value.item() for name, value in means.items()}))
                guilty = [one for one in seen if not one[0]] or seen
                names = [name for _, of_process, _ in guilty for name in of_process]
                message, in_a_row = log.nonfinite(step, guilty[0][2], norm.item(), names), in_a_row + 1
                if in_a_row == config.max_nonfinite:
                    raise distributed.AllRanksError(
                        f"{in_a_row} steps in a row were not finite, as many as --max-nonfinite allows; the last: "
                        f"{message}. WordAttention at these samples, lower --lr, or go on from an older checkpoint")
            else:
                in_a_row = 0
                optimizer.step()
                if ema_teacher:
                    ema_teacher.update(model)
                log.step(means, norm, len(sources) * process.world_size, operations)
            optimizer.zero_grad(set_to_none=True)
            log.bar.update()

            done, score = step + 1, None
            if done % config.log_every == 0 or done == config.max_steps:
                rates = [group["lr"] for group in optimizer.param_groups]
                log.write(done, {"lr": max(rates), "lr_lowest": min(rates)})
            if done % config.eval_every == 0 and root:
                watchdog.heartbeat(done, "validating", patience=10)
                one = unsharded()
                if process.is_main:
                    predictor = Predictor(one.to(process.device), tokenizer, preprocess)
                    found = validate(predictor, root, "val", config, config.eval_limit, done, log)
                    score = mean_score(found)
                distributed.barrier()
            if done % config.save_every == 0 or done == config.max_steps or leave:
                save(done, score)
                if process.is_main:
                    draw_curves(folder / "metrics.jsonl", folder / "curves.png")
            if leave:
                break
        del coming
    log.close()
    if first_step < config.max_steps and leave:
        if process.is_main:
            print(f"{stop.name or 'another process got a signal'}: saved after step {done} of {config.max_steps}; "
                  f"--resume goes on from {folder / 'last'}")
        return {}

    # ---- what was learned
    results: dict[str, float] = {}
    one = unsharded()
    if process.is_main and root:
        split = "test" if any("test" in splits for splits in available(root).values()) else "val"
        predictor = Predictor(one.to(process.device), tokenizer, preprocess)
        results = validate(predictor, root, split, config, None, config.max_steps, log)
        draw_curves(folder / "metrics.jsonl", folder / "curves.png")
        print(format_table({split: results}))
        print(f"{folder / 'report.html'}: this run on one page")
        print(f"{folder / 'last'}: {(time.time() - started) / 60:.1f} minutes in all; "
              f"python eval.py --checkpoint {folder / 'last'} evaluates every split")
    elif process.is_main:
        write_report(folder)
    distributed.barrier()
    return results


def read_sources(text: str) -> dict[Path, float]:
    """`DIR=2,OTHER=1`, or only `DIR`: the folders with data and their weights."""
    sources: dict[Path, float] = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=") if "=" in part else (part, "", "1")
        try:
            sources[Path(name)] = float(weight)
        except ValueError as error:
            raise ValueError(f"data={text!r}: expected folders with weights, such as DIR=2,OTHER=1") from error
    if len(sources) < len(text.split(",")) or min(sources.values()) < 0 or not sum(sources.values()):
        raise ValueError(f"data={text!r}: expected each folder once, and weights of which one is above 0")
    return sources


def read_streams(
    config: TrainConfig, roots: dict[Path, float]
) -> tuple[dict[str, list[Sample]], dict[str, ShardSet], dict[str, float]]:
    """The samples and the shards of each stream, and the share of the steps that each stream has.

    A stream is named after its kind ("video"), and from the second source on after that, too ("video@1").
    """
    samples: dict[str, list[Sample]] = {}
    shards: dict[str, ShardSet] = {}
    weights: dict[str, float] = {}
    of_kind, found = config.kind_weights(), set()
    for number, (root, weight) in enumerate(roots.items()):
        if is_shards(root) and config.task != "pretrain":
            raise ValueError(f"{root} holds tar shards, which are for pre-training; {config.task} reads jsonl files")
        streams = read_shards(root) if is_shards(root) else read_samples(root, config.task, "train")
        found |= set(streams)
        for kind, of_stream in streams.items():
            if weight and of_kind[kind]:
                stream = f"{kind}@{number}" if number else kind
                (shards if is_shards(root) else samples)[stream] = of_stream
                weights[stream] = weight
    if not weights:
        raise ValueError(f"{', '.join(map(str, roots))} has training data of {', '.join(sorted(found))} only, whose "
                         "weights are 0")
    for kind in {stream_kind(stream) for stream in weights}:  # its share, divided among its sources
        sources = [stream for stream in weights if stream_kind(stream) == kind]
        whole = sum(weights[stream] for stream in sources)
        weights |= {stream: of_kind[kind] * weights[stream] / whole for stream in sources}
    return samples, shards, weights


def batch_names(batches: MixedBatches, dataset: Samples, step: int) -> str:
    """The samples that this process waits for at a step, by their places."""
    at_step = copy.copy(batches)
    at_step.start = step
    keys = next(iter(at_step))
    if keys[0][0] not in dataset.samples:
        return f"from the shards of {keys[0][0]}"
    return ", ".join(dataset.samples[stream][index].source for stream, _, index in keys)


def make_tokenizer(config: TrainConfig, samples: dict, changes: dict) -> Tokenizer:
    """The tokenizer that was asked for, or a vocabulary trained on the texts of the training samples."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer)
    if not samples:
        raise ValueError("no vocabulary can be trained on a stream of shards: name one by --tokenizer, or a checkpoint "
                         "by --init")
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
    predictor: Predictor, root: Path, split: str, config: TrainConfig, limit: int | None, step: int, log: Log
) -> dict[str, float]:
    """Evaluate on a split, if the data has it, and write what was found to metrics.jsonl: after pre-training all that
    the model can do, else the tasks that are trained. The predictions go to predictions.jsonl, and all of it to
    report.html."""
    tasks = parse_tasks(config.task)
    predictor.model.eval()
    state = torch.get_rng_state()
    data = EvalSplit(root, split, limit or 0)
    metrics, predictions = evaluate(predictor, data, None if "pretrain" in tasks else tasks)
    if metrics:
        log.line({"step": step, **{f"{split}/{name}": value for name, value in metrics.items()}})
        lines = "".join(json.dumps(prediction.line(split)) + "\n" for prediction in predictions)
        (log.path.parent / "predictions.jsonl").write_text(lines, encoding="utf-8")
    write_report(log.path.parent, predictor)
    torch.set_rng_state(state)
    predictor.model.train()
    return metrics


if __name__ == "__main__":
    main()
