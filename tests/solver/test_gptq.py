import math
import threading
import time
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.errors import QwenqError
from qwenq.formats.gguf import type_scheme
from qwenq.solver import columns, gptq
from qwenq.solver.gptq import (
    DAMP_PERCENT,
    ResidualCovariance,
    damping_of_products,
    factor_lower,
    permute_symmetric,
    processing_order,
    solve_linears,
)
from qwenq.solver.grid import IntegerGrid
from qwenq.solver.parallel import joined_stats

GRIDS = [
    IntegerGrid(4, 32), IntegerGrid(4, 64), IntegerGrid(4, 128), IntegerGrid(4, -1), IntegerGrid(8, 64),
    IntegerGrid(4, 64, sym=False),
]  # fmt: skip


def correlated(columns, tokens=1500, seed=0):
    """Calibration inputs with strong correlations and a few large channels, as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return (torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator) * 3) @ mix


def problem(columns=256, rows=24, seed=0):
    x_TI = correlated(columns, seed=seed)
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return w_OI, x_TI.T @ x_TI


def scalar_gptq(w_OI, h_II, grid, damp_percent):
    """The paper's algorithm as it stands there: factor of the inverse, one row and one column at a time."""
    columns, width = w_OI.shape[1], grid.group_width(w_OI.shape[1])
    h = h_II.double().clone()
    diagonal = h.diagonal().clone()
    damp = damp_percent * diagonal.mean()
    order = processing_order(diagonal, grid).flip(0)
    h = h[order][:, order]
    h.diagonal().add_(damp)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    weight_I = u.diagonal().pow(-2).float()  # what an error of column i costs once later columns have answered it
    u = u.tolist()
    out = torch.zeros_like(w_OI)
    for o in range(w_OI.shape[0]):
        w = w_OI[o, order].double().tolist()
        done = []
        for i in range(columns):
            if i % width == 0:
                group_KO = torch.tensor(w[i : i + width]).float()[:, None]
                scale, zero = (x.item() for x in grid.fit(group_KO, weight_I[i : i + width]))
            code = min(max(round(w[i] / scale + zero), 0), grid.levels - 1)
            done.append(scale * (code - zero))
            step = (w[i] - done[-1]) / u[i][i]
            for j in range(i, columns):
                w[j] -= step * u[i][j]
        out[o, order] = torch.tensor(done)
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_a_plain_loop(grid):
    w_OI, h_II = problem(rows=6)
    wanted = scalar_gptq(w_OI, h_II, grid, 0.01)
    q, stats = solve_linears({"w": w_OI}, h_II.clone(), grid, damp_percent=0.01, sweeps=0)["w"]
    found = q.dequantize()
    if grid.bits == 4:
        assert (found != wanted).float().mean() < 0.005  # a tie in the last bit may fall either way
    assert (found - wanted).abs().mean() < 1e-3
    error, signal = w_OI - found, w_OI
    lost, norm = ((e @ h_II * e).sum() for e in (error, signal))
    assert stats.error_db == pytest.approx(10 * math.log10(lost / norm), abs=0.05)
    assert stats.weight_error_db == pytest.approx(10 * math.log10(error.square().sum() / w_OI.square().sum()), abs=1e-3)
    assert (stats.damp_percent, stats.fallback) == (0.01, "")


def scalar_sweep(w_OI, h_II, q, damp):
    """Coordinate descent on tr(E (H + damp) E') from the solution `q`, one row, group and column at a time."""
    columns, width = w_OI.shape[1], q.integers.group_width(w_OI.shape[1])
    h = h_II.double().clone()
    order = processing_order(h.diagonal(), q.grid).tolist()
    h.diagonal().add_(damp)
    codes, scales = q.codes_OI.double(), q.scales_OG.double()
    for o in range(w_OI.shape[0]):
        for start in range(columns - width, -1, -width):
            group = order[start : start + width]
            g = group[0] // width
            units = codes[o, group] - q.zeros_OG[o, g].double()
            error = w_OI[o].double() - (codes[o] - q.zeros_OG[o].repeat_interleave(width).double()) * scales[
                o
            ].repeat_interleave(width)
            step = (units * (h[group] @ error)).sum() / (units @ h[group][:, group] @ units)
            scales[o, g] = (scales[o, g] + step).half().double()
            for k in reversed(group):
                error = w_OI[o].double() - (codes[o] - q.zeros_OG[o].repeat_interleave(width).double()) * scales[
                    o
                ].repeat_interleave(width)
                value = (codes[o, k] - q.zeros_OG[o, g].double()) * scales[o, g] + h[k] @ error / h[k, k]
                codes[o, k] = (value / scales[o, g] + q.zeros_OG[o, g].double()).round().clamp(0, q.integers.levels - 1)
    return codes, scales


@pytest.mark.parametrize("grid", [IntegerGrid(4, 32), IntegerGrid(4, 64, sym=False), IntegerGrid(4, -1)], ids=str)
def test_descent_equals_a_plain_loop(grid):
    w_OI, h_II = problem(columns=128, rows=4)
    before = solve_linears({"w": w_OI}, h_II.clone(), grid, damp_percent=0.01, sweeps=0)["w"][0]
    codes, scales = scalar_sweep(w_OI, h_II, before, 0.01 * float(h_II.diagonal().mean()))
    after = solve_linears({"w": w_OI}, h_II.clone(), grid, damp_percent=0.01, sweeps=1)["w"][0]
    assert (after.codes_OI != codes).float().mean() < 0.01
    torch.testing.assert_close(after.scales_OG.double(), scales, rtol=2e-3, atol=0)
    assert (after.codes_OI != before.codes_OI).any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_sweep_lowers_the_error(grid):
    w_OI, h_II = problem(rows=32)
    solved = [solve_linears({"w": w_OI}, h_II.clone(), grid, damp_percent=1e-4, sweeps=n)["w"][1] for n in range(4)]
    errors = [stats.error_db for stats in solved]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] - 0.1


def test_residuals_move_the_outputs():
    """Outputs go the asked share of the way to what they are short of, as far as inputs can tell, before rounding."""
    x_TI = correlated(64, tokens=600)
    h_II = x_TI.T @ x_TI
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(16, 64, generator=generator) for name in "ab"}
    shift_OI = 0.1 * torch.randn(16, 64, generator=generator)
    asked_TO = x_TI @ shift_OI.T
    options = {"damp_percent": 1e-6}
    for correction in (1.0, 0.5):
        residuals = {"b": ResidualCovariance(x_TI.T @ asked_TO, 0.5 * x_TI.T @ asked_TO)}
        options |= {"residuals": residuals, "error_correction": correction}
        solved = solve_linears(weights, h_II.clone(), IntegerGrid(8, 32), **options)
        moved_TO = x_TI @ (solved["b"][0].dequantize() - weights["b"]).T
        assert (moved_TO - correction * asked_TO).square().mean() < 0.01 * asked_TO.square().mean()
        assert solved["b"][1].error_db < -40
    alone = solve_linears({"a": weights["a"]}, h_II.clone(), IntegerGrid(8, 32), **options)
    assert (solved["a"][0].codes_OI != alone["a"][0].codes_OI).float().mean() < 0.1


def test_residuals_count_as_far_as_both_halves_agree():
    """By the definition: kept is 1 - |D|^2 / |S|^2 of the fit, in coordinates where the damped Hessian is 1."""
    x_TI = correlated(64, tokens=600)
    h_II = x_TI.T @ x_TI
    generator = torch.Generator().manual_seed(6)
    weights = {"w": torch.randn(4, 64, generator=generator)}
    first_IO, second_IO = torch.randn(64, 4, generator=generator), torch.randn(64, 4, generator=generator)
    second_IO[:, 0] = first_IO[:, 0]  # equal: all is kept
    second_IO[:, 1] = 0  # all from one half: nothing is
    second_IO[:, 2] = -0.9 * first_IO[:, 2]  # opposite: nothing
    second_IO[:, 3] = 0.5 * first_IO[:, 3]  # kept: 1 - (0.5 / 1.5)^2 = 8 / 9
    share_O = torch.tensor([1.0, 0.0, 0.0, 8 / 9])
    damp = 0.5 * float(h_II.diagonal().mean())
    whole_IO = 1e4 * (first_IO + second_IO)
    wanted_OI = torch.linalg.solve(h_II + damp * torch.eye(64), whole_IO).T * share_O[:, None]
    found = solve_linears(
        weights, h_II.clone(), IntegerGrid(8, 32), damp_percent=0.5, error_correction=1.0, sweeps=0,
        residuals={"w": ResidualCovariance(whole_IO.clone(), 1e4 * first_IO)},
    )["w"][0].dequantize() - weights["w"]  # fmt: skip
    assert wanted_OI.abs().mean() > 0.3
    assert (found - wanted_OI)[[0, 3]].abs().mean() < 0.05 * wanted_OI[[0, 3]].abs().mean()
    assert found[[1, 2]].abs().mean() < 0.05 * wanted_OI[[0, 3]].abs().mean()


def test_damped_solution(monkeypatch):
    monkeypatch.setattr(gptq, "FACTOR_BLOCK", 40)
    _, h_II = problem(columns=130)
    b_IO = torch.randn(130, 7)
    wanted = torch.linalg.solve(h_II.double() + 2.0 * torch.eye(130), b_IO.double())
    assert factor_lower(h_II, 2.0)
    found = gptq._solve_upper(gptq._solve_lower(b_IO, h_II), h_II)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_beats_rounding(grid):
    w_OI, h_II = problem()
    solved = solve_linears({"w": w_OI}, h_II.clone(), grid)["w"][1]
    rounded = solve_linears({"w": w_OI}, h_II.clone(), grid, method="rtn")["w"][1]
    assert solved.error_db < rounded.error_db - 3


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_diagonal_hessian_means_rounding(grid, seed):
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(16, 128, generator=generator)
    diagonal_I = torch.rand(128, generator=generator) + 0.1
    q, _ = solve_linears({"w": w_OI}, torch.diag(diagonal_I), grid, damp_percent=0.0, sweeps=0)["w"]
    width = grid.group_width(128)
    for g in range(128 // width):
        part = slice(g * width, (g + 1) * width)
        order_K = diagonal_I[part].argsort()  # sums in the search are taken in this order
        w_KO = w_OI.T[part][order_K].contiguous()
        (scale_O,), (zero_O,) = grid.fit(w_KO, diagonal_I[part][order_K])
        same_O = q.scales_OG[:, g].float() == scale_O
        assert same_O.float().mean() > 0.8  # rounding of the weights decides between candidates that are as good
        scale_O = q.scales_OG[:, g].float()
        assert torch.equal(q.zeros_OG[:, g].float(), zero_O)
        assert (q.codes_OI.T[part][order_K] != grid.round(w_KO, (scale_O[None], zero_O[None]))).float().mean() < 0.002


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_rows_are_independent(seed):
    w_OI, h_II = problem(columns=128, rows=16, seed=seed)
    grid = IntegerGrid(4, 32)
    whole = solve_linears({"w": w_OI}, h_II.clone(), grid)["w"][0].dequantize()
    rows = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    mixed = solve_linears({"w": w_OI[rows]}, h_II.clone(), grid)["w"][0].dequantize()
    assert (mixed != whole[rows]).float().mean() < 0.01
    parts = solve_linears({"a": w_OI[:5], "b": w_OI[5:]}, h_II.clone(), grid)
    joined = torch.cat([parts["a"][0].dequantize(), parts["b"][0].dequantize()])
    assert (joined != whole).float().mean() < 0.01


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shapes_dtypes_and_float16_scales(grid):
    w_OI, h_II = problem(rows=16)
    q, _ = solve_linears({"w": w_OI.bfloat16()}, h_II, grid)["w"]
    groups = 256 // grid.group_width(256)
    assert (q.codes_OI.dtype, q.codes_OI.shape) == (torch.uint8, (16, 256))
    assert (q.scales_OG.dtype, q.scales_OG.shape) == (torch.float16, (16, groups))
    assert (q.zeros_OG.dtype, q.zeros_OG.shape) == (torch.uint8, (16, groups))
    assert int(q.codes_OI.max()) <= grid.levels - 1
    if grid.sym:
        assert (q.zeros_OG == grid.zero).all()


def test_small_pieces_equal_one_piece(monkeypatch):
    """Blocks of the factor, of columns and of rows are a matter of speed."""
    w_OI, h_II = problem(columns=256, rows=40)
    grid = IntegerGrid(4, 32)
    whole = solve_linears({"w": w_OI}, h_II.clone(), grid)["w"][0].dequantize()
    for module, name, value in (
        (gptq, "FACTOR_BLOCK", 48), (gptq, "SPAN", 64), (columns, "LEAF", 3), (gptq, "ROWS_AT_ONCE", 7),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
        pieces = solve_linears({"w": w_OI}, h_II.clone(), grid)["w"][0].dequantize()
        assert (pieces != whole).float().mean() < 0.01, name


@pytest.mark.parametrize("kind", ["4-bit", "4-bit asymmetric", "Q4_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_captured_graph_gives_what_its_kernels_give(kind, monkeypatch):
    """The capture itself needs a GPU: here the same calls are made again on the same tensors."""
    grid = {"4-bit": IntegerGrid(4, 64), "4-bit asymmetric": IntegerGrid(4, 64, sym=False)}.get(kind)
    grid = grid or type_scheme(kind).grid()
    w_OI, h_II = problem(columns=768, rows=24)
    wanted, _ = solve_linears({"w": w_OI}, h_II.clone(), grid)["w"]
    captures = []

    def captured(device, run):
        run()
        captures.append(run)
        return run

    monkeypatch.setattr(columns, "graphed", lambda device: True)
    monkeypatch.setattr(columns, "captured", captured)
    got, _ = solve_linears({"w": w_OI}, h_II.clone(), grid)["w"]
    assert len(captures) == 3, "once for the first pass, and for each sweep"
    assert torch.equal(got.codes_OI, wanted.codes_OI)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters, wanted.parameters, strict=True))


def test_a_weight_of_one_group_is_not_captured(monkeypatch):
    w_OI, h_II = problem(columns=256, rows=24)
    wanted, _ = solve_linears({"w": w_OI}, h_II.clone(), IntegerGrid(8, -1))["w"]
    monkeypatch.setattr(columns, "graphed", lambda device: True)
    monkeypatch.setattr(columns, "captured", lambda device, run: pytest.fail("captured"))
    got, _ = solve_linears({"w": w_OI}, h_II.clone(), IntegerGrid(8, -1))["w"]
    assert torch.equal(got.codes_OI, wanted.codes_OI)


def test_threads_capture_one_after_the_other(monkeypatch):
    """Each thread has its own GPU, torch allows a process one capture at a time. torch.cuda is stood in for."""
    under_way, most = set(), []

    @contextmanager
    def capture(graph, **options):
        assert options["capture_error_mode"] == "thread_local", "threads of other GPUs go on allocating"
        under_way.add(graph)
        most.append(len(under_way))
        time.sleep(0.02)
        yield
        under_way.remove(graph)

    monkeypatch.setattr(columns, "_capture_stream", lambda device: MagicMock())
    for name, value in {
        "CUDAGraph": MagicMock, "graph": capture, "current_stream": MagicMock,
        "device": lambda device: nullcontext(), "stream": lambda stream: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    ran = []
    threads = [
        threading.Thread(target=columns.captured, args=(torch.device("cuda", k), lambda k=k: ran.append(k)))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert sorted(ran) == [0, 0, 1, 1, 2, 2, 3, 3], "once to load libraries, once captured"


def test_factor_and_permutation_in_place(monkeypatch):
    monkeypatch.setattr(gptq, "FACTOR_BLOCK", 40)
    _, h_II = problem(columns=130)
    original = h_II.clone()
    order = torch.randperm(130, generator=torch.Generator().manual_seed(3))
    permute_symmetric(h_II, order)
    assert torch.equal(h_II, original[order][:, order])
    kept = h_II.clone()
    assert factor_lower(h_II, 2.0)
    assert torch.equal(h_II.triu(1), kept.triu(1))
    lower = h_II.tril().double()
    kept.diagonal().add_(2.0)
    torch.testing.assert_close(lower @ lower.T, kept.double(), rtol=1e-4, atol=1e-2)
    assert not factor_lower(torch.diag(torch.tensor([1.0, -1.0])), 0.0)


def test_order_keeps_groups_whole_and_ends_with_the_most_active():
    diagonal = torch.tensor([1.0, 9, 2, 3, 50, 4, 5, 5, 0, 0, 0, 1])
    order = processing_order(diagonal, IntegerGrid(4, 4))
    assert order.tolist() == [8, 9, 10, 11, 0, 2, 3, 1, 5, 6, 7, 4]


def test_dead_columns_are_rounded_and_spoil_nothing():
    w_OI, h_II = problem(columns=128)
    h_II[5], h_II[:, 5], h_II[64:128], h_II[:, 64:128] = 0, 0, 0, 0
    q, stats = solve_linears({"w": w_OI}, h_II, IntegerGrid(4, 64))["w"]
    found = q.dequantize()
    assert found.isfinite().all() and stats.fallback == ""
    assert (found - w_OI)[:, 64:].abs().max() < 0.5  # still rounded to a sensible grid: real inputs may be non-zero


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_non_finite_input_is_named(method):
    w_OI, h_II = problem(columns=64)
    bad = w_OI.clone()
    bad[2, 7] = math.inf
    with pytest.raises(QwenqError, match=r"layers\.3\.up: 1 of 1536 weights are not finite"):
        solve_linears({"layers.3.gate": w_OI, "layers.3.up": bad}, h_II.clone(), IntegerGrid(4, 64), method=method)
    h_II[3, 9] = math.nan
    with pytest.raises(QwenqError, match=r"layers\.3\.gate, layers\.3\.up: the Hessian of their inputs is not finite"):
        solve_linears({"layers.3.gate": w_OI, "layers.3.up": w_OI}, h_II, IntegerGrid(4, 64), method=method)


def test_ill_fitting_input_is_named():
    w_OI, h_II = problem(columns=96)
    with pytest.raises(QwenqError, match=r"a\.b: shape \[24, 96\] does not fit 96 columns in groups of 64"):
        solve_linears({"a.b": w_OI}, h_II, IntegerGrid(4, 64))
    with pytest.raises(QwenqError, match=r"c: shape \[24, 64\]"):
        solve_linears({"a.b": w_OI, "c": w_OI[:, :64]}, h_II, IntegerGrid(4, 32))
    with pytest.raises(QwenqError, match="method 'awq'"):
        solve_linears({"a.b": w_OI}, h_II, IntegerGrid(4, 32), method="awq")
    with pytest.raises(QwenqError, match="without a Hessian"):
        solve_linears({"a.b": w_OI}, None, IntegerGrid(4, 32))


def test_damping_escalates_and_is_recorded():
    """A matrix with an eigenvalue of -0.05 of its mean diagonal needs the second step, 0.1."""
    w_OI, _ = problem(columns=64)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.linspace(0.5, 2.0, 64)
    values[0] = 0
    h_II = (basis * values) @ basis.T
    h_II = h_II - 0.05 * float(h_II.diagonal().mean()) * basis[:, :1] @ basis[:, :1].T
    _, stats = solve_linears({"w": w_OI}, h_II, IntegerGrid(4, 64), damp_percent=0.01)["w"]
    assert stats.damp_percent == pytest.approx(0.1)
    assert stats.fallback == ""


@pytest.mark.parametrize(("damp_percent", "second"), [(0.0, 1e-3), (1e-6, 1e-3), (0.001, 0.01)])
def test_damping_escalates_from_nothing_too(damp_percent, second):
    """Ten tokens for 64 columns: the Hessian has no factor without damping, and ten times nothing is nothing."""
    w_OI, _ = problem(columns=64)
    x_TI = correlated(64, tokens=10)
    x_TI[:, 7] = 0
    h_II = x_TI.T @ x_TI
    h_II -= 2 * damp_percent * h_II.diagonal().mean() * torch.eye(64)  # short of what the first try adds
    h_II[7] = h_II[:, 7] = 0
    q, stats = solve_linears({"w": w_OI}, h_II, IntegerGrid(4, 64), damp_percent=damp_percent)["w"]
    assert stats.fallback == "" and stats.damp_percent == pytest.approx(second)
    assert q.dequantize().isfinite().all() and stats.error_db < -20


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_residuals_that_are_not_finite_are_named(half, value):
    w_OI, h_II = problem(columns=64)
    sums = torch.zeros(64, 24), torch.zeros(64, 24)
    sums[half][3, 5] = value
    with pytest.raises(QwenqError, match=r"^layers\.3\.o: the cross-covariance of its residual is not finite$"):
        short = {"layers.3.o": ResidualCovariance(*sums)}
        solve_linears({"layers.3.o": w_OI}, h_II, IntegerGrid(4, 64), residuals=short, error_correction=1.0)


def test_scales_that_overflowed_are_named():
    """Each input is finite, a sum over them is not."""
    w_OI, h_II = problem(columns=64)
    whole_IO = torch.full((64, 24), 3e38)
    with pytest.raises(QwenqError, match=r"^o: scales are not finite$"):
        residuals = {"o": ResidualCovariance(whole_IO, whole_IO / 2)}
        solve_linears({"o": w_OI}, h_II, IntegerGrid(4, 64), residuals=residuals, error_correction=1.0)


def test_fallback_is_recorded_and_rounds_with_searched_scales():
    w_OI, _ = problem(columns=64)
    h_II = torch.eye(64)
    h_II[0, 63] = h_II[63, 0] = 1e6
    q, stats = solve_linears({"w": w_OI}, h_II, IntegerGrid(4, 64), damp_percent=0.01)["w"]
    assert stats.fallback == "no Cholesky factor up to a damping of 10: rounded to nearest"
    weight_I = torch.ones(64)
    (scale_O,), _ = IntegerGrid(4, 64).fit(w_OI.T.contiguous(), weight_I)
    assert torch.equal(q.scales_OG[:, 0].float(), scale_O)
    _, stats = solve_linears({"w": w_OI}, torch.zeros(64, 64), IntegerGrid(4, 64))["w"]
    assert stats.fallback == "no calibration input reached it: rounded to nearest"


def test_rounding_without_a_hessian():
    w_OI, h_II = problem(columns=64)
    grid = IntegerGrid(8, 32)
    q, stats = solve_linears({"w": w_OI}, None, grid, method="rtn")["w"]
    assert math.isnan(stats.error_db) and stats.weight_error_db < -35
    assert (q.dequantize() - w_OI).abs().max() <= 0.51 * q.scales_OG.max()
    same, with_h = solve_linears({"w": w_OI}, h_II, grid, method="rtn")["w"]
    assert torch.equal(same.codes_OI, q.codes_OI) and with_h.error_db < -30


def test_exact_weights_lose_nothing():
    _, h_II = problem(columns=64)
    codes = torch.randint(-8, 8, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0] = -8
    q, stats = solve_linears({"w": codes * 0.25}, h_II, IntegerGrid(4, 64))["w"]
    assert torch.equal(q.dequantize(), codes * 0.25)
    assert stats.error_db == stats.weight_error_db == -math.inf


def test_the_error_is_read_from_the_upper_triangle_alone(monkeypatch):
    monkeypatch.setattr(gptq, "FACTOR_BLOCK", 5)
    generator = torch.Generator().manual_seed(4)
    x_IO = torch.randn(13, 3, generator=generator)
    root = torch.randn(13, 13, generator=generator)
    h_II = root @ root.T
    upper = h_II.triu() + torch.full_like(h_II, 1e6).tril(-1)  # nothing below the diagonal counts
    found_O = gptq._quadratic(x_IO, [0, 2], upper, h_II.diagonal())
    torch.testing.assert_close(found_O, (x_IO.T @ h_II @ x_IO).diagonal()[[0, 2]].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", [IntegerGrid(4, 32), IntegerGrid(8, 64), IntegerGrid(4, 64, sym=False)], ids=str)
def test_corrections_multiplied_in_bfloat16_lose_nothing(grid):
    w_OI, h_II = problem(columns=512, rows=256)
    lost_db = []
    for products in (torch.float32, torch.bfloat16):
        q, stats = solve_linears({"w": w_OI}, h_II.clone(), grid, products=products)["w"]
        lost, norm = ((e @ h_II * e).sum() for e in (w_OI - q.dequantize(), w_OI))
        assert stats.error_db == pytest.approx(10 * math.log10(lost / norm), abs=0.01)
        lost_db.append(stats.error_db)
    assert lost_db[0] != lost_db[1] and abs(lost_db[1] - lost_db[0]) < 0.02


def test_many_rows_are_corrected_in_bfloat16_where_a_cpu_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(gptq, "multiplies_bfloat16", lambda device: True)
    assert [gptq.correction_dtype(rows, cpu) for rows in (2047, 2048)] == [torch.float32, torch.bfloat16]
    assert gptq.correction_dtype(8192, torch.device("cuda")) == torch.float32
    monkeypatch.setattr(gptq, "multiplies_bfloat16", lambda device: False)
    assert gptq.correction_dtype(8192, cpu) == torch.float32


def test_parts_of_many_rows_have_the_losses_of_the_whole() -> None:
    """The output error is estimated from some blocks of rows; a part may hold none of them."""
    rows, part = 64 * (2 * gptq.STAT_BLOCKS + 1), 64  # every third block of 33
    w_OI, h_II = problem(columns=32, rows=rows)
    grid = IntegerGrid(4, 32)
    options = {"damp_percent": 0.01, "sweeps": 1}
    whole, stats = solve_linears({"head": w_OI}, h_II.clone(), grid, **options)["head"]
    pieces = [
        solve_linears({"head": piece}, h_II.clone(), grid, parts={"head": (part * k, rows)}, **options)["head"]
        for k, piece in enumerate(w_OI.split(part))
    ]
    found = joined_stats([piece for _, piece in pieces])
    assert [len(piece.by_row[0]) for _, piece in pieces[:4]] == [64, 0, 0, 64]
    assert torch.equal(torch.cat([tensor.codes_OI for tensor, _ in pieces]), whole.codes_OI)
    assert all(map(torch.equal, found.by_row, stats.by_row))
    assert found.error_db == stats.error_db < -15


@pytest.mark.parametrize("tokens, less", [(256, 0.85), (512, 0.95), (2048, 1.0)])
def test_products_of_few_tokens_want_more_damping(tokens, less):
    """On inputs not solved with, errors are least near `damping_of_products`."""
    columns, hidden = 256, 64
    generator = torch.Generator().manual_seed(0)
    gate_HI, up_HI = torch.randn(2, hidden, columns, generator=generator) / hidden**0.5
    scales_H = torch.arange(1, hidden + 1) ** -0.5

    def products(count):
        x_TH = torch.randn(count, hidden, generator=generator) * scales_H / scales_H.square().mean().sqrt()
        return torch.nn.functional.silu(x_TH @ gate_HI) * (x_TH @ up_HI)

    fit_TI, held_TI = products(tokens), products(8192)
    w_OI = torch.randn(64, columns, generator=generator)

    def error(damp_percent):
        solved, _ = solve_linears({"w": w_OI}, fit_TI.T @ fit_TI, IntegerGrid(4, 64), damp_percent=damp_percent)["w"]
        return float(((solved.dequantize() - w_OI) @ held_TI.T).square().sum())

    found = error(damping_of_products(columns, tokens))
    assert found < less * error(DAMP_PERCENT)
    assert found < 1.01 * min(error(damp_percent) for damp_percent in (0.02, 0.2, 0.4, 0.7, 1.0, 2.0, 5.0))


def test_damping_of_products():
    assert damping_of_products(4864, 64 * 512) == 0.385  # sqrt(4864 / 32768)
    assert damping_of_products(29568, 128 * 512) == 0.672
    assert damping_of_products(1536, 10**7) == DAMP_PERCENT
