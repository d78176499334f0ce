import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.formats.base import Scheme
from qwenq.solver.grid import MIN_SCALE, absmax_grid, float16_scale, round_to_grid, search_grid

SYM, ASYM = Scheme(4, 8), Scheme(4, 8, sym=False)


def error(w_KO, weight_K, scale_O, zero_O, scheme):
    q_KO = round_to_grid(w_KO, scale_O, zero_O, scheme)
    return weight_K @ (w_KO - scale_O * (q_KO - zero_O)).square()


def test_scales_are_float16_values_and_never_underflow():
    scale = float16_scale(torch.tensor([0.1, -0.1, 0.0, 1e-7, -1e-7, 1e9]))
    assert torch.equal(scale, scale.half().float())
    assert scale[0] > 0 > scale[1]
    assert scale[2].item() == scale[3].item() == -scale[4].item() == torch.tensor(MIN_SCALE).half().item()
    assert scale[5].item() == 65504


def test_absmax_grid_by_hand():
    w_KO = torch.tensor([[0.75, -1.0], [-0.5, 0.0], [0.25, 2.75]])
    scale_O, zero_O = absmax_grid(w_KO, ASYM)
    assert scale_O.tolist() == [torch.tensor(x).half().item() for x in (1.25 / 15, 0.25)]
    assert zero_O.tolist() == [6, 4]
    assert round_to_grid(w_KO, scale_O, zero_O, ASYM)[:, 1].tolist() == [0, 4, 15]
    scale_O, zero_O = absmax_grid(w_KO, SYM)
    assert scale_O.tolist() == [torch.tensor(x / 7.5).half().item() for x in (0.75, 2.75)]
    assert zero_O.tolist() == [8, 8]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_longer_tail_gets_the_longer_end(sign):
    """Weights that lie on -8 .. 7 times a scale come back exactly, whichever sign the -8 has."""
    codes = torch.tensor([-8.0, 7, 3, -2, 0, 1, 5, -4])[:, None]
    w_KO = sign * 0.125 * codes
    scale_O, zero_O = search_grid(w_KO, torch.ones(8), SYM)
    assert scale_O.tolist() == [sign * 0.125]
    assert torch.equal(round_to_grid(w_KO, scale_O, zero_O, SYM), codes + 8)


def test_weights_steer_the_search():
    w_KO = torch.tensor([1.0, 0.11, 0.12, -0.13, 0.09, -0.1, 0.105, 0.12])[:, None]
    weight_K = torch.tensor([1e-6, 1, 1, 1, 1, 1, 1, 1])
    heeded, _ = search_grid(w_KO, weight_K, SYM)
    plain, _ = search_grid(w_KO, torch.ones(8), SYM)
    assert abs(heeded.item()) < abs(plain.item())


@pytest.mark.parametrize("scheme", [SYM, ASYM, Scheme(8, 8), Scheme(8, 8, sym=False)], ids=lambda s: s.label)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-4, 100))
@settings(max_examples=25, deadline=None)
def test_search_is_no_worse_than_absmax(scheme, seed, size):
    generator = torch.Generator().manual_seed(seed)
    w_KO = torch.randn(32, 5, generator=generator) * size
    weight_K = torch.rand(32, generator=generator) + 0.01
    found = error(w_KO, weight_K, *search_grid(w_KO, weight_K, scheme), scheme)
    plain = error(w_KO, weight_K, *absmax_grid(w_KO, scheme), scheme)
    # at 8 bits steps are so fine that the error of few weights is luck
    assert found.sum() <= plain.sum() * (1.0 if scheme.bits == 4 else 1.2)


@pytest.mark.parametrize("scheme", [SYM, ASYM], ids=lambda s: s.label)
def test_zero_and_tiny_groups(scheme):
    w_KO = torch.zeros(8, 2)
    w_KO[0, 1] = 1e-9
    searched = [search_grid(w_KO, weight_K, scheme) for weight_K in (torch.ones(8), torch.zeros(8))]
    for scale_O, zero_O in (absmax_grid(w_KO, scheme), *searched):
        assert scale_O.isfinite().all() and (scale_O.abs() >= 0.99 * MIN_SCALE).all()
        q_KO = round_to_grid(w_KO, scale_O, zero_O, scheme)
        assert (scale_O * (q_KO - zero_O)).abs().max() <= 1e-4
