"""Memory of this machine's devices: what is free and what a run took."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwenq.errors import RunError
from qwenq.machine import forget_peak_rss, peak_rss_bytes, return_freed_memory
from qwenq.pipeline.monitor import device_name, gpu_at
from qwenq.planning.memory import context_term
from qwenq.planning.rig import Rig


@dataclass(frozen=True)
class Peak:
    """Peak memory of one device: torch's allocated and reserved memory, and the driver's figure for the process.

    On a CPU `allocated_bytes` is resident memory beyond what the process had before the model; the others are 0.
    """

    device: str  # GPU 0 RTX 3090, CPU
    allocated_bytes: int
    reserved_bytes: int = 0
    driver_bytes: int = 0


def visible_rig(limits: Sequence[int] = ()) -> Rig | None:
    """The GPUs torch sees with what is free on each, at most `limits` (one for all, or one each); None without a GPU.

    To ask makes this process's context on a GPU, which the plan counts: it is added to what is then free. RunError when
    the limits do not match the GPUs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if limits:
            raise RunError("--gpu-memory is given, but torch sees no GPU", hint="leave it out to run on the CPU")
        return None
    if len(limits) not in (0, 1, count):
        raise RunError(
            f"--gpu-memory names {len(limits)} limits, the number of GPUs is {count}", hint="one for all, or one each"
        )
    each = list(limits) * count if len(limits) == 1 else list(limits)
    gpus, free = [], []
    for index in range(count):
        left, total = torch.cuda.mem_get_info(index)
        gpus.append(gpu_at(index))
        left = min(total, left + context_term(gpus[-1].name).n_bytes)
        free.append(min(left, each[index]) if each else left)
    return Rig(tuple(gpus), free_bytes=tuple(free))


def forget_peaks(devices: Sequence[torch.device]) -> None:
    """Begin a new measurement."""
    return_freed_memory()  # else what was freed before still counts as resident
    forget_peak_rss()
    if any(device.type == "cuda" for device in devices):
        torch.cuda.empty_cache()  # what an earlier, shorter cache left would count as reserved
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def read_peaks(devices: Sequence[torch.device], base_rss: int) -> list[Peak]:
    """Peaks since `forget_peaks`, one per device; a CPU's above `base_rss`."""
    driver = driver_bytes()
    peaks = []
    for device in devices:
        if device.type == "cuda":
            index = device.index or 0
            allocated = torch.cuda.max_memory_allocated(device)
            reserved = torch.cuda.max_memory_reserved(device)
            peaks.append(Peak(device_name(device), allocated, reserved, driver.get(index, 0)))
        else:
            peaks.append(Peak(device_name(device), max(0, peak_rss_bytes() - base_rss)))
    return peaks


def driver_bytes() -> dict[int, int]:
    """The driver's (NVML's) memory of this process on each GPU, CUDA context included; empty without NVML.

    Where the driver does not tell processes apart (containers), it is everything in use on the GPU.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no permission: the figure is then left out
        return {}
    found = {}
    try:
        for index in range(torch.cuda.device_count()):
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
            mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
            if mine and mine[0].usedGpuMemory:
                found[index] = int(mine[0].usedGpuMemory)
            else:
                found[index] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except (pynvml.NVMLError, AttributeError):
        return found
    finally:
        pynvml.nvmlShutdown()
    return found
