"""
Profiles a training step of `LlamaForCausalLM`, of a Free Transformer with its layers, and of this library.

6 layers of width 256, 8 x 256 tokens, H = 8, fp32; milliseconds per step by kind of operation, medians of profiled
steps in turns. The table of docs/performance.md: make profile
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from comparison import SMALL, spec
from contestants import Free, Llama
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

from free_transformer.model import attention
from free_transformer.model.layers import MLP, RMSNorm

SPEC = spec(SMALL, 8)
KINDS = {
    "matmuls": ("mm", "addmm", "addmm_", "bmm", "linear"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "loss": ("_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward", "exp_", "amax"),
    "elementwise products and sums": ("mul", "mul_", "add", "add_", "sub_", "div", "neg", "addcmul", "addcmul_"),
    "powers and gates": ("pow", "rsqrt", "rsqrt_", "silu", "silu_backward", "sigmoid"),
    "row sums": ("sum", "mean", "linalg_vector_norm", "addmv_", "mv"),
    "copies": ("copy_", "cat", "fill_", "zero_", "roll", "index_select", "clone"),
    "AdamW": ("_fused_adamw_",),
}


class LikeTransformers(Free):
    """This library with norms, rotations, gates and loss computed as in `transformers` ("before")."""

    def loss(self, tokens: Tensor) -> Tensor:
        with as_in_transformers():
            return self.model(tokens, labels=tokens, mode="training").loss


@contextlib.contextmanager
def as_in_transformers() -> Iterator[None]:
    def rotate(states: Tensor, rotation: attention.Rotation) -> Tensor:
        cos, sin = rotation
        half = sin.shape[-1] // 2
        return states * cos + rotate_half(states) * sin[..., half:].repeat(1, 1, 1, 2)

    with (
        mock.patch.object(RMSNorm, "forward", LlamaRMSNorm.forward),
        mock.patch.object(MLP, "forward", LlamaMLP.forward),
        mock.patch.object(attention, "rotate", rotate),
    ):
        yield


def milliseconds(step: Callable[[], None]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiled.key_averages():
        found[kind_of.get(event.key, "other")] += event.self_cpu_time_total / 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="number of profiled steps of each")
    options = parser.parse_args()
    contestants = {"Llama": Llama(SPEC), "before": LikeTransformers(SPEC), "now": Free(SPEC)}
    contestants["one plan per sequence"] = Free({**SPEC, "span": "sequence"})
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for turn in range(options.rounds + 1):
        for name, contestant in contestants.items():
            found = milliseconds(contestant.train_step)
            if turn:
                taken[name].append(found)
    table = Table(title=f"ms per step, {torch.get_num_threads()} threads, medians of {options.rounds}")
    for column in ("", *contestants):
        table.add_column(column, justify="right" if column else "left")
    for kind in [*KINDS, "other", "all"]:
        of_kind = {
            name: statistics.median(sum(each.values()) if kind == "all" else each[kind] for each in steps)
            for name, steps in taken.items()
        }
        table.add_row(kind, *(f"{value:.0f}" for value in of_kind.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
