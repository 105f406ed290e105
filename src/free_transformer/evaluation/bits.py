"""What each bit of the plan does to the next token."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from free_transformer.evaluation.plan_ops import flip_bit
from free_transformer.model.losses import kl_bits_per_bit
from free_transformer.model.modeling import FreeTransformer


@dataclass
class BitEffect:
    """
    Attributes:
        spent: KL of the bit's posterior from a fair coin, bits per plan.
        effect: divergence of the next-token distribution from the one with the bit flipped, nats per token.
        standard_error: of `effect`, rows being the units; NaN for a single row.
    """

    bit: int
    spent: float
    effect: float
    standard_error: float


@torch.no_grad()
def bit_effects(model: FreeTransformer, batches: Iterable[Mapping[str, Tensor]]) -> list[BitEffect]:
    """
    Flips each bit of the likeliest plans of these texts, in all plans of a text at once, and asks how much the
    prediction of every token changes: KL(p(token | plan) ‖ p(token | flipped plan)).

    Args:
        batches: dicts with `input_ids` and optional `attention_mask` and `position_ids`.

    Raises:
        ValueError: where there is no text.
    """
    effects, spent = [], []
    for batch in batches:
        inputs: dict[str, Any] = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
        lower = model.lower_layers(**inputs)
        assert lower.layout is not None
        plan_logits = model.encode(lower)
        plan = plan_logits > 0
        spent.append(kl_bits_per_bit(plan_logits[lower.layout.plan_mask]))
        mask = lower.layout.token_mask
        counted = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask
        before = model.upper_layers(lower, plan).float().log_softmax(-1)
        per_bit = []
        for bit in range(plan.shape[-1]):
            after = model.upper_layers(lower, flip_bit(plan, bit)).float().log_softmax(-1)
            divergence = (before.exp() * (before - after)).sum(-1)
            per_bit.append((divergence * counted).sum(1) / counted.sum(1).clamp(min=1))
        effects.append(torch.stack(per_bit, 1))
    if not effects:
        raise ValueError("there is no text to flip bits in")
    rows, used = torch.cat(effects).double(), torch.cat(spent).mean(0)
    errors = rows.std(0) / len(rows) ** 0.5 if len(rows) > 1 else torch.full_like(rows[0], float("nan"))
    return [
        BitEffect(bit, float(used[bit]), float(rows[:, bit].mean()), float(errors[bit])) for bit in range(len(used))
    ]
