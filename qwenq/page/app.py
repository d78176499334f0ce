"""The page's server: FastAPI on loopback, static files from this package, plotly from its own."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qwenq.errors import QwenqError
from qwenq.page.requests import Ask, answer, choices, recommended
from qwenq.web import TooLarge, read_body

MAX_BODY_BYTES = 16_384
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


LOOPBACK = ("localhost", "127.0.0.1", "::1")


def make_app(hosts: tuple[str, ...] = (*LOOPBACK, "[::1]")) -> FastAPI:
    """The application; requests for other host names than `hosts` are refused (a page elsewhere cannot ask us)."""
    app = FastAPI(title="qwenq vram", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.middleware("http")
    async def with_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    for path, (name, kind) in FILES.items():
        content = resources.files("qwenq.page").joinpath("static", name).read_bytes()
        app.add_api_route(path, _serve(content, kind), methods=["GET"])
    app.add_api_route("/plotly.min.js", _serve(plotly_script(), "text/javascript; charset=utf-8"), methods=["GET"])
    app.add_api_route("/api/choices", choices, methods=["GET"])
    app.add_api_route("/api/estimate", _asked(answer), methods=["POST"])
    app.add_api_route("/api/recommend", _asked(recommended), methods=["POST"])
    return app


def plotly_script() -> bytes:
    """plotly.js as the installed plotly package ships it."""
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)
    except OSError:
        bound.close()
        raise
    return bound


def run_page(bound: socket.socket, host: str) -> None:
    """Serve on `bound` until interrupted. On an address other than loopback any host name is answered."""
    app = make_app() if host in LOOPBACK else make_app(("*",))
    config = uvicorn.Config(app, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[bound])


def _serve(content: bytes, kind: str) -> Callable[[], Response]:
    def endpoint() -> Response:
        return Response(content, media_type=kind)

    return endpoint


def _asked(work: Callable[[Ask], Any]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that reads an Ask: 413 for a large body, 422 for bad JSON and for what cannot be answered."""

    async def endpoint(request: Request) -> Response:
        try:
            ask = Ask.model_validate_json(await read_body(request, MAX_BODY_BYTES))
            return JSONResponse(await run_in_threadpool(work, ask))
        except TooLarge:
            return JSONResponse({"error": f"more than {MAX_BODY_BYTES} bytes", "hint": ""}, status_code=413)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            return JSONResponse({"error": f"{where}: {first['msg']}", "hint": ""}, status_code=422)
        except QwenqError as error:
            return JSONResponse({"error": error.message, "hint": error.hint}, status_code=422)

    return endpoint
