"""Requests to the engine: growing texts, the plan of a text, and the effect of a plan on its tokens."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from free_transformer.model.sampling import Sampling
from free_transformer.serving.batch import Batch, TextRequest
from free_transformer.serving.engine import Engine
from free_transformer.serving.scoring import TokenScore

REFRESH_SECONDS = 0.1  # time between updates of growing texts
AVERAGED_PLANS = 64  # plans from the prior, to measure the effect on a token
ALTERNATIVES = 5


@dataclass
class GrowingText:
    """
    A partially generated text.

    Attributes:
        tokens: new tokens, if the request asks for scores.
        change: number of characters before the first change of the plan; None without one.
        failure: reason why it ended early.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    change: int | None = None
    ended: bool = False
    failure: str | None = None


@dataclass
class TokenEffect:
    """
    The effect of plans on one token of a text.

    Attributes:
        text: the token.
        gain: log-probability under its own plan minus that under an average of plans, in nats.
        likely: the most likely tokens at this position and their probabilities, under each requested plan.
    """

    text: str
    gain: float
    likely: list[list[tuple[str, float]]]


def request(
    batch: Batch,
    prompt: str,
    plan: np.ndarray | None,
    seed: int,
    temperature: float,
    length: int,
    changes: Mapping[int, np.ndarray] | None = None,
) -> TextRequest:
    """
    Builds a request for a text under a plan, (P, H). Texts with the same seed use the same random numbers.

    A prompt longer than the model's context is truncated to its end.
    """
    tokens = batch.encode(prompt, 64 * batch.max_length)
    room = max(2, batch.max_length - 1)
    if len(tokens) > room:
        tokens = [tokens[0], *tokens[-(room - 1) :]]
    return TextRequest(
        tokens,
        max_tokens=length,
        sampling=Sampling(temperature),
        plan=plan,
        plan_changes=changes or {},
        prompt_plan="prior",
        seed=(seed, 0, 0),  # same as the first text of a server request with this seed
        stream=True,
    )


async def generate(engine: Engine, requests: Sequence[TextRequest]) -> AsyncIterator[list[GrowingText]]:
    """Yields all texts periodically while they grow, and once when all have ended."""
    texts = {id(each): GrowingText() for each in requests}
    responses = engine.submit(requests)
    shown = 0.0
    try:
        async for chunk in responses:
            text = texts[id(chunk.request)]
            text.text += chunk.text
            text.tokens += [score.token for score in chunk.scores]
            if chunk.tokens <= min(chunk.request.plan_changes, default=-1):
                text.change = len(text.text)
            text.ended, text.failure = chunk.end is not None, chunk.reason
            if time.monotonic() - shown > REFRESH_SECONDS:
                shown = time.monotonic()
                yield list(texts.values())
    finally:
        responses.cancel()  # stop if the page was closed
    yield list(texts.values())


async def read_plan(engine: Engine, text: str) -> np.ndarray:
    """Returns the probability of a 1 for each bit of the plans of a text of any length, (P, H)."""

    def read(batch: Batch) -> np.ndarray:
        return batch.example_posterior(batch.encode(text))

    return await asyncio.wrap_future(engine.call(read))


async def token_effects(engine: Engine, tokens: list[int], plans: Sequence[np.ndarray]) -> list[TokenEffect]:
    """
    Measures the effect of the first of these plans, (P, H) each, on every token of a text.

    The text starts with the begin-of-text token; only the part within the model's context is measured. The effect is
    relative to the average prediction under plans from the uniform prior, weighted by how well they predict the
    previous tokens.
    """
    tokens = tokens[: engine.batch.max_length]
    scored = [
        TextRequest(tokens, max_tokens=0, plan=plan, prompt_plan="prior", logprobs=ALTERNATIVES, score_prompt=True)
        for plan in plans
    ]
    scored.append(TextRequest(tokens, 0, logprobs=0, score_prompt=True, num_plans=AVERAGED_PLANS, seed=(0,)))
    scores: dict[int, list[TokenScore]] = {}
    async for chunk in engine.submit(scored):
        scores.setdefault(id(chunk.request), []).extend(chunk.scores)
    of_plans, average = [scores[id(each)] for each in scored[:-1]], scores[id(scored[-1])]
    shown = engine.batch.texts.shown
    found = []
    for place in range(1, len(tokens)):  # nothing predicts the begin-of-text token
        own, mean = of_plans[0][place].log_prob, average[place].log_prob
        assert own is not None and mean is not None
        likely = [[(shown(token), math.exp(score)) for token, score in each[place].top] for each in of_plans]
        found.append(TokenEffect(shown(tokens[place]), own - mean, likely))
    return found
