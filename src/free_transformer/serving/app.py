"""The HTTP application: OpenAI's completions and chat completions with plans, health, and metrics."""

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
from dataclasses import dataclass
from types import FrameType
from typing import Generic, TypedDict, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from free_transformer import __version__
from free_transformer.errors import RunError
from free_transformer.serving.access import BODY_SECONDS, HostGuard, TokenGuard, connection_class, max_body, read_body
from free_transformer.serving.batch import Batch, TextRequest
from free_transformer.serving.engine import Engine, QueueFull, Stopping
from free_transformer.serving.metrics import Metrics
from free_transformer.serving.requests import Limits, prepare_chat, prepare_completion
from free_transformer.serving.responses import (
    CLIENT_CLOSED,
    ChatBuilder,
    CompletionBuilder,
    JsonObject,
    ResponseBuilder,
)
from free_transformer.serving.schema import ChatRequest, CompletionRequest, GenerationRequest, RequestError, parse_body
from free_transformer.serving.stream import ResponseStream

RETRY_SECONDS = 1
CONTEXTS = 64  # maximum length of a response, in contexts of `max_length` tokens
BACKLOG = 1024  # connections that may wait to be accepted
GRACE_SECONDS = 20.0
KEEP_ALIVE_SECONDS = 5
MAX_CONNECTIONS = 900  # below the usual limit of 1,024 open files
ROUTES = "POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health, GET /ready, GET /metrics"
READ = ["GET", "HEAD"]
Body = TypeVar("Body", bound=GenerationRequest)


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(TypedDict):
    error: ErrorDetail


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
    Creates the server's ASGI application.

    When this function returns, its engine has generated its first tokens. The engine runs until the application shuts
    down.

    Args:
        build: creates the batch, for example `lambda: TorchBatch(model, tokenizer)`; called immediately, see `Engine`.
        name: name of the model, which requests may give.
        max_prompt: maximum number of tokens of a prompt. Default: one less than the batch's `max_length`.
        max_tokens: maximum number of tokens generated for a prompt. Default: 64 times `max_length`, or one less than
            `max_length` if the model's texts are not read again.
        max_waiting: maximum number of texts in the queue. Further requests get status 429.
        token: token that requests must send as `Authorization: Bearer TOKEN`; None for no token.
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
        docs_url=None,  # these pages would load scripts from other servers
        redoc_url=None,
    )
    app.state.engine = engine

    def refuse(error: RequestError) -> JSONResponse:
        metrics.requests.labels(error.status).inc()
        return _error(error.status, error.message, error.param, error.headers)

    app.add_middleware(TokenGuard, token=token, refuse=refuse)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(HostGuard, hosts=allowed_hosts, refuse=refuse)  # the last one added runs first
    _handle_errors(app, refuse)
    _add_status_routes(app, engine, metrics, name)
    longest = engine.batch.max_length - 1  # leaves room for one new token
    longest_text = longest if engine.batch.context_limit is None else CONTEXTS * engine.batch.max_length
    limits = Limits(min(max_prompt or longest, longest), max_tokens or longest_text, engine.max_texts)
    _add_completions(app, _Completions(engine, metrics, name, limits))
    return app


class _Completions:
    """Responds to requests for completions and chat completions."""

    def __init__(self, engine: Engine, metrics: Metrics, name: str, limits: Limits):
        self.engine, self.metrics, self.name, self.limits = engine, metrics, name, limits

    async def respond(self, request: Request, route: "_Route[Body]") -> Response:
        """Reads a client request, generates its texts, and returns their response or a stream of events."""
        started = time.monotonic()
        body, texts = await self._read(request, route)
        responses = self.engine.submit(texts)
        builder = route.builder(body, texts, self.name, self.engine.batch)
        watch = asyncio.create_task(_cancel_on_disconnect(request, responses))

        def finish(status: int) -> None:
            watch.cancel()
            responses.cancel()
            self.metrics.requests.labels(status).inc()
            self.metrics.request_seconds.observe(time.monotonic() - started)

        if body.stream:
            headers = {
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }  # prevents proxies from buffering the events
            events = _events(builder, responses, finish)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        status = CLIENT_CLOSED
        try:
            async for chunk in responses:
                builder.add(chunk)
            status = builder.status
        finally:
            finish(status)
        return JSONResponse(builder.whole()) if status == 200 else _error(status, builder.failure)

    async def _read(self, request: Request, route: "_Route[Body]") -> tuple[Body, list[TextRequest]]:
        batch = self.engine.batch
        raw = await read_body(request, max_body(batch.max_length))

        def prepare() -> tuple[Body, list[TextRequest]]:
            body = parse_body(raw, route.kind)
            if body.model not in (None, self.name):
                raise RequestError(404, f"model {str(body.model)[:80]!r}: this server has {self.name!r}", "model")
            return body, route.prepare(body, batch, self.limits)

        try:  # in a thread, since tokenizing a long prompt would block all other responses
            return await asyncio.to_thread(prepare)
        except ValueError as error:
            raise RequestError(400, str(error), _field(str(error), route.kind)) from error


@dataclass(frozen=True)
class _Route(Generic[Body]):
    """One kind of completion: its body, the preparation of its texts, and its response."""

    kind: type[Body]
    prepare: Callable[[Body, Batch, Limits], list[TextRequest]]
    builder: Callable[[Body, Sequence[TextRequest], str, Batch], ResponseBuilder]


def _add_completions(app: FastAPI, completions: _Completions) -> None:
    completion_route = _Route(CompletionRequest, prepare_completion, CompletionBuilder)
    chat_route = _Route(ChatRequest, prepare_chat, ChatBuilder)

    @app.post("/v1/completions", response_model=None, openapi_extra=_body_schema(CompletionRequest))
    async def complete(request: Request) -> Response:
        return await completions.respond(request, completion_route)

    @app.post("/v1/chat/completions", response_model=None, openapi_extra=_body_schema(ChatRequest))
    async def chat(request: Request) -> Response:
        if completions.engine.batch.chat is None:
            raise RequestError(400, "this model's tokenizer has no chat template: use /v1/completions with a prompt")
        return await completions.respond(request, chat_route)


def _add_status_routes(app: FastAPI, engine: Engine, metrics: Metrics, name: str) -> None:
    batch = engine.batch
    plans = {"latent_dim": batch.latent_dim, "plan_span": batch.plan_span, "max_length": batch.max_length}
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "free-transformer", **plans}

    @app.api_route("/v1/models", methods=READ)
    async def models() -> JsonObject:
        return {"object": "list", "data": [model]}

    @app.api_route("/v1/models/{asked:path}", methods=READ)
    async def model_by_name(asked: str) -> JsonObject:
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


async def _events(
    builder: ResponseBuilder, responses: ResponseStream, finish: Callable[[int], None]
) -> AsyncIterator[str]:
    """Yields the server-sent events of a stream."""
    status = CLIENT_CLOSED
    try:
        async for chunk in responses:
            yield f"data: {json.dumps(builder.event(chunk))}\n\n"
        status = builder.status
        if status != 200:
            yield f"data: {json.dumps(_error_body(status, builder.failure))}\n\n"
        elif builder.includes_usage:
            yield f"data: {json.dumps(builder.last_event())}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        finish(status)


async def _cancel_on_disconnect(request: Request, responses: ResponseStream) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    responses.cancel()


def _handle_errors(app: FastAPI, refuse: Callable[[RequestError], JSONResponse]) -> None:
    """Adds handlers that return errors in OpenAI's format, one line each."""

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
        return refuse(RequestError(CLIENT_CLOSED, "the client disconnected"))

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
        return refuse(RequestError(500, "internal server error; see the server's log for the traceback"))


def _body_schema(kind: type[GenerationRequest]) -> dict[str, object]:
    """Returns the description of a body for `/openapi.json`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _field(message: str, kind: type[GenerationRequest]) -> str | None:
    """Returns the field at the beginning of a message, if any."""
    found = re.match(r"\w+", message)
    return found[0] if found and found[0] in kind.model_fields else None


def _error(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_error_body(status, message, param), status, headers)


def _error_body(status: int, message: str, param: str | None = None) -> ErrorBody:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket. Clients can connect and wait while the server loads. Port 0 chooses a free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise RunError(f"{host}:{port}: {error.strerror}; choose another address with --host and --port") from error
    return bound


class _Server(uvicorn.Server):
    """On the first signal, texts have a grace period to finish. On the second, they end with the tokens they have."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self.engine, self.grace = engine, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.drain(0 if self.should_exit else self.grace)
        if sig == signal.SIGINT and self.should_exit:  # uvicorn would drop all connections
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
    Serves until SIGINT or SIGTERM.

    Args:
        grace: seconds for texts in progress to finish after the signal.
        keep_alive: seconds that a connection may be idle between two requests.
        max_connections: maximum number of open connections. Further ones get status 503.
    """
    config = uvicorn.Config(
        app,
        http=connection_class(max_connections),
        ws="none",
        log_level="info",
        backlog=BACKLOG,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=int(max(grace, BODY_SECONDS)) + 5,  # all texts and bodies have ended by then
        server_header=False,
        lifespan="on",
    )
    logging.getLogger("free_transformer").addHandler(logging.StreamHandler())
    gc.collect()
    gc.freeze()  # otherwise requests with many small objects would trigger scans of all loaded objects
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after shutdown
        _Server(config, app.state.engine, grace).run(sockets=[bound])
