"""HTTP that any client may reach: addresses and origins that are answered, and limits of connections and bodies."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from qwenq.errors import RunError

T = TypeVar("T")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")
_UNREGISTRABLE = (".localhost", ".local", ".internal", ".lan", ".home.arpa")  # nobody can buy a name under these


class BadBody(Exception):
    """A body that is too large, too slow, or too much beside the others; answered with `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class BodyReader:
    """Reads whole bodies of at most `limit` bytes in `limit_s` seconds, `total` bytes of all requests at a time."""

    limit: int
    limit_s: float = 60
    total: int = 64 << 20
    _held: int = field(default=0, repr=False)

    async def read(self, request: Request) -> bytes:
        """The body; BadBody at the first byte beyond a limit, whatever the headers promised."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limit_s):
                async for part in request.stream():
                    body += part
                    self._held += len(part)
                    if len(body) > self.limit:
                        raise BadBody(413, f"the body is larger than {self.limit} bytes")
                    if self._held > self.total:
                        raise BadBody(503, "too many large requests at once")
            return bytes(body)
        except TimeoutError:
            raise BadBody(408, f"the body did not come in {self.limit_s:g} s") from None
        finally:
            self._held -= len(body)


class Busy(Exception):
    """Too many requests wait already."""


@dataclass
class Line:
    """One thread that works for one request after the other; at most `limit` of them wait."""

    limit: int
    _present: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "line"), repr=False)

    @property
    def waiting(self) -> int:
        return max(0, self._present - 1)

    @property
    def full(self) -> bool:
        return self._present > self.limit

    def enter(self, work: Callable[[], T]) -> Future[T]:
        """Have `work` done when its turn comes; cancelling what is returned gives its place up. Busy when full."""
        with self._lock:
            if self.full:
                raise Busy
            self._present += 1
        future = self._thread.submit(work)
        future.add_done_callback(self._leave)
        return future

    def _leave(self, future: Future[T]) -> None:
        with self._lock:
            self._present -= 1


async def while_there(request: Request, work: asyncio.Future[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves first: ClientDisconnect. The body is read."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(left())
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        leaving.cancel()


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_is_allowed(header: str, allowed: Collection[str]) -> bool:
    """Whether a request for this Host is answered.

    A web page elsewhere can point its own registered name at this machine (DNS rebinding) and ask as if it came from
    here. So addresses and names that nobody can register are answered, others when they are in `allowed` ("*": any).
    """
    found = _HOST.fullmatch(header)
    if "*" in allowed or found is None:
        return "*" in allowed
    name = found[1].lower().removesuffix(".")
    if name.startswith("["):
        return True
    last = name.rpartition(".")[2]
    return name in allowed or "." not in name or last.isdecimal() or name.endswith(_UNREGISTRABLE)


def origin_is_allowed(origin: str, host: str, allowed: Collection[str]) -> bool:
    """Whether a request that a browser sends for a page of `origin` is answered.

    The page must come from this server, or from a host in `allowed`. Applications name origins of their own schemes
    (`vscode-webview://`, `chrome-extension://`), which no web page can.
    """
    try:
        parts = urlsplit(origin)
        name, scheme = parts.hostname, parts.scheme
    except ValueError:
        return False
    if scheme not in ("http", "https"):
        return bool(scheme)
    default = ":443" if scheme == "https" else ":80"
    own = host.lower()
    return parts.netloc.lower() in (own, own.removesuffix(default)) or name in allowed


class Guard:
    """ASGI middleware: other hosts and origins are refused, clients that leave end quietly, headers are added.

    refusal: the JSON of a refusal, from its message.
    """

    def __init__(
        self,
        app: ASGIApp,
        refusal: Callable[[str], Any],
        allowed: Collection[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.app, self.refusal = app, refusal
        self.allowed = frozenset(name.lower() for name in allowed)
        self.headers = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] += [(name, value) for name, value in self.headers if name not in given]
            await send(message)

        if (problem := self._problem(Headers(scope=scope), scope["method"])) is not None:
            await JSONResponse(self.refusal(problem), 403)(scope, receive, with_headers)
            return
        try:
            await self.app(scope, receive, with_headers)
        except ClientDisconnect:
            return

    def _problem(self, headers: Headers, method: str) -> str | None:
        host = headers.getlist("host")
        if len(host) != 1 or not host_is_allowed(host[0], self.allowed):
            return "this host name is not allowed (add it with --allowed-hosts)"
        names = self.allowed - {"*"}
        if any(not origin_is_allowed(origin, host[0], names) for origin in headers.getlist("origin")):
            return "pages of other origins are not allowed"
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        visit = mode == "navigate" and method == "GET"
        if site in ("cross-site", "same-site") and not visit and "origin" not in headers:
            return "pages of other origins are not allowed"
        return None


class Connection(H11Protocol):
    """One connection, closed when a head or the reading of an answer takes too long, or a body never ends."""

    head_s = 20.0  # from the first byte of a request, or from the connection, to the last of its headers
    write_s = 30.0  # without the client taking what is sent
    linger_s = 1.0  # to go on reading a body after the answer, so that the client reads the answer
    most = 256  # at once; a new one then ends the oldest that has asked nothing

    _opened = 0.0
    _head: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._opened = self.loop.time()
        self._expect_head()
        if len(self.connections) > self.most:
            idle = [other for other in self.connections if isinstance(other, Connection) and other._is_idle]
            min(idle, key=lambda other: other._opened).transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._head is None and self._is_idle:
            self._expect_head()
        super().data_received(data)
        if self._head is not None and not self._is_idle:
            self._head.cancel()
            self._head = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.loop.call_later(self.linger_s, self._end_body, self.cycle)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head = self.loop.call_later(self.head_s, self.transport.abort)

    def _end_body(self, cycle: RequestResponseCycle) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()


class Server(uvicorn.Server):
    """A server of one application. `closing` is called at the first signal to end."""

    def __init__(self, app: ASGIApp, closing: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            app, http=Connection, ws="none", lifespan="off", log_level="error", access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=10,
        )  # fmt: skip
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._closing()
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; RunError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)
    except OSError as error:
        bound.close()
        elsewhere = error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror)
        raise RunError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint=f"choose another with {'--host' if elsewhere else '--port'}",
        ) from None
    return bound


def address_of(bound: socket.socket, host: str) -> str:
    """`http://[::1]:8000` of a socket that listens on `host`; one on every address goes by localhost."""
    named = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{named}:{bound.getsockname()[1]}"
