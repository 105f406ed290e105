"""Progress of a run on standard error: a bar in a terminal, otherwise lines."""

from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from free_transformer.reporting.console import printable, stderr_console
from free_transformer.runs.subscribers import Level, MetricsUpdate, MetricValue, RunStart, Subscriber
from free_transformer.settings.curriculum import Stage

LINES_WITHOUT_A_TERMINAL = 10
BAR_WIDTH = 20
MIN_SHOWN_HINGE = 0.005  # bits per plan


class ConsoleProgress(Subscriber):
    """Shows a progress bar with the latest numbers, and prints messages, samples, validations and alarms."""

    def __init__(self) -> None:
        self.console = stderr_console()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[alarms]}{task.fields[numbers]}", table_column=Column(ratio=1)),  # wraps
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.log_every = self.line_every = 1

    def start(self, start: RunStart) -> None:
        self.log_every, self.line_every = start.log_every, max(1, start.max_steps // LINES_WITHOUT_A_TERMINAL)
        self.task = self.progress.add_task(start.name, total=start.max_steps, numbers="", alarms="")
        self.progress.start()
        text = f"{start.name}: {start.parameters / 1e6:.2f} M parameters"
        text += f", {start.data}" if start.data else ""
        self._print(text + (f", resumed at step {start.step}" if start.step else ""))
        self._print(f"{start.name}: {'; '.join(start.optimizers)}")
        for note in start.notes:
            self._print(note)
        for change in start.changes:
            self._print(f"changed: {change}")
        for warning in start.warnings:
            self.message(warning, "warning")
        self.progress.update(self.task, completed=start.step)

    def stage(self, stage: Stage, count: int) -> None:
        if count > 1:
            weights = {"kl_weight": stage.kl_weight, "free_bits": stage.free_bits}
            named = [f"{name} {value:g}" for name, value in weights.items() if value is not None]
            text = f"stage {stage.number} of {count}, to step {stage.end}: rows of {stage.seq_len} tokens, "
            self._print(text + ", ".join([f"{stage.batch_size} per batch", *named]))

    def metrics(self, update: MetricsUpdate) -> None:
        step, split = update.step, update.split
        if self.task is not None:
            if split == "train":
                self.progress.update(self.task, completed=step, numbers=_numbers(update.line, update.gap))
            labels = ", ".join(update.alarms)
            self.progress.update(self.task, alarms=f"[red]{labels}![/] " if labels else "")
        if split == "validation" or (split == "train" and self.progress.disable and self._prints_line(step)):
            self._print(f"step {step} {split}: {_numbers(update.line)}")
        for label, advice in update.new_alarms.items():
            self._print(f"step {step} {label}: {advice}", style="yellow")
        for label in update.cleared:
            self._print(f"step {step} {label}: resolved")

    def message(self, text: str, level: Level = "info") -> None:
        if level == "warning":
            self._print(f"warning: {text}", style="yellow")
        else:
            self._print(text)

    def sample(self, step: int, text: str) -> None:
        line = Text.assemble((f"step {step} generates: ", "dim"), printable(text, keep=""))
        if self.console.is_terminal:
            line.truncate(self.console.width, overflow="ellipsis")
        self.console.print(line, soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, soft_wrap=True)

    def _prints_line(self, step: int) -> bool:
        return step // self.line_every != (step - self.log_every) // self.line_every


def _numbers(line: Mapping[str, MetricValue], gap: float | None = None) -> str:
    """Formats the values of a line briefly, with `gap` if the line has none."""
    gap = _number(line, "gap", gap)
    hinge, spikes = _number(line, "kl_hinge"), _number(line, "spikes")
    beyond = f" ({hinge:.2f} beyond)" if hinge is not None and hinge >= MIN_SHOWN_HINGE else ""
    parts = [
        _format(line, "reconstruction", "reconstruction {:.3f}"),
        _format(line, "kl", f"KL {{:.2f}} bits{beyond}"),
        _format(line, "live_bits", "{} live"),
        f"gap {gap:.3f}" if gap is not None else "",
        *(_format(line, name, f"{name} {{:.3f}}") for name in ("elbo", "nll", "prior")),
        _format(line, "grad_norm", "gradient {:.2f}"),
        f"{spikes} spikes" if spikes else "",
        _format(line, "tokens_per_second", "{:,.0f} tokens/s"),
    ]
    return ", ".join(part for part in parts if part)


def _number(line: Mapping[str, MetricValue], name: str, default: float | None = None) -> float | None:
    value = line.get(name, default)
    assert not isinstance(value, str), name
    return value


def _format(line: Mapping[str, MetricValue], name: str, template: str) -> str:
    value = _number(line, name)
    return "" if value is None else template.format(value)
