"""What a layer is solved with: token batches and a clock."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_job, text_windows
from families import model

from qwenq.formats.base import Recipe, Scheme
from qwenq.pipeline.block import BlockSolver, SolverOptions
from qwenq.pipeline.config import default_error_correction
from qwenq.pipeline.monitor import StageClock
from qwenq.pipeline.quantize import quantize
from qwenq.solver.gptq import solve_linears
from qwenq.solver.triangle import Triangle


def test_a_stage_within_a_stage_counts_for_itself_alone() -> None:
    clock = StageClock()
    with clock.time("outer"):
        time.sleep(0.02)
        with clock.time("inner"):
            time.sleep(0.05)
        with clock.time("outer"):
            time.sleep(0.01)
    assert clock.seconds["inner"] == pytest.approx(0.05, abs=0.02)
    assert clock.seconds["outer"] == pytest.approx(0.03, abs=0.02)


def test_workers_take_their_share_of_the_stage_around_them() -> None:
    clock = StageClock()
    with clock.time("outer"), clock.time_in_worker("inner", of="outer", workers=2, device=torch.device("cpu")):
        time.sleep(0.06)
    assert clock.seconds["inner"] == pytest.approx(0.03, abs=0.01)
    assert clock.seconds["outer"] == pytest.approx(0.03, abs=0.01)


def test_eight_bits_alone_and_few_tokens_are_not_corrected() -> None:
    four, eight = Scheme(4, 64), Scheme(8, 64)
    spec = model("Qwen2.5-0.5B")

    def pull(recipe: Recipe, tokens: int = 65536) -> float:
        return default_error_correction(recipe, spec, tokens)

    assert pull(Recipe(four)) == pull(Recipe(eight, (("a", four),))) == 1.0
    assert pull(Recipe(eight)) == pull(Recipe(eight, (("a", None),))) == 0.0
    assert pull(Recipe(four), 2 * 4864) == 1.0 and pull(Recipe(four), 2 * 4864 - 1) == 0.0, "tokens a column of down"


def test_all_windows_count_their_tokens_alike(
    tiny: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same window again and again: whether a part of them runs through the 16-bit layers, or all or none do, the

    Hessians are of the same weights, up to what rounding q, k and v changed.
    """
    window = text_windows(calib, tiny, 256, 1)
    windows = replace(window, ids=window.ids.repeat(16, 1))
    monkeypatch.setattr("qwenq.pipeline.config.CORRECTION_TOKENS_A_COLUMN", 0)
    found: dict[float, list[torch.Tensor]] = {}
    for share in (0.0, 0.5, 1.0):
        kept = found.setdefault(share, [])

        def solve(weights: Any, h_II: torch.Tensor, *rest: Any, kept: list[torch.Tensor] = kept, **options: Any) -> Any:
            kept.append(h_II.diagonal().clone())
            return solve_linears(weights, h_II, *rest, **options)

        monkeypatch.setattr("qwenq.solver.parallel.solve_linears", solve)
        options = {"error_correction_share": share, "error_correction": 0.5 if share else 0.0, "damp_percent": 0.02}
        quantize(small_job(tiny, tmp_path / str(share), calibration=windows, **options))
    for none, half, every in zip(*(found[share][:4] for share in (0.0, 0.5, 1.0)), strict=True):
        assert torch.allclose(half, every, rtol=0.05, atol=0.01 * float(every.mean()))
        assert torch.allclose(half, none, rtol=0.05, atol=0.01 * float(every.mean()))


def solver_of(**options: Any) -> BlockSolver:
    """A solver whose options alone are asked."""
    unused: Any = None
    return BlockSolver(unused, unused, 0, Recipe(None), unused, unused, SolverOptions(**options), StageClock())


def test_tokens_with_massive_states_count_more() -> None:
    """By the definition, token by token: 1 / mean square, times the weight where that is over 50 medians."""
    generator = torch.Generator().manual_seed(0)
    x_BTI, h_BTH = torch.randn(2, 9, 6, generator=generator), torch.randn(2, 9, 16, generator=generator)
    h_BTH[0, 0] *= 30  # 900 times the others' mean square
    h_BTH[1, 4] *= 3  # 9 times
    triangle = Triangle(6)
    hessian = torch.zeros(triangle.size)
    weighted_TI, root_T1 = solver_of(sink_weight=64.0)._add_weighted(hessian, x_BTI, h_BTH)
    wanted = torch.zeros(6, 6, dtype=torch.float64)
    for window in range(2):
        for token in range(9):
            x_I = x_BTI[window, token].double()
            weight = (64.0 if (window, token) == (0, 0) else 1.0) / float(h_BTH[window, token].square().mean())
            wanted += weight * torch.outer(x_I, x_I)
    assert torch.allclose(triangle.square(hessian).triu().double(), wanted.triu(), rtol=1e-4)
    assert torch.allclose(weighted_TI, x_BTI.flatten(0, 1) * root_T1)


def test_without_massive_states_nothing_is_weighted() -> None:
    h_BTH = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    assert solver_of(sink_weight=64.0)._sink_roots(h_BTH) is None
    h_BTH[0, 0] *= 30
    assert solver_of(sink_weight=1.0)._sink_roots(h_BTH) is None
    roots_BT1 = solver_of(sink_weight=64.0)._sink_roots(h_BTH)
    assert roots_BT1 is not None and roots_BT1[0, 0] == 8 and float(roots_BT1.sum()) == 8 + 17
