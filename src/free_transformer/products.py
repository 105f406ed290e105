"""
Linear maps as generation needs them: few rows times large matrices, where a call may cost more than its arithmetic.

Everything here is for steps without gradients, and gives way to the module's own call wherever that does more than
multiply: adapters, quantizers, hooks, weights spread over processes, and what is traced.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rounding import ROUNDING

HAS_ONEDNN = torch.backends.mkldnn.is_available()
MOST_ROWS = 256  # with more, the CPU's default library is as fast as oneDNN
LARGE_MATRIX = 2**17  # values; for smaller ones the call of oneDNN costs more than it saves


def project(linear: nn.Module, states: Tensor) -> Tensor:
    """`linear(states)`."""
    if _needs_calls([linear]):
        return linear(states)
    return multiply(states, linear._parameters["weight"], linear._parameters["bias"])  # type: ignore[arg-type]


def project_together(linears: Sequence[nn.Module], states: Tensor) -> Sequence[Tensor]:
    """`[linear(states) for linear in linears]`, in one product where `lay_together` has prepared it."""
    if _needs_calls(linears):
        return [linear(states) for linear in linears]
    weights: list[Tensor] = [linear._parameters["weight"] for linear in linears]  # type: ignore[misc]
    together = not ROUNDING.as_llama and all(linear._parameters["bias"] is None for linear in linears)
    whole = _in_one_piece(weights) if together else None
    if whole is None:
        return [project(linear, states) for linear in linears]
    return multiply(states, whole).split([len(weight) for weight in weights], dim=-1)


@torch.no_grad()
def lay_together(linears: Sequence[nn.Module]) -> None:
    """Moves the matrices of linear maps of the same states into one piece of memory, one behind the other."""
    weights = [linear._parameters.get("weight") for linear in linears]
    if _needs_calls(linears) or _in_one_piece(weights) is not None:  # type: ignore[arg-type]
        return
    whole = torch.cat(weights)  # type: ignore[arg-type]
    for weight, part in zip(weights, whole.split([len(each) for each in weights]), strict=True):  # type: ignore[arg-type]
        weight.data = part  # type: ignore[union-attr]  # the parameter stays the same object, and its own values


def multiply(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, on a CPU by oneDNN where the matrix is large and the rows are few: half the time (`make bench`)."""
    few = HAS_ONEDNN and not ROUNDING.as_llama and states.numel() <= MOST_ROWS * weight.shape[1]
    if few and weight.numel() >= LARGE_MATRIX and weight.is_cpu and states.dtype == weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return F.linear(states, weight, bias)


def _needs_calls(linears: Sequence[nn.Module]) -> bool:
    return (
        torch.is_grad_enabled()
        or not all(_only_multiplies(linear) for linear in linears)
        or torch.compiler.is_compiling()
    )


def _only_multiplies(linear: nn.Module) -> bool:
    return (
        type(linear) is nn.Linear
        and type(linear._parameters["weight"]) is nn.Parameter
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
    )


def _in_one_piece(weights: Sequence[Tensor]) -> Tensor | None:
    """A view of all rows, where each matrix begins where the one before ends, within the first one's memory."""
    first, rows, place = weights[0], 0, weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != place + rows * first.shape[1] * first.itemsize or weight.shape[1] != first.shape[1]:
            return None
        rows += len(weight)
    storage = first.untyped_storage()
    if place + rows * first.shape[1] * first.itemsize > storage.data_ptr() + storage.nbytes():
        return None
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
