"""The state of texts while an ONNX export generates them."""

from typing import TYPE_CHECKING

import numpy as np

from free_transformer.model.context import tokens_to_drop, tokens_to_keep
from free_transformer.runtime.arrays import repeat_last_row

if TYPE_CHECKING:
    from onnxruntime import OrtValue

    from free_transformer.runtime.onnx_model import OnnxFreeTransformer


class OnnxDecoder:
    """
    Plans, the cache, and the mask of its columns. Texts whose context is full are read again, see `model.context`.

    Args:
        mask: (B, T) of the prompts.
        plan: (B, P, H) bool.
        longest: the number of tokens that will be read of a text.
        limit: number of tokens that a context holds at most, None for any number.

    Attributes:
        changes: plans that replace this one, (B, 1, H), by the number of new tokens before them.
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
        self._dropped = np.zeros(self.batch, dtype=np.int64)  # tokens before the context of each text
        self._lengths = mask.sum(1)  # tokens in the contexts
        self._tokens = mask[:, :0]  # of the contexts, (B, columns), with padding on the left

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Reads the next tokens, (B, T). Returns the logits of the token after them, (B, V)."""
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
        """Drops the cache, and of contexts with more than `above` tokens all but the last `keep`."""
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
        """The plans of the contexts, (B, P, H), in a static export as many as it takes."""
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
    What the model sees of prompts: their ends, where they are longer than the context.

    Returns:
        tokens and mask, both (B, T), and the number of tokens before them, (B,).
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
    The plans of prompts of which the encoder has read the ends only.

    Args:
        read: (B, R, H), those of the ends; sampled: (B, P, H), for the tokens before.
        first: (B,), where each end begins.
    """
    plans = np.concatenate([sampled, read], 1)
    for row, start in enumerate(first):
        plans[row, start : start + read.shape[1]] = read[row]
    return plans


def _without_holes(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask with all padding on the left."""
    order = mask.argsort(1, kind="stable")
    return np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)
