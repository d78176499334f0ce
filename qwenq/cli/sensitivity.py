"""`qwenq sensitivity`: the loss of each fused group by each scheme, measured once for any later budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qwenq import api
from qwenq.cli.console import LayerProgress, out, warn
from qwenq.cli.options import (
    JOB,
    TEXT,
    BuiltinShare,
    Calibration,
    ComputeDtype,
    FollowLinks,
    JsonFlag,
    OneDevice,
    Original,
    SequenceLength,
    Strict,
    option,
)
from qwenq.cli.plain import options_of, print_json
from qwenq.cli.ranks import fetched_once, over_ranks
from qwenq.formats.base import label_of
from qwenq.pipeline.config import QuantizeConfig, carry_zero_points, of_builtin
from qwenq.planning.sensitivity import OUTER, Sensitivity
from qwenq.units import counted


def sensitivity(
    context: typer.Context,
    model: Original,
    output: Annotated[Path, option(JOB, "--output", "-o", help="Output file.")] = Path("sensitivity.json"),
    calibration: Calibration = QuantizeConfig.calibration,
    num_samples: Annotated[
        int | None,
        option(TEXT, "--num-samples", "-n", min=2, help="Calibration windows. Default: all, at most 128."),
    ] = QuantizeConfig.num_samples,
    builtin_share: BuiltinShare = QuantizeConfig.builtin_share,
    sequence_length: SequenceLength = QuantizeConfig.sequence_length,
    seed: Annotated[int, option(TEXT, min=0, help="Selects windows and sampled labels.")] = QuantizeConfig.seed,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help=f"Also measure 4 bits with zero points, for {carry_zero_points()}.")
    ] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="Of the rotated model, for `quantize --rotate`.")] = False,
    format: Annotated[
        str, option(JOB, "--format", metavar="NAME", help="Schemes to measure; gptq's suit every format but gguf.")
    ] = QuantizeConfig.format,
    device: OneDevice = QuantizeConfig.device,
    compute_dtype: ComputeDtype = QuantizeConfig.compute_dtype,
    strict: Strict = QuantizeConfig.strict,
    follow_links: FollowLinks = False,
    json: JsonFlag = False,
) -> None:
    """Measure the KL each fused group of MODEL costs at each scheme, for `qwenq quantize --sensitivity FILE`.

    Two streamed passes over the layers, forward and backward, with one layer in memory at a time. The effect is
    measured on calibration windows that were not used for solving.
    """
    from qwenq.pipeline.preflight import refuse_existing
    from qwenq.text.calibration import check_text

    config = options_of(context, QuantizeConfig, asymmetric=asymmetric or None)
    with over_ranks(config.device) as (ranks, own):
        if ranks.first:  # before any download
            refuse_existing(output)
        check_text(config.calibration)
        directory = fetched_once(model, ranks)
        with LayerProgress(quiet=json or not ranks.first) as progress:
            found = api.sensitivity(
                directory, output, replace(config, device=own), progress=progress.say, warn=warn, ranks=ranks
            )
    if not ranks.first:
        return
    if json:
        print_json(found.to_json())
        return
    out.print(sensitivity_table(found))
    text = found.provenance["calibration"]
    replaced = of_builtin(text.get("builtin", {}).get("windows", 0))
    size = f"{counted(text['windows'], 'window')} of {text['window_tokens']} tokens"
    out.print(f"measured on {size} of {text['text']}{replaced}", soft_wrap=True)
    given = " --format gguf" * (format == "gguf") + " --rotate" * rotate
    out.print(f"{output}: valid for any budget of this model{given and ' with' + given}", soft_wrap=True)


def sensitivity_table(found: Sensitivity) -> Table:
    """KL of each fused group at its coarsest 4-bit scheme, or its first where it has none, layer by layer."""
    table = Table(title=f"KL (millinats per token) of each fused group alone at its first scheme, {found.model}")
    table.add_column("layer", justify="right")
    stages = [stage for layer, stage in found.kl if layer == 0]
    for stage in stages:
        first = next(iter(found.kl[0, stage]))
        table.add_column(f"{stage} {label_of(first).removeprefix('4-bit ')}", justify="right")
    layers = sorted({layer for layer, _ in found.kl if layer != OUTER})
    for layer in layers:
        cells = (next(iter(found.kl[layer, stage].values())) for stage in stages)
        table.add_row(str(layer), *(f"{1000 * value:.4f}" for value in cells))
    return table
