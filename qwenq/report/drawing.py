"""Small plots as SVG text: scales, axes, marks, labels that keep out of each other's way. Styled by the page's CSS.

Series differ by dash pattern and marker as well as by colour, and carry their names, so a grey print reads the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from qwenq.escaping import html

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2 1 2 1 2", "1 4")
MARKERS = ("circle", "square", "triangle", "diamond", "down", "plus")
_CHARACTER_PX = 7.6  # a wide system font (DejaVu Sans) at 13 px
SWEEPS = 4
CROSSED_LABEL, CROSSED_MARK = 1000.0, 100.0  # what a leader line through one costs, against pixels of distance
Box = tuple[float, float, float, float]  # left, top, right, bottom
Line = tuple[float, float, float, float]  # x1, y1, x2, y2


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
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = range(first, last + 1, max(1, (last - first) // (4 * about)))
        for leads in ([1], [1, 3], [1, 2, 5]):
            found = [s * 10.0**d for d in decades for s in leads if self.low <= s * 10.0**d <= self.high * 1.0001]
            if len(found) >= min(about, 4):
                return found
        return found


def figure_text(value: float, spec: str = ".6g") -> str:
    """A figure without noise and with a true minus: 0.05, 1, 20, 1e−5."""
    return re.sub(r"e(-?)\+?0*", r"e\1", f"{value:{spec}}").replace("-", "−")


def text_width(text: str) -> float:
    """A generous guess of a label's width in pixels."""
    return len(text) * _CHARACTER_PX


def nice_range(values: Iterable[float], *, log: bool) -> tuple[float, float]:
    """A range with a little room around the values, which are positive and below 1e300 where `log`."""
    low, high = min(found := list(values)), max(found)
    if log:
        room = min(max(math.exp(0.08 * (math.log(high) - math.log(low))), 1.25), 100.0)
        return max(low / room, math.ulp(0.0)), high * room
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
        self.shapes.append(f'<text x="{_n(x)}" y="{_n(y)}"{end}{named}>{html(text)}</text>')

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
            f'<title id="{self.ident}-t">{html(self.title)}</title>'
            f'<desc id="{self.ident}-d">{html(self.description)}</desc>{"".join(self.shapes)}</svg>'
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
        drawing.text(left - 7, y(value) + 4.5, figure_text(value), "end", "tick")
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


def crosses(line: Line, box: Box) -> bool:
    """Whether any of the line from (x1, y1) to (x2, y2) is inside the box."""
    (x1, y1, x2, y2), first, last = line, 0.0, 1.0
    for start, way, low, high in ((x1, x2 - x1, box[0], box[2]), (y1, y2 - y1, box[1], box[3])):
        if way == 0:
            if not low < start < high:
                return False
            continue
        a, b = sorted(((low - start) / way, (high - start) / way))
        first, last = max(first, a), min(last, b)
    return first < last


def leader(x: float, y: float, label_x: float, label_y: float, text: str) -> Line:
    """From a point to the nearest end of its label, in the middle of its height."""
    return x, y, min(max(x, label_x - 2), label_x + text_width(text)), label_y - 4.5


def place_labels(
    points: Sequence[tuple[float, float, str]], inside: Box, taken: Sequence[Box]
) -> list[tuple[float, float, bool]]:
    """Where each point's label starts (left end, baseline), and whether it is far enough to need a leader line.

    Each in turn takes the best free place: right, left, above and below, then further out; a leader
    through a label costs most, one through a marker less. Then each again, now that all are there, while any moves.
    Of several orders the one that costs least counts.
    """
    heights = sorted(range(len(points)), key=lambda k: points[k][1])
    tries = [_placed(points, order, inside, taken) for order in (range(len(points)), heights, heights[::-1])]
    best = min(tries, key=lambda labels: sum(label.cost for label in labels))
    return [(label.x, label.y, label.line is not None) for label in best]


@dataclass(frozen=True)
class _Label:
    x: float  # left end
    y: float  # baseline
    box: Box
    line: Line | None  # its leader
    cost: float = 0.0


def _placed(
    points: Sequence[tuple[float, float, str]], order: Sequence[int], inside: Box, taken: Sequence[Box]
) -> list[_Label]:
    """Labels of the points, put down in this order, then moved while that helps."""
    placed: dict[int, _Label] = {}
    for _ in range(SWEEPS):
        before = dict(placed)
        for k in order:
            others = [label for at, label in placed.items() if at != k]
            placed[k] = _best_place(*points[k], others, inside, taken)
        if placed == before:
            break
    return [placed[k] for k in range(len(points))]


def _best_place(x: float, y: float, text: str, others: Sequence[_Label], inside: Box, taken: Sequence[Box]) -> _Label:
    """The cheapest place for one label beside the others."""
    wide = text_width(text)
    strange = [box for box in taken if not (box[0] <= x <= box[2] and box[1] <= y <= box[3])]

    def label(dx: float, dy: float) -> _Label:
        far = abs(dy) > 20 or dx > 30 or dx + wide < -30
        left, base = x + dx, y + dy + 4.5
        line = leader(x, y, left, base, text) if far else None
        return _Label(left, base, (left - 2, y + dy - 8, left + wide + 2, y + dy + 8), line)

    best: tuple[float, _Label] | None = None
    for cost, dx, dy in _places(wide):
        if best is not None and cost >= best[0]:
            break  # the places after it cost more
        found = label(dx, dy)
        box, line = found.box, found.line
        if box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]:
            continue
        if any(overlaps(box, other.box) for other in others) or any(overlaps(box, other) for other in taken):
            continue
        cost += CROSSED_LABEL * sum(crosses(other.line, box) for other in others if other.line)
        if line:
            cost += CROSSED_LABEL * sum(crosses(line, other.box) for other in others)
            cost += CROSSED_MARK * sum(crosses(line, other) for other in strange)
        if best is None or cost < best[0]:
            best = cost, found
    if best is None:  # no room anywhere: over what is there
        best = 2 * CROSSED_LABEL, label(min(max(x - wide / 2, inside[0] + 2), inside[2] - wide - 2) - x, -34.0)
    return replace(best[1], cost=best[0])


def _places(wide: float) -> list[tuple[float, float, float]]:
    """Offsets of a label's left end and middle from its point, each with its cost, the cheapest first."""
    near = [(0.0, 11.0, 0.0), (1.0, -11 - wide, 0.0), (2.0, -wide / 2, -17.0), (3.0, -wide / 2, 17.0)]
    sides = [(gap, gap) for gap in (11.0, 25.0, 40.0, 65.0, 90.0, 140.0)]
    sides += [(gap, -gap - wide) for gap in (11.0, 40.0, 90.0)]
    far = [(10 + gap / 4 + abs(dy), dx, float(dy)) for gap, dx in sides for dy in range(-128, 129, 8) if dy]
    return near + sorted(far)


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
