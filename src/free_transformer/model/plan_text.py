"""Plans written as text."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError

if TYPE_CHECKING:  # this module also serves installations without torch
    from torch import Tensor


def parse_bits(text: str, latent_dim: int) -> np.ndarray:
    """
    `"01101001"`, bit 0 first, spaces and commas ignored -> (P, H) bool; a longer text holds several plans.

    Raises:
        ValueError: for other characters, or a length that is no multiple of `latent_dim`.
    """
    digits = "".join(text.replace(",", " ").split())
    if set(digits) - {"0", "1"} or not digits:
        raise InputError(f"plan {text!r}: write its bits as 0 and 1, bit 0 first")
    if len(digits) % latent_dim:
        raise InputError(f"plan {text!r} has {len(digits)} bits: a plan of this model has {latent_dim}")
    return np.array([digit == "1" for digit in digits]).reshape(-1, latent_dim)


def parse_plan(text: str, latent_dim: int) -> "Tensor":
    """`parse_bits`, as a tensor."""
    import torch

    return torch.from_numpy(parse_bits(text, latent_dim))


def format_bits(plan: Any) -> str:
    """(P, H) bits -> what `parse_bits` reads: each plan's bits, bit 0 first, plans apart by a space."""
    return " ".join("".join("1" if bit else "0" for bit in row) for row in plan.tolist())


def format_plan(plan: "Tensor") -> str:
    """`format_bits` of (P, H) or (H,), of many plans the first four."""
    rows = plan.view(-1, plan.shape[-1])
    text = format_bits(rows[:4])
    return text if len(rows) <= 4 else f"{text} … ({len(rows)} plans)"
