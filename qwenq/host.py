"""The machine a job runs on: what of it decides the bytes, its peak memory, and facts that decide nothing."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qwenq import __version__

KEPT_BYTES = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)


def numerics(devices: Sequence[str]) -> dict[str, Any]:
    """What decides in which order sums are taken, and so the last bits: a resumed job needs the same."""
    gpus = [torch.cuda.get_device_name(device) for device in devices if device != "cpu"]
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "instructions": ", ".join(gpus) or torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """This program and the libraries it stands on."""
    libraries = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface-hub")
    return {"qwenq": __version__, "python": platform.python_version()} | {name: version(name) for name in libraries}


def host_facts() -> dict[str, Any]:
    """Machine, system, versions and time of this run."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def forget_peak_rss() -> None:
    """Count the process's peak memory from here on, where the system lets a process say so (Linux, proc(5))."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keep_freed_memory() -> None:
    """Have the C library (glibc) reuse freed buffers of up to KEPT_BYTES instead of mapping fresh pages for each.

    A layer's activations come and go thousands of times; the faults of fresh pages are a tenth of a small model's
    time. All threads share one heap: what one frees another may have. Larger buffers still come and go as mappings, so
    that the peak of a large model stays what it is.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 4 * KEPT_BYTES)
        mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Give freed heap back to the system where the C library can (glibc keeps it otherwise)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss_bytes() -> int:
    """The process's peak resident memory (VmHWM), file pages included; 0 where the system does not tell."""
    lines = _lines("/proc/self/status")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _processor() -> str:
    named = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(named, platform.processor())


def _memory_bytes() -> int:
    lines = _lines("/proc/meminfo")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal")), 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
