"""What a person sees of a run while it trains, and what is written down: bar, lines, metrics.jsonl, trackers."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from free_transformer.distributed.processes import Processes
from free_transformer.reporting.console import stderr_console
from free_transformer.runs.monitor import Watcher
from free_transformer.runs.run import Run
from free_transformer.runs.trackers import Tracker, open_trackers
from free_transformer.settings import DistributedSettings, Settings
from free_transformer.settings.curriculum import Stage
from free_transformer.training.batches import Stream, TrainingData
from free_transformer.training.checkpoint import TrainState
from free_transformer.training.identity import Change
from free_transformer.training.optimizers import describe_groups

LINES_WITHOUT_A_TERMINAL = 10
BAR_WIDTH = 20


class Display:
    """
    One place for every number of a run. `with Display(...) as display:`

    Args:
        watcher: what the lines so far say of the run, the same in every process.
        resumed: the step of the checkpoint that was loaded, None for a new run.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        processes: Processes,
        watcher: Watcher,
        quiet: bool = False,
        resumed: int | None = None,
    ):
        self.run, self.settings, self.processes, self.watcher = run, settings, processes, watcher
        quiet = quiet or not processes.main
        self.console = stderr_console(quiet)
        self.alarms = [reading.label for reading in self.watcher.alarms()]
        self.trackers: list[Tracker] = open_trackers(run, settings, resumed) if processes.main else []
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[alarms]}{task.fields[numbers]}", table_column=Column(ratio=1)),  # wraps
            console=self.console,
            expand=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.name = run.path.resolve().name
        self.task = self.progress.add_task(self.name, total=settings.training.max_steps, numbers="", alarms="")

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        for tracker in self.trackers:
            tracker.close()
        if kind is None:
            self.console.print(f"trained: {self.run.path}", soft_wrap=True)

    def start(
        self, state: TrainState, data: TrainingData, changes: Sequence[Change] = (), warnings: Sequence[str] = ()
    ) -> None:
        """Says what is trained, and what differs from the training that is resumed."""
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        text = f"{self.name}: {parameters / 1e6:.2f} M parameters"
        if not isinstance(data, Stream):
            text += f", {len(data)} rows of {data.seq_len} tokens"
        if state.step:
            text += f", resumed at step {state.step}"
        self.console.print(text, soft_wrap=True)
        self.console.print(f"{self.name}: {'; '.join(describe_groups(state.optimizers))}", soft_wrap=True)
        if note := _note_on_processes(self.processes, self.settings.distributed):
            self.console.print(note, soft_wrap=True)
        for change in changes:
            self.console.print(f"changed: {change}", soft_wrap=True)
        for warning in warnings:
            self.warn(warning)
        self.progress.update(self.task, completed=state.step)

    def stage(self, stage: Stage, count: int) -> None:
        if count > 1:
            weights = {"kl_weight": stage.kl_weight, "free_bits": stage.free_bits}
            named = [f"{name} {value:g}" for name, value in weights.items() if value is not None]
            text = f"stage {stage.number} of {count}, to step {stage.end}: rows of {stage.seq_len} tokens, "
            self.console.print(text + ", ".join([f"{stage.batch_size} a batch", *named]), soft_wrap=True)

    def log(self, step: int, split: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the same to the trackers, and the bar; what needs doing is said once."""
        line = {"step": step, "split": split, **{name: value for name, value in values.items() if value is not None}}
        self.watcher.add(line)
        alarms = {reading.label: reading.advice for reading in self.watcher.alarms()}
        news = {label: advice for label, advice in alarms.items() if label not in self.alarms}
        over = [label for label in self.alarms if label not in alarms]
        if news or over:
            line["advice"] = "; ".join(f"{label}: {advice}" for label, advice in alarms.items()) or "all is well"
        self.alarms = list(alarms)
        if not self.processes.main:
            return
        self.run.append_metrics(**line)
        for tracker in self.trackers:
            tracker.log(step, {f"{split}/{name}": _plain(value) for name, value in line.items() if name not in _KEYS})
        self._show(step, split, line, news, over)

    def _show(self, step: int, split: str, line: dict[str, Any], news: dict[str, str], over: list[str]) -> None:
        if split == "train":
            self.progress.update(self.task, completed=step, numbers=_numbers(line, self.watcher.validation))
        self.progress.update(self.task, alarms=f"[red]{', '.join(self.alarms)}![/] " if self.alarms else "")
        if split == "validation" or (split == "train" and self.progress.disable and self._milestone(step)):
            self.console.print(f"step {step} {split}: {_numbers(line)}", soft_wrap=True)
        for label, advice in news.items():
            self.console.print(f"step {step} {label}: {advice}", style="yellow", soft_wrap=True)
        for label in over:
            self.console.print(f"step {step} {label}: well again", soft_wrap=True)

    def took_best(self, stopped_at: int, loss: float, step: int) -> None:
        text = f"stopped at step {stopped_at}; model/ is that of step {step}, the best on held-out text ({loss:.4f})"
        self.console.print(text, soft_wrap=True)

    def skip(self, step: int) -> None:
        """Records a step that was left out because its loss or gradient is NaN or infinite."""
        if self.processes.main:
            self.run.append_metrics(step=step, split="skipped")
        self.warn(f"step {step} is left out: its loss or gradient is NaN or infinite")

    def stopped(self, step: int, signal_name: str) -> None:
        text = f"stopped by {signal_name} at step {step}, saved in {self.run.checkpoints}; the same command resumes it"
        self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", soft_wrap=True)

    def sample(self, step: int, text: str) -> None:
        self.console.print(Text.assemble((f"step {step} generates: ", "dim"), repr(text)), soft_wrap=True)

    def _milestone(self, step: int) -> bool:
        every = max(1, self.settings.training.max_steps // LINES_WITHOUT_A_TERMINAL)
        return step // every != (step - self.settings.training.log_every) // every


def say_finished(run: Run, step: int, changes: Sequence[Change], quiet: bool) -> None:
    """Says that a run is left as it is, since nothing is left to train."""
    console = stderr_console(quiet)
    without_effect = f"; without effect: {', '.join(map(str, changes))}" if changes else ""
    console.print(
        f"{run.path.resolve().name}: trained to step {step} already; raise training.max_steps to continue"
        f"{without_effect}",
        soft_wrap=True,
    )


def _note_on_processes(processes: Processes, settings: DistributedSettings) -> str:
    """Who shares the work and how, and what to do where nobody does or it will not be fast."""
    if processes.size == 1:
        return "fsdp: one process, nothing to shard; start more with torchrun --nproc_per_node=auto" * settings.fsdp
    data, tensor = processes.data_size, processes.tensor
    replicas = settings.replicas if settings.fsdp else data
    text = f"{processes.size} processes on {processes.device.type}: "
    text += f"{data} share each batch" if tensor == 1 else f"{data} x {tensor}, data x tensor"
    text += f", the model sharded over {data // replicas}" if data > replicas else ", each with the whole model"
    if processes.device.type == "cpu":
        text += " (gloo: to try a run out; one process is seldom slower on one machine's CPU)"
    return text


_KEYS = ("step", "split")


def _plain(value: Any) -> float | str:
    return value if isinstance(value, str) else float(value)


def _numbers(line: dict[str, Any], validation: Any = None) -> str:
    """A line of metrics in few words; while training with the gap that was last measured."""
    parts = [f"reconstruction {line['reconstruction']:.3f}" if "reconstruction" in line else ""]
    beyond = f" ({line['kl_hinge']:.2f} beyond)" if line.get("kl_hinge", 0) >= 0.005 else ""
    parts.append(f"KL {line['kl']:.2f} bits{beyond}" if "kl" in line else "")
    parts.append(f"{line['live_bits']} live" if "live_bits" in line else "")
    gap = line.get("gap", (validation or {}).get("gap"))
    parts.append(f"gap {gap:.3f}" if gap is not None else "")
    parts += [f"{name} {line[name]:.3f}" for name in ("elbo", "nll", "prior") if name in line]
    parts.append(f"gradient {line['grad_norm']:.2f}" if "grad_norm" in line else "")
    parts.append(f"{line['spikes']} spikes" if line.get("spikes") else "")
    parts.append(f"{line['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in line else "")
    return ", ".join(part for part in parts if part)
