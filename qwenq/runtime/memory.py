"""Memory of this machine's devices: what is free, what a run took, and out-of-memory errors in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qwenq.errors import QwenqError, RunError
from qwenq.host import forget_peak_rss, peak_rss_bytes, return_freed_memory
from qwenq.planning.detect import known_gpu
from qwenq.planning.rig import Gpu, Rig
from qwenq.planning.terms import context_term
from qwenq.units import format_gib

_TORCH_OOM = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)\. GPU (\d+)")
_TORCH_CPU_OOM = re.compile(r"tried to allocate (\d+) bytes")
_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Peak:
    """What one device held at most: torch's allocator, its reserve, and what the driver says the process has.

    On a CPU `allocated_bytes` is resident memory beyond what the process had before the model; the others are 0.
    """

    device: str  # GPU 0 RTX 3090, CPU
    allocated_bytes: int
    reserved_bytes: int = 0
    driver_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "driver_bytes": self.driver_bytes,
        }


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
        raise RunError(f"--gpu-memory names {len(limits)} limits for {count} GPUs", hint="one for all, or one each")
    each = list(limits) * count if len(limits) == 1 else list(limits)
    gpus, free = [], []
    for index in range(count):
        left, total = torch.cuda.mem_get_info(index)
        gpus.append(gpu_at(index))
        left = min(total, left + context_term(gpus[-1].name).n_bytes)
        free.append(min(left, each[index]) if each else left)
    return Rig(tuple(gpus), free_bytes=tuple(free))


def available_ram() -> int:
    """Bytes of host memory that can be had without swapping; a very large number where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return 1 << 60


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def device_name(device: int | str | torch.device) -> str:
    """`GPU 0 RTX 3090` or `CPU`."""
    place = torch.device(device)
    if place.type != "cuda":
        return place.type.upper()
    index = place.index or 0
    return f"GPU {index} {gpu_kind(index)}"


def gpu_at(index: int) -> Gpu:
    """The catalogue's GPU that torch sees at `index`, as plans and profiles know it, or its memory alone."""
    total = torch.cuda.get_device_properties(index).total_memory
    return known_gpu(torch.cuda.get_device_name(index), total, torch.cuda.get_device_capability(index))


def gpu_kind(index: int) -> str:
    """A GPU's name as the catalogue has it."""
    return gpu_at(index).name


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
    """Peaks since `forget_peaks`, one a device; a CPU's above `base_rss`."""
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
    """What the driver (NVML) says this process has on each GPU, CUDA context included; empty without NVML.

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


def shortage(where: str, need: int, have: int, hint: str, taken: int = 0) -> RunError:
    """The error of a device that is too small: need, what there is, shortfall, and what other processes hold."""
    others = f" ({format_gib(taken)} are taken by other processes)" if taken > 1 << 28 else ""
    return RunError(
        f"{where}: needs {format_gib(need)}, {format_gib(have)} are free{others}: {format_gib(need - have)} short",
        hint=hint,
    )


@contextmanager
def memory_errors(doing: str, device: torch.device, need: int | None, hint: str) -> Iterator[None]:
    """Turn torch's and Python's out-of-memory errors into one line that names device, need and shortfall.

    need: bytes, where known; torch's own figure is preferred, and stands alone where there is none.
    """
    try:
        yield
    except QwenqError:
        raise
    except (MemoryError, RuntimeError) as error:  # torch's own OutOfMemoryError is a RuntimeError
        said = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (said or any(words in str(error) for words in _NO_MEMORY)):
            raise
        if found := _TORCH_OOM.search(str(error)):  # torch knows better which GPU and how much
            device, need = torch.device("cuda", int(found[3])), round(float(found[1]) * _UNITS[found[2]])
        elif found := _TORCH_CPU_OOM.search(str(error)):
            device, need = torch.device("cpu"), int(found[1])
        have = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_ram()
        said_need, short = "", ""
        if need is not None:
            said_need = f"needs {format_gib(need)} more, "
            short = f": {format_gib(need - have)} short" if need > have else ": memory is in pieces, or others took it"
        raise RunError(
            f"{device_name(device)}: out of memory while {doing}: {said_need}{format_gib(have)} are free{short}",
            hint=hint,
        ) from None
