"""The page's HTML: texts in a grid, differences, tokens, and the map of plans. All text is escaped here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from free_transformer.explorer.generation import GrowingText, TokenEffect
from free_transformer.explorer.survey import UNLABELED, PlanSurvey

COLORS = 8  # number of sources with separate colors, `--source-0` to `--source-7` in page.css


@dataclass(frozen=True)
class GridRow:
    """
    A row of texts.

    Attributes:
        title: what the texts of the row have in common, as markup.
        plans: bits of each text's plan, if they differ.
        colors: CSS color of the edge of each text.
    """

    title: str
    texts: Sequence[GrowingText]
    plans: Sequence[str] | None = None
    colors: Sequence[str] | None = None


def bits(plan: str) -> str:
    """Shows a plan as small squares."""
    squares = "".join(f"<i class='ft-b{bit}'></i>" if bit in "01" else " " for bit in plan)
    return f"<span class=ft-bits role=img aria-label='plan {escape(plan)}'>{squares}</span>"


def text(content: str) -> str:
    return f"<div class=ft-text>{escape(content)}</div>"


def end_of(growing: GrowingText, shown: str) -> str:
    """Shows the last part of a text (`shown`, as markup), with a cursor while it grows, and any failure."""
    cursor = "" if growing.ended else "<span class=ft-cursor></span>"
    failed = f"<p class=ft-failure>{escape(growing.failure)}</p>" if growing.failure else ""
    return f"<div class=ft-text>{shown}{cursor}</div>{failed}"


def cell(growing: GrowingText, head: str = "", color: str = "") -> str:
    """Shows a text in a box with a colored edge, below a heading given as markup."""
    edge = f" style='--edge: {color}'" if color else ""
    return f"<div class=ft-cell{edge}>{head}{end_of(growing, escape(growing.text))}</div>"


def grid(rows: Sequence[GridRow], seeds: Sequence[int]) -> str:
    head = "".join(f"<div class=ft-column>words {seed}</div>" for seed in seeds)
    found = [f"<div class='ft-row ft-head'><div class=ft-label></div>{head}</div>"]
    for row in rows:
        cells = []
        for place, each in enumerate(row.texts):
            plan = "" if row.plans is None else bits(row.plans[place])
            cells.append(cell(each, plan, "" if row.colors is None else row.colors[place]))
        found.append(f"<div class=ft-row><div class=ft-label>{row.title}</div>{''.join(cells)}</div>")
    return f"<div class=ft-grid style='--columns: {len(seeds)}'>{''.join(found)}</div>"


def plan_title(plan: str, survey: PlanSurvey | None, name: str | None = None) -> str:
    """Shows a plan's bits, its name, and the sources of held-out texts with this plan."""
    found = [bits(plan), f"<code>{escape(plan)}</code>"]
    if name:
        found.append(f"<b>{escape(name)}</b>")
    if survey is not None and plan in survey.counts:
        found.append(f"<small>{_sources(survey, plan)}</small>")
    elif survey is not None and survey.passages:
        found.append("<small>no held-out text</small>")
    return "".join(found)


def plan_color(plan: str, survey: PlanSurvey | None) -> str:
    """The color of the source that most held-out texts with this plan come from; empty if there is none."""
    if survey is None or not survey.sources or plan not in survey.counts:
        return ""
    return _color(survey, survey.source(plan))


def _sources(survey: PlanSurvey, plan: str) -> str:
    counts = survey.counts[plan]
    total = sum(counts.values())
    if not survey.sources:
        return f"{total} held-out text{'s' * (total > 1)}"
    best = survey.source(plan)
    return f"{source_dot(survey, best)}{escape(best)} {counts[best] / total:.0%}"


def source_dot(survey: PlanSurvey, source: str) -> str:
    return f"<span class=ft-dot style='background: {_color(survey, source)}'></span>"


def _color(survey: PlanSurvey, source: str) -> str:
    if source == UNLABELED:
        return "var(--source-none)"
    return f"var(--source-{survey.sources.index(source) % COLORS})"


def difference(one: GrowingText, other: GrowingText, titles: tuple[str, str]) -> str:
    """Shows two texts side by side, and marks where they first differ."""
    first = next(
        (place for place, (a, b) in enumerate(zip(one.text, other.text, strict=False)) if a != b),
        min(len(one.text), len(other.text)),
    )
    same = first == len(one.text) == len(other.text)
    columns = []
    for each, title in zip((one, other), titles, strict=True):
        common, own = each.text[:first], each.text[first:]
        marked = f"<mark>{escape(own[:1])}</mark><span class=ft-own>{escape(own[1:])}</span>" if own else ""
        shown = end_of(each, escape(common) + marked)
        columns.append(f"<div class=ft-cell><div class=ft-label>{title}</div>{shown}</div>")
    ended = one.ended and other.ended
    note = "The two texts are the same." if same else f"The first difference is at character {first + 1}."
    return f"<div class=ft-pair>{''.join(columns)}</div>" + (f"<p class=ft-note>{note}</p>" if ended else "")


def changed_text(whole: GrowingText, before: str, after: str) -> str:
    """Shows a text whose plan changes, with a title for each part."""
    if whole.change is None or whole.change == len(whole.text):
        only = end_of(whole, escape(whole.text))
        return f"<div class='ft-cell ft-one'><div class=ft-label>{before}</div>{only}</div>"
    rest = f"<div class=ft-label>{after}</div>{end_of(whole, escape(whole.text[whole.change :]))}"
    first = text(whole.text[: whole.change])
    return f"<div class='ft-cell ft-one'><div class=ft-label>{before}</div>{first}<hr>{rest}</div>"


def tokens(effects: Sequence[TokenEffect], names: Sequence[str]) -> str:
    """Shows a text whose tokens, on hover or focus, display the effect of the plan and the likely alternatives."""
    found = []
    for effect in effects:
        strength = min(1.0, abs(effect.gain) / 3)
        side = "ft-up" if effect.gain > 0 else "ft-down"
        lists = "".join(
            f"<span class=ft-likely><b>{escape(name)}</b>"
            + "".join(f"<span>{escape(_visible(token))} <em>{chance:.0%}</em></span>" for token, chance in likely)
            + "</span>"
            for name, likely in zip(names, effect.likely, strict=True)
        )
        moved = f"{effect.gain:+.2f} nats from the average over plans"
        found.append(
            f"<span class='ft-token {side}' tabindex=0 style='--strength: {strength:.2f}'>{escape(effect.text)}"
            f"<span class=ft-tip>{moved}<span class=ft-lists>{lists}</span></span></span>"
        )
    return f"<div class='ft-text ft-tokens'>{''.join(found)}</div>"


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def certainty(ones: Sequence[float], dead: Sequence[str | None]) -> str:
    """Shows the probability of a 1 for each bit of a text's plan."""
    rows = []
    for bit, chance in enumerate(ones):
        value, sure = int(chance > 0.5), max(chance, 1 - chance)
        note = f" title='{escape(dead[bit] or '', quote=True)}'" if dead[bit] else ""
        kind = " class=ft-dead" if dead[bit] else ""
        rows.append(
            f"<tr{kind}{note}><th>bit {bit}</th><td><i class='ft-b{value}'></i> {value}</td>"
            f"<td class=ft-bar><span style='width: {chance:.1%}'></span></td><td>{sure:.0%} certain</td></tr>"
        )
    return f"<table class=ft-certainty>{''.join(rows)}</table>"


def gray_rank(half: str) -> int:
    """Returns the index of these bits in Gray order, in which neighbors differ by one bit."""
    rank = value = 0
    for bit in half:
        value ^= int(bit)
        rank = 2 * rank + value
    return rank


def plan_map(survey: PlanSurvey, latent_dim: int, chosen: str) -> str:
    """Draws circles for the plans of held-out texts. The axes are the two halves of the bits in Gray order."""
    half = (latent_dim + 1) // 2
    across, down = 2**half, 2 ** (latent_dim - half)
    cell = 100 / max(across, down)
    width, height = across * cell, down * cell
    most = max((sum(counts.values()) for counts in survey.counts.values()), default=1)
    lines = "".join(f"<path d='M{x * cell:.3f} 0V{height:.3f}' />" for x in range(across + 1)) if across <= 64 else ""
    lines += "".join(f"<path d='M0 {y * cell:.3f}H{width:.3f}' />" for y in range(down + 1)) if down <= 64 else ""
    circles = []
    for plan, counts in sorted(survey.counts.items(), key=lambda item: -sum(item[1].values())):
        total = sum(counts.values())
        x, y = (gray_rank(plan[:half]) + 0.5) * cell, (gray_rank(plan[half:]) + 0.5) * cell
        radius = max(0.45, 0.5 * min(cell, 12) * math.sqrt(total / most) * 0.94)
        label = f"{plan}: {total} of {survey.passages} texts" + "".join(
            f", {source or 'no source'} {count}" for source, count in counts.items() if survey.sources
        )
        kind = " class=ft-chosen" if plan == chosen else ""
        circles.append(
            f"<circle{kind} data-choice='{escape(plan)}' tabindex=0 role=button cx={x:.3f} cy={y:.3f} r={radius:.3f} "
            f"fill='{_color(survey, survey.source(plan))}'><title>{escape(label)}</title></circle>"
        )
    legend = "".join(f"<span>{source_dot(survey, each)}{escape(each)}</span>" for each in survey.sources)
    return (
        f"<svg class=ft-map viewBox='-1 -1 {width + 2:.3f} {height + 2:.3f}' role=group aria-label='Map of plans'>"
        f"<g class=ft-lines>{lines}</g>{''.join(circles)}</svg><div class=ft-legend>{legend}</div>"
    )


def plan_details(survey: PlanSurvey, plan: str) -> str:
    """Shows details of a plan on the map."""
    counts = survey.counts.get(plan)
    head = f"<div class=ft-label>{bits(plan)}<code>{escape(plan)}</code></div>"
    if not counts:
        return f"{head}<p class=ft-note>No held-out text takes this plan.</p>"
    total = sum(counts.values())
    shares = "".join(
        f"<span>{source_dot(survey, source)}{escape(source)} {count}</span>"
        for source, count in counts.items()
        if source
    )
    return (
        f"{head}<p class=ft-note>{total} of {survey.passages} held-out texts take this plan. {shares}</p>"
        f"<p class=ft-note>One of them begins:</p>{text(survey.snippets.get(plan, ''))}"
    )


def lane(plans: Sequence[str], chosen: int, span: int) -> str:
    """Shows the plans of a text, one per `span` tokens, as buttons."""
    cells = "".join(
        f"<button data-choice={place} class='{'ft-chosen' if place == chosen else ''}' "
        f"title='tokens {place * span} to {place * span + span - 1}'>{bits(plan)}</button>"
        for place, plan in enumerate(plans)
    )
    return f"<div class=ft-lane>{cells}</div>"
