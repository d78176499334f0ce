"""Lines, JSON and logs of all commands: whatever text is in them, nothing moves the cursor."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

from qwenq.escaping import json_text, printable_lines

_PAINTED = re.compile(r"(\x1b\[[0-9;]+m[█|]\x1b\[0m)")  # the bars of a chart, the only colours of plain lines


def print_json(value: Any) -> None:
    """JSON to stdout; figures that are not finite become null."""
    from qwenq.results import finite_json  # with results that a plan has nothing of

    print(json_text(finite_json(value)))


def print_line(text: str = "", *, end: str = "\n") -> None:
    """Plain lines to stdout; painted bars of a chart stay painted."""
    parts = _PAINTED.split(text)
    shown = (part if k % 2 else printable_lines(part) for k, part in enumerate(parts))
    print("".join(shown), end=end, flush=True)


def escape_logs() -> None:
    """Have every library's log say what it says in plain lines: transformers' quotes values of config.json."""
    make = logging.getLogRecordFactory()

    def made(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # a mistake of the library's, of which logging shows a repr
            return record
        if (plain := printable_lines(text)) != text:
            record.msg, record.args = plain, ()
        return record

    logging.setLogRecordFactory(made)


def print_step(line: str, *, end: str = "\n") -> None:
    """A line of progress to stderr."""
    print(printable_lines(line), end=end, file=sys.stderr, flush=True)
