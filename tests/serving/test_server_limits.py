"""Bad requests of every kind: their cost, and their effect on other clients."""

import asyncio
import json
import random
import time
from pathlib import Path

import httpx
import pytest
import torch
from test_serving import build_model, metric, post, running

from free_transformer.data import byte_tokenizer
from free_transformer.serving.access import max_body
from free_transformer.serving.app import create_app
from free_transformer.serving.torch_batch import TorchBatch

FUZZED, GOOD, IN_FLIGHT = 2000, 50, 32
EDGES = {
    "prompt": ["", "a", "\0", "é🙂" * 20, "x" * 5000, [], [[]], [256], [256, 259], [-1], [10**30], ["", ""], [None], 3],
    "max_tokens": [0, 1, 3, 127, 128, -1, 2**63, 10**400, 1.5, "3", True],
    "temperature": [0, 1e-45, 1e-320, 1e-6, 1, 100, 101, -1, "x"],
    "top_p": [0, 1e-300, 0.5, 1, 1.1, -0.1],
    "top_k": [0, 1, 300, 2**31, 2**63, 10**400, -1],
    "n": [1, 2, 0, 128, 129, 10**18],
    "seed": [0, -1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1],
    "stop": ["", "a", ["a", "b"], ["a"] * 17, "x" * 300, [1], {}],
    "plan": ["0110", "011", "01100110", "", [0, 1, 1, 0], [0, 1, 2, 0], [[0, 1, 1, 0]] * 3, [[]], [], "x", 1, {}],
    "plan_from": ["", "an example", "y" * 5000, 1],
    "prompt_plan": ["posterior", "prior", "none"],
    "prior": ["uniform", "aggregate", "none"],
    "logprobs": [0, 1, 20, 21, -1],
    "num_plans": [1, 4, 256, 0, 257],
    "echo": [True, False, "yes", 2],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}, {"x": 1}, []],
    "best_of": [1, 2],
    "suffix": ["", "x"],
    "logit_bias": [{}, {"1": 1}],
    "presence_penalty": [0, 1],
    "model": ["tiny", "other", 1],
    "user": ["me", 1, [{}] * 10],
    "unknown": [1],
}


@pytest.fixture(scope="module")
def model():
    return build_model(plan_span=5, max_seq_len=128)


@pytest.fixture(scope="module")
def app(model):
    return create_app(lambda: TorchBatch(model, byte_tokenizer(), max_rows=24), "tiny", max_waiting=1000)


@pytest.fixture(scope="module")
def address(app):
    with running(app) as found:
        yield found


def edge_request(rng: random.Random) -> dict:
    """Some fields, each with an edge-case value."""
    names = rng.sample(list(EDGES), rng.randint(1, 5))
    fields = {name: rng.choice([*EDGES[name], None]) for name in names}
    return {"max_tokens": rng.randint(1, 4), **fields}


def good_request(number: int) -> dict:
    steering = [{"plan": f"{number % 16:04b}"}, {"plan_from": "f" * number}, {"prompt_plan": "prior"}, {}]
    sampling = [{"temperature": 0}, {"temperature": 0.8}, {"top_p": 0.7}, {"top_k": 5, "logprobs": 2}]
    request = {"prompt": "abcdefghij"[: number % 11], "max_tokens": 8 + number % 17, "seed": number}
    return {**request, **steering[number % 4], **sampling[number // 4 % 4]}


def test_edge_case_requests_do_not_change_other_responses(address):
    """With 2,000 of them in between, 50 responses are bit-for-bit the same, and no request gets a 5xx status."""
    rng = random.Random(0)
    bodies = [json.dumps(edge_request(rng)) for _ in range(FUZZED)]

    async def ask(client: httpx.AsyncClient, places: asyncio.Semaphore, body: str) -> tuple[int, str]:
        async with places:
            answer = await client.post(
                f"{address}/v1/completions", content=body, headers={"Content-Type": "application/json"}
            )
        return answer.status_code, answer.text

    def known(answer: tuple[int, str]):
        return answer[0], [{**choice} for choice in json.loads(answer[1])["choices"]]

    async def everything():
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=100)) as client:
            places = asyncio.Semaphore(IN_FLIGHT)
            good = [json.dumps(good_request(number)) for number in range(GOOD)]
            alone = [await ask(client, asyncio.Semaphore(1), body) for body in good]
            places_of_good = asyncio.Semaphore(8)
            tasks = [ask(client, places, body) for body in bodies] + [
                ask(client, places_of_good, body) for body in good
            ]
            together = await asyncio.gather(*tasks)
            return alone, together[:FUZZED], together[FUZZED:]

    alone, fuzzed, together = asyncio.run(everything())
    assert [known(answer) for answer in together] == [known(answer) for answer in alone]
    statuses = {status for status, _ in fuzzed}
    assert statuses <= {200, 400, 404, 429}, statuses
    assert sum(status == 200 for status, _ in fuzzed) > FUZZED / 20
    assert not any('"server_error"' in text for _, text in fuzzed)
    assert metric(address, "failed_texts_total") == metric(address, "engine_restarts_total") == 0


def memory() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


LIMIT = max_body(128)
LARGE_BODIES = {
    "nulls": b'{"prompt": [' + b"null," * (LIMIT // 5 - 10) + b"null]}",
    "token ids": b'{"prompt": [' + b"1," * (LIMIT // 2 - 20) + b"1]}",
    "empty prompts": b'{"prompt": [' + b"[]," * (LIMIT // 3 - 20) + b"[]]}",
    "objects": b'{"prompt": [' + b"{}," * (LIMIT // 3 - 20) + b"{}]}",
    "texts": b'{"prompt": [' + b'"a",' * (LIMIT // 4 - 20) + b'"a"]}',
    "a text": b'{"prompt": "' + b"word " * (LIMIT // 5 - 20) + b'"}',
    "a text without spaces": b'{"prompt": "' + b"a" * (LIMIT - 100) + b'"}',
    "an example": b'{"plan_from": "' + b"word " * (LIMIT // 5 - 20) + b'", "max_tokens": -1}',
    "bits": b'{"plan": [' + b"1," * (LIMIT // 2 - 20) + b"2]}",
    "plans": b'{"plan": [' + b"[1]," * (LIMIT // 4 - 20) + b"[1]]}",
    "unknown fields": json.dumps({f"field_{index}": index for index in range(LIMIT // 24)}).encode(),
    "stop strings": b'{"stop": [' + b'"a",' * (LIMIT // 4 - 20) + b'"a"]}',
    "depth": b'{"user": ' + b"[" * (LIMIT // 2 - 20) + b"]" * (LIMIT // 2 - 20) + b"}",
    "digits": b'{"max_tokens": ' + b"1" * (LIMIT - 100) + b"}",
    "too large": b'{"prompt": "' + b"a" * 4_000_000 + b'"}',
}


@pytest.mark.parametrize("name", LARGE_BODIES)
def test_rejecting_a_body_is_cheap(address, name):
    url = f"{address}/v1/completions"
    post(url, b'{"max_tokens": 1}')
    costs = []
    for _ in range(3):  # a full garbage collection in between can take half a second
        before, started = memory(), time.process_time()
        status, answer = post(url, LARGE_BODIES[name])
        costs.append((time.process_time() - started, memory() - before))
        assert status in (400, 413), answer
        assert len(json.dumps(answer)) < 1000
    used, more = min(costs)
    # The goal is 50 ms and 20 MB. The limits are higher, for server and client together on a busy machine. The faults
    # that this test guards against take seconds and hundreds of megabytes.
    assert used < 0.5 and more < 60e6, (used, more)


def test_long_prompts_are_tokenized_only_to_the_limit(model):
    batch = TorchBatch(model, byte_tokenizer(), max_rows=1)
    whole = batch.encode("wörd " * 20, 128)
    assert whole == [256, *("wörd " * 20).encode()]
    assert 128 < len(batch.encode("wörd " * 10**6, 128)) < 1000
    assert batch.encode("wörd " * 10**6, 128)[:100] == [256, *("wörd " * 20).encode()[:99]]


def test_cache_is_unchanged_when_growing_runs_out_of_memory(monkeypatch):
    model = build_model(plan_span="sequence", max_seq_len=1024)
    batch = TorchBatch(model, byte_tokenizer(), max_rows=2)
    pad, calls = torch.nn.functional.pad, []

    def fails_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return pad(*arguments)

    monkeypatch.setattr(torch.nn.functional, "pad", fails_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        batch.cache._reserve(600)
    assert len({states.shape for states in [*batch.cache.keys, *batch.cache.values]}) == 1
    batch.cache._reserve(600)
    assert {states.shape[2] for states in [*batch.cache.keys, *batch.cache.values]} == {640}
