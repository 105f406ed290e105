"""What the engine needs from a model: rows of texts that are generated together, and that come and go."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from free_transformer.errors import InputError
from free_transformer.model.sampling import Sampling
from free_transformer.runtime.arrays import check_vocabulary, draw, sample_prior
from free_transformer.serving.chat import ChatTemplate
from free_transformer.serving.detokenizer import TokenTexts

DEFAULT_MAX_LENGTH = 2048  # tokens of a text
SCORED_VALUES = 2**22  # logits that are in memory at a time while a prompt is scored
NOT_FINITE = "the model's logits are NaN or infinite"
MARGIN = 16  # tokens by which the beginning of a text may have more than the same beginning of the whole text
PromptLogits = Iterator[tuple[int, int, np.ndarray]]
Complete = Callable[[Callable[[], np.ndarray]], np.ndarray]


@dataclass
class TokenScore:
    """
    The log-probability of a token.

    Attributes:
        log_prob: None for the first token of a text, which nothing precedes.
        top: the most likely tokens at this place and their log-probabilities, the most likely first.
    """

    token: int
    log_prob: float | None
    top: list[tuple[int, float]]


class Batch(ABC):
    """
    A model and the rows of texts that it generates at the same time. Operations on rows either succeed or leave the
    rows as they were.

    Args:
        tokenizer: of the model; what looks like a special token in a text is text like any other.
        begin: the token that a text begins with.
        ends: tokens that end one.
        max_rows: texts at a time.
        max_length: tokens of a text, its prompt included.
        chat: the tokenizer's chat template, if it has one.

    Attributes:
        rows: texts that are being generated now.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        begin: int,
        ends: Iterable[int],
        vocab_size: int,
        latent_dim: int,
        plan_span: int | str,
        max_rows: int,
        max_length: int,
        chat: ChatTemplate | None = None,
    ):
        check_vocabulary(tokenizer, vocab_size, "tokenizer")
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True
        self.texts = TokenTexts(tokenizer)
        self.begin, self.ends = begin, frozenset(ends)
        self.vocab_size, self.latent_dim, self.plan_span = vocab_size, latent_dim, plan_span
        self.max_rows, self.max_length = max_rows, max_length
        self.chat = chat
        self._chat_tokenizer: Tokenizer | None = None
        if chat is not None:
            self._chat_tokenizer = Tokenizer.from_str(tokenizer.to_str())
            self._chat_tokenizer.encode_special_tokens = False
        self.rows = 0

    def encode(self, text: str, limit: int) -> list[int]:
        """
        A text's tokens, the one that begins it first; of a text with more than `limit` tokens at least its first
        `limit + 1`. Little more of a long text is tokenized than that.
        """
        return [self.begin, *_tokenize(self.tokenizer, text, limit - 1)]

    def encode_chat(self, text: str, limit: int) -> list[int]:
        """The same of a text that a chat template has made, which contains special tokens."""
        assert self._chat_tokenizer is not None
        return _tokenize(self._chat_tokenizer, text, limit)

    def num_plans(self, num_tokens: int) -> int:
        return 1 if self.plan_span == "sequence" else -(-num_tokens // int(self.plan_span))

    def warm_up(self) -> None:
        """Reads a text, generates two tokens and forgets them. Raises what a request would."""
        plan = np.zeros((self.num_plans(2), self.latent_dim), dtype=bool)
        logits = [self.infer_plan([self.begin]), self.add([self.begin], lambda read: plan)]
        logits.append(self.step([self.begin]))
        self.remove(0)
        if not all(np.isfinite(np.asarray(each)).all() for each in logits):
            raise InputError(f"{NOT_FINITE}: its weights are damaged, or its precision too low")

    @abstractmethod
    def reset(self) -> None:
        """Forgets all rows."""

    @abstractmethod
    def prior(self, name: str) -> np.ndarray | None:
        """What `arrays.sample_prior` takes for `"uniform"` or `"aggregate"`. `ValueError` where there is none."""

    @abstractmethod
    def infer_plan(self, tokens: list[int]) -> np.ndarray:
        """The posterior's logits, (P, H), of the plans of a text."""

    @abstractmethod
    def add(self, tokens: list[int], complete: Complete) -> Any:
        """
        Reads a prompt into the next row.

        Args:
            complete: called with a function that reads the prompt's plans, as `infer_plan` does; returns the plans of
                the text to its end, (P, H) bool.

        Returns:
            logits of the next token, (1, V), as `sample` takes them.
        """

    @abstractmethod
    def step(self, tokens: list[int]) -> Any:
        """Reads the last token of each row. Returns logits of the next one of each, (rows, V)."""

    @abstractmethod
    def sample(self, logits: Any, sampling: Sequence[Sampling], uniform: np.ndarray) -> list[int]:
        """The next token of each row, as `arrays.draw`."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """Ends a row; the last one takes its place."""

    @abstractmethod
    def prompt_logits(self, tokens: list[int], plans: np.ndarray, columns: int) -> PromptLogits:
        """
        Logits of a text under several plans, (S, P, H) bool: first those of its first `columns` tokens under each plan
        in turn, then those of the next ones, and so on.

        Yields:
            the first column, the plan, and (C, V) logits.
        """

    def score_plans(
        self, num_tokens: int, count: int, prior: str, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """
        Plans that the probabilities of a text are averaged over, (S, P, H) bool, and their log-weights: `count` sampled
        from the prior, or all that there are where those are no more.
        """
        log_aggregate = self.prior(prior)
        if self.plan_span != "sequence" or self.latent_dim > 30 or 2**self.latent_dim > count:
            shape = (count, self.num_plans(num_tokens))
            return sample_prior(shape, self.latent_dim, log_aggregate, rng), None
        plans = np.arange(2**self.latent_dim)[:, None] >> np.arange(self.latent_dim) & 1
        if log_aggregate is not None and log_aggregate.ndim == 2:  # of each bit's values
            log_aggregate = log_aggregate[plans, np.arange(self.latent_dim)].sum(1)
        return plans[:, None].astype(bool), log_aggregate

    def score_token(self, logits: Any, row: int, token: int, top: int) -> TokenScore:
        """The log-probability of a token by a row of logits, before temperature, top_k and top_p."""
        return token_scores(_log_softmax(np.asarray(logits[row : row + 1])), [token], top)[0]

    def score_prompt(
        self, tokens: list[int], plans: np.ndarray, top: int, log_weights: np.ndarray | None = None
    ) -> Iterator[tuple[list[TokenScore], np.ndarray]]:
        r"""
        Log-probabilities of a text's tokens, averaged over plans: `p(x_t | x_<t)` of `p(x) = \sum_s w_s p(x | Z_s)`.

        Args:
            plans: (S, P, H) bool; one plan gives the probabilities under that plan.
            top: number of most likely tokens to list at each place.
            log_weights: log w, (S,), default the same for all, as it is for plans sampled from the prior.

        Yields:
            after each piece of work the scores that are known by then, of tokens from the first on, and the
            log-probabilities, (V,), of the token after them.
        """
        scores = [TokenScore(tokens[0], None, [])]
        log_weights = np.zeros(len(plans)) if log_weights is None else log_weights.copy()  # later w_s p(x_<t | Z_s)
        columns = max(1, SCORED_VALUES // self.vocab_size)
        mixture, total = np.zeros((0, self.vocab_size)), np.zeros(0)
        for start, which, logits in self.prompt_logits(tokens, plans, columns):
            log_probs = _log_softmax(logits)
            following = tokens[start + 1 : start + 1 + len(log_probs)]
            own = log_probs[np.arange(len(following)), following]
            before = log_weights[which] + np.concatenate([[0.0], own.cumsum()])[: len(log_probs)]
            log_weights[which] += own.sum()
            if len(plans) > 1:
                log_probs += before[:, None]
                mixture = log_probs if which == 0 else np.logaddexp(mixture, log_probs)
                total = before if which == 0 else np.logaddexp(total, before)
                log_probs = mixture - total[:, None]
            if which == len(plans) - 1:
                scores += token_scores(log_probs, following, top)
            yield scores, log_probs[-1]


def _tokenize(tokenizer: Tokenizer, text: str, limit: int) -> list[int]:
    """Token ids; of a text with more than `limit` those of its beginning, more than `limit` of them."""
    size = 4 * limit + MARGIN
    while size < len(text):
        ids = tokenizer.encode(text[:size], add_special_tokens=False).ids
        if len(ids) > limit + MARGIN:
            return ids
        size *= 4
    return tokenizer.encode(text, add_special_tokens=False).ids


def sample_rows(logits: np.ndarray, sampling: Sequence[Sampling], uniform: np.ndarray) -> list[int]:
    """`arrays.draw` with the settings of each row."""
    temperature, top_k, top_p = np.array([(each.temperature, each.top_k, each.top_p) for each in sampling]).T
    return draw(logits, temperature, top_k, top_p, uniform).tolist()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In double precision. `ValueError` for logits that are NaN or infinite."""
    logits = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise InputError(NOT_FINITE)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def token_scores(log_probs: np.ndarray, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Scores of one token per row of log-probabilities, (C, V), with the `top` most likely tokens of each row."""
    found = []
    for row, token in zip(log_probs, tokens, strict=False):
        best = np.argpartition(-row, min(top, len(row) - 1))[:top] if top else np.zeros(0, dtype=int)
        best = best[np.argsort(-row[best], kind="stable")]
        found.append(TokenScore(token, float(row[token]), [(int(each), float(row[each])) for each in best]))
    return found


def checked_length(length: int | None, trained: int) -> int:
    """Tokens of a text: `length`, or what the model was built for, at most 2,048. `ValueError` beyond the model's."""
    if length is not None and not 2 <= length <= trained:
        raise InputError(f"max_length={length}: from 2 to {trained} tokens, for which the model was built")
    return min(trained, DEFAULT_MAX_LENGTH) if length is None else length
