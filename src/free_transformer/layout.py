"""Which plan covers which token: spans, padding and packed documents, worked out once for a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PlanLayout:
    """
    The plans of a batch of B rows of T tokens, P plans a row (rows with fewer have unused plans at their end).

    Positions count from the first real token of a document, so that padding on either side changes nothing.
    """

    token_plan: Tensor  # (B, T) index of the plan that covers each token
    token_mask: Tensor | None  # (B, T) bool, False on padding; None where there is none
    position_ids: Tensor  # (B, T) position of each token in its document
    plan_position: Tensor  # (B, P) position of the first token that the plan covers
    plan_mask: Tensor  # (B, P) bool, True where the plan covers a real token
    token_document: Tensor | None  # (B, T) number of each token's document in its row; None where a row is one
    plan_document: Tensor | None  # (B, P)

    @property
    def num_plans(self) -> int:
        return self.plan_mask.shape[1]

    @property
    def mask(self) -> Tensor:
        """(B, P, T) bool: whether a plan's posterior may read a token; no row of it is empty."""
        batch, tokens = self.token_plan.shape
        mask = self.plan_mask.new_ones(batch, self.num_plans, tokens)
        if self.token_mask is not None:
            mask = mask & self.token_mask[:, None, :]
        if self.token_document is not None and self.plan_document is not None:
            mask = mask & (self.plan_document[:, :, None] == self.token_document[:, None, :])
        return mask


def plan_to_token(per_plan: Tensor, token_plan: Tensor) -> Tensor:
    """From one row a plan, (B, P, X), to one row a token, (B, T, X), by the plan of each token, (B, T) or (1, T)."""
    if per_plan.shape[1] == 1:
        return per_plan.expand(-1, token_plan.shape[1], -1)
    if len(token_plan) == 1:
        return per_plan.index_select(1, token_plan[0])
    first = torch.arange(0, per_plan.shape[:2].numel(), per_plan.shape[1], device=per_plan.device)
    rows = (first[:, None] + token_plan).flatten()  # `gather` would keep `per_plan` for its backward
    return per_plan.flatten(0, 1).index_select(0, rows).view(*token_plan.shape, -1)


def same_document(of_query: Tensor, of_key: Tensor) -> Callable[..., Tensor]:
    """The mask function of `transformers` that keeps attention inside a document: (B, Q) and (B, K) its numbers."""

    def mask(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_query[row, query] == of_key[row, key]

    return mask


def flash_boundaries(documents: Tensor, token_mask: Tensor | None) -> dict[str, Tensor | int]:
    """
    Where the documents of a batch end, (B, T) their numbers, in the arguments by which `transformers` tells Flash
    Attention, which takes no mask; padding is made a document of its own.
    """
    ends = torch.ones_like(documents, dtype=torch.bool)
    ends[:, :-1] = documents[:, 1:] != documents[:, :-1]
    if token_mask is not None:
        ends[:, :-1] |= token_mask[:, 1:] != token_mask[:, :-1]
    places = torch.nn.functional.pad(ends.flatten().nonzero().flatten() + 1, (1, 0)).int()
    longest = int(places.diff().max())
    return {"cu_seq_lens_q": places, "cu_seq_lens_k": places, "max_length_q": longest, "max_length_k": longest}


def num_plans(plan_span: int | str, num_tokens: int) -> int:
    """Plans of one document of `num_tokens` tokens: `ceil(num_tokens / plan_span)`, or 1."""
    if plan_span == "sequence":
        return 1
    return (num_tokens + int(plan_span) - 1) // int(plan_span)  # ONNX would round a negative quotient upwards


def plan_layout(plan_span: int | str, position_ids: Tensor, token_mask: Tensor | None, packed: bool) -> PlanLayout:
    """
    Args:
        position_ids: (B, T); where `packed`, each document of a row starts again at 0.
        token_mask: (B, T) bool, False on padding.
    """
    batch, tokens = position_ids.shape
    real = torch.ones_like(position_ids, dtype=torch.bool) if token_mask is None else token_mask
    follows = torch.zeros_like(real)
    follows[:, 1:] = real[:, :-1] & (position_ids[:, 1:] == position_ids[:, :-1] + 1)
    new_document = real & ~follows
    starts = new_document if plan_span == "sequence" else new_document | (real & (position_ids % int(plan_span) == 0))
    token_plan = (starts.cumsum(1) - 1).clamp(min=0)
    plans = int(token_plan.max()) + 1 if packed else num_plans(plan_span, tokens)

    def at_starts(values: Tensor) -> Tensor:  # (B, T) -> (B, P); what is not a start goes to a column that is dropped
        column = torch.where(starts, token_plan, plans)
        return values.new_zeros(batch, plans + 1).scatter(1, column, values)[:, :plans]

    document = (new_document.cumsum(1) - 1).clamp(min=0)
    return PlanLayout(
        token_plan=token_plan,
        token_mask=token_mask,
        position_ids=position_ids,
        plan_position=at_starts(position_ids),
        plan_mask=torch.arange(plans, device=real.device) < starts.sum(1, keepdim=True),
        token_document=document if packed else None,
        plan_document=at_starts(document) if packed else None,
    )


def is_packed(position_ids: Tensor, token_mask: Tensor | None) -> bool:
    """Whether positions are other than 0, 1, 2, ... from the first real token of a row: then plans are counted."""
    expected = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    if token_mask is None:
        return bool((position_ids != expected).any())
    expected = token_mask.long().cumsum(1) - 1
    return bool(((position_ids != expected) & token_mask).any())
