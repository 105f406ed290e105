"""Preparation of a run: checks its folder, loads the state to train, and records the start."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from transformers import PreTrainedTokenizerBase

from free_transformer import __version__
from free_transformer.data import Rows, load_tokenizer
from free_transformer.distributed.processes import Processes
from free_transformer.runs.console import ConsoleProgress
from free_transformer.runs.monitor import Monitor
from free_transformer.runs.run import Run
from free_transformer.runs.subscribers import MetricsFile, RunStart, Subscriber
from free_transformer.runs.trackers import check_trackers, open_trackers
from free_transformer.settings import DistributedSettings, Settings, SettingsError, settings_warnings
from free_transformer.training.batch_size import decide_batch_size
from free_transformer.training.batches import Stream, TrainingData, load_training, load_validation, overlap_warning
from free_transformer.training.checkpoint import Checkpoints, TrainState, list_checkpoints
from free_transformer.training.identity import Change, Identity
from free_transformer.training.optimizers import describe_groups
from free_transformer.training.state import new_state, resolved


@dataclass
class PreparedRun:
    """
    A run that is ready to train.

    Attributes:
        settings: settings as used, with automatic values resolved.
        training_data: training text of each stage.
        resumed: step of the loaded checkpoint, None for a new run.
    """

    settings: Settings
    run: Run
    processes: Processes
    tokenizer: PreTrainedTokenizerBase
    state: TrainState
    training_data: list[TrainingData]
    validation: Rows | None
    checkpoints: Checkpoints
    monitor: Monitor
    warnings: list[str]
    resumed: int | None

    @property
    def is_finished(self) -> bool:
        """Whether no steps are left and `model/` already has the weights of this training."""
        done = not self.monitor.should_continue(self.state.step)
        return done and self.run.has_ended and self.run.model.get("trained") == self.state.step

    def record(self) -> None:
        """Writes the settings as used and drops metrics after the resumed step."""
        step, run = self.resumed, self.run
        run.begin_training()
        run.write_config(self.settings)
        run.forget_metrics_after(-1 if step is None else step)
        run.append_history(
            step or 0,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            version=__version__,
            parameters=sum(parameter.numel() for parameter in self.state.model.parameters()),
            changes={change.name: [change.old, change.new] for change in self.checkpoints.changes},
        )

    def subscribers(self, quiet: bool) -> list[Subscriber]:
        """Creates the subscribers of the main process: metrics file, trackers, and console unless `quiet`."""
        trackers = open_trackers(self.run, self.settings, self.resumed)
        return [MetricsFile(self.run.metrics_file), *trackers, *([] if quiet else [ConsoleProgress()])]

    def describe(self) -> RunStart:
        data, note = self.training_data[0], _note_on_processes(self.processes, self.settings.distributed)
        return RunStart(
            name=self.run.name,
            step=self.state.step,
            max_steps=self.settings.training.max_steps,
            log_every=self.settings.training.log_every,
            parameters=sum(parameter.numel() for parameter in self.state.model.parameters()),
            data="" if isinstance(data, Stream) else f"{len(data)} rows of {data.seq_len} tokens",
            optimizers=describe_groups(self.state.optimizers),
            notes=[note] if note else [],
            changes=[str(change) for change in self.checkpoints.changes],
            warnings=self.warnings,
        )


def prepare(
    settings: Settings, run: Run, processes: Processes, allow_change: Sequence[str], quiet: bool
) -> PreparedRun:
    """
    Loads text, model and the newest checkpoint without writing to the run's folder.

    Raises:
        SettingsError: see `train`.
    """
    settings = settings.model_copy(deep=True)
    check_trackers(settings)
    tokenizer = load_tokenizer(settings.data.tokenizer)
    saved = bool(list_checkpoints(run.checkpoints))
    _check_folder(run, settings, saved)
    training = settings.training
    if (
        saved and "warmup_steps" not in training.model_fields_set
    ):  # its default depends on max_steps, which may have been raised
        training.warmup_steps = run.settings.training.warmup_steps
    settings, loaded, _ = decide_batch_size(settings, tokenizer, processes, run if saved else None, quiet)
    _check_rows(settings.training.rows, processes)
    state = new_state(settings, tokenizer, processes)
    training_data = loaded or load_training(settings, tokenizer, processes)
    validation = load_validation(settings, tokenizer)
    overlap = overlap_warning(training_data, validation, settings)
    settings = resolved(settings, state.model)
    checkpoints = Checkpoints(
        run.checkpoints,
        keep=settings.checkpoint.save_total,
        processes=processes,
        background=settings.checkpoint.async_save,
        identity=Identity.of(settings, state.model, tokenizer, training_data, validation, processes),
        allowed=allow_change,
    )
    warnings = [*settings_warnings(settings), *([overlap] if overlap else [])]
    loaded_from = checkpoints.load_newest(state, warnings.append)
    resumed = None if loaded_from is None else state.step
    lines = [line for line in run.read_metrics() if resumed is not None and line["step"] <= resumed]
    return PreparedRun(
        settings=settings,
        run=run,
        processes=processes,
        tokenizer=tokenizer,
        state=state,
        training_data=training_data,
        validation=validation,
        checkpoints=checkpoints,
        monitor=Monitor(settings, lines),
        warnings=warnings,
        resumed=resumed,
    )


def say_finished(run: Run, step: int, changes: Sequence[Change]) -> None:
    """Reports that a run is finished and therefore not changed."""
    ignored = f"; these changes have no effect: {', '.join(map(str, changes))}" if changes else ""
    ConsoleProgress().message(
        f"{run.name}: already trained to step {step}; raise training.max_steps to continue{ignored}"
    )


def _check_folder(run: Run, settings: Settings, saved: bool) -> None:
    """
    Raises `SettingsError` if training from step 0 would replace the result of an earlier training.

    A run that was stopped before its first checkpoint may start again. Once the second checkpoint is due, the first is
    known to be complete, even if it was written in the background.
    """
    if saved and settings.training.resume == "never":
        raise SettingsError(
            f"{run.path}: contains checkpoints; choose another run_dir, or training.resume=auto instead of never"
        )
    if saved:
        return
    logged = max((line["step"] for line in run.read_metrics()), default=0)
    had_checkpoints = logged > 0 and run.config_file.is_file() and 0 < 2 * run.settings.training.save_every < logged
    if run.model_folder.exists() or had_checkpoints:
        what = "a trained model" if run.model_folder.exists() else f"the metrics of {logged} steps"
        raise SettingsError(
            f"{run.path}: contains {what} but no checkpoint to resume from; choose another run_dir, or delete the "
            "folder to train from the start"
        )


def _check_rows(rows: int, processes: Processes) -> None:
    if rows < processes.data_size:
        raise SettingsError(
            f"training.batch_size={rows}: must be at least {processes.data_size}, one row for each process that "
            "shares a batch"
        )


def _note_on_processes(processes: Processes, settings: DistributedSettings) -> str:
    """Describes how the processes share the work, with advice if they do not or if it is slow; may be empty."""
    if processes.size == 1:
        text = "fsdp: nothing to shard with one process; start more with torchrun --nproc_per_node=auto"
        return text if settings.fsdp else ""
    data, tensor = processes.data_size, processes.tensor
    replicas = settings.replicas if settings.fsdp else data
    text = f"{processes.size} processes on {processes.device.type}: "
    text += f"{data} share each batch" if tensor == 1 else f"{data} x {tensor}, data x tensor"
    text += f", the model sharded over {data // replicas}" if data > replicas else ", each with the whole model"
    if processes.device.type == "cpu":
        text += " (gloo, intended for testing: on the CPU of one machine, a single process is rarely slower)"
    return text
