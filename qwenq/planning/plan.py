"""The plan: does a model fit a rig, with what split, how fast, what would fit instead, and the flags to paste."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from qwenq.errors import HonestNo, PlanError
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import Engine, get_engine
from qwenq.planning.escapes import Escape, vllm_escapes
from qwenq.planning.kernels import choose, compute_on
from qwenq.planning.memory import MemoryEstimate, estimate, rank_shares
from qwenq.planning.parallel import ParallelOption, best_option, largest_vllm_context, parallel_options
from qwenq.planning.placement import Placement, holds, largest_context, place
from qwenq.planning.rig import GIVEN, Gpu, Rig, catalogue, rig_of
from qwenq.planning.speed import Speed, estimate_speed
from qwenq.planning.tensor_parallel import tensor_parallel_lines, tensor_parallel_sizes
from qwenq.planning.terms import Share, Workload
from qwenq.planning.weights import Weights, recipe_weights
from qwenq.units import GIB, format_gb, format_gib, format_tokens

MAX_RECOMMENDED = 8  # GPUs of one kind


@dataclass(frozen=True)
class Plan:
    """The answer for one model, rig, engine and workload. `placement` is None for vLLM, which has `options`."""

    spec: ModelSpec
    weights: Weights
    rig: Rig
    engine: Engine
    work: Workload
    fits: bool
    memory: MemoryEstimate
    shares: tuple[Share, ...]
    placement: Placement | None
    options: tuple[ParallelOption, ...]
    chosen: ParallelOption | None
    largest_context: int
    offload: Placement | None  # what stays in host memory when nothing else fits
    speed: Speed
    offload_speed: Speed | None
    instead: tuple[str, ...]  # what would fit, when this does not
    escapes: tuple[Escape, ...]  # what makes vLLM fit, when it does not as asked

    @property
    def certainty(self) -> str:
        """`fits`, `tight` or `does not fit` over the whole range; a rig that no layout of vLLM can use does not fit."""
        return self.memory.certainty if self.placement or self.chosen else "does not fit"

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the rig's GPUs, once a kind."""
        found = []
        for gpu in dict.fromkeys(self.rig.gpus):
            if gpu.source == GIVEN:
                found.append(f"{gpu.name}: {gpu.note}")
            if self.engine.name == "qwenq" and self._writes_out(gpu):
                major, minor = gpu.compute_capability or (0, 0)
                found.append(
                    f"{gpu.name}: no packed kernel (compute capability {major}.{minor}, it needs 8.0): "
                    "weights are written out for every token"
                )
        if self.rig.needs_pci_order:
            found.append("GPUs are in the driver's order; CUDA numbers them so with CUDA_DEVICE_ORDER=PCI_BUS_ID")
        return tuple(found)

    def _writes_out(self, gpu: Gpu) -> bool:
        """Whether a newer GPU would have a packed kernel for what this one writes out."""
        here = compute_on(gpu, self.work.value_bytes)
        packed = {shape for part in self.weights.parts for shape in part.packed}
        newer = replace(here, capability=max(here.capability, (8, 0)))
        return any(choose(shape, here) != choose(shape, newer) for shape in packed)

    @property
    def tensor_parallel(self) -> dict[str, str]:
        """Tensor-parallel sizes of these weights, each with why not, or nothing where it works."""
        return tensor_parallel_sizes(self._stored, self.weights.row_groups)

    @property
    def tensor_parallel_lines(self) -> list[str]:
        """The same to read."""
        return tensor_parallel_lines(self._stored, self.weights.row_groups)

    @property
    def _stored(self) -> ModelSpec:
        return replace(self.spec, intermediate_size=self.weights.intermediate_size)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.spec.name,
            "rig": self.rig.label,
            "engine": self.engine.label,
            "context": self.work.context,
            "batch_size": self.work.batch,
            "fits": self.fits,
            "certainty": self.certainty,
            "notes": list(self.notes),
            "largest_context": self.largest_context,
            "weights": {"label": self.weights.label, "bytes": self.weights.total_bytes},
            "gpus": [
                {**gpu.to_json(), "free_bytes": gpu.free_bytes, "limit_source": kind.limit_source}
                for gpu, kind in zip(self.memory.gpus, self.rig.gpus, strict=True)
            ],
            "placement": self.placement.to_json() if self.placement else None,
            "parallel": [option.to_json() for option in self.options],
            "tensor_parallel": self.tensor_parallel,
            "offload": self.offload.to_json() if self.offload else None,
            "speed": self.speed.to_json() if self.fits else None,  # of a split that does not fit it says nothing
            "offload_speed": self.offload_speed.to_json() if self.offload_speed else None,
            "instead": list(self.instead),
        }


def make_plan(spec: ModelSpec, weights: Weights, rig: Rig, engine: Engine, work: Workload) -> Plan:
    """Plan `weights` of `spec` on `rig`; says what fits instead when they do not.

    Raises PlanError for a GPU the engine does not run on.
    """
    for gpu in rig.gpus:
        if not runs_on(engine, gpu):
            raise PlanError(f"{engine.name} does not run on {gpu.name}", hint="--engine llama.cpp does")
    vllm = engine if engine.name == "vllm" else get_engine("vllm")
    vllm_work = work if engine.name == "vllm" else replace(work, kv_dtype=_vllm_kv(work.kv_dtype), prefill_chunk=0)
    options = parallel_options(spec, weights, vllm, vllm_work, rig)
    chosen = best_option(options)
    offload = None
    if engine.layered:
        placement = place(spec, weights, rig, engine, work)
        memory, shares, fits = placement.memory, placement.shares, placement.fits
        longest = largest_context(spec, weights, rig, engine, work)
        if not fits:
            with suppress(HonestNo):  # then not even offloading helps, and the plan has none
                offload = place(spec, weights, rig, engine, work, offload=True)
    else:
        placement = None
        shares = rank_shares(spec, chosen.tensor, chosen.pipeline) if chosen else rank_shares(spec, 1, len(rig.gpus))
        memory = estimate(spec, weights, engine, work, rig, shares)
        fits = chosen is not None and chosen.works
        possible = [option for option in options if not option.reasons]
        longest = max((largest_vllm_context(spec, weights, engine, work, rig, o) for o in possible), default=0)
    escapes = () if chosen and chosen.works else vllm_escapes(spec, weights, vllm, vllm_work, rig)
    speed = estimate_speed(spec, weights, engine, work, rig.gpus, shares)
    slow = None
    if offload is not None:
        slow = estimate_speed(spec, weights, engine, work, rig.gpus, offload.shares, offload.offloaded_bytes)
    instead = () if fits else tuple(_instead(spec, weights, rig, engine, work, longest, escapes))
    return Plan(
        spec, weights, rig, engine, work, fits, memory, shares, placement, options, chosen, longest, offload, speed,
        slow, instead, escapes,
    )  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """A rig of equal GPUs that holds the model, with its price when one is known."""

    gpu: Gpu
    count: int
    largest_context: int
    how: str

    @property
    def price_usd(self) -> float | None:
        return None if self.gpu.price_usd is None else self.gpu.price_usd * self.count

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "count": self.count,
            "price_usd": self.price_usd,
            "price_basis": self.gpu.price_basis or None,
            "largest_context": self.largest_context,
            "how": self.how,
        }


def recommend(spec: ModelSpec, weights: Weights, engine: Engine, work: Workload) -> tuple[Recommendation, ...]:
    """Rigs of up to 8 equal GPUs that hold the model at the asked context: cheapest first, unpriced last."""
    found = []
    for gpu in catalogue():
        if not runs_on(engine, gpu):
            continue
        for count in range(1, MAX_RECOMMENDED + 1):
            rig = rig_of([gpu] * count)
            how = how_held(spec, weights, rig, engine, work)
            if how:
                if engine.layered:
                    longest = largest_context(spec, weights, rig, engine, work)
                else:
                    option = best_option(parallel_options(spec, weights, engine, work, rig))
                    longest = largest_vllm_context(spec, weights, engine, work, rig, option) if option else 0
                how += "; ROCm, not tried" if gpu.vendor == "amd" and engine.name != "llama.cpp" else ""
                how += "; memory shared with the system" if gpu.unified else ""
                found.append(Recommendation(gpu, count, longest, how))
                break
    return tuple(sorted(found, key=lambda r: (r.price_usd is None, r.price_usd or 0, r.count, r.gpu.name)))


def runs_on(engine: Engine, gpu: Gpu) -> bool:
    """Whether the engine runs on such a GPU at all: CUDA and ROCm for the torch engines, anything for llama.cpp."""
    return engine.name == "llama.cpp" or gpu.vendor not in ("intel", "apple")


def how_held(spec: ModelSpec, weights: Weights, rig: Rig, engine: Engine, work: Workload) -> str:
    """How the rig holds the model: `layers split`, `TP 2 x PP 1`; empty when it does not."""
    if engine.layered:
        return "layers split" if holds(spec, weights, rig, engine, work) else ""
    option = best_option(parallel_options(spec, weights, engine, work, rig))
    return f"TP {option.tensor} x PP {option.pipeline}" if option and option.works else ""


def _instead(
    spec: ModelSpec,
    weights: Weights,
    rig: Rig,
    engine: Engine,
    work: Workload,
    longest: int,
    escapes: tuple[Escape, ...],
) -> list[str]:
    """What would fit on this rig, nearest first."""
    found = []
    if engine.name == "vllm":
        found = [escape.text for escape in escapes]
    elif longest:
        found.append(f"a context of {format_tokens(longest)} with these weights")
    if engine.layered and work.kv_dtype in ("auto", "fp16", "bf16"):
        smaller = {"llama.cpp": "q8_0"}.get(engine.name, "fp8")
        if engine.name != "transformers":
            asked = replace(work, kv_dtype=smaller)
            if how_held(spec, weights, rig, engine, asked):
                found.append(f"--kv-cache-dtype {smaller} at {format_tokens(work.context)}")
    if engine.name == "transformers" and not work.prefill_chunk:
        asked = replace(work, prefill_chunk=1024)
        if how_held(spec, weights, rig, engine, asked):
            found.append("--prefill-chunk 1024 (the prompt in pieces)")
    uniform = recipe_weights(spec, Recipe(Scheme(4, 128))) if _divides(spec, 128) else None
    lighter = uniform and engine.name != "llama.cpp" and uniform.total_bytes < weights.total_bytes
    if uniform and lighter and how_held(spec, uniform, rig, engine, work):
        found.append(f"uniform 4-bit g128, {format_gb(uniform.total_bytes)}, at {format_tokens(work.context)}")
    return found


def _divides(spec: ModelSpec, group: int) -> bool:
    return all(lin.in_features % group == 0 for lin in spec.layer_linears(0))


def _vllm_kv(kv_dtype: str) -> str:
    return kv_dtype if kv_dtype in ("auto", "fp16", "bf16", "fp8") else "fp8"


def describe_gpu(plan: Plan, index: int) -> str:
    """`GPU 0 RTX 3090: 21.85 of 23.58 GiB, 1.73 GiB free, layers 0-39, embedding`."""
    gpu, share = plan.memory.gpus[index], plan.shares[index]
    if not share.used:
        return f"GPU {index} {gpu.name}: not used"
    limit, free = gpu.limit_bytes or 0, gpu.free_bytes or 0
    room = f"{format_gib(free)} free" if free >= 0 else f"{format_gib(-free)} too much"
    parts = [f"layers {share.layers.start}-{share.layers.stop - 1}"] if share.layers else []
    parts += (["embedding"] if share.embed else []) + (["head"] if share.head else [])
    return (
        f"GPU {index} {gpu.name}: {gpu.total_bytes / GIB:.2f} of {limit / GIB:.2f} GiB "
        f"({gpu.low_bytes / GIB:.2f} to {gpu.high_bytes / GIB:.2f}), {room}; {', '.join(parts)}"
    )
