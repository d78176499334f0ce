"""Scales, ticks and labels of the report's plots."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qwenq.report.drawing import (
    Scale,
    crosses,
    figure_text,
    nice_range,
    overlaps,
    place_labels,
    spread_labels,
    text_width,
)
from qwenq.report.plots import Point, draw_kl_size


def test_scales_by_hand() -> None:
    linear = Scale(0, 10, 100, 200)
    assert [linear(v) for v in (0, 5, 10)] == [100, 150, 200]
    assert linear.ticks(5) == [0, 2, 4, 6, 8, 10]
    log = Scale(0.001, 10, 300, 100, log=True)
    assert [round(log(v), 9) for v in (0.001, 0.1, 10)] == [300, 200, 100]
    assert log.ticks(5) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert Scale(0.002, 0.2, 0, 1, log=True).ticks(5) == pytest.approx([0.003, 0.01, 0.03, 0.1])
    assert [figure_text(v) for v in (0.05, -20.0, 1e-5, 1000000)] == ["0.05", "−20", "1e−5", "1e6"]


@given(st.floats(-100, 100), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_ticks_lie_inside_and_are_round(offset: float, span: float, about: int) -> None:
    low = offset * span
    scale = Scale(low, low + span, 0, 1)
    ticks = scale.ticks(about)
    assert 2 <= len(ticks) <= max(about + 2, 5)  # 5: the next finer step where the wanted one gives a single tick
    assert all(low - 1e-6 * span <= t <= low + span + 1e-6 * span for t in ticks)
    steps = {f"{(b - a) / 10 ** math.floor(math.log10(b - a) + 1e-6):.3g}" for a, b in itertools.pairwise(ticks)}
    assert steps <= {"1", "2", "5"}


@given(st.floats(5e-324, 1e299), st.floats(5e-324, 1e299))
def test_logarithmic_scales_hold_any_two_numbers(a: float, b: float) -> None:
    """The smallest there is too: a KL divergence of 5e-324 is only a line of somebody's file."""
    assume(max(a, b) > 4 * min(a, b))
    low, high = nice_range([a, b], log=True)
    scale = Scale(low, high, 0, 1, log=True)
    assert 0 < low <= min(a, b) and max(a, b) < high < math.inf
    assert 0 <= scale(a) <= 1 and 0 <= scale(b) <= 1
    assert 1 <= len(scale.ticks(5)) <= 50


@given(st.lists(st.floats(0, 300), min_size=1, max_size=8))
def test_labels_at_line_ends_keep_their_distance(wanted: list[float]) -> None:
    found = spread_labels(wanted, 17, 0, 300)
    heights = sorted(found)
    assert all(b - a >= 17 - 1e-6 for a, b in itertools.pairwise(heights))
    assert heights[0] >= -1e-6 and heights[-1] <= 300 + 1e-6
    for (a, at_a), (b, at_b) in itertools.combinations(zip(wanted, found, strict=True), 2):
        assert a == b or (a < b) == (at_a < at_b)
    if all(abs(a - b) >= 17 for a, b in itertools.combinations(wanted, 2)):
        assert found == pytest.approx(wanted)


def test_labels_that_collide_share_the_move() -> None:
    assert spread_labels([100, 100], 17, 0, 300) == [91.5, 108.5]
    assert spread_labels([299, 299], 17, 0, 300) == [283, 300]


@given(st.lists(st.tuples(st.floats(60, 600), st.floats(60, 300)), min_size=1, max_size=8))
def test_point_labels_do_not_overlap(spots: list[tuple[float, float]]) -> None:
    names = [(x, y, f"label {k}") for k, (x, y) in enumerate(spots)]
    boxes = []
    for (x, y, name), (at_x, at_y, far) in zip(names, place_labels(names, (50, 20, 900, 400), []), strict=True):
        boxes.append((at_x, at_y - 12, at_x + text_width(name), at_y + 3))
        assert far or math.hypot(at_x - x, at_y - y) < 90
    assert not any(overlaps(a, b) for a, b in itertools.combinations(boxes, 2))


def test_a_line_through_a_box() -> None:
    box = (10.0, 10.0, 20.0, 20.0)
    assert crosses((0, 0, 30, 30), box) and crosses((15, 0, 15, 30), box) and crosses((12, 12, 13, 13), box)
    assert not crosses((0, 0, 9, 9), box) and not crosses((0, 15, 10, 15), box) and not crosses((0, 21, 30, 21), box)
    assert not crosses((0, 12, 12, 0), box), "past the corner"


TOOLS = [  # label, MB, KL: of the demo's report
    ("qwenq 4-bit g64", 171.3, 0.1042), ("gptqmodel 4-bit g64", 171.3, 0.2398),
    ("gptqmodel 4-bit g64 mse=2.4", 171.3, 0.2017), ("llamacpp Q4_K_M", 187.0, 0.07908),
    ("qwenq 8-bit g64", 225.2, 0.000545), ("gptqmodel 8-bit g64", 225.2, 0.001167), ("qwenq 4-bit g32", 175.5, 0.08327),
    ("gptqmodel 4-bit g32 mse=2.4", 175.5, 0.15), ("llmcompressor 4-bit g64 imatrix_mse", 169.9, 0.1697),
    ("gptqmodel 8-bit g64 mse=2.4", 225.2, 0.001104),
]  # fmt: skip


@pytest.mark.parametrize("width", [760, 400])
def test_no_leader_crosses_another_label(width: int) -> None:
    kinds = {name.split()[0]: k for k, (name, _, _) in enumerate(TOOLS)}
    points = [Point(n, bits, kl, 0.95 * kl, 1.05 * kl, kinds[n.split()[0]], True) for n, bits, kl in TOOLS]
    svg = draw_kl_size(points, "size, MB", width, "p").svg()
    labels = [
        (float(m[1]), float(m[2]), m[3])
        for m in re.finditer(r'<text x="([\d.]+)" y="([\d.]+)" class="label">([^<]*)</text>', svg)
    ]
    boxes = [(x, y - 11, x + text_width(text), y + 2) for x, y, text in labels]
    lines = [
        (float(m[1]), float(m[2]), float(m[3]), float(m[4]))
        for m in re.finditer(r'<path class="leader" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"/>', svg)
    ]
    assert len(labels) == len(TOOLS) and len(lines) >= 3
    assert not any(overlaps(a, b) for a, b in itertools.combinations(boxes, 2))
    assert not [(line, box) for line in lines for box in boxes if crosses(line, box)]
