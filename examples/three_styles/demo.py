"""
Trains a Free Transformer and its baseline on three unlabeled text sources, evaluates both, and shows that the plan
controls the style of generated text. `make demo`, then open runs/three_styles/report.html.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classifier import StyleClassifier
from rich.console import Console
from styles import STYLES, read_label, write_corpus

from free_transformer.cli.exit_status import as_command
from free_transformer.data import Rows, build_rows
from free_transformer.evaluation import (
    Control,
    Likelihood,
    compare,
    evaluate_likelihood,
    generate_texts,
    measure_control,
    sampled_codes,
    usage_warning,
)
from free_transformer.evaluation.control import contingency
from free_transformer.files import claimed_folder, write_text
from free_transformer.model.plan import codes_to_bits
from free_transformer.model.plan_text import format_plan
from free_transformer.reporting.plots import CURVES, bits, curves, plans_by_label
from free_transformer.reporting.report import Report, likelihood_table, nll_method, usage_table
from free_transformer.reporting.table import Table
from free_transformer.training import Run

RANDOM_PLANS, TEXTS_PER_PLAN = 16, 8
SHOWN_PLANS, SHOWN_TEXTS = 9, 2
EXAMPLES_PER_STYLE = 48
CLASSIFIER_TEXTS = 6000
LIKELIHOOD_TEXTS = 600
LIKELIHOOD_SAMPLES = 16

console = Console()


@dataclass
class HeldOut:
    """Held-out rows of all styles, and the style of each, which only the classifier may use."""

    rows: Rows
    styles: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/three_styles.yaml", help="settings of both runs")
    parser.add_argument("--out", type=Path, default=Path("runs/three_styles"), help="folder of runs and report")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="temperature of the classified texts of all runs"
    )
    parser.add_argument("--sample-temperature", type=float, default=0.7, help="temperature of the texts in the report")
    parser.add_argument("--prior", default="uniform", help="prior of random plans: uniform or aggregate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="changes to the settings, as in training.max_steps=100")
    options = parser.parse_args()
    with claimed_folder(options.out, "demo", ["text", "summary.txt", "report.html"]):
        run_demo(options)


def run_demo(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    corpus = options.out / "text"
    write_corpus(corpus)
    common = [f"data.train={corpus / 'train.jsonl'}", f"data.validation={corpus / 'validation.jsonl'}"]
    common += [f"training.seed={options.seed}", *options.overrides]
    free_run, baseline_run = train_both(options.config, options.out, common)

    torch.manual_seed(options.seed)
    tokenizer = free_run.load_tokenizer()
    free, baseline = free_run.load_model(), baseline_run.load_model()
    held_out = read_rows(corpus / "validation.jsonl", tokenizer, free_run.settings.training.seq_len)
    console.print("measuring the likelihood of held-out text ...")
    part = held_out.rows.sample(LIKELIHOOD_TEXTS)
    likelihoods = [evaluate_likelihood(model, part.in_order(32), LIKELIHOOD_SAMPLES) for model in (free, baseline)]
    console.print("reading the plans of held-out text ...")
    codes = sampled_codes(free, held_out.rows.in_order(64))[:, 0]
    console.print("generating texts under plans ...")
    classify, accuracy = train_classifier(corpus / "train.jsonl", tokenizer, held_out)
    tokens = torch.from_numpy(held_out.rows.tokens).long()
    control = measure_control(
        *(free, baseline, tokenizer, classify, tokens, held_out.styles, RANDOM_PLANS, TEXTS_PER_PLAN),
        examples_per_label=EXAMPLES_PER_STYLE,
        temperature=options.temperature,
        prior=options.prior,
    )
    shown = shown_texts(free, tokenizer, control.plans, options)

    lines = key_lines(*likelihoods, control, accuracy, part.bytes_per_token)
    lines.append(f"time: {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores")
    write_text(options.out / "summary.txt", "\n".join(lines) + "\n")
    write_report(
        *(options, free_run, baseline_run, likelihoods, codes, held_out, control, shown, lines, part.bytes_per_token)
    )
    console.print("\n" + "\n".join(lines), highlight=False)
    console.print(f"\nopen {options.out / 'report.html'}", highlight=False, soft_wrap=True)


def train_both(config: str, out: Path, overrides: list[str]) -> tuple[Run, Run]:
    """Trains free and baseline at the same time, each on half of the cores. Only `model.kind` differs."""
    cores = os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // 2))}
    processes = {}
    for kind in ("free", "baseline"):
        run = Run(out / kind)
        command = [sys.executable, "-m", "free_transformer", "train", config]
        command += [f"run_dir={run.path}", f"model.kind={kind}", *overrides]
        run.path.mkdir(parents=True, exist_ok=True)
        log = None if kind == "free" else (run.path / "log.txt").open("w")
        processes[kind] = (run, subprocess.Popen(command, env=environment, stderr=log, stdout=log))
        if cores == 1:
            processes[kind][1].wait()
    console.print(f"training free (below) and baseline (log in {out / 'baseline' / 'log.txt'})")
    for kind, (_, process) in processes.items():
        if process.wait() != 0:
            where = "above" if kind == "free" else out / kind / "log.txt"
            raise SystemExit(f"training {kind} failed: see {where}")
    return processes["free"][0], processes["baseline"][0]


def read_rows(path: Path, tokenizer: Any, seq_len: int, labels: Sequence[str] = STYLES) -> HeldOut:
    """Only whole windows of one document each, so that every row has one style."""
    parts = [build_rows(read_label(path, label), tokenizer, seq_len) for label in labels]
    whole = [(part.positions == np.arange(seq_len)).all(1) for part in parts]
    tokens = np.concatenate([part.tokens[full] for part, full in zip(parts, whole, strict=True)])
    positions = np.concatenate([part.positions[full] for part, full in zip(parts, whole, strict=True)])
    styles = np.concatenate([np.full(full.sum(), index) for index, full in enumerate(whole)])
    rows = Rows(tokens, positions, text_bytes=0)
    rows.text_bytes = sum(len(text.encode()) for text in decode(torch.from_numpy(tokens), tokenizer))
    return HeldOut(rows, styles)


def train_classifier(path: Path, tokenizer: Any, held_out: HeldOut) -> tuple[StyleClassifier, float]:
    """A classifier trained on training text, and its accuracy on held-out text."""
    training = read_rows(path, tokenizer, held_out.rows.tokens.shape[1])
    chosen = np.random.default_rng(0).permutation(len(training.rows))[:CLASSIFIER_TEXTS]
    classify = StyleClassifier(
        decode(torch.from_numpy(training.rows.tokens[chosen]), tokenizer), training.styles[chosen]
    )
    return classify, classify.accuracy(decode(torch.from_numpy(held_out.rows.tokens), tokenizer), held_out.styles)


def decode(tokens: torch.Tensor, tokenizer: Any) -> list[str]:
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def shown_texts(free: Any, tokenizer: Any, plans: torch.Tensor, options: argparse.Namespace) -> list[list[str]]:
    """Texts under the first plans for the report, at its temperature."""
    under = plans[:SHOWN_PLANS].repeat_interleave(SHOWN_TEXTS, 0)
    length = free.config.max_position_embeddings
    texts = generate_texts(free, tokenizer, len(under), length, options.sample_temperature, plan=under)
    return [texts[start : start + SHOWN_TEXTS] for start in range(0, len(texts), SHOWN_TEXTS)]


def key_lines(
    free: Likelihood,
    baseline: Likelihood,
    control: Control,
    accuracy: float,
    bytes_per_token: float,
    label: str = "style",
) -> list[str]:
    """The main results, for the terminal and the top of the report."""
    result = compare(free, baseline)
    share, error = control.agreement
    assert control.agreement_baseline is not None
    lines = [
        f"NLL: {result.nll / bytes_per_token:.4f} nats per byte ({nll_method(free)}), baseline "
        f"{result.baseline_nll / bytes_per_token:.4f}: {result.difference / bytes_per_token:+.4f} ± "
        f"{result.standard_error / bytes_per_token:.4f}",
        f"plan: {free.kl:.2f} bits used, gap prior - reconstruction {free.gap:.4f} ± "
        f"{free.standard_errors['gap']:.4f} nats per token",
        f"mutual information of plan and {label}: {control.mutual_information:.3f} of "
        f"{control.label_entropy:.3f} bits ({control.mutual_information_shuffled:.3f} by chance)",
        f"agreement within a random plan: {share:.3f} ± {error:.3f}, shuffled plans "
        f"{control.agreement_shuffled[0]:.3f}, baseline {control.agreement_baseline[0]:.3f}",
        f"transfer from an example: {control.transfer[0]:.3f} ± {control.transfer[1]:.3f}, shuffled plans "
        f"{control.transfer_shuffled[0]:.3f}",
        f"accuracy of the classifier on held-out text: {accuracy:.3f}",
    ]
    warning = usage_warning(free)
    return [*lines, f"warning: {warning}"] if warning else lines


def write_report(
    options: argparse.Namespace,
    free_run: Run,
    baseline_run: Run,
    likelihoods: list[Likelihood],
    codes: np.ndarray,
    held_out: HeldOut,
    control: Control,
    shown: list[list[str]],
    lines: list[str],
    bytes_per_token: float,
) -> None:
    free, baseline = likelihoods
    report = Report("Three styles, one plan")
    report.paragraph(
        "A byte-level Free Transformer was trained on an unlabeled mixture of Shakespeare's plays, State of the "
        "Union addresses and Python source. For each window of text it samples one plan of "
        f"{free_run.settings.model.latent_dim} bits. The text has no labels of the three styles."
    )
    report.table(Table(["summary", ""], [line.split(": ", 1) for line in lines]))

    report.heading("One plan, one style: texts from an empty prompt")
    report.paragraph(
        f"Each box is one random plan and {SHOWN_TEXTS} texts generated under it (temperature "
        f"{options.sample_temperature}). The title counts the styles of {TEXTS_PER_PLAN} other texts of that "
        f"plan, by the classifier (temperature {options.temperature})."
    )
    report.samples(
        [
            (f"plan {format_plan(plan)}: {count_styles(verdicts)}", "\n\n———\n\n".join(texts))
            for plan, texts, verdicts in zip(control.plans, shown, control.verdicts, strict=False)
        ]
    )
    add_control(report, control)
    add_learned(report, codes, held_out.styles, free, free_run.settings.model.latent_dim, options.out / "plans.png")

    report.heading("Likelihood of held-out text")
    report.paragraph("Free Transformer:")
    report.table(likelihood_table(free, bytes_per_token))
    report.paragraph("Baseline (the same Llama without a plan, trained on the same batches):")
    report.table(likelihood_table(baseline, bytes_per_token))
    report.heading("Curves")
    metrics = {"free": free_run.read_metrics(), "baseline": baseline_run.read_metrics()}
    report.figure(curves(metrics), CURVES, [(kind, index) for index, kind in enumerate(metrics)])
    report.heading("Command and settings")
    command = "make demo   # python examples/three_styles/demo.py --seed " + str(options.seed)
    report.samples([("command", command), ("settings", free_run.settings.to_yaml())])
    report.write(options.out / "report.html")


def add_control(report: Report, control: Control) -> None:
    report.heading("Control")
    wanted, seen_styles = control.transferred.T
    by_style = [float((seen_styles == style)[wanted == style].mean()) for style in range(len(STYLES))]
    report.table(
        Table(
            ["", "share", "meaning"],
            [
                ["agreement within a plan", *shown_share(control.agreement, AGREEMENT)],
                [
                    "… under shuffled plans",
                    *shown_share(control.agreement_shuffled, "the same, with another plan for each text"),
                ],
                ["baseline", *shown_share(control.agreement_baseline, GROUPS)],
                ["transfer", *shown_share(control.transfer, TRANSFER)],
                *[[f"… {style}", f"{share:.3f}", ""] for style, share in zip(STYLES, by_style, strict=True)],
                [
                    "… under shuffled plans",
                    *shown_share(control.transfer_shuffled, "the same, with plans of other examples"),
                ],
            ],
        )
    )


def add_learned(
    report: Report, codes: np.ndarray, styles: np.ndarray, likelihood: Likelihood, latent_dim: int, plot: Path
) -> None:
    report.heading("What the plan learned")
    seen, table = contingency(codes, styles)
    figure = plans_by_label(table, STYLES)
    figure.savefig(plot, dpi=120)
    report.figure(figure, "plan × style: share of each style among the texts of each plan")
    order = np.argsort(-table.sum(1))[:12]
    report.table(
        Table(
            ["the 12 most common plans", *STYLES],
            [[format_plan(codes_to_bits(torch.tensor(seen[i]), latent_dim)), *map(str, table[i])] for i in order],
        )
    )
    assert likelihood.usage is not None
    report.figure(bits(likelihood.usage.bits_per_position), "bits used at each position of the plan")
    report.table(usage_table(likelihood))


AGREEMENT = f"{RANDOM_PLANS} plans from the prior, {TEXTS_PER_PLAN} texts each: share in the plan's most common style"
GROUPS = f"its texts in groups of {TEXTS_PER_PLAN}: agreement without a plan"
TRANSFER = f"plans read from {EXAMPLES_PER_STYLE} held-out examples of each style: share of texts in that style"


def shown_share(share: tuple[float, float] | None, meaning: str) -> list[str]:
    return ["-" if share is None else f"{share[0]:.3f} ± {share[1]:.3f}", meaning]


def count_styles(verdicts: np.ndarray) -> str:
    counts = np.bincount(verdicts, minlength=len(STYLES))
    return ", ".join(f"{count} {style}" for count, style in zip(counts, STYLES, strict=True) if count)


if __name__ == "__main__":
    with as_command():
        main()
