"""Lines, JSON, logs and shared options of all commands. Whatever text is in lines, nothing moves the cursor."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import fields
from typing import Any, TypeVar

import typer

from qwenq.escaping import json_text, printable_lines
from qwenq.io.json import followed_links

FOLLOW_LINKS = "Follow links out of the model's directory."  # help of --follow-links
T = TypeVar("T")

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


def follow_links(context: typer.Context, value: bool) -> bool:
    """Follow links out of a model's directory until the command ends, where --follow-links is given."""
    if value and not context.resilient_parsing:
        context.with_resource(followed_links())
    return value


def typed(context: typer.Context, name: str) -> bool:
    """Whether an option was typed."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def names_in(text: str) -> list[str]:
    """Names with commas between them."""
    return [name for part in text.split(",") if (name := part.strip())]


def options_of(context: typer.Context, kind: type[T], **others: Any) -> T:
    """A dataclass of options, `kind`, from a command's parameters of the same names; `others` take precedence."""
    given = {f.name: context.params[f.name] for f in fields(kind) if f.name in context.params}  # type: ignore[arg-type]
    return kind(**given | others)
