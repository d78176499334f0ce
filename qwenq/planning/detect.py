"""The GPUs of this machine, as the NVIDIA driver (NVML) tells them, and as CUDA_VISIBLE_DEVICES leaves them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwenq.errors import PlanError
from qwenq.planning.rig import Gpu, Rig, matching_gpus
from qwenq.units import GIB

VISIBLE, ORDER, PCI_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"


def detect_rig() -> Rig:
    """This machine's visible GPUs with the memory free right now; PlanError without NVML, a driver or such a GPU.

    They are in the driver's order, by PCI bus. CUDA puts the fastest first unless CUDA_DEVICE_ORDER is
    PCI_BUS_ID, so where there are several kinds the rig says that it needs that setting.
    """
    try:
        import pynvml
    except ImportError:
        raise PlanError("--detect needs nvidia-ml-py", hint="pip install 'qwenq[detect]'") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise PlanError(
            f"no NVIDIA driver answers ({error})", hint='name the rig instead, for instance --gpu "2x RTX 3090"'
        ) from None
    try:
        every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        kinds = {str(pynvml.nvmlDeviceGetName(handle)) for handle in every}
        visible = _visible(pynvml, every, os.environ)
        read = [_read(pynvml, handle) for handle in visible]
    except pynvml.NVMLError as error:
        raise PlanError(f"the NVIDIA driver failed: {error}") from None
    finally:
        pynvml.nvmlShutdown()
    if not every:
        raise PlanError("the NVIDIA driver sees no GPU", hint="name the rig with --gpu")
    if not read:
        raise PlanError(
            f"{VISIBLE}={os.environ[VISIBLE][:80]!r} leaves none of {len(every)} GPUs",
            hint=f"unset {VISIBLE}, or name the rig with --gpu",
        )
    return Rig(
        tuple(gpu for gpu, _ in read),
        free_bytes=tuple(free for _, free in read),
        needs_pci_order=len(kinds) > 1 and os.environ.get(ORDER) != PCI_ORDER,
    )


def sees_gpu() -> bool:
    """Whether the driver tells of a GPU that CUDA_VISIBLE_DEVICES leaves; False too where nothing can ask it."""
    try:
        return bool(detect_rig().gpus)
    except PlanError:
        return False


def known_gpu(name: str, total: int, capability: tuple[int, int] | None) -> Gpu:
    """The catalogue's GPU of this name and memory, else one whose figures are unknown but for its memory."""
    same = [gpu for gpu in matching_gpus(name) if abs(gpu.memory_gib * GIB - total) <= 0.1 * total]
    if len(same) == 1:
        return replace(same[0], compute_capability=capability or same[0].compute_capability)
    memory = total / GIB
    return Gpu(
        name, "nvidia", memory, memory, None, None, None, "", None, None, "", "NVML", compute_capability=capability
    )


def _visible(nvml: Any, every: list[Any], environment: Mapping[str, str]) -> list[Any]:
    """Handles that CUDA_VISIBLE_DEVICES names, in its order: numbers, or beginnings of UUIDs; all without it.

    As in CUDA what follows an unknown entry does not count. A number counts in the driver's order.
    """
    named = environment.get(VISIBLE)
    if named is None:
        return every
    uuids = [str(nvml.nvmlDeviceGetUUID(handle)) for handle in every]
    found = []
    for entry in (part.strip() for part in named.split(",")):
        if entry.startswith("MIG-"):
            handle = nvml.nvmlDeviceGetHandleByUUID(entry)
        elif entry.isdecimal():
            handle = every[int(entry)] if len(entry) < 6 and int(entry) < len(every) else None
        else:
            same = [handle for handle, uuid in zip(every, uuids, strict=True) if entry and uuid.startswith(entry)]
            handle = same[0] if len(same) == 1 else None
        if handle is None:
            break
        found.append(handle)
    return found


def _read(nvml: Any, handle: Any) -> tuple[Gpu, int]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = (int(major), int(minor))
    except nvml.NVMLError:  # an old driver, or a part of a GPU
        capability = None
    return known_gpu(str(nvml.nvmlDeviceGetName(handle)), int(memory.total), capability), int(memory.free)
