"""`free-transformer watch`: curves and figures of runs in the terminal while they train."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from free_transformer.reporting.console import stdout_console
from free_transformer.reporting.plots import values_of
from free_transformer.runs.diagnostics import Diagnostic
from free_transformer.runs.monitor import Monitor
from free_transformer.runs.run import Run, titles_of
from free_transformer.settings import SettingsError

PANELS = {
    "reconstruction": ("train", "reconstruction, nats per token"),
    "loss": ("validation", "held-out ELBO (a baseline's NLL)"),
    "kl": ("train", "KL, bits per plan"),
    "grad_norm": ("train", "gradient norm"),
}
# Lines per panel, number of panels, and whether each figure takes a single line; the most detailed layout first.
FULL = (12, 4, False)
LAYOUTS = [FULL, *((height, 4, brief) for brief in (False, True) for height in (10, 8, 7))]
LAYOUTS += [(12, 2, True), (9, 2, True), (7, 2, True), (7, 1, True), (0, 0, True)]
NARROWEST = 40  # columns


def watch(paths: Sequence[Path], every: float = 2.0, once: bool = False) -> None:
    """
    Updates the terminal until all runs have ended, or until Ctrl-C, which does not stop the runs.

    Args:
        every: seconds between updates.
        once: print the current state and return.

    Raises:
        SettingsError: for a folder that is not a run, or if plotext is not installed.
    """
    runs = [Run.open(path) for path in paths]
    console = stdout_console()
    if once:
        console.print(_picture(_snapshots(runs), console.width, *FULL))
        return
    try:
        with Live(_fitting(runs, console), console=console, auto_refresh=False) as live:
            while not all(run.has_ended for run in runs):
                time.sleep(every)
                live.update(_fitting(runs, console), refresh=True)
    except KeyboardInterrupt:
        pass


@dataclass(frozen=True)
class _Snapshot:
    """The data of a run to draw in any layout; `curves` has the keys of `PANELS`."""

    name: str
    state: str
    curves: dict[str, list[tuple[int, float]]]
    diagnostics: list[Diagnostic]


def _snapshots(runs: Sequence[Run]) -> list[_Snapshot]:
    snapshots: list[_Snapshot] = []
    for name, run in zip(titles_of(runs), runs, strict=True):
        lines = run.read_metrics()
        monitor = Monitor(run.settings, lines)
        end = "ended" if run.has_ended else f"of {run.settings.training.max_steps}"
        end += "" if run.has_ended or run.in_use else ", not training now"
        curves = {key: _settled(values_of(lines, split, key)) for key, (split, _) in PANELS.items()}
        snapshots.append(_Snapshot(name, f"step {monitor.step} {end}", curves, monitor.diagnostics()))
    return snapshots


def _fitting(runs: Sequence[Run], console: Console) -> RenderableType:
    """Draws the most detailed picture that fits the terminal."""
    snapshots = _snapshots(runs)
    for layout in LAYOUTS:
        picture = _picture(snapshots, console.width, *layout)
        if len(console.render_lines(picture)) < console.height:
            break
    return picture


def _picture(snapshots: Sequence[_Snapshot], width: int, height: int, panels: int, brief: bool) -> RenderableType:
    columns = 2 if width >= 2 * NARROWEST else 1
    size = (width // columns - 1, height)
    drawn = [
        _panel(title, {snapshot.name: snapshot.curves[key] for snapshot in snapshots}, size)
        for key, (_, title) in islice(PANELS.items(), panels)
    ]
    return Group(
        Columns([panel for panel in drawn if panel is not None]), *(_figures(snapshot, brief) for snapshot in snapshots)
    )


def _settled(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Drops the first tenth of a curve, whose steep fall would flatten the rest."""
    return points[len(points) // 10 :]


def _panel(title: str, curves: dict[str, list[tuple[int, float]]], size: tuple[int, int]) -> Text | None:
    """Draws a panel, or returns None if no run has these values."""
    try:
        from plotext import figure
    except ImportError as error:
        raise SettingsError("watch needs plotext for its plots: pip install 'free-transformer-lm[train]'") from error
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    figure.clear()  # plotext has one figure
    figure.theme("clear")
    figure.plot_size(*size)
    figure.title(title)
    for name, points in curves.items():
        curve = figure.signal(*map(list, zip(*points, strict=True)), marker="braille").lines(True)
        figure.draw(curve.label(name) if len(curves) > 1 else curve)
    return Text.from_ansi(str(figure.build()).rstrip("\n"))


def _figures(snapshot: _Snapshot, brief: bool) -> RenderableType:
    """Formats the figures of a run as a table. `brief`: one line per figure, with the advice of alarms below."""
    table = Table(
        title=f"{snapshot.name}: {snapshot.state}", title_justify="left", expand=True, box=None, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, no_wrap=brief)
    below = []
    for diagnostic in snapshot.diagnostics:
        style = "yellow" if diagnostic.alarm else ""
        advice = diagnostic.advice
        if brief and diagnostic.alarm:
            below.append(Text(f"{diagnostic.label}: {advice}", style))
            advice = ""
        table.add_row(Text(diagnostic.label), Text(diagnostic.value), Text(advice), style=style)
    return Group(table, *below)
