import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.solver.grid import MIN_SCALE, IntegerGrid, float16_scale

SYM, ASYM = IntegerGrid(4, 8), IntegerGrid(4, 8, sym=False)


def error(grid, w_KO, weight_K, parameters):
    scale_1O, zero_1O = parameters
    return weight_K @ (w_KO - scale_1O * (grid.round(w_KO, parameters) - zero_1O)).square()


def test_scales_are_float16_values_and_never_underflow():
    scale = float16_scale(torch.tensor([0.1, -0.1, 0.0, 1e-7, -1e-7, 1e9]))
    assert torch.equal(scale, scale.half().float())
    assert scale[0] > 0 > scale[1]
    assert scale[2].item() == scale[3].item() == -scale[4].item() == torch.tensor(MIN_SCALE).half().item()
    assert scale[5].item() == 65504


def test_absmax_grid_by_hand():
    w_KO = torch.tensor([[0.75, -1.0], [-0.5, 0.0], [0.25, 2.75]])
    (scale_O,), (zero_O,) = found = ASYM.fit(w_KO)
    assert scale_O.tolist() == [torch.tensor(x).half().item() for x in (1.25 / 15, 0.25)]
    assert zero_O.tolist() == [6, 4]
    assert ASYM.round(w_KO, found)[:, 1].tolist() == [0, 4, 15]
    (scale_O,), (zero_O,) = SYM.fit(w_KO)
    assert scale_O.tolist() == [torch.tensor(x / 7.5).half().item() for x in (0.75, 2.75)]
    assert zero_O.tolist() == [8, 8]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_longer_tail_gets_the_longer_end(sign):
    """Weights that lie on -8 .. 7 times a scale come back exactly, whichever sign the -8 has."""
    codes = torch.tensor([-8.0, 7, 3, -2, 0, 1, 5, -4])[:, None]
    w_KO = sign * 0.125 * codes
    found = SYM.fit(w_KO, torch.ones(8))
    assert found[0].tolist() == [[sign * 0.125]]
    assert torch.equal(SYM.round(w_KO, found), codes + 8)


def test_weights_steer_the_search():
    w_KO = torch.tensor([1.0, 0.11, 0.12, -0.13, 0.09, -0.1, 0.105, 0.12])[:, None]
    weight_K = torch.tensor([1e-6, 1, 1, 1, 1, 1, 1, 1])
    heeded, _ = SYM.fit(w_KO, weight_K)
    plain, _ = SYM.fit(w_KO, torch.ones(8))
    assert abs(heeded.item()) < abs(plain.item())


@pytest.mark.parametrize("grid", [SYM, ASYM, IntegerGrid(8, 8), IntegerGrid(8, 8, sym=False)], ids=str)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-4, 100))
@settings(max_examples=25, deadline=None)
def test_search_is_no_worse_than_absmax(grid, seed, size):
    generator = torch.Generator().manual_seed(seed)
    w_KO = torch.randn(32, 5, generator=generator) * size
    weight_K = torch.rand(32, generator=generator) + 0.01
    found = error(grid, w_KO, weight_K, grid.fit(w_KO, weight_K))
    plain = error(grid, w_KO, weight_K, grid.fit(w_KO))
    # at 8 bits steps are so fine that the error of few weights is luck
    assert found.sum() <= plain.sum() * (1.0 if grid.bits == 4 else 1.2)


@pytest.mark.parametrize("grid", [SYM, ASYM], ids=str)
def test_zero_and_tiny_groups(grid):
    w_KO = torch.zeros(8, 2)
    w_KO[0, 1] = 1e-9
    searched = [grid.fit(w_KO, weight_K) for weight_K in (torch.ones(8), torch.zeros(8))]
    for scale_O, zero_O in (grid.fit(w_KO), *searched):
        assert scale_O.isfinite().all() and (scale_O.abs() >= 0.99 * MIN_SCALE).all()
        q_KO = grid.round(w_KO, (scale_O, zero_O))
        assert (scale_O * (q_KO - zero_O)).abs().max() <= 1e-4
