"""Tracks the tokens of a text that the model sees, and when it must be read again; see `model.context`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from free_transformer.model.context import tokens_to_drop, tokens_to_keep
from free_transformer.runtime.plan_source import num_plans


@dataclass
class RowContext:
    """
    Attributes:
        tokens: tokens in the context, which the model has read.
        plan: (P, H) bool, the plans of the text from its first token on.
        changes: later plans, (1, H), keyed by the number of new tokens after which they apply.
        limit: maximum number of tokens in a context, None for no limit.
        dropped: number of tokens of the text before the context.
        new: number of new tokens that have been read.
    """

    tokens: list[int]
    plan: np.ndarray
    changes: Mapping[int, np.ndarray]
    limit: int | None
    plan_span: int | str
    dropped: int = 0
    new: int = 0

    @property
    def is_due(self) -> bool:
        """Whether the text has to be read again before its next token is read."""
        is_full = self.limit is not None and len(self.tokens) + 1 > self.limit
        return is_full or self.new + 1 in self.changes

    def read_again(self) -> "RowContext":
        """Returns the context to read again, which has room for the next token and uses its plan."""
        length = len(self.tokens) + 1
        plan = self.changes.get(self.new + 1, self.plan)
        changes = {start: each for start, each in self.changes.items() if start != self.new + 1}
        dropped = 0 if self.limit is None else tokens_to_drop(length, tokens_to_keep(self.limit), self.plan_span)
        kept = self.tokens[dropped:]
        return replace(self, tokens=kept, plan=plan, changes=changes, dropped=self.dropped + dropped)

    def advance(self, token: int) -> None:
        """Adds a token that has been read."""
        self.tokens.append(token)
        self.new += 1

    def plans(self, max_length: int) -> np.ndarray:
        """Returns the plans of the context up to `max_length` tokens, (P, H) bool."""
        first = 0 if self.plan_span == "sequence" else self.dropped // int(self.plan_span)
        return self.plan[first : first + num_plans(self.plan_span, max_length)]
