"""
Does a curriculum help? Rows of 64, 128, then 256 tokens compared with 256 throughout, at equal numbers of tokens.

Both use the demo's model, text and settings. Each seed trains one after the other, so that times are comparable, and
both are evaluated on the same held-out rows of 256. `make bench-curriculum`: half an hour on 2 cores. Results are kept
in `--out`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent))
from collapse import write_text_of_styles

CONFIG = Path(__file__).parents[1] / "configs" / "three_styles.yaml"
ARMS: dict[str, list[str]] = {
    "256": [],
    "64, 128, 256": ["curriculum.stages=[{seq_len: 64}, {seq_len: 128}, {}]"],
}
SAMPLES = 16
FIGURES = ("nll", "elbo", "gap", "seconds")


def main(
    out: Annotated[Path, typer.Option(help="folder of the runs and the results")] = Path("runs/curriculum"),
    seeds: Annotated[int, typer.Option(help="number of runs of each")] = 3,
    steps: Annotated[int, typer.Option(help="steps of a run; 0 for the demo's number")] = 0,
) -> None:
    """Trains the missing runs and prints the table."""
    if not (out / "text" / "validation.jsonl").exists():
        write_text_of_styles(out / "text")
    results = [run_arm(arm, seed, out, steps) for seed in range(seeds) for arm in ARMS]
    print(table(results))


def run_arm(arm: str, seed: int, out: Path, steps: int) -> dict[str, Any]:
    """One run: training time without validation, and likelihood of held-out text."""
    from free_transformer.evaluation import evaluate_likelihood
    from free_transformer.files import write_json
    from free_transformer.training import load_settings, train

    folder = out / f"{list(ARMS).index(arm)}-{seed}"
    kept = folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    text = [f"data.{part}=[{out / 'text' / part}.jsonl]" for part in ("train", "validation")]
    silent = ["training.eval_every=0", "training.save_every=0", "evaluation.prior_rows=0", "logging.sample_every=0"]
    length = [f"training.max_steps={steps}"] if steps else []
    overrides = [f"run_dir={folder}", f"training.seed={seed}", *text, *silent, *length, *ARMS[arm]]
    started = time.perf_counter()
    run = train(load_settings(CONFIG, overrides), quiet=True)
    seconds = time.perf_counter() - started
    model, tokenizer = run.load_model(), run.load_tokenizer()
    torch.manual_seed(0)
    likelihood = evaluate_likelihood(model, run.held_out_rows(tokenizer).sample(512).in_order(32), SAMPLES)
    found = {name: getattr(likelihood, name) for name in FIGURES if name != "seconds"}
    result = {"arm": arm, "seed": seed, **found, "error": likelihood.standard_errors["nll"], "seconds": seconds}
    write_json(kept, result)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Every seed, and the difference of the curriculum to constant length with the same seed."""
    lines = ["| seed | rows of | nll | elbo | gap | time, s |", "|---" * 6 + "|"]
    for result in results:
        values = " | ".join(f"{result[name]:.4f}" for name in ("nll", "elbo", "gap"))
        lines.append(f"| {result['seed']} | {result['arm']} | {values} | {result['seconds']:.0f} |")
    constant, staged = ([each for each in results if each["arm"] == arm] for arm in ARMS)
    for one, other in zip(constant, staged, strict=True):
        lines.append(
            f"\nseed {one['seed']}: nll {other['nll'] - one['nll']:+.4f} nats per byte, "
            f"time x {other['seconds'] / one['seconds']:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
