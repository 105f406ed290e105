"""Plans as text."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError

if TYPE_CHECKING:  # this module also serves installations without torch
    from torch import Tensor


def parse_bits(text: str, latent_dim: int, names: Mapping[str, str] | None = None) -> np.ndarray:
    """
    Parses `"01101001"`, bit 0 first, to (P, H) bool. Ignores spaces and commas; a longer text holds several plans.

    Args:
        names: the configuration's `plan_names`. The text may be one of these names.

    Raises:
        ValueError: for an unknown name, other characters, or a length that is not a multiple of `latent_dim`.
    """
    if names and text in names:
        text = names[text]
    elif names and not _is_bits(text):
        near = difflib.get_close_matches(text, names, 3, 0.4) or sorted(names)[:8]
        raise InputError(
            f"plan {text!r} is neither bits (0 and 1, bit 0 first) nor a known name, such as {', '.join(near)}"
        )
    digits = "".join(text.replace(",", " ").split())
    if set(digits) - {"0", "1"} or not digits:
        raise InputError(f"plan {text!r}: give its bits as 0 and 1, bit 0 first")
    if len(digits) % latent_dim:
        raise InputError(f"plan {text!r} has {len(digits)} bits: plans of this model have {latent_dim}")
    return np.array([digit == "1" for digit in digits]).reshape(-1, latent_dim)


def parse_plan(text: str, latent_dim: int, names: Mapping[str, str] | None = None) -> "Tensor":
    """Returns the result of `parse_bits` as a tensor."""
    import torch

    return torch.from_numpy(parse_bits(text, latent_dim, names))


def check_plan_names(names: Mapping[str, str], latent_dim: int) -> None:
    """Raises `ValueError` for a name that is empty or could be read as bits, and for an invalid plan."""
    for name, text in names.items():
        if not name.strip() or _is_bits(name):
            raise InputError(f"plan_names: {name!r} is not a valid name: a name must not be empty or consist of bits")
        parse_bits(text, latent_dim)


def _is_bits(text: str) -> bool:
    return not set(text) - {"0", "1", ",", " ", "\n", "\t", "\r"}


def format_bits(plan: Any) -> str:
    """Formats (P, H) bits for `parse_bits`: each plan's bits, bit 0 first, plans separated by spaces."""
    return " ".join("".join("1" if bit else "0" for bit in row) for row in plan.tolist())


def format_plan(plan: "Tensor") -> str:
    """Formats (P, H) or (H,) bits like `format_bits`, but shows at most four plans."""
    rows = plan.view(-1, plan.shape[-1])
    text = format_bits(rows[:4])
    return text if len(rows) <= 4 else f"{text} … ({len(rows)} plans)"
