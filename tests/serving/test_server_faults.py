"""Failures of single texts, shutdown, and limits of connections."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
import uvicorn
from test_serving import build_model, metric, post, running, save_model, wait_for

from free_transformer.data import byte_tokenizer
from free_transformer.model.sampling import Sampling
from free_transformer.serving import access
from free_transformer.serving.app import create_app, listen
from free_transformer.serving.batch import NewRow, TextRequest
from free_transformer.serving.engine import Engine, Stopping
from free_transformer.serving.metrics import Metrics
from free_transformer.serving.stream import Chunk
from free_transformer.serving.torch_batch import TorchBatch


@pytest.fixture(scope="module")
def model():
    return build_model(plan_span="sequence", max_seq_len=512, eos_token_id=None)


class Faulty(TorchBatch):
    """Fails in a chosen way for texts that begin with `!`, once it is armed."""

    def __init__(self, model, fault: str):
        super().__init__(model, byte_tokenizer(), max_rows=8)
        self.fault, self.armed, self.bad_rows = fault, False, []

    def add(self, request):
        is_bad = request.tokens[-1] == ord("!")
        if self.armed and self.fault == "read" and is_bad:
            raise RuntimeError("no memory for this prompt")
        new = super().add(request)
        self.bad_rows.append(is_bad)
        return (
            NewRow(new.plan, new.logits * torch.nan) if self.armed and self.fault == "first token" and is_bad else new
        )

    def step(self, tokens):
        if self.armed and self.fault == "memory" and any(self.bad_rows):
            raise RuntimeError("out of memory")
        logits = super().step(tokens)
        if self.armed and self.fault == "NaN":
            logits = logits.masked_fill(torch.tensor(self.bad_rows)[:, None], torch.nan)
        return logits

    def score_token(self, logits, row, token, top):
        if self.armed and self.fault == "scores" and self.bad_rows[row]:
            raise RuntimeError("no scores")
        return super().score_token(logits, row, token, top)

    def sample(self, logits, sampling, uniform):
        if self.armed and self.fault == "sample" and self.rows > 2 and any(each.top_k == 77 for each in sampling):
            raise OverflowError("too large")
        return super().sample(logits, sampling, uniform)

    def remove(self, row):
        super().remove(row)
        last = self.bad_rows.pop()
        if row < len(self.bad_rows):
            self.bad_rows[row] = last

    def reset(self):
        super().reset()
        self.bad_rows = []


def generate(build, requests: list[TextRequest], before=lambda engine: None) -> tuple[list[Chunk], Metrics]:
    """The last chunk of each text, which contains all of it."""

    async def work():
        metrics = Metrics()
        engine = Engine(build, 16, metrics)
        before(engine)
        found = {chunk.request: chunk async for chunk in engine.submit(requests) if chunk.end is not None}
        assert engine.batch.rows == len(engine._texts) == 0 and engine._unfinished == 0
        later = [chunk async for chunk in engine.submit([TextRequest([256, 97], 4, seed=(1,))])]
        assert later[-1].end == "length"
        engine.stop()
        return [found[request] for request in requests], metrics

    return asyncio.run(work())


@pytest.mark.parametrize("fault", ["read", "first token", "NaN", "sample", "scores", "memory"])
def test_failure_of_one_text_ends_only_that_text(model, fault):
    prompts = [b"abc", b"long enough to be the longest of all of them!", b"x", b"yz"]
    requests = [TextRequest([256, *prompt], 12, seed=(place,), logprobs=1) for place, prompt in enumerate(prompts)]
    requests[1].sampling = Sampling(top_k=77)
    expected, _ = generate(lambda: Faulty(model, fault), requests)

    def arm(engine):
        engine.batch.armed = True

    found, metrics = generate(lambda: Faulty(model, fault), requests, arm)
    assert [chunk.end for chunk in found] == ["length", "error", "length", "length"]
    assert found[1].reason
    for place in (0, 2, 3):  # bit-for-bit, and with the same scores
        assert found[place].text == expected[place].text and found[place].scores == expected[place].scores
    values = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    assert values["free_transformer_failed_texts_total"] == 1
    assert values["free_transformer_logits_not_finite_total"] == (fault in ("NaN", "first token"))
    assert values["free_transformer_engine_restarts_total"] == 0


def test_engine_with_inconsistent_rows_restarts(model):
    def lose_a_row(engine):
        add = engine.batch.add

        def wrong(request):
            new = add(request)
            if request.tokens[-1] == ord("!"):
                engine.batch.contexts.append(engine.batch.contexts[-1])
            return new

        engine.batch.add = wrong

    found, metrics = generate(
        lambda: TorchBatch(model, byte_tokenizer()),
        [TextRequest([256, ord("!")], 9), TextRequest([256], 9)],
        lose_a_row,
    )
    assert [chunk.end for chunk in found] == ["error", "error"]
    values = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    assert values["free_transformer_engine_restarts_total"] == 1


def test_sampling_marks_non_finite_rows(model):
    batch = TorchBatch(model, byte_tokenizer())
    logits = torch.randn(4, 259)
    logits[1, 5], logits[2, 7] = torch.nan, torch.inf
    chosen = batch.sample(logits, [Sampling(0)] * 2 + [Sampling(1, 3)] * 2, np.full(4, 0.5))
    assert [token == -1 for token in chosen] == [False, True, True, False]


def test_drain_ends_texts_after_the_grace_period(model):
    async def work():
        engine = Engine(lambda: TorchBatch(model, byte_tokenizer(), max_rows=2), 8, Metrics())
        short, long, _ = requests = [
            TextRequest([256], 3, seed=(0,)),
            TextRequest([256], 500, seed=(0,)),
            TextRequest([256], 400),
        ]
        responses = engine.submit([*requests, TextRequest([256], 450)])
        engine.drain(0.15)
        with pytest.raises(Stopping, match="shutting down"):
            engine.submit([TextRequest([256], 1)])
        ends = {chunk.request: chunk async for chunk in responses}
        engine.stop()
        assert ends[short].end == "length" and ends[long].end == "abort"
        assert 3 < ends[long].tokens < 500 and len(ends[long].text) > 0
        assert all(chunk.end in ("length", "abort") for chunk in ends.values())

    asyncio.run(work())


@pytest.mark.parametrize("signals", [1, 2])
def test_server_shuts_down_on_signals(tmp_path, signals):
    """It completes its responses, exits within the grace period or at the second signal, and logs no traceback."""
    save_model(tmp_path / "model", plan_span="sequence", max_seq_len=60_000, eos_token_id=None)
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    grace = 2 if signals == 1 else 60
    line = [sys.executable, "-W", "ignore", "-m", "free_transformer", "serve", str(tmp_path / "model")]
    line += ["--port", str(port), "--max-length", "60000", "--grace", str(grace)]
    log, threads = tmp_path / "log", []
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: b"Application startup complete" in log.read_bytes() or process.poll() is not None)
        answers = {}

        def ask(name: str, **fields) -> None:
            body = json.dumps({"prompt": "abc", **fields}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as answer:
                answers[name] = answer.status, answer.read().decode()

        threads = [
            threading.Thread(target=ask, args=("short",), kwargs={"max_tokens": 200}),
            threading.Thread(target=ask, args=("long",), kwargs={"max_tokens": 50_000}),
            threading.Thread(target=ask, args=("stream",), kwargs={"max_tokens": 50_000, "stream": True}),
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: metric(f"http://127.0.0.1:{port}", "running_texts") >= 2)
        for _ in range(signals):
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.3)
        process.wait(timeout=30)
    finally:
        process.kill()
        for thread in threads:
            thread.join()
    assert answers["long"][0] == 200 and json.loads(answers["long"][1])["choices"][0]["finish_reason"] == "abort"
    assert answers["stream"][1].endswith("data: [DONE]\n\n") and '"abort"' in answers["stream"][1]
    if signals == 1:
        assert json.loads(answers["short"][1])["usage"]["completion_tokens"] == 200
    assert b"Traceback" not in log.read_bytes()


@pytest.fixture
def limited(model, monkeypatch):
    """Opens sockets to a server with short time limits."""
    monkeypatch.setattr(access, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(access, "BODY_SECONDS", 0.5)
    app = create_app(lambda: TorchBatch(model, byte_tokenizer(), max_rows=2), "tiny")
    bound = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, http=access.connection_class(8), log_level="critical", timeout_keep_alive=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    opened = []

    def connect(sent: bytes = b"") -> socket.socket:
        opened.append(socket.create_connection(bound.getsockname(), timeout=10))
        opened[-1].sendall(sent)
        return opened[-1]

    yield connect
    for each in opened:
        each.close()
    server.should_exit = True
    thread.join()


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "a", "max_tokens": 1}'
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (HEAD, b""),
        (HEAD + b"Content-Length: 4000\r\n\r\n{", b"HTTP/1.1 408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"HTTP/1.1 408"),
        (WHOLE + HEAD, b"HTTP/1.1 200"),  # and then the half of another
    ],
)
def test_incomplete_requests_time_out(limited, sent, answer):
    started, client = time.monotonic(), limited(sent)
    received = b""
    while piece := client.recv(4096):
        received += piece
    assert received.startswith(answer) and (answer or not received)
    assert time.monotonic() - started < 8


def test_connections_are_kept_alive(limited):
    client = limited()
    for pause in (0, 0.2, 0.8):  # the last is longer than headers may take, not than a connection may be idle
        time.sleep(pause)
        client.sendall(WHOLE)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_endless_headers_are_rejected(limited):
    client = limited(b"GET /health HTTP/1.1\r\n")
    with pytest.raises(OSError):
        for _ in range(10_000):
            client.sendall(b"x: " + b"a" * 1000 + b"\r\n")


def test_connections_beyond_the_limit_are_closed(limited):
    held = [limited() for _ in range(8)]
    wait_for(lambda: limited().recv(100).startswith(b"HTTP/1.1 503"))
    for each in held:
        each.close()
    wait_for(lambda: post_to(limited) == 200)


def post_to(connect) -> int:
    client = connect(WHOLE)
    return int((client.recv(4096) or b"HTTP/1.1 0")[9:12])


def test_requests_fail_at_once_after_an_engine_failure(model):
    batch = TorchBatch(model, byte_tokenizer())
    with running(create_app(lambda: batch, "tiny")) as address:
        batch.step = None
        url = f"{address}/v1/completions"
        assert post(url, b'{"max_tokens": 3}')[0] == 500
        status, answer = post(url, b'{"max_tokens": 3}')
        assert status == 503 and "restarting after a failure" in answer["error"]["message"]
