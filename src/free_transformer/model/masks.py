"""Attention masks for padding and packed documents, in the form that each attention backend takes."""

import torch
from torch import Tensor

from .attention import takes_boundaries
from .compat import Cache, create_causal_mask, create_sliding_window_causal_mask, is_flash_attention_requested
from .configuration import FreeTransformerConfig
from .errors import InputError
from .layout import PlanLayout, find_boundaries, same_document
from .sliding_window import window_blocks

# A mask for the layers, and arguments of the attention backend that replace one.
MaskAndArguments = tuple[Tensor | None, dict[str, object]]


def token_mask(attention_mask: Tensor | None, batch: int, past: int, tokens: int) -> Tensor | None:
    """
    Finds the padding in an attention mask.

    Returns:
        (B, past + T) bool, False on padding; None without padding, or if it cannot be determined.

    Raises:
        ValueError: for a mask of another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        if attention_mask.shape[1] != past + tokens:
            cached = f" ({past} of them in the cache)" if past else ""
            raise InputError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: expected ({batch}, {past + tokens}), a "
                f"column for each token{cached}"
            )
        mask = attention_mask.bool()
    elif attention_mask.dim() == 4 and past == 0:
        own = attention_mask[:, 0].diagonal(dim1=1, dim2=2)
        lowest = torch.finfo(own.dtype).min / 2 if own.is_floating_point() else 0
        mask = (own > lowest).expand(batch, -1)
    elif attention_mask.dim() == 4:
        return None
    else:
        raise InputError(f"attention_mask of shape {tuple(attention_mask.shape)}: expected 2 or 4 dimensions")
    if torch.compiler.is_compiling():  # values are not available
        return mask
    return None if mask.all() else mask


def mask_of_text(
    config: FreeTransformerConfig,
    attention_mask: Tensor | None,
    real: Tensor | None,
    packed: PlanLayout | None,
    hidden_states: Tensor,
    cache: Cache | None,
) -> MaskAndArguments:
    """
    Returns the mask of a batch for the layers, or attention arguments that replace it.

    Args:
        attention_mask: as passed to the model.
        real: `token_mask` of it.
        packed: the layout of packed rows, else None.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        if cache is not None:  # with a sliding window it holds the last tokens only
            held, _ = cache.get_mask_sizes(hidden_states.shape[1], 0)
            attention_mask = attention_mask[..., -held:]
        return mask_of_backend(config, attention_mask, hidden_states), {}
    if packed is not None:
        packed.boundaries = find_boundaries(packed) if takes_boundaries(config, hidden_states) else None
        return mask_of_layout(config, packed, hidden_states, cache)
    # position_ids=None, from which `transformers` would derive documents itself
    return causal_mask(config, hidden_states, cache, real)


def mask_of_layout(
    config: FreeTransformerConfig, layout: PlanLayout, hidden_states: Tensor, cache: Cache | None
) -> MaskAndArguments:
    """`mask_of_text` for a layout, without reading tensor values: padding is masked as a separate document."""
    if layout.boundaries is not None and takes_boundaries(config, hidden_states):
        if is_flash_attention_requested(config):
            return None, layout.boundaries.for_flash_attention()
        return None, {"boundaries": layout.boundaries}
    groups = None
    if layout.token_mask is not None or layout.token_document is not None:
        if is_flash_attention_requested(config):
            raise InputError(
                f"attn_implementation={config._attn_implementation!r} does not support packed rows with padding inside "
                "a document; call model.set_attn_implementation('sdpa')"
            )
        groups, _ = layout.attention_groups
    return causal_mask(config, hidden_states, cache, groups=groups)


def causal_mask(
    config: FreeTransformerConfig,
    hidden_states: Tensor,
    cache: Cache | None,
    real: Tensor | None = None,
    groups: Tensor | None = None,
) -> MaskAndArguments:
    """
    Returns the mask of a causal layer, restricted to the configuration's sliding window if it has one.

    Args:
        real: (B, past + T) bool, False on padding, or a mask that the attention backend takes.
        groups: (B, T); tokens attend only within their own group. Requires an empty cache.
    """
    inside = None if groups is None else same_document(groups, groups)
    if config.sliding_window is None:
        return create_causal_mask(config, hidden_states, real, cache, None, and_mask_function=inside), {}
    if config._attn_implementation == "sdpa" and (real is None or real.dim() == 2) and _is_empty(cache):
        if groups is None and real is not None:
            groups = real.long()
        blocks = window_blocks(config.sliding_window, hidden_states.shape[1], hidden_states.device, groups)
        if blocks is not None:
            return None, {"blocks": blocks}
    return create_sliding_window_causal_mask(config, hidden_states, real, cache, None, and_mask_function=inside), {}


def _is_empty(cache: Cache | None) -> bool:
    """Whether attention gets only the keys of the new tokens. A static cache also has columns for later tokens."""
    return cache is None or (not cache.is_compileable and int(cache.get_seq_length()) == 0)


def mask_of_backend(config: FreeTransformerConfig, mask: Tensor, hidden_states: Tensor) -> Tensor:
    """Converts a four-dimensional mask to the form that the attention backend takes."""
    if is_flash_attention_requested(config):
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)}: attn_implementation={config._attn_implementation!r} takes "
            "only two-dimensional masks; call model.set_attn_implementation('sdpa')"
        )
    if mask.is_floating_point() or (config._attn_implementation == "sdpa" and mask.dtype == torch.bool):
        return mask
    additive = hidden_states.new_zeros(mask.shape)
    return additive.masked_fill(~mask.bool(), torch.finfo(additive.dtype).min)
