"""Prepares the texts of a client request from its body, and checks tokens, plans, sampling and limits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from free_transformer.errors import InputError
from free_transformer.model.context import check_plan_changes
from free_transformer.model.plan_text import parse_bits
from free_transformer.model.sampling import Sampling, check_plan_count, check_token_ids
from free_transformer.serving.batch import Batch, Example, StratifiedTexts, TextRequest
from free_transformer.serving.schema import ChatRequest, CompletionRequest, GenerationRequest, Plan, bits_of


@dataclass
class Limits:
    """
    Limits of one client request.

    Attributes:
        prompt: maximum number of tokens of a prompt.
        new: maximum number of tokens generated for a prompt.
        texts: maximum number of texts.
    """

    prompt: int
    new: int
    texts: int


def prepare_completion(body: CompletionRequest, batch: Batch, limits: Limits) -> list[TextRequest]:
    """
    Prepares the texts of a completion, `n` for each prompt in turn.

    Raises:
        ValueError: for options that this model does not support or the limits do not allow.
    """
    if body.best_of not in (None, body.n):
        raise InputError(f"best_of={body.best_of}: only n ({body.n}) is supported; remove it")
    if body.max_tokens == 0 and not body.echo:
        raise InputError("max_tokens=0: must be at least 1, or 0 with echo, which returns the prompt")
    prompts = body.prompts()
    _check_count(len(prompts), body.n, limits)
    first = _first_text(body, batch)
    first.logprobs, first.score_prompt = body.logprobs, body.echo and body.logprobs is not None
    if first.score_prompt and body.max_tokens <= 1 and _leaves_plan_open(body):
        first.num_plans = body.num_plans
    tokens = _encode(prompts, batch, limits)
    for each in tokens:
        _check_length(len(each), body.max_tokens, limits, batch)
    return _texts(body, first, tokens, body.max_tokens)


def prepare_chat(body: ChatRequest, batch: Batch, limits: Limits) -> list[TextRequest]:
    """
    Prepares the `n` texts of a chat completion, whose prompt is the output of the chat template.

    Raises:
        ValueError: as `prepare_completion`, and if the template rejects the messages.
    """
    assert batch.chat is not None
    _check_count(1, body.n, limits)
    first = _first_text(body, batch)
    first.logprobs = body.top_logprobs if body.logprobs else None
    tokens = batch.encode_chat(batch.chat.render(body.template_messages()), limits.prompt)
    if not tokens:
        raise InputError("messages: the chat template turns them into an empty prompt")
    _check_prompt(tokens, batch, limits)
    new = body.max_completion_tokens or body.max_tokens
    if new is None:
        new = max(1, min(limits.new, batch.max_length - len(tokens)))
    _check_length(len(tokens), new, limits, batch)
    return _texts(body, first, [tokens], new)


def _first_text(body: GenerationRequest, batch: Batch) -> TextRequest:
    """Returns the settings shared by all texts of a client request, without tokens and seed."""
    if body.plan is not None and body.plan_from is not None:
        raise InputError("plan: give either plan or plan_from, not both")
    batch.prior(body.prior)
    changes: dict[int, Plan] = check_plan_changes(body.plan_changes, batch.plan_span)
    return TextRequest(
        tokens=[],
        max_tokens=0,
        sampling=Sampling(body.temperature, body.top_k, body.top_p),
        plan=None if body.plan is None else _given_plan(bits_of(body.plan), batch),
        plan_changes={start: _given_plan(bits_of(plan), batch) for start, plan in changes.items()},
        plan_from=None if body.plan_from is None else Example(batch.encode(body.plan_from)),
        prompt_plan=body.prompt_plan or "posterior",
        prior=body.prior,
        stop=body.stops(),
        stream=body.stream,
    )


def _texts(
    body: GenerationRequest, first: TextRequest, prompts: Sequence[list[int]], max_tokens: int
) -> list[TextRequest]:
    return [
        replace(
            first,
            tokens=tokens,
            max_tokens=max_tokens,
            seed=None if body.seed is None else (body.seed, 0, index),
            together=together,
            index=index,
        )
        for tokens in prompts
        for together in [_stratified_texts(body)]
        for index in range(body.n)
    ]


def _stratified_texts(body: GenerationRequest) -> StratifiedTexts | None:
    """Returns the state shared by the texts of one prompt if their plans are stratified, else None."""
    if body.plans == "independent" or body.n == 1:
        return None
    return StratifiedTexts(body.n, None if body.seed is None else (body.seed, 1))


def _leaves_plan_open(body: GenerationRequest) -> bool:
    return body.plan is None and body.plan_from is None and body.prompt_plan is None


def _given_plan(bits: str, batch: Batch) -> np.ndarray:
    """Parses and checks a plan; returns (P, H) bool."""
    plan = parse_bits(bits, batch.latent_dim, batch.plan_names)
    check_plan_count(len(plan), batch.plan_span)
    return plan


def _check_count(prompts: int, each: int, limits: Limits) -> None:
    if prompts * each > limits.texts:
        raise InputError(
            f"prompt: {prompts * each} texts in one request, but this server accepts at most {limits.texts}; send "
            "fewer prompts at a time, or a smaller n"
        )


def _encode(prompts: Sequence[str | list[int]], batch: Batch, limits: Limits) -> list[list[int]]:
    """Tokenizes each prompt, the longest first, since it is the most likely one to be rejected."""
    found: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        prompt = prompts[index]
        tokens = found[index] = batch.encode(prompt, limits.prompt) if isinstance(prompt, str) else prompt
        _check_prompt(tokens, batch, limits)
    return [found[index] for index in range(len(prompts))]


def _check_prompt(tokens: list[int], batch: Batch, limits: Limits) -> None:
    if len(tokens) > limits.prompt:
        raise InputError(f"prompt: more than {limits.prompt} tokens, the maximum of this server")
    try:
        check_token_ids(min(tokens), max(tokens), batch.vocab_size)
    except ValueError as error:
        raise InputError(f"prompt: {error}") from error


def _check_length(prompt: int, new: int, limits: Limits, batch: Batch) -> None:
    if new > limits.new:
        raise InputError(f"max_tokens={new}: this server generates at most {limits.new}")
    if batch.context_limit is None and prompt + new > batch.max_length:
        raise InputError(
            f"max_tokens={new} after a prompt of {prompt} tokens: a text can have at most {batch.max_length} tokens on "
            "this server"
        )
