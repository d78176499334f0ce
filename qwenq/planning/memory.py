"""The VRAM estimate: terms of bytes, each with its provenance and range, for every GPU of a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from qwenq.planning.case import Case, Share, Workload, check_context, whole
from qwenq.planning.rig import device
from qwenq.planning.weights import Weights
from qwenq.units import GIB

# exact: follows from shapes and storage alone. fitted: counted from the engine's source or fitted, and checked against
# published measurements. reported: somebody's figure for another setting, or a convention; its range is wide.
Provenance = Literal["exact", "fitted", "reported"]
TERM_NAMES = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "logits": "logits",
    "dequantization": "dequantization",
    "graphs": "CUDA graphs",
    "non_torch": "libraries",
    "context": "CUDA context",
    "slack": "slack",
}
_ORDER = {name: place for place, name in enumerate(TERM_NAMES)}


@dataclass(frozen=True)
class Term:
    """One part of a GPU's memory in bytes, with the range it may have."""

    name: str  # a key of TERM_NAMES
    n_bytes: int
    provenance: Provenance
    source: str
    low_bytes: int = -1
    high_bytes: int = -1

    def __post_init__(self) -> None:
        if self.low_bytes < 0:
            object.__setattr__(self, "low_bytes", self.n_bytes)
        if self.high_bytes < 0:
            object.__setattr__(self, "high_bytes", self.n_bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bytes": self.n_bytes,
            "low_bytes": self.low_bytes,
            "high_bytes": self.high_bytes,
            "provenance": self.provenance,
            "source": self.source,
        }


def ranged(name: str, n_bytes: float, provenance: Provenance, source: str, low: float, high: float) -> Term:
    """A term that lies between `low` and `high` times its bytes."""
    return Term(name, round(n_bytes), provenance, source, round(n_bytes * low), round(n_bytes * high))


@dataclass(frozen=True)
class GpuMemory:
    """Terms of one GPU, and what it offers (None: no limit asked)."""

    name: str
    terms: tuple[Term, ...]
    limit_bytes: int | None
    moment: str  # when the peak is reached

    @property
    def total_bytes(self) -> int:
        return sum(t.n_bytes for t in self.terms)

    @property
    def low_bytes(self) -> int:
        return sum(t.low_bytes for t in self.terms)

    @property
    def high_bytes(self) -> int:
        return sum(t.high_bytes for t in self.terms)

    @property
    def free_bytes(self) -> int | None:
        """Bytes left of the limit; negative when it does not fit."""
        return None if self.limit_bytes is None else self.limit_bytes - self.total_bytes

    @property
    def fits(self) -> bool | None:
        return None if self.limit_bytes is None else self.total_bytes <= self.limit_bytes

    def term(self, name: str) -> int:
        """Bytes of one term, 0 when the GPU has none of it."""
        return sum(t.n_bytes for t in self.terms if t.name == name)

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.name,
            "total_bytes": self.total_bytes,
            "low_bytes": self.low_bytes,
            "high_bytes": self.high_bytes,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "peak_moment": self.moment,
            "terms": [t.to_json() for t in self.terms],
        }


@lru_cache(maxsize=256)
def context_term(name: str) -> Term:
    """CUDA context and loaded kernels of one process on a GPU."""
    if any(part in name for part in ("H100", "H200", "B200", "PRO 6000")):
        return Term(
            "context", round(0.51 * GIB), "reported", "0.51 GiB on H100 (llm-d-planner logs, total minus free)",
            round(0.4 * GIB), round(0.75 * GIB),
        )  # fmt: skip
    return Term(
        "context", round(0.35 * GIB), "reported",
        "256 MiB on 2x RTX 3090 (InvokeAI#9413), 300 to 400 MiB (pytorch#107667), 658 MiB on RTX PRO 6000",
        round(0.25 * GIB), round(0.66 * GIB),
    )  # fmt: skip


def slack_term(dynamic_bytes: int, packed_bytes: int = 0) -> Term:
    """Memory that the caching allocator holds beyond its tensors; no measurement on a GPU for these models.

    `packed_bytes`: weights that were unpacked on the GPU, which leaves holes between them.
    """
    source = "3 % of temporary memory, as unsloth keeps free"
    if packed_bytes:
        source += "; 1 % of packed weights for gaps between them, as traced (reports/runtime.md)"
    low, n_bytes, high = (slack_bytes(dynamic_bytes, packed_bytes, share) for share in (0, 0.03, 0.08))
    return Term("slack", n_bytes, "reported", source, low, high)


def slack_bytes(dynamic_bytes: int, packed_bytes: int = 0, share: float = 0.03) -> int:
    return round(share * dynamic_bytes + 0.01 * packed_bytes)


def merged(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Terms without empty ones, in the order of TERM_NAMES."""
    return tuple(sorted((t for t in terms if t.high_bytes > 0), key=lambda t: _ORDER[t.name]))


NOT_ALLOCATED = ("context", "slack")  # not seen by torch.cuda.max_memory_allocated


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of every GPU in use, in device order, for one case."""

    case: Case
    gpus: tuple[GpuMemory, ...]
    kv_capacity_tokens: int | None = None  # of a server that gives its cache the rest of a GPU
    gpu_memory_utilization: float | None = None  # a server's part of each GPU: as asked, or the most that is possible
    asked_utilization: float | None = None

    @property
    def work(self) -> Workload:
        return self.case.work

    @property
    def weights(self) -> Weights:
        return self.case.weights

    @property
    def kv_bytes_per_token(self) -> float:
        """Over all GPUs, for one sequence."""
        return self.case.spec.kv_bytes_per_token(self.case.kv_bytes)

    @property
    def total_bytes(self) -> int:
        return sum(gpu.total_bytes for gpu in self.gpus)

    @property
    def low_bytes(self) -> int:
        return sum(gpu.low_bytes for gpu in self.gpus)

    @property
    def high_bytes(self) -> int:
        return sum(gpu.high_bytes for gpu in self.gpus)

    @property
    def allocated_bytes(self) -> int:
        """Peak of torch's allocator, summed over GPUs: no CUDA context, no slack."""
        return sum(t.n_bytes for gpu in self.gpus for t in gpu.terms if t.name not in NOT_ALLOCATED)

    @property
    def fits(self) -> bool | None:
        """Whether every GPU's limit holds; None when no rig was given."""
        known = [gpu.fits for gpu in self.gpus]
        return None if None in known else all(known)

    @property
    def certainty(self) -> str:
        """`fits` or `does not fit` over the whole range of need and limit, else `tight`; empty without a rig."""
        limits = [gpu.limit_bytes for gpu in self.gpus]
        slack = self.case.rig.limit_slack if self.case.rig else ((0, 0),) * len(limits)
        known = [
            (gpu, limit - less, limit + more)
            for gpu, limit, (less, more) in zip(self.gpus, limits, slack, strict=True)
            if limit is not None
        ]
        if len(known) < len(limits):
            return ""
        if all(gpu.high_bytes <= low for gpu, low, _ in known):
            return "fits"
        return "does not fit" if any(gpu.low_bytes > high for gpu, _, high in known) else "tight"

    @property
    def tightest(self) -> GpuMemory:
        """The GPU with the least room; without limits the fullest."""
        return min(self.gpus, key=lambda gpu: (gpu.limit_bytes or 0) - gpu.total_bytes if gpu.terms else 1 << 62)

    def term(self, name: str) -> int:
        """Bytes of one term over all GPUs."""
        return sum(gpu.term(name) for gpu in self.gpus)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.case.spec.name,
            "weights": self.weights.to_json(),
            "engine": self.case.engine.label,
            "context": self.work.context,
            "batch_size": self.work.batch,
            "kv_cache_dtype": self.work.kv_dtype,
            "prefill_chunk": self.work.prefill_chunk,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "total_bytes": self.total_bytes,
            "low_bytes": self.low_bytes,
            "high_bytes": self.high_bytes,
            "fits": self.fits,
            "certainty": self.certainty,
            "gpus": [gpu.to_json() for gpu in self.gpus],
        }


class Allowance(NamedTuple):
    """Bytes that an engine may take of each GPU (None: no limit is known), and the cache a server then has."""

    limits: tuple[int | None, ...]
    kv_capacity_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    asked_utilization: float | None = None  # before the GPU's own limit


def estimate(case: Case, shares: Sequence[Share] = ()) -> MemoryEstimate:
    """Needs of `shares` on the case's rig; without shares one GPU holds everything, without a rig there is no limit.

    Raises PlanError for a context beyond the model's limit, UsageError for a KV dtype the engine lacks.
    """
    check_context(case.spec, case.work)
    shares = shares or (whole(case.spec),)
    kinds = case.rig.gpus if case.rig else (device("GPU"),) * len(shares)
    known: dict[tuple[Share, str], tuple[tuple[Term, ...], str]] = {}  # ranks side by side are alike
    for share, gpu in zip(shares, kinds, strict=True):
        if (share, gpu.name) not in known:
            known[share, gpu.name] = case.engine.terms(case, share, gpu) if share.used else ((), "not used")
    needed = [known[share, gpu.name] for share, gpu in zip(shares, kinds, strict=True)]
    allowed = Allowance((None,) * len(shares))
    if case.rig:
        allowed = case.engine.allowance(case, shares, [terms for terms, _ in needed])
    gpus = tuple(
        GpuMemory(gpu.name, terms, limit, moment)
        for gpu, (terms, moment), limit in zip(kinds, needed, allowed.limits, strict=True)
    )
    return MemoryEstimate(
        case, gpus, allowed.kv_capacity_tokens, allowed.gpu_memory_utilization, allowed.asked_utilization
    )
