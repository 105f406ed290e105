"""Data that a monitor publishes while a run trains, and the interface of its subscribers."""

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
    Description of a run when it starts.

    Attributes:
        name: name of the run's folder.
        step: step of the checkpoint that is resumed; 0 for a new run.
        max_steps, log_every: as in the settings, in optimizer steps.
        parameters: number of parameters of the model.
        data: size of the training text; empty if it is streamed.
        optimizers: descriptions of the parameter groups and their optimizers.
        notes: notes on the processes that share the work.
        changes: settings that differ from those of the checkpoint.
        warnings: warnings about settings and data.
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
    A line of `metrics.jsonl` and the current alarms.

    Attributes:
        line: `step`, `split`, and the values.
        alarms: advice of all current alarms, by label.
        new_alarms: alarms that the previous line did not raise.
        cleared: labels of alarms that this line cleared.
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
    """Receives what a monitor publishes, in the main process. Subclasses override the methods they need."""

    def start(self, start: RunStart) -> None:
        """Called before the first step."""

    def stage(self, stage: Stage, count: int) -> None:
        """Called when one of `count` stages begins."""

    def metrics(self, update: MetricsUpdate) -> None:
        """Called for each line of metrics."""

    def message(self, text: str, level: Level = "info") -> None:
        """Called with a message for the user."""

    def sample(self, step: int, text: str) -> None:
        """Called with each text that the model generates as a sample."""

    def close(self) -> None:
        """Called after the last step, whether the run has ended or failed."""


class MetricsFile(Subscriber):
    """Appends each line to `metrics.jsonl`."""

    def __init__(self, file: Path):
        self.file = file

    def metrics(self, update: MetricsUpdate) -> None:
        append_line(self.file, update.line)
