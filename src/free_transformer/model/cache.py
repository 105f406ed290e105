"""State between two steps of decoding: keys, values, and the plans of the texts."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from .compat import DynamicLayer

MIN_SPARE = 256  # tokens


class GrowingLayer(DynamicLayer):
    """
    `DynamicLayer` with spare capacity: appending a token does not copy all the others.

    Each time the capacity is exhausted, it grows by an eighth of the tokens held, so that the number of values copied
    per token stays bounded. `DynamicLayer` copies all of them for every token.

    Args:
        max_length: tokens that it will ever hold, as far as is known.

    Attributes:
        buffers: the memory that `keys` and `values` are the beginnings of, once there is spare capacity.
    """

    keys: Any  # tensors, once there are any
    values: Any

    def __init__(self, max_length: int | None = None):
        super().__init__()
        self.max_length = max_length
        self.buffers: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends the states of new tokens, both (B, heads, T, head_dim). Returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.get_seq_length() == 0:  # the prompt is kept as it is: a text that is only read needs no copy
            self.keys, self.values = key_states, value_states
        else:
            self.keys = self._append(0, self.keys, key_states)
            self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, which: int, old: Tensor, new: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (new.requires_grad or old.requires_grad):
            return torch.cat([old, new], dim=-2)  # a backward pass may need what stands in the buffer
        held = old.shape[-2]
        total = held + new.shape[-2]
        buffer = self.buffers[which]
        # Reordering or selecting rows of a cache replaces `keys` and `values` by other tensors.
        ours = buffer is not None and old.data_ptr() == buffer.data_ptr() and new.shape[:2] == buffer.shape[:2]
        if buffer is None or not ours or total > buffer.shape[-2]:
            capacity = total + max(MIN_SPARE, total // 8)
            if self.max_length is not None:
                capacity = max(total, min(capacity, self.max_length))
            buffer = new.new_empty(*new.shape[:2], capacity, new.shape[-1])
            buffer[:, :, :held] = old
            self.buffers[which] = buffer
        buffer.narrow(2, held, total - held).copy_(new)
        return buffer.narrow(2, 0, total)


@dataclass
class PlanState:
    """
    The plans of a batch of texts that are being generated, and where further ones come from.

    Attributes:
        plan: (B, P, H) bool, the plans so far; None before the prompt has been read.
        prompt_plan, prior: where plans that are not known come from, as in `FreeTransformer.generate`.
        new_tokens: tokens that may follow the prompt. Their plans are sampled when the prompt is read.
        prompt_length: tokens of the prompt as `generate` counts them, 0 for a prompt of embeddings.
        columns: tokens of the prompt as the model counts them, padding and virtual tokens included; None before it
            has been read.
        first_position: (B, 1), the position of each text's first token.
        padded: whether some token of the prompt is padding. Otherwise a new token attends to all before it, and needs
            no mask.
        vectors: (B, 1, D), R, where one plan covers the whole text: it is looked up once.
        texts_per_prompt: how many consecutive rows are texts of one prompt with stratified plans (`stratified.py`); 1
            for independent plans.
        generator: random numbers for the plans of new text. They have a stream of their own, plan after plan, so that
            a longer text begins as a shorter one of the same seed does.
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

    def select_rows(self, rows: Tensor) -> "PlanState":
        """The state of some of the texts, in a given order: (N,) indices."""

        def selected(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows.to(values.device)]

        changes = {name: selected(getattr(self, name)) for name in ("plan", "first_position", "vectors")}
        return PlanState(**{**vars(self), **changes, "texts_per_prompt": 1})  # the rows may be any

    def stream(self, device: torch.device) -> torch.Generator:
        """The generator of plans of new text, seeded from torch's own random numbers when it is first needed."""
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
    `DynamicCache` that also knows the plans its texts were generated under, and has spare capacity.

    Operations on rows (reordering, repeating, selecting) apply to the plans too. So a step that continues a text from
    this cache needs no plan: it continues under the same one.

    Args:
        max_length: tokens that it will ever hold, as far as is known.

    Attributes:
        state: the plans, None while the cache is empty.
        packed: whether it holds packed rows, which cannot be continued.
    """

    def __init__(self, config: PreTrainedConfig, max_length: int | None = None):
        super().__init__(config=config)
        for place, layer in enumerate(self.layers):  # type: ignore[has-type]
            if type(layer) is DynamicLayer:
                self.layers[place] = GrowingLayer(max_length)  # type: ignore[has-type]
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

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select_rows(rows)
