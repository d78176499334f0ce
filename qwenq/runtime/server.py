"""A small OpenAI-compatible server over one loaded model: one answer at a time, the next ones wait in a line."""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import iterate_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qwenq.errors import QwenqError
from qwenq.runtime.chat import Chat
from qwenq.runtime.generate import Sampling, Session, Timing
from qwenq.runtime.protocol import Answer, ChatRequest, TextRequest, error_body, said
from qwenq.web import TooLarge, read_body

MAX_BODY_BYTES = 4 << 20


class Busy(Exception):
    """The line is full."""


@dataclass
class Line:
    """Requests wait here for the model; at most `limit` of them."""

    limit: int
    waiting: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def full(self) -> bool:
        return self._turn.locked() and self.waiting >= self.limit

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the model; Busy when too many do already."""
        if self.full:
            raise Busy
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._turn.release()


@dataclass
class Service:
    """What the endpoints share. `closing` ends every answer at its next token."""

    session: Session
    chat: Chat
    name: str
    line: Line
    api_key: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def pieces(
        self, ids: list[int], sampling: Sampling, stops: list[str], timing: Timing, gone: Callable[[], bool]
    ) -> Iterator[str]:
        """Text as it is made, up to the first of `stops`; what could begin one is held back until it is known."""
        tokens = self.session.generate(ids, sampling, timing, lambda: gone() or self.closing.is_set())
        held = ""
        for text in self.chat.stream(tokens):
            held += text
            found = min((at for stop in stops if (at := held.find(stop)) >= 0), default=-1)
            if found >= 0:
                timing.stopped = "stop"
                yield held[:found]
                return
            keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        if held:
            yield held


def make_app(service: Service, hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")) -> FastAPI:
    """The application. Requests for other host names than `hosts` are refused, so a web page elsewhere cannot ask."""
    app = FastAPI(title="qwenq", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    async def models(request: Request) -> Response:
        if not _allowed(service, request):
            return _refused()
        entry = {"id": service.name, "object": "model", "created": 0, "owned_by": "qwenq"}
        return JSONResponse({"object": "list", "data": [entry | {"max_model_len": service.session.max_model_len}]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": service.line.waiting})

    async def chat_completions(request: Request) -> Response:
        return await _complete(service, request, ChatRequest)

    async def completions(request: Request) -> Response:
        return await _complete(service, request, TextRequest)

    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    return app


def _allowed(service: Service, request: Request) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return not service.api_key or hmac.compare_digest(given.encode(), service.api_key.encode())


def _refused() -> Response:
    return JSONResponse(error_body("wrong or missing API key", "authentication_error", "invalid_api_key"), 401)


async def _complete(service: Service, request: Request, kind: type[ChatRequest] | type[TextRequest]) -> Response:
    """Answer, or say in OpenAI's shape why not: 400 bad request, 401, 404 model, 413 body, 429 line full."""
    if not _allowed(service, request):
        return _refused()
    try:
        asked = kind.model_validate_json(await read_body(request, MAX_BODY_BYTES))
        if asked.model not in ("", service.name):
            body = error_body(f"the model here is {service.name!r}", code="model_not_found")
            return JSONResponse(body, 404)
        ids = asked.prompt_ids(service.chat)
        sampling = asked.sampling(service.chat, asked.new_tokens)
        service.session.new_tokens(len(ids), sampling.max_new_tokens)
    except TooLarge:
        return JSONResponse(error_body(f"the body is larger than {MAX_BODY_BYTES} bytes"), 413)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        return JSONResponse(error_body(f"{where}: {first['msg']}"), 400)
    except QwenqError as error:
        code = "context_length_exceeded" if "in a context of" in error.message else None
        return JSONResponse(error_body(said(error), code=code), 400)
    answer, timing = Answer(service.name, kind is ChatRequest), Timing()
    gone = threading.Event()

    async def text() -> AsyncIterator[str]:
        """Pieces when it is their turn; who stops reading stops the generation at its next token."""
        async with service.line.turn():
            async for piece in iterate_in_threadpool(service.pieces(ids, sampling, asked.stops, timing, gone.is_set)):
                yield piece

    if service.line.full:
        return _busy(service)
    if asked.stream:
        return StreamingResponse(_events(answer, text(), timing, asked.wants_usage), media_type="text/event-stream")
    parts = []
    try:
        async for piece in text():
            parts.append(piece)
            if await request.is_disconnected():
                gone.set()
    except Busy:
        return _busy(service)
    except QwenqError as error:
        return JSONResponse(error_body(said(error), "server_error"), 500)
    return JSONResponse(answer.whole("".join(parts), timing))


def _busy(service: Service) -> Response:
    body = error_body(f"{service.line.waiting} requests are waiting already", "rate_limit_error", "queue_full")
    return JSONResponse(body, 429, headers={"Retry-After": "5"})


async def _events(answer: Answer, text: AsyncIterator[str], timing: Timing, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of one answer. What fails after the first one is said in an event of its own."""

    def event(value: Any) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    if answer.chat:
        yield event(answer.piece("", first=True))
    try:
        async for piece in text:
            yield event(answer.piece(piece))
    except QwenqError as error:
        yield event(error_body(said(error), "server_error"))
        return
    except Busy:
        yield event(error_body("too many requests are waiting already", "rate_limit_error", "queue_full"))
        return
    yield event(answer.piece("", finish=timing.stopped or "stop"))
    if with_usage:
        yield event(answer.usage_piece(timing))
    yield "data: [DONE]\n\n"
