"""
The engine generates all texts together in one thread, one token of each text per step. New texts join as others end.

A text depends only on its own request: its random numbers come from its own seed, and its row of the batch from its own
tokens. A failure of one text ends only that text. (The continuous batching of `transformers` packs all texts into one
row with a single stream of random numbers, and does not support different plans per text.)
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from free_transformer.errors import InputError, RunError
from free_transformer.files import first_line
from free_transformer.runtime.arrays import NO_TOKEN
from free_transformer.serving.batch import Batch, Logits, TextRequest
from free_transformer.serving.metrics import Metrics
from free_transformer.serving.scoring import NOT_FINITE
from free_transformer.serving.stream import ActiveText, Chunk, End, ResponseStream, deliver

PROMPT_TOKENS_PER_STEP = 1024  # between two steps, so that new prompts do not stall texts in progress
RECOVERY_SECONDS = 5  # time between attempts to restart a failed engine
log = logging.getLogger(__name__)
Result = TypeVar("Result")


class QueueFull(RunError):
    """The queue of texts is full."""


class Stopping(RunError):
    """The server accepts no new texts: it is shutting down, or its engine has failed."""


class Engine:
    """
    Args:
        build: creates the batch, in the engine's thread. (PyTorch's worker threads belong to the thread that first uses
            them. Two such groups on the same cores were 2.3 times slower.)
        max_waiting: maximum number of texts in the queue.

    Raises:
        Exception: errors of `build`, or of generating the first tokens, which the constructor waits for.

    Attributes:
        failure: reason why nothing can be generated at present; None while the engine works.
    """

    def __init__(self, build: Callable[[], Batch], max_waiting: int, metrics: Metrics):
        self.max_waiting, self.metrics = max_waiting, metrics
        self.failure: str | None = None
        self._waiting: deque[ActiveText] = deque()
        self._unfinished = 0  # texts waiting, being scored or being generated
        self._texts: list[ActiveText] = []  # by row
        self._scoring: deque[ActiveText] = deque()
        self._ready: list[tuple[ActiveText, Chunk]] = []
        self._calls: deque[Callable[[Batch], None]] = deque()
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
        """Maximum number of unfinished texts."""
        return self.max_waiting + self.batch.max_rows

    def drain(self, seconds: float) -> None:
        """
        Stops accepting new texts. Texts that have not ended after `seconds` end with the tokens they have.

        This method takes no lock, so a signal handler can call it.
        """
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def stop(self) -> None:
        """Ends all texts with the tokens they have, then the thread."""
        self.drain(0)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, requests: Sequence[TextRequest]) -> ResponseStream:
        """
        Queues texts. It must be called in the event loop that reads the chunks.

        Raises:
            QueueFull: if more than `max_waiting` texts would wait.
            Stopping: if the engine is shutting down or has failed.
        """
        if self._deadline is not None:
            raise Stopping("the server is shutting down")
        if self.failure is not None:
            raise Stopping(f"the engine is restarting after a failure ({self.failure})")
        responses = ResponseStream()
        texts = responses.texts = [ActiveText(request, self.batch, responses) for request in requests]
        with self._changed:
            if self._unfinished + len(texts) > self.max_texts:
                raise QueueFull(
                    f"{len(self._waiting)} texts are waiting, the maximum is {self.max_waiting}; try again later"
                )
            self._unfinished += len(texts)
            self._waiting.extend(texts)
            self._changed.notify()
        return responses

    def call(self, function: Callable[[Batch], Result]) -> "Future[Result]":
        """
        Calls a function of the batch in the engine's thread, between two steps of the texts in progress.

        Raises:
            Stopping: where the engine is shutting down.
        """
        future: Future[Result] = Future()

        def run(batch: Batch) -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(batch))
                except BaseException as error:
                    future.set_exception(error)

        with self._changed:
            if self._stopping or self._deadline is not None:
                raise Stopping("the server is shutting down")
            self._calls.append(run)
            self._changed.notify()
        return future

    def _run(self, build: Callable[[], Batch], built: Future[Batch]) -> None:
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
            self._loop(batch)

    def _loop(self, batch: Batch) -> None:
        self.batch = batch  # the constructor may not have set it yet
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._texts or self._scoring or self._calls or self._stopping,
                    None if self.failure is None else RECOVERY_SECONDS,
                )
                has_work = self._waiting or self._texts or self._scoring or self._calls
                if self._stopping and not has_work:
                    return
                call = self._calls.popleft() if self._calls else None
            if call is not None:
                call(batch)
            try:
                if self.failure is not None:
                    self._restart()
                self._end_at_deadline()
                self._drop_cancelled()
                self._score()
                self._admit()
                self._read_again()
                self._step()
                if batch.rows != len(self._texts):
                    raise RuntimeError(f"{batch.rows} rows for {len(self._texts)} texts")
            except Exception as error:
                self._fail(error)
            self._deliver()

    def _fail(self, error: Exception) -> None:
        """Ends all texts after a failure that was not caused by a single text. Restarts immediately, or else later."""
        failed_before = self.failure is not None
        self.failure = first_line(error)
        for text in [*self._texts, *self._scoring, *self._take_waiting()]:
            self._ready.append((text, text.failed(self.failure)))
        self._texts, self._scoring = [], deque()
        if failed_before:
            log.error("the engine could not be restarted: %s", self.failure)
            return
        log.error("the engine failed; all texts in progress have ended", exc_info=error)
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

    def _take_waiting(self) -> list[ActiveText]:
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def _end_at_deadline(self) -> None:
        if self._deadline is None or time.monotonic() < self._deadline:
            return
        for row in reversed(range(len(self._texts))):
            self._end(row, "abort")
        for text in [*self._scoring, *self._take_waiting()]:
            self._ready.append((text, Chunk(text.request, end="abort")))
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
        self._ready += [(text, Chunk(text.request, end="cancelled")) for text in dropped]

    def _score(self) -> None:
        """Computes the next part of one prompt's scores."""
        if not self._scoring:
            return
        text = self._scoring.popleft()
        try:
            chunk = text.continue_scoring()
        except Exception as error:
            self._fail_text(text, error, "scored")
            return
        if chunk is None:
            self._scoring.appendleft(text)  # one prompt at a time, since it holds its states under every plan
            return
        self.metrics.generated_tokens.inc(chunk.tokens)
        self._ready.append((text, chunk))

    def _admit(self) -> None:
        """Reads prompts into free rows."""
        budget = PROMPT_TOKENS_PER_STEP
        while len(self._texts) < self.batch.max_rows and budget > 0 and (text := self._next()) is not None:
            budget -= len(text.request.tokens)
            self.metrics.prompt_tokens.inc(len(text.request.tokens))
            if text.request.only_scores:
                self._scoring.append(text)
                continue
            try:
                new = self.batch.add(text.request)
            except Exception as error:  # for example, a single prompt may need too much memory
                self._fail_text(text, error, f"read ({len(text.request.tokens)} tokens)")
                continue
            text.plan = new.plan
            self._texts.append(text)
            row = len(self._texts) - 1
            self.metrics.first_token_seconds.observe(time.monotonic() - text.created)
            try:
                if text.request.score_prompt:
                    text.score_prompt()
                token = self._sample(new.logits, [text])[0]
            except Exception as error:
                self._fail_row(row, error)
            else:
                self._take(row, token, new.logits, 0)

    def _next(self) -> ActiveText | None:
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def _read_again(self) -> None:
        """Reads texts again if their context is full or their plan changes, a few per step to not stall the others."""
        budget = PROMPT_TOKENS_PER_STEP
        for row in reversed(range(len(self._texts))):
            if budget > 0 and self.batch.contexts[row].is_due:
                try:
                    budget -= self.batch.read_again(row)
                except Exception as error:
                    self._fail_row(row, error)

    def _step(self) -> None:
        """Generates one token of each text that is not waiting to be read again."""
        logits, tokens = None, []
        while self._texts and logits is None:
            due = [context.is_due for context in self.batch.contexts]
            tokens = [None if waits else text.token for text, waits in zip(self._texts, due, strict=True)]
            try:
                logits = self.batch.step(tokens)
            except Exception as error:
                # rows share only memory: end the longest text, which needs the most, and try again
                longest = max(range(len(self._texts)), key=lambda row: self._texts[row].length)
                if len(self._texts) == 1:
                    raise
                self._fail_row(longest, error)
        if logits is None:
            return
        rows = [row for row, token in enumerate(tokens) if token is not None]
        self.metrics.batch.observe(len(rows))
        if len(rows) < len(tokens):
            logits = logits[rows]
        sampled = self._sample(logits, [self._texts[row] for row in rows])
        # backwards, so that the last row, which replaces a row that ends, already has its token
        for place, row in reversed(list(enumerate(rows))):
            self._take(row, sampled[place], logits, place)

    def _sample(self, logits: Logits, texts: Sequence[ActiveText]) -> list[int | Exception]:
        """Samples the next token of each text; returns an error for texts where this fails."""
        sampling = [text.request.sampling for text in texts]
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

    def _take(self, row: int, token: int | Exception, logits: Logits, place: int) -> None:
        """Appends the next token of a text, sampled from row `place` of the logits."""
        text = self._texts[row]
        if token == NO_TOKEN:
            token = RuntimeError(NOT_FINITE)
        if isinstance(token, Exception):
            self._fail_row(row, token)
            return
        try:
            if text.request.logprobs is not None:
                text.scores.append(self.batch.score_token(logits, place, token, text.request.logprobs))
            end = text.take(token)
        except Exception as error:
            self._fail_row(row, error)
            return
        self.metrics.generated_tokens.inc()
        if end is not None:
            self._end(row, end)
        elif text.request.stream and text.has_news:
            self._ready.append((text, text.chunk()))

    def _end(self, row: int, end: End) -> None:
        text = self._texts[row]
        try:
            chunk = text.chunk(end)
        except Exception as error:
            log.error("a text could not be decoded", exc_info=error)
            chunk = text.failed(first_line(error))
        self._remove(row)
        self._ready.append((text, chunk))

    def _fail_text(self, text: ActiveText, error: Exception, what: str) -> None:
        log.error("a text could not be %s", what, exc_info=error)
        self.metrics.failed.inc()
        self.metrics.not_finite.inc(str(error) == NOT_FINITE)
        self._ready.append((text, text.failed(first_line(error))))

    def _fail_row(self, row: int, error: Exception) -> None:
        self._fail_text(self._texts[row], error, "continued")
        self._remove(row)

    def _remove(self, row: int) -> None:
        self.batch.remove(row)
        last = self._texts.pop()
        if row < len(self._texts):
            self._texts[row] = last

    def _deliver(self) -> None:
        with self._changed:
            self._unfinished -= sum(chunk.end is not None for _, chunk in self._ready)
        ready, self._ready = self._ready, []
        deliver(ready)
