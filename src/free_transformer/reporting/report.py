"""A report that opens without a server: tables, text and plots in one HTML file, and the tables of a likelihood."""

import importlib.resources
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from free_transformer.evaluation.likelihood import Likelihood
from free_transformer.evaluation.usage import LIVE_BITS
from free_transformer.files import WRITTEN_BY, write_text
from free_transformer.reporting.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "page.html.jinja"
NO_PLOTS = "Plots need matplotlib: pip install 'free-transformer-lm[train]'"

COMPARABLE = {
    "reconstruction": ("plans from the posterior, which has read the text", "never compare"),
    "elbo": ("reconstruction + KL, an upper bound of the NLL", "a fair, pessimistic bound"),
    "nll": ("negative log-likelihood", "the number to compare"),
    "prior": ("one plan from the prior, as in generation", "not a bound to compare"),
    "gap": ("prior - reconstruction: no gap, no use of the plan", "-"),
}


class NllMethod(Protocol):
    """How an NLL was computed; the fields of `Likelihood`."""

    @property
    def method(self) -> str: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def plan_prior(self) -> str: ...


def likelihood_table(likelihood: Likelihood, bytes_per_token: float) -> Table:
    """The likelihood, each value with its standard error, in nats per token and per byte."""
    rows = []
    for name, (meaning, comparison) in COMPARABLE.items():
        value = getattr(likelihood, name)
        if value is None:
            continue
        error = likelihood.standard_errors[name]
        if name == "nll":
            meaning += f" ({nll_method(likelihood)})"
        per_byte = f"{value / bytes_per_token:.4f} ± {error / bytes_per_token:.4f}"
        rows.append([name, f"{value:.4f} ± {error:.4f}", per_byte, meaning, comparison])
    return Table(["", "nats per token", "nats per byte", "what it is", "against a baseline"], rows)


def nll_method(likelihood: NllMethod) -> str:
    """How `nll` was computed, in words."""
    if likelihood.method == "exact":
        method = "exact"
    elif likelihood.method == "particle_filter":
        method = f"particle filter's bound, {likelihood.num_samples} particles"
    else:
        method = f"importance-weighted bound, {likelihood.num_samples} plans"
    return method if likelihood.plan_prior == "uniform" else f"{method}, {likelihood.plan_prior} prior"


def usage_table(likelihood: Likelihood) -> Table:
    """How much the plan is used; without rows for a baseline."""
    usage = likelihood.usage
    if usage is None or likelihood.kl_per_token is None:
        return Table(["", ""], [])
    errors = likelihood.standard_errors
    bits = " ".join(f"{each:.2f}" for each in usage.bits_per_position)
    rows = [
        ["KL, bits per plan", f"{likelihood.kl:.3f} ± {errors['kl']:.3f}"],
        ["of these, bits that distinguish texts, at most", f"{usage.information:.3f}"],
        ["KL, bits per token", f"{likelihood.kl_per_token:.4f} ± {errors['kl_per_token']:.4f}"],
        ["bits of each position", bits],
        [f"live bits (over {LIVE_BITS:g})", f"{usage.live_bits} of {len(usage.bits_per_position)}"],
        ["plans at the free-bits floor", f"{usage.share_at_floor:.0%}"],
        ["gap prior - reconstruction, nats per token", f"{likelihood.gap:.4f} ± {errors['gap']:.4f}"],
    ]
    return Table(["the plan", ""], rows)


@dataclass(frozen=True)
class _Heading:
    kind: ClassVar = "heading"
    text: str
    level: int


@dataclass(frozen=True)
class _Paragraph:
    kind: Literal["paragraph", "warning"]
    text: str


@dataclass(frozen=True)
class _TablePart:
    kind: ClassVar = "table"
    table: Table


@dataclass(frozen=True)
class _Samples:
    kind: ClassVar = "samples"
    titled: Sequence[tuple[str, str]]
    single_lines: bool


@dataclass(frozen=True)
class _Figure:
    kind: ClassVar = "figure"
    svg: str
    caption: str


class Report:
    """An HTML page. Its parts appear in the order in which they are added."""

    def __init__(self, title: str):
        self.title = title
        self.parts: list[_Heading | _Paragraph | _TablePart | _Samples | _Figure] = []

    def heading(self, text: str, level: int = 2) -> None:
        self.parts.append(_Heading(text, level))

    def paragraph(self, text: str) -> None:
        self.parts.append(_Paragraph("paragraph", text))

    def warning(self, text: str) -> None:
        """A highlighted paragraph."""
        self.parts.append(_Paragraph("warning", text))

    def table(self, table: Table) -> None:
        self.parts.append(_TablePart(table))

    def samples(self, titled: Sequence[tuple[str, str]], lines: bool = False) -> None:
        """Texts side by side, each under its title. `lines` keeps long lines on one line."""
        self.parts.append(_Samples(titled, lines))

    def figure(self, figure: "Figure", caption: str) -> None:
        """A matplotlib figure, embedded in the page as SVG."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        self.parts.append(_Figure(svg[svg.index("<svg") :], caption))

    def write(self, path: Path) -> None:
        from jinja2 import Environment

        source = importlib.resources.files("free_transformer.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        page = environment.from_string(source).render(title=self.title, parts=self.parts, generator=WRITTEN_BY)
        write_text(path, page)
