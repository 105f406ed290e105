"""Tables and plots of docs/performance.md, from the results of `comparison.py` and `cost_curves.py`."""

import math
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "comparison.json"
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"
LLAMA = "Llama"
COLORS = {LLAMA: "#888888", "x-transformers": "#d08c2f", "free-transformer 0.1.2": "#a34a4a"}
OURS = ("#1f6f8b", "#64b5c8")


def machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    peers = {}
    for name in ("x-transformers", "free-transformer"):
        pip = ROOT / ".venv" / "peers" / name / "bin" / "pip"
        shown = subprocess.run([pip, "show", name], capture_output=True, text=True).stdout if pip.exists() else ""
        version = re.search(r"^Version: (.+)$", shown, re.MULTILINE)
        peers[name] = version[1] if version else "not installed"
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **peers,
    }


def write_report(results: dict[str, Any]) -> None:
    """Replaces the text between `<!-- bench NAME -->` and `<!-- end -->` on the page, and draws the plots."""
    sections = {
        "machine": _machine,
        "training": _training,
        "allocator": _training,
        "memory": _memory,
        "generation": _generation,
        "compiled": _generation,
        "bf16": _training,
        "curves": _curves,
    }
    page = PAGE.read_text()
    for name, write in sections.items():
        if name in results:
            text = write(results, name)
            mark = f"<!-- bench {name} -->"
            page = re.sub(
                f"{mark}.*?<!-- end -->", lambda _, t=text, m=mark: f"{m}\n{t}\n<!-- end -->", page, flags=re.S
            )
    PAGE.write_text(page)


def ratios(group: dict[str, Any], label: str, faster_is_more: bool = False) -> list[float]:
    """Times relative to Llama's turn of the same round, or speeds if `faster_is_more`."""
    found = []
    for own, llama in zip(group["seconds"][label], group["seconds"][LLAMA], strict=True):
        if own is not None and llama is not None:
            found.append(llama / own if faster_is_more else own / llama)
    if not found:  # one of them took a single turn because it exceeded the time limit
        own, llama = (median_of(group["seconds"][each]) for each in (label, LLAMA))
        found = [llama / own if faster_is_more else own / llama]
    return found


def median_of(seconds: list[float | None]) -> float:
    return statistics.median(each for each in seconds if each is not None)


def spread(values: list[float]) -> str:
    """Median, with quartiles of four or more values and the range of two or three."""
    median = f"**{statistics.median(values):.2f}**"
    if len(values) < 4:
        return median + ("" if len(values) == 1 else f" ({min(values):.2f}–{max(values):.2f})")
    low, _, high = statistics.quantiles(values, n=4)
    return f"{median} ({low:.2f}–{high:.2f})"


def operations(title: str, free: bool, plans: int) -> float:
    """FLOPs of the matmuls of weights and attention in a training step, without those of a codebook."""
    layers, width, rows, length = (int(each) for each in re.findall(r"\d+", title)[:4])
    ffn, vocabulary, tokens = {256: 688, 512: 1376}[width], 4096, rows * length
    block = 4 * width**2 + 3 * width * ffn
    total = 6 * tokens * (layers * block + width * vocabulary) + 7 * layers * rows * length**2 * width
    if free:  # the encoder: keys and values for each token, the rest for each plan
        total += 6 * (tokens * 2 * width**2 + plans * (width**2 + 3 * width * ffn)) + 14 * plans * length * width
    return float(total)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def table_by_shape(groups: list[dict[str, Any]], cells: list[dict[str, str]]) -> str:
    """A row for each group and a column for each contestant, with `cells[group][contestant]`."""
    labels = dict.fromkeys(
        label for group, row in zip(groups, cells, strict=True) for label in [*row, *group["failed"]]
    )
    rows = []
    for group, row in zip(groups, cells, strict=True):
        shown = ["failed" if label in group["failed"] else row.get(label, "") for label in labels]
        rows.append([group["title"], *shown])
    return table(["shape", *(label.removeprefix("Free Transformer, ") for label in labels)], rows)


def failures(groups: list[dict[str, Any]]) -> list[str]:
    """A line for each contestant that failed, with the reason."""
    found = (f"{label} failed: {reason}." for group in groups for label, reason in group["failed"].items())
    return list(dict.fromkeys(found))


def folded(title: str, text: str) -> str:
    """A section that a reader opens."""
    return f"<details markdown>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _machine(results: dict[str, Any], name: str) -> str:
    found = results[name]
    versions = ", ".join(
        f"{each} {found[each]}" for each in ("torch", "transformers", "x-transformers", "free-transformer")
    )
    return f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, Python {found['python']}, {versions}."


def _training(results: dict[str, Any], name: str) -> str:
    rates = results["rates"][name]
    relative, absolute = [], []
    for group in results[name]:
        rate = statistics.mean(each[dtype_of(group)] for each in rates)
        tokens = _tokens(group["title"])
        shown = {}
        for label, seconds in group["seconds"].items():
            own, plans = median_of(seconds), 8 if "sequence" in label else tokens
            share = operations(group["title"], label != LLAMA, plans) / own / rate
            shown[label] = f"{tokens / own:,.0f} ({100 * share:.0f} %)"
        absolute.append(shown)
        relative.append({label: spread(ratios(group, label)) for label in group["seconds"] if label != LLAMA})
    _plot(results[name], f"{name}.png", "time of a training step, Llama = 1", faster_is_more=False)
    rate_text = "; ".join(
        f"{dtype} {' and '.join(f'{each[dtype] / 1e9:.0f}' for each in rates)}"
        for dtype in sorted({dtype_of(group) for group in results[name]}, reverse=True)
    )
    details = table_by_shape(results[name], absolute)
    details += f"\n\nRate of the raw matmul before and after, GFLOP/s: {rate_text}."
    return "\n\n".join(
        [
            table_by_shape(results[name], relative),
            *failures(results[name]),
            folded("Tokens per second, and share of the matmul rate", details),
            f"![Time of a training step relative to Llama](plots/{name}.png)",
        ]
    )


def dtype_of(group: dict[str, Any]) -> str:
    return "bfloat16" if "bf16" in group["title"] else "float32"


def _tokens(title: str) -> int:
    rows, length = (int(each) for each in re.findall(r"\d+", title)[2:4])
    return rows * length


def _memory(results: dict[str, Any], name: str) -> str:
    relative, absolute = [], []
    for group in results[name]:
        llama = group["bytes"][LLAMA]["peak"]
        found = group["bytes"].items()
        relative.append(
            {key: f"**{(each['peak'] - each['table']) / llama:.2f}**" for key, each in found if key != LLAMA}
        )
        absolute.append({key: f"{each['peak'] / 1e6:,.0f} ({each['peak'] / llama:.2f})" for key, each in found})
    return "\n\n".join(
        [
            table_by_shape(results[name], relative),
            *failures(results[name]),
            folded("Peak MB, and ratio to Llama with codebook", table_by_shape(results[name], absolute)),
        ]
    )


def _generation(results: dict[str, Any], name: str) -> str:
    relative, absolute = [], []
    for group in results[name]:
        batch = re.search(r"batch (\d+)", group["title"])
        shown = {}
        for label, seconds in group["seconds"].items():
            own = median_of(seconds)
            shown[label] = f"{int(batch[1]) * 256 / own:,.0f} tokens/s" if batch else f"{own * 1e3:.0f} ms"
        absolute.append(shown)
        relative.append({label: spread(ratios(group, label, True)) for label in group["seconds"] if label != LLAMA})
    _plot(results[name], f"{name}.png", "speed of generation, Llama = 1", faster_is_more=True)
    return "\n\n".join(
        [
            table_by_shape(results[name], relative),
            *failures(results[name]),
            folded("Tokens per second, or time to the first token", table_by_shape(results[name], absolute)),
            f"![Speed of generation relative to Llama](plots/{name}.png)",
        ]
    )


def _plot(groups: list[dict[str, Any]], file: str, what: str, faster_is_more: bool) -> None:
    figure, axes = plt.subplots(figsize=(8, 1 + 0.6 * len(groups)), layout="constrained")
    labels: dict[str, Any] = {}
    for row, group in enumerate(groups):
        others = [label for label in group["seconds"] if label != LLAMA]
        for place, label in enumerate(others):
            values = ratios(group, label, faster_is_more)
            median = statistics.median(values)
            color = COLORS.get(label, OURS["per token" not in label])
            bar = axes.barh(row + 0.2 * (place - len(others) / 2 + 0.5), median, 0.18, color=color)
            error = [[median - min(values)], [max(values) - median]]
            axes.errorbar(median, bar[0].get_y() + 0.09, xerr=error, color="#333333", linewidth=0.8)
            labels.setdefault(label, bar)
    axes.axvline(1, color=COLORS[LLAMA], linestyle="--", linewidth=1)
    axes.set_yticks(range(len(groups)), [group["title"] for group in groups], fontsize=7)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel(f"{what} (medians and ranges)")
    if not faster_is_more:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    _save(figure, file)


def _curves(results: dict[str, Any], name: str) -> str:
    rows = []
    figure, panels = plt.subplots(1, len(results[name]), figsize=(10, 3), layout="constrained")
    for panel, curve in zip(panels, results[name], strict=True):
        points = curve["points"]
        _draw_curve(panel, curve["title"], points)
        cells = []
        for part in (points, points[-2:]):
            cells += [f"**{exponent(part, 'seconds'):.2f}**", f"{exponent(part, 'operations'):.2f}"]
        each = ", ".join(f"{point['x']}: {1e3 * point['seconds']:,.1f}" for point in points)
        rows.append([curve["title"], *cells, each])
    panels[0].set_ylabel("seconds", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False)
    _save(figure, "curves.png")
    head = ["part, by size", "exponent", "exponent of FLOPs", "exponent at the end", "exponent of FLOPs at the end"]
    measured = table(["part, by size", "size: milliseconds"], [[row[0], row[-1]] for row in rows])
    return "\n\n".join(
        [
            table(head, [row[:-1] for row in rows]),
            folded("Milliseconds at each point", measured),
            "![Measured times and counted FLOPs](plots/curves.png)",
        ]
    )


def _draw_curve(panel: Any, title: str, points: list[dict[str, float]]) -> None:
    """Seconds, and the FLOPs scaled to end at the same point."""
    x, seconds, counted = ([point[name] for point in points] for name in ("x", "seconds", "operations"))
    panel.loglog(x, seconds, "o-", color=OURS[0], label="measured")
    panel.loglog(x, [each * seconds[-1] / counted[-1] for each in counted], "--", color="#888888", label="FLOPs")
    what, by = title.split(", by ")
    panel.set_title(what.replace(", ", ",\n"), fontsize=8)
    panel.set_xlabel(by, fontsize=8)
    panel.tick_params(labelsize=7)
    for axis in (panel.xaxis, panel.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1,) if high > 50 * low else (1, 2, 5)))
        axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def exponent(points: list[dict[str, float]], of: str) -> float:
    """The slope of a straight line through the logarithms."""
    x, y = ([math.log(point[name]) for point in points] for name in ("x", of))
    return float(np.polyfit(x, y, 1)[0])


def _save(figure: Any, file: str) -> None:
    figure.savefig(PLOTS / file, dpi=150)
    plt.close(figure)
