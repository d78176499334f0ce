"""`qwenq eval`: drift of a checkpoint against a reference."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from qwenq.cli.console import LayerProgress, drift_table, out, print_json
from qwenq.cli.models import ComputeDtype, Device, JsonFlag, Model
from qwenq.errors import PlanError


def evaluate(
    model: Model,
    reference: Annotated[str, typer.Option(help="The 16-bit checkpoint, or another one: a directory or a hub name.")],
    text: Annotated[
        str, typer.Option(help="Held-out text: a set's name, or a .txt, .jsonl, .parquet or .npy file.")
    ] = "heldout",
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "-n", min=1, help="Windows. Default: all, at most 20.")
    ] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens a window.")] = 512,
    max_kl: Annotated[float | None, typer.Option(min=0.0, help="Exit with 3 when the mean KL is above this.")] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="Exit with 3 when perplexity rises by more, for instance 2%.")
    ] = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    json: JsonFlag = False,
) -> None:
    """Measure what a checkpoint lost against its 16-bit reference: perplexity, KL divergence, top-1 agreement.

    Both are streamed layer by layer, so neither has to fit into memory.
    """
    increase = _percent(max_ppl_increase)

    from qwenq.checkpoint.reader import open_checkpoint
    from qwenq.cli.models import pick_compute_dtype, pick_device, resolve_model
    from qwenq.pipeline.evaluate import check_comparable, check_limits
    from qwenq.pipeline.evaluate import evaluate as run
    from qwenq.pipeline.job import DTYPES
    from qwenq.text.calibration import load_windows
    from qwenq.text.tokens import ModelTokenizer

    checkpoint, base = open_checkpoint(resolve_model(model)), open_checkpoint(resolve_model(reference))
    check_comparable(checkpoint, base)
    windows = load_windows(
        text, ModelTokenizer(base.directory), base.spec, length=sequence_length, count=num_samples, seed=None, up_to=20
    )
    picked = pick_device(device)
    kind = DTYPES[pick_compute_dtype(compute_dtype, picked)]
    with LayerProgress(base.spec.num_hidden_layers, quiet=json) as progress:
        drift = run(checkpoint, base, windows, compute_dtype=kind, devices=picked.split(","), listen=progress.step)
    if json:
        print_json(drift.to_json())
    else:
        out.print(drift_table(drift, f"reference in {base.recipe.label}" if base.quantized else "16-bit"))
    check_limits(drift, max_kl, increase)


def _percent(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = math.nan
    if math.isnan(percent):
        raise PlanError(f"--max-ppl-increase {text}: not a percentage", hint="for instance 2%")
    return percent
