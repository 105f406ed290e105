"""
Figures to watch while a run trains (FAQ: is my model working?), each with its meaning or advice.

Advice depends on the settings and on the progress of the run. It never suggests a value that is already set, nor one
that docs/plan.md and the FAQ advise against.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from free_transformer.evaluation.usage import LIVE_BITS, SPENT_SHARE
from free_transformer.settings import Settings
from free_transformer.settings.curriculum import stage_at, stages_of

WINDOW = 10  # lines of metrics that a diagnosis takes into account
WATCHED_FROM = 0.1  # share of the steps; earlier figures vary too much
PLAN_STEPS = 300  # by then four of the five runs of configs/free_transformer.yaml use the plan (docs/plan.md, collapse)
RISE = 1.02  # ratio of the reconstruction in two consecutive windows
LEVEL = 0.998
CUT = 10.0  # times training.grad_clip
PATIENCE = 3  # evaluations without a better held-out loss
# With fewer free bits, runs collapse more often (docs/plan.md, collapse). Plans that cover only part of a text need
# fewer: at 1 bit per token, generated text breaks.
MIN_FREE_BITS, MIN_FREE_BITS_PER_TEXT = 0.5, 1.0
NO_REMEDY_LEFT = "all settings that help are already in use"

Line = Mapping[str, Any]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Diagnostic:
    """
    A figure of a run.

    Attributes:
        label: name of the figure, such as `KL`.
        value: value with its unit, `-` if there is none yet.
        advice: one sentence that explains the figure or says what to do.
        alarm: whether action is needed.
    """

    label: str
    value: str
    advice: str
    alarm: bool = False


@dataclass
class RunHistory:
    """
    The metrics on which diagnostics are based.

    Attributes:
        train: the last `2 * WINDOW` lines of training.
        validation: the last validation, empty if there is none.
        collapse: the last check for posterior collapse, empty if there is none.
        best: held-out ELBO in nats per token, and step, of the best validation of the last stage.
        since_best: number of validations since.
    """

    settings: Settings
    train: deque[Line] = field(default_factory=lambda: deque(maxlen=2 * WINDOW))
    validation: Line = field(default_factory=dict)
    collapse: Line = field(default_factory=dict)
    best: tuple[float, int] | None = None
    since_best: int = 0

    @property
    def step(self) -> int:
        return max((line["step"] for line in (*self.train, self.validation) if line), default=0)

    @property
    def has_plan(self) -> bool:
        return self.settings.model.kind == "free"

    @property
    def free_bits(self) -> float:
        """The free bits of the current step, in bits per plan; stages and schedules change them."""
        last = max(self.step - 1, 0)
        return stage_at(stages_of(self.settings), last).weights(self.settings, last)["free_bits"]

    @property
    def early_steps(self) -> int:
        """The last step without alarms: the end of the warm-up, or a tenth of the run if later."""
        training = self.settings.training
        return max(training.warmup_steps, int(WATCHED_FROM * training.max_steps))

    @property
    def plan_steps(self) -> int:
        """The last step at which an unused plan is normal: 300, or half of a shorter run, or `early_steps` if later."""
        return max(self.early_steps, min(PLAN_STEPS, self.settings.training.max_steps // 2))

    @property
    def has_all_steps(self) -> bool:
        return self.step >= self.settings.training.max_steps

    @property
    def is_early(self) -> bool:
        return self.step <= self.early_steps

    def plan_may_be_unused(self, step: int) -> bool:
        """Whether a step is so early that an unused plan is normal."""
        return step <= self.plan_steps

    def last(self, name: str) -> float | None:
        return self.train[-1].get(name) if self.train else None

    def diagnostics(self) -> list[Diagnostic]:
        """Returns all figures of this kind of model, the most important first."""
        plan = [_kl, _hinge, _gap, _live_bits] if self.has_plan else []
        return [figure(self) for figure in (_reconstruction, *plan, _held_out, _gradient, _spikes)]


def plan_advice(settings: Settings) -> str:
    """Returns what to change if the plan is not used."""
    remedies = ", ".join(plan_remedies(settings))
    return remedies or f"{NO_REMEDY_LEFT}; train longer, or check the training text"


def plan_remedies(settings: Settings) -> list[str]:
    """Returns the FAQ's remedies for an unused plan that the settings do not include yet."""
    model, remedies = settings.model, []
    per_text = model.plan_span == "sequence"
    wanted = MIN_FREE_BITS_PER_TEXT if per_text else MIN_FREE_BITS
    if model.free_bits < wanted:
        remedies.append(f"raise model.free_bits to {'1 or 2 bits' if per_text else f'{wanted:g} bits'}")
    if per_text and not model.aggregate_weight:
        remedies.append("set model.aggregate_weight=1")
    if per_text and not model.min_bits:  # with many plans per text, it fills them with noise
        remedies.append("set model.min_bits slightly below model.free_bits")
    if (model.model_extra or {}).get("table_init", "bit_linear") != "bit_linear":
        remedies.append("use model.table_init=bit_linear")
    if settings.optimizer_name != "muon" and model.pretrained is None:
        remedies.append("use optimizer.name=muon")
    if not per_text:
        remedies.append("let each plan cover more tokens (model.plan_span)")
    return remedies


def _reconstruction(history: RunHistory) -> Diagnostic:
    label, value = "reconstruction", _with_unit(history.last("reconstruction"), "nats per token")
    values = [line["reconstruction"] for line in history.train]
    if len(values) < 2 * WINDOW or history.is_early:
        return Diagnostic(label, value, "should fall; do not compare it with a baseline's loss")
    change = mean(values[WINDOW:]) / max(mean(values[:WINDOW]), 1e-9)
    if change > RISE:
        return Diagnostic(
            label, value, "rises: lower training.learning_rate, or check the most recent text", alarm=True
        )
    if change > LEVEL:
        advice = "has leveled off" if history.has_all_steps else "no longer falls: stop once the held-out loss does too"
        return Diagnostic(label, value, advice)
    return Diagnostic(label, value, "falls, as it should; do not compare it with a baseline's loss")


def _kl(history: RunHistory) -> Diagnostic:
    kl, free = history.last("kl"), history.free_bits
    value = _with_unit(kl, "bits per plan", 2)
    if kl is not None and kl < SPENT_SHARE * free and not history.plan_may_be_unused(history.step):
        advice = f"far below the {free:g} free bits, the plan collapses: {plan_advice(history.settings)}"
        return Diagnostic("KL", value, advice, alarm=True)
    return Diagnostic("KL", value, f"information that a plan carries; {free:g} bits of it are free")


def _hinge(history: RunHistory) -> Diagnostic:
    hinge, free = history.last("kl_hinge"), history.settings.model.free_bits
    label, value = "KL beyond the free bits", _with_unit(hinge, "bits per plan", 2)
    if hinge is not None and free > 0 and hinge > free and not history.is_early:
        advice = (
            "plans use over twice the free bits: raise model.free_bits to allow it or training.kl_weight to limit it"
        )
        return Diagnostic(label, value, advice, alarm=True)
    return Diagnostic(label, value, "the part of the KL that is penalized; near 0 if the free bits suffice")


def _gap(history: RunHistory) -> Diagnostic:
    value = _with_unit(history.validation.get("gap"), "nats per token", 4)
    if history.collapse.get("collapsed"):
        advice = f"collapsed: {history.collapse['warning']}. To do: {plan_advice(history.settings)}"
        return Diagnostic("prior gap", value, advice, alarm=True)
    return Diagnostic("prior gap", value, "cost of using a random plan; without a gap, the plan is not used")


def _live_bits(history: RunHistory) -> Diagnostic:
    live, model = history.last("live_bits"), history.settings.model
    value = "-" if live is None else f"{live} of {model.latent_dim}"
    if live == 0 and history.plan_may_be_unused(history.step):
        return Diagnostic("live bits", value, f"no bit is used yet: normal up to step {history.plan_steps}")
    enough = model.free_bits == 0 or model.free_bits > LIVE_BITS * model.latent_dim  # for at least one live bit
    if live == 0 and enough:
        advice = f"no bit carries information: {plan_advice(history.settings)}"
        return Diagnostic("live bits", value, advice, alarm=True)
    return Diagnostic("live bits", value, f"bits with a KL above {LIVE_BITS:g} bits; the others are harmless")


def _held_out(history: RunHistory) -> Diagnostic:
    label = "held-out ELBO" if history.has_plan else "held-out NLL"
    settings, patience = history.settings, history.settings.evaluation.early_stopping
    if history.best is None or not history.validation:
        wanted = {"data.validation": settings.data.validation, "training.eval_every": settings.training.eval_every}
        missing = " and ".join(name for name, value in wanted.items() if not value)
        return Diagnostic(label, "-", f"needs {missing}" if missing else "available after the first validation")
    value = _with_unit(history.validation["loss"], "nats per token", 4)
    best = f"best {history.best[0]:.4f} at step {history.best[1]}"
    if history.since_best >= PATIENCE:
        kept = history.settings.keeps_best
        stop = "model/ keeps the best weights" if kept else "train with checkpoint.keep_best=true, or add text"
        if not history.has_all_steps:
            stop = "stop, or add text" if kept else "stop (evaluation.early_stopping), or add text"
        stop = f"training stops after {patience}" if patience and not history.has_all_steps else stop
        advice = f"{best}, no better for {history.since_best} validations: {stop}"
        return Diagnostic(label, value, advice, alarm=True)
    return Diagnostic(label, value, f"{best}; the figure that matters: keep training while it falls")


def _gradient(history: RunHistory) -> Diagnostic:
    norm, clip = history.last("grad_norm"), history.settings.training.grad_clip
    value = "-" if norm is None else f"{norm:.3g}"
    recent = [line["grad_norm"] for line in history.train if "grad_norm" in line][-WINDOW:]
    if recent and clip > 0 and median(recent) > CUT * clip and not history.is_early:
        advice = f"over {CUT:g} times training.grad_clip={clip:g}: lower training.learning_rate, or raise the clip"
        return Diagnostic("gradient norm", value, advice, alarm=True)
    return Diagnostic("gradient norm", value, "should be steady; a slow rise precedes instability")


def _spikes(history: RunHistory) -> Diagnostic:
    recent = list(history.train)[-WINDOW:]
    count = sum(line.get("spikes", 0) for line in recent)
    if count == 0:
        return Diagnostic("spikes", "0", f"steps with a much higher loss or gradient, in the last {WINDOW} lines")
    last = max(line["step"] for line in recent if line.get("spikes", 0))
    longer = "lengthen training.warmup_steps, " if last <= 2 * history.early_steps else ""
    advice = f"lower training.learning_rate, {longer}or check the text of steps up to {last}"
    return Diagnostic("spikes", str(count), advice, alarm=True)


def _with_unit(value: float | None, unit: str, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f} {unit}"
