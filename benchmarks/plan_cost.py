"""
Cost of the plan: time and memory of a training step relative to `LlamaForCausalLM` of the same shape, in one run.

Times are medians over rounds, in each of which every contestant takes one turn. Memory is the peak growth of a fresh
process over three steps (Linux, glibc), each larger tensor mapped by itself: what the heap's fragments add differs by a
tenth from run to run. The tables of docs/plan-cost.md: make bench-plan
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contestants import status
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from free_transformer import BinaryMapper, FreeTransformer, FreeTransformerConfig, PlanTable
from free_transformer.model.initialization import build_baseline
from free_transformer.model.losses import free_bits_hinge, kl_bits, predicted_tokens
from free_transformer.model.straight_through import exact_gradient
from free_transformer.settings import Settings
from free_transformer.training.optimizers import LARGE_TABLE, RowAdamW, build_optimizers
from free_transformer.training.step import training_forward

WIDTH, LAYERS, HEADS = 256, 6, 4
BATCH, LENGTH = 8, 256
PLANS = BATCH * LENGTH
BLOCK = 4096  # rows per block of the raw matmul; computing the whole result at once is slower
MEMORY_STEPS = 3
MEMORY_PROCESSES = 3


@dataclass
class Variant:
    """A model of the comparison. Without bits it is the Llama."""

    name: str
    latent_dim: int = 0
    gradient: str = "auto"
    table_optimizer: str = "auto"

    @property
    def config(self) -> FreeTransformerConfig:
        return FreeTransformerConfig(
            hidden_dim=WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            max_seq_len=LENGTH,
            latent_dim=self.latent_dim or 8,
            plan_span=1,
            plan_gradient=self.gradient,
        )

    def build(self) -> tuple[Any, list[torch.optim.Optimizer]]:
        model = FreeTransformer(self.config) if self.latent_dim else build_baseline(self.config)
        return model, build_optimizers(
            model, Settings.model_validate({"optimizer": {"name": "adamw", "codebook": self.table_optimizer}})
        )


LLAMA = Variant("Llama")
FREE = [
    Variant("H = 8, exact", 8, "exact"),
    Variant("H = 12, exact", 12, "exact"),
    Variant("H = 12, sampled", 12, "sampled"),
    Variant("H = 16, exact", 16, "exact"),
    Variant("H = 16, sampled", 16, "sampled"),
    Variant("H = 16, sampled, codebook by AdamW", 16, "sampled", "adamw"),
    Variant("64 bits in groups of 8, exact", 64, "exact"),
    Variant("64 bits in groups of 8, sampled", 64, "sampled"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant, after one warm-up turn")
    parser.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # used by a fresh process
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure_memory(next(v for v in [LLAMA, *FREE] if v.name == options.memory_of))))
        return
    console = Console(width=150)
    console.print(
        f"{LAYERS} layers of width {WIDTH}, {BATCH} x {LENGTH} tokens, one plan per token, vocabulary "
        f"{LLAMA.config.vocab_size}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    memory = {v.name: memory_in_fresh_process(v.name, options) for v in track([LLAMA, *FREE], "memory")}
    times = measure_times(options.rounds)
    console.print(step_table(times, memory))
    console.print(count_table())
    console.print(product_table(times))
    console.print(optimizer_table(times))


def measure_times(rounds: int) -> dict[str, float]:
    """Median seconds of a turn. Memory is freed between turns."""
    turns: dict[str, Callable[[], object]] = {"bare": bare_product(), "product": exact_product()}
    for variant in [LLAMA, *FREE]:
        turns[f"step {variant.name}"] = training_step(variant)
        if variant.latent_dim:
            turns[f"plan {variant.name}"] = plan_part(variant)
    for name in ("adamw", "sparse_adam"):
        turns[f"table {name}"] = table_step(name)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in track(range(rounds + 1), "time"):
        for name, run in turns.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def training_step(variant: Variant) -> Callable[[], None]:
    torch.manual_seed(0)
    model, optimizers = variant.build()
    return step_on(model, optimizers, torch.randint(0, 256, (BATCH, LENGTH)))


def step_on(model: Any, optimizers: list[torch.optim.Optimizer], tokens: Tensor) -> Callable[[], None]:
    """Forward, backward and optimizers, as in the training loop."""
    batch = {"input_ids": tokens, "labels": tokens}

    def step() -> None:
        training_forward(model, batch, int(predicted_tokens(tokens)))["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def plan_part(variant: Variant) -> Callable[[], None]:
    """Mapper, codebook, straight-through gradient and KL, forward and backward: the step without encoder and layers."""
    torch.manual_seed(0)
    config = variant.config
    mapper = BinaryMapper()
    table = PlanTable(config.group_bits, WIDTH, config.plan_gradient, config.plan_chunk_bytes)
    table.sparse = len(table.weight) > LARGE_TABLE and variant.table_optimizer != "adamw"
    logits = torch.randn(BATCH, LENGTH, config.latent_dim, requires_grad=True)
    grad = torch.randn(BATCH, LENGTH, WIDTH)

    def run() -> None:
        states = table(mapper(logits.detach()), logits)
        hinge = free_bits_hinge(kl_bits(logits), config.free_bits).sum()
        torch.autograd.backward([states, hinge], [grad, torch.ones(())])
        logits.grad = table.weight.grad = None

    return run


def bare_product() -> Callable[[], None]:
    """A raw matmul of 2 N D 2^16 FLOPs, the lower bound of the exact gradient."""
    grad, table, out = torch.randn(PLANS, WIDTH), torch.randn(2**16, WIDTH), torch.empty(PLANS, BLOCK)

    def run() -> None:
        for rows in table.split(BLOCK):
            torch.mm(grad, rows.T, out=out)

    return run


def exact_product() -> Callable[[], Tensor]:
    grad, table, logits = torch.randn(PLANS, WIDTH), torch.randn(2**16, WIDTH), torch.randn(PLANS, 16)
    return lambda: exact_gradient(grad, logits, table, [16], LLAMA.config.plan_chunk_bytes)


def table_step(optimizer: str) -> Callable[[], None]:
    """The lookup's gradient and the optimizer step of a codebook of 2^16 rows."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(2**16, WIDTH))
    sparse = optimizer == "sparse_adam"
    update = RowAdamW([{"params": [weight], "by_row": sparse}], fused=True)
    codes, grad = torch.randint(0, 2**16, (PLANS, 1)), torch.randn(PLANS, WIDTH)

    def run() -> None:
        F.embedding_bag(codes, weight, mode="sum", sparse=sparse).backward(grad)
        update.step()
        update.zero_grad()

    return run


def measure_memory(variant: Variant) -> dict[str, int]:
    """Bytes: peak growth since before the model was built, and the codebook's weights and optimizer state."""
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step = training_step(variant)
    for _ in range(MEMORY_STEPS):
        step()
    table = 0
    if variant.latent_dim:
        weights = sum(2**bits for bits in variant.config.group_bits) * WIDTH * 4
        table = 3 * weights  # Adam, sparse or not, keeps two values per weight
    return {"peak": status("VmHWM") - before, "table": table}


def memory_in_fresh_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Medians over processes."""
    command = [sys.executable, __file__, "--memory-of", name]
    command += ["--threads", str(options.threads)] if options.threads else []
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = [subprocess.check_output(command, text=True, env=environment) for _ in range(MEMORY_PROCESSES)]
    found = [json.loads(each) for each in processes]
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def step_table(times: dict[str, float], memory: dict[str, dict[str, float]]) -> Table:
    table = Table(title="training step; plan part: mapper, codebook, straight-through, KL, forward and backward")
    for column in (
        "",
        "time, Llama = 1",
        "plan part of its step",
        "memory without codebook, Llama = 1",
        "MB",
        "table MB",
    ):
        table.add_column(column, justify="left" if not column else "right")
    llama, least = times["step Llama"], memory["Llama"]["peak"]
    for variant in [LLAMA, *FREE]:
        step, used = times[f"step {variant.name}"], memory[variant.name]
        plan = times.get(f"plan {variant.name}")
        rest = used["peak"] - used["table"]
        table.add_row(
            variant.name,
            f"{step / llama:.2f}" if plan else f"1 ({step * 1e3:.0f} ms)",
            f"{100 * plan / step:.2f} %" if plan else "",
            f"{rest / least:.2f}",
            f"{rest / 1e6:.0f}",
            f"{used['table'] / 1e6:.0f}",
        )
    return table


def count_table() -> Table:
    """Counted FLOPs and bytes: products with all rows, or with the sampled and flipped rows only."""
    table = Table(
        title=f"counted, {PLANS} plans: FLOPs of the straight-through gradient, and bytes of the rows that it reads"
    )
    for column in ("", "GFLOP", "share of the Llama's", "MB"):
        table.add_column(column, justify="left" if not column else "right")
    llama = LLAMA.build()[0]
    of_step = 6 * PLANS * sum(p.numel() for n, p in llama.named_parameters() if "embed_tokens" not in n)
    of_step += 12 * LAYERS * BATCH * LENGTH**2 * WIDTH  # attention: two matmuls, forward and twice backward
    for variant in FREE:
        if variant.table_optimizer != "auto":
            continue
        groups = variant.config.group_bits
        exact = variant.config.plan_gradient == "exact"
        rows = sum(2**bits for bits in groups)
        read = rows if exact else PLANS * (variant.latent_dim + len(groups))
        operations = 2 * WIDTH * (PLANS * rows if exact else read)
        cells = f"{operations / 1e9:.3f}", f"{100 * operations / of_step:.2f} %", f"{read * WIDTH * 4 / 1e6:.1f}"
        table.add_row(variant.name, *cells)
    table.add_row("the Llama's step", f"{of_step / 1e9:.1f}", "100 %", "")
    return table


def product_table(times: dict[str, float]) -> Table:
    operations = 2 * PLANS * WIDTH * 2**16
    table = Table(title=f"exact gradient, H = 16: {operations / 1e9:.1f} GFLOP")
    for column in ("", "raw matmul = 1", "Llama's step = 1", "GFLOP/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in (("bare", "raw matmul"), ("product", "exact gradient")):
        seconds = times[name]
        table.add_row(
            label,
            f"{seconds / times['bare']:.2f}",
            f"{seconds / times['step Llama']:.2f}",
            f"{operations / seconds / 1e9:.0f}",
        )
    return table


def optimizer_table(times: dict[str, float]) -> Table:
    table = Table(title="codebook, H = 16: gradient of the lookup and optimizer step")
    for column in ("", "share of Llama's step", "gradient MB", "state MB"):
        table.add_column(column, justify="left" if not column else "right")
    size = 2**16 * WIDTH * 4
    for name, gradient in (("adamw", size), ("sparse_adam", PLANS * (WIDTH * 4 + 8))):
        share = 100 * times[f"table {name}"] / times["step Llama"]
        table.add_row(name, f"{share:.1f} %", f"{gradient / 1e6:.1f}", f"{2 * size / 1e6:.0f}")
    return table


if __name__ == "__main__":
    main()
