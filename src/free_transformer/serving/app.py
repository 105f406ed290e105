"""HTTP: OpenAI's completions with plans, health, metrics."""

import asyncio
import contextlib
import difflib
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from free_transformer import __version__
from free_transformer.serving.batch import Batch
from free_transformer.serving.completions import GONE, Answer, CompletionRequest, Limits, build_jobs
from free_transformer.serving.engine import Busy, Engine, Writing
from free_transformer.serving.metrics import Metrics

MOST_BYTES = 4 * 2**20  # of a request
RETRY_SECONDS = 1
BACKLOG = 1024  # connections that may wait to be accepted
SHUTDOWN_SECONDS = 30  # for texts that are being written
FAILED = "the text could not be written; the server's log says why"


def create_app(
    build: Callable[[], Batch],
    name: str,
    max_prompt: int | None = None,
    max_tokens: int | None = None,
    max_waiting: int = 512,
    token: str | None = None,
) -> FastAPI:
    """
    A server's ASGI application, whose engine runs from now until the application shuts down.

    Args:
        build: makes the batch, as in `lambda: TorchBatch(model, tokenizer)`; called at once, see `Engine`.
        name: of the model, by which requests ask for it.
        max_prompt: tokens of a prompt, default all that a text may have but one.
        max_tokens: that are written to it, default the same.
        max_waiting: texts that may wait for their turn; beyond that a request is answered 429.
        token: that requests have to show, `Authorization: Bearer TOKEN`; None asks for none.
    """
    metrics = Metrics()
    engine = Engine(build, max_waiting, metrics)
    batch = engine.batch
    longest = batch.max_length - 1
    limits = Limits(max_prompt or longest, max_tokens or longest)

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
    app.add_middleware(_LimitedBody)
    _answer_errors(app, metrics)

    def authorized(request: Request) -> None:
        shown = request.headers.get("authorization", "")
        if token is not None and not secrets.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "this server wants its token: Authorization: Bearer TOKEN")

    created = int(time.time())

    @app.get("/v1/models", dependencies=[Depends(authorized)])
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": created, "owned_by": "free-transformer"}
        plans = {"latent_dim": batch.latent_dim, "plan_span": batch.plan_span, "max_length": batch.max_length}
        return {"object": "list", "data": [{**model, **plans}]}

    @app.post("/v1/completions", dependencies=[Depends(authorized)], response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if body.model not in (None, name):
            raise HTTPException(404, f"model {body.model!r}: this server has {name!r}")
        started = time.monotonic()
        try:  # in a thread: tokenizing a long prompt would hold up all other answers
            jobs = await asyncio.to_thread(build_jobs, body, batch, limits)
            answer = Answer(body, jobs, name, batch)
            writing = engine.submit(jobs)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        watch = asyncio.create_task(_cancel_when_gone(request, writing))

        def ended(status: int) -> None:
            watch.cancel()
            writing.cancel()
            metrics.requests.labels(status).inc()
            metrics.request_seconds.observe(time.monotonic() - started)

        if body.stream:
            return StreamingResponse(_events(answer, writing, ended), media_type="text/event-stream")
        status = GONE
        try:
            async for piece in writing:
                answer.add(piece)
            status = answer.status
        finally:
            ended(status)
        return JSONResponse(answer.whole()) if status == 200 else _error(status, FAILED)

    @app.get("/health")
    async def health() -> JSONResponse:
        if engine.is_well:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failing", "reason": engine.failure or "the engine has stopped"}, 503)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.state.engine = engine
    return app


async def _events(answer: Answer, writing: Writing, ended: Any) -> AsyncIterator[str]:
    """Server-sent events of a stream."""
    status = GONE
    try:
        async for piece in writing:
            yield f"data: {json.dumps(answer.chunk(piece))}\n\n"
        status = answer.status
        if status != 200:
            yield f"data: {json.dumps(_error_body(status, FAILED))}\n\n"
        elif last := answer.last_chunk():
            yield f"data: {json.dumps(last)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        ended(status)


async def _cancel_when_gone(request: Request, writing: Writing) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    writing.cancel()


class _LimitedBody:
    """Refuses a request whose body is too large, or of a size that it does not tell, before it is read."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length")
            if length is None:
                answer = _error(411, "send the size of the body, Content-Length")
            elif int(length) > MOST_BYTES:
                answer = _error(413, f"a body of {int(length)} bytes: this server reads at most {MOST_BYTES}")
        await answer(scope, receive, send)


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Errors as OpenAI's clients read them, one line each."""

    def refuse(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        metrics.requests.labels(status).inc()
        return _error(status, message, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(400, "; ".join(dict.fromkeys(map(_explain, error.errors()))))

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        return refuse(429, str(error), {"Retry-After": str(RETRY_SECONDS)})

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return refuse(error.status_code, str(error.detail), dict(error.headers or {}))


def _explain(error: Any) -> str:
    """One of pydantic's errors: the field, what it holds and what is allowed."""
    name = ".".join(str(part) for part in error["loc"][1:2]) or "body"
    if name == "prompt":
        return "prompt: a text, its tokens, or a list of either"
    if name == "plan":
        return "plan: bits as text, '01101001', or as numbers, [0, 1, ...], or a list of such plans"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, CompletionRequest.model_fields, 1)
        return f"{name}: unknown" + (f"; is {near[0]} meant?" if near else "")
    value = repr(error.get("input"))
    shown = value if len(value) <= 40 else f"{value[:40]}…"
    return f"{name}={shown}: {error['msg'].removeprefix('Value error, ')}"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_error_body(status, message), status, headers)


def _error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


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


def run(app: FastAPI, bound: socket.socket) -> None:
    """Serves until it is told to stop, by SIGINT or SIGTERM; texts that are being written have 30 seconds left."""
    config = uvicorn.Config(
        app,
        log_level="info",
        backlog=BACKLOG,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        server_header=False,
        lifespan="on",
    )
    logging.getLogger("free_transformer").addHandler(logging.StreamHandler())
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when all is closed
        uvicorn.Server(config).run(sockets=[bound])
