"""`--follow-links`: files of a model that are links out of its directory are read as well."""

from __future__ import annotations

import typer

from qwenq.io.json import followed_links

HELP = "Read files linked from elsewhere."


def follow_links(context: typer.Context, value: bool) -> bool:
    """Follow links until the command ends, where the option is given."""
    if value and not context.resilient_parsing:
        context.with_resource(followed_links())
    return value
