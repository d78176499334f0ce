"""Both servers against hostile clients: a sample here, all of them as a slow test; and each limit by itself."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the page's extra is not installed")
pytest.importorskip("plotly", reason="the page's extra is not installed")

import httpx
from hostile_clients import ANSWER_S, judged, paging, request, serving
from serving import served, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from qwenq.io.http import (
    BadBody,
    BodyReader,
    Connection,
    Guard,
    address_of,
    host_is_allowed,
    is_loopback,
    listen,
    origin_is_allowed,
)


@pytest.mark.parametrize("start", [serving, paging], ids=["serve", "vram serve"])
def test_a_sample_of_hostile_clients(start: Callable[[], Any]) -> None:
    report = judged(start(), 40, seed=7, whole=False)
    assert report.faults == [] and report.cases >= 100
    assert not any("rror" in line for line in report.log), report.log


@pytest.mark.slow
@pytest.mark.parametrize("start", [serving, paging], ids=["serve", "vram serve"])
def test_hostile_clients(start: Callable[[], Any]) -> None:
    report = judged(start(), 3000, seed=0, whole=True)
    assert report.faults == [] and report.cases >= 3500 and report.slowest_s < ANSWER_S
    assert not any("rror" in line for line in report.log), report.log


def test_clients_that_leave_do_not_end_the_server() -> None:
    """A broken pipe is an error of one connection; the signal would end the process."""
    with paging() as target:
        for pause in (0.0, 0.005, 0.02, 0.05) * 5:
            with target.connect() as client:
                client.sendall(request("/plotly.min.js", method="GET") * 2)
                client.recv(100)
                client.shutdown(socket.SHUT_WR)  # then a reset is a broken pipe
                time.sleep(pause)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            assert target.process.poll() is None
        assert target.is_well() and "Traceback" not in target.log.read_text(encoding="utf-8")


def test_a_pipe_that_closes_ends_a_command_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1); from qwenq.cli.main import main; main()", "vram", "gpus"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 1 and process.stderr.read() == ""


# ---------------------------------------------------------------------- hosts and origins


@pytest.mark.parametrize(
    ("host", "allowed", "answered"),
    [
        ("localhost", (), True), ("LocalHost:8000", (), True), ("127.0.0.1:80", (), True), ("[::1]:8000", (), True),
        ("host.docker.internal:8000", (), True), ("192.168.1.7:8000", (), True), ("qwenq_1:8000", (), True),
        ("desk.local", (), True), ("nas.home.arpa.", (), True), ("evil.example", (), False), ("", (), False),
        ("evil.example:8000", (), False), ("localhost.evil.example", (), False), ("127.0.0.1.nip.io", (), False),
        ("localhost@evil.example", (), False), ("evil.example#.local", (), False), ("a b", (), False),
        ("[::1].evil.example", (), False), ("local", (), True), ("evillocal.example", (), False),
        ("api.example", ("api.example",), True), ("API.example.:443", ("api.example",), True),
        ("x.api.example", ("api.example",), False), ("evil.example", ("*",), True),
    ],
)  # fmt: skip
def test_hosts(host: str, allowed: tuple[str, ...], answered: bool) -> None:
    assert host_is_allowed(host, allowed) is answered


@pytest.mark.parametrize(
    ("origin", "host", "answered"),
    [
        ("http://localhost:8000", "localhost:8000", True), ("http://LOCALHOST:8000", "localhost:8000", True),
        ("https://desk.local", "desk.local", True), ("http://localhost:80", "localhost", False),
        ("https://desk.local", "desk.local:443", True), ("http://localhost:3000", "localhost:8000", False),
        ("null", "localhost", False), ("http://evil.example", "localhost", False), ("", "localhost", False),
        ("http://localhost@evil.example", "localhost", False), ("http://[::1", "localhost", False),
        ("https://ui.example", "localhost", True), ("vscode-webview://abc", "localhost", True), ("file://", "x", True),
    ],
)  # fmt: skip
def test_origins(origin: str, host: str, answered: bool) -> None:
    assert origin_is_allowed(origin, host, {"ui.example"}) is answered


def test_pages_elsewhere_are_refused() -> None:
    def page(headers: dict[str, str], method: str = "GET") -> int:
        return client.request(method, "/", headers=headers).status_code

    with served(make_app()) as address, httpx.Client(base_url=address) as client:
        assert page({}) == page({"Origin": address}) == page({"Sec-Fetch-Site": "same-origin"}) == 200
        assert page({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}) == 200  # a link that is followed
        for headers in ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, {"Origin": "null"},
                        {"Host": "evil.example"}, {"Origin": "http://evil.example"}):  # fmt: skip
            assert page(headers) == 403
        assert page({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, "POST") == 403
        answer = client.options("/", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
        assert answer.status_code == 403 and not any("access-control" in name for name in answer.headers)
        assert client.get("/").headers["x-frame-options"] == "DENY"


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.7", "desk.local", "")))


@pytest.mark.parametrize(
    ("host", "named"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("::1", "[::1]"), ("::", "localhost")]
)
def test_the_address_that_is_told_can_be_opened(host: str, named: str) -> None:
    with listen("127.0.0.1", 0) as bound:
        assert address_of(bound, host) == f"http://{named}:{bound.getsockname()[1]}"


# ---------------------------------------------------------------------- connections and bodies


def make_app(bodies: BodyReader | None = None) -> Starlette:
    """`/` answers, `/body` reads one, `/large` and `/endless` send much."""

    async def root(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def body(request: Request) -> Response:
        assert bodies is not None
        try:
            return PlainTextResponse(str(len(await bodies.read(request))))
        except BadBody as error:
            return JSONResponse(error.message, error.status)

    async def endless(request: Request) -> Response:
        async def parts() -> Any:
            sending.append(1)
            try:
                while True:
                    yield b"x" * 65_536
                    await asyncio.sleep(0)
            finally:
                sending.clear()

        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", root, methods=["GET", "POST"]), Route("/body", body, methods=["POST"]),
                            Route("/endless", endless)])  # fmt: skip
    app.add_middleware(Guard, refusal=lambda problem: {"error": problem}, headers={"X-Frame-Options": "DENY"})
    return app


sending: list[int] = []


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"head_s": 0.5, "write_s": 0.5, "linger_s": 0.2, "most": 8}.items():
        monkeypatch.setattr(Connection, name, value)


def closes(client: socket.socket, within_s: float = 5) -> bytes:
    """What comes until the server closes."""
    client.settimeout(within_s)
    found = b""
    try:
        while part := client.recv(65_536):
            found += part
    except ConnectionError:
        pass
    return found


@pytest.fixture
def connect(short: None) -> Iterator[Callable[[], socket.socket]]:
    with served(make_app(BodyReader(1000, 0.5, 3000))) as address:
        port = int(address.rpartition(":")[2])
        yield lambda: socket.create_connection(("127.0.0.1", port), timeout=10)


def test_a_head_has_a_time_limit(connect: Callable[[], socket.socket]) -> None:
    for start in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX"):
        with connect() as client:
            client.sendall(start)
            assert closes(client) == b""
    with connect() as client:  # the second of a connection too
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: client.recv(1000).endswith(b"ok"))
        client.sendall(b"GET /")
        assert closes(client) == b""
    with connect() as client:  # and one that is slow within the limit is answered
        for part in (b"GET / HTTP/1.1\r\n", b"Host: localhost\r\n", b"Connection: close\r\n\r\n"):
            client.sendall(part)
            time.sleep(0.1)
        assert closes(client).endswith(b"ok")


def test_a_body_has_a_time_limit_and_a_size(connect: Callable[[], socket.socket]) -> None:
    def ask(headers: str, *parts: bytes) -> bytes:
        with connect() as client:
            client.sendall(f"POST /body HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n".encode())
            for part in parts:
                client.sendall(part)
            return closes(client)

    assert ask("Content-Length: 5\r\nConnection: close", b"12345").endswith(b"5")
    assert b" 408 " in ask("Content-Length: 5", b"1")
    assert b" 413 " in ask("Content-Length: 5000", b"x" * 2000)
    assert b" 413 " in ask("Transfer-Encoding: chunked", b"7d0\r\n" + b"x" * 2000 + b"\r\n")


def test_all_bodies_together_have_a_size(connect: Callable[[], socket.socket]) -> None:
    start = b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n"
    clients = [connect() for _ in range(4)]
    for client in clients:
        client.sendall(start + b"x" * 900)
    answers = [closes(client) for client in clients]
    assert sorted(answer.split()[1] for answer in answers) == [b"408", b"408", b"408", b"503"]
    with connect() as client:  # what they held is free again
        client.sendall(start + b"x" * 1000)
        assert closes(client).endswith(b"1000")
    for client in clients:
        client.close()


def test_a_body_that_goes_on_after_the_answer_ends(connect: Callable[[], socket.socket]) -> None:
    with connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        end = time.monotonic() + 5
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                client.sendall(b"x" * 1000)
    with connect() as client:  # one that comes late is read, and the next request is answered
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
        time.sleep(0.05)
        client.sendall(b"12345GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert closes(client).count(b"HTTP/1.1 200") == 2


def test_a_client_that_does_not_read_is_left(connect: Callable[[], socket.socket]) -> None:
    with connect() as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: sending == [1])
        until(lambda: sending == [], 10)


def test_too_many_connections_end_the_oldest_idle_one(connect: Callable[[], socket.socket]) -> None:
    clients = [connect() for _ in range(8)]
    with connect() as last:
        last.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert closes(last).endswith(b"ok")
        clients[0].settimeout(0.2)  # less than a head may take
        assert clients[0].recv(10) == b""
    for client in clients:
        client.close()


def test_the_page_answers_one_after_the_other_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenq.page import app as page

    hold = threading.Event()
    monkeypatch.setattr(page, "answer", lambda ask: {"held": hold.wait(20)})
    state = {"model": "Qwen2.5-72B", "context": 8192}
    found: list[int] = []
    with served(page.make_app()) as address:

        def ask() -> None:
            found.append(httpx.post(address + "/api/estimate", json=state, timeout=60).status_code)

        threads = [threading.Thread(target=ask) for _ in range(page.MAX_WAITING + 4)]
        for thread in threads:
            thread.start()
        until(lambda: found == [503] * 3)
        hold.set()
        for thread in threads:
            thread.join(30)
    assert sorted(found) == [200] * (page.MAX_WAITING + 1) + [503] * 3
