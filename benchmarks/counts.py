"""
Counts operations of a decoding step and memory kept for the backward pass, which do not depend on the machine.

    python benchmarks/counts.py

A Llama of 6 layers of width 256 against the Free Transformer of the same shape, H = 8. Prints the two tables of
docs/performance.md. An operation is a call of an ATen operator, as `TorchDispatchMode` sees it. Views move no data and
are counted separately.
"""

from collections import Counter
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from free_transformer import FreeTransformer, FreeTransformerConfig, build_baseline
from free_transformer.model.compat import LlamaMLP, LlamaRMSNorm
from free_transformer.model.layers import MLP, RMSNorm

SHAPE = {"vocab_size": 4096, "hidden_dim": 256, "num_layers": 6, "num_heads": 4, "ffn_hidden_dim": 688}
SHORT, LONG = 20, 40  # new tokens; the difference between two lengths is the cost of the steps between them
VIEWS = {
    *("view", "_unsafe_view", "transpose", "t", "permute", "reshape", "unsqueeze", "squeeze", "expand", "slice"),
    *("select", "narrow", "split", "unbind", "alias", "detach", "as_strided", "lift_fresh"),
}


class Operations(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    config = FreeTransformerConfig(**SHAPE, latent_dim=8, max_seq_len=2048, plan_span=1)
    by_sequence = FreeTransformerConfig(**SHAPE, latent_dim=8, max_seq_len=2048, plan_span="sequence")
    return {
        "Llama": build_baseline(config),
        "one plan per token": FreeTransformer(config),
        "one plan per sequence": FreeTransformer(by_sequence),
    }


@torch.no_grad()
def decoding_step(model: Any, batch: int = 1) -> Counter[str]:
    """Operator calls of one step of `generate`, mean of 20 steps."""
    prompt, found = torch.randint(3, SHAPE["vocab_size"], (batch, 16)), []
    for new in (SHORT, LONG):
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "pad_token_id": 0}
        with Operations() as operations:
            model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        found.append(operations.calls)
    return Counter({name: (found[1][name] - found[0][name]) / (LONG - SHORT) for name in found[1]})


def kept_for_backward(model: Any, skip_logits: bool) -> int:
    """Bytes that a training step of 8 x 256 tokens keeps for its backward pass, without the weights."""
    tokens = torch.randint(3, SHAPE["vocab_size"], (8, 256))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    options = {"skip_logits": True} if skip_logits else {}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(tokens, labels=tokens, use_cache=False, **options)
    assert output.loss.isfinite()
    return sum(storages.values())


def main() -> None:
    console, found = Console(width=120), {name: decoding_step(model) for name, model in models().items()}
    table = Table("operations of a decoding step", *found, title="6 layers of width 256, batch 1")
    moving = {name: sum(n for op, n in calls.items() if op not in VIEWS) for name, calls in found.items()}
    table.add_row("that compute or copy data", *(f"{value:.0f}" for value in moving.values()))
    for operator in ("mm", "mul", "add", "cat", "copy_", "_scaled_dot_product_flash_attention_for_cpu"):
        per_operator = [calls[operator] + (calls["add_"] if operator == "add" else 0) for calls in found.values()]
        table.add_row(f"  {operator.replace('_for_cpu', '')}", *(f"{value:.0f}" for value in per_operator))
    views = {name: sum(n for op, n in calls.items() if op in VIEWS) for name, calls in found.items()}
    table.add_row("views", *(f"{value:.0f}" for value in views.values()))
    console.print(table)

    table = Table("kept for the backward pass", "MB", title="6 layers of width 256, 8 x 256 tokens")
    for name, model in models().items():
        for skip in (False, True) if name != "Llama" else (False,):
            size = kept_for_backward(model, skip) / 2**20
            table.add_row(f"{name}{', without logits' if skip else ''}", f"{size:.0f}")
    with (
        mock.patch.object(RMSNorm, "forward", LlamaRMSNorm.forward),
        mock.patch.object(MLP, "forward", LlamaMLP.forward),
    ):
        size = kept_for_backward(models()["one plan per sequence"], True) / 2**20
    table.add_row("the same with the norms and gated units of transformers", f"{size:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
