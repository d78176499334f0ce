"""Small plots as SVG text: scales, axes, marks, labels that keep out of each other's way. Styled by the page's CSS.

Series differ by dash pattern and marker as well as by colour, and carry their names, so a grey print reads the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2 1 2 1 2", "1 4")
MARKERS = ("circle", "square", "triangle", "diamond", "down", "plus")
FONT_PX = 13
_CHARACTER_PX = 7.6  # a wide system font (DejaVu Sans) at 13 px
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Scale:
    """Values `low` to `high` on pixels `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.stop - self.start) * (v - a) / (b - a)

    def ticks(self, about: int) -> list[float]:
        """Round values inside the scale: 1, 2 or 5 times a power of ten; whole decades where those are enough."""
        if not self.log:
            rough = (self.high - self.low) / max(about, 1)
            power = 10.0 ** math.floor(math.log10(rough))
            steps = [power * m for m in (0.2, 0.5, 1, 2, 5, 10)]
            wanted = next(k for k, step in enumerate(steps) if step >= rough * 0.999)
            for step in steps[wanted::-1]:  # a finer one where fewer than two ticks fall inside
                ticks = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
                if len(ticks) > 1:
                    break
            return [k * step for k in ticks]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for leads in ([1], [1, 3], [1, 2, 5]):
            found = [s * 10.0**d for d in decades for s in leads if self.low <= s * 10.0**d <= self.high * 1.0001]
            if len(found) >= min(about, 4):
                return found
        return found


def tick_text(value: float) -> str:
    """A tick's value without noise: 0.05, 1, 20, 1e-05."""
    return re.sub(r"e(-?)\+?0*", r"e\1", f"{value:.6g}").replace("-", "−")


def text_width(text: str) -> float:
    """A generous guess of a label's width in pixels."""
    return len(text) * _CHARACTER_PX


def nice_range(values: Iterable[float], *, log: bool) -> tuple[float, float]:
    """A range with a little room around the values."""
    low, high = min(found := list(values)), max(found)
    if log:
        room = max((high / low) ** 0.08, 1.25)
        return low / room, high * room
    room = 0.06 * (high - low) or max(abs(high) * 0.1, 1.0)
    return low - room, high + room


@dataclass
class Drawing:
    """An SVG in the making; y grows downwards, pixels throughout."""

    width: int
    height: int
    ident: str  # unique on the page
    title: str
    description: str
    shapes: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, dash: str = "") -> None:
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.shapes.append(f'<path class="{kind}" d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}"{dashed}/>')

    def curve(self, points: Sequence[tuple[float, float]], kind: str, dash: str = "") -> None:
        if len(points) > 1:
            path = "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
            dashed = f' stroke-dasharray="{dash}"' if dash else ""
            self.shapes.append(f'<path class="{kind}" d="M{path}"{dashed}/>')

    def area(self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], kind: str) -> None:
        path = "L".join(f"{_n(x)} {_n(y)}" for x, y in [*upper, *reversed(lower)])
        self.shapes.append(f'<path class="{kind}" d="M{path}Z"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        named = f' class="{kind}"' if kind else ""
        end = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.shapes.append(f'<text x="{_n(x)}" y="{_n(y)}"{end}{named}>{escape(text)}</text>')

    def mark(self, shape: str, x: float, y: float, kind: str, size: float = 5.0) -> None:
        """A marker centred on x, y."""
        r, t = size, size * 1.2
        paths = {
            "circle": f"M{_n(x - r)} {_n(y)}a{_n(r)} {_n(r)} 0 1 0 {_n(2 * r)} 0a{_n(r)} {_n(r)} 0 1 0 {_n(-2 * r)} 0Z",
            "square": f"M{_n(x - r)} {_n(y - r)}h{_n(2 * r)}v{_n(2 * r)}h{_n(-2 * r)}Z",
            "triangle": f"M{_n(x)} {_n(y - t)}L{_n(x + t)} {_n(y + r)}H{_n(x - t)}Z",
            "down": f"M{_n(x)} {_n(y + t)}L{_n(x + t)} {_n(y - r)}H{_n(x - t)}Z",
            "diamond": f"M{_n(x)} {_n(y - t)}L{_n(x + t)} {_n(y)}L{_n(x)} {_n(y + t)}L{_n(x - t)} {_n(y)}Z",
            "plus": f"M{_n(x - t)} {_n(y)}H{_n(x + t)}M{_n(x)} {_n(y - t)}V{_n(y + t)}",
        }
        self.shapes.append(f'<path class="{kind}" d="{paths[shape]}"/>')

    def svg(self) -> str:
        """The element, described for those who do not see it."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img" aria-labelledby="{self.ident}-t {self.ident}-d">'
            f'<title id="{self.ident}-t">{escape(self.title)}</title>'
            f'<desc id="{self.ident}-d">{escape(self.description)}</desc>{"".join(self.shapes)}</svg>'
        )


def draw_axes(
    drawing: Drawing,
    x: Scale,
    y: Scale,
    *,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[float],
    x_title: str = "",
    y_title: str = "",
) -> None:
    """Grid, tick labels and titles; the y title stands over its axis, so that nobody has to tilt the head."""
    left, right, top, bottom = x.start, x.stop, y.stop, y.start
    for value in y_ticks:
        drawing.line(left, y(value), right, y(value), "grid")
        drawing.text(left - 7, y(value) + 4.5, tick_text(value), "end", "tick")
    drawing.line(left, bottom, right, bottom, "axis")
    for value, label in x_ticks:
        drawing.line(x(value), bottom, x(value), bottom + 4, "axis")
        drawing.text(x(value), bottom + 18, label, "middle", "tick")
    if y_title:
        drawing.text(2, top - 14, y_title, kind="title")
    if x_title:
        drawing.text(right, bottom + 37, x_title, "end", "title")


def overlaps(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place_labels(
    points: Sequence[tuple[float, float, str]], inside: Box, taken: Sequence[Box]
) -> list[tuple[float, float, bool]]:
    """Where each point's label starts (baseline, left end), and whether it is far enough to need a leader line.

    Greedy: right, left, above and below, then further out; the free space nearest above all where none is found.
    """
    boxes = list(taken)
    found = []
    for x, y, text in points:
        wide = text_width(text)
        places = [(11.0, 0), (-11 - wide, 0), (-wide / 2, -17), (-wide / 2, 17)]
        far = [(dx, dy) for dx in (11.0, -11 - wide, 40.0, 90.0, 140.0) for dy in range(-112, 113, 16) if dy]
        places += sorted(far, key=lambda place: abs(place[0]) / 4 + abs(place[1]))
        for dx, dy in places:
            box = (x + dx - 2, y + dy - 8, x + dx + wide + 2, y + dy + 8)
            within = inside[0] <= box[0] and box[2] <= inside[2] and inside[1] <= box[1] and box[3] <= inside[3]
            if within and not any(overlaps(box, other) for other in boxes):
                break
        else:
            dx, dy = min(max(x - wide / 2, inside[0] + 2), inside[2] - wide - 2) - x, -34
            box = (x + dx - 2, y + dy - 8, x + dx + wide + 2, y + dy + 8)
        boxes.append(box)
        found.append((x + dx, y + dy + 4.5, abs(dy) > 20 or dx > 30))
    return found


def spread_labels(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights as near as can be to those wanted, in their order, `gap` apart; within `low` to `high` where they fit.

    Least squares: with `gap` times the rank taken off, neighbours out of order share a mean (isotonic regression).
    """
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    pools: list[tuple[float, int]] = []  # sum, count
    for rank, k in enumerate(order):
        pools.append((wanted[k] - gap * rank, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = (pools[-1][0] + total, pools[-1][1] + count)
    means = [total / count for total, count in pools for _ in range(count)]
    top = high - gap * (len(order) - 1)
    found = [0.0] * len(wanted)
    for rank, k in enumerate(order):
        found[k] = max(min(means[rank], top), low) + gap * rank
    return found


def _n(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
