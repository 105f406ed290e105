"""Checks, padding and token sampling for NumPy arrays."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from free_transformer.errors import InputError
from free_transformer.model.sampling import MIN_TEMPERATURE, Sampling, check_token_ids

NO_TOKEN = -1  # result of `sample_tokens` for a row whose logits are NaN or infinite


class HasVocabulary(Protocol):
    """A tokenizer of `tokenizers` or `transformers`."""

    def get_vocab(self) -> dict[str, int]: ...


def as_tokens(input_ids: ArrayLike, attention_mask: ArrayLike | None, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Checks tokens, (B, T), and their mask, default all ones, and returns both as int64.

    Raises:
        ValueError: for another shape, token ids outside the vocabulary, and mask values other than 0 and 1.
    """
    try:
        tokens = np.asarray(input_ids)
    except ValueError as error:
        raise InputError("tokens: rows have different lengths; pad them and pass attention_mask") from error
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"tokens of shape {tokens.shape}, {tokens.dtype}: expected (B, T) integers, at least one")
    mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != tokens.shape:
        raise InputError(f"attention_mask of shape {mask.shape} for tokens of shape {tokens.shape}")
    if not np.isin(mask, (0, 1)).all():
        raise InputError("attention_mask: holds values other than 1 (tokens) and 0 (padding)")
    check_token_ids(int(tokens.min()), int(tokens.max()), vocab_size)
    return tokens.astype(np.int64), mask.astype(np.int64)


def check_vocabulary(tokenizer: HasVocabulary, vocab_size: int, source: object) -> None:
    """Raises `ValueError` if a tokenizer has token ids outside the model's vocabulary."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise InputError(
            f"{source}: the tokenizer has token ids up to {highest}, but the model's vocabulary has {vocab_size} "
            "tokens; use the tokenizer that the model was trained with"
        )


def move_padding_left(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves the padding after each text in front of it; both arrays are (B, T)."""
    if mask[:, -1].all():
        return tokens, mask
    rank = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    last = np.where(mask == 1, rank, -1).max(1, keepdims=True)
    order = (rank + last + 1) % tokens.shape[1]
    return np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)


def repeat_last_row(values: np.ndarray, rows: int) -> np.ndarray:
    """Appends copies of the last row up to a total of `rows` rows."""
    if len(values) == rows:  # the usual case
        return values
    return np.pad(values, ((0, rows - len(values)), *[(0, 0)] * (values.ndim - 1)), "edge")


def sample_tokens(
    logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """
    Samples one token per row of logits, (B, V), with the settings of that row, each (B,); see `sampling.Sampling`.

    Args:
        uniform: random numbers in [0, 1), (B,), which determine the tokens.

    Returns:
        (B,) token ids, `NO_TOKEN` for rows whose logits are NaN or infinite.
    """
    chosen = logits.argmax(-1)
    finite = np.isfinite(logits).all(-1)
    sampled = finite & (temperature >= MIN_TEMPERATURE)
    truncated = sampled & ((top_k > 0) | (top_p < 1))
    if (rows := sampled & ~truncated).any():
        chosen[rows] = _pick(_weights(logits[rows], temperature[rows]), uniform[rows])
    if truncated.any():  # separately, since the order of the tokens affects which token is picked
        weights = _weights(logits[truncated], temperature[truncated])
        order = np.argsort(-weights, axis=-1, kind="stable")
        weights = np.take_along_axis(weights, order, -1)
        limit = np.where(top_k[truncated] > 0, top_k[truncated], weights.shape[1])[:, None]
        before = weights.cumsum(-1) - weights
        outside = before >= top_p[truncated][:, None] * weights.sum(-1, keepdims=True)
        outside[:, 0] = False  # the most likely token always stays
        weights[outside | (np.arange(weights.shape[1]) >= limit)] = 0
        chosen[truncated] = np.take_along_axis(order, _pick(weights, uniform[truncated])[:, None], -1)[:, 0]
    chosen[~finite] = NO_TOKEN
    return chosen


def sample_rows(logits: np.ndarray, sampling: Sequence[Sampling], uniform: np.ndarray) -> list[int]:
    """Calls `sample_tokens` with one `Sampling` per row."""
    temperature, top_k, top_p = np.array([(each.temperature, each.top_k, each.top_p) for each in sampling]).T
    return sample_tokens(logits, temperature, top_k, top_p, uniform).tolist()


def _weights(logits: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """Returns unnormalized probabilities, (B, V); the most likely token has 1."""
    differences = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.exp(differences / temperature[:, None])


def _pick(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Returns the index at which the cumulative weights reach each random number's share of the total, (B,)."""
    cumulative = weights.cumsum(-1)
    return (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1)
