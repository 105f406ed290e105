"""
Estimates memory and communication of a run on many GPUs from sizes.

A Llama of 8B with a plan of 16 bits, trained with `fully_shard`, bf16, activation checkpointing and AdamW. Bytes per
weight are measured by `make bench-scaling`. Rates are assumptions, set by options. make bench-scaling
"""

import argparse
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from free_transformer import FreeTransformer, FreeTransformerConfig

LLAMA_8B = {
    "hidden_dim": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "ffn_hidden_dim": 14336,
    "vocab_size": 128256,
    "max_seq_len": 4096,
    "latent_dim": 16,
    "tie_embeddings": False,
}
STATE = 16  # bytes per weight: fp32 weight, gradient and AdamW's two moments
GATHERED, REDUCED = 2, 4  # bytes per weight: gathered in bf16, gradients summed in fp32
INSIDE_BLOCK = 34  # bytes per token and unit of width, of the one recomputed block (Korthikanti et al. 2022)
LOGITS = 10  # bytes per logit: bf16, fp32, and the fp32 gradient
GB = 1e9


@dataclass
class Sizes:
    """Numbers of weights."""

    all: int
    block: int
    head: int
    table: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per GPU and step")
    parser.add_argument("--row", type=int, default=4096, help="tokens that a GPU processes at a time")
    parser.add_argument("--network", type=float, default=50, help="GB/s per GPU between machines")
    parser.add_argument("--link", type=float, default=450, help="GB/s per GPU inside a machine of 8")
    parser.add_argument("--rate", type=float, default=989 * 0.45, help="TFLOP/s that a GPU reaches")
    options = parser.parse_args()
    with torch.device("meta"):
        config = FreeTransformerConfig(**LLAMA_8B)
        model = FreeTransformer(config)
    sizes = Sizes(*map(count, (model, model.model.layers[0], model.lm_head, model.plan_table)))
    console = Console(width=120)
    console.print(
        f"{sizes.all / GB:.2f} B weights, {sizes.table / GB:.2f} B of them the codebook; {options.tokens} tokens per "
        f"GPU and step, {options.row} at a time; assumed: {options.network:g} GB/s between machines of 8, "
        f"{options.link:g} GB/s inside, {options.rate:.0f} TFLOP/s used"
    )
    table = Table("", *(f"sharded over {shards}" for shards in (options.gpus, 8)))
    columns = [needs(sizes, config, options, shards) for shards in (options.gpus, 8)]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def needs(sizes: Sizes, config: FreeTransformerConfig, options: argparse.Namespace, shards: int) -> dict[str, str]:
    """One column: the model sharded over a number of GPUs, with a copy for each such group."""
    state = STATE * sizes.all / shards
    units = GATHERED * (2 * sizes.block + sizes.head)  # a block and the next, and the head, which stays
    reducing = (GATHERED + REDUCED) * sizes.head  # gradients of the largest unit, before they are scattered
    kept = 2 * config.num_hidden_layers * options.row * config.hidden_size
    inside = INSIDE_BLOCK * options.row * config.hidden_size + LOGITS * options.row * config.vocab_size
    replicas, times = options.gpus // shards, options.tokens // options.row
    sharding = times * (2 * GATHERED + REDUCED) * sizes.all * (shards - 1) / shards
    copying = 2 * REDUCED * sizes.all / shards * (replicas - 1) / replicas
    inside_machine = shards <= 8
    seconds = sharding / GB / (options.link if inside_machine else options.network) + copying / GB / options.network
    matrices = sizes.all - sizes.table - sizes.head  # embedding and codebook are looked up
    work = 8 * matrices * options.tokens / (options.rate * 1e12)
    return {
        "weights, gradients, AdamW, GB": f"{state / GB:.1f}",
        "gathered at a time, bf16, GB": f"{units / GB:.1f}",
        "gradients in transit, GB": f"{reducing / GB:.1f}",
        "activations kept, GB": f"{kept / GB:.1f}",
        "inside a block, and logits, GB": f"{inside / GB:.1f}",
        "memory per GPU, GB": f"{(state + units + reducing + kept + inside) / GB:.0f}",
        "sent for sharding per step, GB": f"{sharding / GB:.0f}",
        "sent between copies per step, GB": f"{copying / GB:.1f}",
        "seconds of communication": f"{seconds:.2f}",
        "seconds of computation (6 + 2 FLOPs per weight and token)": f"{work:.2f}",
    }


if __name__ == "__main__":
    main()
