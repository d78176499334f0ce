"""Where a model's layers go: a split over GPUs that may differ, the embedding and head with it, and what must stay out.

Layered engines (qwenq, transformers, llama.cpp) run GPU after GPU: contiguous layers each, embedding on the first, head
on the last (a tied head on the first). vLLM cuts every layer over equal ranks, or stages of layers, see `parallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qwenq.errors import HonestNo, PlanError
from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import Engine
from qwenq.planning.memory import MemoryEstimate, check_context, estimate, gpu_terms
from qwenq.planning.offload import host_layers_bytes
from qwenq.planning.rig import Rig
from qwenq.planning.terms import GpuMemory, Share, Term, Workload
from qwenq.planning.torch_terms import run_weights
from qwenq.planning.weights import Weights


@dataclass(frozen=True)
class Placement:
    """Shares in device order, what they need, and why they are so. Layers from `gpu_layers` on are in host memory."""

    shares: tuple[Share, ...]
    gpu_layers: int
    memory: MemoryEstimate
    offloaded_bytes: int  # weights in host memory
    reason: str

    @property
    def fits(self) -> bool:
        """Everything is on the GPUs and within their limits."""
        return bool(self.memory.fits) and self.offloaded_bytes == 0

    def device_map(self) -> dict[str, int | str]:
        """transformers' device_map: module name to GPU index or `cpu`."""
        devices: dict[str, int | str] = {}
        head: int | str = "cpu"
        for index, share in enumerate(self.shares):
            if share.embed:
                devices["model.embed_tokens"] = index
                devices["model.rotary_emb"] = index
            for layer in share.layers:
                devices[f"model.layers.{layer}"] = index
            if share.head:
                head = index
        layers = len(self.memory.weights.layers)
        devices |= {f"model.layers.{layer}": "cpu" for layer in range(self.gpu_layers, layers)}
        return devices | {"model.norm": head, "lm_head": head}

    def to_json(self) -> dict[str, Any]:
        return {
            "gpus": [
                {
                    "layers": [share.layers.start, share.layers.stop],
                    "embedding": share.embed,
                    "head": share.head,
                }
                for share in self.shares
            ],
            "gpu_layers": self.gpu_layers,
            "offloaded_bytes": self.offloaded_bytes,
            "reason": self.reason,
            "device_map": self.device_map(),
        }


def place(
    spec: ModelSpec, weights: Weights, rig: Rig, engine: Engine, work: Workload, *, offload: bool = False
) -> Placement:
    """The split that leaves the most room on the fullest GPU; the least bad one when nothing fits.

    With `offload`, a model that does not fit keeps as many layers on the GPUs as they hold, the rest in host memory;
    HonestNo when they hold not even none. Raises PlanError for vLLM, whose ranks are not free to choose.
    """
    check_context(spec, work)
    if not engine.layered:
        raise PlanError("vLLM places its own layers", hint="see tensor and pipeline parallel options")
    split = _Splitter(spec, weights, rig, engine, work)
    layers = spec.num_hidden_layers
    shares = split.fill(layers, 0)
    if shares is not None:
        shares = split.widest(layers)
        return split.placement(shares, layers, "layers balanced so that the fullest GPU keeps the most room")
    if not offload:
        return split.placement(split.widest(layers), layers, "does not fit; this split exceeds the limits the least")
    kept = split.most_layers()
    filled = split.fill(kept, 0) if kept >= 0 else None
    if filled is None:
        raise HonestNo(
            f"{rig.label}: not even the embedding and head of {spec.name or 'the model'} fit beside the working memory",
            hint="a larger first GPU, a smaller --prefill-chunk or a shorter context",
        )
    reason = f"{kept} of {layers} layers fit on the GPUs, {layers - kept} stay in host memory"
    return split.placement(filled, kept, reason)


def largest_context(spec: ModelSpec, weights: Weights, rig: Rig, engine: Engine, work: Workload) -> int:
    """Most tokens a sequence can have with every layer on the GPUs, at most the model's own limit; 0 when none."""

    def fits(context: int) -> bool:
        return holds(spec, weights, rig, engine, replace(work, context=context, prompt=0))

    return search_context(fits, spec.extended_context)


def holds(spec: ModelSpec, weights: Weights, rig: Rig, engine: Engine, work: Workload) -> bool:
    """Whether some split keeps every layer on the GPUs."""
    return _Splitter(spec, weights, rig, engine, work).fill(spec.num_hidden_layers, 0) is not None


def search_context(fits: Callable[[int], bool], limit: int) -> int:
    """Largest context in 1..limit that `fits`, which is true below and false above it; 0 when it never is."""
    low, high = 0, limit
    if fits(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Splitter:
    """Fills GPUs in order; sizes of one model, rig and workload."""

    def __init__(self, spec: ModelSpec, weights: Weights, rig: Rig, engine: Engine, work: Workload) -> None:
        self.spec, self.weights, self.rig, self.engine, self.work = spec, weights, rig, engine, work
        self.layer_bytes = run_weights(weights, engine, work, rig.gpus[0]).layer_bytes
        self.costs: dict[tuple[Share, str], int] = {}
        self.tied_first = spec.tie_word_embeddings and engine.name != "llama.cpp"

    def fill(self, layers: int, room: int) -> tuple[Share, ...] | None:
        """Shares of the first `layers` layers that leave `room` bytes on every GPU in use, or None."""
        count = len(self.rig.gpus)
        for head in (0,) if self.tied_first else range(count - 1, -1, -1):
            shares = self._fill_before(layers, room, head, count if self.tied_first else head + 1)
            if shares is not None:
                return shares
        return None

    def _fill_before(self, layers: int, room: int, head: int, count: int) -> tuple[Share, ...] | None:
        """Greedy: each of the first `count` GPUs takes what it can; the head is on GPU `head`."""
        shares: list[Share] = []
        start, gpus = 0, len(self.rig.gpus)
        for index in range(gpus):
            share = Share(range(start, start), embed=index == 0, head=index == head, gpus=gpus)
            limit = self.rig.limits[index] - room - (self._offload_bytes(layers) if index == 0 else 0)
            if share.used and self._cost(share, index) > limit:
                return None
            low, high = 0, layers - start if index < count else 0
            while low < high:
                middle = (low + high + 1) // 2
                if self._cost(replace(share, layers=range(start, start + middle)), index) <= limit:
                    low = middle
                else:
                    high = middle - 1
            shares.append(replace(share, layers=range(start, start + low)))
            start += low
        return tuple(shares) if start == layers else None

    def widest(self, layers: int) -> tuple[Share, ...]:
        """The split with the most room on the fullest GPU (a negative room when it does not fit)."""
        gpus = len(self.rig.gpus)
        everything = Share(range(layers), embed=True, head=True, gpus=gpus)
        most = max(self._cost(everything, index) for index in range(gpus)) + self._offload_bytes(layers)
        low, high = min(self.rig.limits) - most, max(self.rig.limits)
        best = self.fill(layers, low)  # with that little room any one GPU could hold everything
        assert best is not None
        while high - low > 1 << 20:
            middle = (low + high) // 2
            found = self.fill(layers, middle)
            if found is None:
                high = middle
            else:
                best, low = found, middle
        return best

    def most_layers(self) -> int:
        """Most layers that fit on the GPUs beside what offloading itself needs; -1 when not even none do."""
        low, high = -1, self.spec.num_hidden_layers - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fill(middle, 0) is not None else (low, middle - 1)
        return low

    def placement(self, shares: tuple[Share, ...], gpu_layers: int, reason: str) -> Placement:
        memory = estimate(self.spec, self.weights, self.engine, self.work, self.rig, shares)
        extra = self._offload_bytes(gpu_layers)
        if extra:
            term = Term("kv_cache", extra, "fitted", "KV of the layers in host memory, and one such layer at work")
            first = memory.gpus[0]
            gpu = GpuMemory(first.name, (*first.terms, term), first.limit_bytes, first.moment)
            memory = replace(memory, gpus=(gpu, *memory.gpus[1:]))
        out = sum(self.layer_bytes[gpu_layers:])
        return Placement(shares, gpu_layers, memory, out, reason)

    def _cost(self, share: Share, index: int) -> int:
        key = share, self.rig.gpus[index].name
        if key not in self.costs:
            terms, _ = gpu_terms(self.spec, self.weights, self.engine, self.work, share, self.rig.gpus[index])
            self.costs[key] = sum(term.n_bytes for term in terms)
        return self.costs[key]

    def _offload_bytes(self, gpu_layers: int) -> int:
        return host_layers_bytes(self.spec, self.layer_bytes, self.engine, self.work, gpu_layers)
