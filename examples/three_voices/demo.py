"""
The main job, end to end: train a Free Transformer and its baseline on three voices that nobody labels, judge both
honestly, and show that the plan chooses what is written. `make demo`, then open runs/three_voices/report.html.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import Judge
from rich.console import Console
from voices import VOICES, read_voice, write_corpus

from free_transformer.data import Rows, build_rows
from free_transformer.evaluation import (
    Likelihood,
    agreement,
    compare,
    evaluate_likelihood,
    mutual_information,
    share_in_class,
    usage_warning,
)
from free_transformer.evaluation.control import contingency
from free_transformer.evaluation.plots import bits, curves, plans_by_label
from free_transformer.evaluation.report import Report, likelihood_table, nll_method, usage_table
from free_transformer.files import write_text
from free_transformer.plan import bits_to_codes, codes_to_bits
from free_transformer.plan_text import format_plan
from free_transformer.training import Run

RANDOM_PLANS, TEXTS_PER_PLAN = 16, 8
SHOWN_PLANS, SHOWN_TEXTS = 9, 2
EXAMPLES_PER_VOICE = 48
JUDGE_TEXTS = 6000
LIKELIHOOD_TEXTS = 600
LIKELIHOOD_SAMPLES = 16

console = Console()


@dataclass
class HeldOut:
    """Held-out rows of all voices and the voice of each, which only the judge may know."""

    rows: Rows
    voices: np.ndarray


@dataclass
class Control:
    """Agreement within a plan, and transfer from an example, as (share, standard error); the texts that show it."""

    agreement: tuple[float, float]
    baseline_agreement: tuple[float, float]
    transfer: tuple[float, float]
    transfer_by_voice: list[float]
    plans: torch.Tensor
    shown: list[list[str]]
    verdicts: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/three_voices.yaml", help="settings of both runs")
    parser.add_argument("--out", type=Path, default=Path("runs/three_voices"), help="folder of runs and report")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the texts that are judged, all runs alike")
    parser.add_argument("--sample-temperature", type=float, default=0.7, help="of the texts that are shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="changes to the settings, as in training.max_steps=100")
    options = parser.parse_args()

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
    codes = sampled_codes(free, held_out.rows)
    console.print("writing under plans ...")
    judge, accuracy = train_judge(corpus / "train.jsonl", tokenizer, held_out)
    control = measure_control(free, baseline, tokenizer, judge, held_out, options)

    lines = key_lines(*likelihoods, codes, held_out.voices, control, accuracy, part.bytes_per_token)
    lines.append(f"time: {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores")
    write_text(options.out / "summary.txt", "\n".join(lines) + "\n")
    write_report(options, free_run, baseline_run, likelihoods, codes, held_out, control, lines, part.bytes_per_token)
    console.print("\n" + "\n".join(lines), highlight=False)
    console.print(f"\nopen {options.out / 'report.html'}", highlight=False)


def train_both(config: str, out: Path, overrides: list[str]) -> tuple[Run, Run]:
    """Free and baseline side by side, each on half of the cores; the same settings but for `model.kind`."""
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
    console.print(f"training free (below) and baseline (log in {out / 'baseline' / 'log.txt'}) side by side")
    for kind, (_, process) in processes.items():
        if process.wait() != 0:
            where = "above" if kind == "free" else out / kind / "log.txt"
            raise SystemExit(f"training {kind} failed: see {where}")
    return processes["free"][0], processes["baseline"][0]


def read_rows(path: Path, tokenizer: Any, seq_len: int) -> HeldOut:
    """Whole windows only, one document each, so that every row has one voice."""
    parts = [build_rows(read_voice(path, voice), tokenizer, seq_len) for voice in VOICES]
    whole = [(part.positions == np.arange(seq_len)).all(1) for part in parts]
    tokens = np.concatenate([part.tokens[full] for part, full in zip(parts, whole, strict=True)])
    positions = np.concatenate([part.positions[full] for part, full in zip(parts, whole, strict=True)])
    voices = np.concatenate([np.full(full.sum(), index) for index, full in enumerate(whole)])
    rows = Rows(tokens, positions, text_bytes=0)
    rows.text_bytes = sum(len(text.encode()) for text in decode(torch.from_numpy(tokens), tokenizer))
    return HeldOut(rows, voices)


def train_judge(path: Path, tokenizer: Any, held_out: HeldOut) -> tuple[Judge, float]:
    """The judge, from training text, and its accuracy on held-out text."""
    training = read_rows(path, tokenizer, held_out.rows.tokens.shape[1])
    chosen = np.random.default_rng(0).permutation(len(training.rows))[:JUDGE_TEXTS]
    judge = Judge(decode(torch.from_numpy(training.rows.tokens[chosen]), tokenizer), training.voices[chosen])
    return judge, judge.accuracy(decode(torch.from_numpy(held_out.rows.tokens), tokenizer), held_out.voices)


def decode(tokens: torch.Tensor, tokenizer: Any) -> list[str]:
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def sampled_codes(model: Any, rows: Rows) -> np.ndarray:
    """The code of one plan drawn from each row's posterior."""
    codes = [bits_to_codes(model.plan_mapper(model.infer_plan(b["input_ids"])))[:, 0] for b in rows.in_order(64)]
    return torch.cat(codes).numpy()


def measure_control(
    free: Any, baseline: Any, tokenizer: Any, judge: Judge, held_out: HeldOut, options: argparse.Namespace
) -> Control:
    """Texts from an empty prompt under random plans and under plans of examples, and what the judge says of them."""
    length = held_out.rows.tokens.shape[1]

    def write(model: Any, count: int, temperature: float = options.temperature, **plan: Any) -> list[str]:
        prompt = torch.full((count, 1), tokenizer.bos_token_id)
        settings = {"max_new_tokens": length - 1, "do_sample": True, "temperature": temperature, "top_k": 0}
        return decode(model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings, **plan), tokenizer)

    plans = free.sample_plan(RANDOM_PLANS, 1)
    texts = write(free, RANDOM_PLANS * TEXTS_PER_PLAN, plan=plans.repeat_interleave(TEXTS_PER_PLAN, 0))
    verdicts = judge(texts).reshape(RANDOM_PLANS, TEXTS_PER_PLAN)
    shown = plans[:SHOWN_PLANS].repeat_interleave(SHOWN_TEXTS, 0)
    shown_texts = write(free, len(shown), options.sample_temperature, plan=shown)
    baseline_verdicts = judge(write(baseline, RANDOM_PLANS * TEXTS_PER_PLAN)).reshape(verdicts.shape)

    rng = np.random.default_rng(0)
    voices = range(len(VOICES))
    examples = np.concatenate(
        [rng.permutation(np.flatnonzero(held_out.voices == voice))[:EXAMPLES_PER_VOICE] for voice in voices]
    )
    likeliest = free.infer_plan(held_out.rows.take(examples)["input_ids"]) > 0
    wanted = held_out.voices[examples]
    written = judge(write(free, len(examples), plan=likeliest))
    return Control(
        agreement=agreement(verdicts),
        baseline_agreement=agreement(baseline_verdicts),
        transfer=share_in_class(written, wanted),
        transfer_by_voice=[float((written == wanted)[wanted == voice].mean()) for voice in voices],
        plans=plans,
        shown=[shown_texts[start : start + SHOWN_TEXTS] for start in range(0, len(shown_texts), SHOWN_TEXTS)],
        verdicts=verdicts,
    )


def key_lines(
    free: Likelihood,
    baseline: Likelihood,
    codes: np.ndarray,
    voices: np.ndarray,
    control: Control,
    accuracy: float,
    bytes_per_token: float,
) -> list[str]:
    """What a person should know, on the terminal and on top of the report."""
    result = compare(free, baseline)
    by_chance = mutual_information(codes, np.random.default_rng(0).permutation(voices))
    entropy = -sum(p * np.log2(p) for p in np.bincount(voices) / len(voices))
    share, error = control.agreement
    lines = [
        f"NLL: {result.nll / bytes_per_token:.4f} nats a byte ({nll_method(free)}), baseline "
        f"{result.baseline_nll / bytes_per_token:.4f}: {result.difference / bytes_per_token:+.4f} ± "
        f"{result.standard_error / bytes_per_token:.4f}",
        f"plan: {free.kl:.2f} bits used, gap prior - reconstruction {free.gap:.4f} ± "
        f"{free.standard_errors['gap']:.4f} nats a token",
        f"mutual information of plan and voice: {mutual_information(codes, voices):.3f} of {entropy:.3f} bits "
        f"({by_chance:.3f} by chance)",
        f"agreement within a random plan: {share:.3f} ± {error:.3f}, baseline {control.baseline_agreement[0]:.3f}",
        f"transfer from an example: {control.transfer[0]:.3f} ± {control.transfer[1]:.3f}",
        f"accuracy of the judge on held-out text: {accuracy:.3f}",
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
    lines: list[str],
    bytes_per_token: float,
) -> None:
    free, baseline = likelihoods
    report = Report("Three voices, one plan")
    report.paragraph(
        "A byte-level Free Transformer was trained on an unlabelled mixture of Shakespeare's plays, State of the "
        "Union addresses and Python source. Before it writes a window of text it draws one plan of "
        f"{free_run.settings.model.latent_dim} bits. Nothing told it that there are three voices."
    )
    report.table(["in short", ""], [line.split(": ", 1) for line in lines])

    report.heading("One plan, one voice: texts written from nothing")
    report.paragraph(
        f"Each box is one random plan and {SHOWN_TEXTS} texts written under it (temperature "
        f"{options.sample_temperature}). The title counts what the judge took {TEXTS_PER_PLAN} other texts of that "
        f"plan for (temperature {options.temperature})."
    )
    report.samples(
        [
            (f"plan {format_plan(plan)}: {count_voices(verdicts)}", "\n\n———\n\n".join(texts))
            for plan, texts, verdicts in zip(control.plans, control.shown, control.verdicts, strict=False)
        ]
    )
    report.heading("Control")
    report.table(
        ["", "share", "what it is"],
        [
            ["agreement within a plan", f"{control.agreement[0]:.3f} ± {control.agreement[1]:.3f}", AGREEMENT],
            ["the baseline's", f"{control.baseline_agreement[0]:.3f} ± {control.baseline_agreement[1]:.3f}", GROUPS],
            ["transfer", f"{control.transfer[0]:.3f} ± {control.transfer[1]:.3f}", TRANSFER],
            *[[f"… {voice}", f"{s:.3f}", ""] for voice, s in zip(VOICES, control.transfer_by_voice, strict=True)],
        ],
    )
    report.heading("What the plan learned")
    seen, table = contingency(codes, held_out.voices)
    figure = plans_by_label(table, VOICES)
    figure.savefig(options.out / "plans.png", dpi=120)
    report.figure(figure, "plan × voice: share of each voice among the texts of each plan")
    order = np.argsort(-table.sum(1))[:12]
    latent_dim = free_run.settings.model.latent_dim
    report.table(
        ["the 12 commonest plans", *VOICES],
        [[format_plan(codes_to_bits(torch.tensor(seen[i]), latent_dim)), *map(str, table[i])] for i in order],
    )
    assert free.usage is not None
    report.figure(bits(free.usage.bits_per_position), "bits that each position of the plan carries")
    report.table(*usage_table(free))

    report.heading("Likelihood of held-out text")
    report.paragraph("Free Transformer:")
    report.table(*likelihood_table(free, bytes_per_token))
    report.paragraph("Baseline, the same Llama without a plan, trained by the same code on the same batches:")
    report.table(*likelihood_table(baseline, bytes_per_token))
    report.heading("Curves")
    metrics = {"free": free_run.read_metrics(), "baseline": baseline_run.read_metrics()}
    report.figure(curves(metrics), "by step; reconstruction is under the posterior and not to be compared")
    report.heading("How this was made")
    command = "make demo   # python examples/three_voices/demo.py --seed " + str(options.seed)
    report.samples([("command", command), ("settings", free_run.settings.to_yaml())])
    report.write(options.out / "report.html")


AGREEMENT = (
    f"{RANDOM_PLANS} plans from the uniform prior, {TEXTS_PER_PLAN} texts each: share in the plan's commonest voice"
)
GROUPS = f"its texts in groups of {TEXTS_PER_PLAN}: what agreement comes to without a plan"
TRANSFER = f"plans read from {EXAMPLES_PER_VOICE} held-out examples of each voice: share that comes out in that voice"


def count_voices(verdicts: np.ndarray) -> str:
    counts = np.bincount(verdicts, minlength=len(VOICES))
    return ", ".join(f"{count} {voice}" for count, voice in zip(counts, VOICES, strict=True) if count)


if __name__ == "__main__":
    main()
