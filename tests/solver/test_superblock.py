"""Grids of GGUF's types, solved: better than rounded, each sweep better, what lies in a super-block stays there."""

from __future__ import annotations

import pytest
import torch
from test_made_up_grids import problem
from torch import Tensor

from qwenq.formats.gguf import WRITTEN, type_scheme
from qwenq.solver.gptq import round_rows, solve_linears
from qwenq.solver.grid import Grid, QTensor
from qwenq.solver.superblock import IQ4_LEVELS, AffineGrid, SuperAffineGrid, SuperGrid, TableGrid

GRIDS = {kind: type_scheme(kind).grid() for kind in WRITTEN}


def lost(w_OI: Tensor, q: QTensor, h_II: Tensor) -> float:
    e_OI = (w_OI - q.dequantize()).double()
    return float(((e_OI @ h_II.double()) * e_OI).sum())


@pytest.mark.parametrize("kind", WRITTEN)
def test_solved_is_better_than_rounded_and_each_sweep_better(kind: str) -> None:
    w_OI, h_II = problem()
    grid = GRIDS[kind]
    rounded = solve_linears({"w": w_OI}, h_II.clone(), grid, method="rtn")["w"][0]
    errors = [
        lost(w_OI, solve_linears({"w": w_OI}, h_II.clone(), grid, sweeps=sweeps)["w"][0], h_II) for sweeps in range(3)
    ]
    assert errors[0] < 0.5 * lost(w_OI, rounded, h_II)
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.97 * errors[0]


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_fitted_grid_is_better_than_a_spanning_one(kind: str) -> None:
    w_OI = torch.randn(16, 512, generator=torch.Generator().manual_seed(3))
    spanned = solve_linears({"w": w_OI}, None, GRIDS[kind], method="rtn")["w"][0]
    fitted = round_rows(w_OI, GRIDS[kind])
    error, plain = (float((w_OI - q.dequantize()).square().sum()) for q in (fitted, spanned))
    assert error < plain
    assert torch.equal(round_rows(w_OI[3:5], GRIDS[kind]).codes_OI, fitted.codes_OI[3:5]), "rows stand alone"


def by_loop(q: QTensor, row: int, column: int) -> float:
    """One weight by what the parameters are said to mean, in float64."""
    grid, code = q.grid, int(q.codes_OI[row, column])
    first = [float(p_ON[row, column * p_ON.shape[1] // q.codes_OI.shape[1]]) for p_ON in q.parameters]
    if isinstance(grid, AffineGrid):
        return first[0] * code + first[1]
    if isinstance(grid, TableGrid):
        return first[0] * IQ4_LEVELS[code]
    if isinstance(grid, SuperGrid):
        return first[0] * first[1] * (IQ4_LEVELS[code] if grid.levels else code - (1 << (grid.bits - 1)))
    if isinstance(grid, SuperAffineGrid):
        return first[0] * first[2] * code - first[1] * first[3]
    return first[0] * (code - first[1])


@pytest.mark.parametrize("kind", WRITTEN)
def test_values_are_what_the_parameters_mean(kind: str) -> None:
    w_OI, h_II = problem(rows=3)
    q, stats = solve_linears({"w": w_OI}, h_II, GRIDS[kind])["w"]
    wanted = torch.tensor([[by_loop(q, row, column) for column in range(512)] for row in range(3)])
    torch.testing.assert_close(q.dequantize(), wanted, rtol=1e-5, atol=1e-6)
    assert stats.fallback == ""
    assert [p.dtype for p in q.parameters] == list(q.grid.stored_dtypes)


@pytest.mark.parametrize("kind", WRITTEN)
def test_empty_and_constant_columns_are_held(kind: str) -> None:
    w_OI = torch.zeros(4, 512)
    w_OI[1] = 0.5
    w_OI[2, 7] = -3.0
    w_OI[3, 300:] = 1e-9
    for q in (round_rows(w_OI, GRIDS[kind]), solve_linears({"w": w_OI}, torch.eye(512), GRIDS[kind])["w"][0]):
        found = q.dequantize()
        assert bool(found.isfinite().all())
        assert float(found[0].abs().max()) == 0
        assert float((found[1] - 0.5).abs().max()) < 0.02
        assert abs(float(found[2, 7]) + 3) < 0.15


class _Spy(SuperGrid):
    """Counts the columns of what is fitted."""

    seen: list[tuple[int, int]] = []  # noqa: RUF012

    def fit(self, w_KO: Tensor, importance_K: Tensor | None = None) -> tuple[Tensor, ...]:
        self.seen.append((len(w_KO), -1))
        return super().fit(w_KO, importance_K)

    def fit_within(
        self, parameters: tuple[Tensor, ...], sub: int, w_NO: Tensor, importance_N: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        self.seen.append((len(w_NO), sub))
        return super().fit_within(parameters, sub, w_NO, importance_N)


def test_each_sub_group_is_fitted_again_when_its_turn_comes() -> None:
    w_OI, h_II = problem(rows=2)
    _Spy.seen.clear()
    solve_linears({"w": w_OI}, h_II, _Spy(6, 16, -128), sweeps=0)
    once = [(256, -1), *((16, sub) for sub in range(15, -1, -1))]
    assert _Spy.seen == once * 2


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q6_K", "IQ4_XS"])
def test_integers_stay_in_their_range(kind: str) -> None:
    w_OI, h_II = problem()
    q = solve_linears({"w": w_OI * torch.rand(24, 512)}, h_II, GRIDS[kind])["w"][0]
    grid: Grid = q.grid
    for p_ON in q.parameters[1 if isinstance(grid, SuperGrid) else 2 :]:
        low, high = (grid.lowest, -1 - grid.lowest) if isinstance(grid, SuperGrid) else (0, 15)
        assert low <= int(p_ON.min()) and int(p_ON.max()) <= high


def test_a_table_of_levels_goes_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph that dequantizes cannot copy it from the host."""
    codes_KO, scale_1O = torch.arange(16, dtype=torch.uint8).repeat(2)[:, None], torch.ones(1, 1)
    first_KO = TableGrid().dequantize(codes_KO, (scale_1O,))
    assert first_KO[:16, 0].tolist() == list(IQ4_LEVELS)
    monkeypatch.setattr(torch, "tensor", lambda *values, **options: pytest.fail("made again"))
    assert torch.equal(TableGrid().dequantize(codes_KO, (scale_1O,)), first_KO)
