"""Whether the plan is used: what it spends, what of that differs from text to text, what the text loses without it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from free_transformer.model.losses import kl_bits_per_bit

if TYPE_CHECKING:
    from free_transformer.evaluation.likelihood import Likelihood

LIVE_BITS = 0.05  # a bit that spends more than this, in bits, is alive
FLOOR_MARGIN = 1.02
EPSILON = 1e-12
SPENT_SHARE = 0.1  # of the free bits: a plan that spends less is far under them
LEAST_SHARE = 0.1  # of the bits spent: a plan of which less differs between texts is as good as the same for all
LEAST_GAIN_BITS = 0.1  # per text: under this its plans are as good as none

ADVICE = (
    "raise model.free_bits (1 to 2 bits), lower training.kl_weight, keep table_init=bit_linear, "
    "give a plan more tokens (plan_span: sequence) or fewer bits (latent_dim)"
)
ADVICE_COMMON = (
    "model.aggregate_weight from 1 on, which makes bits that all texts share cost, with model.min_bits a little under "
    "model.free_bits and training.optimizer=muon"
)


@dataclass
class PlanUsage:
    """
    Attributes:
        bits_used: KL in bits per plan.
        bits_per_position: KL of each of the H bits.
        information: bits per plan that differ from plan to plan, at most: what the plan can tell of its text. The
            rest of `bits_used` is the same for all of them, as where every text takes one plan: it says nothing.
        live_bits: bits that spend more than 0.05.
        share_at_floor: share of plans whose KL is at or under the free bits: those cost nothing.
    """

    bits_used: float
    bits_per_position: list[float]
    live_bits: int
    share_at_floor: float
    information: float


def plan_usage(plan_logits: Tensor, free_bits: float) -> PlanUsage:
    """
    From the posterior's logits of N plans, (N, H).

    The KL of a bit is 1 - H(p). Its mean over plans splits into 1 - H(mean p), which they all share, and
    H(mean p) - mean H(p), the mutual information of bit and plan; the sum of these over bits bounds the plan's.
    """
    per_bit = kl_bits_per_bit(plan_logits)
    per_position = per_bit.mean(0)
    shared = kl_bits_per_bit(plan_logits.double().sigmoid().mean(0).logit(EPSILON))
    return PlanUsage(
        bits_used=float(per_position.sum()),
        bits_per_position=per_position.tolist(),
        live_bits=int((per_position > LIVE_BITS).sum()),
        share_at_floor=float((per_bit.sum(-1) <= free_bits * FLOOR_MARGIN).float().mean()),
        information=max(0.0, float((per_bit.double().mean(0) - shared).sum())),
    )


def usage_warning(likelihood: "Likelihood") -> str | None:
    """
    What to tell someone whose plan is not used, else None.

    KL above zero proves nothing: a posterior can spend bits that the decoder ignores, and then a random plan does as
    well (no gap prior - reconstruction), or bits that are the same for every text. Those leave a gap, since other
    plans disturb a decoder that never saw them, but tell nothing.
    """
    if likelihood.gap is None or likelihood.kl is None:
        return None
    gap_bits = likelihood.gap / math.log(2) * likelihood.tokens / likelihood.documents
    error = likelihood.standard_errors.get("gap", 0.0)
    if math.isnan(error):  # of a single document
        error = 0.0
    if likelihood.gap <= 2 * error or gap_bits < LEAST_GAIN_BITS:
        return (
            f"the plan is not used: a random plan predicts as well as the text's own (gap {likelihood.gap:.4f} ± "
            f"{error:.4f} nats a token), though its KL is {likelihood.kl:.2f} bits a plan. Try: {ADVICE}"
        )
    usage = likelihood.usage
    if usage is not None and likelihood.documents > 1 and usage.information < LEAST_SHARE * usage.bits_used:
        return (
            f"the plan tells nothing: all texts have the same one, only {usage.information:.3f} of its "
            f"{usage.bits_used:.2f} bits differ between them. Try: {ADVICE_COMMON}"
        )
    return None


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
