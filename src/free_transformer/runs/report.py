"""The report of one or several runs: what to watch, curves, likelihood, history and settings."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from free_transformer.reporting.report import NO_PLOTS, Report
from free_transformer.reporting.table import Table
from free_transformer.runs.lines import JsonObject
from free_transformer.runs.monitor import Monitor
from free_transformer.runs.run import Run, titles_of


def write_run_report(*paths: Path, out: Path | None = None) -> Path:
    """
    Writes one page about runs, which may still be training.

    Args:
        out: the page. Default: `report.html` in the run's folder, or in the folder that contains all the runs.

    Raises:
        SettingsError: for a folder that is not a run.
    """
    runs = [Run.open(path) for path in paths]
    titles = titles_of(runs)
    report = Report(f"Run {titles[0]} ({runs[0].settings.model.kind})" if len(runs) == 1 else "Runs")
    metrics = {title: run.read_metrics() for title, run in zip(titles, runs, strict=True)}
    for title, run in zip(titles, runs, strict=True):
        _add_figures(report, title if len(runs) > 1 else "", run, metrics[title])
    _add_curves(report, metrics)
    for title, run in zip(titles, runs, strict=True):
        if (results := run.read_results(run.evaluation_file)) is not None:
            report.heading(f"Held-out text {title if len(runs) > 1 else ''}")
            _add_likelihood(report, run, results)
    for title, run in zip(titles, runs, strict=True):
        _add_history(report, title if len(runs) > 1 else "", run)
    report.heading("Settings")
    report.samples(
        [
            ("config.yaml" if len(runs) == 1 else title, run.settings.to_yaml())
            for title, run in zip(titles, runs, strict=True)
        ]
    )
    if out is None:
        common = Path(os.path.commonpath([run.path.resolve().parent for run in runs]))
        out = runs[0].report_file if len(runs) == 1 else common / "report.html"
    report.write(out)
    return out


def _add_figures(report: Report, title: str, run: Run, metrics: Sequence[JsonObject]) -> None:
    monitor = Monitor(run.settings, metrics)
    steps = f"step {monitor.step} of {run.settings.training.max_steps}"
    report.heading(title or "What to watch")
    now = "this page shows the run while it trains" if run.in_use else "stopped before its end"
    report.paragraph(f"{steps}, ended" if run.has_ended else f"{steps}; {now}")
    diagnostics = sorted(monitor.diagnostics(), key=lambda each: each.alarm)
    for each in diagnostics:
        if each.alarm:
            report.warning(f"{each.label}: {each.advice}")
    rows = [[each.label, each.value, "see above" if each.alarm else each.advice] for each in diagnostics]
    report.table(Table(["", "last", "what it means"], rows))


def _add_curves(report: Report, metrics: Mapping[str, Sequence[JsonObject]]) -> None:
    report.heading("Curves")
    if not any(metrics.values()):
        report.paragraph("No step has been logged yet.")
        return
    try:
        from free_transformer.reporting.plots import curves

        report.figure(curves(metrics), "losses in nats per token, KL in bits per plan; dotted lines: end of a stage")
    except ImportError:
        report.warning(NO_PLOTS)


def _add_likelihood(report: Report, run: Run, values: JsonObject) -> None:
    if not run.is_current(run.evaluation_file, values):
        step = (values.get("model") or {}).get("step")
        report.warning(
            f"These results are from an earlier model{f' (step {step})' if step else ''}. The run has been trained "
            f"further since. To measure the current model, run: free-transformer evaluate {run.path}"
        )
    if values.get("warning"):
        report.warning(values["warning"])
    errors = values.get("standard_errors") or {"nll": None}
    rows = [[name, _decimals(values.get(name)), _decimals(error or None)] for name, error in errors.items()]
    report.table(Table(["", "value", "standard error"], rows))
    if not values.get("usage"):
        return
    try:
        from free_transformer.reporting.plots import bits

        report.figure(bits(values["usage"]["bits_per_position"]), "KL of each bit of the plan")
    except ImportError:
        report.warning(NO_PLOTS)


def _decimals(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _add_history(report: Report, title: str, run: Run) -> None:
    """Adds when the run was trained and what changed, if it was trained more than once."""
    history = run.read_history()
    if len(history) < 2:
        return
    report.heading(f"History {title}".strip())
    rows = []
    for line in history:
        changes = [f"{name}: {old} → {new}" for name, (old, new) in line.get("changes", {}).items()]
        rows.append([str(line["step"]), line.get("time", "-"), line.get("host", "-"), "; ".join(changes) or "-"])
    report.table(Table(["from step", "started (UTC)", "machine", "changed settings"], rows))
