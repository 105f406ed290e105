"""What a monitor publishes while a run trains, and the protocol of those that receive it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from free_transformer.runs.lines import append_line
from free_transformer.settings.curriculum import Stage

MetricValue = float | str
Level = Literal["info", "warning"]


@dataclass(frozen=True)
class RunStart:
    """
    What is trained.

    Attributes:
        name: of the run's folder.
        step: of the checkpoint that is resumed; 0 for a new run.
        max_steps, log_every: in optimizer steps.
        parameters: number of parameters of the model.
        data: size of the training text; empty if it is streamed.
        optimizers: groups of parameters, with the optimizer of each.
        notes: on the processes that share the work.
        changes: settings that differ from those of the checkpoint.
        warnings: of the settings and of the data.
    """

    name: str
    step: int
    max_steps: int
    log_every: int
    parameters: int
    data: str = ""
    optimizers: Sequence[str] = ()
    notes: Sequence[str] = ()
    changes: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class MetricsUpdate:
    """
    A line of `metrics.jsonl`, and the alarms after it.

    Attributes:
        line: `step`, `split`, and the values.
        alarms: advice by label, of all current alarms.
        new_alarms: those that the line before did not raise.
        cleared: labels of alarms that this line has ended.
        gap: prior gap of the last validation, in nats per token.
    """

    line: Mapping[str, MetricValue]
    alarms: Mapping[str, str]
    new_alarms: Mapping[str, str]
    cleared: Sequence[str]
    gap: float | None = None

    @property
    def step(self) -> int:
        return int(self.line["step"])

    @property
    def split(self) -> str:
        return str(self.line["split"])

    @property
    def values(self) -> dict[str, MetricValue]:
        """The line without `step` and `split`."""
        return {name: value for name, value in self.line.items() if name not in ("step", "split")}


class Subscriber:
    """Receives what a monitor publishes, in the main process. Classes that inherit it implement what they need."""

    def start(self, start: RunStart) -> None:
        """The first step is about to run."""

    def stage(self, stage: Stage, count: int) -> None:
        """A stage begins, one of `count`."""

    def metrics(self, update: MetricsUpdate) -> None:
        """A line of metrics is complete."""

    def message(self, text: str, level: Level = "info") -> None:
        """Something that a person should know."""

    def sample(self, step: int, text: str) -> None:
        """The model has generated a text."""

    def close(self) -> None:
        """No more steps follow, because the run has ended or failed."""


class MetricsFile(Subscriber):
    """Appends each line to `metrics.jsonl`."""

    def __init__(self, file: Path):
        self.file = file

    def metrics(self, update: MetricsUpdate) -> None:
        append_line(self.file, update.line)
