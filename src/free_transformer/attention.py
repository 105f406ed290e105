"""Llama's attention with keys and values of their own: what the injection and the encoder have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from .products import lay_together, project, project_together
from .rounding import ROUNDING

Rotation = tuple[Tensor, Tensor]  # cosines, and sines that are negative in their first half, (B, T, head_dim)


def rotary(embedding: nn.Module, states: Tensor, position_ids: Tensor) -> Rotation:
    """Cosines and signed sines of the angles that positions turn queries and keys by."""
    cos, sin = embedding(states, position_ids)
    return cos, torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], dim=-1)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions of queries or of keys, (B, T, heads, head_dim)."""
    cos, sin = rotation[0].unsqueeze(2), rotation[1].unsqueeze(2)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Rotate.apply(states, cos, sin)
    return _turned(states, cos, sin)


class _Rotate(torch.autograd.Function):
    """Turns each pair of values by its angle; the gradient is turned back. Of the states it keeps nothing."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    other = states.roll(states.shape[-1] // 2, -1)  # of each pair
    if ROUNDING.as_llama:
        return states * cos + other * sin
    return torch.addcmul(states * cos, other, sin)


class SplitAttention(LlamaAttention):
    """
    `LlamaAttention` whose queries and whose keys and values come from two places; same weights, same names.

    With `query_key_norm` it is Qwen 3's, and without `attention_output_bias` Qwen 2's.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.attention_output_bias is not None and config.attention_output_bias != config.attention_bias:
            width = config.num_attention_heads * self.head_dim
            self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        self.norms_heads = config.query_key_norm
        if self.norms_heads:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        key_value_states: Tensor | None = None,
        key_value_position_embeddings: Rotation | None = None,
        implementation: str | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: (B, Q, D), what the queries are computed from; (1, 1, D) where all are equal but for their
                position.
            key_value_states: (B, T, D), default `hidden_states`.
            key_value_position_embeddings: positions of the keys, default those of the queries.
            implementation: of attention, default the configuration's.
        """
        if key_value_states is None:
            key_value_states = hidden_states

        def heads(projected: Tensor) -> Tensor:  # (B, T, D) -> (B, T, heads, head_dim)
            return projected.view(*projected.shape[:2], -1, self.head_dim)

        if key_value_states is hidden_states:
            query, key, value = project_together((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        else:
            query = project(self.q_proj, hidden_states)
            key, value = project_together((self.k_proj, self.v_proj), key_value_states)
        query, key, value = heads(query), heads(key), heads(value)
        if self.norms_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, position_embeddings).transpose(1, 2)
        key = rotate(key, key_value_position_embeddings or position_embeddings).transpose(1, 2)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation or self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return project(self.o_proj, output.flatten(2)), weights

    def lay_together(self) -> None:
        """See `products.lay_together`."""
        lay_together((self.q_proj, self.k_proj, self.v_proj))
