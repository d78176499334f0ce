"""A unit solved in shares of its rows, each on a GPU of its own: rows of a weight do not see each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qwenq.lanes import side_by_side
from qwenq.quant.gptq import QTensor, Shortfall, SolveStats, solve_unit
from qwenq.scheme import Scheme


def solve_rows(
    devices: Sequence[torch.device],
    weights: Mapping[str, Tensor],
    h_II: Tensor | None,
    scheme: Scheme,
    *,
    shortfalls: Mapping[str, Shortfall] | None = None,
    **options: Any,
) -> dict[str, tuple[QTensor, SolveStats]]:
    """As `solve_unit`, whose arguments these are; with a Hessian, rows of every weight are divided among `devices`.

    Each device factors a copy of the Hessian, which costs no more time than waiting for one to do it and has nothing
    to exchange. What comes back is on the first device. A device solves what it would alone, up to last bits.
    """
    count = min(len(devices), *(len(w_OI) for w_OI in weights.values()))
    if count == 1 or h_II is None:
        return solve_unit(weights, h_II, scheme, shortfalls=shortfalls, **options)

    def bounds(size: int, k: int) -> tuple[int, int]:
        return size * k // count, size * (k + 1) // count

    def rows(w_OI: Tensor, k: int) -> Tensor:
        low, high = bounds(len(w_OI), k)
        return w_OI[low:high].to(devices[k])

    def short(name: str, k: int) -> Shortfall:
        assert shortfalls is not None
        return shortfalls[name].rows(*bounds(len(weights[name]), k), devices[k])

    calls = [
        partial(
            solve_unit,
            {name: rows(w_OI, k) for name, w_OI in weights.items()},
            h_II.to(devices[k], copy=k > 0),
            scheme,
            shortfalls=shortfalls and {name: short(name, k) for name in shortfalls},
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

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(tensor, name).to(device) for tensor in tensors])

    def total(name: str) -> float:
        return sum(getattr(stat, name) for stat in stats)

    return QTensor(rows("codes_OI"), rows("scales_OG"), rows("zeros_OG"), tensors[0].scheme), SolveStats(
        total("error"),
        total("signal"),
        total("weight_error"),
        total("weight_signal"),
        max(stat.damp_percent for stat in stats),
        next((stat.fallback for stat in stats if stat.fallback), ""),
    )
