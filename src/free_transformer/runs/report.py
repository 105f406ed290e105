"""The report of a run, or of several beside each other: what to watch, curves, likelihood, settings."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from free_transformer.reporting.report import Report
from free_transformer.runs.monitor import Watcher
from free_transformer.runs.run import Run, titles_of

NO_PLOTS = "Plots need matplotlib: pip install 'free-transformer-lm[train]'"


def write_run_report(*paths: Path, out: Path | None = None) -> Path:
    """
    Writes what the runs' folders hold into one page, also while they train.

    Args:
        out: the page, default `report.html` in the folder of the run, of several in the folder that holds them.

    Raises:
        SettingsError: for a folder that is no run.
    """
    runs = [Run(path) for path in paths]
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


def _add_figures(report: Report, title: str, run: Run, metrics: Sequence[dict[str, Any]]) -> None:
    watcher = Watcher(run.settings, metrics)
    steps = f"step {watcher.step} of {run.settings.training.max_steps}"
    report.heading(title or "What to watch")
    now = "this page shows the run while it trains" if run.in_use else "stopped before its end"
    report.paragraph(f"{steps}, ended" if run.has_ended else f"{steps}; {now}")
    readings = sorted(watcher.readings(), key=lambda reading: reading.alarm)
    for reading in readings:
        if reading.alarm:
            report.paragraph(f"{reading.label}: {reading.advice}", warning=True)
    rows = [[each.label, each.value, "see above" if each.alarm else each.advice] for each in readings]
    report.table(["", "last", "what it means"], rows)


def _add_curves(report: Report, metrics: dict[str, Any]) -> None:
    report.heading("Curves")
    if not any(metrics.values()):
        report.paragraph("No step has been logged yet.")
        return
    try:
        from free_transformer.reporting.plots import curves

        report.figure(curves(metrics), "losses in nats per token, KL in bits per plan; dotted: a stage ends")
    except ImportError:
        report.paragraph(NO_PLOTS, warning=True)


def _add_likelihood(report: Report, run: Run, values: dict[str, Any]) -> None:
    if not run.is_current(run.evaluation_file, values):
        step = (values.get("model") or {}).get("step")
        report.paragraph(
            f"These results are from an earlier model{f' (step {step})' if step else ''}. The run has been trained "
            f"further since. To measure the current model, run: free-transformer evaluate {run.path}",
            warning=True,
        )
    if values.get("warning"):
        report.paragraph(values["warning"], warning=True)
    errors = values.get("standard_errors") or {"nll": None}
    report.table(
        ["", "value", "standard error"],
        [[name, _decimals(values.get(name)), _decimals(error or None)] for name, error in errors.items()],
    )
    if not values.get("usage"):
        return
    try:
        from free_transformer.reporting.plots import bits

        report.figure(bits(values["usage"]["bits_per_position"]), "KL of each bit of the plan")
    except ImportError:
        report.paragraph(NO_PLOTS, warning=True)


def _decimals(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _add_history(report: Report, title: str, run: Run) -> None:
    """When the run was trained, and what changed, where that was more than once."""
    history = run.read_history()
    if len(history) < 2:
        return
    report.heading(f"History {title}".strip())
    rows = []
    for line in history:
        changes = [f"{name}: {old} → {new}" for name, (old, new) in line.get("changes", {}).items()]
        rows.append([str(line["step"]), line.get("time", "-"), line.get("host", "-"), "; ".join(changes) or "-"])
    report.table(["from step", "started (UTC)", "machine", "changed settings"], rows)
