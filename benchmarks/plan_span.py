"""
Measures cost, control and diversity by the number of tokens that share a plan, on the three styles.

Models of plan_span 1, 16, 64 and "sequence" and the baseline, three seeds, the same steps and the same text. Results
are kept in `--out` and not measured again. `make plan-span`: about an hour and a half on 2 cores.
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "three_styles.yaml"
BITS_A_WINDOW, LEAST_BITS_A_WINDOW, WINDOW = 2.5, 2.0, 256
SPANS: tuple[int | str, ...] = (1, 16, 64, "sequence")
LIKELIHOOD_TEXTS, FILTERED_EVERY = 300, 2  # the particle filter reads every second of them
PARTICLES, SAMPLES = 16, 64
WRITTEN = 400
TEMPERATURES = (0.7, 0.85, 1.0)
DIVERSITY = ("distinct", "self_bleu", "label_entropy", "coherence")

Cell = tuple[str, int]


def main(
    out: Annotated[Path, typer.Option(help="folder of the runs and the results")] = Path("runs/plan_span"),
    plans: Annotated[str, typer.Option(help="models, separated by commas")] = "baseline,sequence,64,16,1",
    seeds: Annotated[int, typer.Option(min=2, help="number of runs of each")] = 3,
    processes: Annotated[int, typer.Option(help="number of runs at a time, one thread each")] = 2,
    overrides: Annotated[str, typer.Option(help="changes to the settings, separated by spaces")] = "",
) -> None:
    """Trains and measures missing runs, and prints the tables."""
    sys.path.insert(0, str(ROOT / "examples" / "three_styles"))
    from styles import write_corpus

    if not (out / "text" / "train.jsonl").exists():
        write_corpus(out / "text")
    cells: list[Cell] = [(plan, seed) for seed in range(seeds) for plan in plans.split(",")]
    changes = overrides.split()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        trained = pool.map(train_cell, cells, [out] * len(cells), [changes] * len(cells))
        list(track(trained, description="training", total=len(cells)))
        measured = pool.map(measure_cell, cells, [out] * len(cells), [seeds] * len(cells))
        results = list(track(measured, description="measuring", total=len(cells)))
    tables = (cost_table, control_table, diversity_table, equal_quality_table)
    print(*(table(results) for table in tables), sep="\n\n")
    figure(results).savefig(out / "figure.png", dpi=120)


def train_cell(cell: Cell, out: Path, changes: list[str]) -> None:
    """A run with the demo's settings, with the bits spread over the plans of a window."""
    import torch

    torch.set_num_threads(1)
    from free_transformer.settings import load_settings
    from free_transformer.training import train

    plan, seed = cell
    model = ["model.kind=baseline"]
    if plan != "baseline":
        share = 1.0 if plan == "sequence" else int(plan) / WINDOW
        model = [f"model.plan_span={plan}", f"model.free_bits={BITS_A_WINDOW * share}"]
        model += [f"model.min_bits={LEAST_BITS_A_WINDOW * share}"]
        if plan != "sequence":  # plans with less than a bit cannot be uniform over all codes
            model += ["model.aggregate_weight=0"]
    text = [f"data.train={out / 'text/train.jsonl'}", f"data.validation={out / 'text/validation.jsonl'}"]
    logging = ["logging.sample_every=0", "logging.tensorboard=false", f"training.seed={seed}"]
    run_dir = f"run_dir={_run(out, cell)}"
    train(load_settings(CONFIG, [run_dir, *text, *logging, *model, *changes]), quiet=True)


def _run(out: Path, cell: Cell) -> Path:
    return out / f"{cell[0]}-{cell[1]}"


def measure_cell(cell: Cell, out: Path, seeds: int) -> dict[str, Any]:
    """Likelihood of each held-out text, control, and diversity at three temperatures."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "examples" / "three_styles"))
    from demo import read_rows, train_classifier

    from free_transformer.data import Rows
    from free_transformer.evaluation import evaluate_likelihood, generate_texts, measure_control, measure_diversity
    from free_transformer.training import Run

    plan, seed = cell
    kept = _run(out, cell) / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    run = Run(_run(out, cell))
    model, tokenizer = run.load_model(), run.load_tokenizer()
    held_out = read_rows(out / "text" / "validation.jsonl", tokenizer, WINDOW)
    classify, accuracy = train_classifier(out / "text" / "train.jsonl", tokenizer, held_out)
    torch.manual_seed(seed)
    part = held_out.rows.sample(LIKELIHOOD_TEXTS)
    method, samples = ("importance", SAMPLES) if plan in ("sequence", "baseline") else ("particle_filter", PARTICLES)
    if method == "particle_filter":
        part = Rows(part.tokens[::FILTERED_EVERY], part.positions[::FILTERED_EVERY], text_bytes=0)
    result: dict[str, Any] = {"cell": cell, "accuracy": accuracy, "method": method, "samples": samples}
    for prior in ("uniform", "aggregate")[: 1 if plan == "baseline" else 2]:
        likelihood = evaluate_likelihood(model, part.in_order(32), samples, method, prior)
        result[f"nll_{prior}"] = (likelihood.per_document["nll"] / likelihood.per_document["tokens"]).tolist()
        result[f"numbers_{prior}"] = [likelihood.reconstruction, likelihood.elbo, likelihood.gap, likelihood.kl]
        if plan != "baseline":
            tokens = torch.from_numpy(held_out.rows.tokens).long()
            control = asdict(measure_control(model, None, tokenizer, classify, tokens, held_out.styles, prior=prior))
            kept_shares = ("plans", "verdicts", "transferred")
            result[f"control_{prior}"] = {name: value for name, value in control.items() if name not in kept_shares}
    # NLL under a model of another seed, which generated none of these texts
    reference = Run(_run(out, ("baseline", (seed + 1) % seeds))).load_model()
    for temperature in TEMPERATURES:
        texts = generate_texts(model, tokenizer, WRITTEN, WINDOW, temperature)
        result[f"diversity_{temperature}"] = asdict(measure_diversity(texts, classify, reference, tokenizer))
    kept.write_text(json.dumps(result, default=float))
    return result


def of_plan(results: Sequence[dict[str, Any]], plan: str) -> list[dict[str, Any]]:
    return sorted((result for result in results if result["cell"][0] == plan), key=lambda result: result["cell"][1])


def _over_seeds(values: Sequence[float], sign: str = "+") -> str:
    """Mean and half the 95 % interval over seeds (Student's t)."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return f"{np.mean(values):{sign}.4f}"
    return f"{np.mean(values):{sign}.4f} ± {t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5:.4f}"


def _cost(ours: dict[str, Any], theirs: dict[str, Any], prior: str) -> float:
    """Difference on the texts that both have."""
    nll = np.array(ours[f"nll_{prior}"])
    return float(np.mean(nll - np.array(theirs["nll_uniform"])[:: len(theirs["nll_uniform"]) // len(nll)]))


def cost_table(results: Sequence[dict[str, Any]]) -> str:
    """NLL minus the baseline's of the same seed, nats per token."""
    lines = [
        "| plan_span | bound | NLL - baseline | aggregate prior | reconstruction | KL, bits per plan |",
        "|---" * 6 + "|",
    ]
    baselines = of_plan(results, "baseline")
    for plan in map(str, SPANS):
        here = of_plan(results, plan)
        if not here:
            continue
        differences = {
            prior: _over_seeds([_cost(ours, theirs, prior) for ours, theirs in zip(here, baselines, strict=True)])
            for prior in ("uniform", "aggregate")
        }
        bound = f"{here[0]['method'].replace('_', ' ')}, {here[0]['samples']}"
        reconstruction, _, _, kl = np.mean([each["numbers_uniform"] for each in here], axis=0)
        row = [plan, bound, *differences.values(), f"{reconstruction:.4f}", f"{kl:.3f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def control_table(results: Sequence[dict[str, Any]]) -> str:
    """Agreement, transfer and information, mean over seeds."""
    names = ("agreement", "agreement_shuffled", "transfer", "transfer_shuffled", "mutual_information", "label_entropy")
    lines = ["| plan_span | prior | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for plan in map(str, SPANS):
        for prior in ("uniform", "aggregate"):
            if here := of_plan(results, plan):
                values = [[np.ravel(each[f"control_{prior}"][name])[0] for name in names] for each in here]
                lines.append(
                    f"| {plan} | {prior} | " + " | ".join(f"{value:.3f}" for value in np.mean(values, 0)) + " |"
                )
    return "\n".join(lines)


def diversity_table(results: Sequence[dict[str, Any]]) -> str:
    """Quality, diversity and coherence, mean over seeds and half the 95 % interval."""
    names = ("quality", *DIVERSITY)
    lines = ["| model | temperature | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for plan in ("baseline", *map(str, SPANS)):
        for temperature in TEMPERATURES:
            if here := of_plan(results, plan):
                cells = [
                    _over_seeds([each[f"diversity_{temperature}"][name][0] for each in here], "") for name in names
                ]
                lines.append(f"| {plan} | {temperature} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def equal_quality_table(results: Sequence[dict[str, Any]]) -> str:
    """Differences to the baseline at its quality at the middle temperature, by seed."""
    lines = ["| plan_span | " + " | ".join(DIVERSITY) + " |", "|---" * (1 + len(DIVERSITY)) + "|"]
    baselines = of_plan(results, "baseline")
    for plan in map(str, SPANS):
        if here := of_plan(results, plan):
            pairs = list(zip(here, baselines, strict=True))
            changes = [_over_seeds([_at_equal_quality(*pair, name) for pair in pairs]) for name in DIVERSITY]
            lines.append(f"| {plan} | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def _at_equal_quality(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> float:
    """Interpolates linearly between temperatures. NaN where the quality is not reached."""
    middle = theirs[f"diversity_{TEMPERATURES[1]}"]
    quality = [ours[f"diversity_{temperature}"]["quality"][0] for temperature in TEMPERATURES]
    values = [ours[f"diversity_{temperature}"][name][0] for temperature in TEMPERATURES]
    here = np.interp(middle["quality"][0], quality, values, left=float("nan"), right=float("nan"))
    return float(here) - middle[name][0]


def figure(results: Sequence[dict[str, Any]]) -> Any:
    """Left: cost by plan_span, each seed. Right: label entropy and self-BLEU against quality, a line per model."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 3.2), layout="constrained")
    cost, entropy, overlap = drawn.subplots(1, 3)
    baselines = of_plan(results, "baseline")
    plans = [str(plan) for plan in SPANS if of_plan(results, str(plan))]
    for prior, marker in (("uniform", "o"), ("aggregate", "x")):
        for index, plan in enumerate(plans):
            pairs = zip(of_plan(results, plan), baselines, strict=True)
            costs = [_cost(ours, theirs, prior) for ours, theirs in pairs]
            label = f"{prior} prior" if index == 0 else None
            cost.scatter([index] * len(costs), costs, marker=marker, color=f"C{prior == 'aggregate':d}", label=label)
    cost.axhline(0, color="black", linestyle=":", linewidth=1)
    cost.set_xticks(range(len(plans)), plans)
    cost.set(xlabel="plan_span", title="NLL − baseline, nats per token")
    cost.legend(fontsize=7)
    for axis, name in ((entropy, "label_entropy"), (overlap, "self_bleu")):
        for plan in ("baseline", *plans):
            points = [
                [
                    np.mean([each[f"diversity_{heat}"][key][0] for each in of_plan(results, plan)])
                    for heat in TEMPERATURES
                ]
                for key in ("quality", name)
            ]
            style = {"color": "black", "linestyle": ":"} if plan == "baseline" else {}
            axis.plot(*points, marker="o", label=plan, **style)
        axis.set(xlabel="quality: NLL under another model", title=name.replace("_", " "))
    overlap.legend(fontsize=7)
    return drawn


if __name__ == "__main__":
    typer.run(main)
