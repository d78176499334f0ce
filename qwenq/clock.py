"""Seconds by stage of one layer's work, in the main thread and in lanes beside it.

GPUs work behind the program's back: a stage begins and ends with its GPUs idle, so that its seconds are its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


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
    def time_in_lane(self, stage: str, *, of: str, lanes: int, device: torch.device) -> Iterator[None]:
        """What one of several lanes, on `device`, takes for `stage` while stage `of` is timed outside them all."""
        start = _now([device])
        try:
            yield
        finally:
            elapsed = (_now([device]) - start) / lanes
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
