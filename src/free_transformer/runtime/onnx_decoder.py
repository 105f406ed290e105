"""State of texts during generation with an ONNX export."""

from typing import TYPE_CHECKING

import numpy as np

from free_transformer.model.context import tokens_to_drop, tokens_to_keep
from free_transformer.runtime.arrays import repeat_last_row

if TYPE_CHECKING:
    from onnxruntime import OrtValue

    from free_transformer.runtime.onnx_model import OnnxFreeTransformer


class OnnxDecoder:
    """
    Holds the plans, the cache, and its mask. Texts whose context is full are read again; see `model.context`.

    Args:
        mask: (B, T), mask of the prompts.
        plan: (B, P, H) bool.
        longest: maximum number of tokens that will be read of a text.
        limit: maximum number of tokens in a context, None for no limit.

    Attributes:
        changes: later plans, (B, 1, H), keyed by the number of new tokens after which they apply.
    """

    def __init__(
        self, model: "OnnxFreeTransformer", mask: np.ndarray, plan: np.ndarray, longest: int, limit: int | None = None
    ):
        self.model, self.mask, self.plan = model, mask, plan
        self.limit = limit
        self.longest = longest if limit is None else min(longest, limit)
        self.batch = len(mask)
        self.changes: dict[int, np.ndarray] = {}
        self.past: list[OrtValue] | None = None
        self._steps = 0
        self._dropped = np.zeros(self.batch, dtype=np.int64)  # number of tokens before the context of each text
        self._lengths = mask.sum(1)  # number of tokens in each context
        self._tokens = mask[:, :0]  # tokens of the contexts, (B, columns), padded on the left

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Reads the next tokens, (B, T), and returns the logits of the following token, (B, V)."""
        is_prompt, changed = self.past is None, self.changes.pop(self._steps, None)
        self._steps += 1
        if is_prompt:
            tokens, self.mask = _without_holes(tokens, self.mask)
            self._tokens = tokens
        else:
            self._tokens = np.concatenate([self._tokens, tokens], 1)[:, -(self._lengths.max() + 1) :]
            self._lengths = self._lengths + 1
        if changed is not None:
            self.plan = changed
        full = self.limit is not None and self._lengths.max() > self.limit
        if changed is not None or full:
            limit = self.limit or int(self._lengths.max())
            keep = limit if is_prompt or self.limit is None else tokens_to_keep(limit)
            self._drop(keep, limit if changed is None else keep)
            tokens = self._tokens
        return self._run(tokens)

    def _drop(self, keep: int, above: int) -> None:
        """Drops the cache, and shortens contexts of more than `above` tokens to the last `keep`."""
        for row in np.flatnonzero(self._lengths > above):
            dropped = tokens_to_drop(int(self._lengths[row]), keep, self.model.plan_span)
            self._dropped[row] += dropped
            self._lengths[row] -= dropped
        width = int(self._lengths.max())
        self._tokens = self._tokens[:, -width:]
        self.mask = (np.arange(width) >= width - self._lengths[:, None]).astype(np.int64)
        self.past = None

    def _run(self, tokens: np.ndarray) -> np.ndarray:
        model, graph = self.model, "decode"
        if self.past is None:
            tokens, self.mask = model.fit(tokens, self.mask, self.longest)
            if model.static is None:
                self.past = model.no_past(len(tokens))
            else:
                self.past, graph = [], "prefill"
        else:
            tokens = repeat_last_row(tokens, len(self.mask))
            self.mask = np.concatenate([self.mask, np.ones_like(tokens)], axis=1)
        columns = np.array([tokens.shape[1] - 1])
        plan = self._plan_of_context(len(tokens))
        inputs = {"input_ids": tokens, "attention_mask": self.mask, "columns": columns, "plan": plan}
        logits, *past = model.run(graph, inputs, self.past)
        self.past = model.within_window(past)
        if model.static is not None:  # the oldest column, which is padding, is dropped from the cache
            self.mask = self.mask[:, -model.static[1] :]
        return logits.numpy()[: self.batch, -1]

    def _plan_of_context(self, batch: int) -> np.ndarray:
        """Returns the plans of the contexts, (B, P, H), with a fixed number of plans for a static export."""
        model, plan = self.model, self.plan
        if model.plan_span != "sequence":
            wanted = model.num_plans(self.longest if model.static is None else model.static[1])
            places = self._dropped[:, None] // int(model.plan_span) + np.arange(wanted)
            plan = np.take_along_axis(plan, np.minimum(places, plan.shape[1] - 1)[..., None], 1)
        return repeat_last_row(plan, batch)


def context_of_prompt(
    tokens: np.ndarray, mask: np.ndarray, limit: int | None, plan_span: int | str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Returns the part of prompts that the model sees, which is their end if they exceed the context.

    Returns:
        tokens and mask, both (B, T), and the number of dropped tokens before them, (B,).
    """
    lengths = mask.sum(1)
    dropped = np.zeros_like(lengths)
    if limit is None or lengths.max() <= limit:
        return tokens, mask, dropped
    dropped += [tokens_to_drop(int(length), limit, plan_span) for length in lengths]
    tokens, _ = _without_holes(tokens, mask)
    width = int((lengths - dropped).max())
    return tokens[:, -width:], (np.arange(width) >= width - (lengths - dropped)[:, None]).astype(np.int64), dropped


def plans_of_ends(read: np.ndarray, sampled: np.ndarray, first: np.ndarray) -> np.ndarray:
    """
    Combines plans of prompts of which the encoder has read only the ends.

    Args:
        read: (B, R, H), plans of the ends.
        sampled: (B, P, H), plans for the earlier tokens.
        first: (B,), index of the first plan of each end.
    """
    plans = np.concatenate([sampled, read], 1)
    for row, start in enumerate(first):
        plans[row, start : start + read.shape[1]] = read[row]
    return plans


def _without_holes(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves all padding to the left."""
    order = mask.argsort(1, kind="stable")
    return np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)
