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


def draw(logits: np.ndarray, top_k: int, top_p: float, rng: np.random.Generator) -> np.ndarray:
    """One token of each row of logits, (B, V), among its `top_k` likeliest and the fewest that make up `top_p`."""
    logits = logits.astype(np.float64)
    if 0 < top_k < logits.shape[1]:
        least = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < least, -np.inf, logits)
    order = np.argsort(-logits, axis=-1, kind="stable")
    chances = np.take_along_axis(logits, order, -1)
    chances = np.exp(chances - chances[:, :1])
    reached = chances.cumsum(-1)
    if top_p < 1:
        chances = np.where(reached - chances >= top_p * reached[:, -1:], 0, chances)
        reached = chances.cumsum(-1)
    drawn = (reached < rng.random((len(logits), 1)) * reached[:, -1:]).sum(-1)
    return np.take_along_axis(order, drawn[:, None], -1)[:, 0]


def check_range(name: str, value: float, allowed: bool, what: str) -> None:
    """`ValueError` with the value where it is not allowed."""
    if not allowed:
        raise ValueError(f"{name}={value}: {what}")
