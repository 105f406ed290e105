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
WITHOUT_SKIPPING = "for a gradient penalty or other second derivatives, do not set skip_logits=True"
MAX_PAIRED_PLANS = 256
# Bytes of logits held at a time: on a CPU they fit its cache; on a GPU they allow large matmuls.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 2**30}
MIN_ROWS = 256  # in a chunk; with fewer, adding up the gradient of the weight takes longer than the products


def kl_bits_per_bit(plan_logits: Tensor) -> Tensor:
    """Returns each bit's KL from the uniform prior, in bits, fp32 or better, with the shape of `plan_logits`."""
    logits = plan_logits.to(torch.promote_types(plan_logits.dtype, torch.float32))
    p = logits.sigmoid()
    # logsigmoid, since log(p + eps) would be NaN in half precision
    negative_entropy = p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)
    return negative_entropy / math.log(2) + 1


def kl_bits(plan_logits: Tensor) -> Tensor:
    """Returns each plan's KL from the uniform prior, in bits (paper, eq. 4): (..., H) -> (...)."""
    return kl_bits_per_bit(plan_logits).sum(-1)


def free_bits_hinge(kl: Tensor, free_bits: float | Tensor) -> Tensor:
    """
    Returns each plan's KL beyond its free bits, `max(0, kl - free_bits)` (paper, eq. 5).

    The gradient equals that of `clamp(kl, min=free_bits)`.
    """
    return (kl - free_bits).clamp(min=0)


def min_bits_shortfall(kl: Tensor, min_bits: float) -> Tensor:
    """Returns the bits that each plan is below `min_bits`, `max(0, min_bits - kl)`. The penalty keeps plans in use."""
    return (min_bits - kl).clamp(min=0)


def aggregate_divergence(plan_logits: Tensor, used: Tensor | None = None) -> Tensor:
    """
    Returns the Rényi divergence (order 2) of the aggregate posterior of a batch from the uniform prior, in bits.

    Free bits do not control it, so a plan sampled uniformly may be one that no text has. The estimate compares the
    probability that two texts of the batch sample the same plan with `2^-H`: `H + log2 mean_{i≠j} Σ_z q_i(z) q_j(z)`,
    a product over the bits. It is 0 if each text determines its plan and all plans are equally common, but also if
    plans carry no information, so use it with `min_bits`.

    Args:
        plan_logits: (N, H) of N plans.
        used: (N,) bool, the plans that count, default all. If more than 256 count, 256 evenly spaced ones are used.
    """
    chosen, valid = _evenly_spaced(len(plan_logits), used, plan_logits.device)
    count = valid.sum()
    p = plan_logits[chosen].to(torch.promote_types(plan_logits.dtype, torch.float32)).sigmoid()
    same = p[:, None] * p + (1 - p)[:, None] * (1 - p)  # (N, N, H), each bit equal
    tiny = torch.finfo(same.dtype).tiny
    log_collision = same.clamp(min=tiny).log().sum(-1)
    # Shapes do not depend on values, so the CPU does not wait for the GPU.
    pairs = valid[:, None] & valid & ~torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    any_pair = count > 1
    log_collision = log_collision.masked_fill(~(pairs | ~any_pair), -math.inf)
    mean_log = log_collision.flatten().logsumexp(0) - (count * (count - 1)).clamp(min=1).log()
    return (mean_log / math.log(2) + plan_logits.shape[-1]).where(any_pair, 0.0)


def _evenly_spaced(count: int, used: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns indices of at most `MAX_PAIRED_PLANS` plans that count, (M,), and which of these M entries are valid."""
    if used is None:
        chosen = torch.arange(0, count, max(1, -(-count // MAX_PAIRED_PLANS)), device=device)
        return chosen, torch.ones_like(chosen, dtype=torch.bool)
    places = min(count, MAX_PAIRED_PLANS)
    stride = ((used.sum() + MAX_PAIRED_PLANS - 1) // MAX_PAIRED_PLANS).clamp(min=1)
    rank = used.cumsum(0) - 1
    place = torch.where(used & (rank % stride == 0), rank // stride, places)  # the others are dropped
    chosen = torch.zeros(places + 1, dtype=torch.long, device=device)
    chosen = chosen.scatter(0, place, torch.arange(count, device=device))[:places]
    return chosen, torch.arange(places, device=device) < (used.sum() + stride - 1) // stride


def reconstruction_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum of the cross-entropies in nats, fp32 or better. Shifts the labels and ignores -100."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, _next_labels(labels), ignore_index=IGNORED, reduction="sum")


def chunked_reconstruction_loss(hidden_states: Tensor, weight: Tensor, labels: Tensor, fused: bool = False) -> Tensor:
    """
    Computes `reconstruction_loss` of the logits `hidden_states @ weightᵀ` in chunks of tokens.

    Gradients are computed in the forward pass, so logits are neither kept nor computed twice. The gradients cannot be
    differentiated again. (`F.linear_cross_entropy` of torch 2.13 does the same, but rounds the sum of half-precision
    losses to bf16.)

    Args:
        hidden_states: (B, T, D); weight: (V, D); labels: (B, T).
        fused: compile the operations on the logits of a chunk, so that the logits are read twice and written once.
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
    Sum of the cross-entropies of (N, D) @ (V, D)ᵀ against (N,) targets, computed `rows` targets at a time.

    Returns the sum and the gradients of both factors (empty if not needed).
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
        sources = (states, weight)  # the forward pass computed these gradients as constants
        found = [each if each is None else first_order_only(each, sources, WITHOUT_SKIPPING) for each in found]
        return found[0], found[1], None, None, None, None


def _loss_and_slope(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Returns the sum of the cross-entropies of a chunk and its gradient by the logits, factored as `slope * share`.

    The caller scales the smaller matmul operands by `share`. The logits are overwritten.

    Args:
        logits: (n, V); target: (n, 1).

    Returns:
        the sum, fp32 or better; slope, (n, V), and share, (n, 1), in the logits' dtype.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = target != IGNORED
    target = target.where(counts, 0)  # other invalid labels raise in `gather`
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
    """Returns each token's next token, (B, T) -> (B * T,). Shifts the labels, since slicing logits would copy them."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def predicted_tokens(labels: Tensor) -> Tensor:
    """Returns the number of predicted tokens in `labels`; the first token of a row is not predicted."""
    return (labels[:, 1:] != IGNORED).sum()


@dataclass
class Objective:
    """
    `loss = reconstruction + kl_weight * hinge`, plus the terms of `min_bits` and `aggregate_weight`.

    `loss` and `reconstruction` are in nats per predicted token. `kl`, `hinge` (the KL beyond the free bits) and
    `kl_per_bit` are means over plans, in bits.
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
        free_bits: κ, the KL in bits per plan that is not penalized.
        kl_weight: weight of the KL beyond the free bits.
        min_bits, aggregate_weight: see `min_bits_shortfall` and `aggregate_divergence`. The shortfall is weighted by
            `1 + aggregate_weight`, since plans without information would minimize the aggregate term.
    """

    free_bits: float | Tensor = 0.0
    kl_weight: float | Tensor = 1.0
    min_bits: float = 0.0
    aggregate_weight: float = 0.0

    @classmethod
    def of(cls, config: "FreeTransformerConfig", **changes: float | Tensor) -> "LossWeights":
        """Returns the weights of a configuration, with `changes` applied."""
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
    Computes the loss and its parts.

    Args:
        reconstruction: sum of the cross-entropies in nats, see `reconstruction_loss`.
        num_tokens: number of predicted tokens to divide by. With gradient accumulation, pass the number in the whole
            batch; reconstruction *and* KL are divided by it. With 0 tokens the loss is 0.
        plan_logits: (B, P, H) of the posterior, or None if the plan is given, in which case there is no KL.
        plan_mask: (B, P) bool, the plans that count.
        gather_plans: maps this process's `plan_logits` and `plan_mask` to those of all processes that share the batch.
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
