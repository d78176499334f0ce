"""The solver's loop on a grid it was not written for: 6-bit scales under a super-block's scale."""

from __future__ import annotations

import pytest
import torch
from made_up_grids import SuperBlockGrid
from test_gptq import correlated
from torch import Tensor

from qwenq.solver.gptq import processing_order, solve_linears
from qwenq.solver.grid import QTensor
from qwenq.solver.parallel import cut_rows, joined, solve_rows

CPU = torch.device("cpu")
GRID = SuperBlockGrid()


def problem(columns: int = 512, rows: int = 24) -> tuple[Tensor, Tensor]:
    x_TI = correlated(columns, tokens=2000)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)), x_TI.T @ x_TI


def by_hand(q: QTensor) -> Tensor:
    """The weight, column by column, by what the grid's parameters are said to mean."""
    d_ON, s_OS = q.parameters[0].float(), q.parameters[1]
    columns = range(q.codes_OI.shape[1])
    return torch.stack([(q.codes_OI[:, k].long() - 8) * d_ON[:, k // 256] * s_OS[:, k // 32] for k in columns], 1)


def lost(w_OI: Tensor, q: QTensor, h_II: Tensor) -> float:
    e_OI = (w_OI - by_hand(q)).double()
    return float(((e_OI @ h_II.double()) * e_OI).sum())


def test_solved_is_better_than_rounded_to_nearest() -> None:
    w_OI, h_II = problem()
    solved, stats = solve_linears({"w": w_OI}, h_II.clone(), GRID)["w"]
    rounded, _ = solve_linears({"w": w_OI}, h_II.clone(), GRID, method="rtn")["w"]
    assert lost(w_OI, solved, h_II) < 0.4 * lost(w_OI, rounded, h_II)
    assert torch.equal(solved.dequantize(), by_hand(solved)), "parameters lie where their columns do"
    signal = float((w_OI.double() @ h_II.double() * w_OI.double()).sum())
    assert stats.error / stats.signal == pytest.approx(lost(w_OI, solved, h_II) / signal, rel=1e-3)
    assert [p.dtype for p in solved.parameters] == list(GRID.stored_dtypes)
    assert [p.shape[1] for p in solved.parameters] == [2, 16]


def test_each_sweep_lowers_the_error() -> None:
    w_OI, h_II = problem()
    errors = [
        lost(w_OI, solve_linears({"w": w_OI}, h_II.clone(), GRID, sweeps=sweeps)["w"][0], h_II) for sweeps in range(3)
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.97 * errors[0]


def test_rows_may_be_solved_apart() -> None:
    w_OI, h_II = problem(rows=150)
    whole, _ = solve_linears({"w": w_OI}, h_II.clone(), GRID)["w"]
    shares = cut_rows({"w": len(w_OI)}, 2)
    solved = solve_rows([CPU] * 2, {"w": w_OI}, h_II.clone(), GRID, shares)
    parts, _ = joined([part["w"] for part in solved], CPU)
    assert [p.shape for p in parts.parameters] == [p.shape for p in whole.parameters]
    assert torch.equal(parts.codes_OI, whole.codes_OI)
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters, whole.parameters, strict=True))


def test_sub_groups_stay_whole_and_in_their_super_block() -> None:
    diagonal = torch.rand(512, generator=torch.Generator().manual_seed(2))
    order = processing_order(diagonal, GRID)
    assert sorted(order.tolist()) == list(range(512))
    assert all(len(set((part // 32).tolist())) == 1 for part in order.split(32))
    assert all(len(set((part // 256).tolist())) == 1 for part in order.split(256))
    for part in order.split(32):
        assert diagonal[part].tolist() == sorted(diagonal[part].tolist())
    sums = [float(diagonal[part].sum()) for part in order.split(32)]
    assert sums[:8] == sorted(sums[:8]) and sums[8:] == sorted(sums[8:])
