import itertools
import math
import re

import numpy as np
import pytest

from free_transformer.data import letters as synthetic_data
from free_transformer.data.letters import LENGTH, LETTERS, NOISE, PLACES, TARGET_LENGTH, letters, letters_entropy


@pytest.fixture
def small_task(monkeypatch):
    """A task whose strings can be enumerated, `small_task(LENGTH=7, ...)`."""
    letters_entropy.cache_clear()

    def change(**values) -> None:
        for name, value in values.items():
            monkeypatch.setattr(synthetic_data, name, value)

    yield change
    letters_entropy.cache_clear()


def clean(text: str, letter: str) -> list[int]:
    """The places that a string allows, from the characters that are not noise."""
    return [
        place
        for place in range(PLACES)
        if all(
            character in ("!", letter if place <= index < place + TARGET_LENGTH else "_")
            for index, character in enumerate(text)
        )
    ]


def enumerated_entropy(length: int, target: int, noise: float) -> float:
    """Of the string given its letter, in nats, from the probability of every string."""
    probability: dict[str, float] = {}
    places = length - target + 1
    for place, hidden in itertools.product(range(places), itertools.product([False, True], repeat=length)):
        shown = "_" * place + "A" * target + "_" * (length - place - target)
        text = "".join("!" if hit else character for character, hit in zip(shown, hidden, strict=True))
        weight = noise ** sum(hidden) * (1 - noise) ** (length - sum(hidden)) / places
        probability[text] = probability.get(text, 0.0) + weight
    assert sum(probability.values()) == pytest.approx(1)
    return -sum(p * math.log(p) for p in probability.values())


def test_a_string_is_its_letter_and_a_run_of_it_among_underscores_and_noise():
    for text in letters(200):
        letter, prompt, body = text[0], text[1], text[2:]
        assert letter in LETTERS
        assert prompt == ">"
        assert len(body) == LENGTH == 64
        assert set(body) <= {"_", "!", letter}
        assert clean(body, letter)


def test_letters_places_and_noise_have_their_rates():
    texts = list(letters(4000, seed=1))
    noise = sum(text.count("!") for text in texts) / (len(texts) * LENGTH)
    assert noise == pytest.approx(NOISE, abs=4 * (NOISE * (1 - NOISE) / (len(texts) * LENGTH)) ** 0.5)
    counts = np.bincount([LETTERS.index(text[0]) for text in texts], minlength=26)
    assert ((counts - 4000 / 26) ** 2 / (4000 / 26)).sum() < 55  # chi-square of 25 degrees, one in two thousand
    known = [places[0] for text in texts if len(places := clean(text[2:], text[0])) == 1]
    counts = np.bincount(known, minlength=PLACES)
    assert len(counts) == PLACES
    assert (counts > 0).all()
    assert np.mean(known) == pytest.approx((PLACES - 1) / 2, abs=1.5)


def test_noise_does_not_look_at_what_it_hides():
    texts = [text[2:] for text in letters(4000, seed=2)]
    by_index = np.array([[character == "!" for character in text] for text in texts]).mean(0)
    assert np.abs(by_index - NOISE).max() < 5 * (NOISE * (1 - NOISE) / 4000) ** 0.5


def test_the_same_seed_gives_the_same_strings_and_a_longer_list_continues():
    assert list(letters(20, 3)) == list(letters(20, 3)) == list(letters(30, 3))[:20]
    assert list(letters(20, 3)) != list(letters(20, 4))
    assert list(letters(0)) == []


def test_the_task_is_that_of_the_paper():
    assert (LENGTH, TARGET_LENGTH, NOISE, PLACES, len(LETTERS)) == (64, 8, 1 / 16, 57, 26)
    assert all(re.fullmatch(r"[A-Z]>[A-Z_!]{64}", text) for text in letters(20))


@pytest.mark.parametrize(
    ("length", "target", "noise"), [(7, 3, 0.3), (7, 3, 0.05), (6, 1, 0.2), (6, 5, 0.4), (8, 2, 0.5), (4, 4, 0.3)]
)
def test_the_entropy_is_that_of_all_strings_counted_out(small_task, length, target, noise):
    small_task(LENGTH=length, TARGET_LENGTH=target, NOISE=noise, PLACES=length - target + 1)
    assert letters_entropy() == pytest.approx(enumerated_entropy(length, target, noise), abs=1e-10)


def test_the_entropy_of_the_task_itself():
    letters_entropy.cache_clear()
    assert letters_entropy() == pytest.approx(19.000, abs=5e-4)


def test_the_entropy_is_the_mean_surprisal_of_sampled_strings():
    """Given its letter and place a string has the probability of its noise; each place that it allows adds as much."""
    surprises = []
    for text in letters(3000, seed=5):
        hidden = text.count("!")
        noise = hidden * math.log(NOISE) + (LENGTH - hidden) * math.log(1 - NOISE)
        surprises.append(-noise - math.log(len(clean(text[2:], text[0])) / PLACES))
    error = np.std(surprises) / len(surprises) ** 0.5
    assert np.mean(surprises) == pytest.approx(letters_entropy(), abs=4 * error)
