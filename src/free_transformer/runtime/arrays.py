"""Tokens, plans and sampling in NumPy."""

from typing import Any

import numpy as np

from free_transformer.model.plan_text import parse_bits
from free_transformer.model.sampling import MIN_TEMPERATURE, check_token_ids

NO_TOKEN = -1  # what `draw` returns for a row whose logits are NaN or infinite


def as_tokens(input_ids: Any, attention_mask: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Checks tokens, (B, T), and their mask, default all ones, and returns both as int64."""
    try:
        tokens = np.asarray(input_ids)
    except ValueError as error:
        raise ValueError("tokens: rows of different lengths; pad them and give attention_mask") from error
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens of shape {tokens.shape}, {tokens.dtype}: (B, T) integers are needed, at least one")
    mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask of shape {mask.shape} for tokens of shape {tokens.shape}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("attention_mask: 1 for tokens and 0 for padding; this one holds other values")
    check_token_ids(int(tokens.min()), int(tokens.max()), vocab_size)
    return tokens.astype(np.int64), mask.astype(np.int64)


def check_vocabulary(tokenizer: Any, vocab_size: int, source: object) -> None:
    """`ValueError` where a tokenizer has token ids that the model does not."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has token ids up to {highest}, but the model's vocabulary has {vocab_size} "
            "tokens; use the tokenizer that the model was trained with"
        )


def padded_on_the_left(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same texts, both (B, T), with the padding that follows a text moved in front of it."""
    if mask[:, -1].all():
        return tokens, mask
    rank = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    last = np.where(mask == 1, rank, -1).max(1, keepdims=True)
    order = (rank + last + 1) % tokens.shape[1]
    return np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)


def as_plan(plan: Any, batch: int, latent_dim: int) -> np.ndarray:
    """Checks a plan, (P, H) or (B, P, H), bool or 0/1, or text such as `"0110"`, and returns it as (B, P, H) bool."""
    try:
        bits = parse_bits(plan, latent_dim) if isinstance(plan, str) else np.asarray(plan)
    except ValueError as error:
        if isinstance(plan, str):
            raise
        raise ValueError("plan: texts with different numbers of plans; give the same number for each") from error
    if bits.ndim == 2:
        bits = np.broadcast_to(bits, (batch, *bits.shape))
    if bits.ndim != 3 or bits.shape[0] != batch or bits.shape[2] != latent_dim or bits.shape[1] == 0:
        raise ValueError(
            f"plan of shape {bits.shape}: (P, {latent_dim}) or ({batch}, P, {latent_dim}) is needed, P plans of "
            f"{latent_dim} bits for {batch} texts"
        )
    if not np.isin(bits, (0, 1)).all():
        raise ValueError("a plan is made of bits, bool or 0/1; this one holds other values")
    return bits.astype(bool)


def rows_to(values: np.ndarray, rows: int) -> np.ndarray:
    """The same with its last row again and again, up to so many rows."""
    if len(values) == rows:  # at every step of most exports
        return values
    return np.pad(values, ((0, rows - len(values)), *[(0, 0)] * (values.ndim - 1)), "edge")


def draw(
    logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """
    Samples one token per row of logits, (B, V), with the settings of that row, each (B,); see `sampling.Sampling`.

    Args:
        uniform: random numbers in [0, 1). The tokens are a function of them.

    Returns:
        (B,) token ids, `NO_TOKEN` where a row's logits are NaN or infinite.
    """
    chosen = logits.argmax(-1)
    finite = np.isfinite(logits).all(-1)
    drawn = finite & (temperature >= MIN_TEMPERATURE)
    cut = drawn & ((top_k > 0) | (top_p < 1))
    if (rows := drawn & ~cut).any():
        chosen[rows] = _pick(_chances(logits[rows], temperature[rows]), uniform[rows])
    if cut.any():  # by themselves: the token that a number picks depends on the order of the tokens
        chances = _chances(logits[cut], temperature[cut])
        order = np.argsort(-chances, axis=-1, kind="stable")
        chances = np.take_along_axis(chances, order, -1)
        most = np.where(top_k[cut] > 0, top_k[cut], chances.shape[1])[:, None]
        before = chances.cumsum(-1) - chances
        outside = before >= top_p[cut][:, None] * chances.sum(-1, keepdims=True)
        outside[:, 0] = False  # the most likely token always stays
        chances[outside | (np.arange(chances.shape[1]) >= most)] = 0
        chosen[cut] = np.take_along_axis(order, _pick(chances, uniform[cut])[:, None], -1)[:, 0]
    chosen[~finite] = NO_TOKEN
    return chosen


def _chances(logits: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """Probabilities up to a factor, (B, V); that of the most likely token is 1."""
    differences = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.exp(differences / temperature[:, None])


def _pick(chances: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    reached = chances.cumsum(-1)
    return (reached < uniform[:, None] * reached[:, -1:]).sum(-1)


def sample_prior(
    shape: tuple[int, ...], latent_dim: int, log_aggregate: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """
    Plans, (*shape, H) bool, from the uniform prior or the aggregate prior.

    Args:
        log_aggregate: log-probabilities of the codes, (2^H,), or of each bit's values, (2, H); None for the uniform
            prior.
    """
    if log_aggregate is None:
        return rng.random((*shape, latent_dim)) < 0.5
    chances = np.exp(log_aggregate.astype(np.float64))
    if chances.ndim == 2:
        return rng.random((*shape, latent_dim)) < chances[1]
    codes = rng.choice(len(chances), size=shape, p=chances / chances.sum())
    return (codes[..., None] >> np.arange(latent_dim)) % 2 == 1
