"""A report before it is a page: sections of paragraphs, lists, tables and figures. Every string in it is plain text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwenq.report.drawing import Drawing, figure_text
from qwenq.results import Interval
from qwenq.units import format_gb


@dataclass(frozen=True)
class Code:
    """A name, a path or a hash."""

    text: str


@dataclass(frozen=True)
class Small:
    """Text that belongs to the preceding figure, such as its interval."""

    text: str


Part = str | Code | Small
Text = Part | tuple[Part, ...]


@dataclass(frozen=True)
class Paragraph:
    text: Text


@dataclass(frozen=True)
class Items:
    """A list; `stressed` when a reader must not miss it."""

    items: tuple[Text, ...]
    stressed: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of each row is its heading. align: `l` or `r` for each column."""

    caption: str
    head: tuple[Text, ...]
    rows: tuple[tuple[Text, ...], ...]
    align: str

    @staticmethod
    def of(caption: str, head: tuple[Text, ...], rows: list[tuple[Text, ...]], align: str = "") -> Table:
        """A table whose columns but the first hold figures, unless `align` says otherwise."""
        return Table(caption, head, tuple(rows), align or "l" + "r" * (len(head) - 1))


@dataclass(frozen=True)
class Figure:
    """A plot, drawn once for a wide page and once for a phone, and the same figures as a table."""

    anchor: str
    title: str
    caption: Text
    draw: Callable[[int, str], Drawing]  # width in pixels, a prefix for ids
    table: Table


@dataclass(frozen=True)
class Details:
    """Tables to open on demand; the page has them, the Markdown does not."""

    summary: str
    tables: tuple[Table, ...]


Block = Paragraph | Items | Table | Figure | Details


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report. `data`: the figures again, as JSON for programs."""

    title: str
    subtitle: Text
    sections: tuple[Section, ...]
    data: dict[str, Any] = field(default_factory=dict)


def parts(text: Text) -> tuple[Part, ...]:
    """The parts of a text, however it was given."""
    return text if isinstance(text, tuple) else (text,)


MISSING = "–"


def number(value: float, spec: str, unit: str = "") -> str:
    """`value` formatted, with a true minus; `not finite` for NaN."""
    if not math.isfinite(value):
        return "not finite"
    text = figure_text(value, spec)
    return f"{text} {unit}" if unit else text


def known(value: float, spec: str, unit: str = "") -> str:
    """Like `number`, but a dash for what was not given."""
    return MISSING if math.isnan(value) else number(value, spec, unit)


def kl_spec(value: float) -> str:
    """Four significant digits, without an exponent as long as that reads well."""
    if not math.isfinite(value) or value == 0:
        return ".4f"
    return ".3e" if abs(value) < 1e-4 else f".{max(3 - math.floor(math.log10(abs(value))), 0)}f"


def kl(value: float) -> str:
    return number(value, kl_spec(value))


def with_interval(interval: Interval, spec: str, unit: str = "", scale: float = 1.0) -> Text:
    """A mean and, smaller, its interval; the mean alone where there is none."""
    mean = number(scale * interval.mean, spec, unit)
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return mean
    return mean, Small(f"{number(scale * interval.low, spec)} to {number(scale * interval.high, spec)}")


def size(n_bytes: float) -> str:
    return MISSING if math.isnan(n_bytes) else format_gb(n_bytes)
