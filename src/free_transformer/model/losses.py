"""The objective: reconstruction, KL in bits, free bits. Losses are in nats per predicted token, KL in bits."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import first_order_only

if TYPE_CHECKING:
    from .configuration import FreeTransformerConfig

IGNORED = -100
WITHOUT_SKIPPING = "for a gradient penalty or other second derivatives, leave skip_logits=True out"
MAX_PAIRED_PLANS = 256
# Logits held at a time: what a CPU's cache has room for; on a GPU enough for large products.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 2**30}
MIN_ROWS = 256  # in a chunk; with fewer, adding up the gradient of the weight takes longer than the products


def kl_bits_per_bit(plan_logits: Tensor) -> Tensor:
    """KL of each bit's posterior from the uniform prior, in bits, fp32 or better: same shape as `plan_logits`."""
    logits = plan_logits.to(torch.promote_types(plan_logits.dtype, torch.float32))
    p = logits.sigmoid()
    # log p through logsigmoid: with an epsilon inside a logarithm this would be NaN in half precision.
    negative_entropy = p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)
    return negative_entropy / math.log(2) + 1


def kl_bits(plan_logits: Tensor) -> Tensor:
    """KL of each plan's posterior from the uniform prior, in bits (paper, eq. 4): (..., H) -> (...)."""
    return kl_bits_per_bit(plan_logits).sum(-1)


def free_bits_hinge(kl: Tensor, free_bits: float | Tensor) -> Tensor:
    """
    KL of each plan beyond its free bits, `max(0, kl - free_bits)` (paper, eq. 5).

    Its gradient is that of `clamp(kl, min=free_bits)`.
    """
    return (kl - free_bits).clamp(min=0)


def min_bits_shortfall(kl: Tensor, min_bits: float) -> Tensor:
    """Bits that each plan lacks to `min_bits`, `max(0, min_bits - kl)`. It keeps plans in use."""
    return (min_bits - kl).clamp(min=0)


def aggregate_divergence(plan_logits: Tensor, used: Tensor | None = None) -> Tensor:
    """
    How far the plans that a batch takes *together* are from the uniform prior, in bits: Rényi's divergence of order 2.

    Free bits do not control it, so a plan sampled uniformly may be one that no text has. The estimate compares the
    probability that two texts of the batch sample the same plan with `2^-H`: `H + log2 mean_{i≠j} Σ_z q_i(z) q_j(z)`,
    a product over the bits. 0 is reached where each text is sure of its plan and all plans are equally common, but
    also where no plan says anything: use it with `min_bits`.

    Args:
        plan_logits: (N, H) of N plans; used: (N,) bool, which of them count, default all. Of more than 256, so many
            evenly spaced.
    """
    chosen, valid = _evenly_spaced(len(plan_logits), used, plan_logits.device)
    count = valid.sum()
    p = plan_logits[chosen].to(torch.promote_types(plan_logits.dtype, torch.float32)).sigmoid()
    same = p[:, None] * p + (1 - p)[:, None] * (1 - p)  # (N, N, H), each bit equal
    tiny = torch.finfo(same.dtype).tiny
    log_collision = same.clamp(min=tiny).log().sum(-1)
    # Shapes do not depend on values, so that a GPU is not waited for.
    pairs = valid[:, None] & valid & ~torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    any_pair = count > 1
    log_collision = log_collision.masked_fill(~(pairs | ~any_pair), -math.inf)
    mean_log = log_collision.flatten().logsumexp(0) - (count * (count - 1)).clamp(min=1).log()
    return (mean_log / math.log(2) + plan_logits.shape[-1]).where(any_pair, 0.0)


def _evenly_spaced(count: int, used: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of at most `MAX_PAIRED_PLANS` plans that count, (M,), and which of these M places are taken."""
    if used is None:
        chosen = torch.arange(0, count, max(1, -(-count // MAX_PAIRED_PLANS)), device=device)
        return chosen, torch.ones_like(chosen, dtype=torch.bool)
    places = min(count, MAX_PAIRED_PLANS)
    stride = ((used.sum() + MAX_PAIRED_PLANS - 1) // MAX_PAIRED_PLANS).clamp(min=1)
    rank = used.cumsum(0) - 1
    place = torch.where(used & (rank % stride == 0), rank // stride, places)  # the others go to a place that is dropped
    chosen = torch.zeros(places + 1, dtype=torch.long, device=device)
    chosen = chosen.scatter(0, place, torch.arange(count, device=device))[:places]
    return chosen, torch.arange(places, device=device) < (used.sum() + stride - 1) // stride


def reconstruction_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies in nats, labels shifted inside, -100 ignored; fp32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, _next_labels(labels), ignore_index=IGNORED, reduction="sum")


def chunked_reconstruction_loss(hidden_states: Tensor, weight: Tensor, labels: Tensor, fused: bool = False) -> Tensor:
    """
    `reconstruction_loss` of the logits `hidden_states @ weightᵀ`, a chunk of tokens at a time where they are many.

    Gradients are computed on the way, so that logits need not be kept or computed twice; they cannot be differentiated
    again. (`F.linear_cross_entropy` of torch 2.13 does the same, but rounds the sum of half-precision losses to bf16.)

    Args:
        hidden_states: (B, T, D); weight: (V, D); labels: (B, T).
        fused: compiles what is done with the logits of a chunk, which then are read twice and written once.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    bytes_per_logit = hidden_states.element_size() if fused else 4
    rows = max(MIN_ROWS, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (bytes_per_logit * len(weight)))
    with torch.autocast(device, enabled=False):
        if labels.numel() <= rows or torch.compiler.is_compiling():
            return reconstruction_loss(F.linear(hidden_states, weight), labels)
        states = hidden_states.flatten(0, 1)
        needed = (states.requires_grad, weight.requires_grad)
        return _ChunkedLoss.apply(states, weight, _next_labels(labels), rows, needed, fused)[0]


class _ChunkedLoss(torch.autograd.Function):
    """
    Sum of the cross-entropies of (N, D) @ (V, D)ᵀ against (N,) targets, `rows` of them at a time.

    Returns the sum, and the gradients of both factors (empty where none is needed).
    """

    @staticmethod
    def forward(
        states: Tensor, weight: Tensor, targets: Tensor, rows: int, needed: tuple[bool, bool], fused: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=states.device)
        grad_states = torch.empty_like(states if needed[0] else states[:0])
        grad_weight = torch.zeros_like(weight if needed[1] else weight[:0], dtype=wide)
        products = states.new_empty(min(rows, len(states)), len(weight))
        loss_and_slope = _compiled_loss_and_slope() if fused else _loss_and_slope
        for start in range(0, len(states), rows):
            chunk, target = states[start : start + rows], targets[start : start + rows, None]
            logits = torch.mm(chunk, weight.T, out=products[: len(chunk)])
            loss, slope, share = loss_and_slope(logits, target)
            total += loss
            if needed[0]:
                torch.mm(slope, weight, out=grad_states[start : start + rows]).mul_(share)
            if needed[1] and wide == weight.dtype:
                grad_weight.addmm_(slope.T, chunk * share)
            elif needed[1]:
                grad_weight += slope.T @ (chunk * share)
        return total, grad_states, grad_weight

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        states, weight, _, _, ctx.needed, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(states, weight, *output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        states, weight, grad_states, grad_weight = ctx.saved_tensors
        found: list[Tensor | None] = [None, None]
        if ctx.needed[0]:
            found[0] = grad_states * grad.to(grad_states.dtype)
        if ctx.needed[1]:
            found[1] = (grad_weight * grad).to(weight.dtype)
        sources = (states, weight)  # what was computed on the way forward would count as constant from here on
        found = [each if each is None else first_order_only(each, sources, WITHOUT_SKIPPING) for each in found]
        return found[0], found[1], None, None, None, None


def _loss_and_slope(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Sum of the cross-entropies of a chunk, and their derivative by the logits as a product, which the narrower factors
    of the matrix products are scaled by: `slope * share`. The logits are overwritten.

    Args:
        logits: (n, V); target: (n, 1).

    Returns:
        the sum, fp32 or better; slope, (n, V), and share, (n, 1), in the logits' type.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = target != IGNORED
    target = target.where(counts, 0)  # other labels that are no token raise in `gather`
    values = logits.to(wide)
    largest, own = values.amax(1, keepdim=True), values.gather(1, target)
    exponentials = values.sub_(largest).exp_()
    norm = exponentials.sum(1, keepdim=True)
    own = own - largest
    slope = exponentials.to(logits.dtype).scatter_(1, target, (own.exp() - norm).to(logits.dtype))
    return ((norm.log() - own) * counts).sum(), slope, (counts / norm).to(logits.dtype)


@functools.cache
def _compiled_loss_and_slope() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_loss_and_slope)


def _next_labels(labels: Tensor) -> Tensor:
    """(B, T) -> (B * T,): each token's next; the labels move, since a slice of the logits would be a copy."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def predicted_tokens(labels: Tensor) -> Tensor:
    """Number of tokens to predict according to `labels`; the first of a row has no past."""
    return (labels[:, 1:] != IGNORED).sum()


@dataclass
class Objective:
    """
    `loss = reconstruction + kl_weight * hinge`, and what `min_bits` and `aggregate_weight` add; nats per predicted
    token, but for means over plans in bits: `kl`, `hinge` (the KL beyond the free bits) and `kl_per_bit`.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor | None = None
    hinge: Tensor | None = None
    kl_per_bit: Tensor | None = None  # (H,)


@dataclass(frozen=True)
class LossWeights:
    """
    Attributes:
        free_bits: κ, KL in bits per plan that costs nothing.
        kl_weight: weight of the KL beyond the free bits.
        min_bits, aggregate_weight: see `min_bits_shortfall` and `aggregate_divergence`. A shortfall costs
            `1 + aggregate_weight` times its bits, since plans without information would minimize the aggregate term.
    """

    free_bits: float | Tensor = 0.0
    kl_weight: float | Tensor = 1.0
    min_bits: float = 0.0
    aggregate_weight: float = 0.0

    @classmethod
    def of(cls, config: "FreeTransformerConfig", **changes: float | Tensor) -> "LossWeights":
        """The weights of a configuration, some of them replaced."""
        names = ("free_bits", "kl_weight", "min_bits", "aggregate_weight")
        return cls(**{name: changes.get(name, getattr(config, name)) for name in names})


def objective(
    reconstruction: Tensor,
    num_tokens: int | Tensor,
    plan_logits: Tensor | None = None,
    plan_mask: Tensor | None = None,
    weights: LossWeights | None = None,
    gather_plans: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Objective:
    """
    Args:
        reconstruction: sum of the cross-entropies in nats, see `reconstruction_loss`.
        num_tokens: predicted tokens to divide by. With gradient accumulation give those of the whole batch, for
            reconstruction *and* KL. With 0 there is nothing to learn: the loss is 0.
        plan_logits: (B, P, H) of the posterior, or None where the plan is given: then there is no KL.
        plan_mask: (B, P) bool, the plans that count.
        gather_plans: from this process' `plan_logits` and `plan_mask` to those of all processes that share the batch.
    """
    weights = weights or LossWeights()
    num_tokens = torch.as_tensor(num_tokens)
    any_token, num_tokens = num_tokens > 0, num_tokens.clamp(min=1)
    reconstruction = reconstruction / num_tokens
    if plan_logits is None:
        return Objective(reconstruction, reconstruction)
    per_bit = kl_bits_per_bit(plan_logits)  # (B, P, H)
    kl = per_bit.sum(-1)
    mask = torch.ones_like(kl) if plan_mask is None else plan_mask.to(kl.dtype)
    hinge = (free_bits_hinge(kl, weights.free_bits) * mask).sum()
    bits = weights.kl_weight * hinge
    if weights.min_bits > 0:
        shortfall = (min_bits_shortfall(kl, weights.min_bits) * mask).sum()
        bits = bits + (1 + weights.aggregate_weight) * shortfall
    if weights.aggregate_weight > 0:
        together, used = plan_logits, mask.bool()
        if gather_plans is not None:
            together, used = gather_plans(together, used)
        divergence = aggregate_divergence(together.flatten(0, 1), used.flatten())
        bits = bits + weights.aggregate_weight * divergence * mask.sum()
    plans = mask.sum().clamp(min=1)
    return Objective(
        loss=reconstruction + bits * any_token * math.log(2) / num_tokens,
        reconstruction=reconstruction,
        kl=(kl * mask).sum() / plans,
        hinge=hinge / plans,
        kl_per_bit=torch.einsum("bph,bp->h", per_bit.detach(), mask) / plans,
    )
