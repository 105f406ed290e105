"""
Sampling settings: their limits and the meaning of their edge values.

Python, the command line, the server and ONNX exports all check their settings here (table in docs/serving.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from .errors import InputError

MAX_TEMPERATURE = 100.0
MIN_TEMPERATURE = 1e-6  # below it, dividing logits overflows float32; the result is greedy anyway
MAX_TOP_K = 2**31 - 1  # more tokens than any vocabulary has
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # what `torch.manual_seed` accepts
PROMPT_PLANS = ("posterior", "prior")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # their rotations change beyond the trained length
PRIORS = ("uniform", "aggregate")
PLANS = ("independent", "stratified")


@dataclass(frozen=True)
class Sampling:
    """
    Settings for sampling the next token.

    Args:
        temperature: 0 to 100. 0, and values below 1e-6, choose the most likely token.
        top_k: number of most likely tokens to sample from. 0, and values above the vocabulary size, mean all.
        top_p: 0 to 1. Sample from the smallest set of most likely tokens with this total probability, at
            least one token.

    Raises:
        ValueError: for a value outside these ranges.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_top_k(self.top_k)
        check_top_p(self.top_p)
        object.__setattr__(self, "top_k", min(int(self.top_k), MAX_TOP_K))

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


def check_temperature(value: object) -> float:
    if not _is_number(value) or not 0 <= value <= MAX_TEMPERATURE:
        raise InputError(f"temperature={value}: 0 (the most likely token) to {MAX_TEMPERATURE:g}")
    return float(value)


def check_top_k(value: object) -> int:
    if not _is_integer(value) or value < 0:
        raise InputError(f"top_k={_shown(value)}: an integer of at least 0 (0 samples from all tokens)")
    return int(value)


def check_top_p(value: object) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise InputError(f"top_p={value}: 0 (the most likely token) to 1 (all tokens)")
    return float(value)


def check_seed(value: object) -> int:
    """
    Returns the seed as an integer from 0 to 2**64 - 1, as PyTorch interprets it: -1 becomes 2**64 - 1.

    Raises:
        ValueError: for anything but an integer from -2**63 to 2**64 - 1.
    """
    if not _is_integer(value) or not MIN_SEED <= value <= MAX_SEED:
        raise InputError(f"seed={_shown(value)}: an integer from -2**63 to 2**64 - 1")
    return int(value) % 2**64


def check_max_new_tokens(value: object) -> None:
    if not _is_integer(value) or value < 1:
        raise InputError(f"max_new_tokens={_shown(value)}: an integer of at least 1")


def check_num_texts(value: object) -> None:
    if not _is_integer(value) or value < 1:
        raise InputError(f"num_return_sequences={_shown(value)}: an integer of at least 1")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` if a setting is not one of the choices."""
    if value not in choices:
        raise InputError(f"{name}={value!r}: one of {choices}")


def check_plan_count(num_plans: int, plan_span: int | str) -> None:
    """Raises `ValueError` for several plans if one plan covers the whole text."""
    if plan_span == "sequence" and num_plans > 1:
        raise InputError(f"{num_plans} plans per text: this model takes one (plan_span='sequence')")


def check_token_ids(lowest: int, highest: int, vocab_size: int) -> None:
    """Raises `ValueError` for token ids outside the vocabulary."""
    if lowest < 0 or highest >= vocab_size:
        raise InputError(f"token ids from {lowest} to {highest}: the vocabulary has 0 to {vocab_size - 1}")


def trained_length(settings: Mapping[str, Any]) -> int | None:
    """
    Returns the maximum text length that a model was built for, in tokens, or None for no limit.

    With a sliding window, tokens of a longer text attend to no more and no farther tokens than in training.

    Args:
        settings: the model's settings, as in `config.json`.
    """
    trained, window = settings["max_position_embeddings"], settings.get("sliding_window")
    rope = (settings.get("rope_parameters") or {}).get("rope_type")
    slides = window is not None and window <= trained and rope not in LENGTH_DEPENDENT_ROPE
    return None if slides else trained


def length_warning(length: int, trained: int) -> str:
    """Returns a warning for a text longer than the model was built for."""
    return (
        f"{length} tokens were generated, but the model was built for {trained} (max_seq_len): the quality of text "
        "beyond that length is untested"
    )


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(cast(float, value))
    except (TypeError, OverflowError):
        return False


def _is_integer(value: object) -> TypeGuard[int]:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _shown(value: object) -> str:
    """Formats a value for a message, shortened to 40 characters."""
    try:
        text = str(value)
    except ValueError:  # more digits than Python converts
        return "an integer of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}…"
