"""
Causal attention within a sliding window, computed in blocks in O(T * window) instead of O(T * T) operations.

Queries are split into blocks of C >= window tokens. A block attends to itself and to the `reach = window - 1` tokens
before it, which are all in the previous block. The result equals that of the full T x T mask up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BLOCK = 32  # tokens; smaller blocks cost more calls than they save operations (benchmarks/sliding_window.py)
MIN_BLOCKS = 4  # per text; with fewer, a full mask costs about the same


@dataclass
class WindowBlocks:
    """
    Attention masks for rows of N blocks of C tokens.

    Attributes:
        size: C.
        first: (1 or B, 1, C, C) bool, the mask of each row's first block.
        others: (1 or B * (N - 1), 1, C, reach + C) bool, the masks of the other blocks; a single one if they are equal.
    """

    size: int
    first: Tensor
    others: Tensor

    @property
    def equal(self) -> bool:
        """Whether every row is a single document without padding, so that one mask serves all blocks."""
        return len(self.others) == 1


def window_blocks(window: int, tokens: int, device: torch.device, groups: Tensor | None) -> WindowBlocks | None:
    """
    Builds the masks of all blocks.

    Args:
        tokens: number of tokens per row, T.
        groups: (B, T); tokens attend only within their own group (a document, or padding). None for one group.

    Returns:
        the masks, or None if texts are too short for blocks to save time.
    """
    size = max(window, MIN_BLOCK)
    if tokens < MIN_BLOCKS * size:
        return None
    reach = window - 1
    query, key = torch.arange(size, device=device)[:, None], torch.arange(-reach, size, device=device)
    band = (key <= query) & (key > query - window)
    first, others = band[None, :, reach:], band[None]
    if groups is not None:
        own = _split(groups, size)
        first = first & (own[:, 0, :, None] == own[:, 0, None, :])
        others = others & (own[:, 1:].flatten(0, 1)[..., None] == _with_reach(own, reach)[:, None])
    return WindowBlocks(size, first[:, None], others[:, None])


def attend_in_blocks(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    blocks: WindowBlocks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> Tensor:
    """
    Computes attention block by block.

    Args:
        attend: an attention function of `transformers` with its module bound.
        options: further arguments of `attend`.
        query, key, value: (B, heads, T, head_dim).

    Returns:
        (B, T, heads, head_dim).
    """

    def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        heads_first = (states.transpose(1, 2) for states in (query, key, value))
        return attend(*heads_first, mask, **options)[0]

    batch, _, tokens, _ = query.shape
    reach = blocks.others.shape[-1] - blocks.size
    query, key, value = (_split(states.transpose(1, 2), blocks.size) for states in (query, key, value))
    first = attended(query[:, 0], key[:, 0], value[:, 0], blocks.first)
    others = attended(query[:, 1:].flatten(0, 1), _with_reach(key, reach), _with_reach(value, reach), blocks.others)
    return torch.cat([first[:, None], others.unflatten(0, (batch, -1))], 1).flatten(1, 2)[:, :tokens]


def _split(values: Tensor, size: int) -> Tensor:
    """Splits (B, T, ...) into (B, N, C, ...), with zeros after the last token, to which no token attends."""
    if missing := -values.shape[1] % size:
        values = F.pad(values, [0, 0] * (values.dim() - 2) + [0, missing])
    return values.unflatten(1, (-1, size))


def _with_reach(blocks: Tensor, reach: int) -> Tensor:
    """Prepends the end of the previous block to each later block: (B, N, C, ...) -> (B * (N - 1), reach + C, ...)."""
    before = blocks[:, :-1, blocks.shape[2] - reach :]
    return torch.cat([before, blocks[:, 1:]], 2).flatten(0, 1)
