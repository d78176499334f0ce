"""Engines: an object for each, with everything the planner knows of it, and the registry of their names.

An engine is a class of one file here: a `LayeredEngine`, which runs whole layers GPU after GPU, or a `ServerEngine`,
whose tensor and pipeline parallel ranks fill a part of each GPU with KV cache. docs/adding-an-engine.md says how to add
one.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Protocol, TypedDict

from qwenq.errors import HonestNo, PlanError, UsageError
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Share, Workload, rank_shares
from qwenq.planning.escapes import Escape, Serving, serving
from qwenq.planning.memory import Allowance, MemoryEstimate, Term, context_term, estimate
from qwenq.planning.placement import (
    Costs,
    Layout,
    ParallelOption,
    Placement,
    RankLayout,
    best_option,
    cutting_reasons,
    how_split,
    parallel_options,
    place,
    search_context,
    splits,
)
from qwenq.planning.plan import HostMemory, Plan
from qwenq.planning.rig import Gpu
from qwenq.planning.speed import MATRIX_RATE, SpeedFit
from qwenq.planning.weights import Weights, allocated_groups, recipe_weights
from qwenq.units import GIB, format_gb, format_gib, format_tokens

Version = tuple[int, ...]
SIXTEEN_BIT = ("auto", "fp16", "bf16")  # KV caches of 2 bytes a value


@dataclass(frozen=True)
class Engine(ABC):
    """An engine at a version; `libraries` holds the versions of what it loads (`autogptq`, `gptqmodel`, `autoawq`)."""

    name: ClassVar[str]
    latest: ClassVar[Version]  # the newest that the facts were checked for
    oldest: ClassVar[Version] = ()  # and the oldest
    kv_dtypes: ClassVar[Mapping[str, float]]  # bytes of a cached value, scales included
    title: ClassVar[str] = ""  # as its authors write it; empty: as `name`
    versioned: ClassVar[bool] = True  # the label names the version
    smaller_kv: ClassVar[str] = ""  # the KV dtype to offer in place of 16 bits
    own_chunk: ClassVar[int] = 0  # prompt tokens computed at once; 0: the whole prompt
    chunk_word: ClassVar[str] = "prefill chunk"
    needs_gguf: ClassVar[bool] = False  # it loads GGUF files, not what `quantize` writes
    unread: ClassVar[Mapping[str, str]] = {}  # method of weights -> why it does not load them
    vendors_without: ClassVar[tuple[str, ...]] = ("intel", "apple")  # whose GPUs it does not run on
    rocm_tried: ClassVar[bool] = False
    layered: ClassVar[bool] = True  # layers on different GPUs run one after the other (no tensor parallelism)
    host_layers_stay: ClassVar[bool] = False  # the CPU computes layers in host memory; else they move to the first GPU
    host_layers_first: ClassVar[bool] = False  # layers in host memory are a model's first ones, not its last
    copies_tied_head: ClassVar[bool] = False  # and keeps the embedding elsewhere
    states_peak: ClassVar[bool] = False  # published runs of it state torch's allocator peak
    stages: ClassVar[bool] = True  # of a server: pipeline parallelism too, or only tensor parallelism
    spared_stages: ClassVar[int] = 0  # last stages without one of the layers left over of an even division
    started: ClassVar[bool] = False  # `qwenq serve` starts it
    context_flag: ClassVar[str] = ""  # of a server's command
    utilization_flag: ClassVar[str] = ""
    eager_flag: ClassVar[str] = ""  # of a server's command that leaves out CUDA graphs
    requests_flag: ClassVar[str] = ""  # and for sequences at once

    version: Version
    libraries: tuple[tuple[str, Version], ...] = ()

    @property
    def label(self) -> str:
        """`transformers 4.46.0`; `llama.cpp`."""
        name = self.title or self.name
        return f"{name} {'.'.join(map(str, self.version))}" if self.versioned else name

    @property
    def version_note(self) -> str:
        """A note that this version has not been checked and which one is used instead; empty if it has."""
        if not self.versioned or not self.oldest:
            return ""
        if self.version[: len(self.latest)] > self.latest:
            counted = self.latest
        elif self.version < self.oldest:
            counted = self.oldest
        else:
            return ""
        shown, known = (".".join(map(str, version)) for version in (self.version, counted))
        return f"{self.title or self.name} {shown} has not been checked: counted as {known}"

    def kv_bytes(self, kv_dtype: str) -> float:
        """Bytes of one cached value; UsageError when it is not planned with such a cache."""
        if kv_dtype not in self.kv_dtypes:
            said = f"{self.name} is not planned with KV cache dtype {kv_dtype!r}"
            raise UsageError(said, hint=f"one of {', '.join(self.kv_dtypes)}")
        return self.kv_dtypes[kv_dtype]

    def refusal(self, weights: Weights) -> str:
        """Why it does not load such weights; empty when it does."""
        return self.unread.get(weights.method, "")

    def contradiction(self, work: Workload) -> str:
        """Why it does not start with such settings, whatever the weights; empty when it does."""
        return ""

    def prefill_chunk(self, work: Workload) -> int:
        """Prompt tokens computed at once: as asked, or its own."""
        return min(work.prompt_tokens, work.prefill_chunk or self.own_chunk or work.prompt_tokens)

    @property
    def least_capability(self) -> tuple[int, int]:
        """The lowest compute capability of NVIDIA's that it runs on."""
        return 0, 0

    def barred(self, gpu: Gpu) -> str:
        """Why it does not run on such a GPU at all; empty where it does, and where the capability is unknown."""
        said = f"{self.title or self.name} does not run on {gpu.name}"
        if gpu.vendor in self.vendors_without:
            return said
        has, needs = gpu.compute_capability, self.least_capability
        if has is None or has >= needs:
            return ""
        return f"{said}: compute capability {has[0]}.{has[1]}, {self.label} needs {needs[0]}.{needs[1]}"

    def cache_barred(self, work: Workload, gpu: Gpu) -> str:
        """Why it has no such KV cache on such a GPU; empty where it does, and where the capability is unknown."""
        return ""

    def runs_on(self, gpu: Gpu) -> bool:
        return not self.barred(gpu)

    def notes(self, case: Case, gpu: Gpu) -> list[str]:
        """Remarks on running a case on a kind of GPU."""
        return []

    def with_profile(self, path: Path) -> Engine:
        """The engine with its memory corrected by measurements, a file; UsageError where none can be."""
        raise UsageError(f"--profile corrects this project's own engine, not {self.name}")

    def kept(self, weights: Weights, work: Workload, gpu: Gpu) -> Weights:
        """Weights as the engine keeps them on `gpu`: about as stored, in all but this project's own."""
        return weights

    @abstractmethod
    def terms(self, case: Case, share: Share, gpu: Gpu) -> tuple[tuple[Term, ...], str]:
        """Memory of one GPU that holds `share`, at its worst moment, and the name of that moment."""

    def layer_costs(self, case: Case, share: Share, gpu: Gpu) -> Callable[[range], int]:
        """Bytes of all terms by the layers that a GPU holds, for shares that are otherwise like `share`."""

        @cache
        def cost(layers: range) -> int:
            return sum(term.n_bytes for term in self.terms(case, replace(share, layers=layers), gpu)[0])

        return cost

    def alike(self, case: Case, gpu: Gpu) -> Hashable:
        """A key that GPUs have in common of which the terms of the case are the same."""
        return gpu.name

    def allowance(self, case: Case, shares: Sequence[Share], needed: Sequence[tuple[Term, ...]]) -> Allowance:
        """Bytes it may take of each of the rig's GPUs, which need the terms `needed`."""
        return Allowance(case.hardware.limits)

    def asked_part(self, case: Case, shares: Sequence[Share] = ()) -> float:
        """The part of each GPU to begin with; without `shares` of tensor parallel ranks."""
        return 1.0

    @abstractmethod
    def speed_fit(self, weights: Weights) -> SpeedFit:
        """Constants of its speed with such weights, or their stand-in where nobody published a run."""

    def run_fit(self, case: Case, shares: Sequence[Share]) -> SpeedFit:
        """The same for one case and split, where kernels differ by these."""
        return self.speed_fit(case.weights)

    def matrix_rate(self, gpu: Gpu) -> float:
        """The part of a GPU's dense tensor rate that it reaches in prefill."""
        return MATRIX_RATE

    def moved_in_attention(self, spec: ModelSpec, tokens: int) -> float:
        """Bytes a layer moves in one step beside its weights and cache, which holds `tokens`."""
        return 0

    @abstractmethod
    def layout(self, case: Case) -> Layout:
        """The best way to use the case's rig."""

    @abstractmethod
    def estimate(self, case: Case, ranks: int = 0) -> MemoryEstimate:
        """Memory in the best layout, without a rig on one GPU; `ranks`: tensor parallel size where it is asked for."""

    @abstractmethod
    def longest_context(self, case: Case) -> int:
        """Most tokens a sequence can have with everything on the GPUs, at most the model's own limit; 0 when none."""

    @abstractmethod
    def how_held(self, case: Case) -> str:
        """The layout on the rig: `one GPU`, `layers split`, `TP 2 x PP 1`; empty if the case does not fit."""

    def rig_finder(self) -> RigFinder:
        """A RigFinder for one case."""
        return self

    def check_ranks(self, ranks: int) -> None:
        """UsageError for a tensor parallel size that it cannot have."""
        if ranks < 0:
            raise UsageError(f"tensor parallel size is {ranks}, wanted at least 1")

    def cache_notes(self, memory: MemoryEstimate) -> list[str]:
        """Remarks on a cache whose size the engine decides."""
        return []

    @abstractmethod
    def served(self, case: Case) -> Case:
        """The case as a server would have it: this engine when it is one, else the server plans show beside it."""

    @abstractmethod
    def instead(self, case: Case, longest: int, escapes: Sequence[Escape]) -> Iterator[str]:
        """Changes with which a case that does not fit would; `longest`: its longest context, 0 when none."""

    def uniform_instead(self, case: Case) -> Iterator[str]:
        """Plain 4 bits, where they are lighter and fit."""
        if self.needs_gguf or any(lin.in_features % 128 for lin in case.spec.layer_linears(0)):
            return
        uniform = recipe_weights(case.spec, Recipe(Scheme(4, 128)))
        if uniform.total_bytes < case.weights.total_bytes and self.how_held(replace(case, weights=uniform)):
            yield f"uniform 4-bit g128, {format_gb(uniform.total_bytes)}, at {format_tokens(case.work.context)}"

    def command(self, plan: Plan) -> str:
        """Lines to paste that carry out a plan, one of another engine too; empty: `qwenq run` does."""
        return ""


class RigFinder(Protocol):
    """Layout and longest context of one case on many rigs."""

    def how_held(self, case: Case) -> str: ...

    def longest_context(self, case: Case) -> int: ...


class LayerFinder:
    """Keeps costs by context between rigs; contexts in steps: 1,024 tokens up to 16k, 2,048 to 32k, 4,096 beyond."""

    STEPS: ClassVar[tuple[int, ...]] = (*range(1024, 16384, 1024), *range(16384, 32768, 2048))

    def __init__(self) -> None:
        self.costs: dict[int, Costs] = {}

    def _splits(self, case: Case) -> bool:
        return splits(case, self.costs.setdefault(case.work.context, {}))

    def how_held(self, case: Case) -> str:
        return how_split(case) if self._splits(case) else ""

    def longest_context(self, case: Case) -> int:
        asked, limit = case.work.context, case.spec.extended_context
        steps = [step for step in (*self.STEPS, *range(32768, limit, 4096)) if asked < step < limit]
        found = bisect_left([*steps, limit], True, key=lambda context: not self._splits(case.at(context)))
        return [asked, *steps, limit][found]


class LayeredEngine(Engine):
    """An engine that splits whole layers over GPUs, which run one after the other."""

    def layout(self, case: Case) -> Layout:
        return place(case)

    def estimate(self, case: Case, ranks: int = 0) -> MemoryEstimate:
        self.check_ranks(ranks)
        return estimate(case) if case.rig is None else place(case).memory

    def longest_context(self, case: Case) -> int:
        return search_context(lambda context: splits(case.at(context)), case.spec.extended_context)

    def how_held(self, case: Case) -> str:
        return how_split(case) if splits(case) else ""

    def rig_finder(self) -> RigFinder:
        return LayerFinder()

    def check_ranks(self, ranks: int) -> None:
        super().check_ranks(ranks)
        if ranks:
            raise UsageError(f"{self.name} has no tensor parallelism here", hint=f"--engine {SERVER} has")

    def served(self, case: Case) -> Case:
        server = get_engine(SERVER)
        assert isinstance(server, ServerEngine)
        return server.adopted(case)

    def host_comment(self, placement: Placement) -> list[str]:
        """A comment above a command whose layers in host memory do not fit in what was told of it."""
        host = HostMemory.of(placement) if placement.host_layers else None
        return [f"# host memory: {host.said}"] if host is not None and host.fits is False else []

    def instead(self, case: Case, longest: int, escapes: Sequence[Escape]) -> Iterator[str]:
        if longest:
            yield f"a context of {format_tokens(longest)} with these weights"
        smaller = self.smaller_kv
        if smaller and case.work.kv_dtype in SIXTEEN_BIT and self.how_held(case.asking(kv_dtype=smaller)):
            yield f"--kv-cache-dtype {smaller} at {format_tokens(case.work.context)}"
        if not (self.own_chunk or case.work.prefill_chunk) and self.how_held(case.asking(prefill_chunk=1024)):
            yield "--prefill-chunk 1024 (the prompt in pieces)"
        yield from self.uniform_instead(case)


class ServerEngine(Engine):
    """An engine of tensor x pipeline parallel ranks, each of which fills its part of a GPU with KV cache.

    The part holds the terms `inside` and the cache; the terms `outside` come on top of it.
    """

    layered: ClassVar[bool] = False
    chunk_flag: ClassVar[str] = ""  # and prompt tokens at once
    block_tokens: ClassVar[int] = 1  # the cache is made of

    @property
    @abstractmethod
    def inside(self) -> tuple[str, ...]:
        """Names of the terms in the part."""

    @property
    @abstractmethod
    def outside(self) -> tuple[str, ...]:
        """Names of the terms on top of it."""

    @property
    def outside_said(self) -> str:
        """The same to read."""
        return "CUDA graphs and context"

    @abstractmethod
    def own_part(self, case: Case, share: Share, gpu: Gpu) -> float:
        """The part of a GPU that it takes when none is asked for, of `part_of`."""

    def asked_part(self, case: Case, shares: Sequence[Share] = ()) -> float:
        """The requested part of a GPU, or the default on the GPU in use where it is smallest."""
        gpus = case.hardware.gpus
        pairs = zip(shares or rank_shares(case.spec, len(gpus)), gpus, strict=True)
        return case.work.gpu_memory_utilization or min(self.own_part(case, s, gpu) for s, gpu in pairs if s.used)

    def part_of(self, terms: Sequence[Term], total: int, free: int) -> int:
        """Bytes that the part is counted of: a GPU's `total`, of which `free` bytes are to be had."""
        return total

    def inside_bytes(self, terms: Sequence[Term]) -> int:
        """Bytes of a part before the cache gets the rest."""
        names = self.inside
        return sum(t.n_bytes for t in terms if t.name in names)

    def outside_bytes(self, terms: Sequence[Term]) -> int:
        names = self.outside
        return sum(t.n_bytes for t in terms if t.name in names)

    def allowance(self, case: Case, shares: Sequence[Share], needed: Sequence[tuple[Term, ...]]) -> Allowance:
        """One part for all GPUs, as asked or, rounded down, as much as leaves each its `outside` bytes.

        A server fills its part with KV cache whatever the context, so with more it would run out of memory later.
        """
        gpus, free = case.hardware.gpus, case.hardware.limits
        bases = [self.part_of(terms, gpu.limit_bytes, n) for terms, gpu, n in zip(needed, gpus, free, strict=True)]
        used = [index for index, share in enumerate(shares) if share.used]
        asked = self.asked_part(case, shares)
        room = min((free[k] - self.outside_bytes(needed[k])) / bases[k] for k in used)
        part = max(0.0, min(asked, math.floor(1000 * room) / 1000))
        left = [bases[k] * part - self.inside_bytes(needed[k]) for k in used]
        capacity = min(self._cache_tokens(case, shares[k], n) for k, n in zip(used, left, strict=True))
        limits = (round(base * part) + self.outside_bytes(t) for base, t in zip(bases, needed, strict=True))
        return Allowance(tuple(limits), capacity, part, asked)

    def cache_room(self, case: Case, shares: Sequence[Share]) -> tuple[int, int]:
        """Tokens and bytes per GPU of the KV cache in the part that is asked for, whatever finds room beside it."""
        gpus, free = case.hardware.gpus, case.hardware.limits
        needed = [self.terms(case, share, gpu)[0] for share, gpu in zip(shares, gpus, strict=True)]
        asked = self.asked_part(case, shares)
        left = [
            asked * self.part_of(terms, gpu.limit_bytes, n) - self.inside_bytes(terms)
            for terms, gpu, n in zip(needed, gpus, free, strict=True)
        ]
        tokens = min(self._cache_tokens(case, share, n) for share, n in zip(shares, left, strict=True))
        return tokens, max(0, round(min(left)))

    def token_bytes(self, case: Case, share: Share) -> int:
        """KV bytes of one token on one rank; heads are copied when there are fewer than ranks."""
        heads = max(1, case.spec.num_key_value_heads // share.ranks)
        return int(2 * len(share.layers) * heads * case.spec.head_dim * case.kv_bytes)

    def cache_bytes(self, case: Case, share: Share) -> int:
        """KV bytes of one rank for the whole batch, in whole blocks."""
        blocks = -(-case.work.context // self.block_tokens) * case.work.batch
        return blocks * self.block_tokens * self.token_bytes(case, share)

    def _cache_tokens(self, case: Case, share: Share, left: float) -> int:
        """Tokens that `left` bytes hold on one rank, in whole blocks; 0 when nothing is left."""
        per_block = self.block_tokens * self.token_bytes(case, share)
        return max(0, int(left // per_block)) * self.block_tokens if per_block else 0

    def rank_weights(self, case: Case, share: Share) -> int:
        """Bytes of a rank's weights: fused linears cut by rank, norms whole, one rotary table; allocator rounding."""
        known = case.weights.by_share
        if (share, case.spec) not in known:
            known[share, case.spec] = self._rank_weights(case, share)
        return known[share, case.spec]

    def _rank_weights(self, case: Case, share: Share) -> int:
        spec, weights, r = case.spec, case.weights, share.ranks
        stored = weights.stored_spec(spec)
        shapes = [sum(lin.parameters for lin in stored.stage_linears(0, stage)) for stage in spec.architecture.stages]

        @cache
        def layer(n_bytes: int) -> tuple[int, ...]:
            parts = ((round(n_bytes / sum(shapes) * shape / r), shape // r) for shape in shapes)
            return tuple(size for part in parts for size in _fused_tensors(weights, *part))

        first = tuple(part // r for part in weights.embed)
        last: tuple[int, ...] = ()
        if share.head:
            last = (*weights.norm, *(part // r for part in weights.head))
            if not weights.head and not share.embed:
                last += first  # a tied head on another stage is a copy
        layers = [layer(weights.layer_bytes[index]) for index in share.layers]
        rotary = 2 * spec.max_position_embeddings * spec.head_dim
        return sum(allocated_groups([first if share.embed else (), *layers, (*last, rotary)]))

    def layout(self, case: Case) -> Layout:
        """The best ranks that the shapes allow; stages alone where they allow none."""
        best = best_option(parallel_options(case))
        if best is None or best.memory is None:
            shares = rank_shares(case.spec, 1, len(case.hardware.gpus), self.spared_stages)
            return RankLayout(shares, estimate(case, shares), None)
        shares = rank_shares(case.spec, best.tensor, best.pipeline, self.spared_stages)
        return RankLayout(shares, best.memory, best)

    def estimate(self, case: Case, ranks: int = 0) -> MemoryEstimate:
        return estimate(case, rank_shares(case.spec, *self._ranks(case, ranks), self.spared_stages))

    def _ranks(self, case: Case, asked: int) -> tuple[int, int]:
        """(tensor, pipeline) ranks: as asked, else the best the rig and the shapes allow; PlanError when none is."""
        self.check_ranks(asked)
        count = len(case.rig.gpus) if case.rig else asked or 1
        if asked:
            reasons = cutting_reasons(case.spec, case.weights, asked)
            if count % asked:
                reasons.append(f"the number of GPUs, {count}, is not divisible by {asked}")
            elif count > asked and not self.stages:
                reasons.append(f"{count} GPUs would be {count // asked} stages, {self.title} has none")
            if reasons:
                raise PlanError(f"tensor parallel size {asked} is not possible: {reasons[0]}")
            return asked, count // asked
        if case.rig is None:
            return 1, 1
        options = parallel_options(case)
        option = best_option(options)
        if option is None:
            raise PlanError(
                f"{self.title} cannot use {case.rig.label}: {options[0].reasons[0]}",
                hint="`qwenq plan` says why for every layout",
            )
        return option.tensor, option.pipeline

    def longest_context(self, case: Case) -> int:
        """In the layout that has the longest."""
        options = [option for option in parallel_options(case) if not option.reasons]
        return max((option.longest_context(case) for option in options), default=0)

    def how_held(self, case: Case) -> str:
        if case.weights.total_bytes > sum(case.hardware.limits):
            return ""
        layout = self.layout(case)
        return layout.how if layout.fits else ""

    def served(self, case: Case) -> Case:
        return case

    def adopted(self, case: Case) -> Case:
        """A case of another engine under this one: with its own chunks, and the nearest KV cache it has."""
        kv = case.work.kv_dtype if case.work.kv_dtype in self.kv_dtypes else self.smaller_kv
        return replace(case, engine=self, work=replace(case.work, kv_dtype=kv, prefill_chunk=0))

    def serving(self, plan: Plan) -> Serving:
        """A plan's own ranks where they are of this engine, else those it would have."""
        own = plan.serving.case.engine.name == self.name
        return plan.serving if own else serving(self.adopted(plan.case))

    def instead(self, case: Case, longest: int, escapes: Sequence[Escape]) -> Iterator[str]:
        yield from (escape.text for escape in escapes)
        yield from self.uniform_instead(case)

    def cache_notes(self, memory: MemoryEstimate) -> list[str]:
        """Notes on the tokens the cache holds, and on memory outside the share if it is less than requested."""
        lines = [f"{self.title}'s KV cache would hold {memory.kv_capacity_tokens} tokens"]
        asked, part = memory.asked_utilization, memory.gpu_memory_utilization
        if asked is not None and part is not None and part != asked:
            outside = max(self.outside_bytes(gpu.terms) for gpu in memory.gpus)
            lines.append(
                f"{self.title} can have {part:g} of each GPU, not {asked:g}: {self.outside_said} come on top, "
                + format_gib(outside)
            )
        return lines

    @abstractmethod
    def words(self, case: Case, option: ParallelOption, checkpoint: str) -> list[str]:
        """The words of the command that serves `checkpoint` so."""

    def limit_words(self, work: Workload, option: ParallelOption) -> list[str]:
        """Words of the command for context, part of a GPU and cache, and for the limits that were asked for."""
        assert option.memory is not None  # else its shapes are not possible
        words = [self.context_flag, str(work.context)]
        words += [self.utilization_flag, f"{option.memory.gpu_memory_utilization:g}"]
        if self.kv_bytes(work.kv_dtype) < 2:
            words += ["--kv-cache-dtype", work.kv_dtype]
        if work.max_num_seqs:
            words += [self.requests_flag, str(work.max_num_seqs)]
        if work.enforce_eager:
            words.append(self.eager_flag)
        if work.prefill_chunk:
            words += [self.chunk_flag, str(work.prefill_chunk)]
        return words

    def command(self, plan: Plan) -> str:
        """A command that fits, after a comment on what had to be changed; only a comment where none does."""
        for gpu in plan.case.hardware.gpus:
            if barred := self.barred(gpu):
                return f"# {barred}"
        if unread := self.refusal(plan.case.weights):
            return f"# {unread}"
        found = self.serving(plan)
        case, option = found.case, found.chosen
        reason = (option or found.options[0]).verdict
        if option is not None and option.works:
            lines = self._part_note(option)
        elif found.escapes:
            escape = found.escapes[0]
            case, option = replace(case, work=escape.work), escape.option
            lines = [f"# does not fit as asked ({reason}); fits with {escape.text}"]
        else:
            return f"# {self.title} does not fit with the flags planned here: {reason}"
        lines += [f"# {note}" for note in noted(case) if note not in plan.notes]
        words = self.words(case, option, case.weights.place or "CHECKPOINT")
        return "\n".join([*lines, pci_order(case) + shlex.join(words)])

    def _part_note(self, option: ParallelOption) -> list[str]:
        """A comment where the server can have less of a GPU than asked."""
        assert option.memory is not None  # else its shapes are not possible
        part, asked = option.memory.gpu_memory_utilization, option.memory.asked_utilization
        if part == asked:
            return []
        return [f"# {self.utilization_flag} {part:g}, not {asked:g}: {self.outside_said} come on top of it"]

    def plan_words(self, plan: Plan, checkpoint: str, hosts: int = 1) -> list[str]:
        """`words` for a plan of this engine that works; HonestNo, with the reason, for one that does not.

        On several hosts tensor parallelism stays inside a host, whose GPUs are the rig's first 1/`hosts`.
        """
        found, case = plan.serving, plan.case
        inside = len(case.hardware.gpus) // hosts
        options = [option for option in found.options if option.works and inside % option.tensor == 0]
        if not options:
            hint = f"`qwenq plan --engine {self.name}` shows every layout; --engine qwenq places layers freely"
            if found.escapes and hosts == 1:
                hint = f"`qwenq plan --engine {self.name}` prints a command with {found.escapes[0].text}"
            raise HonestNo(
                f"{self.title} cannot serve {case.weights.label} at a context of {case.work.context} on "
                f"{case.hardware.label}: " + (found.chosen or found.options[0]).verdict,
                hint=hint,
            )
        chosen = found.chosen if found.chosen in options else max(options, key=lambda option: option.tensor)
        assert chosen is not None
        return self.words(case, chosen, checkpoint)


def _fused_tensors(weights: Weights, n_bytes: int, parameters: int) -> list[int]:
    """A rank's part of a fused linear, `n_bytes`, tensor by tensor: codes, scales of 16 bits, the rest.

    Each is rounded by the allocator on its own, 0.06 GiB of 40 layers.
    """
    if weights.bits == 16 or weights.group_size <= 0:
        return [n_bytes]
    codes, scales = parameters * weights.bits // 8, 2 * parameters // weights.group_size
    rest = n_bytes - codes - scales
    return [codes, rest, scales] if rest >= 0 else [n_bytes]


def rank_context(share: Share, gpu: Gpu) -> Term:
    """Memory a rank holds before it loads: the CUDA context, and NCCL's own when there are several ranks."""
    base = context_term(gpu.name)
    if share.gpus == 1:
        return base
    extra = round(1.02 * GIB) if "H100" in gpu.name or "H200" in gpu.name else round(0.3 * GIB)
    return Term(
        "context", base.n_bytes + extra, "reported", base.source + "; 1.53 GiB with several H100 (same logs)",
        base.low_bytes, base.high_bytes + round(1.02 * GIB),
    )  # fmt: skip


def noted(case: Case) -> list[str]:
    """The engine's remarks on running a case, once a kind of GPU."""
    return [note for gpu in dict.fromkeys(case.hardware.gpus) for note in case.engine.notes(case, gpu)]


def pci_order(case: Case) -> str:
    """The beginning of a shell line where CUDA might number a rig's GPUs otherwise than the plan."""
    return "CUDA_DEVICE_ORDER=PCI_BUS_ID " if case.hardware.needs_pci_order else ""


class Yarn(TypedDict):
    """YaRN's rope parameters, as transformers names them."""

    rope_type: str
    factor: float
    original_max_position_embeddings: int


def yarn_of(case: Case) -> Yarn | None:
    """YaRN for a context beyond the trained one; none for Llama, whose own scaling stays."""
    original = case.spec.max_position_embeddings
    if case.work.context <= original or case.spec.model_type == "llama":
        return None
    return {
        "rope_type": "yarn",
        "factor": float(-(-case.work.context // original)),
        "original_max_position_embeddings": original,
    }


def yarn_reach(yarn: Yarn) -> int:
    """The context that these parameters give."""
    return round(yarn["factor"] * yarn["original_max_position_embeddings"])


def yarn_words(case: Case, flag: str) -> list[str]:
    """`flag` and the values of config.json that YaRN changes; none without YaRN."""
    if (yarn := yarn_of(case)) is None:
        return []
    return [flag, json.dumps({"rope_scaling": yarn, "max_position_embeddings": yarn_reach(yarn)})]


ENGINES: dict[str, type[Engine]] = {}  # by name, in the order they are offered
SERVER = "vllm"  # whose ranks every plan shows
SHOWN = (SERVER, "transformers", "llama.cpp")  # whose commands every plan shows


def register(engine: type[Engine]) -> type[Engine]:
    """Class decorator: offer an engine by its name."""
    ENGINES[engine.name] = engine
    return engine


def engine_names(*, checkpoints: bool = False) -> str:
    """`qwenq, transformers or vllm`; `checkpoints`: of those alone that load safetensors checkpoints."""
    *names, last = (name for name, kind in ENGINES.items() if not (checkpoints and kind.needs_gguf))
    return f"{', '.join(names)} or {last}"


def readers(weights: Weights) -> list[str]:
    """Names of the engines that load such weights."""
    return [name for name in ENGINES if not get_engine(name).refusal(weights)]


def get_engine(name: str, version: str = "", libraries: Mapping[str, str] | None = None) -> Engine:
    """The engine called `name`, at `version` or the newest one the facts were checked for."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}", hint=f"one of {', '.join(ENGINES)}")
    kind = ENGINES[name]
    found = tuple((library, parse_version(text)) for library, text in (libraries or {}).items())
    return kind(parse_version(version) if version else kind.latest, found)


def parse_version(text: str) -> Version:
    """(4, 46, 0) of `4.46.0`; text after the numbers is ignored."""
    match = re.match(r"\d+(\.\d+)*", text.strip().lstrip("vb"))
    if not match:
        raise UsageError(f"not a version: {text!r}", hint="write for instance 4.46.0")
    return tuple(int(part) for part in match[0].split("."))


def plan_commands(plan: Plan) -> dict[str, str]:
    """Lines to paste, by engine: of those every plan shows, and of the plan's own."""
    own = plan.case.engine
    engines = {name: get_engine(name) for name in SHOWN} | {own.name: own}
    return {name: lines for name, engine in engines.items() if (lines := engine.command(plan))}
