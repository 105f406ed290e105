"""A cache of keys and values that does not copy all of itself for every token that is written."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 256  # tokens


class GrowingLayer(DynamicLayer):
    """
    `DynamicLayer` with room for tokens to come, an eighth of those it holds: a new one is written behind the others.

    Args:
        most: tokens that it will ever hold, as far as is known.

    Attributes:
        rooms: the memory that `keys` and `values` are the beginnings of, and some more.
    """

    keys: Any  # tensors, once there are any
    values: Any

    def __init__(self, most: int | None = None):
        super().__init__()
        self.most = most
        self.rooms: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Both (B, heads, T, head_dim), of the new tokens; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, which: int, old: Tensor, new: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (new.requires_grad or old.requires_grad):
            return torch.cat([old, new], dim=-2)  # what a backward pass needs may not be written over
        held = old.shape[-2] if old.numel() else 0
        total = held + new.shape[-2]
        room = self.rooms[which]
        # Whoever reorders or selects rows of a cache puts other tensors in the place of ours.
        ours = room is not None and (held == 0 or old.data_ptr() == room.data_ptr()) and new.shape[:2] == room.shape[:2]
        if room is None or not ours or total > room.shape[-2]:
            roomy = total + max(LEAST_ROOM, total // 8)
            if self.most is not None:
                roomy = max(total, min(roomy, self.most))
            room = new.new_empty(*new.shape[:2], roomy, new.shape[-1])
            if held:
                room[:, :, :held] = old
            self.rooms[which] = room
        room.narrow(2, held, total - held).copy_(new)
        return room.narrow(2, 0, total)


class GrowingCache(DynamicCache):
    """`DynamicCache` of `GrowingLayer`s."""

    def __init__(self, config: PreTrainedConfig, most: int | None = None):
        super().__init__(config=config)
        for place, layer in enumerate(self.layers):  # type: ignore[has-type]
            if type(layer) is DynamicLayer:
                self.layers[place] = GrowingLayer(most)  # type: ignore[has-type]
