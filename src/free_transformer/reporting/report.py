"""Reports: tables, text and plots in one self-contained HTML file, and the tables of a likelihood."""

import html
import importlib.resources
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from free_transformer.evaluation.likelihood import Likelihood
from free_transformer.evaluation.usage import LIVE_BITS
from free_transformer.files import WRITTEN_BY, write_text
from free_transformer.reporting.palette import SERIES, variables, with_variables
from free_transformer.reporting.parts import (
    Command,
    FigurePart,
    Folded,
    Heading,
    Paragraph,
    Part,
    Samples,
    TablePart,
    Warning_,
)
from free_transformer.reporting.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "page.html.jinja"
MAX_NARROW = 8.0  # inches; a wider figure scrolls on a phone instead of shrinking
REM_PER_INCH = 6.5  # on a wide page; gives figures and captions the same type size
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
    """Builds a table of the likelihood with standard errors, in nats per token and per byte."""
    rows = []
    for name, (meaning, comparison) in COMPARABLE.items():
        value = getattr(likelihood, name)
        if value is None:
            continue
        error = likelihood.standard_errors[name]
        if name == "nll":
            meaning += f" ({nll_method(likelihood)})"
        per_byte = with_error(value / bytes_per_token, error / bytes_per_token)
        rows.append([name, with_error(value, error), per_byte, meaning, comparison])
    return Table(["", "nats per token", "nats per byte", "what it is", "against a baseline"], rows)


def with_error(value: float, error: float, digits: int = 4) -> str:
    """Formats a value with its standard error, unless it is NaN, as for a single text."""
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def nll_method(likelihood: NllMethod) -> str:
    """Describes how `nll` was computed."""
    if likelihood.method == "exact":
        method = "exact"
    elif likelihood.method == "particle_filter":
        method = f"particle filter's bound, {likelihood.num_samples} particles"
    else:
        method = f"importance-weighted bound, {likelihood.num_samples} plans"
    return method if likelihood.plan_prior == "uniform" else f"{method}, {likelihood.plan_prior} prior"


def usage_table(likelihood: Likelihood) -> Table:
    """Builds a table of plan usage, which has no rows for a baseline."""
    usage = likelihood.usage
    if usage is None or likelihood.kl_per_token is None:
        return Table(["", ""], [])
    errors = likelihood.standard_errors
    bits = " ".join(f"{each:.2f}" for each in usage.bits_per_position)
    rows = [
        ["KL, bits per plan", with_error(likelihood.kl or 0.0, errors["kl"], 3)],
        ["of these, bits that distinguish texts, at most", f"{usage.information:.3f}"],
        ["KL, bits per token", with_error(likelihood.kl_per_token, errors["kl_per_token"])],
        ["bits of each position", bits],
        [f"live bits (over {LIVE_BITS:g})", f"{usage.live_bits} of {len(usage.bits_per_position)}"],
        ["plans at the free-bits floor", f"{usage.share_at_floor:.0%}"],
        ["gap prior - reconstruction, nats per token", with_error(likelihood.gap or 0.0, errors["gap"])],
    ]
    return Table(["the plan", ""], rows)


class Report:
    """
    An HTML page without scripts or external references. Parts appear in the order in which they are added.

    Args:
        facts: short texts under the title.
    """

    def __init__(self, title: str, facts: Sequence[str] = ()):
        self.title, self.facts = title, facts
        self.parts: list[Part] = []

    def heading(self, text: str, level: int = 2) -> None:
        self.parts.append(Heading(text, level))

    def paragraph(self, text: str) -> None:
        self.parts.append(Paragraph(text))

    def command(self, text: str, command: str) -> None:
        """Adds a paragraph that ends with a command."""
        self.parts.append(Command(text, command))

    def warning(self, text: str, when: str = "", over: bool = False) -> None:
        """Adds a highlighted paragraph. `when` says when it was raised; `over` is True if it no longer applies."""
        self.parts.append(Warning_(text, when, over))

    def table(self, table: Table) -> None:
        self.parts.append(TablePart(table))

    def samples(self, titled: Sequence[tuple[str, str]], lines: bool = False) -> None:
        """Adds texts side by side, each under its title. `lines` disables line wrapping."""
        self.parts.append(Samples(titled, lines))

    def figure(self, figure: "Figure | Sequence[Figure]", caption: str, legend: Sequence[tuple[str, int]] = ()) -> None:
        """
        Adds matplotlib figures as SVG, side by side if there is room.

        Args:
            caption: description of the figures, which is also their accessible label.
            legend: labels, each with the index of its color in the palette.
        """
        figures = list(figure) if isinstance(figure, Sequence) else [figure]
        self.parts.append(FigurePart([_svg(each, caption) for each in figures], caption, legend))

    def add(self, part: Part) -> None:
        """Adds any other part of `reporting.parts`."""
        self.parts.append(part)

    @contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """Adds a collapsible section with the parts added in this context."""
        outside, self.parts = self.parts, []
        try:
            yield
        finally:
            outside.append(Folded(summary, self.parts))
            self.parts = outside

    def write(self, path: Path) -> None:
        from jinja2 import Environment

        source = importlib.resources.files("free_transformer.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        page = environment.from_string(source).render(
            title=self.title,
            facts=self.facts,
            parts=self.parts,
            generator=WRITTEN_BY,
            light=variables(dark=False),
            dark=variables(dark=True),
            colors=len(SERIES),
        )
        write_text(path, page.lstrip())


def _svg(figure: "Figure", caption: str) -> str:
    """Returns the SVG of a figure in the colors and font of the page, with an accessible label."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "free-transformer"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    svg = buffer.getvalue()
    titles = ", ".join(title for axis in figure.axes if (title := axis.get_title(loc="left") or axis.get_title()))
    width = figure.get_figwidth()
    size = f"--most: {REM_PER_INCH * width:.0f}rem;" + (" --least: 40rem;" if width > MAX_NARROW else "")
    label = html.escape(f"{titles}: {caption}" if titles else caption, quote=True)
    return f'<svg role="img" aria-label="{label}" style="{size}"' + with_variables(svg[svg.index("<svg") + 4 :])
