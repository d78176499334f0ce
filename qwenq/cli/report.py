"""`qwenq report`: finished runs as one page and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.console import out, warn
from qwenq.cli.options import JsonFlag
from qwenq.cli.plain import print_json
from qwenq.planning.engines.base import engine_names


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="CHECKPOINT", help="Outputs of `qwenq quantize` or `convert`, all of one model."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for report.html and report.md.")],
    title: Annotated[str, typer.Option(help="Title. Default: the model and the number of variants.")] = "",
    benchmarks: Annotated[
        Path | None, typer.Option(help="Other tools' results as JSON lines, shown next to the runs.")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Saved by `qwenq vram measure`, one file per checkpoint; repeatable.")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option("--gpu", help="A rig, as in `qwenq plan`; repeatable. Default: common ones.")
    ] = None,
    engine: Annotated[str, typer.Option(help=f"For the memory estimate: {engine_names(checkpoints=True)}.")] = "qwenq",
    json: JsonFlag = False,
) -> None:
    """Write report.html (self-contained) and report.md from the manifests of finished runs.

    Warnings and fallbacks come first, then the quality lost, KL against size, errors by layer, which rigs hold it,
    memory against context, engines and tensor parallelism, and the provenance.
    """
    from qwenq.report.benchmarks import read_benchmarks, read_measurements
    from qwenq.report.compose import Extras, compose, write_report
    from qwenq.report.runs import load_runs

    left_out: list[str] = []
    found = load_runs(runs, left_out.append)
    for line in left_out:
        warn(line)
    extras = Extras(
        title=title,
        benchmarks=read_benchmarks(benchmarks) if benchmarks else (),
        measurements=tuple(m for file in measured or () for m in read_measurements(file)),
        left_out=tuple(left_out),
        rigs=tuple(gpu or ()),
        engine=engine,
    )
    page, markdown = output / "report.html", output / "report.md"
    write_report(compose(found, extras), page, markdown)
    if json:
        print_json({"html": str(page), "markdown": str(markdown)})
    else:
        out.print(f"report: {page}, {markdown}", soft_wrap=True)
