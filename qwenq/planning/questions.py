"""A question as a user puts it, in words and numbers, made into a model, weights, engine and rig; and its answers.

The command line and the page ask through here, so they say the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenq.errors import PlanError, UsageError
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Workload, check_context, default_context
from qwenq.planning.engines.base import Engine, get_engine, readers
from qwenq.planning.memory import TERM_NAMES, GpuMemory, MemoryEstimate
from qwenq.planning.models import Model, WeightsAsked, load_model, model_weights
from qwenq.planning.rig import Rig, parse_rig, reserved
from qwenq.planning.weights import Weights
from qwenq.units import GIB, format_gb, format_gib, format_tokens, parse_size, parse_tokens

DEFAULT_CONTEXTS = (1024, 8192, 32768, 131072)
MAX_CONTEXTS = 64


@dataclass(frozen=True)
class Resolved:
    """A question whose words are all understood; the context is still open."""

    model: Model
    weights: Weights
    engine: Engine
    rig: Rig | None
    template: Workload
    tensor_parallel: int  # 0: what the rig allows

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each thing about the model that is read otherwise than its config.json says."""
        return self.model.notes

    @property
    def misfits(self) -> list[str]:
        """A line for each kind of GPU of the rig on which the engine does not run at all."""
        kinds = dict.fromkeys(self.rig.gpus) if self.rig else ()
        return [said for gpu in kinds if (said := self.engine.barred(gpu))]

    def at(self, context: int) -> Case:
        """The case at one context."""
        return Case(self.spec, self.weights, self.engine, replace(self.template, context=context), self.rig)


@dataclass(frozen=True)
class Question:
    """Options as typed."""

    model: str
    bits: int | None = None
    group_size: int | None = None
    format: str = ""  # by name: gptq, nf4, Q4_K_M
    target_size: str | None = None
    recipe: Path | None = None  # a file that `quantize --save-recipe` wrote
    checkpoint: Path | None = None
    pad_for_tp: int | None = None
    kv_cache_dtype: str = "auto"
    batch_size: int = 1
    engine: str = "qwenq"
    engine_version: str = ""
    prefill_chunk: int = 0
    gpu: str | None = None
    reserve: str = ""
    tensor_parallel_size: int = 0
    max_num_seqs: int = 0
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    ram: str = ""  # of the host
    expect_params: str | None = None
    rig: Rig | None = None  # already known, from --detect
    profile: Path | None = None  # measured by `qwenq vram measure`

    def resolve(self) -> Resolved:
        """Everything looked up and checked; a QwenqError for what is unknown or contradictory."""
        self._check_ways()
        engine = get_engine(self.engine, self.engine_version)
        if self.profile is not None:
            engine = engine.with_profile(self.profile)
        engine.kv_bytes(self.kv_cache_dtype)
        model = load_model(self.model, parse_parameters(self.expect_params) if self.expect_params else None)
        asked = WeightsAsked(
            bits=self.bits,
            group_size=self.group_size,
            target_bytes=None if self.target_size is None else parse_size(self.target_size),
            recipe=self.recipe,
            checkpoint=self.checkpoint,
            pad_for_tp=self.pad_for_tp,
            gguf=engine.needs_gguf,
            format=self.format,
        )
        weights = model_weights(model, asked)
        if unread := engine.refusal(weights):
            raise PlanError(f"--engine {engine.name}: {unread}", hint=f"--engine {' or '.join(readers(weights))}")
        if weights.head:  # of a checkpoint that unties it, say
            model = replace(model, spec=replace(model.spec, tie_word_embeddings=False))
        if self.pad_for_tp is not None:
            model = replace(model, spec=replace(model.spec, intermediate_size=weights.intermediate_size))
        template = Workload(
            1,
            self.batch_size,
            kv_dtype=self.kv_cache_dtype,
            prefill_chunk=self.prefill_chunk,
            max_num_seqs=self.max_num_seqs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enforce_eager=self.enforce_eager,
        )
        if self.enforce_eager and not engine.eager_flag:
            raise UsageError(f"--enforce-eager is for servers, and {engine.name} is not one", hint="leave it out")
        rig = self.rig or (None if self.gpu is None else parse_rig(self.gpu))
        if rig is None and (self.ram or self.reserve):
            name = "--reserve" if self.reserve else "--ram"
            raise UsageError(f"{name} needs a rig, and none was given", hint="name it with --gpu, or leave it out")
        if rig and self.ram:
            rig = replace(rig, host_bytes=parse_memory(self.ram))
            if rig.unified_bytes and (rig.host_bytes or 0) > rig.unified_bytes:
                raise UsageError(
                    f"--ram is {self.ram}, but {rig.label} has {format_gib(rig.unified_bytes)}, shared with its GPU",
                    hint="leave --ram out",
                )
        if rig and self.reserve:
            rig = reserved(rig, parse_size(self.reserve))
        engine.check_ranks(self.tensor_parallel_size)
        return Resolved(model, weights, engine, rig, template, self.tensor_parallel_size)

    def _check_ways(self) -> None:
        """UsageError for several ways at once to say which weights."""
        ways = {"--target-size": self.target_size, "--recipe": self.recipe, "--checkpoint": self.checkpoint}
        scheme = {"--bits": self.bits, "--group-size": self.group_size, "--format": self.format or None}
        given = [name for name, value in ways.items() if value is not None]
        if given:
            given = [name for name, value in scheme.items() if value is not None] + given
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other", hint="give one of them")
        if self.pad_for_tp is not None and self.pad_for_tp < 1:
            raise UsageError(f"--pad-for-tp is {self.pad_for_tp}, wanted at least 1")


def parse_memory(text: str) -> int:
    """Bytes of `64GB` of memory, whose gigabytes are binary; UsageError otherwise."""
    match = re.fullmatch(r"\s*(\d{1,5}(?:\.\d{1,2})?)\s*gi?b\s*", text, re.I)
    if not match or not 1 <= float(match[1]) <= 65536:
        raise UsageError(f"--ram is {text[:40]!r}, wanted a size", hint="write for instance 64GB")
    return round(float(match[1]) * GIB)


def parse_parameters(text: str) -> float:
    """72.7e9 of `72.7B`; UsageError otherwise."""
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].isalpha() else (text, "")
    factors = {"": 1.0, "M": 1e6, "B": 1e9, "T": 1e12}
    try:
        value = float(number) * factors[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < 1e15:
        raise UsageError(f"not a number of parameters: {text[:40]!r}", hint="write for instance 72.7B")
    return value


def contexts_of(question: Resolved, text: str) -> list[int]:
    """Contexts asked for, checked against the model; without a list 1k, 8k, 32k and 128k as far as the model goes."""
    spec = question.spec
    if not text:
        return [c for c in DEFAULT_CONTEXTS if c <= spec.extended_context] or [spec.extended_context]
    contexts = list(dict.fromkeys(parse_tokens(part) for part in text.split(",")))
    if len(contexts) > MAX_CONTEXTS:
        raise UsageError(f"{len(contexts)} contexts, wanted at most {MAX_CONTEXTS}")
    for context in contexts:
        check_context(spec, replace(question.template, context=context))
    return contexts


def context_of(question: Resolved, text: str) -> int:
    """The one context asked for; without it 8k, or as far as the model goes."""
    if not text:
        return default_context(question.spec)
    contexts = contexts_of(question, text)
    if len(contexts) != 1:
        raise UsageError("wanted one context", hint="`qwenq vram` accepts several")
    return contexts[0]


@dataclass(frozen=True)
class Spread:
    """Estimates of one question over several contexts."""

    question: Resolved
    estimates: tuple[MemoryEstimate, ...]

    def to_json(self) -> dict[str, Any]:
        q = self.question
        return {
            "model": q.spec.name,
            "engine": q.engine.label,
            "weights": q.weights.to_json(),
            "rig": q.rig.label if q.rig else None,
            "notes": [q.engine.version_note] if q.engine.version_note else [],
            "estimates": [found.to_json() for found in self.estimates],
        }

    def csv_rows(self) -> Iterator[list[Any]]:
        for found in self.estimates:
            for index, gpu in enumerate(found.gpus):
                for t in gpu.terms:
                    yield [
                        found.work.context, index, gpu.name, t.name, t.n_bytes, t.low_bytes, t.high_bytes,
                        t.provenance, t.source,
                    ]  # fmt: skip

    def text(self, colour: bool = False) -> list[str]:
        """Heading, a table per GPU kind, where each term comes from, and the chart."""
        q, first = self.question, self.estimates[0]
        lines = [
            f"{q.spec.name}: {q.weights.label}, {format_gb(q.weights.total_bytes)} of weights; {q.engine.label}; "
            f"KV {q.template.kv_dtype}, {first.kv_bytes_per_token:,.0f} bytes per token; batch {q.template.batch}",
            "",
        ]
        lines += self._table()
        lines += ["", *memory_chart(self.estimates, colour), "", "Where the figures come from:"]
        sources = {t.name: t for found in self.estimates for gpu in found.gpus for t in gpu.terms}
        lines += [f"  {TERM_NAMES[name]:<15} {t.provenance:<9} {t.source}" for name, t in sources.items()]
        if q.rig:
            kinds = {gpu.name: gpu for gpu in q.rig.gpus}
            lines += [f"  limit of {gpu.name}: {gpu.limit_source}" for gpu in kinds.values() if not q.rig.free_bytes]
            lines += [f"  {gpu.name}: memory is shared with the system" for gpu in kinds.values() if gpu.unified]
        if q.engine.version_note:
            lines.append(f"  {q.engine.version_note}")
        return lines

    def _table(self) -> list[str]:
        q = self.question
        names = [n for n in TERM_NAMES if any(g.term(n) for found in self.estimates for g in found.gpus)]
        short = {"kv_cache": "KV", "activations": "activ.", "dequantization": "dequant.", "graphs": "graphs"}
        short |= {"non_torch": "libs", "context": "CUDA"}
        head = [short.get(name, TERM_NAMES[name]) for name in names]
        rows: list[list[str] | str] = [["GiB per GPU", "context", *head, "total", "range", "fits" if q.rig else ""]]
        for found in self.estimates:
            for index, gpu in enumerate(found.gpus):
                cells = [f"{n_bytes / GIB:.2f}" for n_bytes in (*map(gpu.term, names), gpu.total_bytes)]
                span = f"{gpu.low_bytes / GIB:.2f}-{gpu.high_bytes / GIB:.2f}"
                fits = {None: "", True: "yes", False: "no"}[gpu.fits]
                rows.append([f"{index} {gpu.name}", format_tokens(found.work.context), *cells, span, fits])
            if found.kv_capacity_tokens is not None:
                rows.append(f"  {q.engine.title}'s KV cache holds {found.kv_capacity_tokens} tokens")
        widths = [max(map(len, column)) for column in zip(*(row for row in rows if isinstance(row, list)), strict=True)]
        return [row if isinstance(row, str) else _aligned(row, widths) for row in rows]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """The first cell at the left of its column, the others at the right."""
    first, *rest = (
        f"{cell:{'<' if k == 0 else '>'}{width}}" for k, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return " ".join([first, *rest]).rstrip()


def spread(question: Resolved, contexts: Sequence[int]) -> Spread:
    """The question answered at each context: in the rig's best layout, or on one notional GPU without a rig."""
    cases = map(question.at, contexts)
    return Spread(question, tuple(question.engine.estimate(case, question.tensor_parallel) for case in cases))


_WIDTH = 52  # characters of a bar
# ASCII letter and ANSI colour of each term
MARKS = {
    "weights": ("#", 34),
    "kv_cache": ("=", 32),
    "activations": ("+", 33),
    "logits": ("l", 35),
    "dequantization": ("d", 36),
    "graphs": ("g", 95),
    "non_torch": ("n", 94),
    "context": ("c", 90),
    "slack": (".", 37),
}


def memory_chart(estimates: Sequence[MemoryEstimate], colour: bool) -> list[str]:
    """Lines of the chart: for each kind of GPU in use, a bar for every context.

    Equal GPUs are shown once, by the fullest of them. Plain text holds letters, colour holds blocks.
    """
    lines: list[str] = []
    names = dict.fromkeys(gpu.name for gpu in estimates[0].gpus if gpu.terms)
    seen: set[str] = set()
    for name in names:
        bars = [max((g for g in found.gpus if g.name == name), key=lambda g: g.total_bytes) for found in estimates]
        limit = bars[0].limit_bytes
        scale = max([gpu.total_bytes for gpu in bars] + ([limit] if limit else [])) * 1.02
        count = sum(gpu.name == name for gpu in estimates[0].gpus)
        title = f"{count}x {name}, the fullest" if count > 1 else name
        lines.append(title + (f"; | is the limit, {limit / GIB:.2f} GiB" if limit else ""))
        for found, gpu in zip(estimates, bars, strict=True):
            bar = _bar(gpu, scale, limit, colour)
            over = " over" if gpu.fits is False else ""
            lines.append(f"{format_tokens(found.work.context):>7} {bar} {gpu.total_bytes / GIB:7.2f} GiB{over}")
            seen |= {term.name for term in gpu.terms}
    legend = [f"{_painted(MARKS[name], colour)} {TERM_NAMES[name]}" for name in MARKS if name in seen]
    return lines + ["        " + "  ".join(legend[k : k + 4]) for k in range(0, len(legend), 4)]


def _bar(gpu: GpuMemory, scale: float, limit: int | None, colour: bool) -> str:
    cells: list[str] = []
    reached = 0
    for term in gpu.terms:
        reached += term.n_bytes
        cells += [_painted(MARKS[term.name], colour)] * (round(reached / scale * _WIDTH) - len(cells))
    cells += [" "] * (_WIDTH - len(cells))
    if limit is not None:
        cells[min(_WIDTH - 1, round(limit / scale * _WIDTH))] = "\x1b[1;31m|\x1b[0m" if colour else "|"
    return "".join(cells)


def _painted(mark: tuple[str, int], colour: bool) -> str:
    return f"\x1b[{mark[1]}m█\x1b[0m" if colour else mark[0]
