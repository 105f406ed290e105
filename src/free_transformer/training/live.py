"""`free-transformer watch`: curves and figures of runs in the terminal, while they train."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from free_transformer.evaluation.plots import values_of
from free_transformer.training.run import Run, titles_of
from free_transformer.training.settings import SettingsError
from free_transformer.training.watching import Watcher

PANELS = {
    "reconstruction": ("train", "reconstruction, nats per token"),
    "kl": ("train", "KL, bits per plan"),
    "loss": ("validation", "held-out ELBO (a baseline's NLL)"),
    "grad_norm": ("train", "gradient norm"),
}
HEIGHT = 12  # lines of a panel
NARROWEST = 40  # columns


def watch(paths: Sequence[Path], every: float = 2.0, once: bool = False) -> None:
    """
    Draws until all runs have ended, or until Ctrl-C, which they do not notice.

    Args:
        every: seconds between two looks.
        once: draw what is there, and return.

    Raises:
        SettingsError: for a folder that is no run, or without plotext.
    """
    runs = [Run(path) for path in paths]
    for run in runs:
        _ = run.settings
    console = Console()
    if once:
        console.print(_picture(runs, console.width))
        return
    try:
        with Live(_picture(runs, console.width), console=console, auto_refresh=False) as live:
            while not all(run.has_ended for run in runs):
                time.sleep(every)
                live.update(_picture(runs, console.width), refresh=True)
    except KeyboardInterrupt:
        pass


def _picture(runs: Sequence[Run], width: int) -> RenderableType:
    metrics = {title: run.read_metrics() for title, run in zip(titles_of(runs), runs, strict=True)}
    columns = 2 if width >= 2 * NARROWEST else 1
    panels = [
        _panel(title, {name: values_of(lines, split, key) for name, lines in metrics.items()}, width // columns - 1)
        for key, (split, title) in PANELS.items()
    ]
    figures = [_figures(title, run, lines) for run, (title, lines) in zip(runs, metrics.items(), strict=True)]
    return Group(Columns([panel for panel in panels if panel is not None]), *figures)


def _panel(title: str, curves: dict[str, list[tuple[int, float]]], width: int) -> Text | None:
    """None where no run has such values."""
    try:
        from plotext import figure
    except ImportError as error:
        raise SettingsError("watch draws with plotext: pip install 'free-transformer-lm[train]'") from error
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    figure.clear()  # plotext has one figure
    figure.theme("clear")
    figure.plot_size(width, HEIGHT)
    figure.title(title)
    for name, points in curves.items():
        curve = figure.signal(*map(list, zip(*points, strict=True)), marker="braille").lines(True)
        figure.draw(curve.label(name) if len(curves) > 1 else curve)
    return Text.from_ansi(str(figure.build()))


def _figures(title: str, run: Run, metrics: Sequence[dict[str, Any]]) -> Table:
    watcher = Watcher(run.settings, metrics)
    state = "ended" if run.has_ended else f"of {run.settings.training.max_steps}"
    table = Table(title=f"{title}: step {watcher.step} {state}", title_justify="left", expand=True)
    table.add_column("figure", no_wrap=True)
    table.add_column("what it means, or what to do", ratio=1)
    for reading in watcher.readings():
        figure = "\n  ".join([reading.label, *reading.value.split(", ")])
        table.add_row(Text(figure), Text(reading.advice), style="yellow" if reading.alarm else "")
    return table
