"""What a layer is solved with: token batches and a clock."""

from __future__ import annotations

import time

import pytest

from qwenq.block import StageClock, batches, default_pull
from qwenq.scheme import Recipe, Scheme


@pytest.mark.parametrize(("windows", "length"), [(9, 512), (10, 2048), (7, 300), (1, 5000)])
def test_batches_are_every_window_once(windows: int, length: int) -> None:
    parts = [range(part.start, part.stop) for part in batches(windows, length)]
    assert [w for part in parts for w in part] == list(range(windows))
    assert all(len(part) * length <= 2048 or len(part) == 1 for part in parts)


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


def test_eight_bits_alone_are_not_pulled() -> None:
    four, eight = Scheme(4, 64), Scheme(8, 64)
    assert default_pull(Recipe(four)) == default_pull(Recipe(eight, (("a", four),))) == 0.5
    assert default_pull(Recipe(eight)) == default_pull(Recipe(eight, (("a", None),))) == 0.0
