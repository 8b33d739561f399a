"""Train mPLUG-2. By default this pre-trains the tiny preset on the tiny world, in minutes, on a laptop's CPU.

    torchrun train.py                                  # or: python train.py
    torchrun train.py --max-steps 20                   # a smoke test, within a minute
    torchrun --nproc-per-node 2 train.py               # two ranks share each batch; docs/scaling.md has large runs
    torchrun train.py --task video_qa --init runs/tiny/last     # fine-tune on a task, in runs/video_qa/
    torchrun train.py --resume                         # continue runs/tiny/ from its newest checkpoint

A run writes runs/tiny/: settings.json, metrics.jsonl, curves.png, report.html (the run on one page) and checkpoints.
`last` is the newest checkpoint, `best` the one with the best validation. At the end it prints a table of results, and

    python eval.py --checkpoint runs/tiny/last

evaluates every split.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mplug2 import distributed
from mplug2.checkpoint import PreprocessConfig, checkpoint_classes, load_model
from mplug2.comma_list import comma_list
from mplug2.data.build import TrainingData, build_data
from mplug2.data.records import available
from mplug2.data.text import Tokenizer
from mplug2.distributed import DistInfo
from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.evaluate import EvalResult, evaluate
from mplug2.evaluation.metric_names import format_table, main_score
from mplug2.evaluation.results import describe_skipped, flat_errors, flat_metrics, write_predictions
from mplug2.flags import warning_only
from mplug2.inference import Inference, Stopped
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.build import build_objectives
from mplug2.predictor import Predictor
from mplug2.tasks import parse_tasks
from mplug2.tools.memory_plan import step_flops
from mplug2.tools.plots import draw_curves
from mplug2.tools.report import write_report
from mplug2.training.cpu_threads import CPUThreads, matrix_rate
from mplug2.training.fault_tolerance import GracefulStop, Watchdog, seed_generators
from mplug2.training.logs import Log, peak_tflops
from mplug2.training.optim import freeze, make_optimizer, set_lr
from mplug2.training.parallel import (
    all_reduce_replicated_grads,
    checkpoint_activations,
    clip_grad_norm,
    compile_model,
    gathered,
    no_sync,
    unsharded_copy,
    wrap_model,
)
from mplug2.training.run_checkpoint import (
    BackgroundSave,
    SaveSchedule,
    is_best,
    load_training,
    partial_folder,
    record_score,
    save_checkpoint,
    update_symlink,
)
from mplug2.training.settings import Settings, parse_settings, write_settings
from mplug2.training.state import TrainState

MAX_NONFINITE = 5
"""A run stops after this number of steps in a row whose loss or gradient is not finite; each of them is skipped."""


def main(arguments: list[str] | None = None, model_class: Callable[..., MPLUG2] = MPLUG2) -> dict[str, float]:
    """Train as the command line says. Returns the results of the evaluation at the end.

    `model_class` is a hook for experiments: it gets the arguments of MPLUG2 and returns the model that a run trains
    from scratch (notebooks/ablations.py has examples).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, process = parse_settings(__doc__, "train.py", arguments), None
    try:
        process = distributed.init_distributed(settings.parallel.device)
        with Watchdog(process, settings.run.timeout) as watchdog:
            return Trainer(settings, process, arguments, watchdog, model_class).train()
    except (ValueError, OSError) as error:  # OSError: a full disk, for example, or a folder without write permission
        if distributed.first_to_report(error):
            print(f"\ntrain.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        distributed.shutdown()


class Trainer:
    """A run: the data, the model and its losses, the optimizer, and the loop over the steps."""

    def __init__(self, settings: Settings, process: DistInfo, arguments: list[str], watchdog: Watchdog,
                 model_class: Callable[..., MPLUG2]):
        self.process, self.folder, self.started = process, settings.folder, time.time()
        self.watchdog, self.stop, self.saving = watchdog, GracefulStop(), BackgroundSave()
        self.save_schedule = SaveSchedule(settings.run.save_every)
        self.threads = CPUThreads(process.device, settings.parallel.compile)
        seed_generators(settings.run.seed)  # the same initial weights on every rank
        checkpoint, resume = settings.checkpoint, settings.run.resume
        saved = load_training(checkpoint) if resume else None
        self.data = build_data(
            settings.data, settings.model_config(), process, settings.run.seed,
            tokenizer=Tokenizer.load(checkpoint) if checkpoint else None,
            classes=checkpoint_classes(checkpoint) if resume else None,
        )
        self.settings = settings = settings.replace(
            max_steps=self.data.steps, epochs=None, workers=self.data.settings.workers)

        self.model = build_model(settings, self.data, process, model_class)
        self.objectives = build_objectives(self.model, settings.loss, self.data)
        self.wrapped = wrap_model(self.objectives, process, settings.parallel)
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        torch.manual_seed(settings.run.seed + process.rank)  # dropout and hard negatives differ between ranks
        self.state = TrainState(self.objectives, self.optimizer, self.data, process)
        if resume:
            self.state.load_state_dict(saved)
        distributed.run_on_main(partial(self.start_folder, arguments), process)
        peak = peak_tflops(process.device, settings.parallel.low_precision)
        self.log = Log(self.folder, process, self.state.step, self.data.steps, peak,
                       step_flops(settings, self.model.config, process.world_size))
        max_length = min(self.data.longest_text(), self.model.config.max_positions)
        self.preprocess = PreprocessConfig(settings.data.frames, settings.data.max_words, max_length)

    def train(self) -> dict[str, float]:
        """Take all steps that are left, then evaluate. A run that is asked to stop saves, and returns no results."""
        run, steps, stopping = self.settings.run, self.data.steps, False
        with self.stop, self.saving:
            self.threads.choose()
            batches = iter(self.data)
            while self.state.step < steps and not stopping:
                set_lr(self.optimizer, self.settings.optimizer, self.state.step, steps)
                losses, sources, kinds = self.backward(batches)
                signaled = bool(self.stop.name) or self.saving.failed
                stopping, due = self.update(losses, sources, kinds, signaled)
                self.state.step = step = self.state.step + 1
                self.log.bar.update()

                if step % run.log_every == 0 or step == steps:
                    self.write_log()
                if saves := due or step == steps or stopping:
                    self.save()
                if step % run.eval_every == 0 and self.data.eval_root and not stopping:
                    self.keep_best(self.validate("val", run.eval_limit) or {}, saves)
            del batches  # ends the workers
            self.finish_saving()
            self.log.bar.close()
            results = {} if stopping else self.evaluate()
            if stopping and self.process.is_main:
                print(f"{self.stop.name or 'another rank got a signal'}: saved after step {step} of {steps}; continue "
                      f"with --resume from {self.folder / 'last'}")
            self.log.close()
        return results

    def backward(self, batches: Iterator[dict]) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Forward and backward passes of the micro-batches of a step. Gradients and losses are their means.

        Returns the losses, the sources of the samples on this rank, and the batch types of the micro-batches.
        """
        count, losses, sources, kinds = self.settings.data.accumulation_steps, {}, [], []
        for number in range(count):
            batch = self.next_batch(batches)
            low_precision = self.settings.parallel.low_precision
            with no_sync(self.wrapped, last=number == count - 1):  # ranks average the gradients once per step
                with torch.autocast(self.process.device.type, torch.bfloat16, enabled=low_precision):
                    by_name = self.wrapped(batch)
                    loss = self.settings.loss.total(by_name)
                (loss / count).backward()
            for name, value in {"loss": loss, **{f"loss/{name}": value for name, value in by_name.items()}}.items():
                losses[name] = losses.get(name, 0.0) + value.detach() / count
            sources += batch["source"]
            kinds.append(batch["kind"])
        return losses, sources, kinds

    def update(self, losses: dict[str, Tensor], sources: list[str], kinds: list[str], signaled: bool
               ) -> tuple[bool, bool]:
        """Update the weights, unless a loss or gradient is not finite on any rank: then every rank skips the step.

        Returns whether the run stops, because any rank is `signaled`, and whether a checkpoint is due.
        """
        state = self.state
        all_reduce_replicated_grads(self.wrapped)
        norm = clip_grad_norm(self.parameters, self.settings.optimizer.clip_grad)
        # This waits for the device, once per step: the weights may change only when the answer is known.
        finite, finite_norm = torch.stack([losses["loss"], norm.to(losses["loss"])]).isfinite().tolist()
        due = self.process.is_main and self.save_schedule.due(state.step + 1)  # by the clock of one process
        skip, stopping, due = distributed.any_rank(not (finite and finite_norm), signaled, due)
        if skip:
            state.nonfinite_steps += 1
            state.nonfinite_in_a_row += 1
            message = self.log.nonfinite(state.step, losses, norm, sources, finite)
            if state.nonfinite_in_a_row == MAX_NONFINITE:
                raise distributed.AllRanksError(
                    f"{MAX_NONFINITE} steps in a row were not finite; the last: {message}. Check these samples, lower "
                    "--lr, or resume from an older checkpoint")
        else:
            state.nonfinite_in_a_row = 0
            self.optimizer.step()
            self.log.step(losses, norm, len(sources) * self.process.world_size, kinds)
        self.objectives.after_step(skip)
        self.optimizer.zero_grad(set_to_none=True)
        return stopping, due

    def save(self) -> None:
        """Begin a checkpoint. The main process, and each rank that has shards, writes it while training continues."""
        self.finish_saving()
        self.save_schedule.restart()
        weights, training = gathered(self.model.state_dict(), self.process.is_main), self.state.state_dict()
        write_shards = self.state.write_shards()
        if self.process.is_main:
            self.saving.start(partial(
                save_checkpoint, self.folder, self.checkpoint_name, self.model, self.data.tokenizer, self.preprocess,
                training, self.settings.run.keep_checkpoints, self.data.recorded_roots, weights,
                write_shards))
            with warning_only("the plot of the curves"):
                draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        elif write_shards:
            self.saving.start(partial(write_shards, partial_folder(self.folder, self.checkpoint_name)))

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is written. If that failed, every rank raises AllRanksError."""
        self.watchdog.heartbeat(self.state.step, "saving", patience=10)
        distributed.run_on_main(self.saving.wait, self.process)
        self.saving.wait()  # the shards of this rank, which are complete when the main process is done

    def validate(self, split: str, limit: int = 0) -> dict[str, float] | None:
        """Evaluate on a split: the tasks that are trained, or after pre-training everything that the model can do.

        The ranks share the images and videos. The main process writes the metrics to metrics.jsonl, the predictions to
        predictions.jsonl, and report.html. Every rank returns the metrics, or None if the run is asked to stop.
        """
        def on_batch() -> bool:
            self.watchdog.heartbeat(self.state.step, "validating", patience=10)
            return bool(self.stop.name)

        on_batch()
        model, tasks = self.unsharded(), parse_tasks(self.settings.data.task)
        inference = Inference(
            workers=self.settings.data.workers, rank=self.process.rank, world_size=self.process.world_size,
            precision="bfloat16" if self.settings.parallel.low_precision else "float32", skip_unreadable=True,
            progress=True, on_batch=on_batch)
        predictor = Predictor(model.to(self.process.device).eval(), self.data.tokenizer, self.preprocess, inference)
        data, generator = EvalSplit(self.data.eval_root, split, limit), torch.get_rng_state()
        try:
            results = {split: evaluate(predictor, data, None if "pretrain" in tasks else tasks)}
            distributed.run_on_main(partial(self.write_results, results, predictor), self.process)
        except Stopped:
            return None
        finally:
            model.train()
            torch.set_rng_state(generator)
        return distributed.all_gather_object(results[split].metrics)[0]

    def write_results(self, results: dict[str, EvalResult], predictor: Predictor) -> None:
        """A line of metrics.jsonl, predictions.jsonl, report.html, and what was skipped."""
        if metrics := flat_metrics(results):
            self.log.line({"step": self.state.step, **metrics, "standard_errors": flat_errors(results)})
            write_predictions(self.folder / "predictions.jsonl", results)
        if skipped := describe_skipped(results):
            print(skipped, file=sys.stderr)
        predictor.inference = Inference()  # of the main process alone
        with warning_only("the report"):
            write_report(self.folder, predictor)

    def keep_best(self, metrics: dict[str, float], saved: bool) -> None:
        """Record the validation score of this step. The best step so far is saved, whatever --save-every says."""
        run = self.settings.run
        score = main_score(metrics, parse_tasks(self.settings.data.task), run.best_metric)
        if run.best_metric and metrics and score is None and self.process.is_main:
            print(f"warning: best_metric={run.best_metric!r} is not among the metrics of the validation: "
                  f"{', '.join(metrics)}", file=sys.stderr)
        better = score is not None and distributed.all_gather_object(is_best(self.folder, score))[0]
        if better and not saved:
            self.save()
        if score is not None and (saved or better):
            self.finish_saving()
            distributed.run_on_main(
                partial(record_score, self.folder, self.checkpoint_name, score, run.keep_checkpoints), self.process)

    def evaluate(self) -> dict[str, float]:
        """The evaluation at the end of a run, on the test split or, without one, on the validation split."""
        root, folder = self.data.eval_root, self.folder
        if not root:
            if self.process.is_main:
                with warning_only("the report"):
                    write_report(folder)
            return {}
        split = "test" if any("test" in splits for splits in available(root).values()) else "val"
        results = self.validate(split)
        if results is None and self.process.is_main:
            print(f"{self.stop.name or 'another rank got a signal'}: the training is complete, its evaluation is not; "
                  f"python eval.py --checkpoint {folder / 'last'}")
        elif self.process.is_main:
            with warning_only("the plot of the curves"):
                draw_curves(folder / "metrics.jsonl", folder / "curves.png")
            print(format_table({split: results}))
            print(f"{folder / 'report.html'}: this run on one page")
            minutes, cpu = (time.time() - self.started) / 60, self.process.device.type == "cpu"
            rate = f" (CPU threads: {torch.get_num_threads()}; {matrix_rate() / 1e9:.0f} GFLOP/s)" if cpu else ""
            print(f"{folder / 'last'}: {minutes:.1f} minutes in all{rate}; "
                  f"python eval.py --checkpoint {folder / 'last'} evaluates every split")
        return results or {}

    # ---- what the methods above use ----------------------------------------------------------------------------------

    @property
    def checkpoint_name(self) -> str:
        return f"step_{self.state.step:07d}"

    def unsharded(self) -> MPLUG2:
        """The model in one piece. Every rank has to call it."""
        return self.model if self.settings.parallel.parallel == "ddp" else unsharded_copy(self.model)

    def next_batch(self, batches: Iterator[dict]) -> dict:
        """The next micro-batch of this rank, on its device."""
        step = self.state.step
        self.watchdog.heartbeat(step, "waiting for data", names=partial(self.data.names_at, step))
        asked = time.time()
        batch = next(batches)
        self.log.waited(time.time() - asked)
        self.log.skipped_files(batch["errors"], sum(self.data.sizes.values()), self.settings.data.max_skipped)
        self.data.advance(batch)
        self.watchdog.heartbeat(step, "in a step", names=partial(", ".join, batch["source"]))
        return batch

    def write_log(self) -> None:
        """A line of metrics.jsonl: the means since the previous line. Then the CPU threads for the next steps."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.log.write(self.state.step, {
            "lr": max(rates), "lr_lowest": min(rates), "nonfinite_steps": self.state.nonfinite_steps,
            "threads": torch.get_num_threads(),
            **({"temperature": self.model.temperature.item()} if "contrastive" in self.model.components else {}),
        })
        self.threads.choose()

    def start_folder(self, arguments: list[str]) -> None:
        """Write settings.json, and print what is trained on what."""
        settings, data, ranks = self.settings, self.data, self.process.world_size
        count = sum(parameter.numel() for parameter in self.model.parameters())
        write_settings(
            settings, arguments, model=dataclasses.asdict(self.model.config), parameters=count, processes=ranks,
            data={str(root): weight for root, weight in data.roots.items()},
        )
        if settings.run.resume_from:  # checkpoints of later steps will be written again
            update_symlink(self.folder / "last", settings.run.resume_from)
        counts = ", ".join(f"{size:,} {stream}" for stream, size in data.sizes.items())
        config, source = self.model.config, settings.run.init or f"preset {settings.run.preset}"
        print(f"{settings.data.task}: {source}, {config.image_size} pixels, {settings.data.frames} frames, "
              f"{count:,} parameters, vocabulary {len(data.tokenizer)}, samples: {counts}, "
              f"{self.process.device}" + (f" x {ranks}, {settings.parallel.parallel}" if ranks > 1 else ""))


def build_model(
    settings: Settings, data: TrainingData, process: DistInfo, model_class: Callable[..., MPLUG2]
) -> MPLUG2:
    """The model in training mode: with new weights, or with those of the checkpoint that the run starts from.

    If it will be sharded, only the main process has the weights: on the others the model is on the meta device.
    """
    checkpoint, task = settings.checkpoint, settings.data.task
    sharded = settings.parallel.parallel != "ddp"
    if checkpoint and model_class is not MPLUG2:
        raise ValueError("a model of another class starts from scratch: leave out --init and --resume")
    if checkpoint:
        classes = None if settings.run.resume else data.classes  # other classes get a new head
        reinit = () if settings.run.resume or not settings.run.reinit else comma_list("reinit", settings.run.reinit)
        load, loaded = partial(load_model, checkpoint, task, settings.model, classes, reinit), []
        if sharded:  # all ranks raise the errors of the main process
            distributed.run_on_main(lambda: loaded.append(load()), process)
        model, _, trained = loaded[0] if loaded else load(with_weights=not sharded)
        if process.is_main and model.newly_initialized:
            names = model.newly_initialized
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            print(f"not from {checkpoint}, so trained from scratch: {', '.join(names[:8])}{more}")
        if trained.frames != settings.data.frames and process.is_main:
            print(f"frames: {checkpoint} was trained with {trained.frames} frames, this run has {settings.data.frames}")
    else:
        config = dataclasses.replace(settings.model_config(), vocab_size=len(data.tokenizer))
        with torch.device("meta" if sharded and not process.is_main else "cpu"):
            model = model_class(config, task, data.classes)
    freeze(model.train(), comma_list("freeze", settings.optimizer.freeze) if settings.optimizer.freeze else [])
    if settings.parallel.activation_checkpointing:
        checkpoint_activations(model)
    if settings.parallel.compile:
        compile_model(model)
    return model


if __name__ == "__main__":
    main()
