"""The solver's loop on grids it was not written for: unequal levels, and 6-bit scales under a super-block's scale."""

from __future__ import annotations

import pytest
import torch
from made_up_grids import LEVELS, SuperBlockGrid, TableGrid
from test_gptq import correlated
from torch import Tensor

from qwenq.solver.gptq import processing_order, solve_linears
from qwenq.solver.grid import Grid, QTensor
from qwenq.solver.parallel import cut_rows, joined, solve_rows

CPU = torch.device("cpu")
GRIDS = (TableGrid(), SuperBlockGrid())


def problem(columns: int = 512, rows: int = 24) -> tuple[Tensor, Tensor]:
    x_TI = correlated(columns, tokens=2000)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)), x_TI.T @ x_TI


def by_hand(q: QTensor) -> Tensor:
    """The weight, column by column, by what each grid's parameters are said to mean."""
    columns = []
    for k in range(q.codes_OI.shape[1]):
        code_O, first = q.codes_OI[:, k].long(), q.parameters[0].float()
        if isinstance(q.grid, TableGrid):
            columns.append(torch.tensor(LEVELS)[code_O] * first[:, k // 32])
        else:
            columns.append((code_O - 8) * first[:, k // 256] * q.parameters[1][:, k // 32])
    return torch.stack(columns, 1)


def lost(w_OI: Tensor, q: QTensor, h_II: Tensor) -> float:
    e_OI = (w_OI - by_hand(q)).double()
    return float(((e_OI @ h_II.double()) * e_OI).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: type(grid).__name__)
def test_solved_is_better_than_rounded_to_nearest(grid: Grid) -> None:
    w_OI, h_II = problem()
    solved, stats = solve_linears({"w": w_OI}, h_II.clone(), grid)["w"]
    rounded, _ = solve_linears({"w": w_OI}, h_II.clone(), grid, method="rtn")["w"]
    assert lost(w_OI, solved, h_II) < 0.4 * lost(w_OI, rounded, h_II)
    assert torch.equal(solved.dequantize(), by_hand(solved)), "parameters lie where their columns do"
    signal = float((w_OI.double() @ h_II.double() * w_OI.double()).sum())
    assert stats.error / stats.signal == pytest.approx(lost(w_OI, solved, h_II) / signal, rel=1e-3)
    assert [p.dtype for p in solved.parameters] == list(grid.stored_dtypes)
    assert [p.shape[1] for p in solved.parameters] == ([16] if isinstance(grid, TableGrid) else [2, 16])


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: type(grid).__name__)
def test_each_sweep_lowers_the_error(grid: Grid) -> None:
    w_OI, h_II = problem()
    errors = [
        lost(w_OI, solve_linears({"w": w_OI}, h_II.clone(), grid, sweeps=sweeps)["w"][0], h_II) for sweeps in range(3)
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.97 * errors[0]


def test_rows_may_be_solved_apart() -> None:
    w_OI, h_II = problem(rows=150)
    whole, _ = solve_linears({"w": w_OI}, h_II.clone(), SuperBlockGrid())["w"]
    shares = cut_rows({"w": len(w_OI)}, 2)
    solved = solve_rows([CPU] * 2, {"w": w_OI}, h_II.clone(), SuperBlockGrid(), shares)
    parts, _ = joined([part["w"] for part in solved], CPU)
    assert [p.shape for p in parts.parameters] == [p.shape for p in whole.parameters]
    assert torch.equal(parts.codes_OI, whole.codes_OI)
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters, whole.parameters, strict=True))


def test_sub_groups_stay_whole_and_in_their_super_block() -> None:
    diagonal = torch.rand(512, generator=torch.Generator().manual_seed(2))
    order = processing_order(diagonal, SuperBlockGrid())
    assert sorted(order.tolist()) == list(range(512))
    assert all(len(set((part // 32).tolist())) == 1 for part in order.split(32))
    assert all(len(set((part // 256).tolist())) == 1 for part in order.split(256))
    for part in order.split(32):
        assert diagonal[part].tolist() == sorted(diagonal[part].tolist())
    sums = [float(diagonal[part].sum()) for part in order.split(32)]
    assert sums[:8] == sorted(sums[:8]) and sums[8:] == sorted(sums[8:])
