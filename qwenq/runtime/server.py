"""OpenAI's chat and text completions over HTTP: the queue before the model, the endpoints, and answers as they come."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from qwenq.errors import CalibrationError, QwenqError, RunError, UsageError
from qwenq.io.http import BadBody, BodyReader, Busy, Guard, Line, while_there
from qwenq.io.json import shown
from qwenq.runtime.answers import Answer, Calls, Choice, LogProbs, Piece, StopTexts, usage
from qwenq.runtime.chat import Chat
from qwenq.runtime.generate import Session, Timing
from qwenq.runtime.requests import ChatRequest, Order, Refused, TextRequest, said
from qwenq.units import counted

MAX_BODY_BYTES = 4 << 20
_RETRY_AFTER_S = 5


def error_body(
    message: str, kind: str = "invalid_request_error", *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Closing(Exception):
    """The server is ending."""


@dataclass
class Service:
    """Shared by the endpoints. `closing` ends every answer at its next token."""

    session: Session
    chat: Chat
    name: str
    line: Line
    api_key: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def pieces(self, order: Order, number: int, timing: Timing, gone: Callable[[], bool]) -> Iterator[Piece]:
        """One of an order's answers as it is made."""
        prompt, repetition = divmod(number, order.count)
        ids, sampling = order.prompts[prompt], order.samplings[prompt]
        seed = (sampling.seed + repetition + (1 << 63)) % (1 << 64) - (1 << 63)
        sampling = replace(sampling, seed=seed)
        noted = LogProbs(order.logprobs or 0, self.chat.tokenizer.bytes_of) if order.logprobs is not None else None
        stops = StopTexts(order.stops)
        calls = Calls(1 if order.one_call else len(ids) + sampling.max_new_tokens) if order.tools else None
        listen = {"listen": noted.note} if noted else {}
        tokens = self.session.generate(ids, sampling, timing, lambda: gone() or self.closing.is_set(), **listen)

        def shown(text: str, end: bool = False) -> Iterator[Piece]:
            parts = [text] if calls is None else [*calls.feed(text), *(calls.end() if end else ())]
            pieces = [Piece(part) if isinstance(part, str) else Piece(call=part) for part in parts if part]
            drawn = noted.take() if noted else ()
            if drawn:
                pieces = [replace(pieces[0], drawn=drawn), *pieces[1:]] if pieces else [Piece(drawn=drawn)]
            yield from pieces

        for text in self.chat.stream(tokens, ids):
            early = timing.new_tokens <= sampling.min_new_tokens
            yield from shown(text if early else stops.feed(text))
            if stops.found:
                timing.stopped = "stop"
                break
        yield from shown(stops.end(), end=True)


def make_app(service: Service, allowed_hosts: Collection[str] = ()) -> FastAPI:
    """The application.

    Clients that a web page elsewhere could make a browser be are refused (io.http); with a key, which no page knows,
    any host name is answered.
    """
    app = FastAPI(title="qwenq", docs_url=None, redoc_url=None, openapi_url=None)
    allowed = [*allowed_hosts, *(["*"] if service.api_key else [])]
    app.add_middleware(Guard, refusal=error_body, allowed=allowed, headers={"X-Content-Type-Options": "nosniff"})
    bodies, reader = BodyReader(MAX_BODY_BYTES), ThreadPoolExecutor(1, "requests")
    entry = {"id": service.name, "object": "model", "created": 0, "owned_by": "qwenq"}
    entry |= {"max_model_len": service.session.max_model_len}

    async def models(request: Request) -> Response:
        if not _has_key(service, request):
            return _unauthorized()
        return JSONResponse({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        if not _has_key(service, request):
            return _unauthorized()
        return JSONResponse(entry) if request.path_params["name"] == service.name else _not_found(service)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": service.line.waiting})

    async def chat_completions(request: Request) -> Response:
        return await complete(request, ChatRequest)

    async def completions(request: Request) -> Response:
        return await complete(request, TextRequest)

    async def complete(request: Request, kind: type[ChatRequest] | type[TextRequest]) -> Response:
        """Answer, or say in OpenAI's shape why not: 400 bad request, 401, 404 model, 408, 413 body, 429 line full."""
        if not _has_key(service, request):
            return _unauthorized()
        if service.line.full:
            return _busy(service)
        try:
            body = await bodies.read(request)
            read = asyncio.get_running_loop().run_in_executor(reader, _understood, service, kind, body)
            asked, order = await read
        except BadBody as error:
            return JSONResponse(error_body(error.message), error.status)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = shown(".".join(str(part) for part in first["loc"] if part != "[key]")) or "body"
            param = str(first["loc"][0]) if first["loc"] else None
            return JSONResponse(error_body(f"{where}: {first['msg']}", param=param), 400)
        except Refused as error:
            if error.code == "model_not_found":
                return _not_found(service)
            return JSONResponse(error_body(said(error), param=error.param, code=error.code), 400)
        except (CalibrationError, UsageError) as error:  # what a template refuses
            message = said(error).replace(str(service.chat.directory), service.name)
            return JSONResponse(error_body(message, param="messages"), 400)
        except QwenqError as error:
            return JSONResponse(error_body(said(error), "server_error"), 500)
        try:
            work = _Work(service, order)
        except Busy:
            return _busy(service)
        answer = Answer(service.name, kind is ChatRequest, order.logprobs is not None)
        if asked.stream:
            return _Stream(answer, work, asked.wants_usage)
        return await _whole(answer, work, request)

    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(error_body(error.detail), error.status_code, headers=dict(error.headers or {}))

    app.add_exception_handler(HTTPException, other)
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    return app


def _has_key(service: Service, request: Request) -> bool:
    """Whether the request has the service's key, compared in constant time."""
    given = [value for name, value in request.headers.raw if name == b"authorization"]
    key = given[0].strip() if len(given) == 1 else b""
    if key[:7].lower() == b"bearer ":
        key = key[7:].strip()
    found, wanted = (hashlib.sha256(each).digest() for each in (key, service.api_key.encode()))
    return not service.api_key or hmac.compare_digest(found, wanted)


def _unauthorized() -> Response:
    body = error_body("wrong or missing API key", "authentication_error", code="invalid_api_key")
    return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})


def _not_found(service: Service) -> Response:
    body = error_body(f"the model here is {service.name!r}", code="model_not_found", param="model")
    return JSONResponse(body, 404)


def _busy(service: Service) -> Response:
    message = f"already waiting: {counted(service.line.waiting, 'request')}"
    body = error_body(message, "rate_limit_error", code="queue_full")
    return JSONResponse(body, 429, headers={"Retry-After": str(_RETRY_AFTER_S)})


def _understood(
    service: Service, kind: type[ChatRequest] | type[TextRequest], body: bytes
) -> tuple[ChatRequest | TextRequest, Order]:
    asked = kind.model_validate_json(body)
    if asked.model not in (None, "", service.name):
        raise Refused("another model", code="model_not_found")
    return asked, asked.order(service.chat, service.session.max_model_len)


class _Work:
    """An order in the line, and its answers as they are made. Busy when the line is full."""

    def __init__(self, service: Service, order: Order) -> None:
        self.service, self.order = service, order
        self.choices = [Choice(Timing()) for _ in range(len(order.prompts) * order.count)]
        self._gone = threading.Event()
        self._made: asyncio.Queue[tuple[int, Piece | None] | BaseException | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._turn = service.line.enter(self._work)
        self._turn.add_done_callback(self._finish)  # when its place is free again

    @property
    def usage(self) -> dict[str, Any]:
        return usage([len(ids) for ids in self.order.prompts], self.choices)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """Pieces of the answers with their numbers, None at an answer's end; raises what ended the work."""
        while (made := await self._made.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            yield made
            if made[1] is not None:
                self.choices[made[0]].add(made[1])

    def leave(self) -> None:
        """Give the place in the line up, or end the answer at its next token."""
        self._gone.set()
        self._turn.cancel()

    def _work(self) -> None:
        """Runs in the line's thread; a client that is slow to read keeps nobody from it."""
        for number, choice in enumerate(self.choices):
            for piece in self.service.pieces(self.order, number, choice.timing, self._gone.is_set):
                self._put((number, piece))
            if self._gone.is_set():
                return
            if self.service.closing.is_set() and not choice.timing.stopped:
                raise Closing
            self._put((number, None))

    def _finish(self, turn: Future[None]) -> None:
        error = None if turn.cancelled() else turn.exception()
        if error is not None and not isinstance(error, QwenqError | Closing):
            logging.getLogger("uvicorn.error").error("an answer failed", exc_info=error)
            error = RunError("internal error; see the server's log")
        self._put(error)

    def _put(self, made: tuple[int, Piece | None] | BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waits
            self._loop.call_soon_threadsafe(self._made.put_nowait, made)


def _problem(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of what ended an answer."""
    if isinstance(error, QwenqError):
        return 500, error_body(said(error), "server_error")
    return 503, error_body("the server is shutting down", "server_error", code="shutting_down")


async def _whole(answer: Answer, work: _Work, request: Request) -> Response:
    """The answer in one piece; when the client leaves first, its place is given up."""

    async def collect() -> Response:
        try:
            async for _ in work.pieces():
                pass
        except (QwenqError, Closing) as error:
            status, body = _problem(error)
            return JSONResponse(body, status)
        return JSONResponse(answer.whole(work.choices, work.usage))

    try:
        return await while_there(request, asyncio.ensure_future(collect()))
    finally:
        work.leave()


class _Stream(StreamingResponse):
    """Server-sent events; whatever ends them ends the work."""

    def __init__(self, answer: Answer, work: _Work, with_usage: bool) -> None:
        super().__init__(_events(answer, work, with_usage), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.leave()


async def _events(answer: Answer, work: _Work, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of the answers. What fails after the first one is said in an event of its own."""

    def event(value: Mapping[str, Any]) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    if answer.chat:
        for number in range(len(work.choices)):
            yield event(answer.begin(number))
    try:
        async for number, piece in work.pieces():
            choice = work.choices[number]
            yield event(answer.piece(number, piece, choice) if piece else answer.end(number, choice.finish))
        if with_usage:
            yield event(answer.usage(work.usage))
    except (QwenqError, Closing) as error:
        yield event(_problem(error)[1])
    yield "data: [DONE]\n\n"
