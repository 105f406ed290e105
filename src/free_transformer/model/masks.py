"""Attention masks: which tokens are padding, which documents a row holds, and the form that a backend takes."""

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
    Tells padding from tokens.

    Returns:
        (B, past + T) bool, False on padding; None where there is none, or where that is not known.

    Raises:
        ValueError: for a mask of another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        if attention_mask.shape[1] != past + tokens:
            cached = f" ({past} of them in the cache)" if past else ""
            raise InputError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: ({batch}, {past + tokens}) is needed, a "
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
        raise InputError(f"attention_mask of shape {tuple(attention_mask.shape)}: 2 or 4 dimensions are needed")
    if torch.compiler.is_compiling():  # which cannot ask for values
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
    Args:
        attention_mask: as given to the model; real: `token_mask` of it; packed: the layout of packed rows.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        if cache is not None:  # with a sliding window it holds the last tokens only
            held, _ = cache.get_mask_sizes(hidden_states.shape[1], 0)
            attention_mask = attention_mask[..., -held:]
        return mask_of_backend(config, attention_mask, hidden_states), {}
    if packed is not None:
        packed.boundaries = find_boundaries(packed) if takes_boundaries(config, hidden_states) else None
        return mask_of_layout(config, packed, hidden_states, cache)
    # without positions: documents are told apart here, padding or not
    return causal_mask(config, hidden_states, cache, real)


def mask_of_layout(
    config: FreeTransformerConfig, layout: PlanLayout, hidden_states: Tensor, cache: Cache | None
) -> MaskAndArguments:
    """`mask_of_text` of a layout, without reading values: padding is masked as a separate document."""
    if layout.boundaries is not None and takes_boundaries(config, hidden_states):
        if is_flash_attention_requested(config):
            return None, layout.boundaries.for_flash_attention()
        return None, {"boundaries": layout.boundaries}
    groups = None
    if layout.token_mask is not None or layout.token_document is not None:
        if is_flash_attention_requested(config):
            raise InputError(
                f"attn_implementation={config._attn_implementation!r} takes no packed rows with padding inside a "
                "document; call model.set_attn_implementation('sdpa')"
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
    The mask of a causal layer, within the configuration's sliding window if it has one.

    Args:
        real: (B, past + T) bool, False on padding, or a mask that the attention backend takes.
        groups: (B, T), tokens attend within their own group only; for texts from their beginning.
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
    """Whether attention gets only the keys of the new tokens; a static cache also has columns for later ones."""
    return cache is None or (not cache.is_compileable and int(cache.get_seq_length()) == 0)


def mask_of_backend(config: FreeTransformerConfig, mask: Tensor, hidden_states: Tensor) -> Tensor:
    """A mask of four dimensions in the form that the attention backend takes."""
    if is_flash_attention_requested(config):
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)}: attn_implementation={config._attn_implementation!r} takes "
            "masks of two dimensions only; call model.set_attn_implementation('sdpa')"
        )
    if mask.is_floating_point() or (config._attn_implementation == "sdpa" and mask.dtype == torch.bool):
        return mask
    additive = hidden_states.new_zeros(mask.shape)
    return additive.masked_fill(~mask.bool(), torch.finfo(additive.dtype).min)
