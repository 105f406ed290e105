"""
Does the sampled gradient of the plan train as well as the exact one? Letters and three styles, several seeds each.

One process per core. Every run is a folder under --out, and existing runs are not repeated, so the script can be
interrupted. The table of docs/plan-cost.md: make bench-plan-training
"""

import argparse
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "three_styles"))

import torch
from demo import read_rows, sampled_codes
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from styles import write_corpus

from free_transformer.evaluation import evaluate_likelihood, mutual_information
from free_transformer.training import Run, load_settings, train
from free_transformer.training.optimizers import LARGE_TABLE

CONFIGS = Path(__file__).parent.parent / "configs"
EVALUATED_ROWS = 512
METHODS = ("exact:adamw", "sampled:adamw", "sampled:sparse_adam")
# The paper's plan per token, at one free bit, and the demo's plan per window, on smaller models.
LETTERS = [
    *("model.plan_span=1", "model.free_bits=1.0", "training.max_steps=300", "training.eval_every=0"),
    *("training.save_every=0", "logging.sample_every=0", "logging.tensorboard=false"),
    *("model.min_bits=0", "model.aggregate_weight=0", "optimizer.name=adamw", "optimizer.min_lr_ratio=0.1"),
]
STYLES = [
    *("model.hidden_dim=64", "training.seq_len=128", "training.max_steps=400", "training.eval_every=0"),
    *("training.save_every=0", "training.precision=fp32", "logging.sample_every=0", "logging.tensorboard=false"),
]


@dataclass
class Trial:
    task: str
    latent_dim: int
    gradient: str
    table_optimizer: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.latent_dim}-{self.gradient}-{self.table_optimizer}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["letters", "styles"], choices=["letters", "styles"])
    parser.add_argument("--latent-dims", nargs="+", type=int, default=[8, 12, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="gradient:table_optimizer")
    parser.add_argument("--steps", type=int, help="another number of steps, in a separate folder")
    parser.add_argument("--out", type=Path, default=Path("runs/plan_training"))
    options = parser.parse_args()

    # gradients are compared with one optimizer, and optimizers of the codebook with one gradient
    trials = [
        Trial(task, latent_dim, gradient, optimizer, seed)
        for task in options.tasks
        for latent_dim in sorted(options.latent_dims, reverse=True)
        for gradient, optimizer in (method.split(":") for method in options.methods)
        for seed in options.seeds
        if optimizer == "adamw" or 2**latent_dim > LARGE_TABLE
    ]
    if "styles" in options.tasks:
        write_corpus(options.out / "text")
    results: dict[str, dict[str, float]] = {}
    with Progress() as progress, ProcessPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("training", total=len(trials))
        futures = {trial.name: pool.submit(run_trial, trial, options.out, options.steps) for trial in trials}
        for name, future in futures.items():
            results[name] = future.result()
            progress.advance(task)
    show(trials, results)


def _last_of_each(overrides: list[str]) -> list[str]:
    """The last override of each setting, because `load_settings` rejects repeated settings."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def run_trial(trial: Trial, out: Path, steps: int | None = None) -> dict[str, float]:
    """Trains and evaluates: losses in nats per row and, for styles, the information on the style in bits."""
    torch.set_num_threads(1)
    run = Run(out / (f"{trial.name}-{steps}" if steps else trial.name))
    overrides = [
        *([f"training.max_steps={steps}"] if steps else []),
        f"run_dir={run.path}",
        f"model.latent_dim={trial.latent_dim}",
        f"model.plan_gradient={trial.gradient}",
        f"optimizer.codebook={trial.table_optimizer}",
        f"training.seed={trial.seed}",
    ]
    if trial.task == "letters":
        settings = load_settings(CONFIGS / "free_transformer.yaml", _last_of_each(LETTERS + overrides))
    else:
        data = [f"data.train={out / 'text' / 'train.jsonl'}", f"data.validation={out / 'text' / 'validation.jsonl'}"]
        settings = load_settings(CONFIGS / "three_styles.yaml", _last_of_each(STYLES + data + overrides))
    if not run.model_folder.is_dir():
        train(settings, quiet=True)
    torch.manual_seed(0)
    model: Any = run.load_model()
    tokenizer = run.load_tokenizer()
    found = {"step_ms": 1e3 * step_seconds(run)}
    if trial.task == "letters":
        rows = run.held_out_rows(tokenizer)
    else:
        held_out = read_rows(out / "text" / "validation.jsonl", tokenizer, settings.training.seq_len)
        rows = held_out.rows
        found["information"] = mutual_information(sampled_codes(model, rows), held_out.styles)
    rows = rows.sample(EVALUATED_ROWS)
    result = evaluate_likelihood(model, rows.in_order(32), num_samples=8)
    per_row = result.tokens / len(rows)
    found |= {"kl": result.kl}
    found |= {name: getattr(result, name) * per_row for name in ("reconstruction", "elbo", "nll", "gap")}
    return found


def step_seconds(run: Run) -> float:
    """Median time of a step, as logged."""
    settings = run.settings
    lines = [line for line in run.read_metrics() if line["split"] == "train"]
    rate = statistics.median(line["tokens_per_second"] for line in lines)
    return settings.training.batch_size * (settings.training.seq_len - 1) / rate


def show(trials: list[Trial], results: dict[str, dict[str, float]]) -> None:
    for task in dict.fromkeys(trial.task for trial in trials):
        measured = ["reconstruction", "elbo", "nll", "kl", "gap", "step_ms"] + ["information"] * (task == "styles")
        table = Table(title=f"{task}: nats per row, KL in bits per plan; one value per seed")
        for column in ("H", "gradient", "table", *measured):
            table.add_column(column)
        groups: dict[tuple[int, str, str], list[dict[str, float]]] = {}
        for trial in sorted((t for t in trials if t.task == task), key=lambda t: t.latent_dim):
            key = (trial.latent_dim, trial.gradient, trial.table_optimizer)
            groups.setdefault(key, []).append(results[trial.name])
        for (latent_dim, gradient, optimizer), found in groups.items():
            cells = [" ".join(f"{each[name]:.2f}" for each in found) for name in measured]
            table.add_row(str(latent_dim), gradient, optimizer, *cells)
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
