"""`qwenq verify`: is a checkpoint still what was written, and was it made from this source?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.console import out, print_json
from qwenq.cli.models import JsonFlag


def verify(
    directory: Annotated[Path, typer.Argument(help="A directory that `qwenq quantize` made.")],
    source: Annotated[
        Path | None, typer.Option(help="The 16-bit checkpoint it was made from: hash its files too.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check every file of a checkpoint against its manifest: missing, changed or extra ones are named, one a line.

    Exits with 1 when anything is found. A manifest is no signature: it shows damage and mix-ups, not who wrote it.
    """
    from qwenq.verify import verify as run

    result = run(directory, source)
    if json:
        print_json(result.to_json())
    else:
        for finding in result.findings:
            out.print(str(finding), soft_wrap=True, markup=False)
        if not result.findings:
            read = f", {result.source_files} files of the source" if source else ""
            out.print(f"{directory}: {result.files} files{read}, all as in its manifest", soft_wrap=True, markup=False)
            out.print(f"digest {result.digest}", soft_wrap=True, markup=False)
    if result.findings:
        raise typer.Exit(1)
