"""The report of one run: its curves, its likelihood, its settings."""

import json
from pathlib import Path

from free_transformer.evaluation.report import Report
from free_transformer.training.run import Run


def write_run_report(path: Path) -> None:
    """Writes `report.html` from what the run's folder holds. `SettingsError` where it is no run."""
    run = Run(path)
    settings = run.settings
    report = Report(f"Run {run.path.name} ({settings.model.kind})")
    metrics = run.read_metrics()
    watched = [line for line in metrics if line["split"] == "watcher"]
    if watched and watched[-1]["collapsed"]:
        report.paragraph(f"Collapsed: {watched[-1]['warning']}", warning=True)
    try:
        from free_transformer.evaluation.plots import bits, curves

        if metrics:
            report.heading("Curves")
            report.figure(curves({run.path.name: metrics}), "losses in nats per token, KL in bits per plan")
        if run.evaluation_file.is_file():
            values = json.loads(run.evaluation_file.read_text())
            report.heading("Held-out text")
            if values["warning"]:
                report.paragraph(values["warning"], warning=True)
            errors = values["standard_errors"]
            report.table(
                ["", "value", "standard error"],
                [[name, f"{values[name]:.4f}", f"{error:.4f}" if error else "-"] for name, error in errors.items()],
            )
            if values["usage"]:
                report.figure(bits(values["usage"]["bits_per_position"]), "KL of each bit of the plan")
    except ImportError:
        report.paragraph("Plots need matplotlib: pip install 'free-transformer-lm[train]'", warning=True)
    report.heading("Settings")
    report.samples([("config.yaml", settings.to_yaml())])
    report.write(run.report_file)
