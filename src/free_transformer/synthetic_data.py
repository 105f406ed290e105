"""The letters task of the paper; the code is in `data/letters.py`."""

from free_transformer.data.letters import LENGTH, LETTERS, NOISE, TARGET_LENGTH, letters, letters_entropy, sample_string

__all__ = ["LENGTH", "LETTERS", "NOISE", "TARGET_LENGTH", "letters", "letters_entropy", "sample_string"]
