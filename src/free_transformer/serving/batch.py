"""What the engine asks of a model: rows of texts that are written together, and that come and go."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

MOST_BY_DEFAULT = 2048  # tokens of a text
Complete = Callable[[Callable[[], np.ndarray]], np.ndarray]


@dataclass
class Sampling:
    """How the next token of a text is drawn."""

    temperature: float = 1.0  # 0 takes the likeliest
    top_k: int = 0  # among so many likeliest tokens, 0 among all
    top_p: float = 1.0  # among the fewest likeliest tokens of this mass


class Batch(ABC):
    """
    Args:
        tokenizer: of the model; what looks like a special token in a text is text like any other.
        begin: the token that a text begins with.
        ends: tokens that end one.
        most_rows: texts at a time.
        max_length: tokens of a text, its prompt included.

    Attributes:
        rows: texts that are being written now.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        begin: int,
        ends: Iterable[int],
        vocab_size: int,
        latent_dim: int,
        plan_span: int | str,
        most_rows: int,
        max_length: int,
    ):
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True
        self.begin, self.ends = begin, frozenset(ends)
        self.vocab_size, self.latent_dim, self.plan_span = vocab_size, latent_dim, plan_span
        self.most_rows, self.max_length = most_rows, max_length
        self.rows = 0

    def encode(self, text: str) -> list[int]:
        """A text's tokens, the one that begins it first."""
        return [self.begin, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def num_plans(self, num_tokens: int) -> int:
        return 1 if self.plan_span == "sequence" else -(-num_tokens // int(self.plan_span))

    @abstractmethod
    def prior(self, name: str) -> np.ndarray | None:
        """What `arrays.sample_prior` takes for `"uniform"` or `"aggregate"`. `ValueError` where there is none."""

    @abstractmethod
    def infer_plan(self, tokens: list[int]) -> np.ndarray:
        """The posterior's logits, (P, H), of the plans of a text."""

    @abstractmethod
    def add(self, tokens: list[int], complete: Complete, sampling: Sampling, uniform: float) -> int:
        """
        Reads a prompt into the next row, and draws the token that follows.

        Args:
            complete: called with a function that reads the prompt's plans, as `infer_plan` does; returns the plans of
                the text to its end, (P, H) bool.
            uniform: a random number in [0, 1) that chooses the token.
        """

    @abstractmethod
    def step(self, tokens: list[int], sampling: list[Sampling], uniform: np.ndarray) -> list[int]:
        """Reads the last token of each row, and draws the next one of each."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """Ends a row; the last one takes its place."""


def checked_length(length: int | None, trained: int) -> int:
    """Of a text: `length`, or what the model was built for, at most 2,048. `ValueError` beyond the model's."""
    if length is not None and not 2 <= length <= trained:
        raise ValueError(f"max_length={length}: from 2 to {trained} tokens, for which the model was built")
    return min(trained, MOST_BY_DEFAULT) if length is None else length
