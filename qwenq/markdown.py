"""Markdown (GitHub's) from text that may come from anywhere: escaping, code spans, tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*\[\]<>|~])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])|(&)(?=[#A-Za-z])")
_BAR = re.compile(r"(?<!\\)[|]")
_START = re.compile(r"^(\s*)([#+-]|\d+[.)])(?=\s)")


def escape(text: str) -> str:
    """`text` on one line, meaning itself: no emphasis, link, tag, entity, table bar or list begins in it."""
    line = " ".join(text.split())
    return _START.sub(r"\1\\\2", _SPECIAL.sub(lambda m: "\\" + m[0], line))


def code(text: str) -> str:
    """`text` as a code span, fenced by more backticks than it holds."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines of a table; cells are Markdown already. align: `l` or `r` for each column."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_BAR.sub(r"\\|", cell) for cell in cells) + " |"

    rule = "|" + "|".join("---:" if side == "r" else "---" for side in align) + "|"
    return [line(head), rule, *map(line, rows)]
