"""Gradients that cannot be differentiated again."""

import torch
from torch import Tensor


def first_order_only(gradient: Tensor, sources: tuple[Tensor, ...], advice: str) -> Tensor:
    """
    Wraps a gradient that was computed outside of autograd, so that differentiating it again raises an error.

    Without this, autograd would treat it as a constant and second derivatives would be silently wrong.

    Args:
        sources: the tensors that the gradient depends on.
        advice: what to do instead, for the error message.
    """
    if not torch.is_grad_enabled():
        return gradient
    return _FirstOrderOnly.apply(gradient, advice, *sources)


class _FirstOrderOnly(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, advice: str, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.advice = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(f"a gradient of the Free Transformer cannot be differentiated again here: {ctx.advice}")
