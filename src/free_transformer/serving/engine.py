"""
All texts are written together by one thread, a token of each at a time; new ones join as others end.

A text depends on its own request alone: its random numbers come from its own seed, its row of the batch from its own
tokens. (The continuous batching of `transformers` packs all texts into one row, with one stream of random numbers, and
has no place for what differs from text to text, as plans do.)
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from free_transformer.deploy.arrays import sample_prior
from free_transformer.serving.batch import Batch, Sampling
from free_transformer.serving.metrics import Metrics
from free_transformer.serving.pieces import Pieces

PROMPT_TOKENS_A_STEP = 1024  # that are read between two steps: texts that are being written do not wait for all others
log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """More texts would wait than may."""


@dataclass(eq=False)
class Job:
    """A text to write: what it begins with, under which plans, and how its tokens are drawn."""

    tokens: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    plan: np.ndarray | None = None  # (P, H) bool, the first plans of the text
    plan_from: list[int] | None = None  # or tokens of the example that they are read from
    prompt_plan: str = "posterior"
    prior: str = "uniform"
    stop: Sequence[str] = ()
    seed: Sequence[int] | None = None
    stream: bool = False  # whether pieces are wanted before the text has ended


@dataclass
class Piece:
    """What has been written of a text since its last piece. The first tells the plan, the last how it ended."""

    job: Job
    text: str = ""
    tokens: int = 0  # so far
    plan: np.ndarray | None = None  # (P, H) bool
    end: str | None = None  # "stop", "length", "cancelled" or "error"


class Engine:
    """
    Args:
        build: makes the batch, in the thread that then writes. (PyTorch's threads for products belong to the thread
            that first asked for any; two such teams on the same cores were seen 2.3 times slower.)
        max_waiting: texts that may wait for a row of the batch.

    Raises:
        Exception: what `build` raises.

    Attributes:
        failure: of the last step, if it failed.
    """

    def __init__(self, build: Callable[[], Batch], max_waiting: int, metrics: Metrics):
        self.max_waiting, self.metrics = max_waiting, metrics
        self.failure: str | None = None
        self._waiting: deque[_Text] = deque()
        self._unfinished = 0  # texts waiting, being read or being written
        self._texts: list[_Text] = []  # by row
        self._ready: list[tuple[_Text, Piece]] = []
        self._changed = threading.Condition()
        self._stopping = False
        built: Future[Batch] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name="engine", daemon=True)
        self._thread.start()
        self.batch = built.result()
        metrics.running.set_function(lambda: len(self._texts))
        metrics.waiting.set_function(lambda: len(self._waiting))

    @property
    def is_well(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def stop(self) -> None:
        """Ends the thread, and with it the texts that are being written."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> "Writing":
        """
        Lets texts wait for their rows; to be called in the event loop that reads them.

        Raises:
            Busy: where more texts would wait than may.
            ValueError: for more texts than could ever wait.
        """
        most = self.max_waiting + self.batch.most_rows
        if len(jobs) > most:
            raise ValueError(f"{len(jobs)} texts in one request: at most {most}, as many as are written or may wait")
        writing = Writing()
        texts = writing.texts = [_Text(job, self.batch, writing) for job in jobs]
        with self._changed:
            if self._unfinished + len(texts) > most:
                raise Busy(f"{len(self._waiting)} texts are waiting already, {self.max_waiting} may; try again later")
            self._unfinished += len(texts)
            self._waiting.extend(texts)
            self._changed.notify()
        return writing

    def _run(self, build: Callable[[], Batch], built: "Future[Batch]") -> None:
        try:
            built.set_result(build())
        except BaseException as error:
            built.set_exception(error)
        else:
            self._work()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._texts or self._stopping)
                if self._stopping:
                    return
            try:
                self._admit()
                self._step()
                self.failure = None
            except Exception as error:
                log.exception("a step failed, and with it the texts that were being written")
                self.failure = str(error)
                for row in reversed(range(len(self._texts))):
                    self._end(row, "error")
            self._deliver()

    def _admit(self) -> None:
        """Reads prompts into free rows."""
        self._drop_cancelled()
        budget = PROMPT_TOKENS_A_STEP
        while len(self._texts) < self.batch.most_rows and budget > 0 and (text := self._next()) is not None:
            job = text.job
            budget -= len(job.tokens)
            try:
                token = self.batch.add(job.tokens, text.complete_plan, job.sampling, text.token_rng.random())
            except Exception:  # one prompt may be too much where others are not
                log.exception("a prompt of %d tokens could not be read", len(job.tokens))
                self._ready.append((text, Piece(job, end="error")))
                continue
            self._texts.append(text)
            self.metrics.prompt_tokens.inc(len(job.tokens))
            self.metrics.first_token_seconds.observe(time.monotonic() - text.created)
            self._take(len(self._texts) - 1, token)

    def _next(self) -> "_Text | None":
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self._texts))):
            if self._texts[row].cancelled:
                self._end(row, "cancelled")
        with self._changed:
            self._ready += [(text, Piece(text.job, end="cancelled")) for text in self._waiting if text.cancelled]
            self._waiting = deque(text for text in self._waiting if not text.cancelled)

    def _step(self) -> None:
        """A token of each text."""
        if not self._texts:
            return
        self.metrics.batch.observe(len(self._texts))
        tokens, sampling = [text.token for text in self._texts], [text.job.sampling for text in self._texts]
        uniform = np.array([text.token_rng.random() for text in self._texts])
        chosen = self.batch.step(tokens, sampling, uniform)
        for row in reversed(range(len(chosen))):  # what takes the place of a row that ends has had its turn
            self._take(row, chosen[row])

    def _take(self, row: int, token: int) -> None:
        text = self._texts[row]
        end = text.take(token)
        self.metrics.generated_tokens.inc()
        if end is not None:
            self._end(row, end)
        elif text.job.stream and text.has_news:
            self._ready.append((text, text.piece()))

    def _end(self, row: int, end: str) -> None:
        self.batch.remove(row)
        text, last = self._texts[row], self._texts.pop()
        if text is not last:
            self._texts[row] = last
        self._ready.append((text, text.piece(end)))

    def _deliver(self) -> None:
        """All pieces of a step at once, so that an event loop is woken once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Text, Piece]]] = {}
        for text, piece in self._ready:
            by_loop.setdefault(text.writing.loop, []).append((text, piece))
        with self._changed:
            self._unfinished -= sum(piece.end is not None for _, piece in self._ready)
        self._ready = []
        for loop, ready in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, ready)


class Writing:
    """The texts of one request: an async iterator of their pieces, until all have ended."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Piece] = asyncio.Queue()
        self.texts: list[_Text] = []

    async def __aiter__(self) -> AsyncIterator[Piece]:
        left = len(self.texts)
        while left:
            piece = await self.queue.get()
            left -= piece.end is not None
            yield piece

    def cancel(self) -> None:
        """Gives the texts up before the next step; each then ends as "cancelled"."""
        for text in self.texts:
            text.cancelled = True


class _Text:
    """A job on its way."""

    def __init__(self, job: Job, batch: Batch, writing: Writing):
        self.job, self.batch, self.writing = job, batch, writing
        self.created = time.monotonic()
        self.cancelled = False
        self.pieces = Pieces(batch.tokenizer, job.stop)
        # of plans and of tokens apart: a longer text then begins as a shorter one of the same seed does
        self.plan_rng, self.token_rng = map(np.random.default_rng, np.random.SeedSequence(job.seed).spawn(2))
        self.token = 0  # the last one, which is still to be read
        self.plan: np.ndarray | None = None
        self.news = ""
        self.has_told_plan = False

    def complete_plan(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Plans as far as the text may come, (P, H) bool: the caller's, those of the prompt, and drawn ones."""
        job, batch, rng = self.job, self.batch, self.plan_rng
        given = np.zeros((0, batch.latent_dim), dtype=bool) if job.plan is None else job.plan
        if job.plan_from is not None:
            given = batch.infer_plan(job.plan_from) > 0
        has_text = any(token != batch.begin for token in job.tokens)
        if job.prompt_plan == "posterior" and has_text and len(given) < batch.num_plans(len(job.tokens)):
            logits = read().astype(np.float64)
            drawn = rng.random(logits.shape) * (1 + np.exp(-logits)) < 1
            given = np.concatenate([given, drawn[len(given) :]])
        wanted = batch.num_plans(len(job.tokens) + job.max_tokens - 1)  # the last token is never read
        missing = max(wanted - len(given), 0)
        drawn = sample_prior((missing,), batch.latent_dim, batch.prior(job.prior), rng)
        self.plan = np.concatenate([given[:wanted], drawn])
        return self.plan

    def take(self, token: int) -> str | None:
        """The next token; how the text ends, if it does."""
        self.token = token
        if token in self.batch.ends:
            return "stop"
        self.news += self.pieces.add(token)
        if self.pieces.stopped:
            return "stop"
        return "length" if len(self.pieces.tokens) == self.job.max_tokens else None

    @property
    def has_news(self) -> bool:
        return bool(self.news) or not self.has_told_plan

    def piece(self, end: str | None = None) -> Piece:
        news = self.news + (self.pieces.end() if end in ("stop", "length") else "")
        plan = None if self.has_told_plan else self.plan
        self.news, self.has_told_plan = "", True
        return Piece(self.job, news, len(self.pieces.tokens), plan, end)


def _put(ready: Sequence[tuple[_Text, Piece]]) -> None:
    for text, piece in ready:
        text.writing.queue.put_nowait(piece)
