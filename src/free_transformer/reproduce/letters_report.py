"""The report of the letters experiment: tables, the paper's figure, and sample strings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from free_transformer.data.letters import NOISE, letters_entropy
from free_transformer.reporting.palette import TEXT
from free_transformer.reporting.plots import new_figure, styled
from free_transformer.reporting.report import NO_PLOTS, Report
from free_transformer.reporting.table import Table
from free_transformer.reproduce.letters import GROUP_SIZE, SHOWN_STRINGS, VARIANTS, Result, Variant
from free_transformer.reproduce.noise import noise_optimum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSITION_SHARED = 0.75  # a plan carries the place if sharing it reduces the place's deviation to this share
NOISE_SHARED = 2.0  # a plan carries the noise if sharing it multiplies the overlap of the `!` by this
SOUND = 0.9  # generation is correct if at least this share of strings is valid
DRIFT = 1.5  # and the rate of `!` is at most this multiple of the task's; `!` is valid anywhere
FOUND = {
    "1_64": "behaves like a plain model",
    "1_8": "carries the place",
    "1": "carries place and noise",
    "8": "carries everything, and generation breaks",
}


def write_letters_report(results: Sequence[Result], out: Path) -> Path:
    """Writes `report.html` and its plot, `figure.png`, into `out`; returns the report's path."""
    seeds = len({result.seed for result in results})
    report = Report("The letters of the Free Transformer")
    report.paragraph(
        f"Each model was trained for {results[0].steps} steps on strings of 64 characters: underscores and a run of 8 "
        "letters at a random place, with each character replaced by ! with probability 1/16. Values are means ± "
        f"standard deviations over {seeds} seed{'s' * (seeds > 1)}."
    )
    report.heading("What a plan carries")
    report.table(finding_table(results))
    report.heading("Generated strings")
    report.paragraph(
        f"Groups of {GROUP_SIZE} strings. The strings of a group share the letter, and either share one plan (shared) "
        f"or each have their own (independent). The task's rate of ! is {NOISE:.4f}."
    )
    report.table(strings_table(results))
    try:
        figure = _figure(results)
        figure.savefig(out / "figure.png", dpi=120)
        report.figure(figure, "Shared and independent plans, means over seeds")
    except ImportError:
        report.warning(NO_PLOTS)
    report.heading("Noise at the minimum of the objective")
    report.paragraph(
        "The minimum of the objective for the noise alone, computed with an ideal decoder instead of a network: how "
        "many nats the plan saves, and what is generated from the uniform prior. Training approaches this minimum."
    )
    report.table(optimum_table())
    report.heading("Likelihood, in nats per string")
    report.paragraph(
        f"No model can be below {letters_entropy():.3f} nats, the entropy of the data given the letter. Do not compare "
        "the reconstruction with other columns: its encoder has read the string."
    )
    report.table(likelihood_table(results))
    report.heading("Sample strings")
    for variant in VARIANTS:
        first = next(result for result in results if result.variant == variant.name)
        report.heading(variant.title, level=3)
        report.samples(_shown(first), lines=True)
    path = out / "report.html"
    report.write(path)
    return path


def _shown(result: Result) -> list[tuple[str, str]]:
    titles = {"independent": "one plan per string", "shared": "one plan per group"}
    shown = []
    for name, title in titles.items():
        if texts := result.texts.get(name):
            starts = range(0, len(texts), SHOWN_STRINGS)
            shown.append((title, "\n\n".join("\n".join(texts[start : start + SHOWN_STRINGS]) for start in starts)))
    return shown


def _of(results: Sequence[Result], variant: Variant) -> list[Result]:
    return [result for result in results if result.variant == variant.name]


def _values(results: Sequence[Result], path: str) -> list[float]:
    """The attribute `path` of each result, for example `shared.place_std`. Missing values are omitted."""
    found = []
    for result in results:
        value: object = result
        for name in path.split("."):
            value = None if value is None else getattr(value, name)
        if isinstance(value, int | float):
            found.append(value)
    return found


def _cell(results: Sequence[Result], path: str, digits: int) -> str:
    """Mean and standard deviation over seeds."""
    values = _values(results, path)
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def finding_table(results: Sequence[Result]) -> Table:
    """Header and rows that compare the paper's findings with these results, by the thresholds in the header."""
    rows = []
    for variant in VARIANTS[:-1]:
        here = _of(results, variant)
        place = _ratio(here, "place_std")
        noise = _ratio(here, "noise_overlap")
        valid = np.array(_values(here, "independent.valid"))
        drift = np.array(_values(here, "independent.noise_rate")) / NOISE
        rows.append(
            [
                variant.title,
                FOUND.get(variant.name, "-"),
                f"{_count(place <= POSITION_SHARED)} ({np.mean(place):.2f})",
                f"{_count(noise >= NOISE_SHARED)} ({np.mean(noise):.2f})",
                f"{_count((valid >= SOUND) & (drift <= DRIFT))} ({np.mean(valid):.2f}, × {np.mean(drift):.1f})",
            ]
        )
    header = ["plan", "the paper: this plan", f"place carried (deviation × {POSITION_SHARED} or less)"]
    header += [f"noise carried (overlap × {NOISE_SHARED:g} or more)"]
    return Table([*header, f"sound ({SOUND:.0%} valid, rate of ! × {DRIFT} or less)"], rows)


def _ratio(results: Sequence[Result], name: str) -> np.ndarray:
    """Ratio of a value under shared plans to that under independent plans, for each seed."""
    with np.errstate(invalid="ignore", divide="ignore"):  # no ! anywhere: NaN
        return np.array(_values(results, f"shared.{name}")) / np.array(_values(results, f"independent.{name}"))


def _count(hits: np.ndarray) -> str:
    return f"{int(hits.sum())} of {len(hits)} seeds"


def strings_table(results: Sequence[Result]) -> Table:
    """Header and rows: validity and noise under independent plans, and the effect of sharing plans."""
    rows = []
    for variant in VARIANTS:
        here = _of(results, variant)
        pairs = []
        for name, digits in (("place_std", 1), ("place_mode", 2), ("noise_overlap", 3)):
            pairs.append(f"{_cell(here, f'shared.{name}', digits)} : {_cell(here, f'independent.{name}', digits)}")
        alone = [
            _cell(here, f"{kind}.{name}", digits)
            for name, digits in (("valid", 3), ("noise_rate", 4))
            for kind in ("independent", "aggregate")
        ]
        rows.append([variant.title, *alone, *pairs])
    header = ["plan", "valid", "valid, aggregate prior", "rate of !", "rate of !, aggregate prior"]
    pairs = ["deviation of the place", "share at the most common place", "overlap of the ! (Jaccard)"]
    return Table([*header, *(f"{name}, shared : independent" for name in pairs)], rows)


def optimum_table() -> Table:
    """Header and rows: the optimum of the noise, for the models with one plan per token."""
    rows = []
    for variant in VARIANTS:
        if variant.model and variant.model["plan_span"] == 1:
            found = noise_optimum(variant.model["free_bits"], variant.model["latent_dim"])
            overlap = f"{found.overlap_shared:.3f} : {found.overlap_independent:.3f}"
            rate = f"{found.rate:.4f} (× {found.rate / NOISE:.1f})"
            rows.append([variant.title, f"{found.saved:.2f}", rate, overlap])
    return Table(["plan", "saved, nats per string", "rate of !", "overlap of the !, shared : independent"], rows)


def likelihood_table(results: Sequence[Result]) -> Table:
    """Header and rows: losses in nats per string."""
    columns = {
        "kl": "KL, bits per string",
        "reconstruction": "reconstruction",
        "prior": "plan from the prior",
        "elbo": "ELBO",
        "nll": "NLL, 16 importance-weighted plans",
        "nll_filter": "NLL, 16 particles (exact for one plan per string)",
        "nll_aggregate": "the same, aggregate prior",
    }
    rows = []
    for variant in VARIANTS:
        here = _of(results, variant)
        cells = [_cell(here, name, 2) for name in columns]
        rows.append([variant.title, *cells])
    return Table(["plan", *columns.values()], rows)


@styled
def _figure(results: Sequence[Result]) -> "Figure":
    figure, axes = new_figure(11, 3, columns=4)
    panels = {
        "valid": "share of valid strings",
        "noise_rate": "rate of !",
        "place_std": "deviation of the place",
        "noise_overlap": "overlap of the !",
    }
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for offset, kind in ((-0.2, "shared"), (0.2, "independent")):
            heights = [np.mean(_values(_of(results, variant), f"{kind}.{name}")) for variant in VARIANTS[:-1]]
            axis.bar(np.arange(len(heights)) + offset, heights, 0.4, label=f"{kind} plan")
        baseline = float(np.mean(_values(_of(results, VARIANTS[-1]), f"independent.{name}")))
        axis.axhline(baseline, color=TEXT, linestyle=":", linewidth=1, label="no plan")
        axis.set_title(title)
        axis.grid(axis="x", visible=False)
        axis.set_ylim(bottom=0, top=1 if name == "valid" else None)
        axis.set_xticks(range(len(VARIANTS) - 1), [variant.title.split(" ")[0] for variant in VARIANTS[:-1]])
    axis.legend()
    return figure
