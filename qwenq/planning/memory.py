"""The VRAM estimate: for a model, its weights, an engine and a workload, what each GPU of a rig needs, term by term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwenq.errors import PlanError
from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import Engine, kv_bytes_per_value
from qwenq.planning.llamacpp_terms import llamacpp_terms
from qwenq.planning.rig import Gpu, Rig, device
from qwenq.planning.terms import GpuMemory, Share, Term, Workload
from qwenq.planning.torch_terms import torch_terms
from qwenq.planning.vllm_terms import budget_bytes, kv_tokens, possible_utilization, vllm_terms
from qwenq.planning.weights import Weights

NOT_ALLOCATED = ("context", "slack")  # what torch.cuda.max_memory_allocated does not see


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of every GPU in use, in device order, for one workload."""

    model: str
    weights: Weights
    engine: Engine
    work: Workload
    gpus: tuple[GpuMemory, ...]
    kv_bytes_per_token: float  # over all GPUs, for one sequence
    kv_capacity_tokens: int | None = None  # vLLM: what its cache will hold
    gpu_memory_utilization: float | None = None  # vLLM: as asked, or the most that a GPU allows

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
        """What torch's allocator peaks at, summed over GPUs: no CUDA context, no slack."""
        return sum(t.n_bytes for gpu in self.gpus for t in gpu.terms if t.name not in NOT_ALLOCATED)

    @property
    def fits(self) -> bool | None:
        """Whether every GPU's limit holds; None when no rig was given."""
        known = [gpu.fits for gpu in self.gpus]
        return None if None in known else all(known)

    @property
    def certainty(self) -> str:
        """`fits` or `does not fit` over the whole range, else `tight`; empty without a rig."""
        limits = [gpu.limit_bytes for gpu in self.gpus]
        if any(limit is None for limit in limits):
            return ""
        pairs = [(gpu, limit) for gpu, limit in zip(self.gpus, limits, strict=True) if limit is not None]
        if all(gpu.high_bytes <= limit for gpu, limit in pairs):
            return "fits"
        return "does not fit" if any(gpu.low_bytes > limit for gpu, limit in pairs) else "tight"

    @property
    def tightest(self) -> GpuMemory:
        """The GPU with the least room; without limits the fullest."""
        return min(self.gpus, key=lambda gpu: (gpu.limit_bytes or 0) - gpu.total_bytes if gpu.terms else 1 << 62)

    def term(self, name: str) -> int:
        """Bytes of one term over all GPUs."""
        return sum(gpu.term(name) for gpu in self.gpus)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "weights": {
                "label": self.weights.label,
                "bytes": self.weights.total_bytes,
                "source": self.weights.source,
            },
            "engine": self.engine.label,
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


def gpu_terms(
    spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, share: Share, gpu: Gpu
) -> tuple[tuple[Term, ...], str]:
    """Terms of one GPU holding `share`, and the moment of its peak."""
    if engine.name == "vllm":
        return vllm_terms(spec, weights, engine, work, share, gpu.name)
    if engine.name == "llama.cpp":
        return llamacpp_terms(spec, weights, engine, work, share)
    return torch_terms(spec, weights, engine, work, share, gpu)


def estimate(
    spec: ModelSpec,
    weights: Weights,
    engine: Engine,
    work: Workload,
    rig: Rig | None = None,
    shares: Sequence[Share] = (),
) -> MemoryEstimate:
    """What `shares` need on `rig`; without shares one GPU holds everything, without a rig no limit is compared.

    Raises PlanError for a context beyond the model's limit or a KV dtype the engine lacks.
    """
    check_context(spec, work)
    shares = shares or (whole(spec),)
    kinds = rig.gpus if rig else (device("GPU"),) * len(shares)
    limits: Sequence[int | None] = rig.limits if rig else [None] * len(shares)
    needed = [
        gpu_terms(spec, weights, engine, work, share, gpu) if share.used else ((), "not used")
        for share, gpu in zip(shares, kinds, strict=True)
    ]
    capacity = utilization = None
    if rig and engine.name == "vllm":
        used = [k for k, share in enumerate(shares) if share.used]
        totals = [gpu.limit_bytes for gpu in kinds]
        utilization = min(possible_utilization(work, needed[k][0], rig.limits[k], totals[k]) for k in used)
        capacity = min(kv_tokens(spec, engine, work, shares[k], needed[k][0], totals[k], utilization) for k in used)
        limits = [budget_bytes(terms, total, utilization) for (terms, _), total in zip(needed, totals, strict=True)]
    gpus = [
        GpuMemory(gpu.name, terms, limit, moment)
        for gpu, (terms, moment), limit in zip(kinds, needed, limits, strict=True)
    ]
    return MemoryEstimate(
        model=spec.name,
        weights=weights,
        engine=engine,
        work=work,
        gpus=tuple(gpus),
        gpu_memory_utilization=utilization,
        kv_bytes_per_token=spec.kv_bytes_per_token(kv_bytes_per_value(engine, work.kv_dtype)),
        kv_capacity_tokens=capacity,
    )


def check_context(spec: ModelSpec, work: Workload) -> None:
    """PlanError when the context is beyond what the model's card allows."""
    if work.context > spec.extended_context:
        raise PlanError(
            f"context is {work.context} tokens, {spec.name or 'the model'} allows {spec.extended_context}",
            hint=f"ask for at most {spec.extended_context}"
            + (" (with YaRN)" if spec.extended_context > spec.max_position_embeddings else ""),
        )


def whole(spec: ModelSpec) -> Share:
    """Everything on one GPU."""
    return Share(range(spec.num_hidden_layers), embed=True, head=True)


def even_shares(spec: ModelSpec, gpus: int) -> tuple[Share, ...]:
    """Layers spread evenly over `gpus`; embedding on the first, head on the last (the first when they are tied)."""
    n = spec.num_hidden_layers
    head = 0 if spec.tie_word_embeddings else gpus - 1
    return tuple(
        Share(range(n * g // gpus, n * (g + 1) // gpus), embed=g == 0, head=g == head, gpus=gpus) for g in range(gpus)
    )


def rank_shares(spec: ModelSpec, tensor_parallel: int, pipeline_parallel: int = 1) -> tuple[Share, ...]:
    """vLLM's ranks: stages of whole layers (later stages take the rest), each cut `tensor_parallel` ways."""
    n, p = spec.num_hidden_layers, pipeline_parallel
    shares = []
    for stage in range(p):
        layers = range(n * stage // p, n * (stage + 1) // p)
        share = Share(layers, stage == 0, stage == p - 1, tensor_parallel, tensor_parallel * p)
        shares += [share] * tensor_parallel
    return tuple(shares)
