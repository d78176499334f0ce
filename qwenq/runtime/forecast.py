"""Forecast of a load without loading: placement of layers, peak memory per device, expected speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwenq.errors import HonestNo, RunError
from qwenq.machine import UNTOLD_RAM
from qwenq.model.spec import ModelSpec
from qwenq.planning.case import Case, Share, Workload
from qwenq.planning.engines.torch import OWN
from qwenq.planning.speed import Speed, estimate_speed
from qwenq.planning.weights import Weights
from qwenq.runtime.load import LoadOptions, LoadPlan, asked_of_machine, check_disk, plan_load
from qwenq.runtime.model import DISK
from qwenq.units import counted, format_gb

CPU = "cpu"


@dataclass(frozen=True)
class Held:
    """Predicted use and limit of one device or the disk. On GPUs as torch's allocator counts it."""

    device: str  # GPU 0 RTX 3090, CPU, disk
    layers: int
    predicted_bytes: int
    limit_bytes: int | None  # free, or a limit below it; None for the disk, or where it is not told

    @property
    def line(self) -> str:
        limit = f" of {format_gb(self.limit_bytes)}" if self.limit_bytes is not None else ""
        return f"{self.device}: {counted(self.layers, 'layer')}, {format_gb(self.predicted_bytes)}{limit}"


@dataclass(frozen=True)
class Forecast:
    """The answer of `run --dry-run`."""

    model: str
    weights: Weights
    work: Workload
    compute_dtype: str
    plan: LoadPlan
    devices: tuple[Held, ...]
    speed: Speed

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "weights": self.weights.to_json(),
            "context": self.work.context,
            "prefill_chunk": self.work.prefill_chunk,
            "kv_cache_dtype": self.work.kv_dtype,
            "compute_dtype": self.compute_dtype,
            "devices": [asdict(held) for held in self.devices],
            "plan": self.plan.to_json(),
            "speed": self.speed.to_json(),
        }

    def lines(self) -> list[str]:
        """Lines for display."""
        speed = self.speed
        return [
            f"{self.model}: {format_gb(self.weights.total_bytes)} of weights ({self.weights.label}; "
            f"{self.weights.source}); context {self.work.context}, KV cache {self.work.kv_dtype}, "
            f"{self.compute_dtype} activations; nothing is loaded",
            *(held.line for held in self.devices),
            f"placement: {self.plan.reason}",
            f"speed: {speed.text() if speed.decode or speed.prefill else speed.basis}",
        ]


def forecast(spec: ModelSpec, weights: Weights, options: LoadOptions) -> Forecast:
    """The plan that a load with these options would follow on this machine; HonestNo when the model does not fit."""
    rig, work, room = asked_of_machine(spec, options)
    case = Case(spec, weights, OWN, work, rig)
    try:
        plan = plan_load(case, room)
        if plan.disk_bytes:
            check_disk(options.offload_directory, plan.disk_bytes)
    except RunError as error:
        raise HonestNo(error.message, hint=error.hint) from None
    devices = _held(case, plan, room if room < UNTOLD_RAM else None)
    dtype = str(options.dtype)[6:]
    return Forecast(spec.name, weights, work, dtype, plan, devices, _speed(case, plan))


def share_of(spec: ModelSpec, places: Mapping[str, int | str], index: int) -> Share:
    """The part of a model that one GPU holds, read back from a device map."""
    held = [k for k in range(spec.num_hidden_layers) if places[spec.layer_name(k)] == index]
    gpus = len({place for place in places.values() if isinstance(place, int)})
    return Share(
        range(held[0], held[-1] + 1) if held else range(0),
        embed=places[spec.architecture.embedding] == index,
        head=places[spec.architecture.head] == index,
        gpus=gpus,
    )


def _held(case: Case, plan: LoadPlan, room: int | None) -> tuple[Held, ...]:
    counts: dict[int | str, int] = {}
    rig = case.rig
    for layer in range(len(case.weights.layers)):
        place = plan.device_map[case.spec.layer_name(layer)]
        counts[place] = counts.get(place, 0) + 1
    found = []
    if rig is None:
        found.append(Held("CPU", counts.get(CPU, 0), plan.predicted["CPU"], room))
    else:
        names = [f"GPU {index} {gpu.name}" for index, gpu in enumerate(rig.gpus)]
        found += [
            Held(name, counts.get(index, 0), plan.predicted.get(name, 0), rig.limits[index])
            for index, name in enumerate(names)
        ]
        if counts.get(CPU):
            found.append(Held("CPU", counts[CPU], _in_host_memory(case, plan), room))
    if plan.disk_bytes:
        found.append(Held("disk", counts[DISK], plan.disk_bytes, None))
    return tuple(found)


def _in_host_memory(case: Case, plan: LoadPlan) -> int:
    """Bytes of the layers beside a rig's own, as they cross to the first GPU to be computed there."""
    held = OWN.kept(case.weights, case.work, case.hardware.gpus[0])
    return sum(n for k, n in enumerate(held.layer_bytes) if plan.device_map[case.spec.layer_name(k)] == CPU)


def _speed(case: Case, plan: LoadPlan) -> Speed:
    if plan.disk_bytes:
        return Speed(None, None, "not predicted: layers are read from disk for every token")
    if case.rig is None:
        return Speed(None, None, "not predicted for CPUs; try a short answer: `qwenq run` with -p hi -n 32")
    shares = [share_of(case.spec, plan.device_map, index) for index in range(len(case.rig.gpus))]
    return estimate_speed(case, shares, _in_host_memory(case, plan))
