"""Turns the sampled tokens of a text into the chunks that its client receives."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from free_transformer.runtime.arrays import sample_rows
from free_transformer.serving.batch import Batch, TextRequest
from free_transformer.serving.detokenizer import Detokenizer
from free_transformer.serving.scoring import PromptScores, TokenScore, token_scores

End = Literal["stop", "length", "abort", "cancelled", "error"]  # "abort": the server shut down


@dataclass
class Chunk:
    """
    The part of a text that was generated since its previous chunk.

    Attributes:
        tokens: number of new tokens so far.
        plan: (P, H) bool, only in the first chunk.
        end: how the text ended, only in the last chunk.
        reason: reason for an error.
        scores: scores of the tokens, if requested; the first chunk has those of the prompt.
    """

    request: TextRequest
    text: str = ""
    tokens: int = 0
    plan: np.ndarray | None = None
    end: End | None = None
    reason: str | None = None
    scores: list[TokenScore] = field(default_factory=list)


class ResponseStream:
    """An async iterator over the chunks of one client request, until all of its texts have ended."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Chunk] = asyncio.Queue()
        self.texts: list[ActiveText] = []

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        left = len(self.texts)
        while left:
            chunk = await self.queue.get()
            left -= chunk.end is not None
            yield chunk

    def cancel(self) -> None:
        """Drops the texts before the next step. Each one ends as "cancelled"."""
        for text in self.texts:
            text.cancelled = True


class ActiveText:
    """
    A text that is waiting, being scored or being generated.

    Attributes:
        token: the last token, which the model has not read yet.
        plan: (P, H) bool; None before the prompt has been read.
        scores: scores of tokens that have not been sent yet.
    """

    def __init__(self, request: TextRequest, batch: Batch, responses: ResponseStream):
        self.request, self.batch, self.responses = request, batch, responses
        self.created = time.monotonic()
        self.cancelled = False
        self.detokenizer = Detokenizer(batch.texts, request.tokens, request.stop)
        self.token_rng = request.token_generator()
        self.token = 0
        self.plan: np.ndarray | None = None
        self.scores: list[TokenScore] = []
        self._unsent = ""
        self._sent_plan = False
        self._scoring: Iterator[PromptScores] | None = None
        self._scored: PromptScores | None = None

    @property
    def length(self) -> int:
        """Number of tokens so far, including the prompt."""
        return len(self.request.tokens) + self.detokenizer.count

    def score_prompt(self) -> None:
        """Scores the prompt under the text's own plan."""
        assert self.plan is not None
        *_, found = self.batch.score_prompt(self.request.tokens, self.plan[None], self.request.logprobs or 0)
        self.scores = found.scores

    def continue_scoring(self) -> Chunk | None:
        """Computes the next part of the prompt's scores. Returns the chunk once all are computed."""
        request = self.request
        if self._scoring is None:
            self._scoring = self._begin_scoring()
        found = next(self._scoring, None)
        if found is not None:
            self._scored = found
            return None
        if self._scored is not None and request.logprobs is not None:
            log_probs = self._scored.next_log_probs[None]
            self.scores = list(self._scored.scores) if request.score_prompt else []
            if request.max_tokens:
                (token,) = sample_rows(log_probs, [request.sampling], self.token_rng.random(1))
                self.scores += token_scores(log_probs, [token], request.logprobs)
                return self.chunk(self.take(token) or "length")
        return self.chunk("length")

    def _begin_scoring(self) -> Iterator[PromptScores]:
        request, batch = self.request, self.batch
        if request.logprobs is None:  # the response is only the prompt
            return iter(())
        if request.num_plans:
            plans, log_weights = batch.score_plans(request)
            return batch.score_prompt(request.tokens, plans, request.logprobs, log_weights)
        self.plan = batch.complete_plan(request)
        return batch.score_prompt(request.tokens, self.plan[None], request.logprobs)

    def take(self, token: int) -> End | None:
        """Appends the next token. Returns how the text ended, or None if it continues."""
        self.token = token
        if token in self.batch.ends:
            return "stop"
        self._unsent += self.detokenizer.add(token)
        if self.detokenizer.stopped:
            return "stop"
        return "length" if self.detokenizer.count == self.request.max_tokens else None

    @property
    def has_news(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._unsent or self.scores) or not self._sent_plan

    def chunk(self, end: End | None = None) -> Chunk:
        """Returns everything that has not been sent yet."""
        text = self._unsent + (self.detokenizer.end() if end in ("stop", "length", "abort") else "")
        plan = None if self._sent_plan else self.plan
        scores, self.scores = self.scores, []
        self._unsent, self._sent_plan = "", True
        return Chunk(self.request, text, self.detokenizer.count, plan, end, scores=scores)

    def failed(self, reason: str) -> Chunk:
        return Chunk(self.request, tokens=self.detokenizer.count, end="error", reason=reason)


def deliver(ready: Sequence[tuple[ActiveText, Chunk]]) -> None:
    """Passes chunks to the event loops of their clients together, so that each loop wakes up once per step."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[ActiveText, Chunk]]] = {}
    for text, chunk in ready:
        by_loop.setdefault(text.responses.loop, []).append((text, chunk))
    for loop, chunks in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_put, chunks)


def _put(ready: Sequence[tuple[ActiveText, Chunk]]) -> None:
    for text, chunk in ready:
        text.responses.queue.put_nowait(chunk)
