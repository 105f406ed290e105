"""
The paper's letters task (section 4.1), with the exact entropy that no model can beat.

A string is a letter, `>`, then 64 characters: underscores with a run of the letter, 8 long, at a random place, each
character replaced by `!` with probability 1/16. The letter is the prompt: what is drawn at random beyond it is the
place and the noise.
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
    """One string of the task, `LENGTH + 2` characters, prompt included."""
    letter = LETTERS[rng.integers(len(LETTERS))]
    place = int(rng.integers(PLACES))
    clean = "_" * place + letter * TARGET_LENGTH + "_" * (LENGTH - place - TARGET_LENGTH)
    noise = rng.random(LENGTH) < NOISE
    return f"{letter}>" + "".join("!" if hit else character for character, hit in zip(clean, noise, strict=True))


def letters(count: int, seed: int = 0) -> Iterator[str]:
    """`count` independent strings, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield sample_string(rng)


@cache
def letters_entropy() -> float:
    """
    Exact entropy in nats of a string given its letter: 19.000.

    H(string) = H(noise) + H(place) - H(place | string). Every place that a string allows is equally likely, since
    it explains the string with the same number of `!`; so H(place | string) is the mean logarithm of their number.
    """
    noise = -(NOISE * math.log(NOISE) + (1 - NOISE) * math.log(1 - NOISE))
    uncertainty = sum(_some_letter_shows(place) + _no_letter_shows(place) for place in range(PLACES)) / PLACES
    return LENGTH * noise + math.log(PLACES) - uncertainty


def _some_letter_shows(place: int) -> float:
    """
    Share of E[log places allowed] of the strings with a visible letter.

    The run can then be moved right by d only if its first d letters and the d underscores behind it are hidden, and
    left likewise: the number of places is 1 + min(first letters, underscores behind) + min(last ones, before).
    """
    total = 0.0
    for first in range(TARGET_LENGTH):
        for last in range(TARGET_LENGTH - first):
            visible = 1 if first + last == TARGET_LENGTH - 1 else 2  # the letters that end the two hidden runs
            letters_hidden = NOISE ** (first + last) * (1 - NOISE) ** visible
            for left, p_left in enumerate(_hidden_run(place)):
                for right, p_right in enumerate(_hidden_run(LENGTH - TARGET_LENGTH - place)):
                    moves = min(first, right) + min(last, left)
                    total += letters_hidden * p_left * p_right * math.log1p(moves)
    return total


def _hidden_run(available: int) -> list[float]:
    """Probability that exactly 0, 1, ... 8-or-more of the next characters are hidden, `available` of them there."""
    longest = min(available, TARGET_LENGTH)
    return [NOISE**length * (1 - NOISE) for length in range(longest)] + [NOISE**longest]


def _no_letter_shows(place: int) -> float:
    """
    Share of the strings whose run is all hidden (probability 16^-8): any 8 hidden characters in a row could be it.

    `states[run, windows]` is the probability of ending in `run` hidden characters (8 or more count as 8) after
    `windows` places, read character by character.
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
