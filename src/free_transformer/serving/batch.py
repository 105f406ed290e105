"""The interface between engine and model: a batch whose rows are texts, which join and leave at any step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer

from free_transformer.errors import InputError
from free_transformer.model.context import context_limit, example_windows
from free_transformer.model.sampling import Sampling
from free_transformer.runtime.arrays import check_vocabulary
from free_transformer.runtime.plan_source import (
    PlanSource,
    average_posterior,
    num_plans,
    num_plans_to_read,
    sample_prior,
    sample_stratified_posterior,
    sample_stratified_prior,
)
from free_transformer.serving.chat import ChatTemplate
from free_transformer.serving.detokenizer import TokenTexts
from free_transformer.serving.row_context import RowContext
from free_transformer.serving.scoring import (
    NOT_FINITE,
    PromptLogits,
    PromptScores,
    TokenScore,
    log_softmax,
    score_prompt,
    token_scores,
)

DEFAULT_MAX_LENGTH = 2048  # tokens per text
SCORED_VALUES = 2**22  # logits in memory at a time while a prompt is scored
MARGIN = 16  # tokens by which tokenizing a prefix may differ from tokenizing the whole text
Self = TypeVar("Self")


class Logits(Protocol):
    """(rows, V), a NumPy array or a torch tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self: Self, rows: slice | list[int], /) -> Self: ...


L = TypeVar("L", bound=Logits)


@dataclass(eq=False)
class StratifiedTexts:
    """
    Texts of one prompt with stratified plans. Their plans are sampled together when the first text is read.

    Attributes:
        plans: (count, P, H) bool, the plans of all texts, once they are sampled.
    """

    count: int
    seed: Sequence[int] | None
    plans: np.ndarray | None = None

    def plan_generator(self) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed).spawn(2)[0])


@dataclass(eq=False)
class Example:
    """
    A text of any length whose plans other texts take over. They are inferred once, when the first of these texts is
    read.

    Attributes:
        tokens: tokens of the example, starting with the begin-of-text token.
        plans: (P, H) bool, once they are inferred.
    """

    tokens: list[int]
    plans: np.ndarray | None = None


@dataclass(eq=False)
class TextRequest:
    """
    One text to generate, already checked against the server's limits.

    Attributes:
        tokens: tokens of the prompt.
        max_tokens: maximum number of new tokens.
        plan: (P, H) bool, the first plans of the text.
        plan_changes: later plans, (1, H) bool, keyed by the number of new tokens after which they apply.
        plan_from: an example whose plans become the first plans of the text.
        prompt_plan: source of the prompt's other plans, `"posterior"` or `"prior"`.
        prior: prior of the remaining plans, `"uniform"` or `"aggregate"`.
        together: the texts whose plans are stratified together with this one; None for an independent plan.
        index: index of this text in `together`.
        stop: strings that end the text.
        stream: whether to send chunks before the text has ended.
        logprobs: number of most likely tokens to list with each token's log-probability; None for no scores.
        score_prompt: whether to score the prompt's tokens too.
        num_plans: number of plans from the prior over which these scores are averaged; 0 to use the text's own plan.
    """

    tokens: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    plan: np.ndarray | None = None
    plan_changes: Mapping[int, np.ndarray] = field(default_factory=dict)
    plan_from: Example | None = None
    prompt_plan: str = "posterior"
    prior: str = "uniform"
    together: StratifiedTexts | None = None
    index: int = 0
    stop: Sequence[str] = ()
    seed: Sequence[int] | None = None
    stream: bool = False
    logprobs: int | None = None
    score_prompt: bool = False
    num_plans: int = 0

    @property
    def only_scores(self) -> bool:
        """Whether scoring the prompt is sufficient, because at most one new token is needed."""
        return self.max_tokens == 0 or (self.score_prompt and self.max_tokens == 1)

    # Plans and tokens have separate random streams, so the start of a text does not depend on its length.
    def plan_generator(self) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed).spawn(2)[0])

    def token_generator(self) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed).spawn(2)[1])


@dataclass
class NewRow(Generic[L]):
    """
    A prompt that was added to the batch as a row.

    Attributes:
        plan: (P, H) bool, the plans of the whole text.
        logits: (1, V), logits of the first new token.
    """

    plan: np.ndarray
    logits: L


class Batch(ABC, Generic[L]):
    """
    A model and the texts that it generates at the same time, one per row.

    An operation on rows either succeeds or leaves the rows unchanged.

    Args:
        tokenizer: tokenizer of the model. Text that looks like a special token is encoded as plain text.
        begin: the token that begins a text.
        ends: tokens that end a text.
        max_rows: maximum number of texts at a time.
        max_length: maximum number of tokens of a text that the model sees at a time.
        chat: the tokenizer's chat template, if any.
        sliding_window: sliding window of the model's attention, if any.
        plan_names: plans by name.

    Attributes:
        rows: number of texts in progress.
        contexts: context of each text, which holds the tokens that the model sees.
        context_limit: `max_length` if longer texts are read again, else None.
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
        sliding_window: int | None = None,
        plan_names: Mapping[str, str] | None = None,
    ):
        check_vocabulary(tokenizer, vocab_size, "tokenizer")
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True
        self.texts = TokenTexts(tokenizer)
        self.begin, self.ends = begin, frozenset(ends)
        self.vocab_size, self.latent_dim, self.plan_span = vocab_size, latent_dim, plan_span
        self.max_rows, self.max_length = max_rows, max_length
        self.context_limit = context_limit(max_length, plan_span, sliding_window)
        self.plan_names = plan_names
        self.chat = chat
        self._chat_tokenizer: Tokenizer | None = None
        if chat is not None:
            self._chat_tokenizer = Tokenizer.from_str(tokenizer.to_str())
            self._chat_tokenizer.encode_special_tokens = False
        self.contexts: list[RowContext] = []

    @property
    def rows(self) -> int:
        return len(self.contexts)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """
        Returns the token ids of a text, beginning with the begin token.

        For a text with more than `limit` tokens, it returns at least the first `limit + 1`, and tokenizes only a little
        more than that.
        """
        return [self.begin, *_tokenize(self.tokenizer, text, len(text) if limit is None else limit - 1)]

    def encode_chat(self, text: str, limit: int) -> list[int]:
        """Same as `encode`, for the output of a chat template, which already contains special tokens."""
        assert self._chat_tokenizer is not None
        return _tokenize(self._chat_tokenizer, text, limit)

    def num_plans(self, num_tokens: int) -> int:
        """Returns the number of plans of a text with `num_tokens` tokens."""
        return num_plans(self.plan_span, num_tokens)

    def warm_up(self) -> None:
        """Generates two tokens of a text and removes it. Raises the errors that a request would raise."""
        plan = np.zeros((self.num_plans(2), self.latent_dim), dtype=bool)
        finite = [np.isfinite(self.infer_plan([self.begin])).all()]
        for logits in (self.add(TextRequest([self.begin], 2, plan=plan)).logits, self.step([self.begin])):
            finite.append(np.isfinite(np.asarray(logits)).all())
        self.remove(0)
        if not all(finite):
            raise InputError(f"{NOT_FINITE}: its weights are damaged, or its precision is too low")

    @abstractmethod
    def reset(self) -> None:
        """Removes all rows."""

    @abstractmethod
    def prior(self, name: str) -> np.ndarray | None:
        """
        Returns the log-probabilities of a prior for `plan_source.sample_prior`, None for `"uniform"`. Raises
        `ValueError` for `"aggregate"` if the model has no aggregate prior.
        """

    @abstractmethod
    def infer_plan(self, tokens: list[int]) -> np.ndarray:
        """Returns the posterior's logits, (P, H), of the plans of a text."""

    def example_posterior(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns the probability of a 1 for each bit of the plans of a text of any length, (P, H)."""
        windows = example_windows(tokens, self.max_length, self.plan_span)
        return average_posterior([self.infer_plan(window) for window in windows])

    def _plans_of(self, example: Example) -> np.ndarray:
        """Returns the most likely plans of an example, (P, H) bool."""
        if example.plans is None:
            example.plans = self.example_posterior(example.tokens) > 0.5
        return example.plans

    @abstractmethod
    def add(self, request: TextRequest) -> NewRow[L]:
        """Reads a prompt and adds it as the next row."""

    @abstractmethod
    def step(self, tokens: Sequence[int | None]) -> L:
        """
        Reads the last token of each row and returns the logits of the next tokens, (rows, V).

        A row whose token is None waits to be read again; its logits are meaningless.
        """

    @abstractmethod
    def read_again(self, row: int) -> int:
        """Reads the context of a row again when it is due. Returns the number of tokens read."""

    def begin_context(self, request: TextRequest, plan: np.ndarray) -> RowContext:
        """Creates the context of a prompt."""
        return RowContext(list(request.tokens), plan, request.plan_changes, self.context_limit, self.plan_span)

    def advance(self, tokens: Sequence[int | None]) -> None:
        """Updates the contexts after a step."""
        for row, token in enumerate(tokens):
            if token is not None:
                self.contexts[row].advance(token)

    @abstractmethod
    def sample(self, logits: L, sampling: Sequence[Sampling], uniform: np.ndarray) -> list[int]:
        """Samples the next token of each row; see `arrays.sample_tokens`."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """Removes a row. The last row takes its place."""

    @abstractmethod
    def prompt_logits(self, tokens: list[int], plans: np.ndarray, columns: int) -> PromptLogits:
        """
        Computes logits of a text under several plans, (S, P, H) bool.

        Parts of `columns` tokens are processed in order, each under all plans in turn.

        Yields:
            the first column of the part, the index of the plan, and (C, V) logits.
        """

    def complete_plan(self, request: TextRequest, read: Callable[[], np.ndarray] | None = None) -> np.ndarray:
        """
        Returns the plans of a text up to its last token, (P, H) bool.

        Args:
            read: returns the posterior's logits of the prompt, default `infer_plan`. Called only if they are needed.
        """
        together = request.together
        if together is None:
            return self._sample_plans(request, 1, request.plan_generator(), read)[0]
        if together.plans is None:
            together.plans = self._sample_plans(request, together.count, together.plan_generator(), read)
        return together.plans[request.index]

    def _sample_plans(
        self, request: TextRequest, texts: int, rng: np.random.Generator, read: Callable[[], np.ndarray] | None
    ) -> np.ndarray:
        """Samples stratified plans for several texts of one prompt, (texts, P, H) bool."""
        tokens = request.tokens
        given = np.zeros((0, self.latent_dim), dtype=bool) if request.plan is None else request.plan
        if request.plan_from is not None:
            given = self._plans_of(request.plan_from)
        prompt, mask = np.array([tokens]), np.ones((1, len(tokens)), dtype=bool)
        num_read = num_plans_to_read(prompt, mask, request.prompt_plan, self.plan_span, self.begin)
        from_prompt = np.zeros((texts, 0, self.latent_dim), dtype=bool)
        if num_read[0] > len(given):
            logits = self.infer_plan(tokens) if read is None else read()
            from_prompt = sample_stratified_posterior(logits[None], texts, rng)
        wanted = self.num_plans(len(tokens) + max(request.max_tokens - 1, 0))  # the last token is never read
        missing = max(wanted - max(len(given), from_prompt.shape[1]), 0)
        sampled = sample_stratified_prior((texts, missing), self.latent_dim, self.prior(request.prior), rng, texts)
        given = given[None].repeat(texts, axis=0)
        source = PlanSource(given=given, read=from_prompt, num_read=num_read.repeat(texts), sampled=sampled)
        return source.complete(wanted)

    def score_plans(self, request: TextRequest) -> tuple[np.ndarray, np.ndarray]:
        """
        Returns the plans over which the probabilities of a prompt are averaged, (S, P, H) bool, and their log-weights,
        (S,): `num_plans` plans sampled from the prior, or all plans if there are not more.
        """
        log_aggregate, count = self.prior(request.prior), request.num_plans
        if self.plan_span != "sequence" or self.latent_dim > 30 or 2**self.latent_dim > count:
            shape = (count, self.num_plans(len(request.tokens)))
            sampled = sample_prior(shape, self.latent_dim, log_aggregate, request.plan_generator())
            return sampled, np.zeros(count)
        plans = np.arange(2**self.latent_dim)[:, None] >> np.arange(self.latent_dim) & 1
        if log_aggregate is None:
            log_aggregate = np.zeros(len(plans))
        elif log_aggregate.ndim == 2:  # one row per value of a bit
            log_aggregate = log_aggregate[plans, np.arange(self.latent_dim)].sum(1)
        return plans[:, None].astype(bool), log_aggregate

    def score_token(self, logits: L, row: int, token: int, top: int) -> TokenScore:
        """Returns the log-probability of a token from a row of logits, before temperature, top_k and top_p."""
        return token_scores(log_softmax(np.asarray(logits[row : row + 1])), [token], top)[0]

    def score_prompt(
        self, tokens: list[int], plans: np.ndarray, top: int, log_weights: np.ndarray | None = None
    ) -> Iterator[PromptScores]:
        """
        Scores a prompt, averaged over plans; see `scoring.score_prompt`.

        Args:
            plans: (S, P, H) bool; one plan gives the probabilities under that plan.
            log_weights: (S,). Default: equal weights, as needed for plans sampled from the prior.
        """
        columns = max(1, SCORED_VALUES // self.vocab_size)
        weights = np.zeros(len(plans)) if log_weights is None else log_weights
        return score_prompt(tokens, self.prompt_logits(tokens, plans, columns), top, weights)


def _tokenize(tokenizer: Tokenizer, text: str, limit: int) -> list[int]:
    """Tokenizes a text. If it has more than `limit` tokens, returns a prefix of more than `limit` tokens."""
    size = 4 * limit + MARGIN
    while size < len(text):
        ids = tokenizer.encode(text[:size], add_special_tokens=False).ids
        if len(ids) > limit + MARGIN:
            return ids
        size *= 4
    return tokenizer.encode(text, add_special_tokens=False).ids


def checked_length(length: int | None, trained: int | None) -> int:
    """
    Returns the maximum number of tokens of a text: `length`, by default the model's, at most 2,048.

    Args:
        trained: result of `sampling.trained_length`.

    Raises:
        ValueError: if `length` exceeds the model's.
    """
    if length is not None and length < 2:
        raise InputError(f"max_length={length}: must be at least 2 tokens")
    if length is not None and trained is not None and length > trained:
        raise InputError(f"max_length={length}: must be 2 to {trained} tokens, the length that the model was built for")
    return min(trained or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH) if length is None else length
