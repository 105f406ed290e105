"""Measures the effect of each bit of the plan on the next-token distribution."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from free_transformer.errors import InputError
from free_transformer.evaluation.inputs import run_lower_layers
from free_transformer.evaluation.plan_ops import flip_bit
from free_transformer.evaluation.usage import (
    MIN_GAIN_BITS,
    MIN_INFORMATION_SHARE,
    information_per_bit,
    live_threshold,
)
from free_transformer.model.losses import kl_bits_per_bit
from free_transformer.model.modeling import FreeTransformer


@dataclass
class BitEffect:
    """
    Attributes:
        bit: index of the bit in the plan.
        spent: KL divergence of the bit's posterior from the uniform prior, in bits per plan.
        effect: KL divergence of the next-token distribution from the one with the bit flipped, in nats per token.
        standard_error: standard error of `effect` over rows. NaN for a single row.
        dead: reason why the bit carries no information about the text, None for a live bit. `"no text sets it"`:
            its KL is below 0.05 bits, or a tenth of the free bits per bit if that is less. `"same value in all texts"`:
            less than a tenth of its KL differs between texts. `"flipping it changes nothing"`: less than 0.1 bits per
            row.
    """

    bit: int
    spent: float
    effect: float
    standard_error: float
    dead: str | None = None


@torch.no_grad()
def bit_effects(model: FreeTransformer, batches: Iterable[Mapping[str, Tensor]]) -> list[BitEffect]:
    """
    Measures how flipping a bit changes the prediction of each token: KL(p(token | plan) ‖ p(token | flipped plan)).

    It flips one bit of the most likely plans of these texts at a time, in all plans of a text at once.

    Args:
        batches: dicts with `input_ids` and optional `attention_mask` and `position_ids`, (B, T) each.

    Raises:
        InputError: if there are no batches.
    """
    effects, logits, tokens = [], [], 0
    for batch in batches:
        inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
        lower = run_lower_layers(model, inputs)
        assert lower.layout is not None
        plan_logits = model.encode(lower)
        plan = plan_logits > 0
        logits.append(plan_logits[lower.layout.plan_mask])
        mask = lower.layout.token_mask
        counted = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask
        tokens += int(counted.sum())
        before = model.upper_layers(lower, plan).float().log_softmax(-1)
        per_bit = []
        for bit in range(plan.shape[-1]):
            after = model.upper_layers(lower, flip_bit(plan, bit)).float().log_softmax(-1)
            divergence = (before.exp() * (before - after)).sum(-1)
            per_bit.append((divergence * counted).sum(1) / counted.sum(1).clamp(min=1))
        effects.append(torch.stack(per_bit, 1))
    if not effects:
        raise InputError("there are no batches: measuring the effect of bits needs text")
    rows, plan_logits = torch.cat(effects).double(), torch.cat(logits)
    used, information = kl_bits_per_bit(plan_logits).mean(0), information_per_bit(plan_logits)
    errors = rows.std(0) / len(rows) ** 0.5 if len(rows) > 1 else torch.full_like(rows[0], float("nan"))
    found = []
    for bit, effect in enumerate(rows.mean(0).tolist()):
        spent = float(used[bit])
        differs = float(information[bit]) if len(plan_logits) > 1 else spent
        per_row = effect * tokens / len(rows) / math.log(2)
        dead = _dead(spent, differs, per_row, live_threshold(float(model.config.free_bits or 0), len(used)))
        found.append(BitEffect(bit, spent, effect, float(errors[bit]), dead))
    return found


def _dead(spent: float, information: float, effect: float, threshold: float) -> str | None:
    """
    Returns the reason for `BitEffect.dead`.

    Args:
        spent, information: in bits per plan.
        effect: effect of a flip, in bits per row.
        threshold: minimum KL of a live bit, in bits per plan.
    """
    if spent < threshold:
        return "no text sets it"
    if information < MIN_INFORMATION_SHARE * spent:
        return "same value in all texts"
    if effect < MIN_GAIN_BITS:
        return "flipping it changes nothing"
    return None
