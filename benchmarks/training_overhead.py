"""
Two promises of the training loop: the memory that a dry run foretells, and what it costs to log everything.

Memory: four configurations, each foretold by one process and trained by another, whose peak is read. Logging: rounds of
one run with TensorBoard, Weights & Biases (offline) and trackio, and one with a single line of metrics, interleaved.
`make bench-logging`: 8 minutes on 2 cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

CONFIGS = Path(__file__).parents[1] / "configs"
LONG_TEXT = ["data.train=[letters:4000:0]", "data.validation=[letters:200:1]", "training.seq_len=256"]
QUIET = ["logging.tensorboard=false", "training.device=cpu", "training.prior_rows=0", "training.eval_rows=32"]
MEMORY = {  # what differs from configs/free_transformer.yaml
    "the shipped configuration, 64 x 68": [],
    "width 256, 6 layers, a plan a token, 8 x 256": [
        *("model.hidden_dim=256", "model.num_layers=6", "model.plan_span=1", "training.batch_size=8", *LONG_TEXT)
    ],
    "baseline of width 256, AdamW, 16 x 256": [
        *("model.kind=baseline", "model.hidden_dim=256", "model.num_layers=6", "training.optimizer=adamw"),
        *("training.batch_size=16", *LONG_TEXT),
    ],
    "width 512, 8 layers, 16-bit plans, 16 x 256": [
        *("model.hidden_dim=512", "model.num_layers=8", "model.num_heads=8", "model.latent_dim=16"),
        *("training.batch_size=16", *LONG_TEXT),
    ],
}
LOGGED = ["logging.tensorboard=true", "logging.wandb=true", "logging.trackio=true", "training.log_every=10"]
RESULT = "result:"  # trackers write to standard output too
SILENT = ["logging.tensorboard=false", "training.log_every=100000"]


def main(
    rounds: Annotated[int, typer.Option(help="of the runs with and without logging; 0 for none")] = 7,
    steps: Annotated[int, typer.Option(help="of such a run")] = 150,
    memory: Annotated[bool, typer.Option(help="the four configurations too")] = True,
) -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as folder:
        if memory:
            print(memory_table(Path(folder)), flush=True)
        if rounds:
            print(logging_table(Path(folder), rounds, steps), flush=True)


def memory_table(folder: Path) -> str:
    """Foretold and measured peak of a process, with validation, samples and a checkpoint, in MiB."""
    lines = ["| configuration | foretold, MiB | measured, MiB | foretold / measured |", "|---" * 4 + "|"]
    for index, (name, changes) in enumerate(MEMORY.items()):
        overrides = [f"run_dir={folder / str(index)}", "training.max_steps=4", *QUIET, *changes]
        foretold, measured = (in_a_process(what, overrides) / 2**20 for what in ("foretell", "train"))
        lines.append(f"| {name} | {foretold:.0f} | {measured:.0f} | {foretold / measured:.2f} |")
    return "\n".join(lines)


def logging_table(folder: Path, rounds: int, steps: int) -> str:
    """Time of the loop with everything logged over that with one line, round by round."""
    common = [f"training.max_steps={steps}", "training.device=cpu", "training.prior_rows=0", "data.validation=[]"]
    common += ["training.save_every=0", "training.eval_every=0", "logging.sample_every=0"]
    ratios = []
    for number in range(rounds):
        order = [("logged", LOGGED), ("silent", SILENT)][:: 1 if number % 2 == 0 else -1]
        seconds = {
            name: in_a_process("time", [f"run_dir={folder / f'{name}-{number}'}", *common, *changes], str(folder))
            for name, changes in order
        }
        ratios.append(seconds["logged"] / seconds["silent"])
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return f"logged / silent, {rounds} rounds of {steps} steps: median {middle:.3f} ({low:.3f} to {high:.3f})"


def in_a_process(what: str, overrides: list[str], folder: str = ".") -> float:
    """The number that a fresh process prints last."""
    environment = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": f"{folder}/trackio", "WANDB_SILENT": "true"}
    command = [sys.executable, __file__, what, json.dumps(overrides)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.rpartition(RESULT)[2].split()[0])


def child(what: str, overrides: list[str]) -> float:
    from free_transformer.training import load_settings, loop, train
    from free_transformer.training.memory import peak_bytes
    from free_transformer.training.preview import preview
    from free_transformer.training.processes import find_device

    settings = load_settings(CONFIGS / "free_transformer.yaml", overrides)
    if what == "foretell":
        found = preview(settings, quiet=True)
        assert found is not None
        return found.bytes
    seconds = []
    original = loop._Trainer.run_to_the_end

    def timed(self: loop._Trainer, *arguments: object) -> None:
        started = time.perf_counter()
        original(self, *arguments)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - started)

    loop._Trainer.run_to_the_end = timed  # type: ignore[method-assign]
    train(settings, quiet=True)
    return peak_bytes(find_device("cpu")) if what == "train" else seconds[0]


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("foretell", "train", "time"):
        print(RESULT, child(sys.argv[1], json.loads(sys.argv[2])), flush=True)
    else:
        typer.run(main)
