"""From a request to the texts to generate, and from their chunks to the answer, in OpenAI's form."""

import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from free_transformer.errors import InputError
from free_transformer.model.plan_text import format_bits, parse_bits
from free_transformer.model.sampling import Sampling, check_plan_count, check_token_ids
from free_transformer.serving.batch import Batch, TokenScore
from free_transformer.serving.detokenizer import Detokenizer
from free_transformer.serving.engine import Chunk, Job
from free_transformer.serving.schema import ChatRequest, CompletionRequest, GenerationRequest

GONE = 499  # the status, in logs and metrics, of a request whose client did not wait
SHUT_DOWN = "the server is shutting down; send the request again"


@dataclass
class Limits:
    """What one request may ask for, in tokens and texts."""

    prompt: int
    new: int
    texts: int


def completion_jobs(request: CompletionRequest, batch: Batch, limits: Limits) -> list[Job]:
    """
    A job for each text, `n` for each prompt in turn.

    Raises:
        ValueError: for what this model cannot do, or the limits do not allow.
    """
    if request.best_of not in (None, request.n):
        raise InputError(f"best_of={request.best_of}: only n ({request.n}) is supported; leave it out")
    if request.max_tokens == 0 and not request.echo:
        raise InputError("max_tokens=0: at least 1, or 0 with echo, which returns the prompt")
    prompts = _prompts(request.prompt)
    _check_count(len(prompts), request.n, limits)
    base = _base(request, batch)
    base["logprobs"] = request.logprobs
    base["score_prompt"] = request.echo and request.logprobs is not None
    if base["score_prompt"] and request.max_tokens <= 1 and _leaves_plan_open(request):
        base["num_plans"] = request.num_plans
    tokens = _encoded(prompts, batch, limits)
    for each in tokens:
        _check_length(len(each), request.max_tokens, limits, batch.max_length)
    return _jobs(request, tokens, [request.max_tokens] * len(tokens), base)


def chat_jobs(request: ChatRequest, batch: Batch, limits: Limits) -> list[Job]:
    """
    `n` jobs, whose prompt the chat template makes of the messages.

    Raises:
        ValueError: as by `completion_jobs`, and where the template refuses the messages.
    """
    assert batch.chat is not None
    _check_count(1, request.n, limits)
    base = _base(request, batch)
    base["logprobs"] = request.top_logprobs if request.logprobs else None
    messages = [message.model_dump() for message in request.messages]
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = "".join(part["text"] for part in message["content"])
    tokens = batch.encode_chat(batch.chat.render(messages), limits.prompt)
    if not tokens:
        raise InputError("messages: the chat template makes an empty prompt of them")
    _check_prompt(tokens, batch, limits)
    new = request.max_completion_tokens or request.max_tokens
    if new is None:
        new = max(1, min(limits.new, batch.max_length - len(tokens)))
    _check_length(len(tokens), new, limits, batch.max_length)
    return _jobs(request, [tokens], [new], base)


def _jobs(
    request: GenerationRequest, prompts: list[list[int]], lengths: list[int], base: Mapping[str, Any]
) -> list[Job]:
    return [
        Job(tokens=tokens, max_tokens=new, seed=None if request.seed is None else (request.seed, 0, index), **base)
        for tokens, new in zip(prompts, lengths, strict=True)
        for index in range(request.n)
    ]


def _base(request: GenerationRequest, batch: Batch) -> dict[str, Any]:
    """What all texts of a request have in common."""
    if request.plan is not None and request.plan_from is not None:
        raise InputError("plan: give plan or plan_from, not both")
    batch.prior(request.prior)
    example = None
    if request.plan_from is not None:
        example = batch.encode(request.plan_from, batch.max_length)[: batch.max_length]
    return {
        "sampling": Sampling(request.temperature, request.top_k, request.top_p),
        "plan": _given_plan(request.plan, batch),
        "plan_from": example,
        "prompt_plan": request.prompt_plan or "posterior",
        "prior": request.prior,
        "stop": request.stop,
        "stream": request.stream,
    }


def _leaves_plan_open(request: GenerationRequest) -> bool:
    return request.plan is None and request.plan_from is None and request.prompt_plan is None


def _given_plan(plan: Any, batch: Batch) -> np.ndarray | None:
    """(P, H) bool."""
    if plan is None:
        return None
    if not isinstance(plan, str):
        rows = plan if isinstance(plan[0], list) else [plan]
        plan = " ".join("".join(map(str, row)) for row in rows)
    bits = parse_bits(plan, batch.latent_dim)
    check_plan_count(len(bits), batch.plan_span)
    return bits


def _prompts(prompt: Any) -> list[Any]:
    """The prompts, each a text or token ids."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _check_count(prompts: int, each: int, limits: Limits) -> None:
    if prompts * each > limits.texts:
        raise InputError(
            f"prompt: {prompts * each} texts in one request, this server takes at most {limits.texts}; send fewer "
            "prompts at a time, or a smaller n"
        )


def _encoded(prompts: Sequence[Any], batch: Batch, limits: Limits) -> list[list[int]]:
    """Token ids of each prompt. The longest is looked at first: it is the one to be refused, if any is."""
    found: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        prompt = prompts[index]
        tokens = found[index] = batch.encode(prompt, limits.prompt) if isinstance(prompt, str) else prompt
        _check_prompt(tokens, batch, limits)
    return [found[index] for index in range(len(prompts))]


def _check_prompt(tokens: list[int], batch: Batch, limits: Limits) -> None:
    if len(tokens) > limits.prompt:
        raise InputError(f"prompt: more than {limits.prompt} tokens, the most that this server reads")
    try:
        check_token_ids(min(tokens), max(tokens), batch.vocab_size)
    except ValueError as error:
        raise InputError(f"prompt: {error}") from error


def _check_length(prompt: int, new: int, limits: Limits, both: int) -> None:
    if new > limits.new:
        raise InputError(f"max_tokens={new}: this server generates at most {limits.new}")
    if prompt + new > both:
        raise InputError(
            f"max_tokens={new} after a prompt of {prompt} tokens: this server holds at most {both} tokens of a text"
        )


class Answer(ABC):
    """The objects that a request is answered with, from the chunks of its texts."""

    prefix = whole_kind = event_kind = ""  # of the identifier, and OpenAI's names of the objects

    def __init__(self, request: Any, jobs: Sequence[Job], model: str, batch: Batch):
        self.request, self.batch, self.jobs = request, batch, jobs
        self.index = {job: index for index, job in enumerate(jobs)}
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.texts = [""] * len(jobs)
        self.ends: list[str | None] = [None] * len(jobs)
        self.plans: list[str | None] = [None] * len(jobs)
        self.counts = [0] * len(jobs)
        self.scores: list[list[TokenScore]] = [[] for _ in jobs]
        self.reason: str | None = None
        self._begun: set[int] = set()  # texts of which a stream has sent something

    def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = [self._whole_choice(index) for index in range(len(self.jobs))]
        return {**self.head, "object": self.whole_kind, "choices": choices, "usage": self.usage()}

    def event(self, chunk: Chunk) -> dict[str, Any]:
        """What a stream sends of a chunk; the first of a text has its plan."""
        index = self.add(chunk)
        first = index not in self._begun
        self._begun.add(index)
        plan = self.plans[index] if chunk.plan is not None else None
        choice = {**self._event_choice(index, chunk, first), "plan": plan}
        usage = {"usage": None} if self.includes_usage else {}
        return {**self.head, "object": self.event_kind, "choices": [choice], **usage}

    def last_event(self) -> dict[str, Any]:
        """The usage, which a stream may end with."""
        return {**self.head, "object": self.event_kind, "choices": [], "usage": self.usage()}

    @abstractmethod
    def _whole_choice(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def _event_choice(self, index: int, chunk: Chunk, first: bool) -> dict[str, Any]: ...

    def add(self, chunk: Chunk) -> int:
        """Takes a chunk. Returns the index of its text."""
        index = self.index[chunk.job]
        self.texts[index] += chunk.text
        self.ends[index], self.counts[index] = chunk.end, chunk.tokens
        self.reason = self.reason or chunk.reason
        self.scores[index] += chunk.scores
        if chunk.plan is not None:
            self.plans[index] = format_bits(chunk.plan)
        return index

    @property
    def includes_usage(self) -> bool:
        return self.request.stream_options.include_usage

    @property
    def status(self) -> int:
        """Of HTTP."""
        if "error" in self.ends:
            return 500
        if "cancelled" in self.ends:
            return GONE
        aborted = [count for end, count in zip(self.ends, self.counts, strict=True) if end == "abort"]
        return 503 if aborted and not any(aborted) else 200

    @property
    def failure(self) -> str:
        """Why the status is not 200."""
        if self.status == 503:
            return SHUT_DOWN
        return f"the text could not be generated: {self.reason or 'an error'}; the server's log has more"

    def usage(self) -> dict[str, int]:
        prompts = sum(len(job.tokens) for job in self.jobs[:: self.request.n])
        generated = sum(self.counts)
        return {"prompt_tokens": prompts, "completion_tokens": generated, "total_tokens": prompts + generated}


class CompletionAnswer(Answer):
    prefix, whole_kind, event_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: Any, jobs: Sequence[Job], model: str, batch: Batch):
        super().__init__(request, jobs, model, batch)
        self.offsets = [0] * len(jobs)  # characters of the texts that scores have been sent of
        if request.logprobs is not None:  # decode the scored tokens, for their places in the text
            self._decoders = [Detokenizer(batch.texts, () if request.echo else job.tokens) for job in jobs]

    def _whole_choice(self, index: int) -> dict[str, Any]:
        choice = self._choice(index, self._start(index) + self.texts[index], self.scores[index])
        return {**choice, "plan": self.plans[index]}

    def _event_choice(self, index: int, chunk: Chunk, first: bool) -> dict[str, Any]:
        return self._choice(index, (self._start(index) if first else "") + chunk.text, chunk.scores)

    def _choice(self, index: int, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        logprobs = self._logprobs(index, scores) if self.request.logprobs is not None else None
        return {"index": index, "text": text, "finish_reason": self.ends[index], "logprobs": logprobs}

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        shown = self.batch.texts.shown
        offsets = []
        for score in scores:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(self._decoders[index].add(score.token))
        top: list[dict[str, float] | None] = []
        for score in scores:
            if score.log_prob is None:
                top.append(None)
                continue
            best: dict[str, float] = {}
            for token, value in [*score.top, (score.token, score.log_prob)]:
                best.setdefault(shown(token), value)  # of tokens that look the same, the most likely one
            top.append(best)
        return {
            "tokens": [shown(score.token) for score in scores],
            "token_logprobs": [score.log_prob for score in scores],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _start(self, index: int) -> str:
        return Detokenizer(self.batch.texts, self.jobs[index].tokens).prompt if self.request.echo else ""


class ChatAnswer(Answer):
    prefix, whole_kind, event_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _whole_choice(self, index: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.texts[index]}
        choice = {"index": index, "message": message, "finish_reason": self.ends[index]}
        return {**choice, "logprobs": self._logprobs(self.scores[index]), "plan": self.plans[index]}

    def _event_choice(self, index: int, chunk: Chunk, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": chunk.text} if first else {"content": chunk.text}
        choice = {"index": index, "delta": delta, "finish_reason": chunk.end}
        return {**choice, "logprobs": self._logprobs(chunk.scores)}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None

        def described(token: int, log_prob: float) -> dict[str, Any]:
            raw = self.batch.texts.bytes_of(token)
            name = self.batch.texts.shown(token)
            return {"token": name, "logprob": log_prob, "bytes": list(name.encode() if raw is None else raw)}

        return {
            "content": [
                {
                    **described(score.token, score.log_prob if score.log_prob is not None else -math.inf),
                    "top_logprobs": [described(*each) for each in score.top],
                }
                for score in scores
            ]
        }
