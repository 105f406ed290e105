"""Plots of metrics and of plan usage. They need matplotlib, which the extra `train` installs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl

PANELS = {
    "reconstruction": "reconstruction (loss of a baseline)\nnats per token",
    "kl": "KL, bits per plan",
    "elbo": "ELBO (NLL of a baseline), held out\nnats per token",
    "gap": "prior gap, held out\nnats per token",
    "live_bits": "live bits of a plan",
    "grad_norm": "gradient norm",
}
TRAIN, VALIDATION = {"alpha": 0.6, "linewidth": 1}, {"marker": ".", "linewidth": 1.5}


def _new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure  # pyplot has a backend to configure and keeps state between figures

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def curves(runs: Mapping[str, Metrics]) -> "Figure":
    """The metrics of runs by step: training as thin lines, validation with dots, stages separated by dotted lines."""
    shown = [name for name in PANELS if any(_points(metrics, name) for metrics in runs.values())]
    figure, axes = _new_figure(11, 3.2 * -(-len(shown) // 3), columns=3, rows=-(-len(shown) // 3))
    for axis, name in zip(axes, shown, strict=False):
        for color, (label, metrics) in enumerate(runs.items()):
            for split, points in _points(metrics, name).items():
                style = TRAIN if split == "train" else VALIDATION
                axis.plot(*zip(*points, strict=True), color=f"C{color}", label=f"{label}, {split}", **style)
        for step in _stage_starts(next(iter(runs.values()))) if len(runs) == 1 else []:
            axis.axvline(step, color="gray", linewidth=0.8, linestyle=":")
        axis.set_title(PANELS[name], fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
        if name == "live_bits":
            axis.set_ylim(bottom=0)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return figure


def _points(metrics: Metrics, name: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of a panel by split."""
    key = "nll" if name == "elbo" and _is_baseline(metrics) else name
    splits = {split: values_of(metrics, split, key) for split in ("train", "validation")}
    return {split: points for split, points in splits.items() if points}


def values_of(metrics: Metrics, split: str, key: str) -> list[tuple[int, float]]:
    """Steps and values of a key in the lines of a split."""
    return [(line["step"], line[key]) for line in metrics if line["split"] == split and key in line]


def _stage_starts(metrics: Metrics) -> list[int]:
    """The step after which each stage begins, except the first."""
    lines = [line for line in metrics if "stage" in line]
    return [before["step"] for before, line in pairwise(lines) if line["stage"] != before["stage"]]


def _is_baseline(metrics: Metrics) -> bool:
    return not any("elbo" in line for line in metrics)


def bits(values: Sequence[float]) -> "Figure":
    """KL of each bit position."""
    figure, (axis,) = _new_figure(6, 2.4)
    axis.bar(range(len(values)), values)
    axis.set_xlabel("bit of the plan")
    axis.set_ylabel("KL, bits")
    axis.set_ylim(0, 1)
    return figure


def plans_by_label(table: np.ndarray, labels: Sequence[str]) -> "Figure":
    """The share of each label per plan, from a (plans, labels) array of counts. Plans are sorted by label."""
    shares = table / table.sum(1, keepdims=True)
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    figure, (axis,) = _new_figure(10, 2.2)
    image = axis.imshow(shares[order].T, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xticks([])
    axis.set_xlabel(f"the {len(table)} plans that held-out texts took, sorted by label")
    figure.colorbar(image, label="share")
    return figure


def shares_by_position(lines: Mapping[str, Sequence[float]], tokens: int, chance: float) -> "Figure":
    """Shares, 0 to 1, of consecutive segments of `tokens` tokens, one line per name, and a dotted line for chance."""
    figure, (axis,) = _new_figure(10, 3.2)
    for name, shares in lines.items():
        axis.plot([(index + 1) * tokens for index in range(len(shares))], shares, linewidth=1.2, label=name)
    axis.axhline(chance, color="gray", linewidth=0.8, linestyle=":", label="chance")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("tokens")
    axis.set_ylabel("share of texts")
    axis.legend(fontsize=8)
    return figure
