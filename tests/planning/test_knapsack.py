"""The exact optimizer against every choice there is, and against uniform choices where there are too many."""

from __future__ import annotations

import itertools
import random

import pytest

from qwenq.planning import knapsack
from qwenq.planning.knapsack import Option, Solution, solve


def brute_force(groups: list[list[Option]], budget: int) -> float | None:
    """The least loss over all combinations."""
    best = None
    for combination in itertools.product(*groups):
        if sum(cost for cost, _ in combination) <= budget:
            loss = sum(loss for _, loss in combination)
            best = loss if best is None else min(best, loss)
    return best


def proven(found: Solution) -> bool:
    """Whether nothing better is thought possible."""
    return found.loss <= found.bound + 1e-12 * max(1.0, abs(found.loss))


def draw(rng: random.Random, groups: int, options: int, *, alike: bool) -> list[list[Option]]:
    """Random groups; `alike`: the same sizes and nearly the same losses in each, as in a deep model."""
    sizes = sorted(rng.sample(range(10, 200), options))
    found = []
    for _ in range(groups):
        own = sizes if alike else sorted(rng.sample(range(10, 200), options))
        scale = rng.uniform(0.9, 1.1) if alike else rng.uniform(0.1, 10)
        found.append([(cost, scale * 1000 / cost ** rng.choice((1, 2)) * rng.uniform(0.8, 1.2)) for cost in own])
        rng.shuffle(found[-1])
    return found


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_four_groups_by_brute_force(seed: int, alike: bool) -> None:
    rng = random.Random(seed)
    groups = draw(rng, 4, 7, alike=alike)
    low = sum(min(cost for cost, _ in options) for options in groups)
    high = sum(max(cost for cost, _ in options) for options in groups)
    for budget in (low - 1, low, *(rng.randint(low, high) for _ in range(4)), high, high + 5):
        wanted, found = brute_force(groups, budget), solve(groups, budget)
        assert (found is None) == (wanted is None) == (budget < low)
        if found is not None and wanted is not None:
            taken = [options[k] for options, k in zip(groups, found.chosen, strict=True)]
            assert found.loss == pytest.approx(wanted, rel=1e-12) and proven(found)
            assert sum(cost for cost, _ in taken) <= budget
            assert found.loss == pytest.approx(sum(loss for _, loss in taken), rel=1e-12)
            quick = solve(groups, budget, exact=False)
            assert quick is not None and quick.bound <= wanted + 1e-9 <= quick.loss + 2e-9
            assert sum(options[k][0] for options, k in zip(groups, quick.chosen, strict=True)) <= budget


@pytest.mark.parametrize("seed", range(3))
def test_many_groups_are_never_worse_than_one_option_for_all(seed: int) -> None:
    groups = [sorted(options) for options in draw(random.Random(seed), 120, 6, alike=True)]
    for option in range(6):
        cost = sum(options[option][0] for options in groups)
        found = solve(groups, cost)
        assert found is not None and proven(found)
        assert found.loss <= sum(options[option][1] for options in groups)


def test_what_was_cut_short_is_not_called_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too few states kept the bound is the relaxation's, and the loss is no better than the best."""
    cases = [draw(random.Random(seed), 10, 6, alike=False) for seed in range(12)]
    budgets = [sum(sorted(cost for cost, _ in options)[2] for options in groups) + 7 for groups in cases]
    best = [solve(*case) for case in zip(cases, budgets, strict=True)]
    monkeypatch.setattr(knapsack, "MAX_STATES", 1)
    monkeypatch.setattr(knapsack, "_BEAM", 1)
    cut = [solve(*case) for case in zip(cases, budgets, strict=True)]
    pairs = [(b, c) for b, c in zip(best, cut, strict=True) if b is not None and c is not None]
    assert len(pairs) == 12 and all(proven(b) for b, _ in pairs)
    assert all(c.bound <= b.loss <= c.loss for b, c in pairs)
    assert any(b.loss < c.loss for b, c in pairs)
    assert not any(proven(c) for b, c in pairs if b.loss < c.loss)
