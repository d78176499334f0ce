"""A report before it is a page: sections of paragraphs, lists, tables and figures. Every string in it is plain text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwenq.report.drawing import Drawing


@dataclass(frozen=True)
class Code:
    """A name, a path or a hash."""

    text: str


@dataclass(frozen=True)
class Small:
    """What belongs to the figure before it, such as its interval."""

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
