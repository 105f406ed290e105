"""
Attention within a sliding window: blocks compared with a mask of all tokens and with full attention.

Milliseconds of one layer's attention and of a training step of the demo's model (forward and backward, fp32), medians
of rounds in turns: python benchmarks/sliding_window.py [--length 1024] [--windows 32 64 128]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.model import masks
from free_transformer.model.attention import SplitAttention, rotary

DEMO = {"hidden_dim": 128, "num_layers": 4, "num_heads": 4, "latent_dim": 8}
TOKENS = 4096  # tokens per batch


def medians(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(each[1:]) for name, each in times.items()}


def measure(window: int, length: int, rounds: int) -> list[dict[str, float]]:
    """Times of one layer's attention and of a training step."""
    tokens = torch.randint(256, (max(1, TOKENS // length), length))
    models = {
        name: FreeTransformer(FreeTransformerConfig(**DEMO, sliding_window=value, max_seq_len=length)).train()
        for name, value in (("full", None), ("mask", window), ("blocks", window))
    }
    states = torch.randn(*tokens.shape, DEMO["hidden_dim"], requires_grad=True)

    def mask_of(name: str) -> tuple[torch.Tensor | None, dict]:
        with mock.patch.object(masks, "window_blocks", masks.window_blocks if name == "blocks" else no_blocks):
            return masks.causal_mask(models[name].config, states, None)

    def attend(name: str) -> None:
        layer: SplitAttention = models[name].model.layers[0].self_attn
        mask, own = mask_of(name)
        rotation = rotary(models[name].model.rotary_emb, states, torch.arange(length)[None])
        layer(states, rotation, mask, **own)[0].sum().backward()

    def train(name: str) -> None:
        with mock.patch.object(masks, "window_blocks", masks.window_blocks if name == "blocks" else no_blocks):
            models[name](tokens, labels=tokens, skip_logits=True).loss.backward()

    return [medians({name: partial(run, name) for name in models}, rounds) for run in (attend, train)]


def no_blocks(*_: object) -> None:
    """Replaces `window_blocks` by a mask of T x T values."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[1024])
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    table = Table(title=f"Forward and backward of {TOKENS:,} tokens, ms: attention of a layer / training step")
    for name in ("length", "window", "full attention", "mask", "blocks"):
        table.add_column(name, justify="right")
    for length in options.length:
        for window in options.windows:
            attention, step = measure(window, length, options.rounds)
            cells = [f"{attention[name]:.0f} / {step[name]:.0f}" for name in attention]
            table.add_row(f"{length:,}", str(window), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
