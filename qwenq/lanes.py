"""Calls made side by side, each in a thread that has its share of the cores; and how many such lanes a CPU gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

from qwenq.preflight import LANES_UP_TO, MOST_LANES

T = TypeVar("T")


def cpu_lanes(windows: int, intermediate_size: int) -> int:
    """Lanes for so many windows at a time: as many as share these and torch's threads evenly, MOST_LANES at most."""
    if intermediate_size > LANES_UP_TO:
        return 1
    threads = torch.get_num_threads()
    return max(n for n in range(1, MOST_LANES + 1) if threads % n == 0 and max(1, windows) % n == 0)


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of all calls, in their order. What one raises is raised once all have ended.

    Torch's threads are shared evenly; a single call is made here, with all of them.
    """
    if len(calls) == 1:
        return [calls[0]()]
    inference = torch.is_inference_mode_enabled()

    def one(call: Callable[[], T]) -> T:
        with torch.inference_mode(inference):  # a mode of its thread
            return call()

    pool = _pool(len(calls), max(1, torch.get_num_threads() // len(calls)))
    futures = [pool.submit(one, call) for call in calls]
    wait(futures)
    return [future.result() for future in futures]


@cache
def _pool(count: int, threads: int) -> ThreadPoolExecutor:
    """`count` threads, each with `threads` threads of torch's."""
    here = torch.get_num_threads()
    all_begun = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread begins with the process's number at its first question, and not again
        torch.set_num_threads(threads)
        all_begun.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="qwenq-lane")
    for _ in range(count):
        pool.submit(begin)
    all_begun.wait()
    torch.set_num_threads(here)  # what a thread sets is also what later ones begin with
    return pool
