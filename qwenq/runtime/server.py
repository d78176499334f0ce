"""OpenAI's chat and text completions over HTTP: what may be asked, the queue, and the JSON of the answers."""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import iterate_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qwenq.errors import QwenqError, RunError
from qwenq.io.json import TooLarge, read_body
from qwenq.runtime.chat import Chat
from qwenq.runtime.generate import Sampling, Session, Timing

MAX_STOPS = 4


class _Asked(BaseModel):
    """What both kinds of request share. Fields that would change the answer and are not supported are refused."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=10)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int | None = None
    logprobs: bool | int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def check(self) -> None:
        """RunError for what this server does not do."""
        unsupported = {
            "n": self.n not in (None, 1),
            "logprobs": bool(self.logprobs),
            "logit_bias": bool(self.logit_bias),
            "presence_penalty": bool(self.presence_penalty),
            "frequency_penalty": bool(self.frequency_penalty),
        }
        for name, wanted in unsupported.items():
            if wanted:
                raise RunError(f"{name} is not supported by this server", hint="leave it out")
        if len(self.stops) > MAX_STOPS or any(not stop for stop in self.stops):
            raise RunError(f"stop: wanted up to {MAX_STOPS} texts, none empty")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.get("include_usage"))

    def sampling(self, chat: Chat, new_tokens: int | None) -> Sampling:
        seed = self.seed if self.seed is not None else time.time_ns() % (1 << 62)
        return chat.sampling(max_new_tokens=new_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed)


class TextPart(BaseModel):
    """One part of a message's content."""

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    """One message; content as text or as a list of text parts."""

    role: str
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        parts = self.content if isinstance(self.content, list) else [TextPart(type="text", text=self.content or "")]
        for part in parts:
            if part.type != "text":
                raise RunError(f"a message has a part of type {part.type!r}", hint="this server reads text only")
        return {"role": self.role, "content": "".join(part.text for part in parts)}


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[Any] | None = None

    def prompt_ids(self, chat: Chat) -> list[int]:
        self.check()
        if self.tools:
            raise RunError("tools is not supported by this server", hint="leave it out")
        return chat.prompt_ids([message.plain() for message in self.messages])

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Asked):
    """POST /v1/completions."""

    prompt: str | list[int]
    echo: bool = False

    def prompt_ids(self, chat: Chat) -> list[int]:
        self.check()
        if self.echo:
            raise RunError("echo is not supported by this server", hint="leave it out")
        if isinstance(self.prompt, str):
            return chat.text_ids(self.prompt)
        if not all(0 <= token < chat.vocab_size for token in self.prompt):
            raise RunError(f"prompt has a token id outside 0..{chat.vocab_size - 1}")
        return self.prompt

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens


@dataclass(frozen=True)
class Answer:
    """The JSON around one answer, whole or in pieces."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _around(self, choices: list[dict[str, Any]], piece: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if piece else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {
            "id": prefix + self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices,
        }  # fmt: skip

    def whole(self, text: str, timing: Timing) -> dict[str, Any]:
        body = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": timing.stopped or "stop"}
        return self._around([choice], False) | {"usage": usage(timing)}

    def piece(self, text: str, *, first: bool = False, finish: str | None = None) -> dict[str, Any]:
        delta: dict[str, Any] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        body = {"delta": delta} if self.chat else {"text": text}
        return self._around([{"index": 0, **body, "logprobs": None, "finish_reason": finish}], True)

    def usage_piece(self, timing: Timing) -> dict[str, Any]:
        return self._around([], True) | {"usage": usage(timing)}


def usage(timing: Timing) -> dict[str, Any]:
    """Token counts, the cached ones of the prompt among them."""
    return {
        "prompt_tokens": timing.prompt_tokens,
        "completion_tokens": timing.new_tokens,
        "total_tokens": timing.prompt_tokens + timing.new_tokens,
        "prompt_tokens_details": {"cached_tokens": timing.cached_tokens},
    }


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def said(error: QwenqError) -> str:
    """Message and hint of an error in one line."""
    return f"{error.message} ({error.hint})" if error.hint else error.message


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
        for text in self.chat.stream(tokens, ids):
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
