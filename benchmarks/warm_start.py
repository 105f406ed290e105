"""
How a plan leaves zero in a pretrained model: compares initializations of its codebook and its readout.

Each run fine-tunes SmolLM2-135M on news in windows of 64 tokens, its first half frozen, on the same batches. The gap,
prior - reconstruction on held-out text, shows how much the plan helps prediction. `make warm-start`: 20 minutes.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "pretrained"))

from news import news, write_corpus, write_smollm2  # noqa: E402

from free_transformer import quiet  # noqa: E402, F401
from free_transformer.training import Run, load_settings, train  # noqa: E402

INITIALIZATIONS = {
    "zero, one vector per bit (default)": [],
    "bit-linear and small, one vector per bit": ["model.table_init=bit_linear"],
    "zero, one codebook of all plans": ["model.code_bits=8"],
    "bit-linear and small, one codebook of all plans": ["model.code_bits=8", "model.table_init=bit_linear"],
    "zero, one vector per bit, small readout": ["model.readout_init_scale=0.1"],
    "zero, one vector per bit, layer K only": ["model.injection_layers=null"],
}
SETTINGS = ["model.latent_dim=8", "model.free_bits=4", "model.min_bits=3", "training.seq_len=64"]
SETTINGS += ["training.freeze_first_half=true", "evaluation.prior_rows=0", "evaluation.rows=96"]


def main(
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs/warm_start"),
    steps: Annotated[int, typer.Option(help="steps of each run")] = 40,
    every: Annotated[int, typer.Option(help="steps between two evaluations")] = 20,
    llama: Annotated[Path, typer.Option(help="the pretrained model")] = Path("runs/pretrained/smollm2-135m"),
    seed: int = 0,
    processes: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
) -> None:
    """Trains the missing runs and prints the table."""
    if not llama.is_dir():
        write_smollm2(llama)
    write_corpus(news(), out / "text")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = [
            pool.submit(measure, out / str(number), changes, llama, out / "text", steps, every, seed)
            for number, changes in enumerate(INITIALIZATIONS.values())
        ]
        rows = [row(title, each.result()) for title, each in zip(INITIALIZATIONS, pending, strict=True)]
    evaluations = range(every, steps + 1, every)
    gaps = " | ".join(f"gap at step {step}" for step in evaluations)
    header = f"| initialization | {gaps} | KL, bits | RMS of R, relative to X |"
    print("\n".join([header, "|---" * (header.count("|") - 1) + "|", *rows]))


def measure(folder: Path, changes: list[str], llama: Path, text: Path, steps: int, every: int, seed: int) -> Run:
    """A run with these settings, trained unless it exists."""
    run = Run(folder)
    if not run.model_folder.is_dir():
        own = [f"run_dir={folder}", f"model.pretrained={llama}", f"training.seed={seed}", f"training.max_steps={steps}"]
        own += [f"data.train={text / 'train.jsonl'}", f"data.validation={text / 'validation.jsonl'}"]
        own += [f"training.eval_every={every}", "optimizer.min_lr_ratio=1.0"]
        train(load_settings(ROOT / "configs" / "pretrained.yaml", [*SETTINGS, *own, *changes]))
    return run


def row(title: str, run: Run) -> str:
    evaluations: list[dict[str, Any]] = [line for line in run.read_metrics() if line["split"] == "validation"]
    model: Any = run.load_model()
    vectors = model.plan_table(model.sample_plan(256)).square().mean().sqrt().item() / model.config.stream_scale
    shown = [f"{each['gap']:.4f}" for each in evaluations] + [f"{evaluations[-1]['kl']:.2f}", f"{vectors:.2f}"]
    Console(stderr=True).print(title, *shown)
    return f"| {title} | {' | '.join(shown)} |"


if __name__ == "__main__":
    typer.run(main)
