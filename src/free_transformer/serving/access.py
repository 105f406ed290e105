"""Access control and limits of the server: host names, token, connections, headers and bodies."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Collection
from ipaddress import ip_address
from typing import cast

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from free_transformer.serving.schema import RequestError

HEADER_SECONDS = BODY_SECONDS = 20
DISCARD_SECONDS, MAX_DISCARDED = 5, 2**24  # bytes of the body of a rejected request
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
Refuse = Callable[[RequestError], ASGIApp]  # builds the response


def is_loopback(host: str) -> bool:
    """Whether an address that the server listens on can be reached only from this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def local_hosts(host: str) -> tuple[str, ...]:
    """Returns the host names of a server on a loopback address."""
    return (*LOCAL_NAMES, f"[{host}]" if ":" in host else host)


class HostGuard:
    """
    Rejects requests to host names other than the server's own. Otherwise a web page whose name resolves to this
    machine (DNS rebinding) could read the responses.

    Args:
        hosts: allowed names, without ports; None or `*` allows all.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, refuse: Refuse):
        self.app, self.refuse = app, refuse
        self.hosts = None if hosts is None or "*" in hosts else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.hosts is not None:
            shown = Headers(scope=scope).get("host", "")
            name = shown[: shown.find("]") + 1] if shown.startswith("[") else shown.split(":")[0]
            if name.lower().rstrip(".") not in self.hosts:
                message = f"host {shown[:80]!r}: this server is {', '.join(sorted(self.hosts))}"
                response = self.refuse(RequestError(403, f"{message}; add a name with --allowed-host"))
                return await _respond_at_once(response, scope, receive, send)
        await self.app(scope, receive, send)


class TokenGuard:
    """Requires `Authorization: Bearer TOKEN` of requests to paths under `/v1`, before their body is read."""

    def __init__(self, app: ASGIApp, token: str | None, refuse: Refuse):
        self.app, self.refuse = app, refuse
        # a client may send a token that is not ASCII in either encoding
        self.tokens = None if token is None else [token.encode(), token.encode("latin-1", "replace")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.tokens is not None and scope["path"].startswith("/v1"):
            headers = [value for name, value in scope["headers"] if name == b"authorization"]
            scheme, _, shown = (headers[0] if len(headers) == 1 else b"").partition(b" ")
            matches = [secrets.compare_digest(shown.strip(), token) for token in self.tokens]
            if scheme.lower() != b"bearer" or not any(matches):
                message = "this server requires a token: send Authorization: Bearer TOKEN"
                response = self.refuse(RequestError(401, message, headers={"WWW-Authenticate": "Bearer"}))
                return await _respond_at_once(response, scope, receive, send)
        await self.app(scope, receive, send)


async def _respond_at_once(response: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Responds without using the body, but reads it, because many clients wait until they have sent all of it."""

    async def read() -> None:
        size, more = 0, True
        while more and size < MAX_DISCARDED:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), DISCARD_SECONDS)
    await response(scope, receive, send)


def max_body(max_length: int) -> int:
    """Returns the maximum size of a body in bytes: about 20 prompts of `max_length` tokens, read in less than 50 ms."""
    return 2**18 + 16 * max_length


async def read_body(request: Request, limit: int) -> bytes:
    """
    Reads the body of a request and keeps at most `limit` bytes.

    Raises:
        RequestError: for a body that is longer, does not arrive in time, or has a Content-Type other than JSON.
    """
    body, size = bytearray(), 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                body.extend(part)
            elif size > MAX_DISCARDED:  # shorter bodies are read completely, as in `_respond_at_once`
                return

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        message = f"the body did not arrive within {BODY_SECONDS} seconds"
        raise RequestError(408, message, headers={"Connection": "close"}) from error
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # without CORS, web pages can send other types, but not JSON, to another host
        raise RequestError(415, f"Content-Type {kind[:80] or 'missing'}: send application/json")
    if size > limit:
        message = f"the body exceeds {limit} bytes, the maximum of this server; send fewer or shorter prompts"
        raise RequestError(413, message, headers={"Connection": "close"} if size > MAX_DISCARDED else None)
    return bytes(body)


def connection_class(max_connections: int) -> type[H11Protocol]:
    """
    Returns uvicorn's connection class with two more limits: the number of connections, and the time for the headers of
    a request to arrive. It is based on h11, which limits the size of headers; httptools does not.
    """

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport = cast(asyncio.Transport, transport)  # uvloop's class is not a subclass
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                transport.close()
                return
            self._set_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unset_timer()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            in_progress = self.cycle is not None and not self.cycle.response_complete
            if in_progress or self.timeout_keep_alive_task is not None:  # that task closes an idle connection
                self._unset_timer()
            else:
                self._set_timer()

        def _set_timer(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)

        def _unset_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection
