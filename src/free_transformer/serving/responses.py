"""Builds responses in OpenAI's JSON format from the chunks of texts."""

import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, TypedDict, TypeVar

from free_transformer.model.plan_text import format_bits
from free_transformer.serving.batch import Batch, TextRequest
from free_transformer.serving.detokenizer import Detokenizer
from free_transformer.serving.schema import ChatRequest, CompletionRequest, GenerationRequest
from free_transformer.serving.scoring import TokenScore
from free_transformer.serving.stream import Chunk

CLIENT_CLOSED = 499  # status in logs and metrics if the client has disconnected
SHUTTING_DOWN = "the server is shutting down; send the request again"

Body = TypeVar("Body", bound=GenerationRequest)
JsonObject = Mapping[str, object]


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]


class ResponseBuilder(ABC, Generic[Body]):
    """
    Collects the chunks of a client request and builds its response.

    Args:
        body: body of the client request.
        requests: texts of the request.
        model: name of the model.
    """

    prefix = object_name = event_name = ""  # prefix of the id, and OpenAI's object names

    def __init__(self, body: Body, requests: Sequence[TextRequest], model: str, batch: Batch):
        self.body, self.batch, self.requests = body, batch, requests
        self.index = {request: index for index, request in enumerate(requests)}
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.texts = [""] * len(requests)
        self.ends: list[str | None] = [None] * len(requests)
        self.plans: list[str | None] = [None] * len(requests)
        self.counts = [0] * len(requests)
        self.scores: list[list[TokenScore]] = [[] for _ in requests]
        self.reason: str | None = None
        self._begun: set[int] = set()  # texts for which the stream has sent an event

    def whole(self) -> JsonObject:
        """Builds the response of a request that does not stream."""
        choices = [self._whole_choice(index) for index in range(len(self.requests))]
        return {**self.head, "object": self.object_name, "choices": choices, "usage": self.usage()}

    def event(self, chunk: Chunk) -> JsonObject:
        """Builds the event for a chunk of a stream. The first event of a text contains its plan."""
        index = self.add(chunk)
        first = index not in self._begun
        self._begun.add(index)
        plan = self.plans[index] if chunk.plan is not None else None
        choice = {**self._event_choice(index, chunk, first), "plan": plan}
        usage = {"usage": None} if self.includes_usage else {}
        return {**self.head, "object": self.event_name, "choices": [choice], **usage}

    def last_event(self) -> JsonObject:
        """Builds the last event of a stream with `include_usage`, which contains the usage."""
        return {**self.head, "object": self.event_name, "choices": [], "usage": self.usage()}

    @abstractmethod
    def _whole_choice(self, index: int) -> JsonObject: ...

    @abstractmethod
    def _event_choice(self, index: int, chunk: Chunk, first: bool) -> JsonObject: ...

    def add(self, chunk: Chunk) -> int:
        """Collects a chunk. Returns the index of its text."""
        index = self.index[chunk.request]
        self.texts[index] += chunk.text
        self.ends[index], self.counts[index] = chunk.end, chunk.tokens
        self.reason = self.reason or chunk.reason
        self.scores[index] += chunk.scores
        if chunk.plan is not None:
            self.plans[index] = format_bits(chunk.plan)
        return index

    @property
    def includes_usage(self) -> bool:
        return self.body.stream_options.include_usage

    @property
    def status(self) -> int:
        """The HTTP status of the response."""
        if "error" in self.ends:
            return 500
        if "cancelled" in self.ends:
            return CLIENT_CLOSED
        aborted = [count for end, count in zip(self.ends, self.counts, strict=True) if end == "abort"]
        return 503 if aborted and not any(aborted) else 200

    @property
    def failure(self) -> str:
        """The message for a status other than 200."""
        if self.status == 503:
            return SHUTTING_DOWN
        return f"the text could not be generated: {self.reason or 'an error'}; see the server's log"

    def usage(self) -> Usage:
        prompts = sum(len(request.tokens) for request in self.requests[:: self.body.n])
        generated = sum(self.counts)
        return {"prompt_tokens": prompts, "completion_tokens": generated, "total_tokens": prompts + generated}


class CompletionBuilder(ResponseBuilder[CompletionRequest]):
    prefix, object_name, event_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, requests: Sequence[TextRequest], model: str, batch: Batch):
        super().__init__(body, requests, model, batch)
        self.offsets = [0] * len(requests)  # number of characters of each text whose scores have been returned
        if body.logprobs is not None:  # to compute the positions of scored tokens in the text
            self._detokenizers = [Detokenizer(batch.texts, () if body.echo else each.tokens) for each in requests]

    def _whole_choice(self, index: int) -> JsonObject:
        choice = self._choice(index, self._echo(index) + self.texts[index], self.scores[index])
        return {**choice, "plan": self.plans[index]}

    def _event_choice(self, index: int, chunk: Chunk, first: bool) -> JsonObject:
        return self._choice(index, (self._echo(index) if first else "") + chunk.text, chunk.scores)

    def _choice(self, index: int, text: str, scores: Sequence[TokenScore]) -> JsonObject:
        logprobs = self._logprobs(index, scores) if self.body.logprobs is not None else None
        return {"index": index, "text": text, "finish_reason": self.ends[index], "logprobs": logprobs}

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> CompletionLogprobs:
        shown = self.batch.texts.shown
        offsets = []
        for score in scores:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(self._detokenizers[index].add(score.token))
        top: list[dict[str, float] | None] = []
        for score in scores:
            if score.log_prob is None:
                top.append(None)
                continue
            best: dict[str, float] = {}
            for token, value in [*score.top, (score.token, score.log_prob)]:
                best.setdefault(shown(token), value)  # if several tokens have the same text, keep the most likely
            top.append(best)
        return {
            "tokens": [shown(score.token) for score in scores],
            "token_logprobs": [score.log_prob for score in scores],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _echo(self, index: int) -> str:
        """Returns the text of the prompt if `echo` is set, else an empty string."""
        return Detokenizer(self.batch.texts, self.requests[index].tokens).prompt if self.body.echo else ""


class ChatBuilder(ResponseBuilder[ChatRequest]):
    prefix, object_name, event_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _whole_choice(self, index: int) -> JsonObject:
        message = {"role": "assistant", "content": self.texts[index]}
        choice = {"index": index, "message": message, "finish_reason": self.ends[index]}
        return {**choice, "logprobs": self._logprobs(self.scores[index]), "plan": self.plans[index]}

    def _event_choice(self, index: int, chunk: Chunk, first: bool) -> JsonObject:
        delta = {"role": "assistant", "content": chunk.text} if first else {"content": chunk.text}
        choice = {"index": index, "delta": delta, "finish_reason": chunk.end}
        return {**choice, "logprobs": self._logprobs(chunk.scores)}

    def _logprobs(self, scores: Sequence[TokenScore]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return {
            "content": [
                {
                    **self._logprob(score.token, score.log_prob if score.log_prob is not None else -math.inf),
                    "top_logprobs": [self._logprob(token, log_prob) for token, log_prob in score.top],
                }
                for score in scores
            ]
        }

    def _logprob(self, token: int, log_prob: float) -> TopLogprob:
        raw, name = self.batch.texts.bytes_of(token), self.batch.texts.shown(token)
        return {"token": name, "logprob": log_prob, "bytes": list(name.encode() if raw is None else raw)}
