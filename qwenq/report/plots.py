"""The report's plots: KL against size, error by layer, memory against context. Each draws for any width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwenq.report.drawing import (
    DASHES,
    MARKERS,
    Box,
    Drawing,
    Scale,
    draw_axes,
    figure_text,
    leader,
    nice_range,
    place_labels,
    spread_labels,
    text_width,
)
from qwenq.units import format_tokens

LABEL_PX = 17.0  # between the baselines of two labels


@dataclass(frozen=True)
class Point:
    """A measured KL at a size. `series` decides marker and colour; ours are filled, other tools' hollow."""

    label: str
    size: float
    kl: float
    low: float
    high: float
    series: int
    ours: bool


def _between(point: Point) -> str:
    """Its interval in words; nothing where there is none."""
    known = math.isfinite(point.low) and math.isfinite(point.high)
    return f" ({point.low:.4g} to {point.high:.4g})" if known else ""


def draw_kl_size(points: Sequence[Point], size_title: str, width: int, ident: str) -> Drawing:
    """Mean KL with its interval against size; logarithmic where the values span more than a factor of 4."""
    tall = 360 if width > 600 else 430
    drawing = Drawing(
        width, tall, ident, "KL divergence against size",
        "; ".join(f"{p.label}: KL {p.kl:.4g}{_between(p)} at {p.size:.4g}" for p in points),
    )  # fmt: skip
    values = [v for p in points for v in (p.kl, p.low, p.high) if math.isfinite(v)]
    log = min(values) > 0 and max(values) / min(values) > 4
    kl_low, kl_high = nice_range(values, log=log)
    size_low, size_high = nice_range([p.size for p in points], log=False)
    left, right, top, bottom = 58.0, width - 12.0, 36.0, tall - 52.0
    y = Scale(kl_low if log else max(0.0, kl_low), kl_high, bottom, top, log)
    x = Scale(size_low, size_high, left, right)
    draw_axes(
        drawing, x, y,
        x_ticks=[(value, figure_text(value)) for value in x.ticks(width // 110)], y_ticks=y.ticks(5),
        x_title=size_title, y_title="mean KL, nats per token" + (", log scale" if log else ""),
    )  # fmt: skip
    taken: list[Box] = []
    spots = []
    for p in points:
        at = x(p.size), y(p.kl)
        kind = f"s{p.series % len(MARKERS)}"
        if math.isfinite(p.low) and math.isfinite(p.high):
            ends = y(max(p.low, y.low)), y(min(p.high, y.high))
            drawing.line(at[0], ends[0], at[0], ends[1], f"stroke {kind}")
            for end in ends:
                drawing.line(at[0] - 5, end, at[0] + 5, end, f"stroke {kind}")
            taken.append((at[0] - 6, ends[1] - 2, at[0] + 6, ends[0] + 2))
        taken.append((at[0] - 8, at[1] - 8, at[0] + 8, at[1] + 8))
        spots.append((*at, p.label))
    labels = place_labels(spots, (left, top - 8, float(width), bottom), taken)
    for p, (at_x, at_y, _), (label_x, label_y, far) in zip(points, spots, labels, strict=True):
        if far:
            drawing.line(*leader(at_x, at_y, label_x, label_y, p.label), "leader")
        drawing.mark(MARKERS[p.series % len(MARKERS)], at_x, at_y, _marker_kind(p.series, filled=p.ours))
        drawing.text(label_x, label_y, p.label, kind="label")
    return drawing


@dataclass(frozen=True)
class Series:
    """One line of a plot: values by x, None where there is none."""

    label: str
    values: Mapping[int, float | None]
    index: int

    @property
    def points(self) -> list[tuple[int, float]]:
        return sorted((x, v) for x, v in self.values.items() if v is not None and math.isfinite(v))


def draw_layers(
    panels: Mapping[str, Sequence[Series]], y_title: str, description: str, width: int, ident: str
) -> Drawing:
    """Small multiples of one quantity in dB against the layer, one panel a kind, all on one scale."""
    columns = 2 if width > 600 and len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    tall = 168.0 if len(panels) > 1 else 250.0
    drawing = Drawing(width, round(rows * tall + 48), ident, y_title, description)
    values = [v for panel in panels.values() for series in panel for _, v in series.points]
    layers = [x for panel in panels.values() for series in panel for x, _ in series.points]
    low, high = nice_range(values, log=False)
    names = [series.label for panel in panels.values() for series in panel if series.points]
    room = max(map(text_width, names)) + 14
    wide = width / columns
    for k, (name, panel) in enumerate(panels.items()):
        column, row = k % columns, k // columns
        left, right = column * wide + 44, (column + 1) * wide - room
        top = row * tall + 44
        bottom = top + tall - 62
        y = Scale(low, high, bottom, top)
        x = Scale(min(layers) - 0.5, max(layers) + 0.5, left, right)
        last = k + columns >= len(panels)
        draw_axes(
            drawing, x, y,
            x_ticks=_layer_ticks(min(layers), max(layers), right - left), y_ticks=y.ticks(6),
            x_title="decoder layer" if last else "",
        )  # fmt: skip
        drawing.text(left, top - 10, name, kind="panel")
        _draw_lines(drawing, x, y, panel, right)
    drawing.text(2, 16, y_title, kind="title")
    return drawing


def _draw_lines(drawing: Drawing, x: Scale, y: Scale, panel: Sequence[Series], right: float) -> None:
    """The lines of a panel, with markers on some points and the names at their ends."""
    drawn = [series for series in panel if series.points]
    ends = spread_labels([y(s.points[-1][1]) for s in drawn], LABEL_PX, y.stop, y.start)
    for series, end in zip(drawn, ends, strict=True):
        k = series.index % len(MARKERS)
        spots = [(x(at), y(value)) for at, value in series.points]
        drawing.curve(spots, f"curve s{k}", DASHES[k % len(DASHES)])
        every = max(1, len(spots) // 6)
        for spot in spots[series.index % every :: every]:
            drawing.mark(MARKERS[k], *spot, _marker_kind(k), 3.5)
        drawing.line(spots[-1][0] + 5, spots[-1][1], right + 4, end, "leader")
        drawing.text(right + 7, end + 4.5, series.label)


@dataclass(frozen=True)
class MemoryCurve:
    """Memory in GiB by context in tokens: the estimate with its range, and what was measured."""

    label: str
    estimate: Sequence[tuple[int, float, float, float]]  # context, low, middle, high
    measured: Sequence[tuple[int, float]]
    index: int


def draw_memory(
    curves: Sequence[MemoryCurve], limits: Sequence[tuple[str, float]], title: str, width: int, ident: str
) -> Drawing:
    """Memory against context on a logarithmic axis; bands are the estimate's range, crosses measurements."""
    described = "; ".join(
        f"{c.label}: " + ", ".join(f"{format_tokens(at)} {middle:.2f} GiB" for at, _, middle, _ in c.estimate)
        for c in curves
    )
    drawing = Drawing(width, 380, ident, "Memory against context", described)
    names = [c.label for c in curves]
    left, right, top, bottom = 52.0, width - max(map(text_width, names)) - 14, 40.0, 328.0
    contexts = sorted({at for c in curves for at, *_ in c.estimate} | {at for c in curves for at, _ in c.measured})
    highest = max([high for c in curves for *_, high in c.estimate] + [v for c in curves for _, v in c.measured])
    shown = [(name, value) for name, value in limits if value <= 1.25 * highest]
    x = Scale(contexts[0], contexts[-1], left + 6, right - 6, log=True)
    y = Scale(0.0, max([highest, *(v for _, v in shown)]) * 1.06, bottom, top)
    marks = [c for c in contexts if c & (c - 1) == 0] or contexts
    step = max(1, math.ceil(len(marks) * 46 / (right - left)))
    draw_axes(
        drawing, x, y, x_ticks=[(c, format_tokens(c)) for c in marks[::step]], y_ticks=y.ticks(6),
        x_title="context, tokens, log scale", y_title=title,
    )  # fmt: skip
    for name, value in shown:
        drawing.line(left, y(value), right, y(value), "limit", "3 4")
        drawing.text(left + 8, y(value) - 5, name, kind="tick label")
    ends = spread_labels([y(c.estimate[-1][2]) for c in curves], LABEL_PX, top, bottom)
    for curve, end in zip(curves, ends, strict=True):
        k = curve.index % len(MARKERS)
        spots = [(x(at), y(middle)) for at, _, middle, _ in curve.estimate]
        upper = [(x(at), y(high)) for at, _, _, high in curve.estimate]
        lower = [(x(at), y(low)) for at, low, _, _ in curve.estimate]
        drawing.area(upper, lower, f"band s{k}")
        drawing.curve(spots, f"curve s{k}", DASHES[k])
        for spot in spots:
            drawing.mark(MARKERS[k], *spot, _marker_kind(k), 3.5)
        for at, value in curve.measured:
            px, py = x(at), y(value)
            drawing.line(px - 6, py - 6, px + 6, py + 6, f"stroke s{k}")
            drawing.line(px - 6, py + 6, px + 6, py - 6, f"stroke s{k}")
        drawing.line(spots[-1][0] + 5, spots[-1][1], right + 4, end, "leader")
        drawing.text(right + 7, end + 4.5, curve.label)
    return drawing


def _marker_kind(series: int, *, filled: bool = True) -> str:
    k = series % len(MARKERS)
    return f"{'mark' if filled else 'hollow'} s{k}" if MARKERS[k] != "plus" else f"stroke s{k}"


def _layer_ticks(first: int, last: int, width: float) -> list[tuple[float, str]]:
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if (last - first) / s * 30 <= width), 200)
    return [(k, str(k)) for k in range(-(-first // step) * step, last + 1, step)]
