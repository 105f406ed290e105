"""Plots of a run's metrics and of what its plans carry; matplotlib comes with the extra `train`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Metrics = Sequence[Mapping[str, Any]]


def _new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: nothing to configure, no screen, no state between figures

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def curves(runs: Mapping[str, Metrics]) -> Any:
    """Reconstruction, KL and ELBO of each run by step; training thin, validation with dots."""
    figure, axes = _new_figure(11, 3.4, columns=3)
    panels = [
        ("reconstruction", "reconstruction (loss of a baseline)\nnats per token"),
        ("kl", "KL, bits per plan"),
        ("elbo", "ELBO (NLL of a baseline), held out\nnats per token"),
    ]
    for axis, (name, title) in zip(axes, panels, strict=True):
        for color, (label, metrics) in enumerate(runs.items()):
            for split, style in (
                ("train", {"alpha": 0.6, "linewidth": 1}),
                ("validation", {"marker": ".", "linewidth": 1.5}),
            ):
                key = "nll" if name == "elbo" and _is_baseline(metrics) else name
                points = [(line["step"], line[key]) for line in metrics if line["split"] == split and key in line]
                if points:
                    steps, values = zip(*points, strict=True)
                    axis.plot(steps, values, color=f"C{color}", label=f"{label}, {split}", **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        if axis.has_data():
            axis.legend(fontsize=7)
    return figure


def _is_baseline(metrics: Metrics) -> bool:
    return not any("elbo" in line for line in metrics)


def bits(values: Sequence[float]) -> Any:
    """KL of each bit position."""
    figure, (axis,) = _new_figure(6, 2.4)
    axis.bar(range(len(values)), values)
    axis.set_xlabel("bit of the plan")
    axis.set_ylabel("KL, bits")
    axis.set_ylim(0, 1)
    return figure


def plans_by_label(table: np.ndarray, labels: Sequence[str]) -> Any:
    """Which label each plan stands for: (plans, labels) counts as shares, plans sorted by their label."""
    shares = table / table.sum(1, keepdims=True)
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    figure, (axis,) = _new_figure(10, 2.2)
    image = axis.imshow(shares[order].T, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xticks([])
    axis.set_xlabel(f"the {len(table)} plans that held-out texts took, sorted by voice")
    figure.colorbar(image, label="share")
    return figure
