"""
The verdict on a run: whether the plan is used, how many bits it uses, its cost, and what to do next.

It is based on the files in the run's folder. Reports, `train`, `evaluate` and `compare` show it.
"""

import shlex
from dataclasses import dataclass
from typing import Literal

from free_transformer.evaluation.usage import LIVE_BITS
from free_transformer.runs.diagnostics import NO_REMEDY_LEFT, plan_remedies
from free_transformer.runs.lines import JsonObject
from free_transformer.runs.monitor import Monitor
from free_transformer.runs.run import Run

Tone = Literal["good", "open", "problem"]
PLAN_ALARMS = ("KL", "prior gap", "live bits")  # labels of diagnostics that mean an unused plan
INTERVAL = 1.96  # standard errors on either side of a 95 % interval
NOTHING_LOGGED = "No step has been logged yet."


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        sentences: one to three sentences.
        next_step: one sentence, None if there is nothing to do.
        command: command for the next step, None if there is none.
        tone: `good` if the plan is used, `problem` if not, `open` if that is not known yet.
    """

    sentences: tuple[str, ...]
    next_step: str | None = None
    command: str | None = None
    tone: Tone = "open"

    @property
    def lines(self) -> list[str]:
        """Lines for a terminal: the sentences, then the next step with its command."""
        follow = [] if self.next_step is None else [f"Next: {self.next_step}{f' {self.command}' * bool(self.command)}"]
        return [" ".join(self.sentences), *follow]


def verdict_of(run: Run) -> Verdict:
    """Returns the verdict on a run, based on its metrics and the results measured on its current model."""
    monitor = Monitor(run.settings, run.read_metrics())
    evaluation = run.current_results(run.evaluation_file) if run.has_ended else None
    if run.settings.model.kind == "baseline":
        return _baseline(run, monitor, evaluation)
    comparison = run.current_results(run.comparison_file) if run.has_ended else None
    used, sentence = _usage(evaluation) if evaluation is not None else _usage_in_training(monitor, run.has_ended)
    sentences = [sentence] + ([cost_sentence(comparison)] if comparison is not None else [])
    next_step, command = _next_step(run, monitor, used, evaluation, comparison)
    tone: Tone = "open" if used is None else "good" if used else "problem"
    return Verdict(tuple(sentences), next_step, command, tone)


def cost_interval(comparison: JsonObject) -> tuple[float, float | None]:
    """Returns NLL minus baseline NLL and half its 95 % interval (None for a single text), in nats per token."""
    error = comparison.get("standard_error")
    return comparison["difference"], None if error is None else INTERVAL * error


def cost_sentence(comparison: JsonObject) -> str:
    """Describes the cost compared to the baseline, with its interval and meaning."""
    cost, margin = cost_interval(comparison)
    if margin is None:
        return f"Cost against the baseline: {cost:+.4f} nats per token, on a single text."
    meaning = "no significant difference"
    if abs(cost) > margin:
        meaning = "the plan costs likelihood" if cost > 0 else "the likelihood is better than the baseline's"
    return f"Cost against the baseline: {cost:+.4f} ± {margin:.4f} nats per token (95 % interval): {meaning}."


def _usage(evaluation: JsonObject) -> tuple[bool, str]:
    """Returns whether the plan is used, and a sentence about it, from `metrics.json`."""
    if evaluation.get("warning"):
        return False, _sentence(evaluation["warning"])
    usage = evaluation.get("usage") or {}
    live, bits = usage.get("live_bits", 0), len(usage.get("bits_per_position", ()))
    if not live:
        gap = evaluation["gap"]
        return True, (
            f"The plan is used: a text's own plan saves {gap:.4f} nats per token against a random one, although no "
            f"single bit is live (above {LIVE_BITS:g} bits)."
        )
    known = ""
    if evaluation.get("documents", 0) > 1:
        known = f" and distinguish{'es' * (live == 1)} texts by up to {usage['information']:.1f} bits"
    return True, f"The plan is used: {_live(live, bits)}{known}."


def _usage_in_training(monitor: Monitor, ended: bool) -> tuple[bool | None, str]:
    """Returns whether the plan is used (None if unknown) and a sentence about it, from the metrics of training."""
    history, step = monitor.history, monitor.step
    live = history.last("live_bits")
    if live is None:
        return None, NOTHING_LOGGED
    shown = _live(int(live), monitor.settings.model.latent_dim)
    if any(alarm.label in PLAN_ALARMS for alarm in monitor.alarms()):
        if history.collapse.get("collapsed"):
            return False, f"At step {history.collapse['step']} {history.collapse['warning']}."
        kl = history.last("kl") or 0.0
        return False, f"The plan is not used: {shown} at step {step}, and its KL is {kl:.2f} bits per plan."
    if history.plan_may_be_unused(step):
        if live == 0:
            return None, f"No bit is used yet: normal up to step {history.plan_steps}."
        return None, f"{_sentence(shown)[:-1]} at step {step}. The plan is checked from step {history.plan_steps} on."
    gap = history.validation.get("gap")
    if history.collapse.get("collapsed") is False and gap is not None:
        so_far = "" if ended else " so far"
        return True, (
            f"The plan is used{so_far}: {shown}, and a text's own plan saves {gap:.4f} nats per token against a random "
            f"one (validation at step {history.validation['step']})."
        )
    return None, f"{_sentence(shown)[:-1]} at step {step}. It is not yet known whether the decoder uses the plan."


def _next_step(
    run: Run, monitor: Monitor, used: bool | None, evaluation: JsonObject | None, comparison: JsonObject | None
) -> tuple[str | None, str | None]:
    folder = shlex.quote(str(run.path))
    if used is False:
        return _remedy(run), None
    if not run.has_ended:
        return _next_in_training(run, monitor)
    if evaluation is None:
        if not run.settings.data.validation:
            return "measure the likelihood on held-out text:", f"free-transformer evaluate {folder} --data HELD_OUT"
        return "measure the likelihood and the effect of plans:", f"free-transformer evaluate {folder}"
    if comparison is None:
        return "measure what the plan costs:", f"free-transformer compare {folder} BASELINE_RUN"
    cost, margin = cost_interval(comparison)
    spans = run.settings.model.plan_span != "sequence" and comparison.get("method") == "importance"
    if spans and margin is not None and cost > margin:
        return "repeat the comparison with a tighter bound:", (
            f"free-transformer compare {folder} BASELINE_RUN --method particle_filter"
        )
    return "see what each bit changes:", f"free-transformer plan {folder}"


def _remedy(run: Run) -> str:
    """Returns what to do if the plan is not used."""
    remedies = ", ".join(plan_remedies(run.settings))
    if not remedies:
        return f"train {'longer' if run.has_ended else 'on'}, or check the training text; {NO_REMEDY_LEFT}."
    again = f"train again with other settings: {remedies}."
    return again if run.has_ended else f"if the next validation shows the same, stop and {again}"


def _next_in_training(run: Run, monitor: Monitor) -> tuple[str | None, str | None]:
    alarms = [alarm for alarm in monitor.alarms() if alarm.label not in PLAN_ALARMS]
    if not run.in_use:
        return "resume it:", f"free-transformer train {shlex.quote(str(run.config_file))}"
    return (f"{alarms[0].label}: {alarms[0].advice}.", None) if alarms else (None, None)


def _baseline(run: Run, monitor: Monitor, evaluation: JsonObject | None) -> Verdict:
    folder = shlex.quote(str(run.path))
    if monitor.step == 0:
        return Verdict((NOTHING_LOGGED,))
    if not run.has_ended:
        return Verdict(("A baseline, which has no plan.",), *_next_in_training(run, monitor))
    nll = None if evaluation is None else evaluation.get("nll")
    known = "" if nll is None else f" Its NLL is {nll:.4f} nats per token."
    return Verdict(
        (f"A baseline, which has no plan.{known}",),
        "compare a Free Transformer with it:",
        f"free-transformer compare RUN {folder}",
    )


def _live(live: int, bits: int) -> str:
    return f"{live or 'no'} of {bits} bits {'is' if live <= 1 else 'are'} live"


def _sentence(text: object) -> str:
    """Capitalizes a text and ends it with a period."""
    text = str(text)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
