"""State kept between decoding steps: keys, values, and the plans of the texts."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from .compat import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from .long_text import TextContext

MIN_SPARE = 256  # tokens


class SpareCapacity:
    """
    Appends keys and values to a cache layer without copying the existing ones.

    When the capacity is exhausted, the tokens move to a buffer with room for an eighth more, so the number of values
    copied per token stays bounded.

    Args:
        max_length: maximum number of tokens of the texts, if known.

    Attributes:
        buffers: buffers that `keys` and `values` are views of, once there is spare capacity.
    """

    keys: Tensor  # once there are any
    values: Tensor
    get_seq_length: Callable[[], int]

    def __init__(self, max_length: int | None = None, *args: object):
        super().__init__(*args)
        self.max_length = max_length
        self.buffers: list[Tensor | None] = [None, None]

    def append(self, key_states: Tensor, value_states: Tensor, max_spare: int | None) -> tuple[Tensor, Tensor]:
        """Returns old and new states, (B, heads, T, head_dim). `max_spare` bounds the added capacity, in tokens."""
        if self.get_seq_length() == 0 or self.keys.numel() == 0:
            return key_states, value_states  # no copy of a prompt, which may not be continued
        held, new = (self.keys, self.values), (key_states, value_states)
        keys, values = (self._append(which, held[which], new[which], max_spare) for which in range(2))
        return keys, values

    def _append(self, which: int, old: Tensor, new: Tensor, max_spare: int | None) -> Tensor:
        if torch.is_grad_enabled() and (new.requires_grad or old.requires_grad):
            return torch.cat([old, new], dim=-2)  # a backward pass may need the contents of the buffer
        held = old.shape[-2]
        total = held + new.shape[-2]
        start, buffer = 0, self.buffers[which]
        # Reordering or selecting rows of a cache replaces `keys` and `values` by other tensors.
        if buffer is not None and _shares_memory(old, buffer) and new.shape[:2] == buffer.shape[:2]:
            start = (old.storage_offset() - buffer.storage_offset()) // buffer.stride(2)
        else:
            buffer = None
        if buffer is None or start + total > buffer.shape[-2]:
            spare = max(MIN_SPARE, total // 8)
            if max_spare is not None:
                spare = max(0, min(spare, max_spare))
            start, buffer = 0, new.new_empty(*new.shape[:2], total + spare, new.shape[-1])
            buffer[:, :, :held] = old
            self.buffers[which] = buffer
        buffer.narrow(2, start + held, total - held).copy_(new)
        return buffer.narrow(2, start, total)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class GrowingLayer(SpareCapacity, DynamicLayer):
    """`DynamicLayer` with spare capacity. `DynamicLayer` copies all tokens whenever one is appended."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends the states of new tokens, both (B, heads, T, head_dim). Returns the states of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        total = self.get_seq_length() + key_states.shape[-2]
        max_spare = None if self.max_length is None else self.max_length - total
        self.keys, self.values = self.append(key_states, value_states, max_spare)
        return self.keys, self.values


class WindowLayer(SpareCapacity, DynamicSlidingWindowLayer):
    """
    `DynamicSlidingWindowLayer` with spare capacity.

    It holds the `sliding_window - 1` tokens that the next one attends to, in memory for at most twice as many.
    `DynamicSlidingWindowLayer` copies all of them whenever a token is appended.
    """

    cumulative_length: int  # tokens so far, including those no longer held

    def __init__(self, sliding_window: int, max_length: int | None = None):
        super().__init__(max_length, sliding_window)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends the states of new tokens. Returns the states of all tokens that a new token attends to."""
        if self.record_past:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        total, max_spare = self.cumulative_length + key_states.shape[-2], self.sliding_window
        if self.max_length is not None:
            max_spare = min(max_spare, self.max_length - total)
        states = self.append(key_states, value_states, max_spare)
        self.cumulative_length = total
        surplus = states[0].shape[-2] - (self.sliding_window - 1)
        if surplus <= 0:
            self.keys, self.values = states
        elif surplus <= self.sliding_window:
            self.keys, self.values = (each[:, :, surplus:] for each in states)
        else:  # a long prompt: copy, so that its memory is freed
            self.keys, self.values = (each[:, :, surplus:].clone() for each in states)
        return states


@dataclass
class PlanState:
    """
    The plans of a batch of texts during generation, and the source of further plans.

    Attributes:
        plan: (B, P, H) bool, the plans so far; None before the prompt has been read.
        prompt_plan, prior: sources of missing plans, as in `FreeTransformer.generate`.
        new_tokens: maximum number of tokens after the prompt. Their plans are sampled when the prompt is read.
        prompt_length: tokens of the prompt as `generate` counts them, 0 for a prompt of embeddings.
        columns: tokens of the prompt as the model counts them, padding and virtual tokens included; None before the
            prompt has been read.
        first_position: (B, 1), the position of each text's first token.
        padded: whether any token of the prompt is padding. If not, a new token attends to all earlier tokens and
            needs no mask.
        vectors: (B, 1, D), R if one plan covers the whole text. It is looked up only once.
        texts_per_prompt: number of consecutive rows that continue the same prompt with stratified plans
            (`stratified.py`); 1 for independent plans.
        generator: random numbers for the plans of new text. Plans have their own stream and are sampled one after
            another, so the start of a text does not depend on its length.
        changes: later plans, (B, 1, H), keyed by the number of new tokens after which they replace this one.
        context: the tokens that the model sees, if a text may exceed the trained length.
        dropped_plans: (B, 1), the number of plans before the first token that the model sees; None if it sees all.
    """

    plan: Tensor | None = None
    prompt_plan: str = "posterior"
    prior: str = "uniform"
    new_tokens: int = 0
    prompt_length: int = 0
    columns: int | None = None
    first_position: Tensor | None = None
    padded: bool = True
    vectors: Tensor | None = None
    texts_per_prompt: int = 1
    generator: torch.Generator | None = None
    changes: dict[int, Tensor] = field(default_factory=dict)
    context: "TextContext | None" = None
    dropped_plans: Tensor | None = None

    def select_rows(self, rows: Tensor) -> "PlanState":
        """Returns the state of some of the texts: (N,) indices, in any order."""

        def selected(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows.to(values.device)]

        changes = {
            name: selected(getattr(self, name)) for name in ("plan", "first_position", "vectors", "dropped_plans")
        }
        return PlanState(**{**vars(self), **changes, "texts_per_prompt": 1})  # rows of one prompt may be separated

    def stream(self, device: torch.device) -> torch.Generator:
        """Returns the generator for plans of new text, which is seeded from torch's global generator on first use."""
        if self.generator is None:
            self.generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
        return self.generator

    def __deepcopy__(self, memo: dict) -> "PlanState":
        values = {name: value for name, value in vars(self).items() if name != "generator"}
        copied = PlanState(**copy.deepcopy(values, memo))
        if self.generator is not None:
            copied.generator = torch.Generator(self.generator.device)
            copied.generator.set_state(self.generator.get_state())
        return copied


class PlanCache(DynamicCache):
    """
    `DynamicCache` with spare capacity that also stores the plans of its texts.

    Operations on rows (reordering, repeating, selecting) apply to the plans too. A step that continues a text from
    this cache therefore needs no `plan` argument.

    Args:
        max_length: maximum number of tokens that it will hold, if known.

    Attributes:
        state: the plans, None while the cache is empty.
        packed: whether it holds packed rows, which cannot be continued.
    """

    def __init__(self, config: PreTrainedConfig, max_length: int | None = None):
        super().__init__(config=config)
        for place, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[place] = GrowingLayer(max_length)
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[place] = WindowLayer(layer.sliding_window, max_length)
        self.state: PlanState | None = None
        self.packed = False

    def reset(self) -> None:
        super().reset()
        self.state, self.packed = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.state is not None and self.state.plan is not None:
            self._select(torch.arange(len(self.state.plan)).repeat_interleave(repeats))

    def replace_rows(self, rows: Sequence[int], read: "PlanCache", columns: int) -> None:
        """
        Replaces some texts by those of another cache, and keeps the last `columns` columns of all texts.

        Texts are right-aligned; the columns before a shorter text hold arbitrary values.
        """
        for layer, other in zip(self.layers, read.layers, strict=True):
            layer.keys = _with_rows(layer.keys, rows, other.keys, columns)
            layer.values = _with_rows(layer.values, rows, other.values, columns)

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select_rows(rows)


def _with_rows(states: Tensor, rows: Sequence[int], read: Tensor | None, columns: int) -> Tensor:
    """Returns the last columns of keys or values, (B, heads, T, head_dim), with the ends of some rows replaced."""
    kept = states[:, :, states.shape[2] - columns :].clone()
    if read is not None:
        kept[list(rows), :, columns - read.shape[2] :] = read
    return kept
