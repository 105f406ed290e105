"""
Llama's layers with fewer passes over memory: the same weights under the same names, the same values up to rounding.

`transformers` spells the norm, the rotary positions and the gated unit out in small operations, each of which reads and
writes all hidden states, and autograd keeps what lies between them: a quarter of a training step on a CPU. Here each is
one operation with a backward of its own. What is traced (`torch.compile`, `torch.export`) gets the plain spelling,
which a compiler fuses better than we would.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .attention import Rotation, SplitAttention
from .losses import chunked_reconstruction_loss
from .products import lay_together, multiply, project, project_together
from .rounding import ROUNDING

SMALL = 2**14  # values, under which an operation's call costs more than its work


class RMSNorm(LlamaRMSNorm):
    """`LlamaRMSNorm`; also in double precision, where Llama's computes in single."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        narrow = hidden_states.dtype.itemsize < 4 and hidden_states.is_cpu
        if hidden_states.dtype != self.weight.dtype or narrow or ROUNDING.as_llama:
            return super().forward(hidden_states)
        # a step of generation too, whatever its rows: they round alike then, however many are written together
        small = not torch.is_grad_enabled() and (hidden_states.numel() < SMALL or hidden_states.shape[-2] == 1)
        if not hidden_states.is_cpu or small or torch.compiler.is_compiling():
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class MLP(LlamaMLP):
    """`LlamaMLP`, which keeps one tensor less of its inner width for the backward pass."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.is_swiglu = config.hidden_act == "silu"  # a look into a configuration is slow

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_swiglu or torch.compiler.is_compiling():
            return super().forward(x)
        gate, up = project_together((self.gate_proj, self.up_proj), x)
        return project(self.down_proj, _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up))

    def lay_together(self) -> None:
        """See `products.lay_together`."""
        lay_together((self.gate_proj, self.up_proj))


class DecoderLayer(GradientCheckpointingLayer):
    """`LlamaDecoderLayer` of the parts above."""

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
        self, hidden_states: Tensor, queries: Tensor, key_values: Tensor, last_only: bool = False, **kwargs: Any
    ) -> Tensor:
        """
        What the layer makes of its normed inputs.

        Args:
            last_only: only of the last token: all give their keys and values, and it alone asks.
        """
        if last_only:
            hidden_states, queries = hidden_states[:, -1:], queries[:, -1:]
            kwargs |= _of_last_token(**kwargs)
        attended, _ = self.self_attn(queries, key_value_states=key_values, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _of_last_token(
    position_embeddings: Rotation, attention_mask: Tensor | None, position_ids: Tensor, **_: Any
) -> dict[str, Any]:
    cos, sin = position_embeddings
    return {
        "position_embeddings": (cos[:, -1:], sin[:, -1:]),
        "key_value_position_embeddings": position_embeddings,
        "attention_mask": None if attention_mask is None else attention_mask[:, :, -1:],
        "position_ids": position_ids[:, -1:],
    }


class Head(nn.Linear):
    """
    From hidden states to logits; with labels to the reconstruction, without ever holding all logits.

    Attributes:
        in_columns: whether its weight is cut over processes, which then have to put logits together.
    """

    in_columns = False

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        """
        Args:
            input: (B, T, D).
            labels: (B, T), see `reconstruction_loss`.

        Returns:
            logits, (B, T, V), or where labels are given the sum of their cross-entropies in nats.
        """
        if labels is None:
            traced = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(self.weight) is not nn.Parameter
            return super().forward(input) if traced else multiply(input, self.weight)
        return chunked_reconstruction_loss(input, self.weight, labels)


class _RMSNorm(torch.autograd.Function):
    """`x * r * weight`, `r = (mean x² + eps)^-1/2`: keeps x, which others keep as well, and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        products = (grad * x).flatten(0, -2)  # (N, D)
        of_rows = r.flatten()
        slope = torch.mv(products, weight) * of_rows.pow(3).div_(-x.shape[-1])
        of_x = (grad * weight).mul_(r).addcmul_(x, slope.view(r.shape))
        return of_x, torch.mv(products.T, of_rows), None


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
