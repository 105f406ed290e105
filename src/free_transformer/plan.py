"""
The plan: its bits, their codes, the table that turns a code into a vector, and the gradient that passes through.

A *plan* is H bits, bool; its *code* is the integer that they spell, bit 0 the least significant.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

MAX_CODE_BITS_INT64 = 63


def bits_to_codes(bits: Tensor) -> Tensor:
    """(..., H) bool or 0/1 -> (...) int64, bit 0 the least significant. `ValueError` above 63 bits."""
    if bits.shape[-1] > MAX_CODE_BITS_INT64:
        raise ValueError(f"{bits.shape[-1]} bits do not fit an int64 code: at most {MAX_CODE_BITS_INT64}")
    powers = 2 ** torch.arange(bits.shape[-1], device=bits.device)
    return (bits.long() * powers).sum(-1)


def codes_to_bits(codes: Tensor, num_bits: int) -> Tensor:
    """(...) integers in [0, 2^num_bits) -> (..., num_bits) bool, bit 0 the least significant."""
    if num_bits > MAX_CODE_BITS_INT64:
        raise ValueError(f"{num_bits} bits do not fit an int64 code: at most {MAX_CODE_BITS_INT64}")
    if codes.numel() and (codes.min() < 0 or codes.max() > 2**num_bits - 1):
        raise ValueError(f"codes from {codes.min()} to {codes.max()}: {num_bits} bits hold 0 to {2**num_bits - 1}")
    return (codes.long()[..., None] >> torch.arange(num_bits, device=codes.device)) % 2 == 1


def as_plan(plan: Tensor, batch_size: int, latent_dim: int) -> Tensor:
    """Checks a plan of the caller's, (P, H) or (B, P, H), bool or 0/1, and returns it as (B, P, H) bool."""
    plan = torch.as_tensor(plan)
    if plan.ndim == 2:
        plan = plan.expand(batch_size, -1, -1)
    if plan.ndim != 3 or plan.shape[0] != batch_size or plan.shape[2] != latent_dim or plan.shape[1] == 0:
        raise ValueError(
            f"plan of shape {tuple(plan.shape)}: (P, {latent_dim}) or ({batch_size}, P, {latent_dim}) is needed, "
            f"P plans of {latent_dim} bits for {batch_size} texts"
        )
    if plan.dtype != torch.bool and not ((plan == 0) | (plan == 1)).all():
        raise ValueError("a plan is made of bits, bool or 0/1; this one holds other values")
    return plan.bool()


class BinaryMapper(nn.Module):
    """Draws each bit by itself, `bit_h ~ Bernoulli(sigmoid(logit_h))` (paper, section 3.3)."""

    def forward(self, plan_logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(..., H) logits -> (..., H) bool. Logits of 0 are the uniform prior."""
        dtype = torch.promote_types(plan_logits.dtype, torch.float32)
        uniform = torch.rand(plan_logits.shape, dtype=dtype, device=plan_logits.device, generator=generator)
        return uniform < plan_logits.to(dtype).sigmoid()


class PlanTable(nn.Module):
    """
    The vector of a plan: one row for each code of each group of bits, summed over the groups.

    One group is the paper's table of shape `(2^H, D)`; groups of one bit are a linear map of the bits. The groups'
    tables stand one under the other in `weight`.

    Args:
        group_bits: bits of each group.
        hidden_dim: D.
        gradient: what reaches `plan_logits`: `"exact"` or `"sampled"`, see `plan_gradient` below.
        chunk_bytes: memory that the exact gradient may take at a time.
        start: `"bit_linear"`, `"normal"` or `"zero"`.
    """

    def __init__(
        self,
        group_bits: list[int],
        hidden_dim: int,
        gradient: str = "exact",
        chunk_bytes: int = 64 * 2**20,
        start: str = "bit_linear",
    ):
        super().__init__()
        self.group_bits = list(group_bits)
        self.gradient = gradient
        self.chunk_bytes = chunk_bytes
        self.start = start
        self.weight = nn.Parameter(torch.empty(sum(2**bits for bits in self.group_bits), hidden_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, scale: float = 1.0) -> None:
        """
        Starts the rows at root mean square `scale`, that of X: `norm(X + R)` sees only their ratio.

        The bit-linear start decides whether the plan is ever used: rows drawn independently of each other give the
        encoder a gradient of pure noise, and the model learns to do without the plan before the noise has cleared.
        """
        if self.weight.is_meta:  # `from_pretrained` builds empty, then loads or comes back here
            return
        if self.start == "zero":
            init.zeros_(self.weight)
        elif self.start == "normal":
            init.normal_(self.weight, std=scale / len(self.group_bits) ** 0.5)
        else:
            rows = []
            for bits in self.group_bits:
                signs = codes_to_bits(torch.arange(2**bits), bits).to(self.weight) * 2 - 1  # (2^bits, bits)
                directions = torch.randn(bits, self.weight.shape[1], dtype=self.weight.dtype)
                rows.append(signs @ directions.to(self.weight) * (scale / sum(self.group_bits) ** 0.5))
            init.copy_(self.weight, torch.cat(rows))

    def group_codes(self, plan: Tensor) -> Tensor:
        """(..., H) bool -> (..., groups), the row of `weight` that each group of bits points to."""
        codes, first_row = [], 0
        for group in plan.split(self.group_bits, dim=-1):
            codes.append(bits_to_codes(group) + first_row)
            first_row += 2 ** group.shape[-1]
        return torch.stack(codes, dim=-1)

    def forward(self, plan: Tensor, plan_logits: Tensor | None = None) -> Tensor:
        """
        Args:
            plan: (B, P, H) bool, the bits drawn.
            plan_logits: (B, P, H) of the distribution they were drawn from; the straight-through gradient reaches
                them. The table's own gradient is that of a lookup: the rows drawn.

        Returns:
            R, (B, P, D).
        """
        codes = self.group_codes(plan)
        states = F.embedding(codes, self.weight).sum(-2)
        if plan_logits is None or not plan_logits.requires_grad:
            return states
        return _StraightThrough.apply(states, plan_logits, self.weight, plan, codes, self)


class _StraightThrough(torch.autograd.Function):
    """The identity on the plan's vectors, whose backward also gives `plan_logits` its gradient."""

    @staticmethod
    def forward(ctx, states, plan_logits, weight, plan, codes, table):
        ctx.save_for_backward(plan_logits, weight, plan, codes)
        ctx.table = table
        return states.view_as(states)

    @staticmethod
    def backward(ctx, grad):
        plan_logits, weight, plan, codes = ctx.saved_tensors
        table: PlanTable = ctx.table
        if table.gradient == "exact":
            grad_logits = exact_gradient(grad, plan_logits, weight, table.group_bits, table.chunk_bytes)
        else:
            grad_logits = sampled_gradient(grad, plan_logits, weight, table.group_bits, plan, codes)
        return grad, grad_logits.to(plan_logits.dtype), None, None, None, None


def exact_gradient(
    grad: Tensor, plan_logits: Tensor, weight: Tensor, group_bits: list[int], chunk_bytes: int
) -> Tensor:
    """
    Gradient of `E_{z~Q}[grad · table[z]]` with respect to the logits, over all codes (paper, section 3.3).

    Args:
        grad: (..., D), the loss's gradient at the plan's vectors; plan_logits: (..., H); weight: (rows, D).
        chunk_bytes: bound of the `(plans, 2^bits)` temporaries: plans are taken so many at a time.

    Returns:
        (..., H), in fp32 or better.
    """
    dtype = torch.promote_types(torch.promote_types(grad.dtype, weight.dtype), torch.float32)
    flat_grad, flat_logits = grad.flatten(0, -2).to(dtype), plan_logits.flatten(0, -2).to(dtype)
    result = []
    tables = weight.split([2**bits for bits in group_bits])
    for table, logits in zip(tables, flat_logits.split(group_bits, dim=-1), strict=True):
        # The products, and as many values again for the folds and for the weights of the low bits.
        plans_at_a_time = max(1, chunk_bytes // (3 * len(table) * dtype.itemsize))
        chunks = zip(flat_grad.split(plans_at_a_time), logits.split(plans_at_a_time), strict=True)
        result.append(torch.cat([_fold_out_bits(g @ table.to(dtype).T, chunk) for g, chunk in chunks]))
    return torch.cat(result, dim=-1).view_as(plan_logits)


def _fold_out_bits(values: Tensor, logits: Tensor) -> Tensor:
    """
    Gradient of `E_{z~Q}[values[z]]` at the logits, (N, 2^b) and (N, b) -> (N, b), in O(2^b) operations.

    The highest bit is folded out first, `2^b -> 2^(b-1) -> ...`: what is left is the expectation over the bits
    folded so far, so that the difference between its two halves, weighted by the bits below, is the derivative.
    """
    p = logits.sigmoid()
    low = [torch.ones_like(p[:, :1])]  # low[h]: (N, 2^h), the probability of each setting of the bits below h
    for h in range(logits.shape[1] - 1):
        low.append(torch.cat([low[h] * (1 - p[:, h : h + 1]), low[h] * p[:, h : h + 1]], dim=1))
    derivative = torch.empty_like(p)
    for h in reversed(range(logits.shape[1])):
        zero, one = values.chunk(2, dim=1)
        derivative[:, h] = ((one - zero) * low[h]).sum(1)
        values = torch.lerp(zero, one, p[:, h : h + 1])
    return derivative * p * (1 - p)


def sampled_gradient(
    grad: Tensor, plan_logits: Tensor, weight: Tensor, group_bits: list[int], plan: Tensor, codes: Tensor
) -> Tensor:
    """
    An unbiased estimate of `exact_gradient` from H + 1 rows: each bit flipped, the others as drawn.

    `∂/∂p_h = E[grad · (table[z with bit h = 1] - table[z with bit h = 0])]`; arguments as in `exact_gradient`, with
    plan (..., H) bool and codes (..., groups).
    """
    dtype = torch.promote_types(torch.promote_types(grad.dtype, weight.dtype), torch.float32)
    offsets = torch.cat([2 ** torch.arange(bits, device=plan.device) for bits in group_bits])
    group = torch.repeat_interleave(
        torch.arange(len(group_bits), device=plan.device), torch.tensor(group_bits, device=plan.device)
    )
    drawn = codes[..., group]  # (..., H), the row that each bit belongs to
    flipped = torch.where(plan, drawn - offsets, drawn + offsets)
    difference = (F.embedding(flipped, weight) - F.embedding(drawn, weight)).to(dtype)
    change = torch.einsum("...hd,...d->...h", difference, grad.to(dtype))
    p = plan_logits.to(dtype).sigmoid()
    return torch.where(plan, -change, change) * p * (1 - p)
