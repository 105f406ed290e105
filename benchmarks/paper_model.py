"""
The paper's 1.5B model on one accelerator, beside the Llama of the same shape: tokens/s, use of the card, memory.

bf16 by autocast, blocks compiled, AdamW, a plan a token. The rate that use is measured against is that of a large bf16
matrix product on the same card. `make bench-paper`; `--small` tries the program out on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.losses import predicted_tokens
from free_transformer.model import build_baseline
from free_transformer.training.optimizers import build_optimizers, clip_gradients
from free_transformer.training.parallel import parallelize
from free_transformer.training.processes import Processes, find_device
from free_transformer.training.settings import TrainingSettings
from free_transformer.training.step import training_forward

PAPER = {
    "hidden_dim": 1536,
    "num_layers": 28,
    "num_heads": 12,
    "num_kv_heads": 2,
    "ffn_hidden_dim": 8960,
    "vocab_size": 2**17,
    "latent_dim": 16,
    "plan_span": 1,
    "tie_embeddings": False,
}
SMALL = {**PAPER, "hidden_dim": 64, "num_layers": 4, "num_heads": 4, "ffn_hidden_dim": 176, "vocab_size": 512}
PRODUCT = 8192  # of the matrices that the card's rate is measured with


@dataclass
class Measured:
    seconds: float
    memory: int
    operations: float  # of a token, forward and backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed, after five to warm up")
    parser.add_argument("--small", action="store_true", help="a model of 0.3 M parameters, not compiled")
    options = parser.parse_args()
    device = find_device("auto")
    if device.type == "cpu" and not options.small:
        parser.error("there is no accelerator here: --small tries the program out")
    sizes = {**(SMALL if options.small else PAPER), "max_seq_len": options.length}
    config = FreeTransformerConfig(**sizes)
    found = {
        name: measure(build, config, device, options)
        for name, build in (("Llama", build_baseline), ("Free Transformer", FreeTransformer))
    }
    rate = matrix_rate(device, 256 if options.small else PRODUCT)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console = Console(width=130)
    console.print(f"{name}, torch {torch.__version__}; matrix product: {rate / 1e12:.1f} TFLOP/s in bf16")
    console.print(table_of(found, rate, options.batch * options.length))


def measure(
    build: Callable[[FreeTransformerConfig], Any], config: FreeTransformerConfig, device: torch.device, options: Any
) -> Measured:
    """Median of the steps; memory at its peak."""
    torch.manual_seed(0)
    with device:
        model = build(config)
    parallelize(model, Processes(device), compile_blocks=not options.small)
    optimizers = build_optimizers(model, TrainingSettings())
    tokens = torch.randint(config.vocab_size, (options.batch, options.length), device=device)
    batch, count = {"input_ids": tokens, "labels": tokens}, int(predicted_tokens(tokens))
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(options.steps + 5):
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = training_forward(model, batch, count)["loss"]
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Measured(statistics.median(seconds[5:]), memory, operations(model, config, options.length))


def operations(model: Any, config: FreeTransformerConfig, length: int) -> float:
    """
    Operations of a token, forward and backward: six a weight of every matrix that multiplies each token, and causal
    attention's products; the encoder's attention sees all tokens, and its query is one product for all of them.
    """
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * 2 * length * config.num_attention_heads * config.head_dim
    total = 6 * matrices + 3 * attention / 2 * config.num_hidden_layers
    if isinstance(model, FreeTransformer):
        total += 3 * attention - 6 * model.encoder.attention.q_proj.weight.numel()
    return total


def matrix_rate(device: torch.device, size: int) -> float:
    """Operations a second of a bf16 product of square matrices, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize(device)
        best = min(best, (time.perf_counter() - started) / 5)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table_of(found: dict[str, Measured], rate: float, tokens: int) -> Table:
    llama = found["Llama"]
    table = Table("model", "tokens/s", "use of the card", "peak memory, GB", "time, Llama = 1", "operations, Llama = 1")
    for name, each in found.items():
        use = each.operations * tokens / each.seconds / rate
        table.add_row(
            *(name, f"{tokens / each.seconds:,.0f}", f"{use:.1%}", f"{each.memory / 1e9:.1f}"),
            *(f"{each.seconds / llama.seconds:.3f}", f"{each.operations / llama.operations:.3f}"),
        )
    return table


if __name__ == "__main__":
    main()
