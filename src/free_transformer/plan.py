"""
The plan: its bits, their codes, how they are drawn, and the table that turns a code into a vector.

A *plan* is H bits, bool; its *code* is the integer that they spell, bit 0 the least significant.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from free_transformer.straight_through import StraightThrough, group_runs

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
        gradient: what reaches `plan_logits`: `"exact"` or `"sampled"`, see `straight_through.py`.
        chunk_bytes: memory that this gradient may take at a time.
        start: `"bit_linear"`, `"normal"` or `"zero"`.

    Attributes:
        sparse: whether `weight.grad` holds the rows drawn alone, as a sparse tensor, for `torch.optim.SparseAdam` and
            other optimizers that take one; off by default. A dense gradient has the size of the table.
    """

    def __init__(
        self,
        group_bits: list[int],
        hidden_dim: int,
        gradient: str = "exact",
        chunk_bytes: int = 24 * 2**20,
        start: str = "bit_linear",
    ):
        super().__init__()
        self.group_bits = list(group_bits)
        self.gradient = gradient
        self.chunk_bytes = chunk_bytes
        self.start = start
        self.sparse = False
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
        codes, first_bit, first_row = [], 0, 0
        for bits, groups in group_runs(self.group_bits):
            run = plan[..., first_bit : first_bit + bits * groups].unflatten(-1, (groups, bits))
            codes.append(bits_to_codes(run) + first_row + 2**bits * torch.arange(groups, device=plan.device))
            first_bit += bits * groups
            first_row += 2**bits * groups
        return torch.cat(codes, dim=-1)

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
        states = F.embedding_bag(codes.flatten(0, -2), self.weight, mode="sum", sparse=self.sparse)
        states = states.view(*plan.shape[:-1], -1)
        if plan_logits is None or not plan_logits.requires_grad:
            return states
        settings = (self.group_bits, self.gradient, self.chunk_bytes)
        return StraightThrough.apply(states, plan_logits, self.weight, plan, codes, *settings)
