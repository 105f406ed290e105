"""Which plan covers which token: spans, padding and packed documents, computed once per batch."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Boundaries:
    """
    Document boundaries in the concatenation of a batch's B rows, as variable-length attention kernels take them.

    Padding counts as a document. S is the number of documents.
    """

    tokens: Tensor  # (S + 1,) int32, index of the first token of each document, then B * T
    plans: Tensor  # (S + 1,) int32, index of the first plan of each document, then B * P
    max_tokens: int  # upper bound on the tokens of a document
    max_plans: int

    def for_flash_attention(self) -> dict[str, object]:
        """Returns the arguments that `transformers` passes to the `flash_attention_*` backends."""
        names = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
        return {**dict.fromkeys(names[0], self.tokens), **dict.fromkeys(names[1], self.max_tokens)}


@dataclass
class PlanLayout:
    """
    The plans of a batch of B rows of T tokens, with P plans per row. Rows with fewer plans end with unused ones.

    Positions count from the first real token of a document, so padding on either side has no effect.
    """

    token_plan: Tensor  # (B, T) index of the plan that covers each token
    token_mask: Tensor | None  # (B, T) bool, False on padding; None without padding
    position_ids: Tensor  # (B, T) position of each token in its document
    plan_position: Tensor  # (B, P) position of the first token that the plan covers
    plan_mask: Tensor  # (B, P) bool, True where the plan covers a real token
    token_document: Tensor | None  # (B, T) index of each token's document in its row; None if each row is one document
    plan_document: Tensor | None  # (B, P)
    boundaries: Boundaries | None = None  # None if unknown; each document must be contiguous

    @property
    def num_plans(self) -> int:
        return self.plan_mask.shape[1]

    @property
    def attention_groups(self) -> tuple[Tensor, Tensor]:
        """Document index of each token, (B, T), -1 on padding, and of each plan, (B, P); 0 if a row is one document."""
        of_tokens = torch.zeros_like(self.token_plan) if self.token_document is None else self.token_document
        of_plans = torch.zeros_like(self.plan_position) if self.plan_document is None else self.plan_document
        return (of_tokens if self.token_mask is None else of_tokens.where(self.token_mask, -1)), of_plans

    def to(self, device: torch.device) -> "PlanLayout":
        """Copies the layout to a device. A copy from the CPU to a GPU is asynchronous."""

        def moved(part: Any) -> dict[str, Any]:
            found = {each.name: getattr(part, each.name) for each in fields(part)}
            return {name: to_device(value, device) for name, value in found.items() if isinstance(value, Tensor)}

        boundaries = self.boundaries
        if boundaries is not None:
            boundaries = replace(boundaries, **moved(boundaries))
        return replace(self, **moved(self), boundaries=boundaries)

    @property
    def mask(self) -> Tensor:
        """(B, P, T) bool: whether a plan's posterior may read a token. Each plan may read at least one token."""
        batch, tokens = self.token_plan.shape
        mask = self.plan_mask.new_ones(batch, self.num_plans, tokens)
        if self.token_mask is not None:
            mask = mask & self.token_mask[:, None, :]
        if self.token_document is not None and self.plan_document is not None:
            mask = mask & (self.plan_document[:, :, None] == self.token_document[:, None, :])
        return mask


def plan_to_token(per_plan: Tensor, token_plan: Tensor) -> Tensor:
    """Expands values per plan, (B, P, X), to values per token, (B, T, X), by each token's plan, (B, T) or (1, T)."""
    if per_plan.shape[1] == 1:
        return per_plan.expand(-1, token_plan.shape[1], -1)
    if len(token_plan) == 1:
        return per_plan.index_select(1, token_plan[0])
    first = torch.arange(0, per_plan.shape[:2].numel(), per_plan.shape[1], device=per_plan.device)
    rows = (first[:, None] + token_plan).flatten()  # `gather` would keep `per_plan` for its backward
    return per_plan.flatten(0, 1).index_select(0, rows).view(*token_plan.shape, -1)


def same_document(of_query: Tensor, of_key: Tensor) -> Callable[..., Tensor]:
    """Builds a `transformers` mask function that keeps attention within a document, from indices (B, Q) and (B, K)."""

    def mask(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_query[row, query] == of_key[row, key]

    return mask


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies values to a device; a copy to a GPU is asynchronous."""
    if device.type == "cuda" and values.is_cpu:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def num_plans(plan_span: int | str, num_tokens: int) -> int:
    """Returns the number of plans of a document with `num_tokens` tokens: `ceil(num_tokens / plan_span)`, or 1."""
    if plan_span == "sequence":
        return 1
    return (num_tokens + int(plan_span) - 1) // int(plan_span)  # ONNX would round a negative quotient upwards


def plan_of_rank(plan_span: int | str, ranks: Tensor) -> Tensor:
    """Returns the plan index of tokens from their ranks in the text, counted from 0."""
    return torch.zeros_like(ranks) if plan_span == "sequence" else ranks // int(plan_span)


def token_ranks(token_mask: Tensor | None, past: int, num_tokens: int, device: torch.device | None = None) -> Tensor:
    """
    Returns the number of real tokens before each token of a text, (B, T), or (1, T) without a mask.

    The plan of a token is `rank // plan_span`. It does not depend on where positions start or where padding is: on
    the left, on the right, or in holes.

    Args:
        token_mask: (B, past + T) bool, False on padding.
        past: number of earlier tokens, which a cache holds.
    """
    if token_mask is None:
        return torch.arange(past, past + num_tokens, device=device)[None]
    return (token_mask.cumsum(1) - 1).clamp(min=0)[:, past:]


def plan_layout(plan_span: int | str, position_ids: Tensor, token_mask: Tensor | None, packed: bool) -> PlanLayout:
    """
    Computes the layout of a batch.

    Args:
        position_ids: (B, T); if `packed`, positions are consecutive within each document of a row.
        token_mask: (B, T) bool, False on padding.
    """
    batch, tokens = position_ids.shape
    real = torch.ones_like(position_ids, dtype=torch.bool) if token_mask is None else token_mask
    rank = real.cumsum(1) - 1  # in the row
    if packed:
        new_document = _document_starts(position_ids, real, rank)
        rank = rank - torch.where(new_document, rank, 0).cummax(1).values  # in the document
    else:
        new_document = real & (rank == 0)
    starts = new_document if plan_span == "sequence" else real & (rank % int(plan_span) == 0)
    token_plan = (starts.cumsum(1) - 1).clamp(min=0)
    plans = int(token_plan.max()) + 1 if packed else num_plans(plan_span, tokens)

    def at_starts(values: Tensor) -> Tensor:  # (B, T) -> (B, P); other tokens go to an extra column that is dropped
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


def _document_starts(position_ids: Tensor, real: Tensor, rank: Tensor) -> Tensor:
    """Marks real tokens whose position is not one more than that of the previous real token, (B, T) bool."""
    tokens = position_ids.shape[1]
    # By rank, so that padding between two tokens separates nothing. Padding goes to the extra last column.
    before = position_ids.new_zeros(len(position_ids), tokens + 1)
    before = before.scatter(1, torch.where(real, rank + 1, tokens), position_ids)
    return real & ((rank == 0) | (position_ids != before.gather(1, rank.clamp(min=0)) + 1))


def is_packed(position_ids: Tensor, token_mask: Tensor | None) -> bool:
    """Whether any row holds several documents: the positions of its real tokens are not consecutive."""
    real = torch.ones_like(position_ids, dtype=torch.bool) if token_mask is None else token_mask
    rank = (real.cumsum(1) - 1).expand_as(position_ids)
    return bool((_document_starts(position_ids, real.expand_as(position_ids), rank) & (rank > 0)).any())


def batch_layout(
    plan_span: int | str, shape: tuple[int, int], attention_mask: Tensor | None, position_ids: Tensor | None
) -> PlanLayout:
    """
    Computes the layout of texts from their beginning.

    It reads tensor values, so a training loop calls it before it copies a batch to a GPU and passes the result to the
    model.

    Args:
        shape: B and T.
        attention_mask, position_ids: as in `FreeTransformer.forward`; the mask has two dimensions.
    """
    mask = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
    packed = position_ids is not None and is_packed(position_ids, mask)
    if position_ids is None:
        device = None if attention_mask is None else attention_mask.device
        position_ids = token_ranks(mask, 0, shape[1], device)
    layout = plan_layout(plan_span, position_ids.expand(shape[0], -1), mask, packed)
    layout.boundaries = find_boundaries(layout)
    return layout


def find_boundaries(layout: PlanLayout) -> Boundaries | None:
    """Finds document boundaries. Returns None if each row is one document, or if padding divides a document."""
    if layout.token_mask is None and layout.token_document is None:
        return None
    document, of_plan = layout.attention_groups
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    real = starts & (document >= 0)
    if (real.sum(1) > document.amax(1) + 1).any():
        return None
    batch, tokens = document.shape
    first = starts.flatten().nonzero().flatten()
    # An unused plan reads the last document of its row, or padding if the row has no document.
    last = document.amax(1, keepdim=True)
    of_plan = torch.where(layout.plan_mask, of_plan, last.clamp(min=0))
    place = torch.where(real, document, document.shape[1])  # document index of each document's first token
    where = document.new_zeros(batch, tokens + 1).scatter(
        1, place, torch.arange(tokens, device=place.device).expand_as(place)
    )
    token_of_plan = where.gather(1, of_plan) + tokens * torch.arange(batch, device=place.device)[:, None]
    segment = starts.flatten().cumsum(0) - 1
    counts = torch.bincount(segment[token_of_plan.flatten()], minlength=len(first))
    return Boundaries(
        tokens=torch.nn.functional.pad(first, (0, 1), value=batch * tokens).int(),
        plans=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        max_tokens=tokens,
        max_plans=layout.num_plans,
    )
