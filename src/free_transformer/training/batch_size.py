"""Trial steps before a run: the memory and time per row, and the largest batch that fits."""

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data.rows import Batch
from free_transformer.distributed.processes import Processes
from free_transformer.model.losses import predicted_tokens
from free_transformer.reporting.console import stderr_console
from free_transformer.runs.run import Run
from free_transformer.settings import Settings, SettingsError
from free_transformer.settings.curriculum import Stage, stages_of
from free_transformer.training.batches import Stream, TrainingData, check_batches, load_training, training_batches
from free_transformer.training.checkpoint import TrainState
from free_transformer.training.state import new_state
from free_transformer.training.step import apply_gradients, compute_gradients

MIB, GIB = 2**20, 2**30
USED_SHARE = {"cuda": 0.9, "cpu": 0.8}  # of the free memory; the rest is a safety margin
BYTES_PER_PARAMETER = 16  # fp32 weight and gradient, two moments
LONG_STEP = 2.0  # seconds; after a longer step, no larger one is tried
MIN_TRIALS = 4  # unless memory runs out; small steps alone predict the cost of large ones poorly
TIMED_STEPS, TIMED_SECONDS = 3, 20.0  # maximum number and total time of timed optimizer steps
MIN_GAIN = 1.05  # trials end when a larger step is not this much faster per row


@dataclass(frozen=True)
class Trial:
    """A step with `rows` rows in one process: peak memory of the process in bytes, and time in seconds."""

    rows: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class StepCosts:
    """
    Memory of a step in one process, extrapolated linearly from trials with few rows.

    Attributes:
        state_bytes: size of weights, gradients and optimizer state.
    """

    trials: list[Trial]
    state_bytes: int

    def bytes(self, rows: int) -> int:
        """Returns the peak memory, extrapolated from the two largest trials: the first ones also load libraries."""
        known = next((trial for trial in self.trials if trial.rows == rows), None)
        if known is not None or len(self.trials) == 1:
            trial = known or self.trials[0]
            return trial.bytes if known else trial.bytes * rows // trial.rows
        one, other = self.trials[-2:]
        slope = max(0.0, (other.bytes - one.bytes) / (other.rows - one.rows))
        return round(other.bytes + slope * (rows - other.rows))

    def max_rows(self, budget: int) -> int:
        """Returns the number of rows that fit into `budget` bytes; 0 if not even one does."""
        first, last = self.trials[0], self.trials[-1]
        if last.bytes > budget:
            return max((trial.rows for trial in self.trials if trial.bytes <= budget), default=0)
        by_row = self.bytes(last.rows + 1) - last.bytes
        if first.rows == last.rows or by_row <= 0:
            return last.rows
        return last.rows + (budget - last.bytes) // by_row


def try_steps(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    data: list[TrainingData],
    max_rows: int,
) -> StepCosts:
    """
    Runs steps with 1, 2, 4, ... rows of the stage with the longest rows, on a temporary model.

    Args:
        max_rows: maximum number of rows to try in one process.

    Raises:
        SettingsError: if the weights or a single row do not fit in memory.
    """
    stage = _longest_stage(settings)
    budget = memory_budget(processes)
    state = new_state(not_compiled(settings), tokenizer, processes)
    state_bytes = BYTES_PER_PARAMETER * sum(_local_size(parameter) for parameter in state.model.parameters())
    if state_bytes > budget:
        raise SettingsError(
            f"the model's weights, gradients and optimizer state take {state_bytes / GIB:.1f} GiB, "
            f"more than the {budget / GIB:.1f} GiB available: use a smaller model, or distributed.fsdp=true on more "
            "processes"
        )

    def batch_of(rows: int) -> Batch:
        wider = replace(stage, batch_size=rows * processes.data_size)
        return next(_batches_here(settings, wider, tokenizer, processes, data))

    trials: list[Trial] = []
    rows = 1
    while True:
        trial = _try(state, batch_of(rows), rows, settings, processes)
        if trial is not None:
            trials.append(trial)
        costs = StepCosts(trials, state_bytes)
        ends = trial is None or _is_enough(costs, budget) or rows >= max_rows
        if processes.all_reduce_max(ends)[0]:
            break
        rows = min(2 * rows, max_rows)
    del state
    gc.collect()
    if not trials:
        raise SettingsError(f"a single row of {stage.seq_len} tokens does not fit in memory: use a smaller seq_len")
    return costs


@dataclass(frozen=True)
class StepTime:
    """Mean time of optimizer steps, in seconds, and the number of steps measured."""

    seconds: float
    steps: int


def time_steps(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    data: list[TrainingData],
    state: TrainState,
) -> StepTime:
    """
    Measures the time of optimizer steps, with all their micro-batches, in the stage with the longest rows.

    A warm-up step is not counted, because it also loads libraries and allocates the optimizer state.

    Args:
        state: model and optimizers, which the steps change.
    """
    batches = _batches_here(settings, _longest_stage(settings), tokenizer, processes, data)
    seconds: list[float] = []
    for step in range(1 + TIMED_STEPS):
        micro = list(islice(batches, settings.training.gradient_accumulation_steps))
        taken = _timed_step(state, micro, settings, processes)
        if step > 0:
            seconds.append(taken)
        if seconds and processes.all_reduce_max(sum(seconds) > TIMED_SECONDS)[0]:
            break
    return StepTime(sum(seconds) / len(seconds), len(seconds))


def _longest_stage(settings: Settings) -> Stage:
    return max(stages_of(settings), key=lambda stage: (stage.seq_len, stage.number))


def not_compiled(settings: Settings) -> Settings:
    """Returns the settings without compilation, which takes longer than the trial steps."""
    return settings.model_copy(update={"training": settings.training.model_copy(update={"compile": False})})


def _batches_here(
    settings: Settings,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    data: list[TrainingData],
) -> Iterator[Batch]:
    """Returns batches of a stage, prepared in this process."""
    in_here = settings.model_copy(update={"data": settings.data.model_copy(update={"workers": 0})})
    return training_batches(data[stage.number - 1], stage, tokenizer, in_here, processes)


def _is_enough(costs: StepCosts, budget: int) -> bool:
    last = costs.trials[-1]
    if len(costs.trials) > 1 and costs.bytes(2 * last.rows) > budget:
        return True
    if len(costs.trials) < MIN_TRIALS:
        return False
    before = costs.trials[-2]
    return last.seconds > LONG_STEP or before.seconds / before.rows < MIN_GAIN * last.seconds / last.rows


def _try(state: TrainState, batch: Batch, rows: int, settings: Settings, processes: Processes) -> Trial | None:
    """Measures a step. Returns None if it does not fit in GPU memory."""
    reset_peak(processes.device)
    try:
        for _ in range(2):  # the first also allocates the optimizer state
            seconds = _timed_step(state, [batch], settings, processes)
    except torch.OutOfMemoryError:
        state.model.zero_grad()
        torch.cuda.empty_cache()
        return None
    return Trial(rows, peak_bytes(processes.device), seconds)


def _timed_step(state: TrainState, micro: list[Batch], settings: Settings, processes: Processes) -> float:
    """Runs an optimizer step and returns its time in seconds."""
    tokens = int(processes.sum(torch.stack([predicted_tokens(batch["labels"]) for batch in micro]).sum()))
    _wait(processes.device)
    started = time.perf_counter()
    compute_gradients(state, micro, tokens, {}, settings.training, processes)
    apply_gradients(state)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    _wait(processes.device)
    return time.perf_counter() - started


def decide_batch_size(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes, run: Run | None, quiet: bool
) -> tuple[Settings, list[TrainingData] | None, StepCosts | None]:
    """
    Replaces `training.batch_size=auto` by the number of rows that fit in memory, at most the number in the text.

    Args:
        run: a run to resume, which keeps its batch size; None for a new run.

    Returns:
        the settings and, if steps were tried, the training text and the cost of steps.
    """
    if settings.training.batch_size != "auto":
        return settings, None, None
    if run is not None:
        return _with_rows(settings, run.settings.training.rows), None, None
    one_each = _with_rows(settings, processes.data_size)
    data = load_training(one_each, tokenizer, processes)
    held = [len(each) for each in data if not isinstance(each, Stream)]
    most = max(1, min(held, default=sys.maxsize) // processes.data_size)
    costs = try_steps(one_each, tokenizer, processes, data, most)
    budget = memory_budget(processes)
    fitting = min(most, costs.max_rows(budget))
    rows = -processes.all_reduce_max(-fitting)[0] * processes.data_size
    if rows == 0:
        raise SettingsError(
            f"training.batch_size=auto: a single row does not fit in {budget / GIB:.1f} GiB; use a smaller model"
        )
    least = costs.trials[-1].rows * processes.data_size
    text = f"training.batch_size=auto: {rows} rows, {costs.bytes(fitting) / GIB:.2f} of {budget / GIB:.2f} GiB"
    if rows > least:
        text += f"; steps of more than {least} rows are hardly faster per row, and smaller batches often learn faster"
    stderr_console(quiet or not processes.main).print(text, soft_wrap=True)
    settings = _with_rows(settings, rows)
    check_batches(data, settings)
    return settings, data, costs


def _with_rows(settings: Settings, rows: int) -> Settings:
    return settings.model_copy(update={"training": settings.training.model_copy(update={"batch_size": rows})})


def memory_budget(processes: Processes) -> int:
    """Returns the bytes that this process may use: its current memory plus its share of the free memory."""
    device = processes.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return round(USED_SHARE["cuda"] * (free + torch.cuda.memory_reserved(device)))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return _resident_bytes() + round(USED_SHARE["cpu"] * _free_bytes() / beside)


def _free_bytes() -> int:
    """Returns the free memory of the machine, or of the container in which this process runs, in bytes."""
    free = _psutil().virtual_memory().available
    with suppress(OSError, ValueError):  # no such limit
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return max(0, free)


def _resident_bytes() -> int:
    return _psutil().Process().memory_info().rss


def _psutil() -> ModuleType:
    try:
        import psutil
    except ImportError as error:
        raise SettingsError("measuring memory needs psutil: pip install 'free-transformer-lm[train]'") from error
    return psutil


def reset_peak(device: torch.device) -> None:
    """Resets the measurement of `peak_bytes`, if the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Returns the peak memory of this process in bytes, on its GPU or else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _local_size(parameter: Tensor) -> int:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel()
