"""Results of a sweep: means over seeds with confidence intervals, as a table and as an HTML page."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from free_transformer.files import write_json
from free_transformer.reporting.report import NO_PLOTS, Report
from free_transformer.reporting.table import Table
from free_transformer.runs.run import Run
from free_transformer.settings import Settings

SEED = "training.seed"
MAX_CURVES = 10  # more would be unreadable
# If one of these varies, losses are measured on different text or tokens, so no group is marked as best.
TEXT = {"data.validation", "data.column", "data.tokenizer", "training.seq_len"}

FIGURES = {  # name: title and digits
    "nll": ("nll, nats per token", 4),
    "elbo": ("elbo, nats per token", 4),
    "kl": ("KL, bits per plan", 2),
    "gap": ("gap, nats per token", 4),
    "live_bits": ("live bits", 1),
    "training_loss": ("training loss, nats per token", 4),
    "training_kl": ("training KL, bits per plan", 2),
}


@dataclass
class SweepRun:
    """
    Attributes:
        overrides: values of all settings in the grid, as text.
        settings: settings of the run; `run_dir` is in the sweep's folder.
        status: `waiting`, `done` or `failed`.
        reason: reason for a failure, in one line.
        figures: results of the run, with the names and units of `FIGURES`.
    """

    overrides: dict[str, str]
    settings: Settings
    status: str = "waiting"
    reason: str | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the run's folder, such as `latent_dim=8,seed=0`."""
        return self.settings.run_dir.name


@dataclass
class Sweep:
    """
    Attributes:
        folder: contains the runs' folders, `sweep.json` and `report.html`.
        varied: names of the settings with several values.
    """

    folder: Path
    varied: list[str]
    runs: list[SweepRun]

    @property
    def failed(self) -> list[SweepRun]:
        return [run for run in self.runs if run.status == "failed"]


@dataclass
class Interval:
    """A mean and its 95 % confidence interval, mean ± half_width; None for a single value."""

    mean: float
    half_width: float | None


@dataclass
class Group:
    """
    A group of runs that differ only in their seed.

    Attributes:
        overrides: values of the settings that vary, except the seed.
        figures: mean and interval of each figure over the finished runs.
        best: whether its mean nll is the lowest of several groups.
    """

    overrides: dict[str, str]
    runs: list[SweepRun]
    figures: dict[str, Interval] = field(default_factory=dict)
    best: bool = False

    def count(self, status: str) -> int:
        return sum(run.status == status for run in self.runs)


def short_names(names: Sequence[str] | dict[str, str]) -> list[str]:
    """Removes the section from names that are unique without it."""
    last = [name.rpartition(".")[2] for name in names]
    return [short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)]


def sweep_groups(sweep: Sweep) -> list[Group]:
    """Returns the groups in the order of the grid."""
    groups: dict[tuple[str, ...], Group] = {}
    for run in sweep.runs:
        varied = {name: run.overrides[name] for name in sweep.varied if name != SEED}
        groups.setdefault(tuple(varied.values()), Group(varied, [])).runs.append(run)
    for group in groups.values():
        for name in FIGURES:
            values = [run.figures[name] for run in group.runs if run.status == "done" and name in run.figures]
            if values:
                group.figures[name] = confidence_interval(values)
    evaluated = [group for group in groups.values() if "nll" in group.figures]
    if len(evaluated) > 1 and not TEXT & set(sweep.varied):
        min(evaluated, key=lambda group: group.figures["nll"].mean).best = True
    return list(groups.values())


def confidence_interval(values: Sequence[float]) -> Interval:
    """Returns the 95 % confidence interval (Student's t) of the mean of independent values."""
    if len(values) == 1:
        return Interval(values[0], None)
    from scipy.stats import t

    error = stdev(values) / math.sqrt(len(values))
    return Interval(mean(values), float(t.ppf(0.975, len(values) - 1)) * error)


def sweep_table(sweep: Sweep) -> Table:
    """Builds a table with one row per group: varying settings, number of finished runs, and figures."""
    groups = sweep_groups(sweep)
    shown = [name for name in FIGURES if any(name in group.figures for group in groups)]
    rows = []
    for group in groups:
        cells = [_cell(group.figures.get(name), FIGURES[name][1]) for name in shown]
        if group.best:
            cells[shown.index("nll")] += " (best)"
        rows.append([*group.overrides.values(), _runs_cell(group), *cells])
    header = [*short_names([*groups[0].overrides]), "runs", *(FIGURES[name][0] for name in shown)]
    return Table(header, rows)


def _cell(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return "-"
    value = f"{interval.mean:.{digits}f}"
    return value if interval.half_width is None else f"{value} ± {interval.half_width:.{digits}f}"


def _runs_cell(group: Group) -> str:
    done, failed, runs = group.count("done"), group.count("failed"), len(group.runs)
    return str(runs) if done == runs else f"{done} of {runs}" + f", {failed} failed" * (failed > 0)


def write_summary(sweep: Sweep) -> None:
    """Writes `sweep.json`: every run, and the groups with their means and confidence intervals."""
    runs = [
        {
            "overrides": run.overrides,
            "folder": run.name,
            "status": run.status,
            "reason": run.reason,
            "figures": run.figures,
        }
        for run in sweep.runs
    ]
    groups = [
        {
            "overrides": group.overrides,
            "runs": len(group.runs),
            "done": group.count("done"),
            "failed": group.count("failed"),
            "best": group.best,
            "figures": {name: asdict(interval) for name, interval in group.figures.items()},
        }
        for group in sweep_groups(sweep)
    ]
    write_json(sweep.folder / "sweep.json", {"varied": sweep.varied, "runs": runs, "groups": groups})


def write_sweep_report(sweep: Sweep) -> Path:
    """Writes `report.html`: the table, the curves of up to ten runs, and the status of each run."""
    report = Report(f"Sweep {sweep.folder.name}")
    report.table(sweep_table(sweep))
    report.paragraph(
        "Mean over seeds ± 95 % confidence interval (Student's t), measured by evaluate on held-out text. For runs "
        "without held-out text, the values are from the last line of training metrics."
    )
    metrics = {run.name: lines for run in sweep.runs if (lines := Run(run.settings.run_dir).read_metrics())}
    if 0 < len(metrics) <= MAX_CURVES:
        try:
            from free_transformer.reporting.plots import CURVES, curves

            figures = curves(metrics)
            report.heading("Curves")
            legend = [(name, index) for index, name in enumerate(metrics)]
            report.figure(figures, CURVES, legend)
        except ImportError:
            report.warning(NO_PLOTS)
    report.heading("Runs")
    report.table(Table(["folder", "status", ""], [[run.name, run.status, run.reason or ""] for run in sweep.runs]))
    path = sweep.folder / "report.html"
    report.write(path)
    return path
