"""
How many runs end with an unused plan: initializations, optimizers and schedules × free bits × seeds, on two tasks.

A run counts as collapsed by the criterion of the training loop, applied to the trained model on more texts. The
settings of `configs/free_transformer.yaml` with one plan per sequence are included for comparison. Finished runs are
kept in `--out` and not trained again. `make collapse` runs everything: an hour on 2 cores.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "three_styles"
CONFIG = ROOT / "configs" / "free_transformer.yaml"
SHIPPED = "shipped"
FREE_BITS = (0.125, 0.5, 1.0)
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "normal rows": {"model": {"table_init": "normal"}},
    "bit-linear": {},
    "bit-linear, annealing": {"training": {"kl_schedule": "linear"}},
    "bit-linear, Muon, min_bits": {"training": {"optimizer": "muon"}},  # min_bits follows the free bits
}
MIN_BITS_SHARE = 0.8
HELD_OUT_TEXTS, SAMPLES = 700, 4
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "letters": {
        "model": {"plan_span": 1},
        "training": {"max_steps": 500, "batch_size": 32, "seq_len": 68},
        "data": {"train": ["letters:20000:0"], "validation": ["letters:1000:1"]},
    },
    "styles": {
        "model": {"plan_span": "sequence"},
        "training": {"max_steps": 400, "batch_size": 16, "seq_len": 128},
    },
}
BYTES_PER_STYLE = {"train": 400_000, "validation": 30_000}


def main(
    out: Annotated[Path, typer.Option(help="folder of the runs and the results")] = Path("runs/collapse"),
    tasks: Annotated[str, typer.Option(help="tasks, separated by commas")] = ",".join(TASKS),
    seeds: Annotated[int, typer.Option(help="number of runs of each kind")] = 5,
    processes: Annotated[int, typer.Option(help="number of runs at a time, one thread each")] = 2,
    steps: Annotated[int, typer.Option(help="steps of a run; 0 for the number of its task")] = 0,
) -> None:
    """Trains the missing runs and prints the table."""
    unknown = set(tasks.split(",")) - set(TASKS)
    if unknown:
        raise typer.BadParameter(f"tasks: {', '.join(unknown)}; available: {', '.join(TASKS)}")
    text = out / "text"
    if "styles" in tasks and not (text / "validation.jsonl").exists():
        write_text_of_styles(text)
    cells = [
        (task, arm, free_bits, seed)
        for seed in range(seeds)
        for task in tasks.split(",")
        for free_bits in FREE_BITS
        for arm in ARMS
    ]
    free_bits = shipped()["model"]["free_bits"]
    cells += [(task, SHIPPED, free_bits, seed) for seed in range(seeds) for task in tasks.split(",")]
    results_file = out / "results.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in results_file.read_text().splitlines()] if results_file.exists() else []
    finished = {tuple(result["cell"]) for result in done}
    missing = [cell for cell in cells if cell not in finished]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = pool.map(run_cell, missing, [out] * len(missing), [steps] * len(missing))
        for result in track(pending, description="collapse", total=len(missing)):
            done.append(result)
            with results_file.open("a") as file:
                file.write(json.dumps(result) + "\n")
    wanted = [result for result in done if tuple(result["cell"]) in set(cells)]
    print(table(wanted), shipped_lines(wanted), sep="\n\n")
    figure(wanted).savefig(out / "figure.png", dpi=120)


def write_text_of_styles(folder: Path) -> None:
    """The beginning of the demo's text, the same amount of each style."""
    sys.path.insert(0, str(EXAMPLES))
    from styles import STYLES, write_corpus

    write_corpus(folder / "whole")
    for split, size in BYTES_PER_STYLE.items():
        left = dict.fromkeys(STYLES, size)
        lines = []
        for line in (folder / "whole" / f"{split}.jsonl").read_text().splitlines():
            document = json.loads(line)
            document["text"] = document["text"][: left[document["label"]]]
            left[document["label"]] -= len(document["text"])
            if document["text"]:
                lines.append(json.dumps(document) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))


def shipped() -> dict[str, dict[str, Any]]:
    """Model and optimizer of the shipped configuration. The task determines the length of training."""
    from free_transformer.settings.yaml_text import load_yaml

    sections = load_yaml(CONFIG.read_text(encoding="utf-8"))
    own = ("max_steps", "batch_size", "seq_len", "warmup_steps", "eval_every", "save_every")
    training = {name: value for name, value in sections["training"].items() if name not in own}
    optimizer = dict(sections["optimizer"])
    return {"model": sections["model"], "training": {**training, "optimizer": optimizer.pop("name"), **optimizer}}


def settings_of(task: str, arm: str, free_bits: float, seed: int, out: Path, steps: int) -> dict[str, Any]:
    """The settings of one run, as in a YAML file."""
    base: dict[str, dict[str, Any]] = {
        "model": {"hidden_dim": 64, "num_layers": 4, "num_heads": 4, "latent_dim": 8, "free_bits": free_bits}
        | {"min_bits": 0.0, "aggregate_weight": 0.0},
        "training": {
            "optimizer": "adamw",
            "learning_rate": 3e-3,
            "min_lr_ratio": 0.1,
            "warmup_steps": 50,
            "seed": seed,
            "prior_rows": 0,
            "eval_every": 0,
            "save_every": 0,
            "log_every": 50,
        },
        "data": {"train": [str(out / "text/train.jsonl")], "validation": [str(out / "text/validation.jsonl")]},
        "logging": {"tensorboard": False, "sample_every": 0, "sample_tokens": 1},
    }
    if "min_bits" in arm:
        base["model"]["min_bits"] = MIN_BITS_SHARE * free_bits
    for changes in (TASKS[task], shipped() if arm == SHIPPED else ARMS[arm]):
        for section, values in changes.items():
            base[section].update(values)
    if steps:
        base["training"].update(max_steps=steps, warmup_steps=steps // 10)
    name = f"{task}-{arm.replace(', ', '-').replace(' ', '-')}-{free_bits:g}-{seed}"
    return {"run_dir": str(out / name), **base}


def run_cell(cell: tuple[str, str, float, int], out: Path, steps: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from free_transformer.evaluation import collapse_warning, evaluate_likelihood
    from free_transformer.settings import parse_settings
    from free_transformer.training import train

    settings = parse_settings(settings_of(*cell, out, steps))
    run = train(settings, quiet=True)  # a finished run is not trained again
    rows = run.held_out_rows(run.load_tokenizer()).sample(HELD_OUT_TEXTS)
    torch.manual_seed(0)
    likelihood = evaluate_likelihood(run.load_model(), rows.in_order(64), SAMPLES)
    warning = collapse_warning(likelihood, settings.model.free_bits)
    numbers = {name: getattr(likelihood, name) for name in ("gap", "kl", "reconstruction", "nll")}
    numbers["information"] = likelihood.usage.information if likelihood.usage else None
    return {"cell": cell, "collapsed": warning is not None, "warning": warning, **numbers}


def table(results: list[dict[str, Any]]) -> str:
    """Number of collapsed runs, and the median gap in nats per token."""
    lines = ["| task | initialization | " + " | ".join(f"κ = {bits:g}" for bits in FREE_BITS) + " |", "|---" * 5 + "|"]
    for task in TASKS:
        for arm in ARMS:
            row = []
            for free_bits in FREE_BITS:
                here = [each for each in results if list(each["cell"])[:3] == [task, arm, free_bits]]
                row.append(_counted(here))
            lines.append(f"| {task} | {arm} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def shipped_lines(results: list[dict[str, Any]]) -> str:
    """Number of collapsed runs of the shipped settings."""
    lines = []
    for task in TASKS:
        here = [each for each in results if list(each["cell"])[:2] == [task, SHIPPED]]
        lines.append(f"{task}, {CONFIG.name}: {_counted(here)}")
    return "\n".join(lines)


def _counted(results: list[dict[str, Any]]) -> str:
    gap = np.median([each["gap"] for each in results]) if results else float("nan")
    return f"{sum(each['collapsed'] for each in results)} of {len(results)} (gap {gap:.3f})"


def figure(results: list[dict[str, Any]]) -> Any:
    """The gap of every run. Crosses are collapsed runs."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, task in zip(drawn.subplots(1, len(TASKS)), TASKS, strict=True):
        for index, arm in enumerate(ARMS):
            for place, free_bits in enumerate(FREE_BITS):
                here = [each for each in results if list(each["cell"])[:3] == [task, arm, free_bits]]
                for collapsed, marker in ((False, "o"), (True, "x")):
                    gaps = [each["gap"] for each in here if each["collapsed"] == collapsed]
                    style = {"marker": marker, "color": f"C{index}", "s": 20}
                    axis.scatter([place + 0.13 * (index - len(ARMS) / 2)] * len(gaps), gaps, **style)
            axis.scatter([], [], color=f"C{index}", label=arm)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_xticks(range(len(FREE_BITS)), [f"κ = {bits:g}" for bits in FREE_BITS])
        axis.set_title(f"{task}: gap prior − reconstruction, nats per token")
    axis.legend(fontsize=7)
    return drawn


if __name__ == "__main__":
    typer.run(main)
