"""
Llama's layers with less memory: the same weights under the same names, and the same values bit-for-bit.

`transformers` implements norms and gated units as several small operations, and autograd keeps the result of each one
until the backward pass. The versions here keep only their inputs (`benchmarks/memory.py` counts the bytes). Under
`torch.compile` and `torch.export` the plain operations are used, since the compiler fuses them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from .attention import Rotation, SplitAttention
from .compat import GradientCheckpointingLayer, LlamaMLP, LlamaRMSNorm, SiLU
from .losses import chunked_reconstruction_loss


class RMSNorm(LlamaRMSNorm):
    """`LlamaRMSNorm` that saves less for the backward pass, and keeps double precision where Llama's uses single."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        narrow = hidden_states.dtype.itemsize < 4 and hidden_states.is_cpu
        if hidden_states.dtype != self.weight.dtype or narrow:
            return super().forward(hidden_states)
        if not torch.is_grad_enabled() or not hidden_states.is_cpu or torch.compiler.is_compiling():
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)[0]


class MLP(LlamaMLP):
    """`LlamaMLP` that keeps one intermediate tensor less for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._is_swiglu():
            return super().forward(x)
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))

    def _is_swiglu(self) -> bool:
        return type(self.act_fn) is SiLU and not is_observed(self.act_fn)


class DecoderLayer(GradientCheckpointingLayer):
    """`LlamaDecoderLayer` made of `SplitAttention`, `MLP` and `RMSNorm`."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = SplitAttention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, 1, D) with `last_only`."""
        queries = self.input_layernorm(hidden_states)
        return self.attend(hidden_states, queries, queries, **kwargs)

    def attend(
        self,
        hidden_states: Tensor,
        queries: Tensor,
        key_values: Tensor,
        last_only: bool = False,
        attentions: list[Tensor | None] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Applies attention and MLP to already normalized queries and keys/values.

        Args:
            last_only: compute the output of only the last token. Keys and values are still computed for all tokens.
            attentions: list to which the attention weights are appended.
        """
        if last_only:
            hidden_states, queries = hidden_states[:, -1:], queries[:, -1:]
            kwargs |= _of_last_token(**kwargs)
        attended, weights = self.self_attn(queries, key_value_states=key_values, **kwargs)
        if attentions is not None:
            attentions.append(weights)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _of_last_token(
    position_embeddings: Rotation, attention_mask: Tensor | None, position_ids: Tensor, **_: object
) -> dict[str, object]:
    cos, sin = position_embeddings
    return {
        "position_embeddings": (cos[:, -1:], sin[:, -1:]),
        "key_value_position_embeddings": position_embeddings,
        "attention_mask": None if attention_mask is None else attention_mask[:, :, -1:],
        "position_ids": position_ids[:, -1:],
        "blocks": None,  # a single token attends to the end of the window, without a mask
    }


class Head(nn.Linear):
    """
    Maps hidden states to logits, or with labels to the reconstruction, without ever holding all logits.

    Attributes:
        in_columns: whether the weight is split across processes by columns, so that the logits must be gathered.
        fused_loss: see `chunked_reconstruction_loss`.
    """

    in_columns = False
    fused_loss = False

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        """
        Args:
            input: (B, T, D).
            labels: (B, T), see `reconstruction_loss`.

        Returns:
            logits, (B, T, V), or the sum of the labels' cross-entropies in nats.
        """
        if labels is None:
            return super().forward(input)
        return chunked_reconstruction_loss(input, self.weight, labels, self.fused_loss)


def is_observed(module: nn.Module) -> bool:
    """
    Whether code outside this package observes or replaces the computation of a module or a submodule.

    It checks for hooks of any kind, on the module or global, and for a `forward` set on an instance, as accelerate
    does. In that case, no shortcut may skip or change the module's call.
    """
    return nn.modules.module._has_any_global_hook() or any(
        each._forward_hooks
        or each._forward_pre_hooks
        or each._backward_hooks
        or each._backward_pre_hooks
        or "forward" in each.__dict__
        for each in module.modules()
    )


class _RMSNorm(torch.autograd.Function):
    """`weight * x * r` with `r = (mean x² + eps)^-1/2`. Saves only x, which others save anyway, and r per row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        r = _inverse_rms(x, eps)
        return (x * r) * weight, r

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])
        ctx.save_for_forward(x, weight, output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _: object) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient may be differentiated again, and r depends on x
            r = _inverse_rms(x, ctx.eps)
        products = grad * x
        slope = (products @ weight).unsqueeze(-1) * r.pow(3) / -x.shape[-1]
        grad_x = torch.addcmul(grad * weight * r, x, slope)
        return grad_x, (products * r).sum(tuple(range(x.dim() - 1))), None

    @staticmethod
    def jvp(ctx, x_tangent: Tensor, weight_tangent: Tensor, _: None) -> tuple[Tensor, None]:
        x, weight, r = ctx.saved_tensors
        tangent = torch.zeros_like(x)
        if x_tangent is not None:
            mean = (x * x_tangent).mean(-1, keepdim=True)
            tangent = tangent + (x_tangent * r - x * mean * r.pow(3)) * weight
        if weight_tangent is not None:
            tangent = tangent + x * r * weight_tangent
        return tangent, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up`. Saves both inputs and recomputes `silu(gate)` in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # the fused operator cannot be differentiated again
            return grad * up * _silu_derivative(gate), F.silu(gate) * grad
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad

    @staticmethod
    def jvp(ctx, gate_tangent: Tensor, up_tangent: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors
        tangent = torch.zeros_like(gate)
        if gate_tangent is not None:
            tangent = tangent + gate_tangent * up * _silu_derivative(gate)
        if up_tangent is not None:
            tangent = tangent + F.silu(gate) * up_tangent
        return tangent


def _silu_derivative(x: Tensor) -> Tensor:
    p = x.sigmoid()
    return p * (1 + x * (1 - p))
