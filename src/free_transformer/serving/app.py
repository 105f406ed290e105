"""HTTP: OpenAI's completions and chat completions with plans, health, metrics."""

import asyncio
import contextlib
import gc
import json
import logging
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from free_transformer import __version__
from free_transformer.serving.access import BODY_SECONDS, HostGuard, TokenGuard, connection_class, max_body, read_body
from free_transformer.serving.answers import (
    GONE,
    Answer,
    ChatAnswer,
    CompletionAnswer,
    Limits,
    chat_jobs,
    completion_jobs,
)
from free_transformer.serving.batch import Batch
from free_transformer.serving.engine import Engine, Job, QueueFull, ResponseStream, Stopping
from free_transformer.serving.metrics import Metrics
from free_transformer.serving.schema import ChatRequest, CompletionRequest, GenerationRequest, RequestError, parse_body

RETRY_SECONDS = 1
BACKLOG = 1024  # connections that may wait to be accepted
GRACE_SECONDS = 20.0
KEEP_ALIVE_SECONDS = 5
MAX_CONNECTIONS = 900  # below the 1,024 open files that most systems allow
ROUTES = "POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health, GET /ready, GET /metrics"
READ = ["GET", "HEAD"]


def create_app(
    build: Callable[[], Batch],
    name: str,
    max_prompt: int | None = None,
    max_tokens: int | None = None,
    max_waiting: int = 512,
    token: str | None = None,
    allowed_hosts: Collection[str] | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """
    A server's ASGI application. Its engine runs from now until the application shuts down, and has computed its first
    tokens when this returns.

    Args:
        build: makes the batch, as in `lambda: TorchBatch(model, tokenizer)`; called at once, see `Engine`.
        name: of the model, by which requests ask for it.
        max_prompt: tokens of a prompt, default all that a text may have but one.
        max_tokens: tokens generated for it, default the same.
        max_waiting: texts that may wait for their turn; beyond that a request is answered 429.
        token: that requests have to show, `Authorization: Bearer TOKEN`; None asks for none.
        allowed_hosts: host names that requests may be sent to, None for any; see `access.local_hosts`.
        cors_origins: origins of web pages that may call the server, `*` for all.
    """
    metrics = Metrics()
    engine = Engine(build, max_waiting, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(
        title="Free Transformer",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
    )
    app.state.engine = engine

    def refuse(error: RequestError) -> JSONResponse:
        metrics.requests.labels(error.status).inc()
        return _error(error.status, error.message, error.param, error.headers)

    app.add_middleware(TokenGuard, token=token, refuse=refuse)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(HostGuard, hosts=allowed_hosts, refuse=refuse)  # the last one added is the first one asked
    _answer_errors(app, refuse)
    _add_status_routes(app, engine, metrics, name)
    longest = engine.batch.max_length - 1
    limits = Limits(max_prompt or longest, max_tokens or longest, engine.max_texts)
    _add_completions(app, _Completions(engine, metrics, name, limits))
    return app


class _Completions:
    """Answers requests for completions of either kind."""

    def __init__(self, engine: Engine, metrics: Metrics, name: str, limits: Limits):
        self.engine, self.metrics, self.name, self.limits = engine, metrics, name, limits

    async def answer(
        self, request: Request, kind: type[GenerationRequest], to_jobs: Callable, answer_kind: type[Answer]
    ) -> Response:
        started = time.monotonic()
        body, jobs = await self._read(request, kind, to_jobs)
        responses = self.engine.submit(jobs)
        answer = answer_kind(body, jobs, self.name, self.engine.batch)
        watch = asyncio.create_task(_cancel_when_gone(request, responses))

        def ended(status: int) -> None:
            watch.cancel()
            responses.cancel()
            self.metrics.requests.labels(status).inc()
            self.metrics.request_seconds.observe(time.monotonic() - started)

        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # or proxies would hold it back
            events = _events(answer, responses, ended)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        status = GONE
        try:
            async for chunk in responses:
                answer.add(chunk)
            status = answer.status
        finally:
            ended(status)
        return JSONResponse(answer.whole()) if status == 200 else _error(status, answer.failure)

    async def _read(self, request: Request, kind: type[GenerationRequest], to_jobs: Callable) -> tuple[Any, list[Job]]:
        batch = self.engine.batch
        raw = await read_body(request, max_body(batch.max_length))

        def prepare() -> tuple[Any, list[Job]]:
            body = parse_body(raw, kind)
            if body.model not in (None, self.name):
                raise RequestError(404, f"model {body.model[:80]!r}: this server has {self.name!r}", "model")
            return body, to_jobs(body, batch, self.limits)

        try:  # in a thread: to tokenize a long prompt would hold up all other answers
            return await asyncio.to_thread(prepare)
        except ValueError as error:
            raise RequestError(400, str(error), _field(str(error), kind)) from error


def _add_completions(app: FastAPI, completions: _Completions) -> None:
    @app.post("/v1/completions", response_model=None, openapi_extra=_described(CompletionRequest))
    async def complete(request: Request) -> Response:
        return await completions.answer(request, CompletionRequest, completion_jobs, CompletionAnswer)

    @app.post("/v1/chat/completions", response_model=None, openapi_extra=_described(ChatRequest))
    async def chat(request: Request) -> Response:
        if completions.engine.batch.chat is None:
            raise RequestError(400, "this model's tokenizer has no chat template: use /v1/completions with a prompt")
        return await completions.answer(request, ChatRequest, chat_jobs, ChatAnswer)


def _add_status_routes(app: FastAPI, engine: Engine, metrics: Metrics, name: str) -> None:
    batch = engine.batch
    plans = {"latent_dim": batch.latent_dim, "plan_span": batch.plan_span, "max_length": batch.max_length}
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "free-transformer", **plans}

    @app.api_route("/v1/models", methods=READ)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.api_route("/v1/models/{asked:path}", methods=READ)
    async def model_by_name(asked: str) -> dict[str, Any]:
        if asked != name:
            raise RequestError(404, f"model {asked[:80]!r}: this server has {name!r}", "model")
        return model

    @app.api_route("/ready", methods=READ)
    @app.api_route("/health", methods=READ)
    async def health() -> JSONResponse:
        if engine.is_well:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failing", "reason": engine.failure or "the engine has stopped"}, 503)

    @app.api_route("/metrics", methods=READ)
    async def metrics_page() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _events(answer: Answer, responses: ResponseStream, ended: Callable[[int], None]) -> AsyncIterator[str]:
    """Server-sent events of a stream."""
    status = GONE
    try:
        async for chunk in responses:
            yield f"data: {json.dumps(answer.event(chunk))}\n\n"
        status = answer.status
        if status != 200:
            yield f"data: {json.dumps(_error_body(status, answer.failure))}\n\n"
        elif answer.includes_usage:
            yield f"data: {json.dumps(answer.last_event())}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        ended(status)


async def _cancel_when_gone(request: Request, responses: ResponseStream) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    responses.cancel()


def _answer_errors(app: FastAPI, refuse: Callable[[RequestError], JSONResponse]) -> None:
    """Errors as OpenAI's clients read them, one line each."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return refuse(error)

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> JSONResponse:
        return refuse(RequestError(429, str(error), headers={"Retry-After": str(RETRY_SECONDS)}))

    @app.exception_handler(Stopping)
    async def stopping(_: Request, error: Stopping) -> JSONResponse:
        return refuse(RequestError(503, str(error), headers={"Retry-After": str(RETRY_SECONDS)}))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> JSONResponse:
        return refuse(RequestError(GONE, "the client left"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        route, message = f"{request.method} {request.url.path[:80]}", str(error.detail)
        if error.status_code == 404:
            message = f"{route}: no such route; this server has {ROUTES}"
        elif error.status_code == 405:
            message = f"{route}: use {dict(error.headers or {}).get('Allow', 'POST')}"
        return refuse(RequestError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return refuse(RequestError(500, "the server made a mistake; its log says which"))


def _described(kind: type[GenerationRequest]) -> dict[str, Any]:
    """The body of a request for `/openapi.json`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _field(message: str, kind: type[GenerationRequest]) -> str | None:
    """The field that a message begins with."""
    found = re.match(r"\w+", message)
    return found[0] if found and found[0] in kind.model_fields else None


def _error(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_error_body(status, message, param), status, headers)


def _error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def listen(host: str, port: int) -> socket.socket:
    """A socket, before anything is loaded: who connects already waits. Port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise OSError(f"{host}:{port}: {error.strerror}; choose others with --host and --port") from error
    return bound


class _Server(uvicorn.Server):
    """At the first signal texts have a grace period, at the second they end with what they have."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self.engine, self.grace = engine, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.drain(0 if self.should_exit else self.grace)
        if sig == signal.SIGINT and self.should_exit:  # which uvicorn takes as an order to drop all connections
            return
        super().handle_exit(sig, frame)


def run(
    app: FastAPI,
    bound: socket.socket,
    grace: float = GRACE_SECONDS,
    keep_alive: int = KEEP_ALIVE_SECONDS,
    max_connections: int = MAX_CONNECTIONS,
) -> None:
    """
    Serves until it is told to stop, by SIGINT or SIGTERM.

    Args:
        grace: seconds that texts in progress then have to end by themselves.
        keep_alive: seconds that a connection may be idle between two requests.
    """
    config = uvicorn.Config(
        app,
        http=connection_class(max_connections),
        ws="none",
        log_level="info",
        backlog=BACKLOG,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=int(max(grace, BODY_SECONDS)) + 5,  # by then all texts and bodies have ended
        server_header=False,
        lifespan="on",
    )
    logging.getLogger("free_transformer").addHandler(logging.StreamHandler())
    gc.collect()
    gc.freeze()  # what was loaded stays: a request with many small objects would have all of it looked through
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when all is closed
        _Server(config, app.state.engine, grace).run(sockets=[bound])
