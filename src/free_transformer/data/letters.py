"""
The paper's letters task (section 4.1) and its exact entropy, the lower bound of any model's negative log-likelihood.

A string is a letter, `>`, and 64 characters: underscores with a run of 8 copies of the letter at a random place. Each
of the 64 characters is then replaced by `!` with probability 1/16. The letter is the prompt. Given the prompt, the
place and the noise are random.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LENGTH = 64
TARGET_LENGTH = 8
NOISE = 1 / 16
PLACES = LENGTH - TARGET_LENGTH + 1


def sample_string(rng: np.random.Generator) -> str:
    """Samples one string of the task, `LENGTH + 2` characters including the prompt."""
    letter = LETTERS[rng.integers(len(LETTERS))]
    place = int(rng.integers(PLACES))
    clean = "_" * place + letter * TARGET_LENGTH + "_" * (LENGTH - place - TARGET_LENGTH)
    noise = rng.random(LENGTH) < NOISE
    return f"{letter}>" + "".join("!" if hit else character for character, hit in zip(clean, noise, strict=True))


def letters(count: int, seed: int = 0) -> Iterator[str]:
    """Yields `count` independent strings, determined by the seed."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield sample_string(rng)


@cache
def letters_entropy() -> float:
    """
    Returns the exact entropy of a string given its letter, 19.000 nats.

    H(string) = H(noise) + H(place) - H(place | string). All places consistent with a string are equally likely, since
    each explains it with the same number of `!`. H(place | string) is therefore the mean logarithm of their number.
    """
    noise = -(NOISE * math.log(NOISE) + (1 - NOISE) * math.log(1 - NOISE))
    uncertainty = sum(_with_visible_letter(place) + _without_visible_letter(place) for place in range(PLACES)) / PLACES
    return LENGTH * noise + math.log(PLACES) - uncertainty


def _with_visible_letter(place: int) -> float:
    """
    Contribution to E[log(consistent places)] of the strings with a visible letter.

    The run can be moved right by d only if its first d letters and the d underscores after it are hidden, and likewise
    to the left. The number of places is 1 + min(hidden first letters, hidden underscores after the run)
    + min(hidden last letters, hidden underscores before it).
    """
    total = 0.0
    for first in range(TARGET_LENGTH):
        for last in range(TARGET_LENGTH - first):
            visible = 1 if first + last == TARGET_LENGTH - 1 else 2  # the visible letters next to the two hidden parts
            letters_hidden = NOISE ** (first + last) * (1 - NOISE) ** visible
            for left, p_left in enumerate(_hidden_run(place)):
                for right, p_right in enumerate(_hidden_run(LENGTH - TARGET_LENGTH - place)):
                    moves = min(first, right) + min(last, left)
                    total += letters_hidden * p_left * p_right * math.log1p(moves)
    return total


def _hidden_run(available: int) -> list[float]:
    """Probabilities that exactly 0, 1, ..., 8 or more of the next `available` characters are hidden."""
    longest = min(available, TARGET_LENGTH)
    return [NOISE**length * (1 - NOISE) for length in range(longest)] + [NOISE**longest]


def _without_visible_letter(place: int) -> float:
    """
    Contribution of the strings whose run is completely hidden (probability 16^-8): it may be at any 8
    consecutive hidden characters.

    `states[run, windows]` is the probability that the characters so far end in `run` hidden ones (8 stands for 8 or
    more) and contain `windows` consistent places.
    """
    states = np.zeros((TARGET_LENGTH + 1, PLACES + 1))
    states[0, 0] = 1.0
    for index in range(LENGTH):
        in_run = place <= index < place + TARGET_LENGTH
        following = np.zeros_like(states)
        following[1:TARGET_LENGTH] = NOISE * states[: TARGET_LENGTH - 1]
        following[TARGET_LENGTH, 1:] = NOISE * (states[TARGET_LENGTH - 1] + states[TARGET_LENGTH])[:-1]
        if not in_run:
            following[0] = (1 - NOISE) * states.sum(0)
        states = following
    return float((states.sum(0)[1:] * np.log(np.arange(1, PLACES + 1))).sum())
