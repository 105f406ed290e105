"""The monitor of a run: tracks the best step, decides when to stop, raises alarms, and notifies its subscribers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from free_transformer.runs.diagnostics import WINDOW, Diagnostic, Line, RunHistory
from free_transformer.runs.subscribers import Level, MetricsUpdate, MetricValue, RunStart, Subscriber
from free_transformer.settings import Settings
from free_transformer.settings.curriculum import Stage, stages_of

VALIDATION_SAMPLES = 4  # plans per text, for the NLL of a validation
LOSS_SPIKE, NORM_SPIKE = 1.5, 4.0  # multiples of the median of the previous lines


class Monitor:
    """
    Monitors a run through the lines of `metrics.jsonl`.

    The training loop of every process has a monitor with the same state and asks it when to stop and which weights to
    keep. In the main process it has subscribers. `watch` and `report` build a monitor from the lines of a file.

    Args:
        lines: lines of the run so far.

    Attributes:
        best: held-out ELBO in nats per token, and step, of the best validation of the last stage. Earlier stages train
            on other text, or with other loss weights.
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

    def plan_may_be_unused(self, step: int) -> bool:
        """Whether a step is so early that an unused plan is normal."""
        return self.history.plan_may_be_unused(step)

    def is_best(self, step: int) -> bool:
        """Whether the weights of a step are the best so far and the settings say to keep the best."""
        return self.settings.keeps_best and self.best is not None and self.best[1] == step

    def should_continue(self, step: int) -> bool:
        """Whether training continues after `step` steps: below `max_steps`, and not stopped early."""
        patience = self.settings.evaluation.early_stopping
        return step < self.settings.training.max_steps and not 0 < patience <= self.since_best

    def diagnostics(self) -> list[Diagnostic]:
        """Returns all figures of this kind of model, the most important first."""
        return self.history.diagnostics()

    def alarms(self) -> list[Diagnostic]:
        return [diagnostic for diagnostic in self.diagnostics() if diagnostic.alarm]

    def count_spikes(self, losses: Iterable[float], norms: Iterable[float]) -> int:
        """Counts the steps since the last line whose loss or gradient norm is far above that of the previous lines."""
        train = self.history.train
        if len(train) < WINDOW or self.step <= self.settings.training.warmup_steps:
            return 0
        loss = LOSS_SPIKE * median(line["loss"] for line in train)
        norm = NORM_SPIKE * median(line.get("grad_norm", 0.0) for line in train)
        return sum(a > loss or b > norm for a, b in zip(losses, norms, strict=True))

    def add(self, line: Line) -> None:
        """Adds a line to the history without publishing it."""
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
        """Adds a line and publishes it. The line contains advice if an alarm is new or has cleared."""
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
    An alarm of a run and the steps at which it was raised.

    Attributes:
        label, advice: label and latest advice of the alarm.
        first, last: steps of the first and the last line of metrics with this alarm.
        is_over: whether the newest line no longer raises it.
    """

    label: str
    advice: str
    first: int
    last: int
    is_over: bool


def alarm_periods(settings: Settings, lines: Iterable[Line]) -> list[AlarmPeriod]:
    """Returns the alarms raised by the lines of a run, one per label: current ones first, then by their first step."""
    monitor, found = Monitor(settings), dict[str, AlarmPeriod]()
    for line in lines:
        monitor.add(line)
        found = {label: replace(period, is_over=True) for label, period in found.items()}
        for alarm in monitor.alarms():
            first = found[alarm.label].first if alarm.label in found else monitor.step
            found[alarm.label] = AlarmPeriod(alarm.label, alarm.advice, first, monitor.step, is_over=False)
    return sorted(found.values(), key=lambda period: (period.is_over, period.first))
