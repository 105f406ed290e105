"""
Fine-tunes SmolLM2-135M with a plan on three unlabeled text sources (or news of five topics), and without a plan for
comparison.

`make demo-pretrained`, then open runs/pretrained/styles/report.html. Only the evaluation classifier uses labels.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from news import news, train_classifier, write_corpus, write_smollm2
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "three_styles"))

import styles
from demo import decode, key_lines, read_rows, shown_share, train_both

from free_transformer.cli.exit_status import as_command
from free_transformer.evaluation import (
    Control,
    Likelihood,
    evaluate_likelihood,
    generate_texts,
    measure_control,
    sampled_codes,
)
from free_transformer.evaluation.control import contingency
from free_transformer.files import claimed_folder, write_text
from free_transformer.model.plan_text import format_plan
from free_transformer.reporting.plots import CURVES, curves, plans_by_label
from free_transformer.reporting.report import Report, likelihood_table, usage_table
from free_transformer.reporting.table import Table
from free_transformer.training import Run

RANDOM_PLANS, TEXTS_PER_PLAN, EXAMPLES_PER_LABEL = 16, 8, 32
SHOWN_PER_LABEL = 2
LIKELIHOOD_TEXTS, LIKELIHOOD_SAMPLES = 160, 8
CHARACTERS_A_TOKEN = 4
KINDS = {"styles": "style", "news": "topic"}

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--llama", type=Path, help="folder of a pretrained model, default SmolLM2-135M from its package"
    )
    parser.add_argument("--corpus", choices=("styles", "news"), default="styles", help="training text")
    parser.add_argument("--config", default="configs/pretrained.yaml", help="settings of both runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pretrained"), help="folder of the model, runs and report"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of the classified texts")
    parser.add_argument("--sample-temperature", type=float, default=0.7, help="temperature of the texts in the report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all-layers", action="store_true", help="train the first half as well")
    parser.add_argument("overrides", nargs="*", help="changes to the settings, as in training.max_steps=50")
    options = parser.parse_args()
    with claimed_folder(options.out, "demo", ["smollm2-135m", "styles", "news"]):
        run_demo(options)


def run_demo(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    llama, out = options.llama or options.out / "smollm2-135m", options.out / options.corpus
    if not llama.is_dir():
        console.print("unpacking SmolLM2 ...")
        write_smollm2(llama)
    corpus = out / "text"
    labels = write_text_of(options.corpus, corpus)
    common = [f"data.train={corpus / 'train.jsonl'}", f"data.validation={corpus / 'validation.jsonl'}"]
    common += [f"model.pretrained={llama}", f"training.freeze_first_half={not options.all_layers}"]
    runs = train_both(options.config, out, [*common, f"training.seed={options.seed}", *options.overrides])
    trained = time.perf_counter()

    torch.manual_seed(options.seed)
    tokenizer = runs[0].load_tokenizer()
    free, baseline = (run.load_model() for run in runs)
    seq_len = runs[0].settings.training.seq_len
    held_out = read_rows(corpus / "validation.jsonl", tokenizer, seq_len, labels)
    console.print("measuring the likelihood of held-out text ...")
    part = held_out.rows.sample(LIKELIHOOD_TEXTS)
    likelihoods = [evaluate_likelihood(model, part.in_order(16), LIKELIHOOD_SAMPLES) for model in (free, baseline)]
    console.print("generating texts under plans ...")
    classify = train_classifier(corpus / "train.jsonl", labels, CHARACTERS_A_TOKEN * seq_len)
    tokens = torch.from_numpy(held_out.rows.tokens).long()
    accuracy = float((classify(decode(tokens, tokenizer)) == held_out.styles).mean())
    control = measure_control(
        *(free, baseline, tokenizer, classify, tokens, held_out.styles, RANDOM_PLANS, TEXTS_PER_PLAN),
        examples_per_label=EXAMPLES_PER_LABEL,
        temperature=options.temperature,
    )
    runs[0].write_control(control)
    lines = key_lines(*likelihoods, control, accuracy, part.bytes_per_token, KINDS[options.corpus])
    lines.append(f"NLL in nats per token: {likelihoods[0].nll:.4f}, fine-tuned without a plan {likelihoods[1].nll:.4f}")
    lines.append(
        f"time: {(trained - started) / 60:.1f} minutes to train both, "
        f"{(time.perf_counter() - started) / 60:.1f} minutes in total, on {os.cpu_count()} cores"
    )
    write_text(out / "summary.txt", "\n".join(lines) + "\n")
    codes = sampled_codes(free, held_out.rows.in_order(16))[:, 0]
    samples = samples_by_label(free, tokenizer, tokens, held_out.styles, labels, options.sample_temperature)
    write_report(out, runs, likelihoods, control, (codes, held_out.styles), labels, samples, lines, part)
    console.print("\n" + "\n".join(lines), highlight=False)
    console.print(f"\nopen {out / 'report.html'}", highlight=False, soft_wrap=True)


def write_text_of(corpus: str, folder: Path) -> list[str]:
    """Saves train.jsonl and validation.jsonl, and returns the labels, which only the classifier uses."""
    if corpus == "styles":
        styles.write_corpus(folder)
        return list(styles.STYLES)
    documents = news()
    write_corpus(documents, folder)
    return list(documents)


def samples_by_label(
    free: Any, tokenizer: Any, tokens: torch.Tensor, kinds: np.ndarray, labels: list[str], temperature: float
) -> list[tuple[str, str]]:
    """Texts generated under the plan of one held-out text of each label, without a prompt."""
    boxes = []
    for number, label in enumerate(labels):
        example = tokens[int(np.flatnonzero(kinds == number)[0])][None]
        plan = free.infer_plan(example) > 0
        under = plan.expand(SHOWN_PER_LABEL, -1, -1)
        texts = generate_texts(free, tokenizer, SHOWN_PER_LABEL, tokens.shape[1], temperature, plan=under)
        title = f"plan {format_plan(plan[0])}, read from {label}, “{decode(example, tokenizer)[0][:60]}…”"
        boxes.append((title, "\n\n———\n\n".join(texts)))
    return boxes


def write_report(
    out: Path,
    runs: tuple[Run, Run],
    likelihoods: list[Likelihood],
    control: Control,
    plans: tuple[np.ndarray, np.ndarray],
    labels: list[str],
    samples: list[tuple[str, str]],
    lines: list[str],
    part: Any,
) -> None:
    report = Report("A pretrained model with a plan")
    llama = Path(runs[0].settings.model.pretrained or "").name
    report.paragraph(
        f"{llama} was fine-tuned on unlabeled text, once with a plan of "
        f"{runs[0].settings.model.latent_dim} bits per window of text and once without, on the same batches."
    )
    report.table(Table(["summary", ""], [line.split(": ", 1) for line in lines]))
    report.heading("Texts generated under the plan of an example")
    report.samples(samples)
    report.heading("Control")
    wanted, seen = control.transferred.T
    by_label = [float((seen == each)[wanted == each].mean()) for each in range(len(labels))]
    report.table(
        Table(
            ["", "share", "meaning"],
            [
                ["agreement within a plan", *shown_share(control.agreement, f"{RANDOM_PLANS} random plans")],
                ["… under shuffled plans", *shown_share(control.agreement_shuffled, "another plan for each text")],
                ["without a plan", *shown_share(control.agreement_baseline, "fine-tuning without a plan, in groups")],
                ["transfer", *shown_share(control.transfer, "texts under an example's plan that have its label")],
                *[[f"… {label}", f"{share:.3f}", ""] for label, share in zip(labels, by_label, strict=True)],
                ["… under shuffled plans", *shown_share(control.transfer_shuffled, "plans of other examples")],
            ],
        )
    )
    report.heading("What the plan learned")
    report.figure(plans_by_label(contingency(*plans)[1], labels), "share of each label among the texts of each plan")
    report.table(usage_table(likelihoods[0]))
    report.heading("Likelihood of held-out text")
    for title, likelihood in zip(("With a plan:", "Without a plan:"), likelihoods, strict=True):
        report.paragraph(title)
        report.table(likelihood_table(likelihood, part.bytes_per_token))
    report.heading("Curves")
    metrics = {"free": runs[0].read_metrics(), "baseline": runs[1].read_metrics()}
    report.figure(curves(metrics), CURVES, [(kind, index) for index, kind in enumerate(metrics)])
    report.heading("Command and settings")
    report.samples([("command", "make demo-pretrained"), ("settings", runs[0].settings.to_yaml())])
    report.write(out / "report.html")


if __name__ == "__main__":
    with as_command():
        main()
