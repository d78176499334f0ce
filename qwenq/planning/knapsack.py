"""The multiple-choice knapsack, solved exactly: one option of each group, total cost within a budget, least loss.

The linear relaxation (Sinha and Zoltners 1979) gives a price of a byte and a lower bound; an option whose loss at that
price exceeds its group's best by more than the gap to a known solution is in no better one (Dyer, Kayal and Walsh
1984). What survives goes through dynamic programming over undominated (cost, loss) pairs, pruned by the same gap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

MAX_STATES = 50_000  # of one step; beyond it the answer says how far from optimal it may be
_BEAM = 300  # states of the quick pass whose solution sets the gap
_EPS = 1e-12
Option = tuple[int, float]  # cost, loss


@dataclass(frozen=True)
class Solution:
    """The index of the option taken of each group. No choice within the budget has a loss below `bound`."""

    chosen: tuple[int, ...]
    loss: float
    bound: float


@dataclass(frozen=True)
class _Relaxed:
    """The linear relaxation: the loss a unit of cost is worth, its own loss, and a choice within the budget."""

    price: float
    loss: float
    greedy: list[int]


# A choice for the groups so far: cost, loss, loss above the priced best, option of the last group, what came before.
_State = tuple[int, float, float, int, "_State | None"]


def solve(groups: Sequence[Sequence[Option]], budget: int, *, exact: bool = True) -> Solution | None:
    """The exact optimum; None when even the cheapest options are over the budget. Losses are finite.

    exact False: the relaxation's own choice, quick and good.
    """
    kept = [_undominated(options) for options in groups]
    if sum(options[0][0] for _, options in kept) > budget:
        return None
    options = [found for _, found in kept]
    relaxed = _relax(options, budget)
    best, complete = relaxed.greedy, False
    if exact:
        beam, _ = _search(options, budget, relaxed, _loss(options, best), _BEAM)
        best = min((found for found in (best, beam) if found is not None), key=lambda c: _loss(options, c))
        whole, complete = _search(options, budget, relaxed, _loss(options, best), MAX_STATES)
        if whole is not None and _loss(options, whole) <= _loss(options, best):
            best = whole
    loss = _loss(options, best)
    chosen = tuple(index[k] for (index, _), k in zip(kept, best, strict=True))
    return Solution(chosen, loss, loss if complete else min(relaxed.loss, loss))


def _loss(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(found[k][1] for found, k in zip(options, chosen, strict=True))


def _undominated(options: Sequence[Option]) -> tuple[list[int], list[Option]]:
    """Indices and options in order of cost, each with less loss than every cheaper one."""
    order = sorted(range(len(options)), key=lambda k: options[k])
    kept: list[int] = []
    for k in order:
        if not kept or options[k][1] < options[kept[-1]][1]:
            kept.append(k)
    return kept, [options[k] for k in kept]


def _hull(options: Sequence[Option]) -> list[int]:
    """Options on the lower convex hull of (cost, loss)."""
    hull: list[int] = []
    for k, (cost, loss) in enumerate(options):
        while len(hull) > 1:
            (c0, l0), (c1, l1) = options[hull[-2]], options[hull[-1]]
            if (l1 - l0) * (cost - c1) < (loss - l1) * (c1 - c0):
                break
            hull.pop()
        hull.append(k)
    return hull


def _relax(options: Sequence[Sequence[Option]], budget: int) -> _Relaxed:
    """The relaxation along the options' hulls.

    Its choice takes the cheapest options, then the best buys while they fit; one that does not fit is skipped with all
    that build on it.
    """
    chosen = [0] * len(options)
    left = budget - sum(found[0][0] for found in options)
    steps = []
    for g, found in enumerate(options):
        hull = _hull(found)
        for a, b in itertools.pairwise(hull):
            (c0, l0), (c1, l1) = found[a], found[b]
            steps.append(((l1 - l0) / (c1 - c0), g, a, b))
    steps.sort()
    price, bound = 0.0, _loss(options, chosen)
    full = False
    for slope, g, a, b in steps:
        cost = options[g][b][0] - options[g][a][0]
        if not full and cost > left:
            full, price, bound = True, -slope, bound + slope * left
        if not full:
            bound += options[g][b][1] - options[g][a][1]
        if chosen[g] == a and cost <= left:
            chosen[g] = b
            left -= cost
    return _Relaxed(price, bound, chosen)


def _search(
    options: Sequence[Sequence[Option]],
    budget: int,
    relaxed: _Relaxed,
    known: float,
    limit: int,
) -> tuple[list[int] | None, bool]:
    """The best choice whose loss is at most `known`, by dynamic programming, and whether it is the best for certain.

    With more than `limit` states a step only the least regretted of each stretch of costs are kept.
    """
    price, complete = relaxed.price, True
    gap = known - relaxed.loss + _EPS * max(1.0, abs(known))
    regrets, allowed = [], []
    for found in options:
        priced = [loss + price * cost for cost, loss in found]
        least = min(priced)
        regrets.append([value - least for value in priced])
        allowed.append([k for k, value in enumerate(priced) if value - least <= gap])
    order = sorted(range(len(options)), key=lambda g: len(allowed[g]))
    cheapest, dearest = [0] * (len(order) + 1), [0] * (len(order) + 1)
    for at in range(len(order) - 1, -1, -1):
        costs = [options[order[at]][k][0] for k in allowed[order[at]]]
        cheapest[at], dearest[at] = cheapest[at + 1] + min(costs), dearest[at + 1] + max(costs)
    states: list[_State] = [(0, 0.0, 0.0, -1, None)]
    for at, g in enumerate(order):
        grown: list[_State] = []
        room = budget - cheapest[at + 1]
        least_regret = price * (budget - dearest[at + 1])  # of a state of no cost: what then stays unspent is worth it
        for k in allowed[g]:
            cost, loss = options[g][k]
            extra = regrets[g][k]
            for state in states:
                total, regret = state[0] + cost, state[2] + extra
                if total > room:
                    break  # states are in order of cost
                if regret <= gap and regret + least_regret - price * total <= gap:
                    grown.append((total, state[1] + loss, regret, k, state))
        grown.sort(key=itemgetter(0, 1))
        states, lowest = [], math.inf
        for state in grown:
            if state[1] < lowest:
                states.append(state)
                lowest = state[1]
        if len(states) > limit:
            runs = (states[len(states) * n // limit : len(states) * (n + 1) // limit] for n in range(limit))
            states = [min(run, key=itemgetter(2)) for run in runs]
            complete = False
    if not states:
        return None, complete
    chosen, last = [0] * len(options), states[-1]
    for g in reversed(order):
        chosen[g] = last[3]
        assert last[4] is not None
        last = last[4]
    return chosen, complete
