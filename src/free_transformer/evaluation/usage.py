"""Whether the plan is used: bits spent, bits alive, and the gap that alone proves anything."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from free_transformer.losses import kl_bits_per_bit

if TYPE_CHECKING:
    from free_transformer.evaluation.likelihood import Likelihood

LIVE_BITS = 0.05  # a bit that spends more than this, in bits, is alive
FLOOR_MARGIN = 1.02
SPENT_SHARE = 0.1  # of the free bits: a plan that spends less is far under them
LEAST_GAIN_BITS = 0.1  # per text: under this its plans are as good as none

ADVICE = (
    "raise model.free_bits (1 to 2 bits), lower training.kl_weight, keep table_init=bit_linear, "
    "give a plan more tokens (plan_span: sequence) or fewer bits (latent_dim)"
)


@dataclass
class PlanUsage:
    """
    Attributes:
        bits_used: KL in bits per plan.
        bits_per_position: KL of each of the H bits.
        live_bits: bits that spend more than 0.05.
        share_at_floor: share of plans whose KL is at or under the free bits: those cost nothing.
    """

    bits_used: float
    bits_per_position: list[float]
    live_bits: int
    share_at_floor: float


def plan_usage(plan_logits: Tensor, free_bits: float) -> PlanUsage:
    """From the posterior's logits of N plans, (N, H)."""
    per_bit = kl_bits_per_bit(plan_logits)
    per_position = per_bit.mean(0)
    return PlanUsage(
        bits_used=float(per_position.sum()),
        bits_per_position=per_position.tolist(),
        live_bits=int((per_position > LIVE_BITS).sum()),
        share_at_floor=float((per_bit.sum(-1) <= free_bits * FLOOR_MARGIN).float().mean()),
    )


def usage_warning(likelihood: "Likelihood") -> str | None:
    """
    What to tell someone whose plan is not used, else None.

    KL above zero proves nothing: a posterior can spend bits that the decoder ignores. What counts is what the text
    loses when its own plan is replaced by another: the gap prior - reconstruction.
    """
    if likelihood.gap is None or likelihood.kl is None:
        return None
    gap_bits = likelihood.gap / math.log(2) * likelihood.tokens / likelihood.documents
    error = likelihood.standard_errors.get("gap", 0.0)
    if math.isnan(error):  # of a single document
        error = 0.0
    if likelihood.gap > 2 * error and gap_bits >= LEAST_GAIN_BITS:
        return None
    return (
        f"the plan is not used: a random plan predicts as well as the text's own (gap {likelihood.gap:.4f} ± "
        f"{error:.4f} nats a token), though its KL is {likelihood.kl:.2f} bits a plan. Try: {ADVICE}"
    )


def collapse_warning(likelihood: "Likelihood", free_bits: float) -> str | None:
    """
    As `usage_warning`, and sooner: a posterior that leaves most of its free bits unspent is dying.

    Args:
        free_bits: those of the step, bits per plan.
    """
    if (warning := usage_warning(likelihood)) is not None or likelihood.usage is None:
        return warning
    usage = likelihood.usage
    found = []
    if usage.bits_used < SPENT_SHARE * free_bits:
        found.append(f"the plan spends {usage.bits_used:.3f} of the {free_bits:g} bits that are free")
    alive = LIVE_BITS if free_bits == 0 else min(LIVE_BITS, SPENT_SHARE * free_bits / len(usage.bits_per_position))
    if max(usage.bits_per_position) < alive:
        found.append(f"no bit of the plan is alive (over {alive:.3g} bits)")
    return f"{' and '.join(found)}. Try: {ADVICE}" if found else None
