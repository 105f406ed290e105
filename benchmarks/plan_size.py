"""
Why a plan can use its bits without information about the style: plan size, free bits, objective and optimizer.

The hypothesis was that with free_bits as large as the plan the KL term is never active, so that bits used early are
never freed. Each cell trains the small models of `collapse.py` on the styles and reports the bits that the plan uses,
how many of them differ between texts, and its mutual information with the style. `make plan-size`: 17 minutes on 2
cores. Results are kept in `--out`.
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

sys.path.insert(0, str(Path(__file__).parent))
from collapse import EXAMPLES, HELD_OUT_TEXTS, SAMPLES, settings_of, write_text_of_styles

Cell = tuple[str, int]
AGGREGATE = {"model": {"aggregate_weight": 1.0}}
BAND = {"model": {"min_bits": 2.0}}
BOTH = {"model": BAND["model"] | AGGREGATE["model"]}
MUON = {"training": {"optimizer": "muon"}}
# name: bits of a plan, free bits, other differences
CELLS: dict[str, tuple[int, float, dict[str, dict[str, Any]]]] = {
    "H = 4, 4 free bits": (4, 4.0, {}),
    "H = 4, 2 free bits": (4, 2.0, {}),
    "H = 8, 8 free bits": (8, 8.0, {}),
    "H = 8, 2 free bits": (8, 2.0, {}),
    "H = 4, free bits from 1/2 to 4": (
        4,
        4.0,
        {"training": {"free_bits_schedule": "linear", "free_bits_start": 0.5, "anneal_steps": 300}},
    ),
    "H = 4, 4 free bits, aggregate_weight = 1": (4, 4.0, AGGREGATE),
    "H = 8, 2.5 free bits": (8, 2.5, {}),
    "H = 8, 2 to 2.5 bits": (8, 2.5, BAND),
    "H = 8, 2 to 2.5 bits, aggregate_weight = 1": (8, 2.5, BOTH),
    "H = 8, 2.5 free bits, Muon": (8, 2.5, MUON),
    "H = 8, 2 to 2.5 bits, Muon": (8, 2.5, BAND | MUON),
    "H = 8, 2 to 2.5 bits, aggregate_weight = 1, Muon": (8, 2.5, BOTH | MUON),
    "H = 4, 2 to 2.5 bits, aggregate_weight = 1, Muon": (4, 2.5, BOTH | MUON),
}


def main(
    out: Annotated[Path, typer.Option(help="folder of the runs and the results")] = Path("runs/plan_size"),
    seeds: Annotated[int, typer.Option(help="number of runs of each")] = 3,
    processes: Annotated[int, typer.Option(help="number of runs at a time, one thread each")] = 2,
    steps: Annotated[int, typer.Option(help="steps of a run; 0 for the number of collapse.py")] = 0,
) -> None:
    """Trains the missing runs and prints the table."""
    if not (out / "text" / "validation.jsonl").exists():
        write_text_of_styles(out / "text")
    cells: list[Cell] = [(name, seed) for seed in range(seeds) for name in CELLS]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = pool.map(run_cell, cells, [out] * len(cells), [steps] * len(cells))
        results = list(track(pending, description="plan size", total=len(cells)))
    print(table(results))


def cell_settings(cell: Cell, out: Path, steps: int) -> dict[str, Any]:
    """The settings of one run, as in a YAML file."""
    name, seed = cell
    latent_dim, free_bits, changes = CELLS[name]
    values = settings_of("styles", "bit-linear", free_bits, seed, out, steps)
    values["model"]["latent_dim"] = latent_dim
    for section, changed in changes.items():
        values[section].update(changed)
    values["run_dir"] = str(out / f"{list(CELLS).index(name)}-{seed}")
    return values


def run_cell(cell: Cell, out: Path, steps: int) -> dict[str, Any]:
    """Bits that the plan uses, its mutual information with the style, and the gap."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    from demo import read_rows

    from free_transformer.evaluation import evaluate_likelihood, mutual_information
    from free_transformer.evaluation.control import mutual_information_bias, sampled_codes
    from free_transformer.files import write_text
    from free_transformer.settings import parse_settings
    from free_transformer.training import train

    settings = parse_settings(cell_settings(cell, out, steps))
    kept = Path(settings.run_dir) / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    run = train(settings, quiet=True)
    model, tokenizer = run.load_model(), run.load_tokenizer()
    held_out = read_rows(out / "text" / "validation.jsonl", tokenizer, settings.training.seq_len)
    torch.manual_seed(0)
    likelihood = evaluate_likelihood(model, held_out.rows.sample(HELD_OUT_TEXTS).in_order(64), SAMPLES)
    codes = sampled_codes(model, held_out.rows.in_order(64))[:, 0]
    result = {
        "cell": cell,
        "kl": likelihood.kl,
        "gap": likelihood.gap,
        "information": mutual_information(codes, held_out.styles),
        "by_chance": mutual_information_bias(codes, held_out.styles),
        "tells": likelihood.usage.information,
    }
    write_text(kept, json.dumps(result))
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Medians over seeds of each cell. Information is shown for each seed, to show how much seeds differ."""
    lines = [
        "| plan | KL, bits | of these, bits that differ between texts, each seed "
        "| information on the style, bits of 1.58, each seed (by chance) | gap, nats per token |",
        "|---" * 5 + "|",
    ]
    for name in CELLS:
        here = sorted((each for each in results if each["cell"][0] == name), key=lambda each: each["cell"][1])
        if not here:
            continue
        kl, gap, chance = (float(np.median([each[key] for each in here])) for key in ("kl", "gap", "by_chance"))
        tells, known = (", ".join(f"{each[key]:.2f}" for each in here) for key in ("tells", "information"))
        lines.append(f"| {name} | {kl:.2f} | {tells} | {known} ({chance:.2f}) | {gap:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
