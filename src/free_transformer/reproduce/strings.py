"""Measures generated strings of the letters task: validity, place of the run, and noise, alone and within groups."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from free_transformer.data.letters import LENGTH, LETTERS, PLACES, TARGET_LENGTH

UNDERSCORE, NOISE_MARK = ord("_"), ord("!")


def places_and_validity(strings: np.ndarray, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Finds the place of the run in each string, and whether the task can produce the string.

    A string is valid if some place explains every character that is not `!`. Its place is the one that explains most
    characters, the median if there are several, and NaN for a string without its letter.

    Args:
        strings: (N, 64) bytes.
        letters: (N,) bytes, the letter of each prompt.

    Returns:
        places, (N,), and validity, (N,) bool.
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
    Measurements of groups of strings of 64 characters; the strings of a group have the same prompt.

    Attributes:
        valid: share of strings that the task can produce.
        noise_rate: share of `!` among the characters. The task's is 1/16 = 0.0625.
        place_std: standard deviation of the place within a group, mean over groups. 16.5 for uniform places.
        place_mode: share of a group at its most common place, mean over groups.
        noise_overlap: Jaccard index of the positions of `!` of two strings of a group, mean over pairs and groups.
    """

    valid: float
    noise_rate: float
    place_std: float
    place_mode: float
    noise_overlap: float


def measure_groups(strings: np.ndarray, letters: np.ndarray, group_size: int) -> Groups:
    """Measures `strings`, (N, 64) bytes, with `letters`, (N,) bytes, in consecutive groups of `group_size`."""
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
    """Mean Jaccard index of all pairs of rows, (N, 64) bool. Pairs without any `!` are ignored."""
    both = noise.astype(float) @ noise.T
    either = noise.sum(1)[:, None] + noise.sum(1)[None] - both
    pairs = np.triu(either > 0, 1)
    return float((both[pairs] / either[pairs]).mean()) if pairs.any() else float("nan")


def prompts(groups: int, group_size: int, begin: int, seed: int) -> Tensor:
    """Samples prompts, (groups · group_size, 3) tokens: begin-of-text, a letter, `>`. Each group has one letter."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(LETTERS.encode(), np.uint8)[rng.integers(len(LETTERS), size=groups)]
    rows = [[begin, int(letter), ord(">")] for letter in letters]
    return torch.tensor(rows).repeat_interleave(group_size, 0)
