"""The engine: the queue, disconnecting clients, failures, and texts that end or cannot be read."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from openai import InternalServerError, OpenAI, RateLimitError
from test_serving import build_model, metric, post, running, wait_for

from free_transformer import FreeTransformer
from free_transformer.data import byte_tokenizer
from free_transformer.serving import engine
from free_transformer.serving.app import create_app
from free_transformer.serving.batch import TextRequest
from free_transformer.serving.engine import Engine, QueueFull
from free_transformer.serving.metrics import Metrics
from free_transformer.serving.torch_batch import TorchBatch


@pytest.fixture(scope="module")
def model():
    return build_model(plan_span=5, max_seq_len=128)


class SlowBatch(TorchBatch):
    """Steps wait for the event `go`."""

    def __init__(self, model: FreeTransformer, rows: int):
        super().__init__(model, byte_tokenizer(), rows)
        self.go = threading.Event()
        self.go.set()  # while the engine warms up
        self.error: Exception | None = None

    def step(self, *arguments):
        self.go.wait()
        if self.error is not None:
            raise self.error
        time.sleep(0.01)
        return super().step(*arguments)


@pytest.fixture
def slow(model):
    """A server with one row and a queue of one, its batch, and a client that does not retry."""
    batch = SlowBatch(model, 1)
    with running(create_app(lambda: batch, "tiny", max_waiting=1)) as address:
        batch.go.clear()
        yield address, batch, OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        batch.go.set()


def test_full_queue_is_rejected_with_retry_after(slow):
    address, batch, client = slow
    request = {"model": "tiny", "prompt": "a", "max_tokens": 5, "seed": 0, "extra_body": {"plan": "0000 0000"}}
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(client.completions.create(**request).choices[0].text))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: metric(address, "running_texts") == 1 and metric(address, "waiting_texts") == 1)
    with pytest.raises(RateLimitError, match="1 texts are waiting, the maximum is 1") as refused:
        client.completions.create(**request)
    assert refused.value.response.headers["retry-after"] == "1"
    batch.go.set()
    for thread in threads:
        thread.join()
    assert len(texts) == 2 and texts[0] == texts[1]
    assert metric(address, 'requests_total{status="429"}') == 1


@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_clients_are_dropped(slow, stream):
    address, batch, client = slow
    body = json.dumps({"prompt": "a", "max_tokens": 100, "stream": stream}).encode()
    host, port = address.removeprefix("http://").split(":")

    def connect() -> socket.socket:
        connection = socket.create_connection((host, int(port)))
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    running_one, waiting_one = connect(), connect()
    wait_for(lambda: metric(address, "waiting_texts") == 1)
    waiting_one.close()
    running_one.close()
    time.sleep(0.2)
    batch.go.set()
    wait_for(lambda: metric(address, "running_texts") == 0 and metric(address, "waiting_texts") == 0)
    wait_for(lambda: metric(address, 'requests_total{status="499"}') == 2)
    assert metric(address, "generated_tokens_total") < 20
    assert client.completions.create(model="tiny", prompt="b", max_tokens=2).choices[0].finish_reason


def test_failed_engine_reports_and_restarts(slow, caplog, monkeypatch):
    monkeypatch.setattr(engine, "RECOVERY_SECONDS", 0.1)
    address, batch, client = slow
    batch.error = RuntimeError("out of memory")
    batch.go.set()
    with pytest.raises(InternalServerError, match="could not be generated: out of memory"):
        client.completions.create(model="tiny", prompt="a", max_tokens=5)
    with pytest.raises(urllib.error.HTTPError) as unwell:
        urllib.request.urlopen(f"{address}/health")
    assert unwell.value.code == 503 and b"out of memory" in unwell.value.read()
    assert "out of memory" in caplog.text
    assert post(f"{address}/v1/completions", b"{}")[0] == 503  # at once, rather than after waiting
    batch.error = None
    wait_for(lambda: post(f"{address}/v1/completions", b"{}")[0] == 200)  # it restarts by itself
    assert json.loads(urllib.request.urlopen(f"{address}/health").read()) == {"status": "ok"}
    assert metric(address, "engine_restarts_total") == 1


def test_unreadable_prompt_fails_alone(model):
    class Picky(TorchBatch):
        def add(self, request):
            if request.tokens[-1] == ord("!"):
                raise RuntimeError("no")
            return super().add(request)

    async def write():
        engine = Engine(lambda: Picky(model, byte_tokenizer()), 8, Metrics())
        requests = [TextRequest([256, ord(last)], 4, seed=(0,)) for last in "a!b"]
        ends = {id(piece.request): piece.end async for piece in engine.submit(requests)}
        engine.stop()
        return [ends[id(request)] for request in requests]

    assert asyncio.run(write()) == ["length", "error", "length"]


def test_longer_text_begins_like_a_shorter_one(model):
    async def write(count: int) -> str:
        engine = Engine(lambda: TorchBatch(model, byte_tokenizer()), 8, Metrics())
        pieces = [piece async for piece in engine.submit([TextRequest([256, *b"abc"], count, seed=(5,))])]
        engine.stop()
        return pieces[-1].text

    short, long = asyncio.run(write(10)), asyncio.run(write(40))
    assert long.startswith(short[:-1]) and len(long) > len(short)


def test_engine_limits_texts_and_reports_why_it_cannot_start(model):
    async def submit():
        engine = Engine(lambda: TorchBatch(model, byte_tokenizer(), max_rows=2), 0, Metrics())
        first = engine.submit([TextRequest([256], 100) for _ in range(2)])
        with pytest.raises(QueueFull):
            engine.submit([TextRequest([256], 1)])
        first.cancel()
        assert {piece.end async for piece in first} == {"cancelled"}
        engine.stop()

    asyncio.run(submit())
    with pytest.raises(ValueError, match="max_length=129: must be 2 to 128"):
        create_app(lambda: TorchBatch(model, byte_tokenizer(), max_length=129), "tiny")
