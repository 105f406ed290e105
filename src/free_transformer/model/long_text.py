"""
Generates texts longer than the trained length, inside the loop of `transformers`; see `context` for the rule.

Each text of a batch is read again at its own length, so it does not depend on the other texts.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import PlanCache, PlanState
from .compat import CACHE_NAME, Cache, ModelArguments
from .context import tokens_to_drop, tokens_to_keep
from .errors import InputError
from .layout import num_plans
from .plan_source import complete_plans_of_long_prompt

if TYPE_CHECKING:
    from .modeling import FreeTransformer


@dataclass
class TextContext:
    """
    Tracks which columns of each text the model sees, for a batch whose texts may exceed the context.

    Attributes:
        limit: maximum number of tokens in a context, None for no limit.
        prompt_length: number of columns of the prompts.
        prompt_mask: (B, prompt_length) bool, False on padding; None without padding.
        lengths: number of tokens of each prompt.
        first: the column in which each text's context begins.
        dropped: number of tokens of each text before its context.
        columns: number of columns that have been read.
        arguments: model arguments that replace those in the loop of `transformers` after a text has been read again.
    """

    limit: int | None
    plan_span: int | str
    prompt_length: int
    prompt_mask: Tensor | None
    lengths: list[int]
    first: list[int]
    dropped: list[int]
    columns: int = 0
    arguments: ModelArguments = field(default_factory=dict)

    @classmethod
    def of_prompt(
        cls,
        prompt: Tensor,
        mask: Tensor | None,
        limit: int | None,
        plan_span: int | str,
    ) -> "TextContext":
        """Creates the contexts of prompts, (B, T), with a (B, T) mask."""
        batch, length = prompt.shape
        padded = mask is not None and not bool(mask.all())
        real = mask.bool() if mask is not None and padded else None
        lengths = [length] * batch if real is None else real.sum(1).tolist()
        first = [0] * batch if real is None else real.long().argmax(1).tolist()
        if limit is not None and length > limit:
            first = [0] * batch  # padding counts too, until `drop` removes it
        return cls(limit, plan_span, length, real, lengths, first, [0] * batch)

    def full(self, columns: int) -> list[int]:
        """Returns the rows whose context cannot hold this many columns."""
        if self.limit is None:
            return []
        return [row for row, first in enumerate(self.first) if columns - first > self.limit]

    def drop(self, rows: list[int], columns: int, keep: int, above: int) -> None:
        """Drops all padding of these texts. Shortens contexts of more than `above` tokens to the last `keep`."""
        for row in rows:
            length = self.lengths[row] + columns - self.prompt_length
            if length - self.dropped[row] > above:
                self.dropped[row] = max(self.dropped[row], tokens_to_drop(length, keep, self.plan_span))
            self.first[row] = columns - (length - self.dropped[row])

    def dropped_plans(self, device: torch.device) -> Tensor | None:
        """Returns the number of plans before each text's context, (B, 1), or None if there are none."""
        if self.plan_span == "sequence" or not any(self.dropped):
            return None
        return torch.tensor(self.dropped, device=device)[:, None] // int(self.plan_span)

    def tokens(self, input_ids: Tensor, rows: list[int]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the context tokens of some texts, (R, T), padded on the left, their mask, and their ranks, (R, T)."""
        columns = input_ids.shape[1]
        kept = torch.tensor([columns - self.first[row] for row in rows], device=input_ids.device)[:, None]
        width = int(kept.max())
        if self.prompt_mask is not None and columns - width < self.prompt_length:
            real = self.prompt_mask.to(input_ids.device)
            real = torch.cat([real, real.new_ones(len(real), columns - self.prompt_length)], 1)
            input_ids = input_ids.gather(1, real.long().sort(dim=1, stable=True).indices)  # padding goes to the left
        ids = input_ids[:, -width:]
        ids = ids if len(rows) == len(ids) else ids[rows]
        ranks = torch.arange(width, device=ids.device) - (width - kept)
        return ids, None if bool((kept == width).all()) else ranks >= 0, ranks.clamp(min=0)


def begin_text(model: "FreeTransformer", state: PlanState, prompt: Tensor, arguments: ModelArguments) -> None:
    """
    Called before a prompt is read.

    If the text may exceed the context, it sets `state.context`, which tracks what the model sees. If the prompt itself
    exceeds the context, it also determines its plans.
    """
    limit, mask, columns = model.context_limit, arguments.get("attention_mask"), prompt.shape[1]
    longest = columns + state.new_tokens
    state.changes = {start: plan for start, plan in state.changes.items() if start < state.new_tokens}
    for start, plan in state.changes.items():
        state.changes[start] = plan.to(model.device).repeat_interleave(max(1, len(prompt) // len(plan)), 0)
    cache = arguments.get(CACHE_NAME)
    held = 0 if cache is None else int(cache.get_seq_length())
    if held and (columns <= held or (mask is not None and mask.shape[1] != columns)):
        if state.changes:
            raise InputError(
                f"plan_changes: {columns} tokens after a cache; pass the whole text, so that it can be read again"
            )
        return
    if not state.changes and (limit is None or longest - 1 <= limit):  # the last token is never read
        return
    context = state.context = TextContext.of_prompt(prompt, mask, limit, model.config.plan_span)
    if limit is None or columns <= limit:
        return
    if cache is not None:
        cache.reset()
    context.drop(list(range(len(prompt))), columns, limit, limit)
    state.dropped_plans = context.dropped_plans(model.device)
    tokens, real, _ = context.tokens(prompt, list(range(len(prompt))))
    real = None if real is None else real.to(model.device)
    complete_plans_of_long_prompt(
        model, state, tokens.to(model.device), real, num_plans(model.config.plan_span, max(context.lengths)), longest
    )
    state.columns, context.first = columns, [0] * len(prompt)  # read by the first step


def prepare_inputs(
    model: "FreeTransformer", state: PlanState, input_ids: Tensor, arguments: ModelArguments
) -> tuple[Tensor, ModelArguments]:
    """
    Reads texts again if their next token does not fit the context, or if their plan changes.

    Args:
        input_ids: (B, T), the whole texts.
        arguments: the arguments of `prepare_inputs_for_generation`.

    Returns:
        both arguments for the next step.
    """
    context = state.context
    assert context is not None
    columns = context.columns = input_ids.shape[1]
    is_prompt, new_tokens = columns == context.prompt_length, columns - context.prompt_length
    rows, everything = context.full(columns), list(range(len(input_ids)))
    changed = state.changes.pop(new_tokens, None)
    if changed is not None:
        state.plan, state.vectors, rows = changed, None, everything
    limit, cache = context.limit or columns, arguments.get(CACHE_NAME)
    if cache is not None and not isinstance(cache, PlanCache) and (rows or cache.get_seq_length() >= limit):
        rows = everything  # its rows cannot be replaced one by one
    if rows:
        keep = limit if is_prompt or context.limit is None else tokens_to_keep(limit)
        context.drop(rows, columns, keep, limit if changed is None else keep)
        state.dropped_plans = context.dropped_plans(model.device)
    if cache is None and any(context.dropped):
        context.drop(everything, columns, limit, limit)
        ids, mask, ranks = context.tokens(input_ids, everything)
        return ids, {**arguments, "attention_mask": mask, "position_ids": _positions(state, ranks)}
    if cache is None or not rows:
        return input_ids, arguments
    if any(context.dropped):
        cache.text_context = context
    if not isinstance(cache, PlanCache):
        cache.reset()
    context.arguments = _read_again(model, state, input_ids, cache, rows, arguments.get("attention_mask"))
    return input_ids, {**arguments, **context.arguments, "next_sequence_length": 1}


def _read_again(
    model: "FreeTransformer",
    state: PlanState,
    input_ids: Tensor,
    cache: Cache,
    rows: list[int],
    mask: Tensor | None,
) -> ModelArguments:
    """
    Replaces these texts in the cache by the tokens of their contexts, except the last token, which is read next.

    Returns:
        the mask and the positions of the next step.
    """
    context = state.context
    assert context is not None
    columns, batch = input_ids.shape[1], len(input_ids)
    ids, real, ranks = context.tokens(input_ids, rows)
    padded = real is not None or len(rows) < batch
    selected = state if len(rows) == batch else state.select_rows(torch.tensor(rows))
    selected.padded = real is not None
    fresh = model.new_cache(context.limit or columns) if isinstance(cache, PlanCache) else cache
    if ids.shape[1] > 1:
        model(
            ids[:, :-1].to(model.device),
            attention_mask=None if real is None else real[:, :-1].to(model.device),
            position_ids=_positions(selected, ranks)[:, :-1].to(model.device),
            cache=fresh,
            plan=selected,
            logits_to_keep=1,
        )
    kept = [columns - first for first in context.first]
    if isinstance(cache, PlanCache) and isinstance(fresh, PlanCache):
        if len(rows) == batch:
            cache.layers = fresh.layers
        else:
            cache.replace_rows(rows, fresh, max(kept) - 1)
    state.padded = padded
    lengths = torch.tensor(kept, device=input_ids.device)[:, None]
    if padded:
        width = max(kept)
        own = torch.arange(width, device=input_ids.device) >= width - lengths
        if mask is not None and len(rows) < batch:  # the others keep theirs
            others = torch.ones(batch, dtype=torch.bool, device=mask.device)
            others[rows] = False
            own = torch.where(others[:, None], mask[:, -width:].bool(), own.to(mask.device))
        mask = own.long()
    positions = _positions(state, lengths - 1)
    return {"attention_mask": mask if padded else None, "position_ids": positions}


def _positions(state: PlanState, ranks: Tensor) -> Tensor:
    return ranks if state.first_position is None else ranks + state.first_position.to(ranks.device)
