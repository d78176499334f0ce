"""`qwenq convert`: the same codes in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenq import api
from qwenq.cli.console import out as stdout
from qwenq.cli.console import warn
from qwenq.cli.options import FollowLinks, JsonFlag
from qwenq.cli.plain import print_json
from qwenq.formats.base import FORMATS, names_of
from qwenq.units import format_gb, format_seconds


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint from any tool: a directory or a GGUF file."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory.")],
    format: Annotated[
        str,
        typer.Option(
            "--format", help=names_of(form for form in FORMATS.values() if form.integer_codes) + ".", metavar="NAME"
        ),
    ],
    follow_links: FollowLinks = False,
    json: JsonFlag = False,
) -> None:
    """Store a quantized checkpoint's codes in another format, bit for bit, without solving or rounding anything.

    Works between formats with integer codes; an error if the target format cannot hold them.
    """
    made = api.convert(source, out, format, warn=warn)
    if json:
        print_json(made.to_json())
        return
    stdout.print(
        f"{made.out}: {made.scheme}, {made.source_format} to {made.format}, {format_gb(made.file_bytes)}, "
        f"{format_seconds(made.seconds)}, peak {format_gb(made.peak_rss_bytes)} of memory",
        soft_wrap=True,
    )
