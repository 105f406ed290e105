"""
Does a plan carry information from beyond a sliding window? Compares the held-out likelihood of a Free Transformer with
a short sliding window to baselines: with the same window, with one more layer, and with full attention.

Trains what is missing, one process per core, and prints the table: `python benchmarks/window_likelihood.py --rows 1024
--windows 16 64`. Each result is a line of `--results`, which is kept in the repository, so that a long table can be
measured in several calls. Text and settings are the demo's, except for the rows. Training is compiled, which needs a
C++ compiler and takes an hour of one core per model.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from free_transformer.evaluation.likelihood import ratio_standard_error
from free_transformer.reporting.table import Table

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "three_styles"
CONFIG = ROOT / "configs" / "three_styles.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "window_likelihood.jsonl"
MODELS = ("free", "baseline", "baseline, one layer more", "baseline, full attention")
KEY = ("model", "rows", "window", "seed", "steps", "batch_size", "free_bits")
HELD_OUT_ROWS, SAMPLES = 200, 16
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024], help="tokens per row")
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS[:2]))
    parser.add_argument("--steps", type=int, default=1150)
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument(
        "--free-bits", type=float, default=2.5, help="the KL of a plan stays between this and 0.5 bits less"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/window-likelihood"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="lines of results, to which new ones are added")
    parser.add_argument("--print", action="store_true", help="print the table and train nothing")
    options = parser.parse_args()
    if not options.print:
        measure_missing(options)
    for table in tables(read_results(options.results)):
        table.print(console)


def measure_missing(options: argparse.Namespace) -> None:
    known = {key_of(each) for each in read_results(options.results)}
    jobs = []
    for rows in options.rows:
        for model in options.models:
            for window in [None] if model == MODELS[3] else options.windows:
                for seed in options.seeds:
                    job = {"model": model, "rows": rows, "window": window, "seed": seed, "steps": options.steps}
                    job["batch_size"] = options.batch_size
                    if model == "free":
                        job["free_bits"] = options.free_bits
                    if key_of(job) not in known:
                        jobs.append(job)
    jobs.sort(key=lambda job: (job["rows"], job["seed"], job["window"] or 0))  # a whole comparison before the next one
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure, job, options.out) for job in jobs]):
            found = future.result()
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            console.print({name: value for name, value in found.items() if name != "per_row"})


def measure(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Trains one model and evaluates its likelihood, in a process of its own with one thread."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    from demo import read_rows
    from styles import write_corpus

    from free_transformer.evaluation import evaluate_likelihood
    from free_transformer.settings import load_settings
    from free_transformer.training import Run, train

    text = out / "text"
    if not (text / "validation.jsonl").exists():
        write_corpus(text)
    name = "-".join(str(job[each]).replace(", ", "-").replace(" ", "-") for each in KEY if each in job)
    run = Run(out / name)
    free = job["model"] == "free"
    settings = [f"run_dir={run.path}", f"data.train={text / 'train.jsonl'}"]
    settings += [f"data.validation={text / 'validation.jsonl'}"]
    settings += [f"training.seq_len={job['rows']}", f"training.batch_size={job['batch_size']}"]
    settings += [f"training.max_steps={job['steps']}", f"training.seed={job['seed']}", "evaluation.rows=16"]
    settings += ["training.compile=true"]
    settings += [f"training.warmup_steps={max(1, job['steps'] // 20)}", "logging.sample_every=0"]
    settings += [f"model.kind={'free' if free else 'baseline'}"]
    settings += [f"model.free_bits={job['free_bits']}", f"model.min_bits={job['free_bits'] - 0.5}"] if free else []
    settings += [] if job["window"] is None else [f"model.sliding_window={job['window']}"]
    settings += ["model.num_layers=5"] if job["model"] == MODELS[2] else []
    if not run.has_ended:
        train(load_settings(CONFIG, settings))
    model, tokenizer = run.load_with_tokenizer()
    rows = read_rows(text / "validation.jsonl", tokenizer, job["rows"]).rows.sample(HELD_OUT_ROWS, 0)
    torch.manual_seed(0)
    likelihood = evaluate_likelihood(model, rows.in_order(4), SAMPLES)
    values = {"nll": likelihood.nll, "standard_error": likelihood.standard_errors["nll"]}
    if likelihood.usage is not None:
        values |= {"kl_bits": likelihood.kl, "information_bits": likelihood.usage.information}
    per_row = [round(float(each), 3) for each in likelihood.per_document["nll"]]
    tokens = [int(each) for each in likelihood.per_document["tokens"]]
    return {**job, **values, "per_row": per_row, "tokens": tokens}


def key_of(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(name) for name in KEY)


def read_results(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tables(results: list[dict[str, Any]]) -> list[Table]:
    """One table per length of rows and setting: differences of the Free Transformer from each baseline, by row."""
    found = []
    by_key = {key_of(each): each for each in results}
    setting = itemgetter("rows", "steps", "batch_size", "free_bits")
    free = [each for each in results if each["model"] == "free"]
    for (rows, steps, batch_size, free_bits), same in groupby(sorted(free, key=setting), setting):
        lines = []
        for each in sorted(same, key=itemgetter("window", "seed")):
            cells = [str(each["window"]), str(each["seed"]), f"{each['information_bits']:.2f}", f"{each['nll']:.4f}"]
            for model in MODELS[1:]:
                window = None if model == MODELS[3] else each["window"]
                other = by_key.get(key_of({**each, "model": model, "window": window, "free_bits": None}))
                cells.append("" if other is None else difference(each, other))
            lines.append(cells)
        header = ["window", "seed", "bits that distinguish texts", "NLL", *(f"minus {model}" for model in MODELS[1:])]
        caption = (
            f"Rows of {rows:,} bytes, {steps:,} steps of {batch_size} rows, at most {free_bits:g} bits per plan: "
            f"held-out NLL in nats per byte (bound from {SAMPLES} plans, {HELD_OUT_ROWS} rows), and differences with "
            "half of their 95 % interval over rows; negative: the plan's model is better."
        )
        found.append(Table(header, lines, caption))
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    gap = np.array(one["per_row"]) - np.array(other["per_row"])
    tokens = np.array(one["tokens"])
    return f"{gap.sum() / tokens.sum():+.4f} ± {1.96 * ratio_standard_error(gap, tokens):.4f}"


if __name__ == "__main__":
    main()
