"""`qwenq verify`: is a checkpoint still what was written, and was it made from this source?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qwenq import api
from qwenq.cli.console import out
from qwenq.cli.options import FollowLinks, JsonFlag
from qwenq.cli.plain import print_json, print_step
from qwenq.errors import UsageError
from qwenq.units import counted


def verify(
    directory: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="Output of `qwenq quantize`: the directory, or a GGUF file in it."),
    ],
    source: Annotated[
        Path | None, typer.Option(help="The 16-bit source checkpoint: hash its files too.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="With --source: layers to recompute and compare, e.g. 0,5, or `none`. Default: three.")
    ] = "",
    all_layers: Annotated[bool, typer.Option("--all-layers", help="With --source: recompute every layer.")] = False,
    calibration: Annotated[
        str | None, typer.Option(help="Your calibration file, if the checkpoint was made with one.")
    ] = None,
    follow_links: FollowLinks = False,
    json: JsonFlag = False,
) -> None:
    """Check every file of a checkpoint against its manifest and list missing, changed and extra files.

    With --source, also hash the source's files and recompute some layers from them, which must give the same bytes.
    Exits with 1 if anything is found. A manifest is not a signature: it reveals damage and mix-ups, not who wrote it.
    """
    given = {"--layers": layers, "--all-layers": all_layers, "--calibration": calibration}
    asked = [name for name, value in given.items() if value]
    if source is None and asked:
        raise UsageError(f"{asked[0]} goes with --source", hint="layers are recomputed from the 16-bit checkpoint")
    if layers and all_layers:
        raise UsageError("--layers and --all-layers exclude each other")
    chosen = _numbers(layers)

    result = api.verify(
        directory,
        source,
        layers="all" if all_layers else () if layers == "none" else chosen,
        calibration=calibration,
        progress=(lambda line: None) if json else print_step,
    )
    again = result.layers_made_again
    if json:
        print_json(result.to_json())
    else:
        for finding in result.findings:
            out.print(str(finding), soft_wrap=True)
        if not result.findings:
            read = f", {counted(result.source_files, 'file')} of the source" if source else ""
            read += f", {_named(again)} recomputed" if again else ""
            out.print(f"{directory}: {counted(result.files, 'file')}{read}, all matching the manifest", soft_wrap=True)
            out.print(f"digest {result.digest}", soft_wrap=True)
            if result.layers_not_made_again:
                left = _named(result.layers_not_made_again)
                out.print(f"not recomputed: {left} (--all-layers recomputes every layer)", soft_wrap=True)
    if result.findings:
        raise typer.Exit(1)


def _named(numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 0, 39 to 41`: rising numbers with runs of them as spans."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return f"layer{'s' * (len(numbers) > 1)} " + ", ".join(" to ".join(map(str, span)) for span in spans)


def _numbers(text: str) -> list[int] | None:
    if text in ("", "none"):
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--layers {text}: not layers", hint="numbers from 0 on, e.g. 0,5") from None
