"""Train mPLUG-2. By default: pre-training of the tiny preset on the tiny world, in minutes, on a laptop's CPU.

    torchrun train.py                                  # or: python train.py
    torchrun train.py --max-steps 20                   # a smoke run, within a minute
    torchrun --nproc-per-node 8 train.py --preset base --data DIR --name web
    torchrun train.py --task video_qa --init runs/tiny/last     # fine-tuning of a task, into runs/video_qa/
    torchrun train.py --resume                         # go on where runs/tiny/last stopped

It writes runs/tiny/: settings.json, metrics.jsonl, curves.png, report.html (all of it on one page) and checkpoints, of
which `last` is the newest. Then

    python eval.py --checkpoint runs/tiny/last

prints what was learned. All flags: python train.py --help
"""

import copy
import dataclasses
import functools
import json
import math
import os
import random
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

import tiny_data
from mplug2 import distributed
from mplug2.checkpoint import PreprocessConfig, load_model
from mplug2.config import PRESETS
from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.build import DataSettings
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
from mplug2.tasks import BATCH_TYPES, INSTRUCTIONS, PROMPTS, parse_tasks
from mplug2.tools.memory_plan import cost, workload
from mplug2.tools.plots import draw_curves
from mplug2.tools.report import write_report
from mplug2.training import optim
from mplug2.training.fault_tolerance import GracefulStop, Watchdog, generator_states, set_generator_states
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
from mplug2.training.run_checkpoint import (
    extra_state,
    load_extra_state,
    load_training,
    save_checkpoint,
    unsharded_copy,
    update_symlink,
)
from mplug2.training.settings import (
    Settings,
    default_values,
    resolve_settings,
    run_flags,
    settings_parser,
    write_settings,
)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    # ---- settings: all of them known, and refused if they do not fit, before any work starts
    parser = settings_parser(__doc__, "train.py")
    given = parser.read(arguments, default_values)
    try:
        settings = resolve_settings(run_flags(given), given["ModelConfig"])
        process = distributed.init_distributed(settings.parallel.device)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    try:
        return run(settings, process, command_line(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that may not be written to
        if process.is_main or not isinstance(error, distributed.AllRanksError):
            print(f"\ntrain.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        distributed.shutdown()


def command_line(arguments: list[str]) -> str:
    """The command of this run, as one would type it again."""
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = ["--nnodes", str(world // local)] if world > local else []
    processes = ["--nproc-per-node", str(local)] if local > 1 else []
    launcher = ["torchrun", *nodes, *processes] if "WORLD_SIZE" in os.environ else ["python"]
    return shlex.join([*launcher, "train.py", *map(str, arguments)])


def run(settings: Settings, process: distributed.DistInfo, command: str) -> dict[str, float]:
    started = time.time()
    folder = settings.folder
    settings.data.micro_batch_size(process.world_size)  # refuses what cannot be shared
    random.seed(settings.run.seed)
    np.random.seed(settings.run.seed)
    torch.manual_seed(settings.run.seed)  # the same weights on every process

    # ---- data: a stream for each kind of batch and each source
    if not settings.data.data:
        if process.is_main:
            print("the tiny world: written to a cache when first used, in seconds", flush=True)
        distributed.run_on_main(tiny_data.ensure, process)
    roots = read_sources(settings.data.data) if settings.data.data else {tiny_data.ensure(): 1.0}
    samples, shards, weights = read_streams(settings.data, roots)
    root = Path(settings.data.eval_data) if settings.data.eval_data else next(
        (root for root in roots if not is_shards(root)), None)
    merged: dict[str, list[Sample]] = {}
    for stream, of_stream in samples.items():
        merged.setdefault(stream_kind(stream), []).extend(of_stream)
    if settings.data.epochs:
        texts = sum(max(len(sample.captions), math.ceil(len(sample.qa) / settings.data.questions_per_sample), 1)
                    for of_kind in merged.values() for sample in of_kind)
        texts += sum(map(len, shards.values()))
        steps = max(1, math.ceil(settings.data.epochs * texts / settings.data.batch_size))
        settings = settings.replace(max_steps=steps, epochs=None)  # what is saved, and resumed
    classes = read_classes(merged)

    # ---- model and tokenizer
    checkpoint = folder / (settings.run.resume_from or "last")
    resumed = load_training(checkpoint) if settings.run.resume else None
    if settings.run.resume or settings.run.init:
        model, tokenizer, saved = (
            load_model(checkpoint, settings.data.task, settings.model) if settings.run.resume
            else load_model(settings.run.init, settings.data.task, settings.model, classes)
        )
        if model.newly_initialized and process.is_main:
            print(f"not in {settings.run.init}, and therefore trained from scratch: "
                  f"{', '.join(model.newly_initialized)}")
        if saved.frames != settings.data.frames and process.is_main:
            print(f"frames: trained with {saved.frames} a clip so far, now {settings.data.frames}")
    else:
        tokenizer = make_tokenizer(settings, samples)
        model = MPLUG2(PRESETS[settings.run.preset](
            **{**settings.model, "vocab_size": len(tokenizer)}), settings.data.task, classes)
    check_texts(merged, tokenizer, model.config.max_positions, settings.data.max_words)
    preprocess = PreprocessConfig(settings.data.frames, settings.data.max_words)
    optim.freeze(model.train(), settings.optimizer.freeze.split(",") if settings.optimizer.freeze else [])
    if settings.parallel.activation_checkpointing:
        checkpoint_activations(model)
    if settings.parallel.compile:
        compile_model(model)
    ema_teacher, self_critical = None, None
    if settings.loss.distill_weight:
        epoch = math.ceil(sum(map(len, [*samples.values(), *shards.values()])) / settings.data.batch_size)
        ema_teacher = EMATeacher(
    model,
    settings.loss.ema_decay,
    settings.loss.distill_weight,
    epoch,
     settings.loss.queue_size)
    if settings.loss.self_critical:
        self_critical = SelfCritical(tokenizer, [
            [clean(caption, settings.data.max_words) for caption in sample.captions]
            for kind, of_kind in merged.items() if "prompted" in BATCH_TYPES[kind].fields for sample in of_kind
            if sample.captions
        ])
    objectives = Objectives(model, ema_teacher, self_critical)
    parallel = wrap_model(objectives, process, settings.parallel, Block)
    optimizer = optim.make_optimizer(model, settings.optimizer)
    split_param_groups(optimizer)
    first_step = resumed["step"] if resumed else 0
    torch.manual_seed(settings.run.seed + process.rank)  # but dropout and negatives of its own
    if resumed:
        load_optimizer_state(optimizer, model, resumed["optimizer"])
        load_extra_state(objectives, resumed["objectives"])
        if len(resumed["generators"]) == process.world_size:
            set_generator_states(resumed["generators"][process.rank], process.device)
        else:  # no process is any of the old ones
            torch.manual_seed(int(np.random.default_rng((settings.run.seed, first_step, process.rank)).integers(2**63)))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    dataset = Samples(
    samples,
    model.config.image_size,
    settings.data.frames,
    settings.data.questions_per_sample,
    model.config.max_positions,
    settings.data.max_words,
    settings.run.seed,
    None if settings.data.augment == "none" else Augmentation(
        settings.data.augment,
        settings.data.hflip),
         )
    sizes = {stream: len(of_stream) for stream, of_stream in {**samples, **shards}.items()}
    batches = MixedBatches(
    sizes,
    weights,
    settings.data.batch_size,
    settings.data.max_steps,
    settings.run.seed,
    first_step,
    process.rank,
    process.world_size,
    settings.data.accumulation_steps,
     )
    collate, pin = Collate(tokenizer, model.classes), process.device.type == "cuda"
    positions = ReaderState(
        shards, process.world_size * max(1, settings.data.workers), settings.data.shuffle_buffer, settings.run.seed,
        resumed["positions"] if resumed else {},
    )
    if shards:
        loader = stream_batches(
    dataset,
    shards,
    batches,
    collate,
    positions,
    settings.data.max_words,
    settings.data.workers,
     pin)
    else:
        loader = make_loader(dataset, batches, collate, settings.data.workers, pin)

    def start_folder() -> None:
        count = sum(parameter.numel() for parameter in model.parameters())
        write_settings(
            settings, model=dataclasses.asdict(model.config), command=command,
            data={str(root): weight for root, weight in roots.items()}, parameters=count,
            processes=process.world_size, torch=torch.__version__,
        )
        counts = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
        print(f"{settings.data.task}: {count:,} parameters, vocabulary {len(tokenizer)}, samples: {counts}, "
              f"{process.device}"
              + (f" x {process.world_size}, {settings.parallel.parallel}" if process.world_size > 1 else ""))

    distributed.run_on_main(start_folder, process)
    peak = settings.run.peak_tflops or peak_tflops(process.device)
    log = Log(folder, process, first_step, settings.data.max_steps, peak)
    work = workload(settings, model.config, process.world_size)
    flops = functools.cache(lambda kind: cost(work, kind).flops if peak else 0.0)

    def unsharded() -> MPLUG2 | None:
        """The model in one piece; if it is sharded, only on the main process, None on others. All have to call it."""
        return unsharded_copy(model, process) if settings.parallel.parallel == "fsdp" else model

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
            folder, f"step_{step:07d}", one, tokenizer, preprocess, training, settings.run.keep_checkpoints, score
        ), process)

    # ---- the loop
    if settings.run.resume_from:
        distributed.run_on_main(lambda: update_symlink(folder / "last", settings.run.resume_from), process)
    log.nonfinite_steps = resumed["nonfinite_steps"] if resumed else 0
    in_a_row = 0
    with GracefulStop() as stop, Watchdog(process, settings.run.timeout) as watchdog:
        coming = iter(loader) if settings.data.workers else prefetch(loader)
        for step in range(first_step, settings.data.max_steps):
            optim.set_lr(optimizer, settings.optimizer, step, settings.data.max_steps)
            sources, operations, means = [], 0.0, {}
            for micro in range(settings.data.accumulation_steps):
                watchdog.heartbeat(step, "waiting for data", names=functools.partial(
                    batch_names, batches, dataset, step))
                asked = time.time()
                batch = next(coming)
                log.waited(time.time() - asked)
                log.skipped(batch["errors"], sum(sizes.values()), settings.data.max_skipped)
                positions.advance(batch)
                sources += batch["source"]
                watchdog.heartbeat(step, "in a step", names=functools.partial(", ".join, batch["source"]))
                batch = {name: value.to(process.device, non_blocking=True) if torch.is_tensor(value) else value
                         for name, value in batch.items()}
                with no_sync(parallel, last=micro == settings.data.accumulation_steps - 1):
                    with torch.autocast(process.device.type, torch.bfloat16, enabled=settings.parallel.low_precision):
                        losses = parallel(batch)
                        loss = settings.loss.total(losses)
                    (loss / settings.data.accumulation_steps).backward()
                losses = {"loss": loss, **{f"loss/{name}": value for name, value in losses.items()}}
                for name, value in losses.items():
                    means[name] = means.get(name, 0.0) + value.detach() / settings.data.accumulation_steps
                operations += flops(batch["kind"])
            all_reduce_replicated_grads(parallel)
            norm = clip_grad_norm(parameters, settings.optimizer.clip_grad)

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
                if in_a_row == settings.run.max_nonfinite:
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
            if done % settings.run.log_every == 0 or done == settings.data.max_steps:
                rates = [group["lr"] for group in optimizer.param_groups]
                log.write(done, {"lr": max(rates), "lr_lowest": min(rates)})
            if done % settings.run.eval_every == 0 and root:
                watchdog.heartbeat(done, "validating", patience=10)
                one = unsharded()
                if process.is_main:
                    predictor = Predictor(one.to(process.device), tokenizer, preprocess)
                    found = validate(
    predictor, root, "val", parse_tasks(
        settings.data.task), settings.run.eval_limit, done, log)
                    score = mean_score(found)
                distributed.barrier()
            if done % settings.run.save_every == 0 or done == settings.data.max_steps or leave:
                save(done, score)
                if process.is_main:
                    draw_curves(folder / "metrics.jsonl", folder / "curves.png")
            if leave:
                break
        del coming
    log.close()
    if first_step < settings.data.max_steps and leave:
        if process.is_main:
            print(
    f"{stop.name or 'another process got a signal'}: saved after step {done} of {settings.data.max_steps}; "
    f"--resume goes on from {folder / 'last'}")
        return {}

    # ---- what was learned
    results: dict[str, float] = {}
    one = unsharded()
    if process.is_main and root:
        split = "test" if any("test" in splits for splits in available(root).values()) else "val"
        predictor = Predictor(one.to(process.device), tokenizer, preprocess)
        results = validate(predictor, root, split, parse_tasks(settings.data.task), None, settings.data.max_steps, log)
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
    config: DataSettings, roots: dict[Path, float]
) -> tuple[dict[str, list[Sample]], dict[str, ShardSet], dict[str, float]]:
    """The samples and the shards of each stream, and the share of the steps that each stream has.

    A stream is named after its kind ("video"), and from the second source on after that, too ("video@1").
    """
    samples: dict[str, list[Sample]] = {}
    shards: dict[str, ShardSet] = {}
    weights: dict[str, float] = {}
    of_kind, found = config.batch_weights(), set()
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


def make_tokenizer(settings: Settings, samples: dict) -> Tokenizer:
    """The tokenizer that was asked for, or a vocabulary trained on the texts of the training samples."""
    if settings.data.tokenizer:
        return Tokenizer.load(settings.data.tokenizer)
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
    size = settings.model_config().vocab_size
    return Tokenizer.train((clean(text, settings.data.max_words) for text in texts), size)


def validate(
    predictor: Predictor, root: Path, split: str, tasks: list[str], limit: int | None, step: int, log: Log
) -> dict[str, float]:
    """Evaluate on a split, if the data has it, and write what was found to metrics.jsonl: after pre-training all that
    the model can do, else the tasks that are trained. The predictions go to predictions.jsonl, and all of it to
    report.html."""
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
