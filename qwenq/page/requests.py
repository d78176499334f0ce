"""What the page may ask, strictly checked, and the answers: the command line's own code behind them."""

from __future__ import annotations

import shlex
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qwenq.errors import PlanError
from qwenq.planning.asking import Question, Resolved, contexts_of, spread
from qwenq.planning.engines import ENGINES, KV_DTYPES
from qwenq.planning.parallel import best_option, largest_vllm_context, parallel_options
from qwenq.planning.placement import largest_context
from qwenq.planning.plan import recommend
from qwenq.planning.rig import Rig, catalogue, find_gpu
from qwenq.planning.terms import TERM_NAMES
from qwenq.spec import family_configs, family_spec

MAX_PAGE_GPUS = 16
CHART_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 24576, 32768, 49152, 65536, 98304, 131072)
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
    kv_cache_dtype: str = Field(default="auto", max_length=8)
    engine: Literal["qwenq", "transformers", "vllm", "llama.cpp"] = "qwenq"
    context: int = Field(default=8192, ge=1, le=MAX_PAGE_CONTEXT)
    batch_size: int = Field(default=1, ge=1, le=256)
    prefill_chunk: int = Field(default=0, ge=0, le=MAX_PAGE_CONTEXT)
    rig: tuple[RigPart, ...] = Field(default=(), max_length=8)


def resolve(ask: Ask) -> Resolved:
    """The question behind a state of the page; a QwenqError for what is unknown."""
    if family_spec(ask.model) is None:
        raise PlanError("not a shipped model", hint="`qwenq vram` also reads directories and hub names")
    gpus = [gpu for part in ask.rig for gpu in (find_gpu(part.gpu),) * part.count]
    if len(gpus) > MAX_PAGE_GPUS:
        raise PlanError(f"{len(gpus)} GPUs, wanted at most {MAX_PAGE_GPUS}")
    return Question(
        model=ask.model,
        bits=ask.bits,
        group_size=None if ask.engine == "llama.cpp" else ask.group_size,  # GGUF types have their own
        kv_cache_dtype=ask.kv_cache_dtype,
        batch_size=ask.batch_size,
        engine=ask.engine,
        prefill_chunk=ask.prefill_chunk,
        rig=Rig(tuple(gpus)) if gpus else None,
    ).resolve()


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
        "largest_context": _largest(question, ask.context) if rig else None,
        "notes": [f"{ask.engine} does not run on {gpu.name}" for gpu in question.misfits],
        "command": command(ask, question),
    }


@lru_cache(maxsize=128)
def recommended(ask: Ask) -> list[dict[str, Any]]:
    """Rigs of equal GPUs that hold the model in this state, whatever rig is on the page."""
    question = resolve(ask)
    contexts_of(question, str(ask.context))
    rigs = recommend(question.spec, question.weights, question.engine, question.at(ask.context))
    return [found.to_json() for found in rigs]


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
        "kv_cache_dtypes": {engine: list(KV_DTYPES[engine]) for engine in ENGINES},
        "terms": TERM_NAMES,
        "max_gpus": MAX_PAGE_GPUS,
    }


def command(ask: Ask, question: Resolved) -> str:
    """The command line that prints the page's numbers."""
    words = ["qwenq", "vram", question.spec.name, "--bits", str(ask.bits)]
    words += ["--group-size", str(ask.group_size)] if ask.group_size != 128 and ask.engine != "llama.cpp" else []
    words += ["--engine", ask.engine] if ask.engine != "qwenq" else []
    words += ["--kv-cache-dtype", ask.kv_cache_dtype] if ask.kv_cache_dtype != "auto" else []
    words += ["--batch-size", str(ask.batch_size)] if ask.batch_size != 1 else []
    words += ["--prefill-chunk", str(ask.prefill_chunk)] if ask.prefill_chunk else []
    words += ["--gpu", question.rig.label] if question.rig else []
    words += ["--max-model-len", str(ask.context)]
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


def _largest(question: Resolved, context: int) -> int:
    assert question.rig is not None
    work = question.at(context)
    if question.engine.layered:
        return largest_context(question.spec, question.weights, question.rig, question.engine, work)
    option = best_option(parallel_options(question.spec, question.weights, question.engine, work, question.rig))
    if option is None:
        return 0
    return largest_vllm_context(question.spec, question.weights, question.engine, work, question.rig, option)
