"""From a checkpoint directory to a model that runs: the plan for this machine's memory, then the weights."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.reader import Checkpoint
from qwenq.errors import HonestNo, RunError
from qwenq.machine import available_ram, resident_bytes, return_freed_memory
from qwenq.model.devices import check_gpus
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.monitor import device_name, shortage
from qwenq.planning.case import Case, Workload, check_context
from qwenq.planning.engines.torch import OWN, QWENQ_PREFILL_CHUNK
from qwenq.planning.memory import NOT_ALLOCATED
from qwenq.planning.placement import DeviceMap, host_map, place, spill_to_disk
from qwenq.planning.rig import Rig, device
from qwenq.planning.weights import Weights as WeightBytes
from qwenq.planning.weights import header_weights
from qwenq.runtime.decode import why_not
from qwenq.runtime.generate import KV_DTYPES, Session
from qwenq.runtime.model import (
    DISK,
    CheckpointWeights,
    RunningModel,
    Weights,
    build_model,
    compute_device,
    modeling_code,
)
from qwenq.runtime.peaks import Peak, visible_rig
from qwenq.units import counted, format_gb, format_gib

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class LoadOptions:
    """Options of a load. Limits in bytes; an empty `gpu_memory`, or host memory of 0, means all free memory."""

    max_model_len: int = 0  # 0: DEFAULT_CONTEXT, or the model's own limit when that is less
    prefill_chunk: int = QWENQ_PREFILL_CHUNK
    kv_dtype: str = "auto"
    compute_dtype: str = "auto"
    gpu_memory: tuple[int, ...] = ()
    cpu_memory: int = 0
    offload_directory: Path = Path()  # where layers that go to disk are written; by default the current directory

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations: bfloat16, in which torch's packed kernels are fast, unless float32 is requested."""
        return torch.float32 if self.compute_dtype == "float32" else torch.bfloat16

    def work(self, spec: ModelSpec) -> Workload:
        context = self.max_model_len or min(DEFAULT_CONTEXT, spec.extended_context)
        work = Workload(
            context, kv_dtype=self.kv_dtype, prefill_chunk=self.prefill_chunk, value_bytes=self.dtype.itemsize
        )
        check_context(spec, work)
        return work


@dataclass(frozen=True)
class LoadPlan:
    """Placement of every module, and the peak memory of each computing device, as its allocator counts it."""

    device_map: DeviceMap
    predicted: dict[str, int]  # bytes by device name
    reason: str
    disk_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "device_map": self.device_map,
            "predicted_bytes": self.predicted,
            "reason": self.reason,
            "disk_bytes": self.disk_bytes,
        }


@dataclass(frozen=True)
class Loaded:
    """A model in memory, with the plan it was loaded by."""

    model: RunningModel
    plan: LoadPlan
    work: Workload
    seconds: float
    base_rss: int  # resident memory before the weights

    def session(self, stop_ids: frozenset[int]) -> Session:
        """A dialogue with it, of the context it was loaded for."""
        return Session(self.model, self.work.context, self.work.prefill_chunk, self.work.kv_dtype, stop_ids)

    def beside_prediction(self, peaks: Sequence[Peak]) -> list[dict[str, Any]]:
        """Each device's peak with what was predicted and the error in percent."""
        rows = []
        for peak in peaks:
            predicted = self.plan.predicted.get(peak.device, 0)
            error = 100 * (predicted / peak.allocated_bytes - 1) if peak.allocated_bytes and predicted else None
            rows.append(asdict(peak) | {"predicted_bytes": predicted, "error_percent": error})
        return rows


def plan_load(case: Case, cpu_room: int) -> LoadPlan:
    """Place a model on GPUs, host memory and disk; RunError, naming device and missing bytes, when it cannot be.

    `cpu_room`: bytes of host memory to use at most.
    """
    return _plan_host(case, cpu_room) if case.rig is None else _plan_rig(case, case.rig, cpu_room)


def _plan_host(case: Case, room: int) -> LoadPlan:
    weights = OWN.kept(case.weights, case.work, device("CPU"))
    need = sum(term.n_bytes for term in OWN.host_terms(case))
    devices = host_map(case.spec)
    if need <= room:
        return LoadPlan(devices, {"CPU": need}, f"{format_gb(need)} in host memory")
    layers = sum(weights.layer_bytes)
    outside, one = need - layers, max(weights.layer_bytes)
    if outside + one > room:
        raise shortage("CPU", outside + one, room, "a shorter --context, or a smaller --prefill-chunk")
    devices = spill_to_disk(case.spec, devices, weights, room - outside - one)
    plan = _with_disk(case.spec, devices, weights, {})
    return replace(plan, predicted={"CPU": need - plan.disk_bytes + one})


def _plan_rig(case: Case, rig: Rig, room: int) -> LoadPlan:
    placement = place(case)
    if not placement.fits:
        whole = placement
        try:
            placement = place(case, offload=True)
        except HonestNo as error:
            tight = whole.memory.tightest
            have = tight.limit_bytes or 0
            index = whole.memory.gpus.index(tight)
            taken = max(0, rig.gpus[index].limit_bytes - have)
            raise shortage(f"GPU {index} {tight.name}", tight.total_bytes, have, error.hint, taken) from None
    predicted = {
        f"GPU {index} {gpu.name}": sum(term.n_bytes for term in gpu.terms if term.name not in NOT_ALLOCATED)
        for index, gpu in enumerate(placement.memory.gpus)
        if gpu.terms
    }
    devices = placement.device_map()
    if placement.offloaded_bytes <= room:
        return LoadPlan(devices, predicted, placement.reason)
    moved = OWN.kept(case.weights, case.work, rig.gpus[0])  # layers that are not on a GPU compute on the first one
    spilled = spill_to_disk(case.spec, devices, moved, room)
    plan = _with_disk(case.spec, spilled, moved, predicted)
    return replace(plan, reason=f"{placement.reason}; {plan.reason}")


def _with_disk(
    spec: ModelSpec, devices: DeviceMap, weights: WeightBytes, predicted: dict[str, int]
) -> LoadPlan:
    spilled = [layer for layer in range(len(weights.layers)) if devices[spec.layer_name(layer)] == DISK]
    disk = sum(weights.layer_bytes[layer] for layer in spilled)
    reason = f"{counted(len(spilled), 'layer')} on disk ({format_gb(disk)}), read again for every token"
    return LoadPlan(devices, predicted, reason, disk)


def asked_of_machine(spec: ModelSpec, options: LoadOptions) -> tuple[Rig | None, Workload, int]:
    """The GPUs there are, what is to be computed, and the bytes of host memory that may be used."""
    rig, work, ram = visible_rig(options.gpu_memory), options.work(spec), available_ram()
    return rig, work, min(ram, options.cpu_memory) if options.cpu_memory else ram


def stored_sizes(checkpoint: Checkpoint) -> WeightBytes:
    """Bytes of a checkpoint's tensors by place."""
    tensors = {name: location.spec for name, location in checkpoint.tensors.items()}
    return header_weights(checkpoint.spec, tensors, checkpoint.config)


@contextmanager
def loaded(
    checkpoint: Checkpoint, options: LoadOptions, listen: Callable[[int], None] = lambda layer: None
) -> Iterator[Loaded]:
    """Load a checkpoint for as long as the context lasts."""
    source = CheckpointWeights(checkpoint)
    with load_from(source, stored_sizes(checkpoint), checkpoint.config, checkpoint.spec, options, listen) as found:
        yield found


@contextmanager
def load_from(
    source: Weights,
    sizes: WeightBytes,
    config: dict[str, Any],
    spec: ModelSpec,
    options: LoadOptions,
    listen: Callable[[int], None] = lambda layer: None,
) -> Iterator[Loaded]:
    """Load weights of any source; layers on disk are deleted at the end."""
    rig, work, room = asked_of_machine(spec, options)
    plan = plan_load(Case(spec, sizes, OWN, work, rig), room)
    modeling_code(spec)
    check_gpus([compute_device(where, plan.device_map) for where in plan.device_map.values()])
    return_freed_memory()
    base, clock = resident_bytes(), time.perf_counter()
    with _disk_place(options.offload_directory, plan.disk_bytes) as directory:
        model = build_model(
            source, config, spec, plan.device_map, dtype=options.dtype, offload_directory=directory, listen=listen
        )
        why_not(model, KV_DTYPES[options.kv_dtype])  # builds the kernels of a token's step, if no linear has yet
        yield Loaded(model, plan, work, time.perf_counter() - clock, base)


@contextmanager
def _disk_place(where: Path, need: int) -> Iterator[Path | None]:
    """A directory in `where` for layers on disk, deleted at the end; None where there are none.

    RunError where none can be made, or the disk is too small.
    """
    if not need:
        yield None
        return
    check_disk(where, need)
    try:
        made = tempfile.TemporaryDirectory(prefix="qwenq-offload-", dir=where)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{where.absolute()}: no place for layers ({reason})", hint="--offload-dir elsewhere") from None
    with made as directory:
        yield Path(directory)


def check_disk(directory: Path, need: int) -> None:
    """RunError when the disk cannot take the layers that do not fit into memory."""
    directory = directory.absolute()
    free = shutil.disk_usage(directory).free
    if free < need:
        raise RunError(
            f"{directory}: needs {format_gib(need)} for layers on disk, {format_gib(free)} are free: "
            f"{format_gib(need - free)} short",
            hint="--offload-dir on a larger disk",
        )


def describe(found: Loaded) -> list[str]:
    """Lines that describe what was loaded."""
    model = found.model
    counts = ", ".join(f"{count} {kind}" for kind, count in model.kernels().items())
    kinds = f"linears by kernel: {counts}" if counts else "16-bit linears"
    where = ", ".join(device_name(device) for device in model.devices)
    lines = [
        f"loaded in {found.seconds:.1f}s on {where}: {kinds}; {str(model.dtype)[6:]} activations; "
        f"context {found.work.context}; {found.plan.reason}"
    ]
    slower = model.fallbacks().items()
    return lines + [f"{counted(count, 'linear')} without the fastest kernel: {why}" for why, count in slower]
