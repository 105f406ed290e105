"""Tokens, plans and draws as NumPy holds them."""

from typing import Any

import numpy as np


def as_tokens(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checks tokens, (B, T), and their mask, default all ones, and returns both as int64."""
    tokens = np.asarray(input_ids)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens of shape {tokens.shape}, {tokens.dtype}: (B, T) integers are needed, at least one")
    mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask of shape {mask.shape} for tokens of shape {tokens.shape}")
    return tokens.astype(np.int64), mask.astype(np.int64)


def as_plan(plan: Any, batch: int, latent_dim: int) -> np.ndarray:
    """Checks a plan, (P, H) or (B, P, H), bool or 0/1, and returns it as (B, P, H) bool."""
    bits = np.asarray(plan)
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
    One token of each row of logits, (B, V), by that row's own settings, each (B,).

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draws among so many likeliest tokens, 0 among all.
        top_p: draws among the fewest likeliest tokens that make up this mass.
        uniform: random numbers in [0, 1), of which the tokens are a function.
    """
    chosen = logits.argmax(-1)
    drawn = temperature > 0
    cut = drawn & ((top_k > 0) | (top_p < 1))
    if (rows := drawn & ~cut).any():
        chosen[rows] = _pick(_chances(logits[rows], temperature[rows]), uniform[rows])
    if cut.any():  # by themselves: what a number picks depends on the tokens' order
        chances = _chances(logits[cut], temperature[cut])
        order = np.argsort(-chances, axis=-1, kind="stable")
        chances = np.take_along_axis(chances, order, -1)
        most = np.where(top_k[cut] > 0, top_k[cut], chances.shape[1])[:, None]
        chances[np.arange(chances.shape[1]) >= most] = 0
        before = chances.cumsum(-1) - chances
        chances[before >= top_p[cut][:, None] * chances.sum(-1, keepdims=True)] = 0
        chosen[cut] = np.take_along_axis(order, _pick(chances, uniform[cut])[:, None], -1)[:, 0]
    return chosen


def _chances(logits: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """Up to a factor, (B, V), the likeliest token's being 1."""
    scaled = logits.astype(np.float64) / temperature[:, None]
    return np.exp(scaled - scaled.max(-1, keepdims=True))


def _pick(chances: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    reached = chances.cumsum(-1)
    return (reached < uniform[:, None] * reached[:, -1:]).sum(-1)


def sample_prior(
    shape: tuple[int, ...], latent_dim: int, log_aggregate: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """
    Plans, (*shape, H) bool: fair coins, or as training texts took them.

    Args:
        log_aggregate: log-probabilities of the codes, (2^H,), or of each bit's values, (2, H); None for fair coins.
    """
    if log_aggregate is None:
        return rng.random((*shape, latent_dim)) < 0.5
    chances = np.exp(log_aggregate.astype(np.float64))
    if chances.ndim == 2:
        return rng.random((*shape, latent_dim)) < chances[1]
    codes = rng.choice(len(chances), size=shape, p=chances / chances.sum())
    return (codes[..., None] >> np.arange(latent_dim)) % 2 == 1


def check_range(name: str, value: float, allowed: bool, what: str) -> None:
    """`ValueError` with the value where it is not allowed."""
    if not allowed:
        raise ValueError(f"{name}={value}: {what}")
