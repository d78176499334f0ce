"""`qwenq sensitivity`: what each unit would lose by each scheme, measured once for any later budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from qwenq.cli.console import LayerProgress, out, print_json
from qwenq.cli.format import CARRY_ZERO_POINTS
from qwenq.cli.models import ComputeDtype, JsonFlag, Model, OneDevice, pick_compute_dtype
from qwenq.errors import JobError
from qwenq.formats.base import label_of
from qwenq.pipeline.preflight import DEFAULT_WINDOWS
from qwenq.planning.sensitivity import Sensitivity, encode_sensitivity

if TYPE_CHECKING:
    from qwenq.checkpoint.reader import Checkpoint
    from qwenq.text.tokens import TokenWindows


def sensitivity(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("sensitivity.json"),
    calibration: Annotated[
        str, typer.Option(help="A set's name, or a .txt, .jsonl, .parquet or .npy file.")
    ] = "builtin",
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "-n", min=2, help="Calibration windows. Default: all, at most 128.")
    ] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens a window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Decides windows and sampled labels.")] = 0,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help=f"4 bits with zero points too, which {CARRY_ZERO_POINTS} carries.")
    ] = False,
    device: OneDevice = "auto",
    compute_dtype: ComputeDtype = "auto",
    json: JsonFlag = False,
) -> None:
    """Measure how much KL each unit of MODEL costs at each scheme; `qwenq quantize --sensitivity FILE` reads it.

    Two streamed passes over the layers, forward and backward, one layer in memory at a time. The effect is read on
    calibration windows that the errors were not solved on.
    """
    pick_compute_dtype(compute_dtype, device)
    check_output(output)

    from qwenq.checkpoint.reader import open_source
    from qwenq.cli.models import pick_device, resolve_model
    from qwenq.io.durable import write_bytes
    from qwenq.text.calibration import load_windows
    from qwenq.text.tokens import ModelTokenizer

    source = open_source(resolve_model(model))
    windows = load_windows(
        calibration, ModelTokenizer(source.directory), source.spec, length=sequence_length, count=num_samples,
        seed=seed, up_to=DEFAULT_WINDOWS,
    )  # fmt: skip
    picked = pick_device(device, several=False)
    with LayerProgress(source.spec.num_hidden_layers, quiet=json) as progress:
        kind = pick_compute_dtype(compute_dtype, picked)
        found = measure(source, windows, seed, picked, kind, output.absolute().parent, progress, asymmetric)
    write_bytes(output, encode_sensitivity(found))
    if json:
        print_json(found.to_json())
        return
    out.print(sensitivity_table(found))
    out.print(f"{output}: serves any budget of this model", soft_wrap=True, markup=False)


def measure(
    source: Checkpoint,
    windows: TokenWindows,
    seed: int,
    device: str,
    compute_dtype: str,
    scratch: Path,
    progress: LayerProgress,
    asymmetric: bool = False,
) -> Sensitivity:
    """Measure with progress shown; hidden states lie under `scratch` meanwhile."""
    from qwenq.pipeline.fisher import measure_sensitivity, split_windows
    from qwenq.pipeline.job import DTYPES

    return measure_sensitivity(
        source,
        split_windows(windows, seed=seed, asymmetric=asymmetric),
        compute_dtype=DTYPES[compute_dtype],
        device=device,
        scratch=scratch,
        listen=progress.say,
    )


def check_output(path: Path) -> None:
    """Raise JobError before the work when the file cannot be made."""
    if path.exists():
        raise JobError(f"{path}: exists already", hint="choose another --output, or delete it")
    if not path.absolute().parent.is_dir():
        raise JobError(f"{path.absolute().parent}: no such directory", hint="make it, or choose another --output")


def sensitivity_table(found: Sensitivity) -> Table:
    """KL of each unit at its coarsest 4-bit scheme, or its first where it has none, layer by layer."""
    table = Table(title=f"KL (millinats a token) of one unit alone at 4 bits, {found.model}")
    table.add_column("layer", justify="right")
    stages = [stage for layer, stage in found.kl if layer == 0]
    for stage in stages:
        first = next(iter(found.kl[0, stage]))
        table.add_column(f"{stage} {label_of(first).removeprefix('4-bit ')}", justify="right")
    layers = sorted({layer for layer, _ in found.kl})
    for layer in layers:
        cells = (next(iter(found.kl[layer, stage].values())) for stage in stages)
        table.add_row(str(layer), *(f"{1000 * value:.4f}" for value in cells))
    return table
