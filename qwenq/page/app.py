"""The local page: requests strictly checked, and answers by the command line's own code."""

from __future__ import annotations

import asyncio
import shlex
import socket
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import lru_cache, partial
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwenq.errors import PlanError, QwenqError
from qwenq.formats.base import FORMATS, SIZED, Format, Scheme
from qwenq.io.http import BadBody, BodyReader, Busy, Guard, Line, Server, while_there
from qwenq.model.spec import family_configs, family_spec
from qwenq.planning.engines.base import ENGINES, RigFinder, get_engine, plan_commands
from qwenq.planning.memory import TERM_NAMES
from qwenq.planning.plan import make_plan, recommend
from qwenq.planning.questions import Question, Resolved, contexts_of, spread
from qwenq.planning.rig import Rig, catalogue, find_gpu
from qwenq.planning.weights import gguf_types
from qwenq.units import counted

MAX_PAGE_GPUS = 16
CHART_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
MAX_PAGE_CONTEXT = 131072


class RigPart(BaseModel):
    """Some GPUs of one kind."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    gpu: str = Field(max_length=60)
    count: int = Field(ge=1, le=MAX_PAGE_GPUS)


class Ask(BaseModel):
    """One state of the page. Only shipped models: the page reads no directories and no hub."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str = Field(max_length=80)
    bits: Literal[4, 8, 16] = 4
    group_size: Literal[128, 64, 32] = 128
    format: str = Field(default="", max_length=24)  # empty: by the bits
    kv_cache_dtype: str = Field(default="auto", max_length=8)
    engine: str = Field(default=Question.engine, max_length=20)
    context: int = Field(default=8192, ge=1, le=MAX_PAGE_CONTEXT)
    batch_size: int = Field(default=1, ge=1, le=256)
    prefill_chunk: int = Field(default=0, ge=0, le=MAX_PAGE_CONTEXT)
    tensor_parallel_size: int = Field(default=0, ge=0, le=MAX_PAGE_GPUS)
    max_num_seqs: int = Field(default=0, ge=0, le=65536)
    gpu_memory_utilization: float = Field(default=0, ge=0, le=1)  # 0: the engine's own
    enforce_eager: bool = False
    reserve_gib: float = Field(default=0, ge=0, le=1024)
    ram_gb: int = Field(default=0, ge=0, le=65536)  # 0: not said
    rig: tuple[RigPart, ...] = Field(default=(), max_length=8)


def resolve(ask: Ask) -> Resolved:
    """The question behind a state of the page; a QwenqError for what is unknown."""
    return _resolved(ask.model_copy(update={"context": 1}))


@lru_cache(maxsize=64)
def _resolved(ask: Ask) -> Resolved:
    """Kept while the context slides, with all that its weights were asked before."""
    if family_spec(ask.model) is None:
        raise PlanError("not a shipped model", hint="`qwenq vram` also reads directories and hub names")
    gpus = [gpu for part in ask.rig for gpu in (find_gpu(part.gpu),) * part.count]
    if len(gpus) > MAX_PAGE_GPUS:
        raise PlanError(f"{len(gpus)} GPUs, wanted at most {MAX_PAGE_GPUS}")
    own = _own_scheme(ask)
    return Question(
        model=ask.model,
        bits=None if own and ask.format else ask.bits,
        group_size=None if own else ask.group_size,
        format=ask.format,
        kv_cache_dtype=ask.kv_cache_dtype,
        batch_size=ask.batch_size,
        engine=ask.engine,
        prefill_chunk=ask.prefill_chunk,
        tensor_parallel_size=ask.tensor_parallel_size,
        max_num_seqs=ask.max_num_seqs,
        gpu_memory_utilization=ask.gpu_memory_utilization or None,
        enforce_eager=ask.enforce_eager,
        reserve=f"{ask.reserve_gib:g}GiB" if ask.reserve_gib and gpus else "",
        ram=f"{ask.ram_gb}GB" if ask.ram_gb and gpus else "",
        rig=Rig(tuple(gpus)) if gpus else None,
    ).resolve()


def _own_scheme(ask: Ask) -> bool:
    """Whether bits and groups follow from engine and format: of GGUF types, and of formats that have one scheme."""
    if get_engine(ask.engine).needs_gguf or ask.format in SIZED:
        return True
    return ask.format in FORMATS and FORMATS[ask.format].fixed is not None


@lru_cache(maxsize=128)
def answer(ask: Ask) -> dict[str, Any]:
    """Estimates at the asked context and along the chart, the largest context, and the command that says the same."""
    question = resolve(ask)
    spec, rig = question.spec, question.rig
    asked = contexts_of(question, str(ask.context))
    along = sorted({c for c in CHART_CONTEXTS if c <= spec.extended_context} | set(asked))
    found = spread(question, along)
    now = found.estimates[along.index(ask.context)]
    return {
        "now": now.to_json(),
        "chart": [_chart_point(e.to_json()) for e in found.estimates],
        "rig": rig.label if rig else None,
        "context_limit": min(spec.extended_context, MAX_PAGE_CONTEXT),
        "largest_context": question.engine.longest_context(question.at(ask.context)) if rig else None,
        "notes": question.misfits,
        "runs": not question.misfits,
        "limits": [gpu.limit_source for gpu in dict.fromkeys(rig.gpus)] if rig else [],
        "command": command(ask, question),
    }


@lru_cache(maxsize=128)
def planned(ask: Ask) -> dict[str, Any]:
    """The rest of `qwenq plan`'s answer: placement, speed, host memory, flags to paste, ways to fit."""
    question = resolve(ask)
    if question.rig is None or question.misfits:
        return {"plan": None}
    contexts_of(question, str(ask.context))
    found = make_plan(question.at(ask.context))
    told = found.to_json()
    kept = ("batch_size", "fits", "certainty", "speed", "offload_speed", "host", "instead", "notes")
    return {
        "plan": {key: told[key] for key in kept}
        | {
            "speed_text": found.speed.text() if found.fits else "",
            "offload_speed_text": found.offload_speed.text() if found.offload_speed else "",
            "speed_short": speed.short() if (speed := found.speed if found.fits else found.offload_speed) else {},
            "how": found.layout.how,
            "split": found.placement.reason if found.placement else "",
            "offload": found.offload.reason if found.offload else "",
            "gpus": [share.to_json() for share in (found.offload or found).shares],
            "memory": (found.offload or found).memory.to_json()["gpus"],
            "parallel": told["parallel"],
            "flags": plan_commands(found),
        }
    }


@lru_cache(maxsize=128)
def recommended(ask: Ask) -> list[dict[str, Any]]:
    """Rigs of equal GPUs that hold the model in this state, whatever rig is on the page."""
    resolve(ask)  # which refuses a rig that there is not
    return _rigs(ask.model_copy(update={"rig": (), "reserve_gib": 0, "ram_gb": 0, "tensor_parallel_size": 0}))


@lru_cache(maxsize=128)
def _rigs(ask: Ask) -> list[dict[str, Any]]:
    question = resolve(ask)
    contexts_of(question, str(ask.context))
    finder = _finder(ask.model_copy(update={"context": 1}))
    return [found.to_json() for found in recommend(question.at(ask.context), finder)]


@lru_cache(maxsize=8)
def _finder(ask: Ask) -> RigFinder:
    """Costs by context, kept while only the context changes."""
    return resolve(ask).engine.rig_finder()


def choices() -> dict[str, Any]:
    """Everything the page's controls offer."""
    models = {name: family_spec(name) for name in family_configs()}
    return {
        "models": [
            {"name": name, "context_limit": min(spec.extended_context, MAX_PAGE_CONTEXT)}
            for name, spec in models.items()
            if spec is not None
        ],
        "gpus": [{"name": gpu.name, "memory_gib": gpu.memory_gib} for gpu in catalogue()],
        "engines": list(ENGINES),
        "kv_cache_dtypes": {name: list(engine.kv_dtypes) for name, engine in ENGINES.items()},
        "gguf_engines": [name for name, engine in ENGINES.items() if engine.needs_gguf],
        "server_engines": [name for name, engine in ENGINES.items() if not engine.layered],
        "formats": {name: _bits(form) for name, form in FORMATS.items() if not form.whole_file}
        | {name: [] for name in SIZED},
        "gguf_types": list(gguf_types()),
        "terms": TERM_NAMES,
        "max_gpus": MAX_PAGE_GPUS,
    }


def _bits(form: Format) -> list[int]:
    """Bits that may be asked for with a format; none of one that has a single scheme."""
    found = []
    for bits in () if form.fixed else (4, 8):
        with suppress(PlanError):
            form.check_scheme(Scheme(bits, 128, not form.asymmetric))
            found.append(bits)
    return found


def command(ask: Ask, question: Resolved) -> str:
    """The command line that prints the page's numbers."""
    own = _own_scheme(ask)
    words = ["qwenq", "vram", question.spec.name]
    words += [] if own and ask.format else ["--bits", str(ask.bits)]
    words += ["--format", ask.format] if ask.format else []
    words += ["--group-size", str(ask.group_size)] if ask.group_size != 128 and not own else []
    words += ["--engine", ask.engine] if ask.engine != Question.engine else []
    words += ["--kv-cache-dtype", ask.kv_cache_dtype] if ask.kv_cache_dtype != "auto" else []
    words += ["--batch-size", str(ask.batch_size)] if ask.batch_size != 1 else []
    words += ["--prefill-chunk", str(ask.prefill_chunk)] if ask.prefill_chunk else []
    words += ["--tensor-parallel-size", str(ask.tensor_parallel_size)] if ask.tensor_parallel_size else []
    words += ["--max-num-seqs", str(ask.max_num_seqs)] if ask.max_num_seqs else []
    part = ask.gpu_memory_utilization
    words += ["--gpu-memory-utilization", f"{part:g}"] if part else []
    words += ["--enforce-eager"] if ask.enforce_eager else []
    words += ["--gpu", question.rig.label] if question.rig else []
    words += ["--reserve", f"{ask.reserve_gib:g}GiB"] if ask.reserve_gib and question.rig else []
    words += ["--context", str(ask.context)]
    return shlex.join(words)


def _chart_point(estimate_json: dict[str, Any]) -> dict[str, Any]:
    gpus = [
        {
            "gpu": gpu["gpu"],
            "total_bytes": gpu["total_bytes"],
            "limit_bytes": gpu["limit_bytes"],
            "terms": {term["name"]: term["bytes"] for term in gpu["terms"]},
        }
        for gpu in estimate_json["gpus"]
    ]
    return {"context": estimate_json["context"], "gpus": gpus}


MAX_BODY_BYTES = 16_384
MAX_WAITING = 8
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


def make_app(allowed_hosts: Collection[str] = ()) -> FastAPI:
    """The application; clients that a web page elsewhere could make a browser be are refused (io.http)."""
    app = FastAPI(title="qwenq vram", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(
        Guard, refusal=lambda problem: {"error": problem, "hint": ""}, allowed=allowed_hosts, headers=HEADERS
    )
    bodies, line = BodyReader(MAX_BODY_BYTES), Line(MAX_WAITING)
    for path, (name, kind) in FILES.items():
        content = resources.files("qwenq.page").joinpath("static", name).read_bytes()
        app.add_api_route(path, _serve(content, kind), methods=["GET"])
    app.add_api_route("/plotly.min.js", _serve(plotly_script(), "text/javascript; charset=utf-8"), methods=["GET"])
    app.add_api_route("/api/choices", choices, methods=["GET"])
    app.add_api_route("/api/estimate", _asked(bodies, line, answer), methods=["POST"])
    app.add_api_route("/api/plan", _asked(bodies, line, planned), methods=["POST"])
    app.add_api_route("/api/recommend", _asked(bodies, line, recommended), methods=["POST"])
    return app


def plotly_script() -> bytes:
    """plotly.js as the installed plotly package ships it."""
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()


def run_page(bound: socket.socket, allowed_hosts: Collection[str] = ()) -> None:
    """Serve on `bound` until interrupted."""
    warm()
    Server(make_app(allowed_hosts)).run(sockets=[bound])


def warm() -> None:
    """Answer a question for each engine, so that nobody waits for what is read or imported when it is first needed."""
    for name in ENGINES:
        ask = Ask(model=next(iter(family_configs())), engine=name, rig=(RigPart(gpu=catalogue()[0].name, count=1),))
        for asked in (answer, planned, recommended):
            with suppress(QwenqError):  # an engine that does not run there, say
                asked(ask)


def _serve(content: bytes, kind: str) -> Callable[[], Response]:
    def endpoint() -> Response:
        return Response(content, media_type=kind)

    return endpoint


def _asked(bodies: BodyReader, line: Line, work: Callable[[Ask], Any]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that reads an Ask and answers in its turn.

    408 and 413 for its body, 422 for bad JSON and for what cannot be answered, 503 when too many wait.
    """

    async def endpoint(request: Request) -> Response:
        try:
            ask = Ask.model_validate_json(await bodies.read(request))
            turn = asyncio.wrap_future(line.enter(partial(work, ask)))
            return JSONResponse(await while_there(request, turn))
        except Busy:
            body = {"error": f"already waiting: {counted(line.waiting, 'request')}", "hint": "ask again in a moment"}
            return JSONResponse(body, status_code=503, headers={"Retry-After": "5"})
        except BadBody as error:
            return JSONResponse({"error": error.message, "hint": ""}, status_code=error.status)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            return JSONResponse({"error": f"{where}: {first['msg']}", "hint": ""}, status_code=422)
        except QwenqError as error:
            return JSONResponse({"error": error.message, "hint": error.hint}, status_code=422)

    return endpoint
