"""`free-transformer watch`: curves and figures of runs in the terminal, while they train."""

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
from free_transformer.runs.monitor import Reading, Watcher
from free_transformer.runs.run import Run, titles_of
from free_transformer.settings import SettingsError

PANELS = {
    "reconstruction": ("train", "reconstruction, nats per token"),
    "loss": ("validation", "held-out ELBO (a baseline's NLL)"),
    "kl": ("train", "KL, bits per plan"),
    "grad_norm": ("train", "gradient norm"),
}
# Lines of a panel, panels, and whether figures have a single line each: from the fullest to the shortest.
FULL = (12, 4, False)
LAYOUTS = [FULL, *((height, 4, brief) for brief in (False, True) for height in (10, 8, 7))]
LAYOUTS += [(12, 2, True), (9, 2, True), (7, 2, True), (7, 1, True), (0, 0, True)]
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
    console = stdout_console()
    if once:
        console.print(_picture(_look_at(runs), console.width, *FULL))
        return
    try:
        with Live(_fitting(runs, console), console=console, auto_refresh=False) as live:
            while not all(run.has_ended for run in runs):
                time.sleep(every)
                live.update(_fitting(runs, console), refresh=True)
    except KeyboardInterrupt:
        pass


@dataclass(frozen=True)
class _Look:
    """What there is to draw of a run, whatever the layout; `curves` by the keys of `PANELS`."""

    name: str
    state: str
    curves: dict[str, list[tuple[int, float]]]
    readings: list[Reading]


def _look_at(runs: Sequence[Run]) -> list[_Look]:
    looks = []
    for name, run in zip(titles_of(runs), runs, strict=True):
        lines = run.read_metrics()
        watcher = Watcher(run.settings, lines)
        end = "ended" if run.has_ended else f"of {run.settings.training.max_steps}"
        end += "" if run.has_ended or run.in_use else ", not training now"
        curves = {key: _settled(values_of(lines, split, key)) for key, (split, _) in PANELS.items()}
        looks.append(_Look(name, f"step {watcher.step} {end}", curves, watcher.readings()))
    return looks


def _fitting(runs: Sequence[Run], console: Console) -> RenderableType:
    """The fullest picture that the terminal has room for."""
    looks = _look_at(runs)
    for layout in LAYOUTS:
        picture = _picture(looks, console.width, *layout)
        if len(console.render_lines(picture)) < console.height:
            break
    return picture


def _picture(looks: Sequence[_Look], width: int, height: int, panels: int, brief: bool) -> RenderableType:
    columns = 2 if width >= 2 * NARROWEST else 1
    size = (width // columns - 1, height)
    drawn = [
        _panel(title, {look.name: look.curves[key] for look in looks}, size)
        for key, (_, title) in islice(PANELS.items(), panels)
    ]
    return Group(Columns([panel for panel in drawn if panel is not None]), *(_figures(look, brief) for look in looks))


def _settled(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Without the first tenth of a longer curve, whose fall would press the rest flat."""
    return points[len(points) // 10 :]


def _panel(title: str, curves: dict[str, list[tuple[int, float]]], size: tuple[int, int]) -> Text | None:
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
    figure.plot_size(*size)
    figure.title(title)
    for name, points in curves.items():
        curve = figure.signal(*map(list, zip(*points, strict=True)), marker="braille").lines(True)
        figure.draw(curve.label(name) if len(curves) > 1 else curve)
    return Text.from_ansi(str(figure.build()).rstrip("\n"))


def _figures(look: _Look, brief: bool) -> RenderableType:
    """Brief: one line for each figure, and what needs doing below."""
    table = Table(title=f"{look.name}: {look.state}", title_justify="left", expand=True, box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, no_wrap=brief)
    below = []
    for reading in look.readings:
        style = "yellow" if reading.alarm else ""
        advice = reading.advice
        if brief and reading.alarm:
            below.append(Text(f"{reading.label}: {advice}", style))
            advice = ""
        table.add_row(Text(reading.label), Text(reading.value), Text(advice), style=style)
    return Group(table, *below)
