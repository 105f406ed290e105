"""
The straight-through gradient with respect to the logits of a plan's bits: exact over all codes, or sampled.

With `g = ∂loss/∂R` it is the gradient of `E_{z~Q}[g · table[z]]` (paper, section 3.3). For N plans of width D and a
codebook of `2^b` rows, the exact gradient takes `2 N D 2^b` FLOPs, the products of all plans with all rows, and
`chunk_bytes` of memory for any N and b. The sampled gradient reads H + 1 rows per plan.
"""

import itertools
import re
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import first_order_only

WITH_PLAN = "pass the plan, plan=..., to compute second derivatives of the rest"


class StraightThrough(torch.autograd.Function):
    """
    The identity on the plan vectors. Its backward also computes the gradient of `plan_logits`.

    That gradient cannot be differentiated again: the operators that compute it have no derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        states: Tensor,
        plan_logits: Tensor,
        weight: Tensor,
        plan: Tensor,
        codes: Tensor,
        group_bits: list[int],
        gradient: str,
        chunk_bytes: int,
    ) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, plan_logits, weight, plan, codes, ctx.group_bits, gradient, ctx.chunk_bytes = inputs
        ctx.save_for_backward(plan_logits, weight, *([] if gradient == "exact" else [plan, codes]))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan_logits, weight, *drawn = ctx.saved_tensors
        estimate = sampled_gradient if drawn else exact_gradient
        sources = (grad, plan_logits, weight)
        # Autocast would compute the products in half precision.
        with torch.autocast(grad.device.type, enabled=False):
            constants = [each.detach() for each in sources]
            grad_logits = estimate(*constants, *drawn, ctx.group_bits, ctx.chunk_bytes).to(plan_logits.dtype)
        grad_logits = first_order_only(grad_logits, sources, WITH_PLAN)
        return grad, grad_logits, None, None, None, None, None, None


def group_runs(group_bits: Sequence[int]) -> list[tuple[int, int]]:
    """Merges groups of equal size, as (bits, groups): one run, or two if the last group is shorter."""
    return [(bits, len(list(run))) for bits, run in itertools.groupby(group_bits)]


# The copy of this file in a saved model needs operator names of its own.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])


# Custom operators, so that a compiler does not unroll the chunks.
@torch.library.custom_op(f"{NAMESPACE}::exact_gradient", mutates_args=())
def exact_gradient(
    grad: Tensor, plan_logits: Tensor, weight: Tensor, group_bits: Sequence[int], chunk_bytes: int
) -> Tensor:
    """
    Computes the gradient of `E_{z~Q}[grad · table[z]]` with respect to the logits, over all codes.

    Args:
        grad: (..., D), the loss's gradient at the plan's vectors; plan_logits: (..., H); weight: (rows, D).
        group_bits: bits of each group. `weight` stacks the codebooks of the groups.
        chunk_bytes: maximum temporary memory in bytes, for any N and codebook.

    Returns:
        (..., H), in fp32 or better.
    """
    dtype = _dtype_of_sums(grad, weight)
    flat_grad, logits = grad.flatten(0, -2), plan_logits.flatten(0, -2).to(dtype)
    p = logits.sigmoid()
    derivatives, first_row = [], 0
    runs = group_runs(group_bits)
    for (bits, groups), probabilities in zip(runs, p.split([b * g for b, g in runs], dim=-1), strict=True):
        rows = groups * 2**bits
        tables = weight[first_row : first_row + rows].view(groups, 2**bits, -1)
        first_row += rows
        plans, codes = _chunk(len(p), bits, groups, chunk_bytes // dtype.itemsize)
        chunks = zip(flat_grad.split(plans), probabilities.unflatten(-1, (groups, bits)).split(plans), strict=True)
        derivatives.append(torch.cat([_derivative(g.to(dtype), part, tables, codes).flatten(1) for g, part in chunks]))
    return (torch.cat(derivatives, dim=-1) * p * (-logits).sigmoid()).view_as(
        plan_logits
    )  # sigmoid(-x), since 1 - p loses precision


@torch.library.custom_op(f"{NAMESPACE}::sampled_gradient", mutates_args=())
def sampled_gradient(
    grad: Tensor,
    plan_logits: Tensor,
    weight: Tensor,
    plan: Tensor,
    codes: Tensor,
    group_bits: Sequence[int],
    chunk_bytes: int,
) -> Tensor:
    """
    Estimates `exact_gradient` without bias by flipping one bit at a time and keeping the other sampled bits.

    `∂/∂p_h = E[grad · (table[z with bit h = 1] - table[z with bit h = 0])]`; one of the two rows is the sampled one.
    Arguments as in `exact_gradient`, with plan (..., H) bool and codes (..., groups), the sampled rows.
    """
    dtype = _dtype_of_sums(grad, weight)
    offsets = torch.tensor([2**h for bits in group_bits for h in range(bits)], device=plan.device)
    group = torch.tensor([i for i, bits in enumerate(group_bits) for _ in range(bits)], device=plan.device)
    plan, drawn = plan.flatten(0, -2), codes.flatten(0, -2)
    flipped = drawn[:, group] + torch.where(plan, -offsets, offsets)  # (N, H)
    products = _products(grad.flatten(0, -2).to(dtype), weight, torch.cat([drawn, flipped], dim=1), chunk_bytes)
    of_drawn, of_flipped = products.split([drawn.shape[1], flipped.shape[1]], dim=1)
    change = of_flipped - of_drawn[:, group]
    logits = plan_logits.flatten(0, -2).to(dtype)
    return (torch.where(plan, -change, change) * logits.sigmoid() * (-logits).sigmoid()).view_as(plan_logits)


def _result_like(grad: Tensor, plan_logits: Tensor, weight: Tensor, *_: object) -> Tensor:
    """Returns an empty tensor with the shape and dtype of either operator's output, for the compiler."""
    return torch.empty_like(plan_logits, dtype=_dtype_of_sums(grad, weight))


exact_gradient.register_fake(_result_like)
sampled_gradient.register_fake(_result_like)


def _dtype_of_sums(grad: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(grad.dtype, weight.dtype), torch.float32)


def _halves(bits: int) -> tuple[int, int]:
    """Returns the number of bits in the low and in the high half of a code."""
    return bits - bits // 2, bits // 2


def _chunk(plans: int, bits: int, groups: int, values: int) -> tuple[int, int]:
    """Returns how many plans and how many values of the high bits to process at once, to hold at most `values`."""
    low, high = (2**half for half in _halves(bits))
    besides = 3 * (low + high)  # probabilities and expectations of each half, and the intermediate results of folding
    at_a_time = min(plans, max(1, values // (groups * 2 * besides)))  # the other half holds the products
    return at_a_time, min(high, max(1, (values // (at_a_time * groups) - besides) // low))


def _derivative(grad: Tensor, p: Tensor, tables: Tensor, codes_at_a_time: int) -> Tensor:
    """
    Computes the derivative of `E_{z~Q}[grad · table[z]]` with respect to each bit's probability.

    The products are computed in blocks: all low halves of the code combined with some of the high halves. Each block
    is immediately reduced to its expectations over either half while it is in the processor's cache, so no tensor of
    size `2^bits` is kept.

    Args:
        grad: (N, D); p: (N, groups, bits); tables: (groups, 2^bits, D).
        codes_at_a_time: number of high halves in a block.

    Returns:
        (N, groups, bits).
    """
    plans, groups, bits = p.shape
    low, high = _halves(bits)
    blocks = tables.unflatten(1, (2**high, 2**low))
    p_low, p_high = p.flatten(0, 1).split([low, high], dim=1)
    odds_low, odds_high = _code_probabilities(p_low), _code_probabilities(p_high)
    given_low = grad.new_zeros(plans * groups, 1, 2**low)  # expectation over the high half, for each low one
    given_high = grad.new_empty(plans * groups, 2**high)
    # One buffer for all blocks: separate allocations would fragment the heap to many times their size.
    buffer = grad.new_empty(plans * groups * codes_at_a_time * 2**low)
    for start in range(0, 2**high, codes_at_a_time):
        stop = min(start + codes_at_a_time, 2**high)
        block = blocks[:, start:stop].flatten(0, 2).to(grad.dtype)
        products = torch.mm(grad, block.T, out=buffer[: plans * len(block)].view(plans, -1))
        products = products.view(plans * groups, stop - start, 2**low)
        given_low.baddbmm_(odds_high[-1][:, None, start:stop], products)
        given_high[:, start:stop] = torch.bmm(products, odds_low[-1][:, :, None])[:, :, 0]
    of_low = _fold_out_bits(given_low[:, 0], p_low, odds_low)
    of_high = _fold_out_bits(given_high, p_high, odds_high)
    return torch.cat([of_low, of_high], dim=1).view(plans, groups, bits)


def _code_probabilities(p: Tensor) -> list[Tensor]:
    """Returns the code probabilities of the first 0, 1, ... b independent bits: (N, b) -> (N, 1), ... (N, 2^b)."""
    codes = [p.new_ones(len(p), 1)]
    for h in range(p.shape[1]):
        with_bit = codes[-1] * p[:, h : h + 1]
        codes.append(torch.cat([codes[-1] - with_bit, with_bit], dim=1))
    return codes


def _fold_out_bits(values: Tensor, p: Tensor, odds: list[Tensor]) -> Tensor:
    """
    Computes the derivative of `E_{z~Q}[values[z]]` with respect to each bit's probability, (N, 2^b), (N, b) -> (N, b).

    The highest bit is folded out first, `2^b -> 2^(b-1) -> ...`, which leaves the expectation over the folded bits.
    The derivative is the difference between its two halves, weighted by the probabilities of the lower bits.
    """
    derivative = torch.empty_like(p)
    for h in reversed(range(p.shape[1])):
        zero, one = values.chunk(2, dim=1)
        difference = one - zero
        torch.linalg.vecdot(difference, odds[h], out=derivative[:, h])
        values = torch.addcmul(zero, difference, p[:, h : h + 1])
    return derivative


def _products(grad: Tensor, weight: Tensor, codes: Tensor, chunk_bytes: int) -> Tensor:
    """Computes `grad[n] · weight[codes[n, i]]`, (N, D), (rows, D) and (N, C) -> (N, C)."""
    count = codes.shape[1]
    if (
        weight.device.type == "cpu" and weight.dtype == grad.dtype
    ):  # several times faster, since it does not copy the rows
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            where = torch.sparse_csr_tensor(
                torch.arange(0, codes.numel() + 1, count),
                codes.flatten(),
                grad.new_zeros(codes.numel()),
                (len(grad), len(weight)),
                check_invariants=False,
            )
        return torch.sparse.sampled_addmm(where, grad, weight.T).values().view_as(codes)
    plans = max(1, chunk_bytes // (count * weight.shape[1] * grad.dtype.itemsize))
    chunks = zip(codes.split(plans), grad.split(plans), strict=True)
    return torch.cat([torch.einsum("ncd,nd->nc", F.embedding(c, weight).to(g.dtype), g) for c, g in chunks])
