"""Llama's attention with keys and values of their own: what the injection and the encoder have in common."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward, rotate_half

Rotation = tuple[Tensor, Tensor]  # cos and sin, each (B, T, head_dim)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions of queries or of keys, (B, T, heads, head_dim)."""
    cos, sin = (part.unsqueeze(2) for part in rotation)
    return states * cos + rotate_half(states) * sin


class SplitAttention(LlamaAttention):
    """`LlamaAttention` whose queries and whose keys and values come from two places; same weights, same names."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        key_value_states: Tensor | None = None,
        key_value_position_embeddings: Rotation | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: (B, Q, D), what the queries are computed from; (1, 1, D) where all are equal but for their
                position.
            key_value_states: (B, T, D), default `hidden_states`.
            key_value_position_embeddings: positions of the keys, default those of the queries.
        """
        if key_value_states is None:
            key_value_states = hidden_states

        def heads(projected: Tensor) -> Tensor:  # (B, T, D) -> (B, T, heads, head_dim)
            return projected.unflatten(-1, (-1, self.head_dim))

        query = rotate(heads(self.q_proj(hidden_states)), position_embeddings)
        key = rotate(heads(self.k_proj(key_value_states)), key_value_position_embeddings or position_embeddings)
        value = heads(self.v_proj(key_value_states))
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights
