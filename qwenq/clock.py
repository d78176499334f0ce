"""Seconds by stage of one layer's work, in the main thread and in lanes beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class StageClock:
    """Seconds by stage of the current layer; a stage within a stage counts for itself alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inner_s: list[float] = field(default_factory=lambda: [0.0])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._add(stage, elapsed - self._inner_s.pop())
            self._inner_s[-1] += elapsed

    @contextmanager
    def time_in_lane(self, stage: str, *, of: str, lanes: int) -> Iterator[None]:
        """What one of several lanes takes for `stage` while stage `of` is timed outside them all."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = (time.perf_counter() - start) / lanes
            with self._lock:
                self._add(stage, elapsed)
                self._add(of, -elapsed)

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
