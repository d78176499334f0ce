"""Words of a memory estimate: what is asked (Workload), what a GPU holds (Share), what it needs (Term, GpuMemory)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwenq.errors import UsageError
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
class Workload:
    """What the memory is asked for; lengths in tokens, per sequence.

    `context` counts prompt and generated tokens. `prompt` is how much of it is one prompt (all of it unless said).
    `prefill_chunk` 0 means the engine's own: the whole prompt at once in transformers.
    """

    context: int
    batch: int = 1
    prompt: int = 0
    kv_dtype: str = "auto"
    prefill_chunk: int = 0
    max_num_seqs: int = 0  # vLLM; 0: its default for the GPU
    gpu_memory_utilization: float = 0.9  # vLLM
    value_bytes: int = 2  # of an activation, in this project's own engine: 4 where it computes in float32

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("context", self.context, 1, 1 << 40),
            ("batch size", self.batch, 1, 1 << 16),
            ("prompt", self.prompt, 0, 1 << 40),
            ("prefill chunk", self.prefill_chunk, 0, 1 << 40),
            ("max_num_seqs", self.max_num_seqs, 0, 1 << 16),
        ):
            if value < least:
                raise UsageError(f"{name} is {value}, wanted at least {least}")
            if value > most:
                got = value if value < 10**15 else f"a number of {len(str(value))} digits"
                raise UsageError(f"{name} is {got}, wanted at most {most}")
        if self.prompt > self.context:
            raise UsageError(f"prompt is {self.prompt} tokens, more than the context of {self.context}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization is {self.gpu_memory_utilization}, wanted more than 0, at most 1")

    @property
    def prompt_tokens(self) -> int:
        return self.prompt or self.context


@dataclass(frozen=True)
class Share:
    """What one GPU holds: decoder layers, embedding, head (with the final norm); a 1/`ranks` part of each."""

    layers: range
    embed: bool
    head: bool
    ranks: int = 1
    gpus: int = 1  # in the whole rig, ranks included

    @property
    def used(self) -> bool:
        return bool(self.layers) or self.embed or self.head


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
        """What is left; negative when it does not fit."""
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
    """What the caching allocator holds beyond its tensors; no measurement on a GPU for these models.

    `packed_bytes`: weights that were unpacked on the GPU, which leaves holes between them.
    """
    source = "3 % of what comes and goes, as unsloth keeps free"
    if packed_bytes:
        source += "; 1 % of packed weights for holes between them, as traced (reports/runtime.md)"
    low, n_bytes, high = (round(share * dynamic_bytes + 0.01 * packed_bytes) for share in (0, 0.03, 0.08))
    return Term("slack", n_bytes, "reported", source, low, high)


def merged(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Terms without empty ones, in the order of TERM_NAMES."""
    order = list(TERM_NAMES)
    return tuple(sorted((t for t in terms if t.high_bytes > 0), key=lambda t: order.index(t.name)))
