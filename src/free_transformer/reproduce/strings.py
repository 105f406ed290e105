"""What strings of the letters task show of their plan: validity, place of the run, noise; alone and within groups."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from free_transformer.data.letters import LENGTH, LETTERS, PLACES, TARGET_LENGTH

UNDERSCORE, NOISE_MARK = ord("_"), ord("!")


def places_and_validity(strings: np.ndarray, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Where the run of each string is, and whether the task could have written it.

    A string is valid where some place explains every character that is no `!`. Otherwise its place is the one that
    explains the most; the middle one where several do; NaN in a string without its letter.

    Args:
        strings: (N, 64) bytes; letters: (N,) bytes, the letter of each prompt.

    Returns:
        places (N,), validity (N,) bool.
    """
    inside = np.zeros((PLACES, LENGTH))
    for place in range(PLACES):
        inside[place, place : place + TARGET_LENGTH] = 1
    noise, run = strings == NOISE_MARK, strings == letters[:, None]
    explained = run @ inside.T + (strings == UNDERSCORE) @ (1 - inside).T + noise.sum(1, keepdims=True)
    best = explained == explained.max(1, keepdims=True)
    places = np.array([np.median(np.flatnonzero(row)) for row in best])
    return np.where(run.any(1), places, np.nan), explained.max(1) == LENGTH


@dataclass
class Groups:
    """
    Strings of 64 characters in groups, one prompt a group.

    Attributes:
        valid: share that the task could have written; noise_rate: share of `!` (the task's is 1/16 = 0.0625).
        place_std: standard deviation of the place within a group, mean over groups, 16.5 where it is uniform.
        place_mode: share of a group at its commonest place.
        noise_overlap: Jaccard index of the places of `!` of two strings of a group.
    """

    valid: float
    noise_rate: float
    place_std: float
    place_mode: float
    noise_overlap: float


def measure_groups(strings: np.ndarray, letters: np.ndarray, group_size: int) -> Groups:
    """`strings`: (N, 64) bytes, `letters`: (N,), groups of `group_size` one behind the other."""
    places, valid = places_and_validity(strings, letters)
    stds, modes = [], []
    for group in places.reshape(-1, group_size):
        known = group[~np.isnan(group)]
        if len(known) > 1:
            stds.append(known.std(ddof=1))
            modes.append(np.unique(known, return_counts=True)[1].max() / len(known))
    noise = strings == NOISE_MARK
    return Groups(
        valid=float(valid.mean()),
        noise_rate=float(noise.mean()),
        place_std=float(np.mean(stds)) if stds else float("nan"),
        place_mode=float(np.mean(modes)) if modes else float("nan"),
        noise_overlap=float(np.nanmean([_overlap(group) for group in noise.reshape(-1, group_size, LENGTH)])),
    )


def _overlap(noise: np.ndarray) -> float:
    """Mean Jaccard index of all pairs of rows, (N, 64) bool; pairs without any `!` left out."""
    both = noise.astype(float) @ noise.T
    either = noise.sum(1)[:, None] + noise.sum(1)[None] - both
    pairs = np.triu(either > 0, 1)
    return float((both[pairs] / either[pairs]).mean()) if pairs.any() else float("nan")


def prompts(groups: int, group_size: int, begin: int, seed: int) -> Tensor:
    """(groups · group_size, 3) tokens: begin-of-text, a letter, `>`; one letter a group."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(LETTERS.encode(), np.uint8)[rng.integers(len(LETTERS), size=groups)]
    rows = [[begin, int(letter), ord(">")] for letter in letters]
    return torch.tensor(rows).repeat_interleave(group_size, 0)
