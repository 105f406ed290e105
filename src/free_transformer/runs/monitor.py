"""The monitor of a run: it keeps the best step, decides when to stop, raises alarms, and informs its subscribers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from free_transformer.runs.diagnostics import WINDOW, Diagnostic, Line, RunHistory
from free_transformer.runs.subscribers import Level, MetricsUpdate, MetricValue, RunStart, Subscriber
from free_transformer.settings import Settings
from free_transformer.settings.curriculum import Stage, stages_of

VALIDATION_SAMPLES = 4  # plans per text, for the NLL of a validation
LOSS_SPIKE, NORM_SPIKE = 1.5, 4.0  # times the median of the lines before


class Monitor:
    """
    Follows a run by the lines of `metrics.jsonl`.

    The training loop owns a monitor, which is the same in every process, and asks it when to stop and which weights to
    keep. In the main process it has subscribers. `watch` and `report` build one from the lines of a file.

    Args:
        lines: the run's lines so far.

    Attributes:
        best: held-out ELBO in nats per token and step of the best validation of the last stage. Those before train on
            other text, or with other weights of the loss.
    """

    def __init__(self, settings: Settings, lines: Iterable[Line] = (), subscribers: Sequence[Subscriber] = ()):
        self.settings = settings
        self.history = RunHistory(settings)
        self.subscribers = list(subscribers)
        self._last_stage = stages_of(settings)[-1].start
        for line in lines:
            self.add(line)
        self._raised = [alarm.label for alarm in self.alarms()]

    @property
    def best(self) -> tuple[float, int] | None:
        return self.history.best

    @property
    def since_best(self) -> int:
        """Number of validations since the best one."""
        return self.history.since_best

    @property
    def step(self) -> int:
        return self.history.step

    def is_early(self, step: int) -> bool:
        """Whether a step is so early that an unused plan is no reason for an alarm."""
        return self.history.is_early(step)

    def is_best(self, step: int) -> bool:
        """Whether the weights of a step are the best so far and the settings ask to keep these."""
        return self.settings.keeps_best and self.best is not None and self.best[1] == step

    def should_continue(self, step: int) -> bool:
        """Whether `max_steps` is not reached after `step` steps, and the patience of early stopping has not run out."""
        patience = self.settings.evaluation.early_stopping
        return step < self.settings.training.max_steps and not 0 < patience <= self.since_best

    def diagnostics(self) -> list[Diagnostic]:
        """Every figure that this kind of model has, the most important first."""
        return self.history.diagnostics()

    def alarms(self) -> list[Diagnostic]:
        return [diagnostic for diagnostic in self.diagnostics() if diagnostic.alarm]

    def count_spikes(self, losses: Iterable[float], norms: Iterable[float]) -> int:
        """The number of steps since the last line with a loss or gradient norm far above those of the lines before."""
        train = self.history.train
        if len(train) < WINDOW or self.step <= self.settings.training.warmup_steps:
            return 0
        loss = LOSS_SPIKE * median(line["loss"] for line in train)
        norm = NORM_SPIKE * median(line.get("grad_norm", 0.0) for line in train)
        return sum(a > loss or b > norm for a, b in zip(losses, norms, strict=True))

    def add(self, line: Line) -> None:
        """Takes a line into account without publishing it."""
        history = self.history
        if line["split"] == "train":
            history.train.append(line)
        elif line["split"] == "watcher":
            history.collapse = line
        elif line["split"] == "validation":
            history.validation = line
            if line["step"] <= self._last_stage:
                return
            if history.best is None or line["loss"] < history.best[0]:
                history.best, history.since_best = (line["loss"], line["step"]), 0
            else:
                history.since_best += 1

    def record(self, step: int, split: str, values: Mapping[str, MetricValue | None]) -> None:
        """Adds a line and publishes it. Advice is part of the line if an alarm is new or has ended."""
        line: dict[str, MetricValue] = {"step": step, "split": split}
        line |= {name: value for name, value in values.items() if value is not None}
        self.add(line)
        alarms = {alarm.label: alarm.advice for alarm in self.alarms()}
        new = {label: advice for label, advice in alarms.items() if label not in self._raised}
        cleared = [label for label in self._raised if label not in alarms]
        if new or cleared:
            line["advice"] = "; ".join(f"{label}: {advice}" for label, advice in alarms.items()) or "all is well"
        self._raised = list(alarms)
        update = MetricsUpdate(line, alarms, new, cleared, gap=self.history.validation.get("gap"))
        for subscriber in self.subscribers:
            subscriber.metrics(update)

    def start(self, start: RunStart) -> None:
        for subscriber in self.subscribers:
            subscriber.start(start)

    def stage(self, stage: Stage, count: int) -> None:
        for subscriber in self.subscribers:
            subscriber.stage(stage, count)

    def message(self, text: str, level: Level = "info") -> None:
        for subscriber in self.subscribers:
            subscriber.message(text, level)

    def sample(self, step: int, text: str) -> None:
        for subscriber in self.subscribers:
            subscriber.sample(step, text)

    def close(self) -> None:
        for subscriber in self.subscribers:
            subscriber.close()


@dataclass(frozen=True)
class AlarmPeriod:
    """
    An alarm of a run and when it was raised.

    Attributes:
        label, advice: of its last diagnosis.
        first, last: steps of the first and the last line of metrics with this alarm.
        is_over: whether the newest line is without it.
    """

    label: str
    advice: str
    first: int
    last: int
    is_over: bool


def alarm_periods(settings: Settings, lines: Iterable[Line]) -> list[AlarmPeriod]:
    """The alarms that the lines of a run raised, one entry per label: current ones first, then by their first step."""
    monitor, found = Monitor(settings), dict[str, AlarmPeriod]()
    for line in lines:
        monitor.add(line)
        found = {label: replace(period, is_over=True) for label, period in found.items()}
        for alarm in monitor.alarms():
            first = found[alarm.label].first if alarm.label in found else monitor.step
            found[alarm.label] = AlarmPeriod(alarm.label, alarm.advice, first, monitor.step, is_over=False)
    return sorted(found.values(), key=lambda period: (period.is_over, period.first))
