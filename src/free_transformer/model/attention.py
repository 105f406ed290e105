"""Llama's attention with separate inputs for queries and for keys/values, as injection and the encoder need it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from .compat import (
    ALL_ATTENTION_FUNCTIONS,
    Cache,
    LlamaAttention,
    eager_attention_forward,
    is_flash_attention_requested,
)
from .configuration import FreeTransformerConfig
from .layout import Boundaries
from .sliding_window import WindowBlocks, attend_in_blocks

# `varlen_attn` is new in PyTorch 2.10 and its options differ between releases.
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
HALF = (torch.float16, torch.bfloat16)

Rotation = tuple[Tensor, Tensor]  # cosines, and sines that are negative in their first half, (B, T, 1, head_dim)


def rotary(embedding: nn.Module, states: Tensor, position_ids: Tensor) -> Rotation:
    """Returns the cosines and signed sines that rotate queries and keys by their positions."""
    cos, sin = embedding(states, position_ids)
    sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], dim=-1)
    return cos.unsqueeze(2), sin.unsqueeze(2)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """
    Applies rotary positions to queries or keys, (B, T, heads, head_dim).

    The sines carry the sign, so the halves of each head are swapped without a negated copy. This takes 4 operations
    instead of the 7 of `apply_rotary_pos_emb` and gives the same values bit-for-bit.
    """
    cos, sin = rotation
    swapped = states.roll(states.shape[-1] // 2, -1)
    return (states * cos).add_(swapped * sin)  # not in place: the encoder rotates one query to many positions


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """
    Computes attention in plain operations; all inputs are (B, heads, T, head_dim).

    In double precision it stays in double precision, unlike Llama's, which computes the softmax in single.

    Returns:
        the output, (B, T, heads, head_dim), and the weights, (B, heads, T, T).
    """
    if query.dtype != torch.float64:
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def takes_boundaries(config: FreeTransformerConfig, hidden_states: Tensor) -> bool:
    """
    Whether attention separates the documents of a batch by their boundaries instead of a T x T mask.

    Flash Attention does, and so does PyTorch's own attention (`sdpa`) if `has_varlen_kernel`.
    """
    if is_flash_attention_requested(config):
        return True
    return config._attn_implementation == "sdpa" and has_varlen_kernel(config, hidden_states)


def has_varlen_kernel(config: FreeTransformerConfig, hidden_states: Tensor) -> bool:
    """Whether `varlen_attention` can run: on CUDA in half precision, without dropout, with heads of at most 256."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    fits = config.attention_dropout == 0 and config.head_dim % 8 == 0 and config.head_dim <= 256
    slides = config.sliding_window is None or "window_size" in VARLEN_OPTIONS
    return device == "cuda" and dtype in HALF and fits and slides


def varlen_attention(
    module: "SplitAttention", query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries
) -> tuple[Tensor, None]:
    """
    Computes attention within documents by PyTorch's Flash Attention kernel; all inputs are (B, heads, T, head_dim).

    The queries of a causal module are tokens. The queries of the encoder, which is not causal, are plans.

    Returns:
        the output, (B, T, heads, head_dim), and None.
    """
    batch, heads, queries = query.shape[:3]
    causal = bool(module.is_causal)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    before = -1 if module.window is None else module.window - 1
    options: dict[str, Any] = {"window_size": (before, 0) if causal else (-1, -1)}
    if "window_size" not in VARLEN_OPTIONS:
        options = {"is_causal": causal}
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True
    else:
        key, value = (each.repeat_interleave(heads // each.shape[1], 1) for each in (key, value))
    query, key, value = (each.transpose(1, 2).flatten(0, 1).to(dtype) for each in (query, key, value))
    tokens, longest = boundaries.tokens, boundaries.max_tokens
    of_queries = (tokens, longest) if causal else (boundaries.plans, boundaries.max_plans)
    output = varlen_attn(query, key, value, of_queries[0], tokens, of_queries[1], longest, **options)
    assert isinstance(output, Tensor)
    return output.view(batch, queries, heads, -1), None


class SplitAttention(LlamaAttention):
    """
    `LlamaAttention` with separate inputs for queries and for keys/values, and the same weights and names.

    With `query_key_norm` it computes Qwen 3's attention, and without `attention_output_bias` Qwen 2's.
    """

    def __init__(self, config: FreeTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.attention_output_bias is not None and config.attention_output_bias != config.attention_bias:
            width = config.num_attention_heads * self.head_dim
            self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        self.norms_heads = config.query_key_norm
        if self.norms_heads:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    @property
    def window(self) -> int | None:
        """Number of tokens that a token attends to, itself included; None for all, as in the encoder."""
        return self.config.sliding_window if self.is_causal else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        key_value_states: Tensor | None = None,
        key_value_position_embeddings: Rotation | None = None,
        implementation: str | None = None,
        boundaries: Boundaries | None = None,
        blocks: WindowBlocks | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: input of the queries, (B, Q, D), or (1, 1, D) if all queries differ only in position.
            attention_mask: in the form that the attention backend takes.
            key_value_states: input of the keys and values, (B, T, D), default `hidden_states`.
            key_value_position_embeddings: positions of the keys, default those of the queries.
            implementation: attention backend, default the configuration's.
            boundaries: document boundaries, instead of a mask; see `takes_boundaries`.
            blocks: blocks of a sliding window, instead of a mask.

        Returns:
            the output, (B, Q, D), and the attention weights, (B, heads, Q, T), or None if the backend returns none.
        """
        if key_value_states is None:
            key_value_states = hidden_states

        def heads(projected: Tensor) -> Tensor:  # (B, T, D) -> (B, T, heads, head_dim)
            return projected.view(*projected.shape[:2], -1, self.head_dim)

        query = heads(self.q_proj(hidden_states))
        key, value = heads(self.k_proj(key_value_states)), heads(self.v_proj(key_value_states))
        if self.norms_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, position_embeddings).transpose(1, 2)
        key = rotate(key, key_value_position_embeddings or position_embeddings).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        if boundaries is not None:
            output, weights = varlen_attention(self, query, key, value, boundaries)
            return self.o_proj(output.flatten(2)), weights
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation or self.config._attn_implementation, eager_attention
        )
        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        if blocks is not None:
            output = attend_in_blocks(partial(attend, self), blocks, query, key, value, **options)
            return self.o_proj(output.flatten(2)), None
        if self.window is not None:
            options["sliding_window"] = self.window
            if query.shape[2] == 1 and attention_mask is None:  # the cache may hold more
                key, value = key[:, :, -self.window :], value[:, :, -self.window :]
        output, weights = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(output.flatten(2)), weights
