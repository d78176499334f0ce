"""Columns of a group rounded one after the other, and on a GPU as one CUDA graph for all groups of a weight.

A column takes half a dozen kernels of a few microseconds each. Launching them one by one takes a GPU ten times as long
as computing them (reports/gpu.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from qwenq.solver.grid import ColumnRounder, Grid, Parameters

LEAF = 16  # columns corrected one by one
PAYS_FROM = 3  # groups of a weight: kernels are launched twice before a graph is replayed, and its operands copied
_CAPTURING = threading.Lock()  # in a process only one capture may be under way (torch's notes on CUDA semantics)


def solve_columns(
    t_KO: Tensor, e_KO: Tensor, codes_KO: Tensor, r_KK: Tensor, round_column: ColumnRounder, first: int = 0
) -> None:
    """Round columns from the last to the first, halving recursively so that most corrections are matmuls.

    In: `e_KO` the weights, `t_KO` the weights plus the corrections from columns outside this range.
    Out: `e_KO` weights minus rounded weights, `t_KO` the values that were rounded, `codes_KO` codes in float32.
    `first`: of these columns, counted in their group.
    """
    columns = t_KO.shape[0]
    if columns > LEAF:
        half = columns // 2
        solve_columns(t_KO[half:], e_KO[half:], codes_KO[half:], r_KK[half:, half:], round_column, first + half)
        t_KO[:half].addmm_(r_KK[half:, :half].T, e_KO[half:])
        solve_columns(t_KO[:half], e_KO[:half], codes_KO[:half], r_KK[:half, :half], round_column, first)
        return
    for k in range(columns - 1, -1, -1):
        value_O = t_KO[k]
        if k + 1 < columns:
            value_O.addmv_(e_KO[k + 1 :].T, r_KK[k + 1 :, k])
        round_column(first + k, value_O, codes_KO[k], e_KO[k])


class ColumnSolver:
    """`solve_columns` for one group of a weight after another, on the weight's grid."""

    def __init__(self, grid: Grid, groups: int) -> None:
        self._grid, self._pays = grid, groups >= PAYS_FROM
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}  # by the operands' shapes

    def __call__(
        self, t_KO: Tensor, e_KO: Tensor, codes_KO: Tensor, r_KK: Tensor, parameters: Parameters
    ) -> None:
        """`solve_columns` of a group that has these parameters; what `t_KO` holds afterwards is left open."""
        if not self._pays or not graphed(t_KO.device):
            solve_columns(t_KO, e_KO, codes_KO, r_KK, self._grid.column_rounder(parameters, len(t_KO)))
            return
        shapes = tuple(operand.shape for operand in (t_KO, *parameters))
        if shapes not in self._graphs:
            self._graphs[shapes] = _Graph(self._grid, t_KO, r_KK, parameters)
        self._graphs[shapes](t_KO, e_KO, codes_KO, r_KK, parameters)


def graphed(device: torch.device) -> bool:
    """Whether columns are rounded by a captured graph."""
    return device.type == "cuda"


class _Graph:
    """A group's kernels, captured over tensors of its own, and replayed for operands of the same shapes."""

    def __init__(self, grid: Grid, t_KO: Tensor, r_KK: Tensor, parameters: Parameters) -> None:
        self._t_KO, self._e_KO, self._codes_KO = (torch.zeros_like(t_KO) for _ in range(3))
        self._r_KK, self._parameters = torch.zeros_like(r_KK), tuple(torch.ones_like(p_NO) for p_NO in parameters)
        self._replay = captured(t_KO.device, partial(self._run, grid))

    def _run(self, grid: Grid) -> None:
        rounder = grid.column_rounder(self._parameters, len(self._t_KO))
        solve_columns(self._t_KO, self._e_KO, self._codes_KO, self._r_KK, rounder)

    def __call__(
        self, t_KO: Tensor, e_KO: Tensor, codes_KO: Tensor, r_KK: Tensor, parameters: Parameters
    ) -> None:
        given = (t_KO, e_KO, r_KK, *parameters)
        for own, operand in zip((self._t_KO, self._e_KO, self._r_KK, *self._parameters), given, strict=True):
            own.copy_(operand)
        self._replay()
        e_KO.copy_(self._e_KO)
        codes_KO.copy_(self._codes_KO)


def captured(device: torch.device, run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph, to be replayed on the tensors that it works on. Threads of other GPUs wait their turn."""
    graph = torch.cuda.CUDAGraph()
    with _CAPTURING, torch.cuda.device(device):
        stream = _capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries load where that is not captured
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it was ever called on."""
    return torch.cuda.Stream(device)
