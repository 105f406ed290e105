"""What to watch while a run trains (FAQ: is my model working?): each figure, and what to do about it."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from free_transformer.evaluation.usage import ADVICE, SPENT_SHARE
from free_transformer.settings import Settings
from free_transformer.settings.curriculum import stages_of

VALIDATION_SAMPLES = 4  # plans per text, for the NLL of a validation
WINDOW = 10  # lines of metrics that a figure is judged by
WATCHED_FROM = 0.1  # of the steps: a plan is seldom used sooner
RISE = 1.02  # of the reconstruction, from one window to the next
LEVEL = 0.998
LOSS_SPIKE, NORM_SPIKE = 1.5, 4.0  # times the median of the lines before
CUT = 10.0  # times training.grad_clip

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """
    A figure of a run.

    Attributes:
        label: as a person reads it, such as `KL`.
        value: with its unit, `-` where there is none yet.
        advice: one sentence: what it means, or what to do.
        alarm: whether something should be done.
    """

    label: str
    value: str
    advice: str
    alarm: bool = False


class Watcher:
    """Reads the lines of `metrics.jsonl` one after the other, the newest of which it judges by."""

    def __init__(self, settings: Settings, lines: Iterable[Line] = ()):
        self.settings = settings
        self.train: deque[Line] = deque(maxlen=2 * WINDOW)
        self.validation: Line = {}
        self.collapse: Line = {}
        self.best: tuple[float, int] | None = None  # held-out ELBO and its step, of the last stage
        self.since_best = 0  # validations
        self.last_stage = stages_of(settings)[-1].start
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        if line["split"] == "train":
            self.train.append(line)
        elif line["split"] == "watcher":
            self.collapse = line
        elif line["split"] == "validation":
            self.validation = line
            if line["step"] <= self.last_stage:  # those before train on other text, or for other ends
                return
            if self.best is None or line["loss"] < self.best[0]:
                self.best, self.since_best = (line["loss"], line["step"]), 0
            else:
                self.since_best += 1

    @property
    def step(self) -> int:
        return max((line["step"] for line in (*self.train, self.validation) if line), default=0)

    def spikes(self, losses: Iterable[float], norms: Iterable[float]) -> int:
        """How many steps since the last line stand far above those before in loss or norm of the gradient."""
        if len(self.train) < WINDOW or self.step <= self.settings.training.warmup_steps:
            return 0
        loss = LOSS_SPIKE * median(line["loss"] for line in self.train)
        norm = NORM_SPIKE * median(line.get("grad_norm", 0.0) for line in self.train)
        return sum(a > loss or b > norm for a, b in zip(losses, norms, strict=True))

    def readings(self) -> list[Reading]:
        """Every figure that this kind of model has, in the order in which one would look."""
        plan = [self._kl, self._hinge, self._gap, self._live_bits] if self._is_free else []
        figures = [self._reconstruction, *plan, self._held_out, self._gradient, self._spikes]
        return [figure() for figure in figures]

    def alarms(self) -> list[Reading]:
        return [reading for reading in self.readings() if reading.alarm]

    @property
    def _is_free(self) -> bool:
        return self.settings.model.kind == "free"

    def is_early(self, step: int) -> bool:
        training = self.settings.training
        return step <= max(training.warmup_steps, WATCHED_FROM * training.max_steps)

    @property
    def _is_early(self) -> bool:
        return self.is_early(self.step)

    def _last(self, name: str) -> Any:
        return self.train[-1].get(name) if self.train else None

    def _reconstruction(self) -> Reading:
        label, value = "reconstruction", _with_unit(self._last("reconstruction"), "nats per token")
        values = [line["reconstruction"] for line in self.train]
        if len(values) < 2 * WINDOW or self._is_early:
            return Reading(label, value, "should fall; never compare it with a baseline's loss")
        change = mean(values[WINDOW:]) / max(mean(values[:WINDOW]), 1e-9)
        if change > RISE:
            return Reading(label, value, "rises: lower training.learning_rate, or look at the newest text", alarm=True)
        if change > LEVEL:
            return Reading(label, value, "has levelled off: stop when the held-out loss has too")
        return Reading(label, value, "falls, as it should; never compare it with a baseline's loss")

    def _kl(self) -> Reading:
        kl, free = self._last("kl"), self.settings.model.free_bits
        value = _with_unit(kl, "bits per plan", 2)
        if kl is not None and kl < SPENT_SHARE * free and not self._is_early:
            return Reading("KL", value, f"far under the {free:g} free bits, the plan is dying: {ADVICE}", alarm=True)
        return Reading("KL", value, f"what a plan spends; {free:g} bits of it are free")

    def _hinge(self) -> Reading:
        hinge, free = self._last("kl_hinge"), self.settings.model.free_bits
        value = _with_unit(hinge, "bits per plan", 2)
        if hinge is not None and free > 0 and hinge > free and not self._is_early:
            advice = "plans spend over twice what is free: raise model.free_bits to let them, training.kl_weight not to"
            return Reading("KL beyond the free bits", value, advice, alarm=True)
        return Reading("KL beyond the free bits", value, "what the loss counts; near 0 where free bits are enough")

    def _gap(self) -> Reading:
        value = _with_unit(self.validation.get("gap"), "nats per token", 4)
        if self.collapse.get("collapsed"):
            return Reading("prior gap", value, f"collapsed: {self.collapse['warning']}", alarm=True)
        return Reading("prior gap", value, "what a random plan costs: without a gap the plan is not used")

    def _live_bits(self) -> Reading:
        live, bits = self._last("live_bits"), self.settings.model.latent_dim
        value = "-" if live is None else f"{live} of {bits}"
        if live == 0 and not self._is_early:
            return Reading("live bits", value, f"no bit says anything: {ADVICE}", alarm=True)
        return Reading("live bits", value, "bits that spend over 0.05; if many stay dead, take a smaller latent_dim")

    def _held_out(self) -> Reading:
        label = "held-out ELBO" if self._is_free else "held-out NLL"
        if self.best is None or not self.validation:
            return Reading(label, "-", "comes with the first validation (data.validation, training.eval_every)")
        value = _with_unit(self.validation["loss"], "nats per token", 4)
        best = f"best {self.best[0]:.4f} at step {self.best[1]}"
        if self.since_best >= 3:
            stop = "stop (evaluation.early_stopping), or more text"
            return Reading(label, value, f"{best}, no better for {self.since_best} validations: {stop}", alarm=True)
        return Reading(label, value, f"{best}; the number to go by, train on while it falls")

    def _gradient(self) -> Reading:
        norm, clip = self._last("grad_norm"), self.settings.training.grad_clip
        value = "-" if norm is None else f"{norm:.3g}"
        recent = [line["grad_norm"] for line in self.train if "grad_norm" in line][-WINDOW:]
        if recent and clip > 0 and median(recent) > CUT * clip and not self._is_early:
            advice = f"over {CUT:g} times training.grad_clip={clip:g}: lower training.learning_rate, or raise the clip"
            return Reading("gradient norm", value, advice, alarm=True)
        return Reading("gradient norm", value, "steady is good; a slow rise comes before trouble")

    def _spikes(self) -> Reading:
        recent = list(self.train)[-WINDOW:]
        count = sum(line.get("spikes", 0) for line in recent)
        if count == 0:
            return Reading("spikes", "0", f"steps far above the others, in the last {WINDOW} lines")
        last = max(line["step"] for line in recent if line.get("spikes", 0))
        advice = (
            "lower training.learning_rate, lengthen training.warmup_steps, or look at the text of the steps up to "
            f"{last}"
        )
        return Reading("spikes", str(count), advice, alarm=True)


def _with_unit(value: float | None, unit: str, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f} {unit}"
