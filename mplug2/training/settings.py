"""The settings of a training run, and where they come from: flags, a recipe, a task's defaults, or the run to resume.

Each group of settings is a dataclass in the file that uses it. `resolve_settings` joins them, before any work starts.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mplug2.checkpoint import read_config, read_json_object, real_folder
from mplug2.config import PRESETS, ModelConfig, form_fields, nearest_preset
from mplug2.data.build import DataSettings
from mplug2.did_you_mean import did_you_mean
from mplug2.flags import Parser, check_range
from mplug2.objectives.build import LossSettings
from mplug2.tasks import TASKS, batch_types, parse_tasks
from mplug2.training.optim import OptimizerSettings
from mplug2.training.parallel import ParallelSettings
from mplug2.training.recipes import FINE_TUNING, PRETRAINING, RECIPES
from mplug2.training.run_checkpoint import SaveSchedule, clean_partial


@dataclass(frozen=True)
class RunSettings:
    recipe: str = ""
    """The settings of a public task, such as msrvtt_caption; flags take precedence (mplug2/training/recipes.py)."""
    preset: str = field(default="tiny", metadata={"known": tuple(PRESETS)})
    """Size of the model; the flags of the model change single values."""
    form: Literal["released", "figure"] | None = None
    """Set every choice between the released code and Figure 2 of the paper to one of the two."""
    init: str = ""
    """Checkpoint folder to start from: its weights, model settings and tokenizer."""
    reinit: str = ""
    """With --init: modules that start from scratch, separated by commas, such as 'vision_encoder.blocks.*.lt*'."""
    name: str = ""
    """Name of this run; empty: that of the recipe or task, in pre-training that of the preset."""
    out: str = "runs"
    """Folder of all runs; this one writes to OUT/NAME."""
    resume: bool = False
    """Continue this run from its newest checkpoint, with its settings. torchrun and Slurm restarts do so by default."""
    resume_from: str = ""
    """With --resume: the checkpoint to continue from, such as step_0000375, instead of the newest."""
    seed: int = 0
    """Seed of everything random."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 375
    """Steps between two validations."""
    eval_limit: int = 120
    """Records of each task in a validation; the evaluation at the end uses all."""
    best_metric: str = ""
    """Metric that decides which checkpoint is the best, such as t2v_r1; empty: the main metric of the task."""
    save_every: int | str = 375
    """Steps between two checkpoints, or minutes: 15min. There is always one at the end."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; the one with the best validation is kept as well."""
    timeout: float = 1800.0
    """Seconds without progress after which the run reports the rank that hangs, and ends (validation: ten times)."""

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}{did_you_mean(self.preset, PRESETS)}: expected one of "
                             f"{', '.join(PRESETS)}")
        check_range(self, "log_every eval_every keep_checkpoints", 1)
        check_range(self, "seed eval_limit", 0)
        SaveSchedule(self.save_every)  # refuses what is neither steps nor minutes
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout}: expected more than 0 seconds")
        if self.resume_from and not self.resume:
            raise ValueError(f"resume_from={self.resume_from!r} without resume: add --resume")
        for name in (self.name, self.recipe):
            if Path(name).name != name:
                raise ValueError(f"name={name!r}: expected a folder name without slashes; --out is its parent folder")


GROUPS: dict[str, tuple[type, str]] = {
    "run": (RunSettings, "run (where to start, what to write, and when)"),
    "data": (DataSettings, "data (tasks, sources and number of steps)"),
    "loss": (LossSettings, "losses (weights and targets)"),
    "optimizer": (OptimizerSettings, "optimizer (learning rates and updates)"),
    "parallel": (ParallelSettings, "parallelism (devices, precision and memory)"),
}
"""The groups of settings, and their titles in `--help`. No two fields have the same name: each is a flag."""

OWNERS = {one.name: group for group, (cls, _) in GROUPS.items() for one in dataclasses.fields(cls)}
"""The group of each field."""

PRECEDENCE = {"epochs": "max_steps", "min_lr": "min_lr_ratio", "warmup_steps": "warmup_ratio"}
"""Pairs of settings of which a command gives at most one. The first of a pair, if it is set, replaces the second."""

MAY_CHANGE = (
    "resume", "resume_from", "max_steps", "epochs", "out", "name", "device", "workers", "accumulation_steps",
    "parallel", "cpu_offload", "activation_checkpointing", "compile", "log_every", "eval_every", "eval_limit",
    "best_metric", "data", "eval_data", "save_every", "keep_checkpoints", "max_skipped", "timeout",
    "shuffle_buffer",
)
"""Settings that may differ when a run is resumed. Any other is refused. `data` may name another place of the same
records: `TrainState` compares them."""

OLD_NAMES = {
    "accumulate": "accumulation_steps", "keep": "keep_checkpoints", "questions": "questions_per_sample",
    "queue": "queue_size", "distil": "distill_weight", "flip": "hflip", "offload": "cpu_offload",
    "momentum": "ema_decay", "min_lr": "min_lr_ratio", "warmup": "warmup_ratio",
}
"""Names of settings in the settings.json of runs that were started before the fields were renamed."""

NO_LONGER_SETTINGS = ("peak_tflops", "max_nonfinite")
"""Names in the settings.json of older runs that have no effect any more."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run, in groups, and the model settings that were given as flags (`model`)."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        task, tasks, loss = self.data.task, parse_tasks(self.data.task), self.loss
        answers, captions = (any(name in TASKS[one].batch for one in tasks) for name in ("question", "prompted"))
        if loss.queue_size and not any("contrastive" in TASKS[one].components for one in tasks):
            raise ValueError(f"queue_size={loss.queue_size} with task={task}: this task has no VTC that would use it")
        micro_batch = self.data.batch_size // self.data.accumulation_steps
        if 0 < loss.queue_size < micro_batch:
            raise ValueError(f"queue_size={loss.queue_size}: a micro-batch has {micro_batch} samples, and the queue "
                             f"has to hold them; raise --queue-size to {micro_batch} or more")
        if loss.distill_weight and not loss.queue_size and not answers:
            raise ValueError(f"distill_weight={loss.distill_weight} with task={task}: this task has no answers to "
                             "distill, and VTC needs --queue-size")
        for one in tasks:
            for kind, batch_type in batch_types(one).items():
                weight = getattr(self.data, f"{kind}_weight") if one == "pretrain" else 1.0
                if weight and not loss.losses_of(batch_type):
                    raise ValueError(f"task={task}: batches of {kind} would train nothing, because the weights of all "
                                     f"of their losses are 0; raise one of them"
                                     + (f", or add --{kind}-weight 0" if one == "pretrain" else ""))
        if loss.self_critical and not captions:
            raise ValueError(f"self_critical with task={task}: this task does not generate captions")
        if loss.self_critical and self.parallel.parallel != "ddp":
            raise ValueError(f"self_critical with parallel={self.parallel.parallel}: captions have another length on "
                             "each rank, and FSDP2 would wait forever; use --parallel ddp")

    @classmethod
    def from_flat(cls, values: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> "Settings":
        """Settings from one dictionary of all fields, as settings.json has it. ValueError for an unknown name."""
        groups: dict[str, dict] = {group: {} for group in GROUPS}
        for name, value in values.items():
            if name not in OWNERS:
                raise ValueError(f"unknown setting {name!r}{did_you_mean(name, OWNERS)}")
            groups[OWNERS[name]][name] = value
        return cls(**{group: GROUPS[group][0](**given) for group, given in groups.items()}, model=dict(model or {}))

    def flat(self) -> dict[str, Any]:
        """The inverse of `from_flat`, without the settings of the model."""
        return {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(self, group)).items()}

    def replace(self, **changes: Any) -> "Settings":
        """A copy with other values of single fields, whichever group they belong to."""
        return self.from_flat({**self.flat(), **changes}, self.model)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        default = self.run.preset if self.data.task == "pretrain" else self.data.task
        return Path(self.run.out) / (self.run.name or self.run.recipe or default)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the run starts from: of this run, with --resume, or of another one, with --init."""
        if self.run.resume:
            return real_folder(self.folder / (self.run.resume_from or "last"))
        return real_folder(self.run.init) if self.run.init else None

    def model_config(self) -> ModelConfig:
        """The settings of the model: those of the checkpoint to start from, or of the preset, with changes."""
        if self.checkpoint:
            return dataclasses.replace(read_config(self.checkpoint)[1], **self.model)
        return PRESETS[self.run.preset](**self.model)


def with_form(settings: Settings) -> Settings:
    """The settings with the model settings that --form stands for. ValueError if a given one contradicts it."""
    if not settings.run.form:
        return settings
    fields = form_fields(settings.run.form, settings.model_config(), settings.model)
    return dataclasses.replace(settings, model={**settings.model, **fields})


def settings_parser(description: str, prog: str) -> Parser:
    """The flags of train.py: the groups of settings, and the settings of the model."""
    parser = Parser(description, prog)
    for cls, title in GROUPS.values():
        parser.add(cls, title)
    parser.add(ModelConfig, "model: vision encoder")
    return parser


def parse_settings(description: str, prog: str, arguments: list[str]) -> Settings:
    """The settings of the run that a command line describes. A mistake ends the program with one line."""
    parser = settings_parser(description, prog)
    given = parser.read(arguments, default_values)
    try:
        return resolve_settings(run_flags(given), given[ModelConfig.__name__])
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def run_flags(given: dict[str, dict]) -> dict[str, Any]:
    """From what `Parser.read` returns, the flags of the run in one dictionary, without those of the model."""
    return {name: value for cls, _ in GROUPS.values() for name, value in given.get(cls.__name__, {}).items()}


def with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The given flags, over the settings of their recipe, or over the defaults of their task and size of model.

    A run that starts from a checkpoint has its number of frames and of words, unless the recipe says otherwise.
    """
    for first, second in PRECEDENCE.items():
        if first in given and second in given:
            raise ValueError(f"{first}={given[first]} and {second}={given[second]}: give one of the two")
    if given.get("resume"):  # the run has its settings already
        return given
    recipe, base = given.get("recipe", ""), {}
    if recipe:
        if recipe not in RECIPES:
            raise ValueError(f"recipe={recipe!r}{did_you_mean(recipe, RECIPES)}: expected one of {', '.join(RECIPES)}")
        base = dict(RECIPES[recipe].settings)
    else:
        preset, inherited = given.get("preset", "tiny"), {}
        if given.get("init") and (real_folder(given["init"]) / "config.json").is_file():
            _, model, preprocess = read_config(real_folder(given["init"]))
            preset, inherited = nearest_preset(model), {"frames": preprocess.frames, "max_words": preprocess.max_words}
        tasks = parse_tasks(given.get("task", "pretrain"))
        base = PRETRAINING.get(preset, {})  # `RunSettings` refuses an unknown preset
        if "pretrain" not in tasks:
            base = {"max_steps": sum(TASKS[task].steps for task in tasks), **FINE_TUNING.get(preset, {})}
        base = {**base, **inherited}
    for first, second in PRECEDENCE.items():
        if second in given:
            base.pop(first, None)
    return {**base, **given}


def default_values(given: dict[str, Any]) -> dict[str, Any]:
    """The values that `--help` shows: those of the task, recipe, preset or checkpoint that the `given` flags name. Of a
    pair such as epochs and max_steps, only the one that holds has a value."""
    model = {one.name: given[one.name] for one in dataclasses.fields(ModelConfig) if one.name in given}
    flags = {name: value for name, value in given.items() if name in OWNERS}
    settings = with_form(Settings.from_flat(with_defaults(flags), model))
    values = {**settings.flat(), **dataclasses.asdict(settings.model_config())}
    replaced = {second: None for first, second in PRECEDENCE.items() if values[first] is not None}
    return values | replaced


def resolve_settings(flags: dict[str, Any], model: dict[str, Any]) -> Settings:
    """The settings of a run from the flags that were given. A run to resume keeps its own settings.

    Raises ValueError for settings that do not fit together or a folder with another run, and FileNotFoundError if there
    is no checkpoint to start from.
    """
    settings = Settings.from_flat(with_defaults(flags), model)
    folder = settings.folder
    clean_partial(folder)
    if was_restarted(folder):
        # --resume-from was followed before the restart. A run without a checkpoint starts from scratch.
        flags = {**flags, "resume": (folder / "last").exists(), "resume_from": ""}
        settings = settings.replace(resume=flags["resume"], resume_from="")
    elif any(folder.glob("step_*")) and not settings.run.resume:  # without a checkpoint there is nothing to lose
        raise ValueError(f"{folder} already contains a run; continue it with --resume, or choose another --name or "
                         "--out")
    if settings.run.resume:
        return resumed_settings(settings, flags, model)
    if settings.run.recipe and "data" not in flags:
        name = RECIPES[settings.run.recipe].data or "cc3m"
        raise ValueError(f"recipe={settings.run.recipe!r} needs its data: write it with python -m mplug2.data "
                         f"{name} ROOT --out DIR, and add --data DIR")
    if settings.run.recipe and settings.data.task != "pretrain" and not {"init", "preset"} & set(flags):
        raise ValueError(f"recipe={settings.run.recipe!r} fine-tunes a checkpoint: add --init CHECKPOINT (or --preset, "
                         "to train from scratch)")
    if settings.run.init and "preset" in flags:
        raise ValueError(f"preset={settings.run.preset!r} with init={settings.run.init!r}: the model's sizes come from "
                         "the checkpoint; leave --preset out")
    if settings.run.reinit and not settings.run.init:
        raise ValueError(f"reinit={settings.run.reinit!r} without a checkpoint: add --init CHECKPOINT")
    settings = with_form(settings)
    settings.model_config()  # refuses impossible sizes, and a folder that is not a checkpoint
    return settings


def resumed_settings(given: Settings, flags: dict[str, Any], model: dict[str, Any]) -> Settings:
    """The settings that the run was started with, except for the flags that may change."""
    folder = given.folder
    if not (folder / "last").exists():
        raise FileNotFoundError(f"{folder} has no checkpoint to resume from; start it without --resume")
    if not given.checkpoint.is_dir():
        raise FileNotFoundError(f"{folder} has no checkpoint {given.run.resume_from}; it has "
                                f"{', '.join(sorted(path.name for path in folder.glob('step_*')))}")
    saved, saved_model = read_settings(folder)
    before = saved.flat()
    asked = given.flat()
    refused = [name for name in flags if name not in MAY_CHANGE and asked[name] != before[name]]
    refused += [name for name, value in model.items() if value != saved_model.get(name)]
    if refused:
        raise ValueError(f"{', '.join(refused)}: a resumed run keeps its settings ({folder / 'settings.json'}); leave "
                         "these flags out, or start another run with --init and --name")
    changes = {name: value for name, value in flags.items() if name in MAY_CHANGE}
    # Where the run lies now, even if its folder was moved, and no older --resume-from.
    return saved.replace(**{**changes, "out": given.run.out, "name": given.run.name,
                            "resume_from": given.run.resume_from})


def was_restarted(folder: Path) -> bool:
    """Whether torchrun (after a rank failed) or Slurm (after a node failed) started this run before."""
    if not (folder / "settings.json").exists():
        return False
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    same = launch != "none" and launch == read_json_object(folder / "settings.json").get("launch")
    return same or any(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def read_settings(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings in the settings.json of a run, and those of its model. ValueError if they cannot be read."""
    file = folder / "settings.json"
    contents = read_json_object(file)
    values, model = contents.get("train"), contents.get("model")
    if not isinstance(values, dict) or not isinstance(model, dict):
        raise ValueError(f"{file}: expected the settings of a run, with the parts 'train' and 'model'")
    values = {name: value for name, value in values.items() if name not in NO_LONGER_SETTINGS}
    if "warmup" in values:  # before the fields were renamed
        values = {OLD_NAMES.get(name, name): value for name, value in values.items()}
        values["epochs"] = values.get("epochs") or None
    try:
        return Settings.from_flat(values), model
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def write_settings(settings: Settings, arguments: list[str], **more: Any) -> None:
    """Write settings.json of the run: all settings, the commands so far, and whatever else (`more`) describes the run.

    ValueError if the folder cannot be created.
    """
    file = settings.folder / "settings.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {file.parent} cannot be created ({error.strerror}): choose another one with --out"
                         ) from error
    commands = read_json_object(file).get("commands", []) if file.exists() else []
    contents = {
        "train": settings.flat(), **more, "launch": os.environ.get("TORCHELASTIC_RUN_ID", "none"),
        "torch": torch.__version__, "commands": list(dict.fromkeys([*commands, command_line(arguments)])),
    }
    part = file.with_suffix(".part")  # a run that is killed here keeps the file before
    part.write_text(json.dumps(contents, indent=2) + "\n")
    os.replace(part, file)


def command_line(arguments: list[str]) -> str:
    """The command that started this run, to be typed again."""
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = ["--nnodes", str(world // local)] if world > local else []
    processes = ["--nproc-per-node", str(local)] if local > 1 else []
    launcher = ["torchrun", *nodes, *processes] if "WORLD_SIZE" in os.environ else ["python"]
    return shlex.join([*launcher, "train.py", *map(str, arguments)])
