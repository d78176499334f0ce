"""Perplexity, KL and top-1 agreement: worked by hand, as properties, and their intervals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.results import DriftReport, finite_json
from qwenq.solver.metrics import METRICS_VERSION, LogitComparison, Reading, TokenDrift, summarise


def rows(seed: int, tokens: int = 5, vocabulary: int = 11, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def compare(p_TV: torch.Tensor, q_TV: torch.Tensor, targets_T: torch.Tensor, step: int | None = None) -> TokenDrift:
    """Logits of reference and checkpoint, taken in `step` tokens of the vocabulary at a time."""
    comparison = LogitComparison(targets_T)
    step = step or p_TV.shape[1]
    for start in range(0, p_TV.shape[1], step):
        part = slice(start, start + step)
        comparison.add(slice(0, len(targets_T)), start, p_TV[:, part], q_TV[:, part])
    return comparison.result()


def report(tokens: TokenDrift, windows: int, window_tokens: int = 5) -> DriftReport:
    return summarise(tokens, Reading("t", "0", windows, window_tokens, "float32"))


def test_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 + 1/4 ln 1/2 = ln 2 / 4."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    found = compare(p, q, torch.tensor([0]))
    assert found.kl.item() == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert found.reference_nll.item() == pytest.approx(math.log(2), rel=1e-6)
    assert found.nll.item() == pytest.approx(math.log(4), rel=1e-6)
    assert found.same_top1.item() == 0 and found.non_finite == 0


def test_the_reference_comes_first() -> None:
    """KL is not symmetric: p = (3/4, 1/4), q = (1/2, 1/2)."""
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = compare(p.clone(), q.clone(), torch.tensor([0])).kl.item()
    assert forward == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    assert compare(q, p, torch.tensor([0])).kl.item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(-50, 50), st.floats(0.01, 20))
def test_properties(seed: int, other: int, shift: float, spread: float) -> None:
    p, q = rows(seed, spread=spread), rows(other, spread=spread)
    targets = torch.arange(5)
    found = compare(p.clone(), q.clone(), targets)
    assert bool((found.kl >= 0).all()) and bool(torch.isfinite(found.kl).all())
    same = compare(p.clone(), p.clone(), targets)
    assert not same.kl.any() and bool(same.same_top1.all()) and torch.equal(same.nll, same.reference_nll)
    moved = compare(p + shift, q - shift, targets)
    torch.testing.assert_close(moved.kl, found.kl, rtol=1e-3, atol=1e-4)
    exact_p, exact_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = (exact_p.exp() * (exact_p - exact_q)).sum(-1)
    torch.testing.assert_close(found.kl.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.nll.double(), -exact_q[torch.arange(5), targets], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.same_top1.bool(), p.argmax(-1) == q.argmax(-1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.1, 20))
def test_slices_of_the_vocabulary_change_nothing(seed: int, step: int, spread: float) -> None:
    p, q, targets = rows(seed, spread=spread), rows(seed + 1, spread=spread), torch.arange(5) * 2
    whole, sliced = compare(p, q, targets), compare(p, q, targets, step)
    for name in ("reference_nll", "nll", "kl"):
        torch.testing.assert_close(getattr(sliced, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(sliced.same_top1, whole.same_top1)


def test_a_small_drift_in_a_large_vocabulary_is_above_rounding() -> None:
    """What 8 bits cost is near 1e-5 nats: float32 must resolve that over 152,064 tokens."""
    p = rows(0, 4, 152_064, 2.0)
    q = p + 0.005 * rows(1, 4, 152_064, 1.0)
    exact_p, exact_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = (exact_p.exp() * (exact_p - exact_q)).sum(-1)
    assert exact.min() > 1e-6 and exact.max() < 1e-4
    got = compare(p, q, torch.zeros(4, dtype=torch.long)).kl.double()
    torch.testing.assert_close(got, exact, rtol=0.02, atol=0)


def test_summary_by_hand() -> None:
    """Two windows of two tokens."""
    tokens = TokenDrift(
        reference_nll=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        nll=torch.tensor([1.5, 2.5, 3.0, 4.5]),
        kl=torch.tensor([0.1, 0.3, 0.0, 0.4]),
        same_top1=torch.tensor([True, False, True, True]),
        non_finite=1,
    )
    found = report(tokens, windows=2, window_tokens=3)
    assert found.reference_perplexity == pytest.approx(math.exp(2.5))
    assert found.perplexity == pytest.approx(math.exp(11.5 / 4))
    # window means 1.5 and 3.5: standard deviation sqrt(2), over sqrt(2) windows: 1 nat
    assert found.reference_perplexity_se == pytest.approx(math.exp(2.5))
    assert found.perplexity_increase_percent.mean == pytest.approx(100 * math.expm1(0.375))
    assert found.kl.mean == pytest.approx(0.2) and found.kl_median == pytest.approx(0.2)
    assert (found.kl.low, found.kl.high) == (pytest.approx(0.2), pytest.approx(0.2))  # both windows have mean 0.2
    assert found.top1_agreement.mean == 0.75
    assert (found.top1_agreement.low, found.top1_agreement.high) == (0.5, 1.0)
    assert (found.tokens, found.windows, found.non_finite, found.metrics_version) == (4, 2, 1, METRICS_VERSION)
    json.dumps(found.to_json(), allow_nan=False)


def tokens_of(windows: int, seed: int) -> TokenDrift:
    """Windows of 20 tokens; windows differ in how far they drift."""
    generator = np.random.default_rng(seed)
    kl = torch.from_numpy(generator.gamma(1.0, generator.gamma(2.0, 0.05, (windows, 1)), (windows, 20)).reshape(-1))
    nll = torch.from_numpy(generator.gamma(2.0, 1.5, windows * 20))
    return TokenDrift(nll, nll + kl, kl, kl < 0.2, 0)


def test_intervals_hold_the_mean_and_narrow_with_more_windows() -> None:
    widths = []
    for windows in (8, 32, 128, 512):
        found = report(tokens_of(windows, seed=windows), windows)
        for interval in (found.kl, found.top1_agreement, found.perplexity_increase_percent):
            assert interval.low < interval.mean < interval.high
        widths.append(found.kl.high - found.kl.low)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] / widths[-1] == pytest.approx(8, rel=0.5)  # as one over the square root


def test_the_paired_interval_is_narrower_than_either_perplexitys() -> None:
    found = report(tokens_of(64, seed=3), 64)
    increase = found.perplexity_increase_percent
    assert increase.high - increase.low < 100 * 2 * found.perplexity_se / found.perplexity


def test_equal_figures_for_equal_input() -> None:
    assert report(tokens_of(16, 1), 16) == report(tokens_of(16, 1), 16)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_counted(bad: float, side: int) -> None:
    pair = [rows(0), rows(1)]
    pair[side][2, 7] = bad
    pair[side][4, 0] = bad
    tokens = compare(*pair, torch.arange(5))
    figures = torch.stack([tokens.reference_nll, tokens.nll, tokens.kl, tokens.same_top1])
    assert figures.isnan().all(0).tolist() == figures.isnan().any(0).tolist() == [False, False, True, False, True]
    found = report(tokens, windows=5)
    assert found.non_finite == 2 and math.isnan(found.top1_agreement.mean) and math.isnan(found.top1_agreement.low)
    assert math.isnan(found.kl.mean) and math.isnan(found.kl.low) and math.isnan(found.kl.high)
    json.dumps(finite_json(found.to_json()), allow_nan=False)


def test_two_streams_of_nothing_but_nan_agree_on_nothing() -> None:
    nan = torch.full((5, 11), math.nan)
    assert math.isnan(report(compare(nan, nan.clone(), torch.arange(5)), windows=1).top1_agreement.mean)


def test_one_window_has_no_standard_error_and_no_interval() -> None:
    found = report(tokens_of(1, 0), 1)
    for interval in (found.kl, found.top1_agreement, found.perplexity_increase_percent):
        assert math.isfinite(interval.mean) and math.isnan(interval.low) and math.isnan(interval.high)
    assert math.isnan(found.perplexity_se) and finite_json(found.to_json())["perplexity_se"] is None


def test_losses_beyond_what_a_perplexity_can_be() -> None:
    """Logits in the thousands, a broken head's: figures that are no numbers, and no warning, which would be raised."""
    tokens = tokens_of(4, 0)
    more = torch.tensor([0.0, 800.0, 1600.0, 2400.0]).repeat_interleave(20)
    found = report(replace(tokens, nll=tokens.nll + more), 4)
    assert found.perplexity == math.inf and found.perplexity_increase_percent.mean == math.inf
    assert math.isnan(found.perplexity_increase_percent.high) and math.isfinite(found.reference_perplexity)
