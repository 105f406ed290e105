"""The training loop: trains a model from settings and writes the folder of a run."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from free_transformer.data import Rows
from free_transformer.data.rows import Batch
from free_transformer.distributed.processes import Processes, join_processes
from free_transformer.errors import RunError
from free_transformer.evaluation.likelihood import evaluate_likelihood
from free_transformer.evaluation.usage import collapse_warning
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runs.monitor import VALIDATION_SAMPLES, Monitor
from free_transformer.runs.run import Run
from free_transformer.settings import Settings, SettingsError
from free_transformer.settings.curriculum import Stage, stage_at, stages_of
from free_transformer.training.batches import training_batches
from free_transformer.training.checkpoint import TrainState, list_checkpoints
from free_transformer.training.evaluation_mode import evaluation_mode, generate_sample
from free_transformer.training.finish import gather_prior, load_best_weights, write_model
from free_transformer.training.metrics import MetricAccumulator, ReducedMetrics
from free_transformer.training.optimizers import set_learning_rate
from free_transformer.training.signals import StopRequest, TrainingStopped, listen_for_stop
from free_transformer.training.start import PreparedRun, prepare, say_finished
from free_transformer.training.step import agree_on_step, apply_gradients, autocast, compute_gradients, with_layout

MIN_LOSS_SCALE = 1.0  # for fp16; below it, gradients are NaN or infinite for another reason


class TrainingFailed(RunError):
    """A run that cannot continue, such as one whose loss is NaN."""


def train(
    settings: Settings, quiet: bool = False, allow_change: Sequence[str] = (), warnings: Sequence[str] = ()
) -> Run:
    """
    Trains a model, resuming from the newest checkpoint in `run_dir` if there is one, and writes `model/` at the end.

    Under `torchrun` the processes share the work according to `settings.distributed`. All of them must see `run_dir`.

    Args:
        quiet: print nothing.
        allow_change: settings, such as `data.train`, that may differ from those of the resumed run even if the run
            then continues on other text; `all` allows every change.
        warnings: additional warnings to show when the run starts.

    Raises:
        SettingsError: if data or settings cannot be used, the folder is in use or contains something else, or the run
            cannot be resumed with these settings. Nothing is written in these cases.
        TrainingFailed: if the loss is NaN or infinite. The last checkpoint is not changed.
        TrainingStopped: after Ctrl-C or a termination signal, once the state is saved.
        CheckpointFailed: if a checkpoint cannot be written, for example because the disk is full.
        ProcessLost: if another process has ended or does not respond.
    """
    with join_processes(settings.distributed, settings.training.device) as processes:
        run = Run(settings.run_dir)
        quiet = quiet or not processes.main
        with _claimed(run, processes):
            prepared = prepare(settings, run, processes, allow_change, quiet)
            prepared.warnings += warnings
            _train(prepared, quiet)
        return run


@contextlib.contextmanager
def _claimed(run: Run, processes: Processes) -> Iterator[None]:
    """Claims the run's folder in the main process, on behalf of all processes."""
    with contextlib.ExitStack() as claim:
        problem = None
        if processes.main:
            try:
                claim.enter_context(run.claimed())
            except SettingsError as error:
                problem = error
        if processes.all_reduce_max(problem is not None) != [0]:
            raise problem or SettingsError(f"{run.path}: the main process cannot use this folder")
        yield


def _train(prepared: PreparedRun, quiet: bool) -> None:
    run, state, processes, monitor = prepared.run, prepared.state, prepared.processes, prepared.monitor
    if prepared.is_finished:
        if not quiet:
            say_finished(run, state.step, prepared.checkpoints.changes)
        return
    if processes.main and monitor.should_continue(state.step):
        prepared.record()
    processes.barrier()
    if processes.main:
        monitor.subscribers += prepared.subscribers(quiet)
    with contextlib.closing(monitor):
        monitor.start(prepared.describe())
        trainer = _Trainer(prepared)
        with listen_for_stop(quiet) as trainer.stop:
            trainer.train()
    monitor.message(f"trained: {run.path}")


@dataclass
class _Trainer:
    prepared: PreparedRun
    stop: StopRequest = field(default_factory=StopRequest)
    stage: Stage | None = None
    batches: Iterator[Batch] = field(default_factory=lambda: iter(()))
    last_batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings, self.run, self.processes = self.prepared.settings, self.prepared.run, self.prepared.processes
        self.checkpoints = self.prepared.checkpoints
        self.stages = stages_of(self.settings)
        rows = self.prepared.validation
        self.validation = None if rows is None else rows.sample(self.settings.evaluation.rows)

    @property
    def state(self) -> TrainState:
        return self.prepared.state

    @property
    def monitor(self) -> Monitor:
        return self.prepared.monitor

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def train(self) -> None:
        """Trains to the last step and writes `model/`."""
        training, state = self.settings.training, self.state
        metrics = MetricAccumulator()
        while self.monitor.should_continue(state.step):
            self._enter_stage()
            rate = set_learning_rate(state.optimizers, state.step, self.settings)
            stop = self._optimizer_step(metrics)
            state.step += 1
            last = state.step == training.max_steps
            validating = _is_due(state.step, training.eval_every, last)
            saving = last or _is_due(state.step, training.save_every, last) or stop > 0
            logging = (
                saving
                or _is_due(state.step, training.log_every, self._ends_stage())
                or (validating and self.settings.keeps_best)
            )
            if metrics.steps and logging:  # before saving, so that a checkpoint never contains non-finite losses
                self._log(metrics, rate)
                metrics = MetricAccumulator()
            if validating:
                self._validate(self.validation)
                saving |= self.monitor.is_best(state.step) or not self.monitor.should_continue(state.step)
            if _is_due(state.step, self.settings.logging.sample_every, last):
                self._sample()
            if saving:
                self._save()
            if stop and not last:
                self._end_early(stop)
        self.checkpoints.wait()
        self._finish()

    def _enter_stage(self) -> None:
        """Opens the text of this step's stage, unless the previous stage reads the same rows."""
        state, stage = self.state, stage_at(self.stages, self.state.step)
        if stage is self.stage:
            return
        before = self.stages[stage.number - 2] if stage.number > 1 else None
        if state.step == stage.start and before is not None and not stage.reads_as(before):
            state.stage_rows = state.rows
        if self.stage is None or not stage.reads_as(self.stage):
            data, start = self.prepared.training_data[stage.number - 1], state.rows - state.stage_rows
            tokenizer = self.prepared.tokenizer
            self.batches = training_batches(data, stage, tokenizer, self.settings, self.processes, start)
        self.stage = stage
        self.monitor.stage(stage, len(self.stages))

    def _ends_stage(self) -> bool:
        return self.stage is not None and self.state.step == self.stage.end

    def _optimizer_step(self, metrics: MetricAccumulator) -> int:
        """
        Runs one step over all micro-batches. Each loss is divided by the number of predicted tokens in all of them.

        Returns:
            the signal that requested a process to stop, or 0. Other processes receive it in the next step.
        """
        training, state, processes = self.settings.training, self.state, self.processes
        micro = [next(self.batches) for _ in self.stop.checked(range(training.gradient_accumulation_steps))]
        inputs = [with_layout(state.model, batch) for batch in micro]
        shared = agree_on_step(processes, state.model, inputs, self.stop.signal)
        weights, check = self._scheduled_weights(), self.stop.check
        of_step = compute_gradients(state, inputs, shared.tokens, weights, training, processes, check, shared.places)
        if self._is_usable(of_step):
            apply_gradients(state)
            metrics.extend(of_step)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        self.last_batches = micro
        assert self.stage is not None
        state.rows += len(micro) * self.stage.batch_size
        return self.stop.signal if processes.size == 1 else shared.signal

    def _is_usable(self, of_step: MetricAccumulator) -> bool:
        """Whether to apply the gradients. A skipped step is recorded, and too many of them end the run."""
        training, scaler = self.settings.training, self.state.scaler
        if scaler.is_enabled() and of_step.has_finite_losses() and not of_step.has_finite_gradients():
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())  # until the gradients fit into fp16
            if scaler.get_scale() >= MIN_LOSS_SCALE:
                return False
        elif training.nonfinite == "stop":  # checked by `_log`, for all steps since the last line of metrics
            return True
        finite = of_step.has_finite_losses() and of_step.has_finite_gradients()
        if self.processes.all_reduce_max(not finite) == [0]:
            return True
        self.state.skipped += 1
        step = self.state.step + 1
        if self.state.skipped > training.max_skipped or training.nonfinite == "stop":
            raise TrainingFailed(
                f"{self.state.skipped} steps up to step {step} had a loss or gradient that is NaN or infinite, more "
                f"than training.max_skipped={training.max_skipped}: {self._advice()}"
            )
        self.monitor.record(step, "skipped", {})
        self.monitor.message(f"step {step} is skipped: its loss or gradient is NaN or infinite", "warning")
        return False

    def _scheduled_weights(self) -> dict[str, Tensor]:
        """Returns the weights as tensors, because each new number would trigger another compilation."""
        if self.settings.model.kind == "baseline":
            return {}
        weights = stage_at(self.stages, self.state.step).weights(self.settings, self.state.step)
        return {
            name: torch.full((), value, device=self.device) for name, value in weights.items()
        }  # avoids a copy to the GPU

    def _log(self, accumulated: MetricAccumulator, rate: float) -> None:
        metrics = accumulated.reduce(self.processes)
        self._check_finite(metrics)
        values = {**metrics.values(), "lr": rate}
        values["spikes"] = self.monitor.count_spikes(metrics.per_step("loss").tolist(), metrics.gradient_norm.tolist())
        if len(self.stages) > 1 and self.stage is not None:
            values["stage"] = self.stage.number
        if self.state.scaler.is_enabled():
            values["loss_scale"] = self.state.scaler.get_scale()
        self.monitor.record(self.state.step, "train", values)

    def _check_finite(self, metrics: ReducedMetrics) -> None:
        """Raises `TrainingFailed` with the first step whose loss or gradient is NaN or infinite, and its rows."""
        if (found := metrics.first_nonfinite()) is None:
            return
        assert self.stage is not None
        offset, micro, what = found
        step = self.state.step - len(metrics.gradient_norm) + offset + 1
        read = self.state.rows - self.state.stage_rows
        row = read - (len(metrics.losses["loss"]) - micro) * self.stage.batch_size
        where, data = f"from row {row}", self.prepared.training_data[self.stage.number - 1]
        if isinstance(data, Rows):
            where = f"from row {row % len(data)} of pass {row // len(data) + 1}"
        where += f" of stage {self.stage.number}'s data" if len(self.stages) > 1 else " of the data"
        raise TrainingFailed(f"the {what} at step {step} ({where}): {self._advice()}")

    def _advice(self) -> str:
        saved = list_checkpoints(self.run.checkpoints)
        last = f"the last good state is {saved[-1]}" if saved else "no checkpoint was written yet"
        return (
            "lower training.learning_rate, increase training.warmup_steps, use training.precision=fp32, or skip such "
            f"steps with training.nonfinite=skip; {last}"
        )

    def _validate(self, rows: Rows | None) -> None:
        """Evaluates held-out rows. Without any, checks for posterior collapse on the batches of this step."""
        training, step, model = self.settings.training, self.state.step, self.state.model
        if rows is None and not isinstance(model, FreeTransformer):
            return
        shared = rows is not None and self.processes.data_size > 1
        with evaluation_mode(model, self.device, training.seed), autocast(training.precision, self.processes):
            batches = self.stop.checked(self.last_batches if rows is None else rows.in_order(training.rows))
            group = self.processes.data_group if shared else None
            result = evaluate_likelihood(model, batches, VALIDATION_SAMPLES, group=group)
        if rows is not None:
            names = ("nll", "reconstruction", "kl", "elbo", "prior", "gap")
            values = {name: getattr(result, name) for name in names if getattr(result, name) is not None}
            self.monitor.record(step, "validation", {"loss": values.get("elbo", result.nll), **values})
        if not self.monitor.plan_may_be_unused(step) and result.gap is not None:
            free_bits = stage_at(self.stages, step - 1).weights(self.settings, step - 1)["free_bits"]
            warning = collapse_warning(result, free_bits)
            self.monitor.record(step, "watcher", {"collapsed": warning is not None, "warning": warning})

    def _sample(self) -> None:
        seed, step = self.settings.training.seed, self.state.step
        with evaluation_mode(self.state.model, self.device, seed + step):
            text = generate_sample(
                self.state.model, self.prepared.tokenizer, self.device, self.settings.logging.sample_tokens
            )
        self.monitor.sample(step, text)

    def _save(self) -> None:
        with self.stop.saving():
            self.checkpoints.save(self.state, self.monitor.best if self.settings.keeps_best else None)

    def _end_early(self, stop: int) -> None:
        """Ends a run stopped by a signal, once its state is saved."""
        with self.stop.saving():
            self.checkpoints.wait()
        self.monitor.message(
            f"stopped by {signal.Signals(stop).name} at step {self.state.step}, saved in {self.run.checkpoints}; the "
            "same command resumes it"
        )
        raise TrainingStopped(stop)

    def _finish(self) -> None:
        trained, state, tokenizer = self.state.step, self.state, self.prepared.tokenizer
        load_best_weights(self.run, state, self.processes, self.monitor)
        data = self.prepared.training_data[-1]
        gather_prior(self.settings, state, data, tokenizer, self.processes, self.stop)
        with self.stop.saving():
            write_model(self.run, state, tokenizer, self.processes, trained)


def _is_due(step: int, every: int, last: bool) -> bool:
    """Whether an event that occurs every `every` steps (0: never) and at the last step is due at this step."""
    return every > 0 and (last or step % every == 0)
