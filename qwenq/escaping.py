"""Text that may come from anywhere, made harmless for where it goes. Every such text passes through one of these:

    a message, a log, a line on a terminal    printable, shown (which also shortens), several (names)
    lines on a terminal                       printable_lines
    JSON on a terminal or in an answer        json_text
    Markdown: reports and model cards         markdown, code, table
    a page                                    html
    the front matter of a model card          yaml_text
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# No text of a document has a use for these: controls, directions of writing, halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SPECIAL = re.compile(r"([\\`*\[\]<>|~])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])|(&)(?=[#A-Za-z])")
_BAR = re.compile(r"(?<!\\)[|]")
_START = re.compile(r"^(\s*)([#+-]|\d+[.)])(?=\s)")


def printable(text: str) -> str:
    """`text` as one line in which nothing moves the cursor, adds lines, or changes the direction of writing."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _named(c) for c in text)


def _named(c: str) -> str:
    return f"\\x{ord(c):02x}"


def shown(text: str, limit: int = 120) -> str:
    """`text` as one printable line of at most `limit` characters."""
    clean = printable(text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def several(names: Sequence[str]) -> str:
    """Names for one line, however many: `a`, `a and b`, `a, b and 26 more`."""
    if len(names) > 2:
        return f"{shown(names[0])}, {shown(names[1])} and {len(names) - 2} more"
    return " and ".join(map(shown, names))


def printable_lines(text: str) -> str:
    """`text` with its line breaks and tabs, all else as in `printable`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _named(c) for c in text)


def json_text(value: Any) -> str:
    """JSON of `value`, Unicode as it is but for what does not print: that is escaped, which JSON reads as the same."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    return "\\u007f" if c == "\x7f" else json.dumps(c)[1:-1]


def markdown(text: str) -> str:
    """`text` on one line, meaning itself: no emphasis, link, tag, entity, table bar or list begins in it."""
    line = _plain(" ".join(text.split()))
    return _START.sub(r"\1\\\2", _SPECIAL.sub(lambda m: "\\" + m[0], line))


def code(text: str) -> str:
    """`text` as a code span of Markdown, fenced by more backticks than it holds."""
    line = _plain(" ".join(text.split()))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines of a table of Markdown; cells are Markdown already. align: `l` or `r` for each column."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_BAR.sub(r"\\|", cell) for cell in cells) + " |"

    rule = "|" + "|".join("---:" if side == "r" else "---" for side in align) + "|"
    return [line(head), rule, *map(line, rows)]


def html(text: str) -> str:
    """`text` in a page, between tags or as an attribute's value."""
    from html import escape  # its table of entities costs other texts a tenth of a command's start

    return escape(_plain(text))


def _plain(text: str) -> str:
    return _CONTROL.sub(lambda match: _named(match[0]), text)


def yaml_text(text: str) -> str:
    """`text` as a double-quoted YAML scalar on one line."""
    return '"' + "".join(map(_yaml_character, text)) + '"'


def _yaml_character(c: str) -> str:
    if c in '"\\':
        return "\\" + c
    if c == " " or c.isprintable():
        return c
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}"
