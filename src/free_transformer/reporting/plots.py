"""Plots of metrics and of plan usage. They need matplotlib, which the extra `train` installs."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from free_transformer.evaluation.usage import LIVE_BITS
from free_transformer.reporting.palette import FAINT, LIGHT, LINE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Panel(NamedTuple):
    title: str
    unit: str
    least: float = 0.0  # the axis spans zero to at least this value, so that noise does not look like a signal


PANELS = {
    "reconstruction": Panel("Reconstruction", "nats per token"),
    "elbo": Panel("Held-out ELBO", "nats per token"),
    "gap": Panel("Prior gap, held out", "nats per token", 0.01),
    "kl": Panel("KL", "bits per plan", 0.1),
    "live_bits": Panel("Live bits", "bits of a plan", 1.0),
    "grad_norm": Panel("Gradient norm", "", 0.1),
}
OF_BASELINES = {"reconstruction": "Training loss", "elbo": "Held-out NLL"}
TRAIN, VALIDATION = {"alpha": 0.75, "linewidth": 1}, {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
DASHES = ("-", "--", ":")  # for more runs than colors
SETTLED = 0.1  # initial share of the steps that the axis range of a loss ignores
MIN_RANGE = 0.05  # minimum axis range, as a share of the loss
CURVES = "Thin lines: training. Lines with dots: held-out text."  # the caption


def styled(draw: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Draws with the palette's colors and type sizes, without interpreting `$` in text as math."""

    @wraps(draw)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        import matplotlib
        from cycler import cycler

        style: dict[Any, Any] = {
            "axes.prop_cycle": cycler(color=LIGHT),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": LINE,
            "axes.labelcolor": FAINT,
            "axes.titlecolor": TEXT,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.labelsize": 9.5,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": LINE,
            "grid.linewidth": 0.6,
            "xtick.color": LINE,
            "ytick.color": LINE,
            "xtick.labelcolor": FAINT,
            "ytick.labelcolor": FAINT,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "text.color": TEXT,
            "text.parse_math": False,
        }
        with matplotlib.rc_context(style):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """Creates a figure, sized in inches, with axes side by side. Call it in a `styled` function."""
    from matplotlib.figure import Figure  # pyplot needs a backend and keeps global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False).flat)
    return figure, axes


def curves(runs: Mapping[str, Metrics]) -> "list[Figure]":
    """
    Draws the metrics of runs by step, one figure per metric.

    Training is drawn as thin lines, validation with dots, and stages are separated by dotted lines. The reconstruction
    of Free Transformers and the loss of baselines are not drawn in one figure.
    """
    of_baselines = {label: metrics for label, metrics in runs.items() if _is_baseline(metrics)}
    of_free = {label: metrics for label, metrics in runs.items() if label not in of_baselines}
    figures = []
    for name, panel in PANELS.items():
        shown = of_free or runs if name == "reconstruction" else runs
        if not of_free:
            panel = panel._replace(title=OF_BASELINES.get(name, panel.title))
        elif name == "elbo" and of_baselines:
            panel = panel._replace(title="Held-out ELBO (baseline: NLL)")
        found = {label: points for label in shown if (points := _points(runs[label], name))}
        if found:
            figures.append(_curve(panel, found, list(runs), _stage_starts(next(iter(runs.values())), len(runs))))
    return figures


@styled
def _curve(
    panel: Panel, found: Mapping[str, Mapping[str, list[tuple[int, float]]]], labels: list[str], stages: list[int]
) -> "Figure":
    figure, (axis,) = new_figure(3.5, 2.3)
    for label, splits in found.items():
        index = labels.index(label)
        look: dict[str, Any] = {"color": LIGHT[index % len(LIGHT)], "linestyle": DASHES[index // len(LIGHT) % 3]}
        for split, points in splits.items():
            style: dict[str, Any] = TRAIN if split == "train" else VALIDATION
            axis.plot(*zip(*points, strict=True), **look, **style)
    for step in stages:
        axis.axvline(step, color=FAINT, linewidth=0.8, linestyle=":")
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.set_xlabel("step")
    axis.margins(x=0.01)
    _set_range(axis, panel, [points for splits in found.values() for points in splits.values()])
    return figure


def _set_range(axis: "Axes", panel: Panel, lines: Sequence[list[tuple[int, float]]]) -> None:
    """Sets the range: from zero if the panel requires it, else that of the settled curves with a minimum width."""
    if panel.least:
        axis.axhline(0, color=FAINT, linewidth=0.8)
        values = [value for points in lines for _, value in points]
        axis.set_ylim(min(0.0, 1.05 * min(values)), max(panel.least, 1.05 * max(values)))
        return
    last = max(points[-1][0] for points in lines)
    settled = [value for points in lines for step, value in points if step >= SETTLED * last]
    low, high = min(settled), max(settled)
    missing = max(0.0, MIN_RANGE * abs(high) - (high - low))
    margin = missing / 2 + 0.05 * (high - low + missing)
    axis.set_ylim(low - margin, high + margin)


def _points(metrics: Metrics, name: str) -> dict[str, list[tuple[int, float]]]:
    """Returns steps and values of a panel by split."""
    key = "nll" if name == "elbo" and _is_baseline(metrics) else name
    splits = {split: values_of(metrics, split, key) for split in ("train", "validation")}
    return {split: points for split, points in splits.items() if points}


def values_of(metrics: Metrics, split: str, key: str) -> list[tuple[int, float]]:
    """Returns steps and values of a key in the lines of a split."""
    return [(line["step"], line[key]) for line in metrics if line["split"] == split and key in line]


def _stage_starts(metrics: Metrics, runs: int) -> list[int]:
    """Returns the step before each stage except the first; empty if several runs are drawn."""
    lines = [line for line in metrics if "stage" in line] if runs == 1 else []
    return [before["step"] for before, line in pairwise(lines) if line["stage"] != before["stage"]]


def _is_baseline(metrics: Metrics) -> bool:
    return not any("elbo" in line or "kl" in line for line in metrics)


@styled
def bits(values: Sequence[float]) -> "Figure":
    """Draws the KL of each bit, 0 to 1, and the KL above which a bit is live."""
    figure, (axis,) = new_figure(4.8, 2.1)
    live = [value > LIVE_BITS for value in values]
    axis.bar(range(len(values)), values, 0.7, color=[LIGHT[0] if each else LIGHT[-1] for each in live])
    axis.axhline(LIVE_BITS, color=FAINT, linewidth=0.8, linestyle=":")
    axis.set_xticks(range(0, len(values), 1 + len(values) // 17))
    axis.grid(axis="x", visible=False)
    axis.set_xlabel("bit of the plan")
    axis.set_ylabel("KL, bits")
    axis.set_ylim(0, 1)
    return figure


@styled
def differences(intervals: Mapping[str, tuple[float, float | None]]) -> "Figure":
    """Draws values with half of their interval, one per row, and a line at zero; values to its left are better."""
    figure, (axis,) = new_figure(5.2, 0.8 + 0.35 * len(intervals))
    for row, (value, margin) in enumerate(intervals.values()):
        axis.errorbar(value, row, xerr=margin, fmt="o", color=LIGHT[row], markersize=6, capsize=4, elinewidth=1.6)
    axis.axvline(0, color=TEXT, linewidth=1)
    widest = max(abs(value) + (margin or 0.0) for value, margin in intervals.values()) or 1e-3
    axis.set_xlim(-1.15 * widest, 1.15 * widest)
    axis.set_ylim(len(intervals) - 0.5, -0.5)
    axis.set_yticks(range(len(intervals)), list(intervals))
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("← better · nats per token · worse →")
    return figure


@styled
def plans_by_label(table: np.ndarray, labels: Sequence[str]) -> "Figure":
    """Draws the share of each label per plan, from a (plans, labels) array of counts. Plans are sorted by label."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    shares = table / table.sum(1, keepdims=True)
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    figure, (axis,) = new_figure(10, 2.2)
    shades = LinearSegmentedColormap.from_list("share", [to_rgba(LIGHT[0], 0.0), to_rgba(LIGHT[0], 1.0)])
    image = axis.imshow(shares[order].T, aspect="auto", cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xticks([])
    axis.grid(visible=False)
    axis.set_xlabel(f"the {len(table)} plans that held-out texts took, sorted by label")
    figure.colorbar(image, label="share")
    return figure


@styled
def shares_by_position(lines: Mapping[str, Sequence[float]], tokens: int, chance: float) -> "Figure":
    """Draws shares, 0 to 1, of consecutive segments of `tokens` tokens, a line per name, and dotted chance level."""
    figure, (axis,) = new_figure(9, 3.2)
    for name, shares in lines.items():
        axis.plot([(index + 1) * tokens for index in range(len(shares))], shares, linewidth=1.4, label=name)
    axis.axhline(chance, color=FAINT, linewidth=0.9, linestyle=":", label="chance")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("tokens")
    axis.set_ylabel("share of texts")
    axis.legend()
    return figure
