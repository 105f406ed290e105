"""OpenAI's completions interface with plans: what a request may ask, and the shape of an answer."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from free_transformer.plan_text import format_bits, parse_bits
from free_transformer.serving.batch import Batch, Sampling
from free_transformer.serving.engine import Job, Piece

MOST_STOPS = 16
GONE = 499  # the status, in logs and metrics, of a request whose client did not wait
Bit = Literal[0, 1]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`. The fields from `plan` on are this server's own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="as /v1/models names it")
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        "", description="text to go on from, or its tokens from the one that begins a text on; or several of either"
    )
    max_tokens: int = Field(16, ge=1, description="tokens to write at most")
    temperature: float = Field(1.0, ge=0, le=100, description="0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the fewest likeliest tokens of this mass")
    n: int = Field(1, ge=1, le=128, description="texts for each prompt")
    stop: str | list[str] | None = Field(None, description="strings that end the text, and are no part of it")
    seed: int | None = Field(None, description="of plans and tokens: the same request with it has the same answer")
    stream: bool = Field(False, description="send the text while it is written, as server-sent events")
    stream_options: StreamOptions | None = None
    echo: bool = Field(False, description="begin the text with the prompt")
    user: str | None = Field(None, description="accepted, and not used")
    best_of: int | None = None
    logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    suffix: str | None = None
    presence_penalty: float | None = 0
    frequency_penalty: float | None = 0
    plan: str | list[Bit] | list[list[Bit]] | None = Field(
        None, description="bits to write under, bit 0 first, as in 01101001 or [0, 1, 1, ...]; several plans in turn"
    )
    plan_from: str | None = Field(None, description="a text whose plan to write under")
    prompt_plan: Literal["posterior", "prior"] = Field(
        "posterior", description="plan of the prompt: read by the encoder, or drawn from the prior"
    )
    prior: Literal["uniform", "aggregate"] = Field(
        "uniform", description="what other plans are drawn from: fair coins, or the plans that training texts took"
    )
    top_k: int = Field(0, ge=0, description="draw among so many likeliest tokens, 0 among all")

    @field_validator("logprobs", "logit_bias", "suffix", "presence_penalty", "frequency_penalty", mode="after")
    @classmethod
    def _not_offered(cls, value: Any) -> Any:
        if value:
            raise ValueError("not offered by this server; leave it out")
        return value


@dataclass
class Limits:
    """What one request may ask for, in tokens."""

    prompt: int
    new: int


def build_jobs(request: CompletionRequest, batch: Batch, limits: Limits) -> list[Job]:
    """
    A job for each text, `n` for each prompt in turn.

    Raises:
        ValueError: for what this model cannot do, or the limits do not allow.
    """
    if request.best_of not in (None, request.n):
        raise ValueError(f"best_of={request.best_of}: only n ({request.n}) is offered; leave it out")
    if request.plan is not None and request.plan_from is not None:
        raise ValueError("give plan or plan_from, not both")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MOST_STOPS or "" in stop:
        raise ValueError(f"stop: up to {MOST_STOPS} strings, none of them empty")
    batch.prior(request.prior)
    plan = _given_plan(request.plan, batch)
    example = None if request.plan_from is None else batch.encode(request.plan_from)[: batch.max_length]
    prompts = _prompts(request.prompt, batch)
    for tokens in prompts:
        _check_length(len(tokens), request.max_tokens, limits, batch.max_length)
    return [
        Job(
            tokens=tokens,
            max_tokens=request.max_tokens,
            sampling=Sampling(request.temperature, request.top_k, request.top_p),
            plan=plan,
            plan_from=example,
            prompt_plan=request.prompt_plan,
            prior=request.prior,
            stop=stop,
            seed=None if request.seed is None else (abs(request.seed), int(request.seed < 0), index),
            stream=request.stream,
        )
        for tokens in prompts
        for index in range(request.n)
    ]


def _given_plan(plan: str | Sequence[Any] | None, batch: Batch) -> np.ndarray | None:
    """(P, H) bool."""
    if plan is None:
        return None
    if not isinstance(plan, str):
        rows = plan if plan and isinstance(plan[0], list) else [plan]
        plan = " ".join("".join(map(str, row)) for row in rows)
    bits = parse_bits(plan, batch.latent_dim)
    if batch.plan_span == "sequence" and len(bits) > 1:
        raise ValueError(f"plan: {len(bits)} plans, this model takes one a text")
    return bits


def _prompts(prompt: str | Sequence[Any], batch: Batch) -> list[list[int]]:
    """Tokens of each."""
    if isinstance(prompt, str):
        return [batch.encode(prompt)]
    if not prompt:
        raise ValueError("prompt: an empty list; give a text, '' to begin from nothing")
    if isinstance(prompt[0], int):
        prompt = [prompt]
    prompts = [batch.encode(each) if isinstance(each, str) else list(each) for each in prompt]
    for tokens in prompts:
        if not tokens:
            raise ValueError("prompt: no tokens; begin with the one that begins a text")
        if min(tokens) < 0 or max(tokens) >= batch.vocab_size:
            raise ValueError(
                f"prompt: tokens from {min(tokens)} to {max(tokens)}, there are 0 to {batch.vocab_size - 1}"
            )
    return prompts


def _check_length(prompt: int, new: int, limits: Limits, both: int) -> None:
    if prompt > limits.prompt:
        raise ValueError(f"prompt: {prompt} tokens, this server reads at most {limits.prompt}")
    if new > limits.new:
        raise ValueError(f"max_tokens={new}: this server writes at most {limits.new}")
    if prompt + new > both:
        raise ValueError(
            f"max_tokens={new} after a prompt of {prompt} tokens: together this server holds at most {both}"
        )


class Answer:
    """The objects that a request is answered with, from the pieces of its texts."""

    def __init__(self, request: CompletionRequest, jobs: Sequence[Job], model: str, batch: Batch):
        self.request, self.batch = request, batch
        self.index = {job: index for index, job in enumerate(jobs)}
        self.jobs = jobs
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.choices: list[dict[str, Any]] = [
            {"index": index, "text": self._start(job), "finish_reason": None, "logprobs": None, "plan": None}
            for index, job in enumerate(jobs)
        ]
        self.written = [0] * len(jobs)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """What a stream sends of a piece; the first of a text holds its plan."""
        choice = self._choice(piece)
        first = piece.plan is not None
        text = (self._start(piece.job) if first else "") + piece.text
        sent = {**self.head, "choices": [{**choice, "text": text, "plan": choice["plan"] if first else None}]}
        if self.request.stream_options and self.request.stream_options.include_usage:
            sent["usage"] = None
        return sent

    def last_chunk(self) -> dict[str, Any] | None:
        options = self.request.stream_options
        return {**self.head, "choices": [], "usage": self._usage()} if options and options.include_usage else None

    def add(self, piece: Piece) -> None:
        self._choice(piece)["text"] += piece.text

    @property
    def status(self) -> int:
        """Of HTTP."""
        ends = {choice["finish_reason"] for choice in self.choices}
        return 500 if "error" in ends else GONE if "cancelled" in ends else 200

    def whole(self) -> dict[str, Any]:
        return {**self.head, "choices": self.choices, "usage": self._usage()}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        index = self.index[piece.job]
        choice = self.choices[index]
        choice["finish_reason"] = piece.end
        if piece.plan is not None:
            choice["plan"] = format_bits(piece.plan)
        self.written[index] = piece.tokens
        return choice

    def _start(self, job: Job) -> str:
        return self.batch.tokenizer.decode(job.tokens, skip_special_tokens=True) if self.request.echo else ""

    def _usage(self) -> dict[str, int]:
        prompts = sum(len(job.tokens) for job in self.jobs[:: self.request.n])
        written = sum(self.written)
        return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}
