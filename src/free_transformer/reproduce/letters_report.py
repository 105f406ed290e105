"""`letters/report.html`: the paper's picture, and the table that it lacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from free_transformer.data.letters import NOISE, letters_entropy
from free_transformer.reporting.report import Report
from free_transformer.reproduce.letters import GROUP_SIZE, SHOWN_STRINGS, VARIANTS, Result, Variant
from free_transformer.reproduce.noise import noise_optimum

POSITION_SHARED = 0.75  # a plan carries the place where it shrinks the place's deviation to this share, and
NOISE_SHARED = 2.0  # the noise where it multiplies the overlap of the `!` by this
SOUND = 0.9  # generation counts as correct from this share of valid strings on, and
DRIFT = 1.5  # up to this multiple of the task's rate of `!`: noise anywhere is valid
FOUND = {
    "1_64": "behaves like a plain model",
    "1_8": "carries the place",
    "1": "carries place and noise",
    "2": "carries everything, and generation breaks",
}

Rows = tuple[list[str], list[list[str]]]


def write_letters_report(results: Sequence[Result], out: Path) -> Path:
    """Writes `report.html` and its plot, `figure.png`, into `out`; returns the report's path."""
    seeds = len({result.seed for result in results})
    report = Report("The letters of the Free Transformer")
    report.paragraph(
        f"Each model was trained for {results[0].steps} steps on strings of 64 characters: underscores, a run of 8 "
        f"letters at a random place, and every character replaced by ! with probability 1/16. {seeds} "
        f"seed{'s' * (seeds > 1)}, means ± standard deviation over seeds."
    )
    report.heading("What a plan carries")
    report.table(*finding_table(results))
    report.heading("What the strings show")
    report.paragraph(
        f"Groups of {GROUP_SIZE} strings; the strings of a group have one letter, and one plan (shared) or a "
        f"plan each (independent). The task's rate of ! is {NOISE:.4f}."
    )
    report.table(*strings_table(results))
    try:
        figure = _figure(results)
        figure.savefig(out / "figure.png", dpi=120)
        report.figure(figure, "shared against independent plans, mean over seeds")
    except ImportError:
        report.paragraph("Plots need matplotlib: pip install 'free-transformer-lm[train]'", warning=True)
    report.heading("What the objective asks of the noise")
    report.paragraph(
        "The minimum of the objective for the noise alone, with the best decoder there is and no network: what its "
        "plan saves, and what fair coins then write. Training is on its way there."
    )
    report.table(*optimum_table())
    report.heading("What the plan costs, in nats a string")
    report.paragraph(
        f"No model can pass {letters_entropy():.3f} nats, the entropy of the data given the letter. Reconstruction "
        "has read the string and may not be compared with anything."
    )
    report.table(*likelihood_table(results))
    report.heading("The strings")
    for variant in VARIANTS:
        first = next(result for result in results if result.variant == variant.name)
        report.heading(variant.title, level=3)
        report.samples(_shown(first), lines=True)
    path = out / "report.html"
    report.write(path)
    return path


def _shown(result: Result) -> list[tuple[str, str]]:
    titles = {"independent": "a plan each", "shared": "one plan a group"}
    shown = []
    for name, title in titles.items():
        if texts := result.texts.get(name):
            starts = range(0, len(texts), SHOWN_STRINGS)
            shown.append((title, "\n\n".join("\n".join(texts[start : start + SHOWN_STRINGS]) for start in starts)))
    return shown


def _of(results: Sequence[Result], variant: Variant) -> list[Result]:
    return [result for result in results if result.variant == variant.name]


def _values(results: Sequence[Result], path: str) -> list[float]:
    """`path` of each result, as in `shared.place_std`; those that a model without a plan lacks are left out."""
    values: list[Any] = list(results)
    for name in path.split("."):
        values = [getattr(value, name) for value in values if value is not None]
    return [value for value in values if value is not None]


def _cell(results: Sequence[Result], path: str, digits: int) -> str:
    """Mean and standard deviation over seeds."""
    values = _values(results, path)
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def finding_table(results: Sequence[Result]) -> Rows:
    """The paper's finding beside what is seen here, by thresholds that the header names."""
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
    return [*header, f"sound ({SOUND:.0%} valid, rate of ! × {DRIFT} or less)"], rows


def _ratio(results: Sequence[Result], name: str) -> np.ndarray:
    """Under a shared plan against independent ones, of each seed."""
    with np.errstate(invalid="ignore", divide="ignore"):  # no ! anywhere: NaN
        return np.array(_values(results, f"shared.{name}")) / np.array(_values(results, f"independent.{name}"))


def _count(hits: np.ndarray) -> str:
    return f"{int(hits.sum())} of {len(hits)} seeds"


def strings_table(results: Sequence[Result]) -> Rows:
    """Validity and noise of strings under independent plans, and what a shared plan changes."""
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
    pairs = ["deviation of the place", "share at the commonest place", "overlap of the ! (Jaccard)"]
    return [*header, *(f"{name}, shared : independent" for name in pairs)], rows


def optimum_table() -> Rows:
    """Of the models with a plan for every token."""
    rows = []
    for variant in VARIANTS:
        if variant.model and variant.model["plan_span"] == 1:
            found = noise_optimum(variant.model["free_bits"], variant.model["latent_dim"])
            overlap = f"{found.overlap_shared:.3f} : {found.overlap_independent:.3f}"
            rate = f"{found.rate:.4f} (× {found.rate / NOISE:.1f})"
            rows.append([variant.title, f"{found.saved:.2f}", rate, overlap])
    return ["plan", "saved, nats a string", "rate of !", "overlap of the !, shared : independent"], rows


def likelihood_table(results: Sequence[Result]) -> Rows:
    """Nats a string."""
    columns = {
        "kl": "KL, bits a string",
        "reconstruction": "reconstruction",
        "prior": "one plan from the prior",
        "elbo": "ELBO",
        "nll": "NLL, 16 importance-weighted plans",
        "nll_filter": "NLL, 16 particles (exact for one plan)",
        "nll_aggregate": "the same, aggregate prior",
    }
    rows = []
    for variant in VARIANTS:
        here = _of(results, variant)
        cells = [_cell(here, name, 2) for name in columns]
        rows.append([variant.title, *cells])
    return ["plan", *columns.values()], rows


def _figure(results: Sequence[Result]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = {
        "valid": "share of valid strings",
        "noise_rate": "rate of !",
        "place_std": "deviation of the place",
        "noise_overlap": "overlap of the !",
    }
    for axis, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for offset, kind in ((-0.2, "shared"), (0.2, "independent")):
            heights = [np.mean(_values(_of(results, variant), f"{kind}.{name}")) for variant in VARIANTS[:-1]]
            axis.bar(np.arange(len(heights)) + offset, heights, 0.4, label=f"{kind} plan")
        baseline = np.mean(_values(_of(results, VARIANTS[-1]), f"independent.{name}"))
        axis.axhline(baseline, color="black", linestyle=":", linewidth=1, label="no plan")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0, top=1 if name == "valid" else None)
        axis.set_xticks(range(len(VARIANTS) - 1), [variant.title.split(" ")[0] for variant in VARIANTS[:-1]])
    axis.legend(fontsize=7)
    return figure
