"""Work side by side: rows of a weight on several GPUs, and calls that share a CPU's cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwenq.solver.gptq import ResidualCovariance, SolveStats, solve_linears
from qwenq.solver.grid import Grid, QTensor


def solve_rows(
    devices: Sequence[torch.device],
    weights: Mapping[str, Tensor],
    h_II: Tensor | None,
    grid: Grid,
    *,
    residuals: Mapping[str, ResidualCovariance] | None = None,
    **options: Any,
) -> dict[str, tuple[QTensor, SolveStats]]:
    """As `solve_linears`, whose arguments these are; with a Hessian, rows of every weight are divided among `devices`.

    Each device factors a copy of the Hessian, which costs no more time than waiting for one to do it and has nothing
    to exchange. What comes back is on the first device. A device solves what it would alone, up to last bits.
    """
    count = min(len(devices), *(len(w_OI) for w_OI in weights.values()))
    if count == 1 or h_II is None:
        return solve_linears(weights, h_II, grid, residuals=residuals, **options)

    def bounds(size: int, k: int) -> tuple[int, int]:
        return size * k // count, size * (k + 1) // count

    def rows(w_OI: Tensor, k: int) -> Tensor:
        low, high = bounds(len(w_OI), k)
        return w_OI[low:high].to(devices[k])

    def residual(name: str, k: int) -> ResidualCovariance:
        assert residuals is not None
        return residuals[name].rows(*bounds(len(weights[name]), k), devices[k])

    calls = [
        partial(
            solve_linears,
            {name: rows(w_OI, k) for name, w_OI in weights.items()},
            h_II.to(devices[k], copy=k > 0),
            grid,
            residuals=residuals and {name: residual(name, k) for name in residuals},
            **options,
        )
        for k in range(count)
    ]
    for device in devices[:count]:
        _load_linalg(device)
    solved = side_by_side(calls)
    return {name: _joined([part[name] for part in solved], devices[0]) for name in weights}


@cache
def _load_linalg(device: torch.device) -> None:
    """Have torch load a GPU's linear algebra, once a process: it fails when threads make it do so at the same time.

    https://github.com/pytorch/pytorch/issues/90613
    """
    if device.type == "cuda":
        torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))


def _joined(parts: Sequence[tuple[QTensor, SolveStats]], device: torch.device) -> tuple[QTensor, SolveStats]:
    tensors, stats = zip(*parts, strict=True)

    def total(name: str) -> float:
        return sum(getattr(stat, name) for stat in stats)

    def joined(pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat([piece.to(device) for piece in pieces])

    parameters = tuple(joined(pieces) for pieces in zip(*(tensor.parameters for tensor in tensors), strict=True))
    codes_OI = joined([tensor.codes_OI for tensor in tensors])
    return QTensor(codes_OI, parameters, tensors[0].grid), SolveStats(
        total("error"),
        total("signal"),
        total("weight_error"),
        total("weight_signal"),
        max(stat.damp_percent for stat in stats),
        next((stat.fallback for stat in stats if stat.fallback), ""),
    )


T = TypeVar("T")


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

    pool = ThreadPoolExecutor(count, thread_name_prefix="qwenq-worker")
    for _ in range(count):
        pool.submit(begin)
    all_begun.wait()
    torch.set_num_threads(here)  # what a thread sets is also what later ones begin with
    return pool
