"""The sections of a report that show what the plans of a run do, from `plan_examples.json`."""

import re
import shlex

from free_transformer.reporting.parts import Flip, Flips, Heatmap, PlanCard, PlanCards
from free_transformer.reporting.report import Report
from free_transformer.runs.lines import JsonObject
from free_transformer.runs.run import Run

LIVE_ONLY = " Bits that are not live are faint: they have almost no effect."


def add_plan_examples(report: Report, run: Run) -> None:
    """Adds one prompt under four plans, plans by source and flipped bits, or the command that measures them."""
    examples = run.read_results(run.examples_file)
    if examples is None or not run.is_current(run.examples_file, examples):
        _say_how(report, run, missing=examples is None)
        return
    _add_texts(report, examples)
    if examples["sources"]:
        _add_sources(report, examples["sources"])
    _add_bits(report, examples)


def _say_how(report: Report, run: Run, missing: bool) -> None:
    report.heading("What the plans do")
    command = f"free-transformer evaluate {shlex.quote(str(run.path))}"
    if not run.has_ended:
        report.paragraph("Texts under several plans and the effect of each bit are measured once the run has ended.")
    elif missing:
        report.command("Texts under several plans and the effect of each bit are not measured yet:", command)
    else:
        report.command("Texts under plans were measured on an earlier model. To measure the current one:", command)


def _add_texts(report: Report, examples: JsonObject) -> None:
    prompt, texts = examples["prompt"], examples["texts"]
    report.heading("One prompt under four plans")
    start = f"All texts begin with “{prompt}”" if prompt else "All texts start from an empty prompt"
    report.paragraph(
        f"{start} and are sampled with the same random numbers (temperature {examples['temperature']:g}), so they "
        f"differ only in their plans.{LIVE_ONLY}"
    )
    cards = [PlanCard(each["plan"], _note(each["share"]), each["text"]) for each in texts]
    report.add(PlanCards(cards, prompt, examples["live"]))


def _note(share: float | None) -> str:
    return "sampled from the prior" if share is None else f"as {share:.0%} of held-out texts"


def _add_sources(report: Report, sources: JsonObject) -> None:
    report.heading("Plans by source")
    report.paragraph(
        "The labels are not used in training. If the plan encodes the source, each row has its largest shares in "
        "different columns."
    )
    rows = list(zip(sources["labels"], sources["shares"], strict=True))
    caption = (
        f"Share of the texts of each source that have each plan. These are the most likely plans of "
        f"{min(sources['texts'])} to {max(sources['texts'])} held-out texts per source. Bits that are not live are "
        "shown as ·."
    )
    report.add(Heatmap(sources["plans"], rows, caption))


def _add_bits(report: Report, examples: JsonObject) -> None:
    base = examples["texts"][0]
    shown = [bit for bit in examples["bits"] if bit["text"] is not None]
    largest = max((bit["effect"] for bit in shown), default=0.0) or 1.0
    flips = []
    for each in shown:
        error = each["standard_error"]
        effect = f"{each['effect']:.4f}" + ("" if error is None else f" ± {error:.4f}") + " nats per token"
        share = max(0.0, min(1.0, each["effect"] / largest))
        same, changed = split_at_change(base["text"], each["text"])
        flips.append(Flip(_flipped(base["plan"], each["bit"]), each["bit"], effect, share, same, changed))
    report.heading("What each bit changes")
    report.paragraph(
        "For each bit: how much flipping it changes the prediction of a token, and the first text above generated with "
        "this bit flipped and the same random numbers. Colored text differs from the first text."
    )
    live = examples["live"]
    known = [each for each in flips if each.bit in live] or flips
    report.add(Flips(live, base["plan"], base["text"], known))
    if rest := [each for each in flips if each not in known]:
        with report.folded(f"{len(rest)} bit{'s that are' if len(rest) > 1 else ' that is'} not live"):
            report.add(Flips(live, base["plan"], "", rest))


def _flipped(plan: str, bit: int) -> str:
    """Flips a bit in a plan given as text; with several plans, in each of them."""

    def flip(match: "re.Match[str]") -> str:
        code = match[0]
        return f"{code[:bit]}{1 - int(code[bit])}{code[bit + 1 :]}" if bit < len(code) else code

    return re.sub(r"[01]+", flip, plan) if "(" not in plan else plan


def split_at_change(before: str, after: str) -> tuple[str, str]:
    """Splits `after` at the first word that differs from `before`. The second part is empty for equal texts."""
    if before == after:
        return after, ""
    length = next(
        (index for index, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(after.rfind(space, 0, length) + 1 for space in " \n")
    return after[:start], after[start:]
