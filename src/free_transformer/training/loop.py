"""The training loop: settings in, a run's folder out."""

import contextlib
import itertools
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data import Rows, begin_token, load_tokenizer
from free_transformer.data.rows import Batch
from free_transformer.evaluation.likelihood import evaluate_likelihood
from free_transformer.evaluation.usage import collapse_warning
from free_transformer.files import new_folder
from free_transformer.losses import predicted_tokens
from free_transformer.model import FreeTransformer
from free_transformer.training.adapters import merge_adapters, write_adapters
from free_transformer.training.batches import TrainingData, load_training, load_validation, training_batches
from free_transformer.training.build import new_state, resolved
from free_transformer.training.checkpoint import Checkpoints, TrainState, list_checkpoints, load_checkpoint
from free_transformer.training.display import Display
from free_transformer.training.memory import decide_batch_size
from free_transformer.training.metrics import VALIDATION_SAMPLES, Entries, Totals
from free_transformer.training.model_card import write_model_card
from free_transformer.training.optimizers import set_learning_rate
from free_transformer.training.parallel import reshard, whole_state_dict
from free_transformer.training.processes import Processes, join_processes
from free_transformer.training.run import Run
from free_transformer.training.settings import Settings, SettingsError
from free_transformer.training.stages import Stage, stage_at, stages_of
from free_transformer.training.step import apply_gradients, autocast, compute_gradients
from free_transformer.training.stopping import StopRequest, TrainingStopped, listen_for_stop
from free_transformer.training.trackers import check_trackers

LEAST_LOSS_SCALE = 1.0  # of fp16: under it, gradients are no numbers for another reason


class TrainingFailed(RuntimeError):
    """A run that cannot go on, such as one whose loss is no number any more."""


def train(settings: Settings, quiet: bool = False) -> Run:
    """
    Trains from the start or from the newest checkpoint of `run_dir`, and writes `model/` at the end.

    Under `torchrun` the processes share the work as `settings.distributed` says; `run_dir` must then be a folder that
    all of them see.

    Raises:
        SettingsError: for data or settings that cannot be used; nothing is written then.
        TrainingFailed: where the loss is not finite; the last checkpoint is as it was.
        TrainingStopped: after Ctrl-C or SIGTERM, when the state is saved.
        CheckpointFailed: where a checkpoint cannot be written, such as on a full disk.
        ProcessLost: where another process has ended or does not answer.
    """
    with join_processes(settings.distributed, settings.training.device) as processes:
        return _train(settings, processes, quiet)


def _train(settings: Settings, processes: Processes, quiet: bool) -> Run:
    run, training = Run(settings.run_dir), settings.training
    check_trackers(settings)
    tokenizer = load_tokenizer(settings.data.tokenizer)
    saved = bool(list_checkpoints(run.checkpoints))
    if saved and training.resume == "never":
        raise SettingsError(f"{run.path} holds another run's checkpoints: take another run_dir, or resume=auto")
    settings, loaded, _ = decide_batch_size(settings, tokenizer, processes, run if saved else None, quiet)
    if settings.training.rows < processes.data_size:
        raise SettingsError(
            f"training.batch_size={settings.training.rows}: at least a row for each of the {processes.data_size} "
            "processes that share a batch"
        )
    state = new_state(settings, tokenizer, processes)
    training_data = loaded or load_training(settings, tokenizer, processes)
    validation = load_validation(settings, tokenizer)
    checkpoints = Checkpoints(run.checkpoints, training.save_total, processes, training.async_save)
    passed_over: list[str] = []
    goes_on = training.resume == "auto" and checkpoints.load_newest(state, passed_over.append) is not None
    if processes.main:
        if not goes_on and training.resume == "auto":  # of a run that was stopped before its first checkpoint
            run.metrics_file.unlink(missing_ok=True)
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(resolved(settings, state.model, alone=processes.size == 1))  # type: ignore[arg-type]
        run.forget_metrics_after(state.step)
    processes.barrier()
    with Display(run, settings, processes, quiet, goes_on) as display:
        display.start(state, training_data[0])
        for reason in passed_over:
            display.warn(reason)
        trainer = _Trainer(settings, run, state, tokenizer, processes, display, checkpoints, training_data)
        with listen_for_stop() as trainer.stop:
            trainer.run_to_the_end(validation)
    return run


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

    def run_to_the_end(self, validation: Rows | None) -> None:
        training, state = self.settings.training, self.state
        totals = Totals()
        while state.step < training.max_steps and not self._has_levelled_off():
            self._enter_stage()
            rate = set_learning_rate(state.optimizers, state.step, training)
            stop = self._optimizer_step(totals)
            state.step += 1
            last = state.step == training.max_steps
            validating = _due(state.step, training.eval_every, last)
            saving = _due(state.step, training.save_every, last) or stop > 0
            logging = (
                saving
                or _due(state.step, training.log_every, self._ends_stage())
                or (validating and training.keeps_best)
            )
            if totals.steps and logging:
                self._log(totals, rate)  # a state that is saved has finite losses and gradients
                totals = Totals()
            if validating:
                self._validate(validation)
                saving |= self._is_best() or self._has_levelled_off()
            if _due(state.step, self.settings.logging.sample_every, last):
                self._sample()
            if saving:
                self.checkpoints.save(state, self.display.watcher.best if training.keeps_best else None)
            if stop and not last:
                self.checkpoints.wait()
                self.display.stopped(state.step, signal.Signals(stop).name)
                raise TrainingStopped(stop)
        self.checkpoints.wait()
        self._take_best()
        self._gather_prior()
        self._write_model()

    def _enter_stage(self) -> None:
        """Opens the text of the stage of this step, where the stage before has not been reading it already."""
        state, stage = self.state, stage_at(self.stages, self.state.step)
        if stage is self.stage:
            return
        before = self.stages[stage.number - 2] if stage.number > 1 else None
        if state.step == stage.start and before is not None and not stage.reads_as(before):
            state.stage_batches = state.batches
        if self.stage is None or not stage.reads_as(self.stage):
            data = self.training_data[stage.number - 1]
            start = state.batches - state.stage_batches
            self.batches = training_batches(data, stage, self.tokenizer, self.settings, self.processes, start)
        self.stage = stage
        self.display.stage(stage, len(self.stages))

    def _ends_stage(self) -> bool:
        return self.stage is not None and self.state.step == self.stage.end

    def _optimizer_step(self, totals: Totals) -> int:
        """
        One step over all micro-batches; each loss is divided by the predicted tokens of them all.

        Returns:
            the signal that has asked some process to stop, or 0.
        """
        training, state, processes = self.settings.training, self.state, self.processes
        micro = [next(self.batches) for _ in range(training.gradient_accumulation_steps)]
        tokens = int(processes.sum(torch.stack([predicted_tokens(batch["labels"]) for batch in micro]).sum()))
        of_step = compute_gradients(state, micro, tokens, self._scheduled_weights(), training, processes)
        if self._is_usable(of_step):
            apply_gradients(state)
            totals.extend(of_step)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        self.last_batches = micro
        state.batches += len(micro)
        return processes.largest(self.stop.signal)[0]

    def _is_usable(self, of_step: Totals) -> bool:
        """Whether a step is to be taken; one that is left out is written down, and too many of them end the run."""
        training, scaler = self.settings.training, self.state.scaler
        if scaler.is_enabled() and of_step.has_finite_losses() and not of_step.has_finite_gradients():
            scaler.update(
                scaler.get_scale() * scaler.get_backoff_factor()
            )  # it falls until the gradients fit into fp16
            if scaler.get_scale() >= LEAST_LOSS_SCALE:
                return False
        elif training.nonfinite == "stop":  # looked at once for all steps since the last line of metrics
            return True
        finite = of_step.has_finite_losses() and of_step.has_finite_gradients()
        if self.processes.largest(not finite) == [0]:
            return True
        self.state.skipped += 1
        if self.state.skipped > training.max_skipped or training.nonfinite == "stop":
            raise TrainingFailed(
                f"step {self.state.step + 1} is the {self.state.skipped}th whose loss or gradient is no number, over "
                f"training.max_skipped={training.max_skipped}: {self._advice()}"
            )
        self.display.skip(self.state.step + 1)
        return False

    def _scheduled_weights(self) -> dict[str, Tensor]:
        """As tensors, so that a compiled model is not compiled again for each value."""
        if self.settings.model.kind == "baseline":
            return {}
        weights = stage_at(self.stages, self.state.step).weights(self.settings, self.state.step)
        return {name: torch.tensor(value, device=self.device) for name, value in weights.items()}

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
        """`TrainingFailed` with the first step that was no number, and where its text stands in the data."""
        if (found := entries.first_without_number()) is None:
            return
        assert self.stage is not None
        offset, micro, what = found
        step = self.state.step - len(entries.gradient_norm) + offset + 1
        micro += self.state.batches - self.state.stage_batches - len(entries.losses["loss"])
        where, data = f"micro-batch {micro}", self.training_data[self.stage.number - 1]
        if isinstance(data, Rows):
            epoch, index = divmod(micro, len(data) // self.stage.batch_size)
            where = f"batch {index} of epoch {epoch}"
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
        with self._beside_training(training.seed), autocast(training.precision, self.processes):
            batches = self.last_batches if rows is None else rows.in_order(training.rows)
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
        return self.settings.training.keeps_best and best is not None and best[1] == self.state.step

    def _has_levelled_off(self) -> bool:
        """Whether so many validations were no better than the best that the run is at its end."""
        patience = self.settings.training.early_stopping
        return 0 < patience <= self.display.watcher.since_best

    def _take_best(self) -> None:
        """The weights of the best validation, where they are kept."""
        best = self.display.watcher.best
        if not self.settings.training.keeps_best or best is None or best[1] == self.state.step:
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
        training, model = self.settings.training, self.state.model
        if not isinstance(model, FreeTransformer) or training.prior_rows == 0:
            return
        stage, data = self.stages[-1], self.training_data[-1]
        count = -(-training.prior_rows // stage.batch_size)
        alone = Processes(self.device)  # so that all read the same
        batches = itertools.islice(training_batches(data, stage, self.tokenizer, self.settings, alone), count)
        with self._beside_training(training.seed), autocast(training.precision, self.processes):
            model.gather_prior(batches)

    def _sample(self) -> None:
        """A text, written by all processes together."""
        prompt = torch.tensor([[begin_token(self.tokenizer)]], device=self.device)
        model: Any = self.state.model
        with self._beside_training(self.settings.training.seed + self.state.step), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.settings.logging.sample_tokens,
                do_sample=True,
            )
        self.display.sample(self.state.step, self.tokenizer.decode(tokens[0], skip_special_tokens=True))

    @contextlib.contextmanager
    def _beside_training(self, seed: int) -> Iterator[None]:
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

    def _write_model(self) -> None:
        model: Any = self.state.model
        if self.state.adapters is not None:
            with new_folder(self.run.adapter_folder) as folder:
                write_adapters(self.state.adapters, folder)
            model = merge_adapters(self.state.adapters)
        weights = {} if self.processes.size == 1 else {"state_dict": whole_state_dict(model)}
        if self.processes.main:
            with new_folder(self.run.model_folder) as folder:
                model.save_pretrained(folder, **weights)
                self.tokenizer.save_pretrained(folder)
                write_model_card(self.run, folder)
        self.processes.barrier()


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
