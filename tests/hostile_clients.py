"""Broken, slow, endless and malicious clients against `qwenq serve` and `qwenq vram serve`, over raw sockets.

`python tests/hostile_clients.py --each 200 --json FILE` starts both servers on loopback, sends them cases of every
kind, and says how each was answered, the slowest answers, the growth of memory and what the servers logged. It ends
by itself: each case has a deadline, and the servers are ended.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
ANSWER_S = 10.0  # none may take longer
CHAT, TEXT, PAGE = "/v1/chat/completions", "/v1/completions", "/api/estimate"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "The sea"}], "max_tokens": 2, "temperature": 0}
STATE: dict[str, Any] = {"model": "Qwen2.5-72B", "context": 8192, "rig": [{"gpu": "RTX 3090", "count": 2}]}
STATUSES = {200, 400, 401, 403, 404, 405, 408, 413, 422, 429, 503}


@dataclass
class Target:
    """A running server."""

    name: str
    port: int
    process: subprocess.Popen[str]
    log: Path
    post: str
    good: dict[str, Any]

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_S)

    def is_well(self) -> bool:
        """Whether a good request is answered with 200."""
        try:
            status, _ = exchange(self, request(self.post, json.dumps(self.good).encode()))
        except TimeoutError:
            return False
        return status == 200


@contextmanager
def running(words: list[str], name: str, post: str, good: dict[str, Any]) -> Iterator[Target]:
    """A server of qwenq's command line on a free port; its log is kept until the end."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with (
            log.open("w", encoding="utf-8") as errors,
            subprocess.Popen(
                [sys.executable, "-m", "qwenq", *words, "--port", "0"], stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                found = re.search(r":(\d+)/", line)
                assert found is not None, log.read_text(encoding="utf-8")
                yield Target(name, int(found[1]), process, log, post, good)
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


def serving(*options: str) -> Any:
    words = ["serve", str(DATA / "tiny-qwen2"), "--engine", "qwenq", "--max-model-len", "400", *options]
    return running(words, "serve", CHAT, ASK)


def paging() -> Any:
    return running(["vram", "serve"], "vram serve", PAGE, STATE)


# ---------------------------------------------------------------------- requests


def request(path: str, body: bytes = b"", method: str = "POST", headers: tuple[str, ...] = ()) -> bytes:
    """A whole request. Its Host is given unless `headers` has one."""
    lines = [f"{method} {path} HTTP/1.1", *headers]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.append("Host: localhost")
    if method == "POST" and not any(line.lower().startswith(("content-length:", "transfer-enc")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body


def exchange(target: Target, data: bytes, *, read: bool = True) -> tuple[int, bytes]:
    """Send bytes, and the status and body of the answer; 0 when the server closed without one."""
    with target.connect() as client:
        sender = threading.Thread(target=_send, args=(client, data))
        sender.start()
        try:
            found = _read(client) if read else b""
        finally:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            sender.join()
    status = re.match(rb"HTTP/1\.[01] (\d{3})", found)
    return int(status[1]) if status else 0, found.partition(b"\r\n\r\n")[2]


def exchange_of_part(target: Target, data: bytes) -> int:
    """Send what may not be whole; the status, 0 when nothing comes before the client loses patience."""
    with target.connect() as client:
        _send(client, data)
        client.settimeout(0.3)
        found = b""
        with suppress(OSError):
            while part := client.recv(1 << 16):
                found += part
        found = found.removeprefix(b"HTTP/1.1 100 \r\n\r\n").removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        return int(found[9:12]) if found.startswith(b"HTTP/1.") else 0


def _send(client: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        client.sendall(data)


def _read(client: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


# ---------------------------------------------------------------------- kinds of case

Case = Callable[[Target, random.Random], int]


def _noise(target: Target, rng: random.Random) -> int:
    data = rng.randbytes(rng.randrange(1, 2000))
    return exchange(target, data + b"\r\n\r\n")[0]


def _flipped(target: Target, rng: random.Random) -> int:
    data = bytearray(request(target.post, json.dumps(target.good).encode()))
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return exchange_of_part(target, bytes(data))


def _request_lines(target: Target, rng: random.Random) -> int:
    line = rng.choice(
        [b"GET", b"GET / HTTP/9.9", b"G\x00T / HTTP/1.1", b"GET \xff\xfe HTTP/1.1", b"GET  / HTTP/1.1",
         b"POST / HTTP/0.9", b"PRI * HTTP/2.0", b"GET http://evil.example/ HTTP/1.1", b"CONNECT evil:1 HTTP/1.1",
         b"GET /%00%ff%2e%2e/ HTTP/1.1", b"GET /../../etc/passwd HTTP/1.1", b"OPTIONS * HTTP/1.1",
         b"TRACE / HTTP/1.1", b"DELETE /v1/models HTTP/1.1", b"GET /" + b"a" * 20_000 + b" HTTP/1.1",
         b"GET /?" + b"x=1&" * 4000 + b" HTTP/1.1", b"HEAD /health HTTP/1.1", b"\x16\x03\x01\x02\x00\x01\x00"]
    )  # fmt: skip
    return exchange(target, line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0]


def _headers(target: Target, rng: random.Random) -> int:
    body = json.dumps(target.good).encode()
    given = rng.choice(
        [("Content-Length: -1",), ("Content-Length: 1e3",), ("Content-Length: 5", "Content-Length: 6"),
         ("Content-Length: " + "9" * 40,), ("Transfer-Encoding: chunked", "Content-Length: 4"),
         ("Transfer-Encoding: gzip",), ("Host: localhost", "Host: evil.example"), ("X" * 30_000 + ": y",),
         ("X: " + "y" * 60_000,), tuple(f"X-{k}: y" for k in range(3000)), ("no colon",), (" folded: x",),
         ("Content-Type: \x00",), ("Expect: 100-continue",), ("Upgrade: websocket", "Connection: Upgrade"),
         ("Authorization: Bearer \xff\xff",), ("Authorization: " + "x" * 5000,), ("Accept-Encoding: " + "gzip," * 999,),
         ("Range: bytes=0-" + "9" * 30,), ("Cookie: " + "a=b;" * 900,)]
    )  # fmt: skip
    return exchange_of_part(target, request(target.post, body, headers=given))


def _other_pages(target: Target, rng: random.Random) -> int:
    """What browsers send for pages elsewhere; none of it is answered with 200."""
    body = json.dumps(target.good).encode()
    given = rng.choice(
        [("Host: evil.example",), (f"Host: evil.example:{target.port}",), ("Host: localhost.evil.example",),
         ("Host: 127.0.0.1.nip.io",), ("Host: evil.example.",), ("Host: localhost@evil.example",), ("Host:",),
         ("Origin: http://evil.example",), ("Origin: null",), ("Origin: http://localhost.evil.example",),
         ("Origin: http://localhost:1",), ("Origin: https://127.0.0.1",), ("Sec-Fetch-Site: cross-site",),
         ("Host: [::1].evil.example",), ("Origin: http://localhost", "Origin: http://evil.example"),
         ("Origin: http://localhost@evil.example",), ("Origin: http://[::1",), ("Sec-Fetch-Site: same-site",)]
    )  # fmt: skip
    status, _ = exchange(target, request(target.post, body, headers=given))
    return -1 if status == 200 else status


def _not_json(target: Target, rng: random.Random) -> int:
    text = json.dumps(target.good)
    body = rng.choice(
        [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(),
         text.encode()[:-1], text.encode() * 2, text.replace("sea", "\ud800").encode("utf-8", "surrogatepass"),
         b'{"prompt": "\\ud800"}', b'{"prompt": "\\ud83d"}', b"\x00" * 100, rng.randbytes(300),
         text.replace('"', "'").encode(), b'{"a":1,"a":2}', b"{" + b'"k":1,' * 50_000 + b'"k":1}']
    )  # fmt: skip
    return exchange(target, request(rng.choice([target.post, TEXT]), body))[0]


def _nested(target: Target, rng: random.Random) -> int:
    depth = rng.choice([50, 200, 1000, 100_000])
    deep = b"[" * depth + b"]" * depth if rng.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    name = rng.choice(["messages", "stop", "tools", "metadata", "x", "rig", "model"]).encode()
    good = json.dumps(target.good).encode()[:-1]
    return exchange(target, request(target.post, good + b', "' + name + b'": ' + deep + b"}"))[0]


ODD: list[Any] = [
    None, True, False, -1, 0, 1, -0.0, 2**31, 2**63, -(2**63), 2**64, 10**30, 1.5, 1e308, -1e308, 5e-324, "", "x", "0",
    "NaN", "é\u0000\u202e\x1b[31m", "x" * 10_000, [], {}, [[]], [None], [""], [0], [-1], [2**70], {"a": None},
    ["x"] * 5000, [["x"]], {"type": "text"}, {"x" * 1000: 1},
]  # fmt: skip
FIELDS = ("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
          "min_p", "seed", "stop", "stop_token_ids", "stream", "stream_options", "n", "logprobs", "top_logprobs",
          "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos",
          "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "response_format", "echo", "suffix",
          "best_of", "user", "metadata", "guided_json", "__class__", "\u0000", "context", "rig", "bits", "engine",
          "kv_cache_dtype", "batch_size", "prefill_chunk", "group_size")  # fmt: skip


def _odd_values(target: Target, rng: random.Random) -> int:
    asked = dict(target.good)
    path = target.post
    if target.post == CHAT and rng.random() < 0.4:
        path, asked = TEXT, {"prompt": "The sea", "max_tokens": 2}
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        name = rng.choice(FIELDS) if rng.random() < 0.9 else rng.choice(list(asked))
        asked[name] = rng.choice(ODD)
    if asked.get("max_tokens") in (None, -1):
        asked["max_tokens"] = 2
    return exchange(target, request(path, json.dumps(asked).encode()))[0]


def _absurd_numbers(target: Target, rng: random.Random) -> int:
    number = rng.choice(["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "0." + "0" * 4000 + "1",
                         "1e-400", "-" + "9" * 400, "0x10", "1_000", "١", "--1", "+1", ".5", "1."])  # fmt: skip
    name = rng.choice(["temperature", "top_p", "seed", "max_tokens", "top_k", "n", "context", "bits", "logit_bias"])
    good = json.dumps(target.good)[:-1]
    value = f'{{"5": {number}}}' if name == "logit_bias" else number
    return exchange(target, request(target.post, f'{good}, "{name}": {value}}}'.encode()))[0]


def _messages(target: Target, rng: random.Random) -> int:
    odd = [
        [], [{}], [{"role": "user"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "hacker", "content": "x"}],
        [{"role": "{{ 7 * 7 }}", "content": "{% for x in range(10**9) %}x{% endfor %}"}],
        [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "content": None, "tool_calls": [None]}], [{"role": "user", "content": "<|im_end|>" * 9}],
        [{"role": "user", "content": "a" * 300_000}], [{"role": "user", "content": "é\u0000" * 999}],
        [{"role": "user", "content": "x"}] * 3000, [{"role": "user", "content": [{"type": "text", "text": "x"}] * 999}],
        [{"role": "user", "content": " " * 200_000}], [{"role": "user", "content": "x", "\x1b[2J": "y"}],
    ]  # fmt: skip
    asked = ASK | {"messages": rng.choice(odd), "chat_template_kwargs": rng.choice(
        [{}, {}, {"messages": []}, {"chat_template": "{{ 1 }}"}, {"add_generation_prompt": False}, {"x": ["y"] * 999}]
    )}  # fmt: skip
    return exchange(target, request(target.post, json.dumps(asked).encode()))[0]


def _stops(target: Target, rng: random.Random) -> int:
    stops = rng.choice(
        [["x" * 8000], [f"s{k}" for k in range(5000)], ["a" * 31 + "b"] * 256, [""], ["\u0000"], ["é", "🙂" * 900],
         [chr(k) for k in range(33, 280)], ["a" * 1_000_000]]
    )  # fmt: skip
    asked = ASK | {"stop": stops, "max_tokens": 20, "stream": rng.random() < 0.5}
    return exchange(target, request(target.post, json.dumps(asked).encode()))[0]


def _prompts(target: Target, rng: random.Random) -> int:
    prompt = rng.choice(
        ["", "a" * 1_000_000, [1] * 399, [1] * 500_000, [[1, 2], [3]], ["a", "b"], [], [[]], [1023, 1024], ["x"] * 200,
         [1, "x"], [[1], "x"], "\u0000", "🙂" * 50_000, {"x": 1}, [True, False], [1.0], "<|im_end|>" * 300]
    )  # fmt: skip
    asked = {"prompt": prompt, "max_tokens": 1, "n": rng.choice([1, 1, 2, 128, 10**9])}
    return exchange(target, request(TEXT, json.dumps(asked).encode()))[0]


def _large(target: Target, rng: random.Random) -> int:
    size = rng.choice([20_000, 1 << 20, (4 << 20) + 1, 12 << 20])
    body = json.dumps(target.good).encode()[:-1] + b', "user": "' + b"x" * size + b'"}'
    if rng.random() < 0.5:
        return exchange(target, request(target.post, body))[0]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in _parts(body, 50_000)) + b"0\r\n\r\n"
    return exchange(target, request(target.post, chunks, headers=("Transfer-Encoding: chunked",)))[0]


def _parts(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _bad_chunks(target: Target, rng: random.Random) -> int:
    chunks = rng.choice(
        [b"zz\r\n", b"-5\r\n", b"f" * 40 + b"\r\n", b"5;" + b"x" * 70_000 + b"\r\n", b"5\r\nabc", b"5\r\nabcdeXX",
         b"0\r\n" + b"T: x\r\n" * 20_000, b"1\r\n{\r\n" * 3000 + b"0\r\n\r\n", b"\r\n\r\n\r\n"]
    )  # fmt: skip
    return exchange_of_part(target, request(target.post, chunks, headers=("Transfer-Encoding: chunked",)))


def _cut_off(target: Target, rng: random.Random) -> int:
    """Leaves at any byte of a request, politely or with a reset."""
    data = request(target.post, json.dumps(target.good).encode())
    with target.connect() as client:
        client.sendall(data[: rng.randrange(len(data))])
        if rng.random() < 0.5:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    return 0


def _leaves(target: Target, rng: random.Random) -> int:
    """Asks for a long answer and leaves before, or in the middle of it."""
    asked = dict(target.good)
    if target.post == CHAT:
        asked |= {"max_tokens": 300, "stream": rng.random() < 0.6, "ignore_eos": True}
    with target.connect() as client:
        client.sendall(request(target.post, json.dumps(asked).encode()))
        if rng.random() < 0.6:
            client.settimeout(0.05)
            with suppress(TimeoutError):
                client.recv(rng.choice([1, 100, 2000]))
        if rng.random() < 0.5:
            client.shutdown(socket.SHUT_WR)  # then a reset is a broken pipe
            time.sleep(rng.choice([0, 0.01, 0.1]))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    return 0


def _pipelined(target: Target, rng: random.Random) -> int:
    one = request("/nowhere", method="GET").replace(b"Connection: close\r\n", b"")
    last = request(target.post, json.dumps(target.good).encode())
    return exchange(target, one * rng.choice([2, 20, 300]) + last)[0]


def _paths(target: Target, rng: random.Random) -> int:
    """Names of files, of models and of nothing; no answer holds a file that is not the server's."""
    path = rng.choice(
        ["/v1/models/" + "x" * 9000, "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
         "/v1/models/%1b[31m%0d%0aX:%20y", "/v1/models/%ff%fe", "/v1/models/%", "/page.css/../../../../etc/passwd",
         "/..%2f..%2f..%2fetc%2fpasswd", "//etc/passwd", "/etc/passwd", "/%00", "/api/choices/", "/v1//models", "/v1",
         "/page.js%00.html", "/;/", "/v1/models?" + "&".join(f"k{k}=v" for k in range(900)), "/health/../health",
         "/docs", "/openapi.json", "/redoc", "/favicon.ico", "/.env", "/static/../qwenq/api.py"]
    )  # fmt: skip
    status, body = exchange(target, request(path, method=rng.choice(["GET", "GET", "HEAD", "POST", "PUT", "PATCH"])))
    return -3 if b"root:" in body or b"import" in body else status


def _kinds_of_content(target: Target, rng: random.Random) -> int:
    """A good body under another name, or packed."""
    body = json.dumps(target.good).encode()
    given = rng.choice(
        ["text/plain", "multipart/form-data; boundary=x", "multipart/form-data", "application/x-www-form-urlencoded",
         "application/json; charset=utf-16", "application/json; charset=" + "x" * 5000, "application/\xff", ";" * 900,
         "application/json\x00", "", "*/*", "application/json, application/json"]
    )  # fmt: skip
    headers = [f"Content-Type: {given}"]
    if rng.random() < 0.4:
        packed = rng.choice([gzip.compress(b"x" * 3_000_000), gzip.compress(body), body])
        body, headers = packed, [*headers, f"Content-Encoding: {rng.choice(['gzip', 'br', 'deflate', 'x' * 900])}"]
    return exchange_of_part(target, request(target.post, body, headers=tuple(headers)))


def _tools(target: Target, rng: random.Random) -> int:
    """Functions that are none, thousands of them, and schemas that refer to themselves."""
    function: dict[str, Any] = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    changed: Any = dict(function)
    changed[rng.choice(list(function))] = rng.choice([*ODD, {"$ref": "#"}, {"pattern": "(a+)+$"}, "{{ 7 * 7 }}"])
    tool = {"type": rng.choice(["function", "function", "x", None]), "function": changed}
    messages = rng.choice([
        ASK["messages"], [*ASK["messages"], {"role": "tool", "content": "x" * 100_000, "tool_call_id": "\x00"}],
        [*ASK["messages"], {"role": "assistant", "tool_calls": [{"id": 1, "function": rng.choice(ODD)}]}],
    ])  # fmt: skip
    asked = ASK | {"messages": messages, "tools": [tool] * rng.choice([0, 1, 1, 1, 3000])}
    if rng.random() < 0.5:
        asked["tool_choice"] = rng.choice([*ODD, "auto", "none", "required", {"type": "function"}])
    return exchange(target, request(target.post, json.dumps(asked).encode()))[0]


BOTH: dict[str, Case] = {
    "noise": _noise, "flipped bytes": _flipped, "request lines": _request_lines, "headers": _headers,
    "pages elsewhere": _other_pages, "not JSON": _not_json, "nesting": _nested, "odd values": _odd_values,
    "absurd numbers": _absurd_numbers, "large bodies": _large, "bad chunks": _bad_chunks, "cut off": _cut_off,
    "leaving": _leaves, "pipelined": _pipelined, "paths": _paths, "kinds of content": _kinds_of_content,
}  # fmt: skip
MODEL: dict[str, Case] = {"messages": _messages, "stops": _stops, "prompts": _prompts, "tools": _tools}


# ---------------------------------------------------------------------- campaigns


@dataclass
class Report:
    """What came of the cases sent to one server."""

    server: str
    cases: int = 0
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""
    rss_mib: list[float] = field(default_factory=list)  # before, then after each part
    log: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "server": self.server,
            "cases": self.cases,
            "statuses": {kind: {str(k): n for k, n in sorted(c.items())} for kind, c in self.statuses.items()},
            "faults": self.faults,
            "slowest_s": round(self.slowest_s, 3),
            "slowest": self.slowest,
            "rss_mib": [round(mib, 1) for mib in self.rss_mib],
            "log": self.log,
        }


class ServerEnded(Exception):
    """There is nothing left to attack."""


def attack(target: Target, cases: int, seed: int, report: Report, limit_s: float = math.inf) -> None:
    """So many cases, of every kind in turn, or those that `limit_s` is enough for; faults are noted."""
    kinds = BOTH | (MODEL if target.post == CHAT else {})
    end = time.monotonic() + limit_s
    for number in range(cases):
        if time.monotonic() > end:
            break
        kind = list(kinds)[number % len(kinds)]
        rng = random.Random(f"{seed} {number}")
        clock = time.monotonic()
        try:
            status = kinds[kind](target, rng)
        except TimeoutError:
            status = -2
        took = time.monotonic() - clock
        report.cases += 1
        report.statuses.setdefault(kind, Counter())[status] += 1
        if status not in STATUSES | {0}:
            reasons = {-1: "answered", -2: f"no answer in {ANSWER_S:g} s", -3: "a file of this machine"}
            reason = reasons.get(status, f"status {status}")
            report.faults.append(f"{kind}, case {number}: {reason}")
        if took > report.slowest_s:
            report.slowest_s, report.slowest = took, f"{kind}, case {number}"
        if target.process.poll() is not None:
            raise ServerEnded(f"{kind}, case {number}: the server ended with {target.process.returncode}")


def slow_clients(target: Target, count: int, report: Report, *, patience_s: float) -> None:
    """Clients that send a byte now and then, half of them in the headers; a good one is answered meanwhile."""
    data = request(target.post, json.dumps(target.good).encode())
    clients = [target.connect() for _ in range(count)]
    head, end = data.index(b"\r\n\r\n"), time.monotonic() + patience_s
    at = [0 if k % 2 else head + 4 for k in range(count)]
    for client, sent in zip(clients, at, strict=True):
        client.sendall(data[:sent])
        client.setblocking(False)
    closed: set[int] = set()
    with selectors.DefaultSelector() as selector:
        for k, client in enumerate(clients):
            selector.register(client, selectors.EVENT_READ, k)
        while time.monotonic() < end and len(closed) < count:
            for key, _ in selector.select(0.2):
                with suppress(OSError):
                    if clients[key.data].recv(4096):
                        continue
                closed.add(key.data)
                selector.unregister(clients[key.data])
            for k, client in enumerate(clients):
                if k not in closed and at[k] < len(data) - 20:
                    with suppress(OSError):
                        client.send(data[at[k] : at[k] + 1])
                        at[k] += 1
            if not target.is_well():
                report.faults.append("slow clients keep others from an answer")
                break
    for client in clients:
        client.close()
    report.cases += count
    report.statuses["slow clients, closed by the server"] = Counter({len(closed): 1})


def idle_crowd(target: Target, count: int, report: Report) -> None:
    """More connections than the server keeps, saying nothing; a good one is answered meanwhile."""
    clients = []
    for _ in range(count):
        with suppress(OSError):
            clients.append(target.connect())
    if not target.is_well():
        report.faults.append("idle connections keep others from an answer")
    for client in clients:
        client.close()
    report.cases += count
    report.statuses["idle crowd"] = Counter({0: len(clients)})


def crowd(target: Target, count: int, report: Report) -> None:
    """Many at once, streaming or not: each is answered, or told to come later; none gets an error in a stream."""
    found: Counter[int] = Counter()
    bad: list[str] = []

    def one(number: int) -> None:
        asked = target.good | ({"stream": bool(number % 2)} if target.post == CHAT else {"context": 8000 + number})
        try:
            status, body = exchange(target, request(target.post, json.dumps(asked).encode()))
        except OSError as error:
            status, body = 0, str(error).encode()
        found[status] += 1
        if status not in (200, 429, 503) or (status == 200 and b'"error"' in body):
            bad.append(f"crowd: status {status}, {body[:80]!r}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.cases += count
    report.statuses["crowd"] = found
    report.faults += bad


def endless(target: Target, report: Report, *, limit_s: float) -> None:
    """Headers, a body and chunks without an end: the server closes each."""
    starts = {
        "headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X: yyyyyyyy\r\n" * 200),
        "body": (request(target.post, headers=(f"Content-Length: {1 << 40}",)), b" " * 4096),
        "chunks": (request(target.post, headers=("Transfer-Encoding: chunked",)), b"1000\r\n" + b" " * 4096 + b"\r\n"),
        "body after 404": (request("/nowhere", headers=(f"Content-Length: {1 << 40}",)), b" " * 4096),
    }  # fmt: skip
    for name, (start, more) in starts.items():
        end = time.monotonic() + limit_s
        with target.connect() as client:
            closed = False
            try:
                client.sendall(start.replace(b"Connection: close\r\n", b""))
                while time.monotonic() < end:
                    client.sendall(more)
            except OSError:
                closed = True
        if not closed:
            report.faults.append(f"{name} without an end: read for {limit_s:g} s")
        report.cases += 1
        report.statuses[f"{name} without an end"] = Counter({0: 1})


def deaf_reader(target: Target, report: Report) -> None:
    """A client that asks for a stream and reads nothing keeps nobody from the model."""
    asked = target.good | {"stream": True, "max_tokens": 300, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    with target.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(request(target.post, json.dumps(asked).encode()))
        time.sleep(0.5)
        if not target.is_well():
            report.faults.append("a client that does not read keeps others from an answer")
    report.cases += 1


def campaign(
    target: Target, report: Report, cases: int, *, seed: int, whole: bool, limit_s: float = math.inf
) -> None:
    """Everything against one server; `whole` adds what takes its time."""
    for _ in range(5):
        assert target.is_well()
    attack(target, 40, seed + 1, report)  # what is loaded when it is first needed
    report.rss_mib.append(target.rss_mib())
    attack(target, cases, seed, report, limit_s)
    report.rss_mib.append(target.rss_mib())
    crowd(target, 117 if whole else 30, report)
    endless(target, report, limit_s=ANSWER_S)
    if target.post == CHAT:
        deaf_reader(target, report)
    if whole:
        slow_clients(target, 50, report, patience_s=80)
        idle_crowd(target, 400, report)
        for _ in range(300):
            exchange(target, request(target.post, json.dumps(target.good).encode()))
        report.cases += 300
        report.rss_mib.append(target.rss_mib())
        if report.rss_mib[-1] - report.rss_mib[-2] > 50:
            report.faults.append(f"memory grew in 300 good requests and what was before: {report.rss_mib} MiB")
    if not target.is_well():
        report.faults.append("a good request is not answered at the end")
    if max(report.rss_mib) - report.rss_mib[0] > 512:
        report.faults.append(f"memory grew: {report.rss_mib} MiB")


def judged(
    running_target: Any, cases: int, *, seed: int, whole: bool, limit_s: float = math.inf
) -> Report:
    """A campaign against a server of its own, and what that logged."""
    with running_target as target:
        report = Report(target.name)
        try:
            campaign(target, report, cases, seed=seed, whole=whole, limit_s=limit_s)
        except ServerEnded as ended:
            report.faults.append(str(ended))
        target.process.send_signal(signal.SIGINT)
        target.process.wait(30)
        text = target.log.read_text(encoding="utf-8")
    report.log = [line for line in text.splitlines() if line.strip()][:40]
    report.faults += ["a traceback in the log"] if "Traceback" in text else []
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--each", type=int, default=200, help="requests of each kind to each server")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="time of these, a server")
    parser.add_argument("--only", choices=("serve", "page"), help="one of the servers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    clock = time.monotonic()
    servers = {"serve": (serving, BOTH | MODEL), "page": (paging, BOTH)}
    chosen = [servers[asked.only]] if asked.only else list(servers.values())
    reports = [
        judged(start(), asked.each * len(kinds), seed=asked.seed, whole=True, limit_s=asked.limit_s)
        for start, kinds in chosen
    ]
    found = {"seconds": round(time.monotonic() - clock), "servers": [report.to_json() for report in reports]}
    text = json.dumps(found, indent=2)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n", encoding="utf-8")
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
