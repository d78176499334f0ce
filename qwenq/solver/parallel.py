"""Work side by side: rows of a weight on several GPUs, and calls that share a CPU's cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwenq.solver.gptq import ROW_BLOCK, ResidualCovariance, SolveStats, solve_linears
from qwenq.solver.grid import Grid, QTensor

Solved = dict[str, tuple[QTensor, SolveStats]]


def cut_rows(sizes: Mapping[str, int], count: int) -> list[dict[str, range]]:
    """Rows of weights of so many rows cut into `count` shares, as even as whole blocks of ROW_BLOCK rows allow.

    Rows are counted through all weights, one behind the other; of a share that has no row of a weight it is left out.
    The first share has the most.
    """
    blocks = [
        (name, range(first, min(first + ROW_BLOCK, rows)))
        for name, rows in sizes.items()
        for first in range(0, rows, ROW_BLOCK)
    ]
    shares: list[dict[str, range]] = []
    for k in range(count):
        share: dict[str, range] = {}
        for name, rows in blocks[-(-len(blocks) * k // count) : -(-len(blocks) * (k + 1) // count)]:
            share[name] = range(share[name].start if name in share else rows.start, rows.stop)
        shares.append(share)
    return shares


def solve_rows(
    devices: Sequence[torch.device],
    weights: Mapping[str, Tensor],
    h_II: Tensor,
    grid: Grid,
    shares: Sequence[Mapping[str, range]],
    *,
    residuals: Mapping[str, ResidualCovariance] | None = None,
    parts: Mapping[str, tuple[int, int]] | None = None,
    **options: Any,
) -> list[Solved]:
    """Like `solve_linears`, with the same arguments, but each device solves a share of every weight's rows.

    Each device factors a copy of the Hessian, which costs no more time than waiting for one to do it and has nothing
    to exchange. On a CPU rows come out as they would alone: they are cut between blocks. GPUs' matmuls depend on how
    many rows there are, in last bits. Results lie on the device of their share; one without rows has none.
    """

    def solve(device: torch.device, share: Mapping[str, range], own_II: Tensor) -> Solved:
        own = {name: weights[name][rows.start : rows.stop].to(device) for name, rows in share.items()}
        places = {name: (parts or {}).get(name, (0, len(weights[name]))) for name in share}
        placed = {name: (first + share[name].start, whole) for name, (first, whole) in places.items()}
        lacking = {name: residuals[name].rows(share[name], device) for name in share if residuals and name in residuals}
        return solve_linears(own, own_II, grid, residuals=lacking or None, parts=placed, **options)

    work = [(device, share) for device, share in zip(devices, shares, strict=True) if share]
    for device, _ in work:
        _load_linalg(device)
    copies = [h_II.to(device, copy=k > 0) for k, (device, _) in enumerate(work)]
    solved = iter(side_by_side([partial(solve, *pair, own_II) for pair, own_II in zip(work, copies, strict=True)]))
    return [next(solved) if share else {} for share in shares]


@cache
def _load_linalg(device: torch.device) -> None:
    """Have torch load a GPU's linear algebra, once a process: it fails when threads make it do so at the same time.

    https://github.com/pytorch/pytorch/issues/90613
    """
    if device.type == "cuda":
        torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))


def joined(parts: Sequence[tuple[QTensor, SolveStats]], device: torch.device) -> tuple[QTensor, SolveStats]:
    """A linear from parts of its rows, in their order, on `device`."""
    tensors, stats = zip(*parts, strict=True)
    parameters = zip(*(tensor.parameters for tensor in tensors), strict=True)

    def whole(pieces: Sequence[Tensor]) -> Tensor:
        return pieces[0].to(device) if len(pieces) == 1 else torch.cat([piece.to(device) for piece in pieces])

    codes_OI = whole([tensor.codes_OI for tensor in tensors])
    return QTensor(codes_OI, tuple(whole(pieces) for pieces in parameters), tensors[0].grid), joined_stats(stats)


def joined_stats(stats: Sequence[SolveStats]) -> SolveStats:
    """Losses of a linear from those of parts of its rows, in their order."""
    by_row = tuple(map(torch.cat, zip(*(s.by_row for s in stats), strict=True)))
    return SolveStats(by_row, stats[0].damp_percent, stats[0].fallback)  # every part has the same factor


T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of all calls, in their order. What one raises is raised once all have ended.

    Torch's threads are shared evenly; a single call is made here, with all of them.
    """
    if len(calls) <= 1:
        return [call() for call in calls]
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
