"""
Compares one process with several on one CPU: losses, memory per process, speed and communication.

Every process has one thread. Times are medians over rounds with one turn of every contestant. Bytes sent are counted by
the loopback device of Linux. The tables of docs/scaling.md: make bench-scaling
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.distributed.parallelize import parallelize
from free_transformer.distributed.processes import MESH, Processes, join_processes
from free_transformer.model.losses import predicted_tokens
from free_transformer.settings import DistributedSettings, Settings
from free_transformer.training import Run
from free_transformer.training.optimizers import build_optimizers, clip_gradients
from free_transformer.training.step import training_forward

ROOT = Path(__file__).parents[1]
SIZES = {"vocab_size": 4096, "hidden_dim": 256, "num_layers": 6, "num_heads": 4, "max_seq_len": 256, "latent_dim": 8}
BATCH, LENGTH = 8, 256
STEPS = 50
TURN_STEPS = 2
KINDS = ("weights", "gradients", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant, after one warm-up turn")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of steps whose losses are compared")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = WORKERS[options.worker](options.rounds)
        if os.environ.get("RANK", "0") == "0":
            options.out.write_text(json.dumps(result))
        return
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        console.print(agreement_table(work, options.steps))
        console.print(memory_table([ask(count, "memory", work, options) for count in (1, 2, 4)]))
        console.print(*speed_tables(ask(2, "speed", work, options)))


def torchrun(count: int, *arguments: str) -> None:
    """Runs a program in several processes of one thread. Raises its errors."""
    launcher = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run"]
    launcher += [] if count == 1 else [f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [*launcher, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if outcome.returncode:
        sys.exit(outcome.stdout)


def ask(count: int, what: str, work: Path, options: argparse.Namespace) -> Any:
    """Result of a measurement in several processes."""
    out = work / "result.json"
    torchrun(count, __file__, "--worker", what, "--out", str(out), "--rounds", str(options.rounds))
    return json.loads(out.read_text())


def agreement_table(work: Path, steps: int) -> Table:
    """Difference of losses of the shipped configuration to one process, step by step."""
    table = Table("optimizer", "processes", f"largest difference of the loss in {steps} steps", title="agreement")
    ways = {
        "2, fsdp": (2, "--use-fsdp"),
        "2, each with the whole model": (2,),
        "2, tensor": (2, "distributed.tensor=2"),
    }
    ways["4, 2 replicas sharded over 2"] = (4, "--use-fsdp", "distributed.replicas=2")
    ways["4, data x tensor"] = (4, "--use-fsdp", "distributed.tensor=2")
    for optimizer in ("adamw", "muon"):
        alone = losses_of_run(work / f"{optimizer}-1", 1, optimizer, steps)
        for name, (count, *options) in ways.items():
            losses = losses_of_run(work / f"{optimizer}-{name}", count, optimizer, steps, *options)
            largest = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
            table.add_row(optimizer, name, f"{largest:.1e}")
            if optimizer == "muon":
                break
    return table


def losses_of_run(folder: Path, count: int, optimizer: str, steps: int, *options: str) -> list[float]:
    script = ["examples/train_free.py", "--config", "configs/free_transformer.yaml", f"run_dir={folder}", *options]
    script += [f"training.max_steps={steps}", f"optimizer.name={optimizer}", "training.log_every=1"]
    script += ["training.eval_every=0", "training.save_every=0", "evaluation.prior_rows=0", "training.device=cpu"]
    torchrun(count, *script, "logging.sample_every=0", "logging.tensorboard=false")
    return [line["loss"] for line in Run(folder).read_metrics() if line["split"] == "train"]


def build(processes: Processes) -> tuple[Any, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = FreeTransformer(FreeTransformerConfig(**SIZES))
    parallelize(model, processes)
    return model, build_optimizers(
        model, Settings.model_validate({"optimizer": {"name": "adamw"}}), sparse_tables=processes.size == 1
    )


def step(model: Any, optimizers: list[torch.optim.Optimizer], tokens: Tensor, processes: Processes) -> None:
    """Forward, loss, backward, clipping and AdamW."""
    backward(model, tokens, processes)
    clip_gradients(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def backward(model: Any, tokens: Tensor, processes: Processes) -> None:
    total = int(processes.sum(predicted_tokens(tokens)))
    loss = training_forward(model, {"input_ids": tokens, "labels": tokens}, total)["loss"]
    (loss * processes.data_size).backward()


def random_tokens(processes: Processes) -> Tensor:
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return tokens[processes.local_slice(BATCH)]


def measure_memory(_: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state that this process holds after a step and a backward."""
    torch.set_num_threads(1)
    with join_processes(DistributedSettings(fsdp=True), "cpu") as processes:
        model, optimizers = build(processes)
        tokens = random_tokens(processes)
        step(model, optimizers, tokens, processes)
        backward(model, tokens, processes)
        parameters = list(model.parameters())
        assert processes.size == 1 or all(isinstance(parameter, DTensor) for parameter in parameters)
        states = [value for o in optimizers for of_one in o.state.values() for value in of_one.values()]
        held = ([*parameters], [parameter.grad for parameter in parameters], states)
        sizes = [sum(local_bytes(tensor) for tensor in tensors) for tensors in held]
        return {"processes": processes.size, **dict(zip(KINDS, sizes, strict=True))}


def local_bytes(tensor: Tensor) -> int:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.numel() * tensor.element_size()


def memory_table(found: list[dict[str, float]]) -> Table:
    table = Table(
        "processes", *(f"{kind}, MB" for kind in KINDS), "total relative to one process", title="memory per process"
    )
    whole = sum(found[0][kind] for kind in KINDS)
    for each in found:
        share = sum(each[kind] for kind in KINDS) / whole
        table.add_row(str(each["processes"]), *(f"{each[kind] / 1e6:.1f}" for kind in KINDS), f"{share:.3f}")
    return table


def measure_speed(rounds: int) -> dict[str, Any]:
    """Seconds per step and bytes sent: alone, apart (each process half, without communication), sharded, replicated."""
    torch.set_num_threads(1)
    with join_processes(DistributedSettings(fsdp=True), "cpu") as sharded:
        copied = replace(sharded, mesh=torch.distributed.init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=MESH))
        alone = Processes(sharded.device)
        turns: dict[str, Callable[[], None]] = {}
        for name, processes, tokens in (
            ("alone", alone, random_tokens(alone)),
            ("apart", alone, random_tokens(sharded)),
            ("fsdp", sharded, random_tokens(sharded)),
            ("ddp", copied, random_tokens(sharded)),
        ):
            turns[name] = turn_of(*build(processes), tokens, processes)
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        sent: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(rounds + 1):
            for name, turn in turns.items():
                sharded.barrier()
                before, started = loopback_bytes(), time.perf_counter()
                if name != "alone" or sharded.main:
                    turn()
                seconds[name].append((time.perf_counter() - started) / TURN_STEPS)
                sharded.barrier()
                sent[name].append((loopback_bytes() - before) / TURN_STEPS)
        model, _ = build(alone)
        weights = sum(parameter.numel() for parameter in model.parameters())
        return {"seconds": seconds, "sent": sent, "weights": weights}


def turn_of(model: nn.Module, optimizers: Any, tokens: Tensor, processes: Processes) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(TURN_STEPS):
            step(model, optimizers, tokens, processes)

    return turn


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def speed_tables(found: dict[str, Any]) -> Iterator[Table]:
    """The first round is warm-up."""
    seconds = {name: times[1:] for name, times in found["seconds"].items()}
    table = Table("2 processes", "tokens/s, one process = 1 (range)", "communication, share of the step", title="speed")
    for name in ("apart", "fsdp", "ddp"):
        gains = [a / b for a, b in zip(seconds["alone"], seconds[name], strict=True)]
        waits = [1 - a / b for a, b in zip(seconds["apart"], seconds[name], strict=True)]
        gain = f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
        table.add_row(name, gain, "-" if name == "apart" else f"{statistics.median(waits):.0%}")
    yield table
    title = f"{found['weights'] / 1e6:.2f} M weights"
    table = Table("2 processes", "MB sent per step", "bytes per weight", title=title)
    for name in ("fsdp", "ddp"):
        sent = statistics.median(found["sent"][name][1:])
        table.add_row(name, f"{sent / 1e6:.1f}", f"{sent / found['weights']:.1f}")
    yield table


WORKERS = {"memory": measure_memory, "speed": measure_speed}


if __name__ == "__main__":
    main()
