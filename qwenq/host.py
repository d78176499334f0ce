"""The machine a job runs on: its peak memory, and the facts that a manifest keeps apart in `run`."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def host_facts() -> dict[str, Any]:
    """Machine, system, versions and time of this run."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def forget_peak_rss() -> None:
    """Count the process's peak memory from here on, where the system lets a process say so (Linux, proc(5))."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """The process's peak resident memory (VmHWM), file pages included; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
