"""
The context of a long text: which of its tokens a model sees, the same wherever text is generated.

A model sees all tokens of a text until they are as many as it was trained for. Then it drops its cache and reads the
last half of them again, at positions from 0 and under the same plans, and continues. Each token is generated from half
to all of the trained length, and costs at most one more token that is read.
"""

from collections.abc import Mapping
from typing import Any

from .errors import InputError


def tokens_to_drop(length: int, keep: int, plan_span: int | str) -> int:
    """
    How many tokens of a text leave the context, so that at most `keep` of `length` stay. With plans of n tokens it is
    a multiple of n: each token that stays keeps its place in its plan.
    """
    surplus = max(length - keep, 0)
    return surplus if plan_span == "sequence" else -(-surplus // int(plan_span)) * int(plan_span)


def tokens_to_keep(limit: int) -> int:
    """The number of tokens that are read again, at most, where the context holds at most `limit`."""
    return limit // 2


def context_limit(trained: int, plan_span: int | str, sliding_window: int | None = None) -> int | None:
    """
    The number of tokens that a context holds at most; None for a model whose texts are never read again: its attention
    has a window of its own, or half of the context is shorter than one plan.
    """
    too_short = plan_span != "sequence" and int(plan_span) > tokens_to_keep(trained)
    return None if sliding_window is not None or too_short or trained < 4 else trained


def check_plan_changes(changes: Mapping[Any, Any] | None, plan_span: int | str) -> dict[int, Any]:
    """
    The changes in order, `{2000: plan}` for another plan from the new token 2000 on, counted from 0.

    Raises:
        ValueError: for a model with several plans per text, and for keys that are not numbers of tokens.
    """
    if not changes:
        return {}
    if not isinstance(changes, Mapping):
        raise InputError(f"plan_changes of type {type(changes).__name__}: give a dict such as {{2000: '0110'}}")
    if plan_span != "sequence":
        raise InputError(
            f"plan_changes: for one plan per text; with plan_span={plan_span}, give plan={{(P, H) bits}}, a plan for "
            f"each {plan_span} tokens"
        )
    for start in changes:
        if isinstance(start, bool) or not hasattr(start, "__index__") or start < 1:
            raise InputError(
                f"plan_changes: {start!r}: a number of new tokens, at least 1, is needed; plan=... is the first plan"
            )
    return {int(start): changes[start] for start in sorted(changes)}
