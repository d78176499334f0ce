"""The plan: does a model fit a rig, with what split, how fast, what would fit instead, and the flags to paste."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenq.errors import HonestNo, PlanError
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Share
from qwenq.planning.escapes import Serving, serving
from qwenq.planning.memory import MemoryEstimate
from qwenq.planning.placement import Layout, Placement, place
from qwenq.planning.rig import GIVEN, Gpu, Rig, catalogue
from qwenq.planning.speed import Speed, estimate_speed
from qwenq.planning.tensor_parallel import tensor_parallel_lines, tensor_parallel_sizes
from qwenq.units import GIB, format_gib

if TYPE_CHECKING:
    from qwenq.planning.engines.base import RigFinder  # whose methods take plans

MAX_RECOMMENDED = 8  # GPUs of one kind
HOST_PROCESS = 3 * GIB  # Python, libraries and the system beside layers in host memory; assumed


class HostMemory(NamedTuple):
    """Host memory a plan uses, and what is available (None: unknown) beside what a unified GPU holds of it."""

    weights_bytes: int
    kv_bytes: int
    limit_bytes: int | None
    gpu_bytes: int = 0  # of the same memory, held by unified GPUs; not in the limit

    @classmethod
    def of(cls, placement: Placement) -> HostMemory:
        """The machine's own memory under a placement with layers in it."""
        case, gpus = placement.memory.case, placement.memory.gpus
        rig = case.hardware
        out = len(placement.host_layers) if case.engine.host_layers_stay else 0
        kv = int(out * case.layer_kv_bytes)
        held = sum(gpu.total_bytes for gpu, kind in zip(gpus, rig.gpus, strict=True) if kind.unified)
        limit = None if rig.host_memory is None else max(0, rig.host_memory - held)
        return cls(placement.offloaded_bytes, kv, limit, held)

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + HOST_PROCESS

    @property
    def fits(self) -> bool | None:
        return None if self.limit_bytes is None else self.total_bytes <= self.limit_bytes

    @property
    def said(self) -> str:
        """`21.97 GiB with KV cache and 3 GiB for the process and the system, of 16.00 GiB: does not fit`."""
        needed = f"{format_gib(self.total_bytes)} with KV cache and {HOST_PROCESS / GIB:g} GiB for the process and "
        needed += "the system"
        if self.limit_bytes is None:
            return needed
        limit = format_gib(self.limit_bytes)
        if self.gpu_bytes:
            limit += f" that the GPU leaves of {format_gib(self.limit_bytes + self.gpu_bytes)}"
        return f"{needed}, of {limit}: {'fits' if self.fits else 'does not fit'}"

    def to_json(self) -> dict[str, Any]:
        return {
            "weights_bytes": self.weights_bytes,
            "kv_cache_bytes": self.kv_bytes,
            "total_bytes": self.total_bytes,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Plan:
    """The answer to a case. `serving` is its own where its engine is a server, else the one a server would have."""

    case: Case
    layout: Layout
    serving: Serving
    largest_context: int
    offload: Placement | None  # with layers in host memory, when nothing else fits
    speed: Speed
    offload_speed: Speed | None
    instead: tuple[str, ...]  # what would fit, when this does not

    @property
    def fits(self) -> bool:
        return self.layout.fits

    @property
    def certainty(self) -> str:
        """`fits`, `tight` or `does not fit` over the whole range; a rig that no layout can use does not fit."""
        return self.layout.certainty

    @property
    def memory(self) -> MemoryEstimate:
        return self.layout.memory

    @property
    def shares(self) -> tuple[Share, ...]:
        return self.layout.shares

    @property
    def placement(self) -> Placement | None:
        """The split of layers; None for a server."""
        return self.layout if isinstance(self.layout, Placement) else None

    @property
    def host(self) -> HostMemory | None:
        """The machine's own memory with layers offloaded to it; None where nothing is."""
        return None if self.offload is None else HostMemory.of(self.offload)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the rig's GPUs, once a kind, and on the engine's version; on the engine's own ways to fit too."""
        rig, found = self.case.hardware, list[str]()
        own = self.serving.escapes if self.serving.case.engine == self.case.engine else ()
        cases = [self.case, *(replace(self.case, work=escape.work) for escape in own)]
        if note := self.case.engine.version_note:
            found.append(note)
        for gpu in dict.fromkeys(rig.gpus):
            if gpu.source == GIVEN:
                found.append(f"{gpu.name}: {gpu.note}")
            if gpu.unified:
                found.append(f"{gpu.name}: memory is shared with the system")
            if gpu.vendor == "amd" and not self.case.engine.rocm_tried:
                found.append(f"{gpu.name}: ROCm, not tried")
            if not rig.free_bytes and gpu.limit_source != "published":
                found.append(f"{gpu.name}: limit {gpu.limit_source}")
            found += dict.fromkeys(note for case in cases for note in self.case.engine.notes(case, gpu))
        if rig.needs_pci_order:
            found.append("GPUs are in the driver's order; CUDA numbers them so with CUDA_DEVICE_ORDER=PCI_BUS_ID")
        return tuple(found)

    @property
    def tensor_parallel(self) -> dict[str, str]:
        """Tensor-parallel sizes of these weights, each with why not, or nothing where it works."""
        return tensor_parallel_sizes(self._stored, self.case.weights.row_groups, self.case.weights.method)

    @property
    def tensor_parallel_lines(self) -> list[str]:
        """The same to read."""
        return tensor_parallel_lines(self._stored, self.case.weights.row_groups, self.case.weights.method)

    @property
    def _stored(self) -> ModelSpec:
        return self.case.weights.stored_spec(self.case.spec)

    def to_json(self) -> dict[str, Any]:
        case, rig = self.case, self.case.hardware
        return {
            "model": case.spec.name,
            "rig": rig.label,
            "engine": case.engine.label,
            "context": case.work.context,
            "batch_size": case.work.batch,
            "fits": self.fits,
            "certainty": self.certainty,
            "notes": list(self.notes),
            "largest_context": self.largest_context,
            "weights": {"label": case.weights.label, "bytes": case.weights.total_bytes},
            "gpus": [
                {**gpu.to_json(), "free_bytes": gpu.free_bytes, "limit_source": kind.limit_source}
                for gpu, kind in zip(self.memory.gpus, rig.gpus, strict=True)
            ],
            "placement": self.placement.to_json() if self.placement else None,
            "parallel": [option.to_json() for option in self.serving.options],
            "tensor_parallel": self.tensor_parallel,
            "offload": self.offload.to_json() if self.offload else None,
            "speed": self.speed.to_json() if self.fits else None,  # of a split that does not fit it says nothing
            "host": self.host.to_json() if self.host else None,
            "offload_speed": self.offload_speed.to_json() if self.offload_speed else None,
            "instead": list(self.instead),
        }


def make_plan(case: Case) -> Plan:
    """Plan a case on its rig; says what fits instead when it does not.

    Raises PlanError for a GPU the engine does not run on.
    """
    engine = case.engine
    for gpu in case.hardware.gpus:
        if barred := engine.barred(gpu):
            raise PlanError(barred, hint="--engine llama.cpp does")
    served = serving(engine.served(case))
    layout = engine.layout(case)
    longest = engine.longest_context(case)
    offload = slow = None
    if engine.layered and not layout.fits:
        with suppress(HonestNo):  # then not even offloading helps, and the plan has none
            offload = place(case, offload=True)
            slow = estimate_speed(case, offload.shares, offload.offloaded_bytes)
    speed = estimate_speed(case, layout.shares)
    instead = () if layout.fits else tuple(engine.instead(case, longest, served.escapes))
    return Plan(case, layout, served, longest, offload, speed, slow, instead)


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

    @property
    def used_price_usd(self) -> float | None:
        return None if self.gpu.used_price_usd is None else self.gpu.used_price_usd * self.count

    @property
    def likely_usd(self) -> float | None:
        """Used where a source has that, else new."""
        return self.price_usd if self.used_price_usd is None else self.used_price_usd

    @property
    def power_w(self) -> float | None:
        return None if self.gpu.power_w is None else self.gpu.power_w * self.count

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "count": self.count,
            "price_usd": self.price_usd,
            "price_basis": self.gpu.price_basis or None,
            "used_price_usd": self.used_price_usd,
            "power_w": self.power_w,
            "largest_context": self.largest_context,
            "how": self.how,
        }


def recommend(case: Case, finder: RigFinder | None = None) -> tuple[Recommendation, ...]:
    """Rigs of up to 8 equal GPUs that hold the model at the asked context: fewest cards first, then cheapest.

    The case's own rig does not count. Prices are of used cards where a source has them; then by power, unknown last.
    `finder`: of the same question at another context.
    """
    engine, found = case.engine, []
    finder = finder or engine.rig_finder()
    for gpu in catalogue():
        if not engine.runs_on(gpu):
            continue
        for count in range(1, MAX_RECOMMENDED + 1):
            tried = replace(case, rig=Rig((gpu,) * count))
            how = finder.how_held(tried)
            if how:
                how += "; ROCm, not tried" if gpu.vendor == "amd" and not engine.rocm_tried else ""
                how += "; memory shared with the system" if gpu.unified else ""
                found.append(Recommendation(gpu, count, finder.longest_context(tried), how))
                break
    unknown = math.inf
    return tuple(
        sorted(found, key=lambda r: (r.count, r.likely_usd or unknown, r.power_w or unknown, r.gpu.name))
    )


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
