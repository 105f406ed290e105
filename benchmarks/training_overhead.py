"""
Overhead of the training loop: the memory that a dry run predicts, and the cost of logging.

Memory: for each of four configurations, one process predicts the memory and another trains and measures its peak.
Logging: one run with TensorBoard, Weights & Biases (offline) and trackio that logs in every other block of steps, so
that other load affects both; and rounds of whole runs, with each tracker and with a single line of metrics. `make
bench-logging`: 35 minutes on 2 cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

CONFIGS = Path(__file__).parents[1] / "configs"
LONG_TEXT = ["data.train=[letters:4000:0]", "data.validation=[letters:200:1]", "training.seq_len=256"]
QUIET = ["logging.tensorboard=false", "training.device=cpu", "evaluation.prior_rows=0", "evaluation.rows=32"]
MEMORY = {  # differences to configs/free_transformer.yaml
    "the shipped configuration, 64 x 68": [],
    "width 256, 6 layers, one plan per token, 8 x 256": [
        *("model.hidden_dim=256", "model.num_layers=6", "model.plan_span=1", "training.batch_size=8", *LONG_TEXT)
    ],
    "baseline of width 256, AdamW, 16 x 256": [
        *("model.kind=baseline", "model.hidden_dim=256", "model.num_layers=6", "optimizer.name=adamw"),
        *("training.batch_size=16", *LONG_TEXT),
    ],
    "width 512, 8 layers, 16-bit plans, 16 x 256": [
        *("model.hidden_dim=512", "model.num_layers=8", "model.num_heads=8", "model.latent_dim=16"),
        *("training.batch_size=16", *LONG_TEXT),
    ],
}
TRACKERS = ("tensorboard", "wandb", "trackio")
SILENT = "one line"
LOGGED = {SILENT: (), "metrics.jsonl alone": (), **{name: (name,) for name in TRACKERS}, "everything": TRACKERS}
BLOCK = 50  # steps; the first two blocks are not counted
EVERY = 10  # steps between the lines of a run that logs
RESULT = "result:"  # trackers print to standard output too


def main(
    pairs: Annotated[
        int, typer.Option(help="number of blocks with and without logging in a run, at least 2; 0 for none")
    ] = 30,
    rounds: Annotated[int, typer.Option(help="number of whole runs with and without logging; 0 for none")] = 5,
    steps: Annotated[int, typer.Option(help="steps of such a run")] = 300,
    memory: Annotated[bool, typer.Option(help="measure memory of the four configurations as well")] = True,
) -> None:
    """Prints the results."""
    with tempfile.TemporaryDirectory() as folder:
        if memory:
            print(memory_table(Path(folder)), flush=True)
        if pairs:
            print(blocks_table(Path(folder), pairs), flush=True)
        if rounds:
            print(logging_table(Path(folder), rounds, steps), flush=True)


def memory_table(folder: Path) -> str:
    """Predicted and measured peak of a process, with validation, samples and a checkpoint, in MiB."""
    lines = ["| configuration | predicted, MiB | measured, MiB | predicted / measured |", "|---" * 4 + "|"]
    for index, (name, changes) in enumerate(MEMORY.items()):
        overrides = [f"run_dir={folder / str(index)}", "training.max_steps=4", *QUIET, *changes]
        foretold, measured = (in_a_process(what, overrides) / 2**20 for what in ("foretell", "train"))
        lines.append(f"| {name} | {foretold:.0f} | {measured:.0f} | {foretold / measured:.2f} |")
    return "\n".join(lines)


def blocks_table(folder: Path, pairs: int) -> str:
    """Time of blocks with logging relative to their neighbors without, in one run, and of the rest."""
    logged = [f"logging.{each}=true" for each in TRACKERS]
    steps = BLOCK * 2 * (pairs + 1) + 1  # the last step ends the last block
    found = in_a_process("blocks", [*common_settings(steps), f"run_dir={folder / 'blocks'}", *logged], str(folder))
    ratios = [one / other for one, other in zip(found["logging"], found["silent"], strict=True)]
    low, high = statistics.quantiles(ratios, n=4)[::2]
    seconds = f"{found['open']:.1f} s to open the trackers, {found['close']:.1f} s to close them"
    middle, step = statistics.median(ratios), statistics.median(found["silent"]) / BLOCK
    return (
        f"blocks of {BLOCK} steps of {step:.3f} s, a line every {EVERY}: logging / silent, {pairs} pairs in one run: "
        f"median {middle:.3f} (quartiles {low:.3f} and {high:.3f}); {1000 * found['line']:.1f} ms per line; {seconds}\n"
    )


def common_settings(steps: int) -> list[str]:
    return [
        *(f"training.max_steps={steps}", "training.device=cpu", "evaluation.prior_rows=0", "data.validation=[]"),
        *("training.save_every=0", "training.eval_every=0", "logging.sample_every=0"),
    ]


def logging_table(folder: Path, rounds: int, steps: int) -> str:
    """Time of the loop with a line every ten steps relative to one line at its end, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in LOGGED}
    for number in range(rounds):
        for name, trackers in list(LOGGED.items())[:: 1 if number % 2 == 0 else -1]:
            changes = [f"logging.{each}={str(each in trackers).lower()}" for each in TRACKERS]
            changes += [f"run_dir={folder / f'{name}-{number}'.replace(' ', '-')}"]
            changes += [f"training.log_every={steps if name == SILENT else EVERY}"]
            seconds[name].append(in_a_process("loop", [*common_settings(steps), *changes], str(folder)))
    lines = [f"| {rounds} rounds of {steps} steps | time / {SILENT}: median (lowest to highest) |", "|---|---|"]
    for name in list(LOGGED)[1:]:
        ratios = [one / other for one, other in zip(seconds[name], seconds[SILENT], strict=True)]
        lines.append(f"| {name} | {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |")
    return "\n".join([*lines, "", f"seconds: {seconds}"])


def in_a_process(what: str, overrides: list[str], folder: str = ".") -> Any:
    """Result of a fresh process."""
    environment = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": f"{folder}/trackio", "WANDB_SILENT": "true"}
    command = [sys.executable, __file__, what, json.dumps(overrides)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.rpartition(RESULT)[2].splitlines()[0])


def child(what: str, overrides: list[str]) -> Any:
    from free_transformer.distributed.processes import find_device
    from free_transformer.training import load_settings, train
    from free_transformer.training.batch_size import peak_bytes
    from free_transformer.training.preview import preview

    settings = load_settings(CONFIGS / "free_transformer.yaml", overrides)
    if what == "foretell":
        found = preview(settings, quiet=True)
        assert found is not None
        return found.bytes
    if what == "train":
        train(settings, quiet=True)
        return peak_bytes(find_device("cpu"))
    return time_blocks(settings) if what == "blocks" else time_loop(settings)


def time_loop(settings: Any) -> float:
    """Seconds of all steps, without startup."""
    from free_transformer.training import loop, train

    seconds, train_steps = [], loop._Trainer.train

    def timed(self: Any, *arguments: Any) -> None:
        seconds.append(timed_call(train_steps, self, *arguments))

    loop._Trainer.train = timed  # type: ignore[method-assign]
    train(settings, quiet=True)
    return seconds[0]


def time_blocks(settings: Any) -> dict[str, Any]:
    """Seconds of blocks with and without logging, of a line, and of opening and closing the trackers."""
    from free_transformer.runs.monitor import Monitor
    from free_transformer.training import loop, start, train

    found: dict[str, Any] = {"logging": [], "silent": []}
    lines: list[float] = []
    step, log = loop._Trainer._optimizer_step, loop._Trainer._log
    open_trackers, close = start.open_trackers, Monitor.close
    started = [0.0]

    def timed_step(self: Any, totals: Any) -> int:
        block, inside = divmod(self.state.step, BLOCK)
        if inside == 0:
            now = time.perf_counter()
            if block > 2:
                found["logging" if is_logging(block - 1) else "silent"].append(now - started[0])
            started[0] = now
        self.settings.training.log_every = EVERY if is_logging(block) else 10**6
        return step(self, totals)

    def timed_log(self: Any, *arguments: Any) -> None:
        lines.append(timed_call(log, self, *arguments))

    def timed_open(*arguments: Any) -> Any:
        begun = time.perf_counter()
        trackers = open_trackers(*arguments)
        found["open"] = time.perf_counter() - begun
        return trackers

    def timed_close(self: Any) -> None:
        found["close"] = timed_call(close, self)

    loop._Trainer._optimizer_step = timed_step  # type: ignore[method-assign]
    loop._Trainer._log = timed_log  # type: ignore[method-assign]
    start.open_trackers, Monitor.close = timed_open, timed_close  # type: ignore
    train(settings, quiet=True)
    return {**found, "line": statistics.median(lines)}


def is_logging(block: int) -> bool:
    """On, off, off, on, ..., so that neither is always the later one of a pair."""
    return block % 4 in (0, 3)


def timed_call(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("foretell", "train", "loop", "blocks"):
        print(RESULT, json.dumps(child(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
    else:
        typer.run(main)
