"""Seconds by stage of one layer's work, and out-of-memory errors in one line that names the device.

GPUs work behind the program's back: a stage begins and ends with its GPUs idle, so that its seconds are its own.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qwenq.errors import QwenqError, RunError, out_of_memory
from qwenq.machine import available_ram
from qwenq.planning.rig import Gpu, known_gpu
from qwenq.units import format_gib


@dataclass
class StageClock:
    """Seconds by stage of the current layer; a stage within a stage counts for itself alone."""

    devices: Sequence[torch.device | str] = ()  # that the main thread waits for
    seconds: dict[str, float] = field(default_factory=dict)
    _inner_s: list[float] = field(default_factory=lambda: [0.0])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = _now(self.devices)
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            elapsed = _now(self.devices) - start
            self._add(stage, elapsed - self._inner_s.pop())
            self._inner_s[-1] += elapsed

    @contextmanager
    def time_in_worker(self, stage: str, *, of: str, workers: int, device: torch.device) -> Iterator[None]:
        """Seconds that one of several workers, on `device`, takes for `stage` while `of` is timed outside them all."""
        start = _now([device])
        try:
            yield
        finally:
            elapsed = (_now([device]) - start) / workers
            with self._lock:
                self._add(stage, elapsed)
                self._add(of, -elapsed)

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def _now(devices: Sequence[torch.device | str]) -> float:
    """Seconds on the clock once these devices have done what they were given."""
    for device in map(torch.device, devices):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()


_TORCH_OOM = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)\. GPU (\d+)")
_TORCH_CPU_OOM = re.compile(r"tried to allocate (\d+) bytes")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def device_name(device: int | str | torch.device) -> str:
    """`GPU 0 RTX 3090` or `CPU`."""
    place = torch.device(device)
    if place.type != "cuda":
        return place.type.upper()
    index = place.index or 0
    return f"GPU {index} {gpu_at(index).name}"


def gpu_at(index: int) -> Gpu:
    """The catalogue's GPU that torch sees at `index`, as plans and profiles know it, or its memory alone."""
    total = torch.cuda.get_device_properties(index).total_memory
    return known_gpu(torch.cuda.get_device_name(index), total, torch.cuda.get_device_capability(index))


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
        cause = error if isinstance(error, torch.OutOfMemoryError) else out_of_memory(error)
        if cause is None:
            raise
        if found := _TORCH_OOM.search(str(cause)):  # torch knows better which GPU and how much
            device, need = torch.device("cuda", int(found[3])), round(float(found[1]) * _UNITS[found[2]])
        elif found := _TORCH_CPU_OOM.search(str(cause)):
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
