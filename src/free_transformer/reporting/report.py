"""A report that opens without a server: tables, texts and plots in one HTML file."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from free_transformer.evaluation.likelihood import Likelihood
from free_transformer.files import WRITTEN_BY, write_text

STYLE = """
:root { color-scheme: light dark; --text: #1d2733; --faint: #5a6b7d; --line: #d8dee6; --head: #eef2f6; --code: #f6f8fa;
  --warn: #fff3d6; background: #fff; }
@media (prefers-color-scheme: dark) { :root { --text: #d6dde6; --faint: #93a1b0; --line: #38434f; --head: #232b34;
  --code: #1c232b; --warn: #4a3a10; background: #151a20; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; } th { text-align: left; background: var(--head); }
td, th { padding: .3rem .6rem; font-size: 14px; border: 1px solid var(--line); vertical-align: top; }
pre { background: var(--code); padding: .7rem; margin: 0; font-size: 13px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
.lines pre { white-space: pre; overflow-x: auto; font-size: 11px; }
.warning { background: var(--warn); border-left: 4px solid #e0a100; padding: .6rem 1rem; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { color: var(--faint); font-size: 14px; }
svg { max-width: max(100%, 44rem); height: auto; background: #fff; border-radius: 4px; }
"""

COMPARABLE = {
    "reconstruction": ("plans from the posterior, which has read the text", "never compare"),
    "elbo": ("reconstruction + KL, an upper bound of the NLL", "a fair, pessimistic bound"),
    "nll": ("negative log-likelihood", "the number to compare"),
    "prior": ("one plan from the prior, what one generation sees", "not a bound to compare"),
    "gap": ("prior - reconstruction: no gap, no use of the plan", "-"),
}

Table = tuple[list[str], list[list[str]]]


def likelihood_table(likelihood: Likelihood, bytes_per_token: float) -> Table:
    """Header and rows of the likelihood table, each value with its standard error, per token and per byte."""
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
    return ["", "nats per token", "nats per byte", "what it is", "against a baseline"], rows


def nll_method(likelihood: Likelihood) -> str:
    """How `nll` was come by, in words."""
    if likelihood.method == "exact":
        method = "exact"
    elif likelihood.method == "particle_filter":
        method = f"particle filter's bound, {likelihood.num_samples} particles"
    else:
        method = f"importance-weighted bound, {likelihood.num_samples} plans"
    return method if likelihood.plan_prior == "uniform" else f"{method}, {likelihood.plan_prior} prior"


def usage_table(likelihood: Likelihood) -> Table:
    """Header and rows of the plan's usage; none for a baseline."""
    usage = likelihood.usage
    if usage is None or likelihood.kl_per_token is None:
        return ["", ""], []
    errors = likelihood.standard_errors
    bits = " ".join(f"{each:.2f}" for each in usage.bits_per_position)
    return ["the plan", ""], [
        ["KL, bits per plan", f"{likelihood.kl:.3f} ± {errors['kl']:.3f}"],
        ["of these, bits that tell texts apart, at most", f"{usage.information:.3f}"],
        ["KL, bits per token", f"{likelihood.kl_per_token:.4f} ± {errors['kl_per_token']:.4f}"],
        ["bits of each position", bits],
        ["live bits (over 0.05)", f"{usage.live_bits} of {len(usage.bits_per_position)}"],
        ["plans at the free-bits floor", f"{usage.share_at_floor:.0%}"],
        ["gap prior - reconstruction, nats per token", f"{likelihood.gap:.4f} ± {errors['gap']:.4f}"],
    ]


class Report:
    """Collects the parts of a page in the order in which they are added."""

    def __init__(self, title: str):
        self.title = title
        self.parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        self.parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def paragraph(self, text: str, warning: bool = False) -> None:
        self.parts.append(f"<p{' class=warning' if warning else ''}>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def samples(self, titled: Sequence[tuple[str, str]], lines: bool = False) -> None:
        """Texts side by side, each under its title; `lines` keeps every line on one line."""
        cells = "".join(
            f"<div><strong>{html.escape(title)}</strong><pre>{html.escape(text)}</pre></div>" for title, text in titled
        )
        self.parts.append(f"<div class='samples{' lines' * lines}'>{cells}</div>")

    def figure(self, figure: Any, caption: str) -> None:
        """A matplotlib figure, drawn into the page as SVG."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        self.parts.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def write(self, path: Path) -> None:
        body = "\n".join(self.parts)
        title = html.escape(self.title)
        write_text(
            path,
            f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=generator content={WRITTEN_BY}>"
            f"<title>{title}</title>"
            f"<style>{STYLE}</style></head><body>{body}</body></html>\n",
        )


def _cell(text: str) -> str:
    """A value stays on one line with its error."""
    return html.escape(text).replace(" ± ", "\u00a0±\u00a0")
