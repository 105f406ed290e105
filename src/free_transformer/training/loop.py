"""The training loop: settings in, the folder of a run out."""

import contextlib
import itertools
import signal
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer import __version__
from free_transformer.data import Rows, begin_token, load_tokenizer
from free_transformer.data.rows import Batch
from free_transformer.distributed.parallelize import reshard, whole_state_dict
from free_transformer.distributed.processes import Processes, join_processes
from free_transformer.errors import RunError
from free_transformer.evaluation.likelihood import evaluate_likelihood
from free_transformer.evaluation.usage import collapse_warning
from free_transformer.files import new_folder
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runs.model_card import write_model_card
from free_transformer.runs.monitor import VALIDATION_SAMPLES, Watcher
from free_transformer.runs.run import Run
from free_transformer.runs.trackers import check_trackers
from free_transformer.settings import Settings, SettingsError, settings_warnings
from free_transformer.settings.curriculum import Stage, stage_at, stages_of
from free_transformer.training.adapters import merge_adapters, write_adapters
from free_transformer.training.batch_size import decide_batch_size
from free_transformer.training.batches import (
    TrainingData,
    load_training,
    load_validation,
    overlap_warning,
    training_batches,
)
from free_transformer.training.checkpoint import Checkpoints, TrainState, list_checkpoints, load_checkpoint
from free_transformer.training.display import Display, say_finished
from free_transformer.training.identity import Change, Identity
from free_transformer.training.metrics import Entries, Totals
from free_transformer.training.optimizers import set_learning_rate
from free_transformer.training.signals import StopRequest, TrainingStopped, listen_for_stop
from free_transformer.training.state import new_state, resolved
from free_transformer.training.step import agree_on_step, apply_gradients, autocast, compute_gradients, with_layout

MIN_LOSS_SCALE = 1.0  # of fp16: below it, gradients are NaN or infinite for another reason


class TrainingFailed(RunError):
    """A run that cannot continue, such as one whose loss is NaN."""


def train(settings: Settings, quiet: bool = False, allow_change: Sequence[str] = ()) -> Run:
    """
    Trains from the start or from the newest checkpoint of `run_dir`, and writes `model/` at the end.

    Under `torchrun` the processes share the work as `settings.distributed` says; `run_dir` must then be a folder that
    all of them see.

    Args:
        allow_change: settings that may differ from those of the run that is resumed although the run then continues on
            other text, such as `data.train`; `all` for every one.

    Raises:
        SettingsError: for data or settings that cannot be used, for a folder that is in use or holds something else,
            and for a run that cannot be resumed with these settings; nothing is written then.
        TrainingFailed: where the loss is not finite; the last checkpoint is as it was.
        TrainingStopped: after Ctrl-C or a signal that ends jobs, when the state is saved.
        CheckpointFailed: where a checkpoint cannot be written, such as on a full disk.
        ProcessLost: where another process has ended or does not answer.
    """
    with join_processes(settings.distributed, settings.training.device) as processes:
        run = Run(settings.run_dir)
        with _claimed(run, processes):
            _train(settings, run, processes, quiet, allow_change)
        return run


@contextlib.contextmanager
def _claimed(run: Run, processes: Processes) -> Iterator[None]:
    """Holds the run's folder, by its main process for all of them."""
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


def _train(settings: Settings, run: Run, processes: Processes, quiet: bool, allow_change: Sequence[str]) -> None:
    settings = settings.model_copy(deep=True)
    training = settings.training
    check_trackers(settings)
    tokenizer = load_tokenizer(settings.data.tokenizer)
    saved = bool(list_checkpoints(run.checkpoints))
    _check_start(run, settings, saved)
    if saved and "warmup_steps" not in training.model_fields_set:  # its default follows max_steps, which may be raised
        training.warmup_steps = run.settings.training.warmup_steps
    settings, loaded, _ = decide_batch_size(settings, tokenizer, processes, run if saved else None, quiet)
    if settings.training.rows < processes.data_size:
        raise SettingsError(
            f"training.batch_size={settings.training.rows}: at least a row for each of the {processes.data_size} "
            "processes that share a batch"
        )
    state = new_state(settings, tokenizer, processes)
    training_data = loaded or load_training(settings, tokenizer, processes)
    validation = load_validation(settings, tokenizer)
    overlap = overlap_warning(training_data, validation, settings)
    settings = resolved(settings, state.model)  # type: ignore[arg-type]
    identity = Identity.of(settings, state.model, tokenizer, training_data, validation, processes)  # type: ignore[arg-type]
    checkpoints = Checkpoints(
        *(run.checkpoints, settings.checkpoint.save_total, processes, settings.checkpoint.async_save),
        *(identity, allow_change),
    )
    told = [*settings_warnings(settings), *([overlap] if overlap else [])]
    resuming = checkpoints.load_newest(state, told.append) is not None
    lines = [line for line in run.read_metrics() if resuming and line["step"] <= state.step]
    watcher = Watcher(settings, lines)
    trains = _has_steps_left(settings, state.step, watcher)
    if not trains and run.has_ended and run.model.get("trained") == state.step:
        if processes.main:
            say_finished(run, state.step, checkpoints.changes, quiet)
        return
    if processes.main and trains:
        _record_start(run, settings, state.step if resuming else None, checkpoints.changes)
    processes.barrier()
    with Display(run, settings, processes, watcher, quiet, state.step if resuming else None) as display:
        display.start(state, training_data[0], checkpoints.changes, told)
        trainer = _Trainer(settings, run, state, tokenizer, processes, display, checkpoints, training_data)
        with listen_for_stop(quiet or not processes.main) as trainer.stop:
            trainer.train(None if validation is None else validation.sample(settings.evaluation.rows))


def _has_steps_left(settings: Settings, step: int, watcher: Watcher) -> bool:
    """Whether neither `max_steps` is reached nor early stopping has waited for long enough."""
    patience = settings.evaluation.early_stopping
    return step < settings.training.max_steps and not 0 < patience <= watcher.since_best


def _check_start(run: Run, settings: Settings, saved: bool) -> None:
    """
    `SettingsError` where training from the start would replace what an earlier training came to.

    A run that was stopped before its first checkpoint may start again. The first one is complete for certain once the
    second is written, also in the background.
    """
    if saved and settings.training.resume == "never":
        raise SettingsError(
            f"{run.path}: holds checkpoints, and training.resume=never; choose another run_dir, or training.resume=auto"
        )
    if saved:
        return
    logged = max((line["step"] for line in run.read_metrics()), default=0)
    had_checkpoints = logged > 0 and run.config_file.is_file() and 0 < 2 * run.settings.training.save_every < logged
    if run.model_folder.exists() or had_checkpoints:
        what = "a trained model" if run.model_folder.exists() else f"the metrics of {logged} steps"
        raise SettingsError(
            f"{run.path}: holds {what} and no checkpoint to resume from; choose another run_dir, or delete the folder "
            "to train from the start"
        )


def _record_start(run: Run, settings: Settings, resumed: int | None, changes: list[Change]) -> None:
    """Writes the settings as used, and drops what an interrupted training logged after the step that is resumed."""
    run.begin_training()
    run.write_config(settings)
    run.forget_metrics_after(-1 if resumed is None else resumed)
    run.append_history(
        resumed or 0,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        version=__version__,
        changes={change.name: [change.old, change.new] for change in changes},
    )


@dataclass
class _Trainer:
    settings: Settings
    run: Run
    state: TrainState
    tokenizer: PreTrainedTokenizerBase
    processes: Processes
    display: Display
    checkpoints: Checkpoints
    training_data: list[TrainingData]  # of each stage
    stop: StopRequest = field(default_factory=StopRequest)
    stage: Stage | None = None
    batches: Iterator[Batch] = field(default_factory=lambda: iter(()))
    last_batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = stages_of(self.settings)

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def train(self, validation: Rows | None) -> None:
        """Trains to the last step and writes `model/`."""
        training, state = self.settings.training, self.state
        totals = Totals()
        while _has_steps_left(self.settings, state.step, self.display.watcher):
            self._enter_stage()
            rate = set_learning_rate(state.optimizers, state.step, self.settings)
            stop = self._optimizer_step(totals)
            state.step += 1
            last = state.step == training.max_steps
            validating = _due(state.step, training.eval_every, last)
            saving = last or _due(state.step, training.save_every, last) or stop > 0
            logging = (
                saving
                or _due(state.step, training.log_every, self._ends_stage())
                or (validating and self.settings.keeps_best)
            )
            if totals.steps and logging:
                self._log(totals, rate)  # a state that is saved has finite losses and gradients
                totals = Totals()
            if validating:
                self._validate(validation)
                saving |= self._is_best() or not _has_steps_left(self.settings, state.step, self.display.watcher)
            if _due(state.step, self.settings.logging.sample_every, last):
                self._sample()
            if saving:
                with self.stop.saving():
                    self.checkpoints.save(state, self.display.watcher.best if self.settings.keeps_best else None)
            if stop and not last:
                with self.stop.saving():
                    self.checkpoints.wait()
                self.display.stopped(state.step, signal.Signals(stop).name)
                raise TrainingStopped(stop)
        self.checkpoints.wait()
        trained = state.step
        self._take_best()
        self._gather_prior()
        with self.stop.saving():
            self._write_model(trained)

    def _enter_stage(self) -> None:
        """Opens the text of the stage of this step, where the stage before has not been reading it already."""
        state, stage = self.state, stage_at(self.stages, self.state.step)
        if stage is self.stage:
            return
        before = self.stages[stage.number - 2] if stage.number > 1 else None
        if state.step == stage.start and before is not None and not stage.reads_as(before):
            state.stage_rows = state.rows
        if self.stage is None or not stage.reads_as(self.stage):
            data = self.training_data[stage.number - 1]
            start = state.rows - state.stage_rows
            self.batches = training_batches(data, stage, self.tokenizer, self.settings, self.processes, start)
        self.stage = stage
        self.display.stage(stage, len(self.stages))

    def _ends_stage(self) -> bool:
        return self.stage is not None and self.state.step == self.stage.end

    def _optimizer_step(self, totals: Totals) -> int:
        """
        One step over all micro-batches; each loss is divided by the predicted tokens of them all.

        Returns:
            the signal that has asked some process to stop, or 0. Several processes learn of it in the next step.
        """
        training, state, processes = self.settings.training, self.state, self.processes
        micro = [next(self.batches) for _ in self.stop.checked(range(training.gradient_accumulation_steps))]
        inputs = [with_layout(state.model, batch) for batch in micro]
        shared = agree_on_step(processes, state.model, inputs, self.stop.signal)
        weights, check = self._scheduled_weights(), self.stop.check
        of_step = compute_gradients(state, inputs, shared.tokens, weights, training, processes, check, shared.places)
        if self._is_usable(of_step):
            apply_gradients(state)
            totals.extend(of_step)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        self.last_batches = micro
        assert self.stage is not None
        state.rows += len(micro) * self.stage.batch_size
        return self.stop.signal if processes.size == 1 else shared.signal

    def _is_usable(self, of_step: Totals) -> bool:
        """Whether a step is to be taken; one that is left out is written down, and too many of them end the run."""
        training, scaler = self.settings.training, self.state.scaler
        if scaler.is_enabled() and of_step.has_finite_losses() and not of_step.has_finite_gradients():
            scaler.update(
                scaler.get_scale() * scaler.get_backoff_factor()
            )  # it falls until the gradients fit into fp16
            if scaler.get_scale() >= MIN_LOSS_SCALE:
                return False
        elif training.nonfinite == "stop":  # looked at once for all steps since the last line of metrics
            return True
        finite = of_step.has_finite_losses() and of_step.has_finite_gradients()
        if self.processes.all_reduce_max(not finite) == [0]:
            return True
        self.state.skipped += 1
        if self.state.skipped > training.max_skipped or training.nonfinite == "stop":
            raise TrainingFailed(
                f"step {self.state.step + 1} is number {self.state.skipped} with a loss or gradient that is NaN or "
                f"infinite, over training.max_skipped={training.max_skipped}: {self._advice()}"
            )
        self.display.skip(self.state.step + 1)
        return False

    def _scheduled_weights(self) -> dict[str, Tensor]:
        """As tensors, so that a compiled model is not compiled again for each value."""
        if self.settings.model.kind == "baseline":
            return {}
        weights = stage_at(self.stages, self.state.step).weights(self.settings, self.state.step)
        return {name: torch.full((), value, device=self.device) for name, value in weights.items()}  # no copy to a GPU

    def _log(self, totals: Totals, rate: float) -> None:
        entries = totals.over(self.processes)
        self._check_finite(entries)
        values = {**entries.values(), "lr": rate}
        values["spikes"] = self.display.watcher.spikes(
            entries.of_steps("loss").tolist(), entries.gradient_norm.tolist()
        )
        if len(self.stages) > 1 and self.stage is not None:
            values["stage"] = self.stage.number
        if self.state.scaler.is_enabled():
            values["loss_scale"] = self.state.scaler.get_scale()
        self.display.log(self.state.step, "train", values)

    def _check_finite(self, entries: Entries) -> None:
        """`TrainingFailed` with the first step of a NaN or infinite loss or gradient, and where its text is."""
        if (found := entries.first_without_number()) is None:
            return
        assert self.stage is not None
        offset, micro, what = found
        step = self.state.step - len(entries.gradient_norm) + offset + 1
        read = self.state.rows - self.state.stage_rows
        row = read - (len(entries.losses["loss"]) - micro) * self.stage.batch_size
        where, data = f"from row {row}", self.training_data[self.stage.number - 1]
        if isinstance(data, Rows):
            where = f"from row {row % len(data)} of pass {row // len(data) + 1}"
        where += f" of stage {self.stage.number}'s data" if len(self.stages) > 1 else " of the data"
        raise TrainingFailed(f"the {what} at step {step} ({where}): {self._advice()}")

    def _advice(self) -> str:
        saved = list_checkpoints(self.run.checkpoints)
        last = f"the last good state is {saved[-1]}" if saved else "no checkpoint was written yet"
        return (
            "lower training.learning_rate, lengthen training.warmup_steps, use precision=fp32 or leave such steps out "
            f"with training.nonfinite=skip; {last}"
        )

    def _validate(self, rows: Rows | None) -> None:
        """On held-out rows; without any, on the step's own batch, for the watcher alone."""
        training, step = self.settings.training, self.state.step
        if rows is None and not isinstance(self.state.model, FreeTransformer):
            return
        shared = rows is not None and self.processes.data_size > 1
        with self._evaluation_mode(training.seed), autocast(training.precision, self.processes):
            batches = self.stop.checked(self.last_batches if rows is None else rows.in_order(training.rows))
            group = self.processes.data_group if shared else None
            result = evaluate_likelihood(self.state.model, batches, VALIDATION_SAMPLES, group=group)  # type: ignore[arg-type]
        if rows is not None:
            names = ("nll", "reconstruction", "kl", "elbo", "prior", "gap")
            values = {name: getattr(result, name) for name in names if getattr(result, name) is not None}
            self.display.log(step, "validation", {"loss": values.get("elbo", result.nll), **values})
        if not self.display.watcher.is_early(step) and result.gap is not None:
            free_bits = stage_at(self.stages, step - 1).weights(self.settings, step - 1)["free_bits"]
            warning = collapse_warning(result, free_bits)
            self.display.log(step, "watcher", {"collapsed": warning is not None, "warning": warning})

    def _is_best(self) -> bool:
        """Whether the validation of this step is the best so far, and its state to be kept."""
        best = self.display.watcher.best
        return self.settings.keeps_best and best is not None and best[1] == self.state.step

    def _take_best(self) -> None:
        """The weights of the best validation, where they are kept."""
        best = self.display.watcher.best
        if not self.settings.keeps_best or best is None or best[1] == self.state.step:
            return
        path = self.run.checkpoints / f"step-{best[1]}"
        if not path.is_dir():
            self.display.warn(f"{path}, the best, is gone: model/ has the weights of step {self.state.step}")
            return
        stopped_at = self.state.step
        load_checkpoint(path, self.state, self.processes)
        self.display.took_best(stopped_at, *best)

    def _gather_prior(self) -> None:
        """The aggregate prior, from rows of training text in an order of its own, in every process the same."""
        training, model, wanted = self.settings.training, self.state.model, self.settings.evaluation.prior_rows
        if not isinstance(model, FreeTransformer) or wanted == 0:
            return
        stage, data = self.stages[-1], self.training_data[-1]
        count = -(-wanted // stage.batch_size)
        alone = Processes(self.device)  # so that all read the same
        batches = itertools.islice(training_batches(data, stage, self.tokenizer, self.settings, alone), count)
        with self._evaluation_mode(training.seed), autocast(training.precision, self.processes):
            model.gather_prior(self.stop.checked(batches))

    def _sample(self) -> None:
        """A text, written by all processes together."""
        prompt = torch.tensor([[begin_token(self.tokenizer)]], device=self.device)
        model: Any = self.state.model
        with self._evaluation_mode(self.settings.training.seed + self.state.step), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.settings.logging.sample_tokens,
                do_sample=True,
            )
        self.display.sample(self.state.step, self.tokenizer.decode(tokens[0], skip_special_tokens=True))

    @contextlib.contextmanager
    def _evaluation_mode(self, seed: int) -> Iterator[None]:
        """
        The model in eval mode. Validation and samples must not move the random numbers of training, or a resumed run
        would differ; nor are their shapes worth a compilation of their own; what they gather is given up.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        self.state.model.eval()
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            yield
        self.state.model.train()
        reshard(self.state.model)

    def _write_model(self, trained: int) -> None:
        model: Any = self.state.model
        if self.state.adapters is not None:
            with new_folder(self.run.adapter_folder) as folder:
                write_adapters(self.state.adapters, folder)
            model = merge_adapters(self.state.adapters)
        weights = {} if self.processes.size == 1 else {"state_dict": whole_state_dict(model)}
        if self.processes.main:
            with self.run.new_model(self.state.step, trained) as folder:
                model.save_pretrained(folder, **weights)
                self.tokenizer.save_pretrained(folder)
                write_model_card(self.run, folder)
        self.processes.barrier()


def _due(step: int, every: int, last: bool) -> bool:
    """Whether something happens at this step that happens every so many, and at the last; never where `every` is 0."""
    return every > 0 and (last or step % every == 0)
