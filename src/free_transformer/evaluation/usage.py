"""
Plan usage: how many bits the plan uses, how many differ between texts, and warnings if it is not used.

The warnings give the reason. For what to change in the settings of a run, see `runs.diagnostics.plan_advice`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from free_transformer.model.losses import kl_bits_per_bit

if TYPE_CHECKING:
    from free_transformer.evaluation.likelihood import Likelihood

LIVE_BITS = 0.05  # a bit whose KL exceeds this, in bits, is live
FLOOR_MARGIN = 1.02  # a plan counts as being at the floor up to this multiple of its free bits
EPSILON = 1e-12
SPENT_SHARE = 0.1  # warn if a plan uses less than this share of its free bits
MIN_INFORMATION_SHARE = 0.1  # warn if less than this share of the bits used differs between texts
MIN_GAIN_BITS = 0.1  # per text: warn if the plan improves the prediction by less


@dataclass
class PlanUsage:
    """
    Attributes:
        bits_used: KL in bits per plan.
        bits_per_position: KL of each of the H bits, in bits per plan.
        live_bits: number of bits with a KL above 0.05.
        share_at_floor: share of plans whose KL does not exceed the free bits and is therefore not penalized.
        information: upper bound of the mutual information of plan and text, in bits per plan. The rest of `bits_used`
            is the same for all plans and carries no information about the text.
    """

    bits_used: float
    bits_per_position: list[float]
    live_bits: int
    share_at_floor: float
    information: float


def plan_usage(plan_logits: Tensor, free_bits: float) -> PlanUsage:
    """
    Computes plan usage from the posterior's logits of N plans, (N, H).

    The KL of a bit is 1 - H(p). Its mean over plans is the sum of 1 - H(mean p), which is common to all plans, and
    H(mean p) - mean H(p), the mutual information of bit and text. The sum of the latter over bits is an upper bound of
    the mutual information of plan and text.

    Args:
        free_bits: KL per plan that is not penalized, in bits.
    """
    per_bit = kl_bits_per_bit(plan_logits)
    per_position = per_bit.mean(0)
    return PlanUsage(
        bits_used=float(per_position.sum()),
        bits_per_position=per_position.tolist(),
        live_bits=int((per_position > LIVE_BITS).sum()),
        share_at_floor=float((per_bit.sum(-1) <= free_bits * FLOOR_MARGIN).float().mean()),
        information=max(0.0, float(information_per_bit(plan_logits).sum())),
    )


def information_per_bit(plan_logits: Tensor) -> Tensor:
    """Mutual information of each bit and the text from the logits of N plans, (N, H) -> (H,), in bits per plan."""
    shared = kl_bits_per_bit(plan_logits.double().sigmoid().mean(0).logit(EPSILON))
    return kl_bits_per_bit(plan_logits).double().mean(0) - shared


def live_threshold(free_bits: float, num_bits: int) -> float:
    """Returns the minimum KL of a live bit, in bits per plan. It is lower if there are few free bits per bit."""
    return LIVE_BITS if free_bits == 0 else min(LIVE_BITS, SPENT_SHARE * free_bits / num_bits)


def usage_warning(likelihood: "Likelihood") -> str | None:
    """
    Returns the reason if the plan is not used, otherwise None.

    A KL above zero is not sufficient. The decoder may ignore the plan: then a random plan predicts equally well, so
    there is no gap between `prior` and `reconstruction`. Or all texts may share one plan: then there is a gap, because
    other plans are out of distribution for the decoder, but the plan carries no information.
    """
    if likelihood.gap is None or likelihood.kl is None:
        return None
    gap_bits = likelihood.gap / math.log(2) * likelihood.tokens / likelihood.documents
    error = likelihood.standard_errors.get("gap", 0.0)
    if math.isnan(error):  # a single document has no standard error
        error = 0.0
    if likelihood.gap <= 2 * error or gap_bits < MIN_GAIN_BITS:
        return (
            f"the plan is not used: a random plan predicts as well as the text's own (gap {likelihood.gap:.4f} ± "
            f"{error:.4f} nats per token), although its KL is {likelihood.kl:.2f} bits per plan"
        )
    usage = likelihood.usage
    if usage is not None and likelihood.documents > 1 and usage.information < MIN_INFORMATION_SHARE * usage.bits_used:
        return (
            f"the plan carries no information: all texts have the same plan; only {usage.information:.3f} of its "
            f"{usage.bits_used:.2f} bits differ between them"
        )
    return None


def collapse_warning(likelihood: "Likelihood", free_bits: float) -> str | None:
    """
    Returns `usage_warning`, or an early warning if the posterior leaves most of its free bits unused.

    Args:
        free_bits: KL that is not penalized at the current step, in bits per plan.
    """
    if (warning := usage_warning(likelihood)) is not None or likelihood.usage is None:
        return warning
    usage = likelihood.usage
    found = []
    if usage.bits_used < SPENT_SHARE * free_bits:
        found.append(f"the plan uses {usage.bits_used:.3f} of its {free_bits:g} free bits")
    threshold = live_threshold(free_bits, len(usage.bits_per_position))
    if max(usage.bits_per_position) < threshold:
        found.append(f"no bit of the plan is live (above {threshold:.3g} bits)")
    return " and ".join(found) or None
