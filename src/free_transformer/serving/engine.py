"""
All texts are generated together by one thread, one token of each at a time; new ones join as others end.

A text depends on its own request alone: its random numbers come from its own seed, its row of the batch from its own
tokens. What fails for one text ends that text, and the others continue. (The continuous batching of `transformers`
packs all texts into one row, with one stream of random numbers, and has no place for plans that differ between texts.)
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from free_transformer.errors import InputError, RunError
from free_transformer.files import first_line
from free_transformer.model.sampling import Sampling
from free_transformer.runtime.arrays import NO_TOKEN, sample_prior
from free_transformer.serving.batch import NOT_FINITE, Batch, TokenScore, sample_rows, token_scores
from free_transformer.serving.detokenizer import Detokenizer
from free_transformer.serving.metrics import Metrics

PROMPT_TOKENS_PER_STEP = 1024  # read between two steps, so that texts in progress do not wait for all new ones
RECOVERY_SECONDS = 5  # between attempts to start a failed engine again
log = logging.getLogger(__name__)


class QueueFull(RunError):
    """More texts would wait than may."""


class Stopping(RunError):
    """The server is shutting down, or its engine has failed, and takes no new texts."""


@dataclass(eq=False)
class Job:
    """A text to generate: its prompt, its plans, and how its tokens are sampled."""

    tokens: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    plan: np.ndarray | None = None  # (P, H) bool, the first plans of the text
    plan_from: list[int] | None = None  # or tokens of the example that they are read from
    prompt_plan: str = "posterior"
    prior: str = "uniform"
    stop: Sequence[str] = ()
    seed: Sequence[int] | None = None
    stream: bool = False  # whether chunks are wanted before the text has ended
    logprobs: int | None = None  # most likely tokens to list with each token's log-probability; None for no scores
    score_prompt: bool = False  # whether the prompt's tokens are scored too
    num_plans: int = 0  # plans from the prior that these scores are averaged over; 0 is the text's own plan

    @property
    def only_scores(self) -> bool:
        """Whether all can be computed from the prompt's scores: up to one new token."""
        return self.max_tokens == 0 or (self.score_prompt and self.max_tokens == 1)


@dataclass
class Chunk:
    """
    What has been generated of a text since its last chunk.

    Attributes:
        tokens: number of new tokens so far.
        plan: (P, H) bool, in the first chunk.
        end: in the last chunk: "stop", "length", "abort" (the server shut down), "cancelled" or "error".
        reason: of an error.
        scores: of the tokens, where they were asked for; the prompt's in the first chunk.
    """

    job: Job
    text: str = ""
    tokens: int = 0
    plan: np.ndarray | None = None
    end: str | None = None
    reason: str | None = None
    scores: list[TokenScore] = field(default_factory=list)


class Engine:
    """
    Args:
        build: makes the batch, in the thread that generates. (PyTorch's threads for products belong to the thread that
            first asked for any; two such teams on the same cores were seen 2.3 times slower.)
        max_waiting: texts that may wait for a row of the batch.

    Raises:
        Exception: what `build` raises, or the first tokens, which are computed before the constructor returns.

    Attributes:
        failure: why nothing can be generated at present; None while all is well.
    """

    def __init__(self, build: Callable[[], Batch], max_waiting: int, metrics: Metrics):
        self.max_waiting, self.metrics = max_waiting, metrics
        self.failure: str | None = None
        self._waiting: deque[_Text] = deque()
        self._unfinished = 0  # texts waiting, being scored or being generated
        self._texts: list[_Text] = []  # by row
        self._scoring: deque[_Text] = deque()
        self._ready: list[tuple[_Text, Chunk]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._deadline: float | None = None
        built: Future[Batch] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name="engine", daemon=True)
        self._thread.start()
        self.batch = built.result()
        metrics.running.set_function(lambda: len(self._texts) + len(self._scoring))
        metrics.waiting.set_function(lambda: len(self._waiting))

    @property
    def is_well(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    @property
    def max_texts(self) -> int:
        """Texts that may be unfinished at a time."""
        return self.max_waiting + self.batch.max_rows

    def drain(self, seconds: float) -> None:
        """
        Takes no new texts from now on, and ends those that have not ended after so many seconds, with what they have.

        It takes no lock, so that a signal handler can call it.
        """
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def stop(self) -> None:
        """Ends the thread, after the texts that are being generated have been ended."""
        self.drain(0)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> "ResponseStream":
        """
        Lets texts wait for their rows; to be called in the event loop that reads them.

        Raises:
            QueueFull: where more texts would wait than may.
            Stopping: where no texts are taken any more, or the engine has failed.
        """
        if self._deadline is not None:
            raise Stopping("the server is shutting down")
        if self.failure is not None:
            raise Stopping(f"the engine is restarting after a failure ({self.failure})")
        responses = ResponseStream()
        texts = responses.texts = [_Text(job, self.batch, responses) for job in jobs]
        with self._changed:
            if self._unfinished + len(texts) > self.max_texts:
                raise QueueFull(
                    f"{len(self._waiting)} texts are waiting, at most {self.max_waiting} may; try again later"
                )
            self._unfinished += len(texts)
            self._waiting.extend(texts)
            self._changed.notify()
        return responses

    def _run(self, build: Callable[[], Batch], built: "Future[Batch]") -> None:
        try:
            batch = build()
            try:
                batch.warm_up()
            except RuntimeError as error:
                raise InputError(f"the first tokens could not be generated: {first_line(error)}") from error
            built.set_result(batch)
        except BaseException as error:
            built.set_exception(error)
        else:
            self._work(batch)

    def _work(self, batch: Batch) -> None:
        self.batch = batch  # the constructor has yet to set it
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._texts or self._scoring or self._stopping,
                    None if self.failure is None else RECOVERY_SECONDS,
                )
                has_work = self._waiting or self._texts or self._scoring
                if self._stopping and not has_work:
                    return
            try:
                if self.failure is not None:
                    self._restart()
                self._end_at_deadline()
                self._drop_cancelled()
                self._score()
                self._admit()
                self._step()
                if batch.rows != len(self._texts):
                    raise RunError(f"{batch.rows} rows for {len(self._texts)} texts")
            except Exception as error:
                self._fail(error)
            self._deliver()

    def _fail(self, error: Exception) -> None:
        """Ends all texts after a failure that no text can be blamed for, and starts again, at once and then later."""
        failed_before = self.failure is not None
        self.failure = first_line(error)
        for text in [*self._texts, *self._scoring, *self._take_waiting()]:
            self._ready.append((text, text.failed(self.failure)))
        self._texts, self._scoring = [], deque()
        if failed_before:
            log.error("the engine could not be restarted: %s", self.failure)
            return
        log.error("the engine failed, and with it all texts in progress", exc_info=error)
        try:
            self._restart()
        except Exception as again:
            self._fail(again)

    def _restart(self) -> None:
        self.batch.reset()
        self.batch.warm_up()
        self.failure = None
        self.metrics.restarts.inc()
        log.warning("the engine has been restarted")

    def _take_waiting(self) -> "list[_Text]":
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def _end_at_deadline(self) -> None:
        if self._deadline is None or time.monotonic() < self._deadline:
            return
        for row in reversed(range(len(self._texts))):
            self._end(row, "abort")
        for text in [*self._scoring, *self._take_waiting()]:
            self._ready.append((text, Chunk(text.job, end="abort")))
        self._scoring.clear()

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self._texts))):
            if self._texts[row].cancelled:
                self._end(row, "cancelled")
        with self._changed:
            dropped = [text for text in [*self._waiting, *self._scoring] if text.cancelled]
            if dropped:
                self._waiting = deque(text for text in self._waiting if not text.cancelled)
                self._scoring = deque(text for text in self._scoring if not text.cancelled)
        self._ready += [(text, Chunk(text.job, end="cancelled")) for text in dropped]

    def _score(self) -> None:
        """A piece of the scores of one prompt."""
        if not self._scoring:
            return
        text = self._scoring.popleft()
        try:
            chunk = text.continue_scoring()
        except Exception as error:
            self._blame(text, error, "scored")
            return
        if chunk is None:
            self._scoring.appendleft(text)  # one at a time: each holds the states of its prompt under every plan
            return
        self.metrics.generated_tokens.inc(chunk.tokens)
        self._ready.append((text, chunk))

    def _admit(self) -> None:
        """Reads prompts into free rows."""
        budget = PROMPT_TOKENS_PER_STEP
        while len(self._texts) < self.batch.max_rows and budget > 0 and (text := self._next()) is not None:
            budget -= len(text.job.tokens)
            self.metrics.prompt_tokens.inc(len(text.job.tokens))
            if text.job.only_scores:
                self._scoring.append(text)
                continue
            try:
                logits = self.batch.add(text.job.tokens, text.complete_plan)
            except Exception as error:  # one prompt may need more memory than there is
                self._blame(text, error, f"read ({len(text.job.tokens)} tokens)")
                continue
            self._texts.append(text)
            row = len(self._texts) - 1
            self.metrics.first_token_seconds.observe(time.monotonic() - text.created)
            try:
                if text.job.score_prompt:
                    text.score_prompt()
                token = self._sample(logits, [text])[0]
            except Exception as error:
                self._blame_row(row, error)
            else:
                self._take(row, token, logits, 0)

    def _next(self) -> "_Text | None":
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def _step(self) -> None:
        """Generates a token of each text."""
        logits = None
        while self._texts and logits is None:
            try:
                logits = self.batch.step([text.token for text in self._texts])
            except Exception as error:
                # rows do not depend on each other, and only memory depends on them: the longest text needs the most
                longest = max(range(len(self._texts)), key=lambda row: self._texts[row].length)
                if len(self._texts) == 1:
                    raise
                self._blame_row(longest, error)
        if logits is None:
            return
        self.metrics.batch.observe(len(self._texts))
        tokens = self._sample(logits, self._texts)
        for row in reversed(range(len(tokens))):  # the text that takes the place of one that ends has had its turn
            self._take(row, tokens[row], logits, row)

    def _sample(self, logits: Any, texts: "Sequence[_Text]") -> list[int | Exception]:
        """The next token of each text, or why it has none."""
        sampling = [text.job.sampling for text in texts]
        uniform = np.array([text.token_rng.random() for text in texts])
        try:
            return [*self.batch.sample(logits, sampling, uniform)]
        except Exception as error:
            if len(texts) == 1:
                return [error]
        found: list[int | Exception] = []
        for row in range(len(texts)):
            try:
                found += self.batch.sample(logits[row : row + 1], sampling[row : row + 1], uniform[row : row + 1])
            except Exception as error:
                found.append(error)
        return found

    def _take(self, row: int, token: int | Exception, logits: Any, place: int) -> None:
        """A text's next token, which row `place` of the logits has given."""
        text = self._texts[row]
        if token == NO_TOKEN:
            token = RuntimeError(NOT_FINITE)
        if isinstance(token, Exception):
            self._blame_row(row, token)
            return
        try:
            if text.job.logprobs is not None:
                text.scores.append(self.batch.score_token(logits, place, token, text.job.logprobs))
            end = text.take(token)
        except Exception as error:
            self._blame_row(row, error)
            return
        self.metrics.generated_tokens.inc()
        if end is not None:
            self._end(row, end)
        elif text.job.stream and text.has_news:
            self._ready.append((text, text.chunk()))

    def _end(self, row: int, end: str) -> None:
        text = self._texts[row]
        try:
            chunk = text.chunk(end)
        except Exception as error:
            log.error("a text could not be decoded", exc_info=error)
            chunk = text.failed(first_line(error))
        self._remove(row)
        self._ready.append((text, chunk))

    def _blame(self, text: "_Text", error: Exception, what: str) -> None:
        log.error("a text could not be %s", what, exc_info=error)
        self.metrics.failed.inc()
        self.metrics.not_finite.inc(str(error) == NOT_FINITE)
        self._ready.append((text, text.failed(first_line(error))))

    def _blame_row(self, row: int, error: Exception) -> None:
        self._blame(self._texts[row], error, "continued")
        self._remove(row)

    def _remove(self, row: int) -> None:
        self.batch.remove(row)
        last = self._texts.pop()
        if row < len(self._texts):
            self._texts[row] = last

    def _deliver(self) -> None:
        """All chunks of a step at once, so that an event loop is woken once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Text, Chunk]]] = {}
        for text, chunk in self._ready:
            by_loop.setdefault(text.responses.loop, []).append((text, chunk))
        with self._changed:
            self._unfinished -= sum(chunk.end is not None for _, chunk in self._ready)
        self._ready = []
        for loop, ready in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, ready)


class ResponseStream:
    """The texts of one request: an async iterator of their chunks, until all have ended."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Chunk] = asyncio.Queue()
        self.texts: list[_Text] = []

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        left = len(self.texts)
        while left:
            chunk = await self.queue.get()
            left -= chunk.end is not None
            yield chunk

    def cancel(self) -> None:
        """Gives the texts up before the next step; each then ends as "cancelled"."""
        for text in self.texts:
            text.cancelled = True


class _Text:
    """A job in progress."""

    def __init__(self, job: Job, batch: Batch, responses: ResponseStream):
        self.job, self.batch, self.responses = job, batch, responses
        self.created = time.monotonic()
        self.cancelled = False
        self.detokenizer = Detokenizer(batch.texts, job.tokens, job.stop)
        # separate streams for plans and for tokens: a longer text then begins as a shorter one of the same seed does
        self.plan_rng, self.token_rng = map(np.random.default_rng, np.random.SeedSequence(job.seed).spawn(2))
        self.token = 0  # the last one, which is still to be read
        self.plan: np.ndarray | None = None
        self.scores: list[TokenScore] = []
        self.news = ""
        self._sent_plan = False
        self._scoring: Iterator[tuple[list[TokenScore], np.ndarray]] | None = None
        self._scored: tuple[list[TokenScore], np.ndarray] | None = None

    @property
    def length(self) -> int:
        return len(self.job.tokens) + self.detokenizer.count

    def complete_plan(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Plans as far as the text may come, (P, H) bool: the caller's, those of the prompt, and sampled ones."""
        job, batch, rng = self.job, self.batch, self.plan_rng
        given = np.zeros((0, batch.latent_dim), dtype=bool) if job.plan is None else job.plan
        if job.plan_from is not None:
            given = batch.infer_plan(job.plan_from) > 0
        has_text = any(token != batch.begin for token in job.tokens)
        if job.prompt_plan == "posterior" and has_text and len(given) < batch.num_plans(len(job.tokens)):
            logits = read().astype(np.float64)
            drawn = rng.random(logits.shape) * (1 + np.exp(-logits)) < 1
            given = np.concatenate([given, drawn[len(given) :]])
        wanted = batch.num_plans(len(job.tokens) + max(job.max_tokens - 1, 0))  # the last one is not read
        missing = max(wanted - len(given), 0)
        drawn = sample_prior((missing,), batch.latent_dim, batch.prior(job.prior), rng)
        self.plan = np.concatenate([given[:wanted], drawn])
        return self.plan

    def score_prompt(self) -> None:
        """Scores of the prompt under the text's own plan."""
        assert self.plan is not None
        *_, (self.scores, _) = self.batch.score_prompt(self.job.tokens, self.plan[None], self.job.logprobs or 0)

    def continue_scoring(self) -> Chunk | None:
        """A piece of the prompt's scores; the text when all is done."""
        job = self.job
        if self._scoring is None:
            self._scoring = self._begin_scoring()
        found = next(self._scoring, None)
        if found is not None:
            self._scored = found
            return None
        if self._scored is not None and job.logprobs is not None:
            scores, log_probs = self._scored
            self.scores = list(scores) if job.score_prompt else []
            if job.max_tokens:
                (token,) = sample_rows(log_probs[None], [job.sampling], self.token_rng.random(1))
                self.scores += token_scores(log_probs[None], [token], job.logprobs)
                return self.chunk(self.take(token) or "length")
        return self.chunk("length")

    def _begin_scoring(self) -> Iterator[tuple[list[TokenScore], np.ndarray]]:
        job, batch = self.job, self.batch
        if job.logprobs is None:  # only the prompt is wanted
            return iter(())
        if job.num_plans:
            plans, weights = batch.score_plans(len(job.tokens), job.num_plans, job.prior, self.plan_rng)
            return batch.score_prompt(job.tokens, plans, job.logprobs, weights)
        plan = self.complete_plan(lambda: batch.infer_plan(job.tokens))
        return batch.score_prompt(job.tokens, plan[None], job.logprobs)

    def take(self, token: int) -> str | None:
        """The next token; how the text ends, if it does."""
        self.token = token
        if token in self.batch.ends:
            return "stop"
        self.news += self.detokenizer.add(token)
        if self.detokenizer.stopped:
            return "stop"
        return "length" if self.detokenizer.count == self.job.max_tokens else None

    @property
    def has_news(self) -> bool:
        return bool(self.news or self.scores) or not self._sent_plan

    def chunk(self, end: str | None = None) -> Chunk:
        news = self.news + (self.detokenizer.end() if end in ("stop", "length", "abort") else "")
        plan = None if self._sent_plan else self.plan
        scores, self.scores = self.scores, []
        self.news, self._sent_plan = "", True
        return Chunk(self.job, news, self.detokenizer.count, plan, end, scores=scores)

    def failed(self, reason: str) -> Chunk:
        return Chunk(self.job, tokens=self.detokenizer.count, end="error", reason=reason)


def _put(ready: Sequence[tuple[_Text, Chunk]]) -> None:
    for text, chunk in ready:
        text.responses.queue.put_nowait(chunk)
