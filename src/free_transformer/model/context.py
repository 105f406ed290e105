"""
The context of a long text: which of its tokens a model sees. All generation code follows these rules.

A model sees all tokens of a text until it reaches the trained length. Then it drops its cache, reads the last half of
the tokens again, at positions from 0 and under the same plans, and continues. Each token is generated from a context of
half to all of the trained length, at an average cost of at most one additional token read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InputError

EXAMPLE_WINDOWS = 8


def tokens_to_drop(length: int, keep: int, plan_span: int | str) -> int:
    """
    Returns how many of `length` tokens to drop so that at most `keep` remain.

    With plans of n tokens it is a multiple of n, so the remaining tokens keep their places in their plans.
    """
    surplus = max(length - keep, 0)
    return surplus if plan_span == "sequence" else -(-surplus // int(plan_span)) * int(plan_span)


def tokens_to_keep(limit: int) -> int:
    """Returns the maximum number of tokens to read again in a context of at most `limit` tokens."""
    return limit // 2


def context_limit(trained: int, plan_span: int | str, sliding_window: int | None = None) -> int | None:
    """
    Returns the maximum number of tokens in a context, or None for a model whose texts are never read again.

    Texts are never read again if attention has a sliding window, or if half of the context is shorter than one plan.
    """
    too_short = plan_span != "sequence" and int(plan_span) > tokens_to_keep(trained)
    return None if sliding_window is not None or too_short or trained < 4 else trained


def example_windows(tokens: Sequence[int], length: int, plan_span: int | str) -> list[list[int]]:
    """
    Returns the windows of an example text from which its plan is inferred.

    With one plan per text, up to `EXAMPLE_WINDOWS` windows of equal length are spread over a text that exceeds
    `length`, because its beginning is often a title, a license or a header. The example's plan is the likeliest one
    under the average of their posteriors. With several plans per text, the only window is the beginning.

    Args:
        tokens: the text's tokens, starting with the begin-of-text token. Every window starts with it, as in training.
        length: maximum number of tokens per window.
    """
    begin, text, size = tokens[0], tokens[1:], max(length - 1, 1)
    count = min(-(-len(text) // size), EXAMPLE_WINDOWS) if plan_span == "sequence" else 1
    last = len(text) - size
    starts = [round(last * index / (count - 1)) for index in range(count)] if count > 1 else [0]
    return [[begin, *text[start : start + size]] for start in starts]


def check_plan_changes(changes: Mapping[Any, Any] | None, plan_span: int | str) -> dict[int, Any]:
    """
    Returns the changes in order. `{2000: plan}` switches to `plan` from new token 2000 on, counted from 0.

    Raises:
        ValueError: for a model with several plans per text, and for keys that are not positive integers.
    """
    if not changes:
        return {}
    if not isinstance(changes, Mapping):
        raise InputError(f"plan_changes of type {type(changes).__name__}: pass a dict such as {{2000: '0110'}}")
    if plan_span != "sequence":
        raise InputError(
            f"plan_changes needs one plan per text; with plan_span={plan_span}, pass plan={{(P, H) bits}}, a plan for "
            f"each {plan_span} tokens"
        )
    for start in changes:
        if isinstance(start, bool) or not hasattr(start, "__index__") or start < 1:
            raise InputError(
                f"plan_changes: {start!r} is not a number of new tokens from 1; plan=... sets the first plan"
            )
    return {int(start): changes[start] for start in sorted(changes)}
