"""The machine a job runs on: what of it decides the bytes, its memory and disk, and facts that decide nothing."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwenq import __version__

KEPT_BYTES = 24 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)


def numerics(devices: Sequence[str]) -> dict[str, Any]:
    """Settings that determine the order of sums, and so the last bits; a resumed job needs the same."""
    from importlib.metadata import version

    import torch

    gpus = [torch.cuda.get_device_name(device) for device in devices if device != "cpu"]
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "instructions": ", ".join(gpus) or torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """This program and the libraries it stands on."""
    from importlib.metadata import version

    libraries = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface-hub")
    return {"qwenq": __version__, "python": platform.python_version()} | {name: version(name) for name in libraries}


def host_facts() -> dict[str, Any]:
    """Machine, system, versions and time of this run."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory() or 0,
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 (AVX-512 BF16, AMX, Arm's BF16)."""
    return bool(_instructions() & {"avx512_bf16", "amx_bf16", "bf16"})


def _instructions() -> set[str]:
    """The system's words about this CPU, including its instruction sets; empty if unknown."""
    return {word for line in _lines("/proc/cpuinfo") for word in line.split()}


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
    import ctypes

    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 4 * KEPT_BYTES)
        mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Give freed heap back to the system where the C library can (glibc keeps it otherwise)."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss_bytes() -> int:
    """The process's peak resident memory (VmHWM), file pages included; 0 where the system does not tell."""
    return _kibibytes("/proc/self/status", "VmHWM")


def _kibibytes(path: str, name: str) -> int:
    """Bytes of a line `VmHWM:  1234 kB` of the system's; 0 where there is none."""
    return next((int(line.split()[1]) * 1024 for line in _lines(path) if line.startswith(name + ":")), 0)


def _processor() -> str:
    named = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(named, platform.processor())


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def free_disk(out: Path) -> int:
    """Bytes free on the disk that `out` is or will be on."""
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def total_memory() -> int | None:
    """Bytes of this machine's memory, or of its container's share; None where the system does not tell."""
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return min([installed, *(limit for limit, _ in _memory_limits())])


_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def _memory_limits() -> list[tuple[int, int]]:
    """Limit and what is free below it, in bytes, of each control group around this process: containers have them.

    Both versions of Linux's interface: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. File pages
    count as used there, and are given up on demand.
    """
    found = []
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used, prefix = _CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limit, used, prefix = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        own = root / path.lstrip("/")
        for group in [own, *own.parents][: len(own.relative_to(root).parts) + 1]:
            try:
                stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                files = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
                most = int((group / limit).read_text())
                found.append((most, max(0, most - int((group / used).read_text()) + files)))
            except (OSError, ValueError, KeyError):  # not there, seen from a container, or "max"
                continue
    return found


SCORE_BYTES = 32 << 20  # of a block's attention scores on a GPU without a flash kernel (model/attention.py)


@dataclass(frozen=True)
class Compute:
    """Inputs to the choice of a kernel besides the linear."""

    dtype: str = "bfloat16"
    device: str = "cuda"
    capability: tuple[int, int] = (8, 0)
    triton: bool = True  # torch's CUDA wheels for Linux bring it
    compiler: bool = True  # this project's CPU kernels can be built

    @property
    def has_flash(self) -> bool:
        """Whether torch has a flash attention kernel for it."""
        return self.device == "cuda" and self.dtype != "float32" and self.capability >= (8, 0)

    @property
    def widens(self) -> bool:
        """Whether products of bfloat16 values are computed in float32: a GPU without instructions for them."""
        return self.device == "cuda" and self.dtype == "bfloat16" and self.capability < (8, 0)


def has_triton() -> bool:
    """Whether Triton is installed beside torch."""
    return find_spec("triton") is not None


def lacks_for_cpu_kernels() -> str:
    """Why this project's CPU kernels cannot be compiled here, as far as can be told; empty if nothing."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "this project's CPU kernels need Linux on x86"
    if not {"avx2", "fma", "f16c"} <= _instructions():
        return "this project's CPU kernels need AVX2, FMA and F16C"
    if not (words := compiler()) or shutil.which(words[0]) is None:
        return "this project's CPU kernels need a C compiler (cc, or what CC names)"
    return ""


def compiler() -> list[str]:
    """The C compiler's command: `CC` or cc."""
    return shlex.split(os.environ.get("CC", "cc"))


UNTOLD_RAM = 1 << 60  # what `available_ram` answers where the system does not tell


def available_ram() -> int:
    """Bytes of host memory that can be had without swapping or leaving the container's share of it.

    UNTOLD_RAM where the system does not tell.
    """
    free = _kibibytes("/proc/meminfo", "MemAvailable") or UNTOLD_RAM
    return min([free, *(below for _, below in _memory_limits())])


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell."""
    return _kibibytes("/proc/self/status", "VmRSS")
