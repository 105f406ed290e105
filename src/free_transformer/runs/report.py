"""The report of one or several runs: verdict, what the plans do, likelihood, curves and settings."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from free_transformer.reporting.parts import Tiles, VerdictPart
from free_transformer.reporting.report import NO_PLOTS, Report, likelihood_table, usage_table
from free_transformer.reporting.table import Table
from free_transformer.runs.lines import JsonObject
from free_transformer.runs.monitor import Monitor, alarm_periods
from free_transformer.runs.report_plans import add_plan_examples
from free_transformer.runs.results import num_parameters, stored_likelihood
from free_transformer.runs.run import Run, titles_of
from free_transformer.runs.verdict import cost_interval, cost_sentence, verdict_of
from free_transformer.settings.changed import changed_settings, differing_settings

STAGES = " Dotted lines mark the end of a stage."
BOUND = (
    "The NLL of a Free Transformer is an upper bound unless it is exact, so its true cost is at most this. The ELBO is "
    "a more pessimistic bound."
)


def write_run_report(*paths: Path, out: Path | None = None) -> Path:
    """
    Writes a page about one or several runs, which may still be training.

    Args:
        out: file to write. Default: `report.html` in the run's folder, or in the folder that contains all the runs.

    Raises:
        SettingsError: for a folder that is not a run.
    """
    runs = [Run.open(path) for path in paths]
    if len(runs) == 1:
        report, default = _report_of_one(runs[0]), runs[0].report_file
    else:
        report = _report_of_several(runs)
        default = Path(os.path.commonpath([run.path.resolve().parent for run in runs])) / "report.html"
    out = out or default
    report.write(out)
    return out


def _report_of_one(run: Run) -> Report:
    metrics = run.read_metrics()
    monitor = Monitor(run.settings, metrics)
    report = Report(f"Run {run.name}", [_kind(run), *_size(run), _state(run, monitor.step)])
    verdict = verdict_of(run)
    report.add(VerdictPart(**asdict(verdict)))
    evaluation = run.read_results(run.evaluation_file)
    current = evaluation is not None and run.is_current(run.evaluation_file, evaluation)
    comparison = run.current_results(run.comparison_file)
    report.add(Tiles(_tiles(monitor, evaluation if current else None, comparison)))
    _add_warnings(report, run, metrics)
    if run.settings.model.kind == "free":
        add_plan_examples(report, run)
        _add_comparison(report, comparison)
    if evaluation is not None:
        _add_likelihood(report, run, evaluation, current)
    _add_curves(report, {run.name: metrics})
    if metrics:
        _add_figures(report, monitor)
    _add_history(report, run)
    _add_settings(report, run)
    return report


def _report_of_several(runs: Sequence[Run]) -> Report:
    titles = titles_of(runs)
    named = list(zip(titles, runs, strict=True))
    metrics = {title: run.read_metrics() for title, run in named}
    report = Report("Runs", [f"{len(runs)} runs"])
    rows, measured = [], set()
    for title, run in named:
        evaluation = run.current_results(run.evaluation_file) or {}
        if evaluation:
            measured.add(str((evaluation.get("data"), evaluation.get("tokens"))))
        usage = evaluation.get("usage") or {}
        live = f"{usage['live_bits']} of {len(usage['bits_per_position'])}" if usage else "-"
        monitor = Monitor(run.settings, metrics[title])
        warned = ", ".join(alarm.label for alarm in monitor.alarms()) or "-"
        bounds = [_decimals(evaluation.get(name)) for name in ("nll", "elbo")]
        model, state = ", ".join([_kind(run), *_size(run)]), _state(run, monitor.step)
        rows.append([title, model, state, *bounds, live, warned])
    header = ["run", "model", "state", "NLL, nats per token", "ELBO (a bound)", "live bits", "warnings"]
    report.table(Table(header, rows))
    if len(measured) > 1:
        report.warning("These runs were evaluated on different text: do not compare their NLL.")
    report.heading("Verdicts")
    for title, run in named:
        verdict = verdict_of(run)
        report.heading(title, level=3)
        report.add(VerdictPart(**asdict(verdict)))
    _add_curves(report, metrics)
    report.heading("Settings")
    if differing := differing_settings([run.settings for run in runs]):
        report.table(Table(["settings that differ", *titles], [[name, *values] for name, values in differing]))
    with report.folded("All settings"):
        report.samples([(title, run.settings.to_yaml()) for title, run in named])
    return report


def _kind(run: Run) -> str:
    return "Free Transformer" if run.settings.model.kind == "free" else "Baseline, a Llama without a plan"


def _size(run: Run) -> list[str]:
    parameters = num_parameters(run)
    return [] if parameters is None else [f"{parameters / 1e6:.2f} M parameters"]


def _state(run: Run, step: int) -> str:
    steps = f"step {step} of {run.settings.training.max_steps}"
    if run.has_ended:
        return f"{steps}, ended"
    return f"{steps}, training now" if run.in_use else f"{steps}, interrupted"


def _tiles(monitor: Monitor, evaluation: JsonObject | None, comparison: JsonObject | None) -> list[tuple[str, str]]:
    """Returns the key figures, as measured by `evaluate` or, if missing, as logged during training."""
    free, history = monitor.settings.model.kind == "free", monitor.history
    source = evaluation or history.validation
    tiles = []
    usage = (evaluation or {}).get("usage")
    live = usage["live_bits"] if usage else history.last("live_bits")
    if free and live is not None:
        tiles.append((f"{live} of {monitor.settings.model.latent_dim}", "live bits"))
    if usage and (evaluation or {}).get("documents", 0) > 1:
        tiles.append((f"{usage['information']:.2f} bits", "distinguish texts, at most"))
    if free and source.get("gap") is not None:
        tiles.append((f"{source['gap']:.4f}", "prior gap, nats per token"))
    if source.get("nll") is not None:
        tiles.append((f"{source['nll']:.4f}", f"NLL, nats per token{'' if evaluation else ', in training'}"))
    if comparison is not None:
        cost, margin = cost_interval(comparison)
        tiles.append((f"{cost:+.4f}" + (f" ± {margin:.4f}" if margin else ""), "against the baseline, 95 %"))
    return tiles


def _add_warnings(report: Report, run: Run, metrics: Sequence[JsonObject]) -> None:
    periods = alarm_periods(run.settings, metrics)
    if not periods:
        return
    report.heading("Warnings")
    for each in periods:
        seen = f"step {each.first}" if each.first == each.last else f"steps {each.first} to {each.last}"
        when = f"seen at {seen}, since resolved" if each.is_over else f"first seen at step {each.first}, still active"
        report.warning(f"{each.label}: {each.advice}", when, each.is_over)


def _add_comparison(report: Report, comparison: JsonObject | None) -> None:
    if comparison is None:
        return
    name = comparison.get("baseline")
    report.heading("Difference from the baseline")
    report.paragraph(f"{cost_sentence(comparison)} {'' if comparison.get('method') == 'exact' else BOUND}".strip())
    cost, margin = cost_interval(comparison)
    intervals = {"NLL": (cost, margin), "ELBO": (comparison["elbo_difference"], None)}
    try:
        from free_transformer.reporting.plots import differences

        report.figure(differences(intervals), "Difference in nats per token, with the 95 % interval of the NLL.")
    except ImportError:
        report.warning(NO_PLOTS)
    rows = [[f"NLL of the baseline{f', {name}' if name else ''}", _decimals(comparison.get("baseline_nll"))]]
    rows.append(["NLL of this run", _decimals(comparison.get("nll"))])
    report.table(Table(["on the same text", "nats per token"], rows))


def _add_likelihood(report: Report, run: Run, values: JsonObject, current: bool) -> None:
    report.heading("Held-out text")
    if not current:
        step = (values.get("model") or {}).get("step")
        report.warning(
            f"These results are from an earlier model{f' (step {step})' if step else ''}. The run has been trained "
            f"further since. To measure the current model, run: free-transformer evaluate {run.path}"
        )
    likelihood = stored_likelihood(values)
    if likelihood is None:
        report.table(Table(["", "nats per token"], [["nll", _decimals(values.get("nll"))]]))
        return
    report.table(likelihood_table(likelihood, values.get("bytes_per_token") or 1.0))
    report.table(usage_table(likelihood))
    if likelihood.usage is None:
        return
    try:
        from free_transformer.reporting.plots import bits

        caption = "KL of each bit of the plan. Bits above the dotted line are live."
        report.figure(bits(likelihood.usage.bits_per_position), caption)
    except ImportError:
        report.warning(NO_PLOTS)


def _add_curves(report: Report, metrics: dict[str, list[JsonObject]]) -> None:
    report.heading("Curves")
    if not any(metrics.values()):
        report.paragraph("No step has been logged yet.")
        return
    try:
        from free_transformer.reporting.plots import CURVES, curves

        legend = [(title, index) for index, title in enumerate(metrics)] if len(metrics) > 1 else []
        staged = any("stage" in line for lines in metrics.values() for line in lines) and len(metrics) == 1
        report.figure(curves(metrics), CURVES + STAGES * staged, legend)
    except ImportError:
        report.warning(NO_PLOTS)


def _add_figures(report: Report, monitor: Monitor) -> None:
    with report.folded("Last values of training and what they mean"):
        rows = [[each.label, each.value, each.advice] for each in monitor.diagnostics()]
        report.table(Table(["", "last", "what it means"], rows))


def _add_history(report: Report, run: Run) -> None:
    """Adds when the run was started or resumed, and which settings changed."""
    history = run.read_history()
    if not history:
        return
    report.heading("History")
    if len(history) == 1:
        start = history[0]
        where = f" on {start['host']}" if start.get("host") else ""
        report.paragraph(f"Started {_time(start)}{where}; not resumed since.")
        return
    rows = []
    for line in history:
        changes = [f"{name}: {old} → {new}" for name, (old, new) in line.get("changes", {}).items()]
        rows.append([str(line["step"]), _time(line), line.get("host", "-"), "; ".join(changes) or "-"])
    report.table(Table(["from step", "started", "machine", "changed settings"], rows))


def _add_settings(report: Report, run: Run) -> None:
    report.heading("Settings")
    changed = [list(row) for row in changed_settings(run.settings)]
    with report.folded(f"{len(changed)} settings differ from their defaults"):
        report.table(Table(["setting", "value", "default"], changed))
        with report.folded("All settings, as in config.yaml"):
            report.samples([("config.yaml", run.settings.to_yaml())])


def _time(start: JsonObject) -> str:
    return str(start.get("time", "-")).replace("T", " ").replace("+00:00", " UTC")


def _decimals(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
