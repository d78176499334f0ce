"""`qwenq quantize`: the main job."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.console import LayerProgress, drift_table, err, out, print_json, warn
from qwenq.cli.dryrun import DEFAULT_EVALUATION_WINDOWS, Asked, dry_run_of
from qwenq.cli.format import Asymmetric, Format, pick_method
from qwenq.cli.models import (
    CalibrationDtype,
    ComputeDtype,
    Device,
    JsonFlag,
    Model,
    StoredDtype,
    check_stored_dtype,
    pick_calibration_dtype,
    pick_compute_dtype,
)
from qwenq.cli.recipe import (
    BitsPerWeight,
    Context,
    Fit,
    FitEngine,
    PadForTp,
    RecipeFile,
    SaveRecipe,
    SensitivityFile,
    TargetSize,
    Wanted,
    prediction_line,
    recipe_table,
)
from qwenq.cli.sensitivity import measure
from qwenq.errors import PlanError
from qwenq.formats.base import Recipe
from qwenq.io.safetensors import FLOATS
from qwenq.pipeline.preflight import DEFAULT_WINDOWS, PULL_SHARE, chosen_pull
from qwenq.planning.sensitivity import SENSITIVITY_NAME, encode_sensitivity
from qwenq.units import format_gb, format_seconds


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")] = Path(),
    bits: Annotated[int | None, typer.Option(help="4 or 8, for every linear. Default 4.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale: 128, 64, 32, or -1 for the row. Default 128.")
    ] = None,
    target_size: TargetSize = None,
    bpw: BitsPerWeight = None,
    fit: Fit = None,
    context: Context = None,
    engine: FitEngine = None,
    recipe_file: RecipeFile = None,
    sensitivity: SensitivityFile = None,
    save_recipe: SaveRecipe = None,
    pad_for_tp: PadForTp = None,
    format: Format = "gptq",
    asymmetric: Asymmetric = None,
    calibration: Annotated[
        str, typer.Option(help="A set's name, or a .txt, .jsonl, .parquet or .npy file.")
    ] = "builtin",
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "-n", min=1, help="Calibration windows. Default: all, at most 128.")
    ] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens a window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Decides which calibration windows are drawn.")] = 0,
    eval_text: Annotated[str, typer.Option(help="Held-out text for the drift: a set's name or a file.")] = "heldout",
    eval_samples: Annotated[int | None, typer.Option(min=1, help="Held-out windows. Default: all, at most 20.")] = None,
    method: Annotated[
        str | None, typer.Option(help="gptq (default), or rtn: round to nearest, the baseline, without calibration.")
    ] = None,
    damp_percent: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Damping, as a share of the mean Hessian diagonal. Default: 0.02 (2 %)."),
    ] = None,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold/--no-fold",
            help="Fold channel scales into norms and up_proj: less is lost. --no-fold keeps norms as they are, so that "
            "LoRA adapters of the original model fit.",
        ),
    ] = True,
    pull: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="How far o and down are moved, before rounding, to answer for what earlier layers lost, where both "
            "halves of the calibration windows agree on it. 0 saves a pass of them through the 16-bit layers. "
            "Default: 1, and 0 where all is in 8 bits or there are fewer than 2 calibration tokens a column of down.",
        ),
    ] = None,
    pull_share: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the calibration windows that --pull reads, but 8 tokens a column of down where there are so "
            "many. 1 loses less and takes longer, 0 is --pull 0.",
        ),
    ] = PULL_SHARE,
    device: Device = "auto",
    dtype: StoredDtype = "auto",
    compute_dtype: ComputeDtype = "auto",
    calibration_dtype: CalibrationDtype = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read headers only; print sizes, memory and disk.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped job: same command, plus this.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Turn a 16-bit checkpoint into a 4-bit, 8-bit or mixed one, layer by layer, and measure what was lost.

    MODEL is a directory or a hub name; peak memory is one layer, not the model. The result is in GPTQ format, or in
    another --format; the README has a table of loaders that were tried.
    """
    method = pick_method(format, method)
    check_stored_dtype(dtype)
    pick_compute_dtype(compute_dtype, device)
    pick_calibration_dtype(calibration_dtype, device)
    wanted = Wanted(
        bits, group_size, target_size, bpw, fit, context, engine, recipe_file, sensitivity, save_recipe,
        format, asymmetric, pad_for_tp,
    )  # fmt: skip
    wanted.check(dry_run)
    if dry_run:
        dry_run_of(
            Asked(
                model, output, calibration, num_samples, sequence_length, seed, eval_text, eval_samples, method, pull,
                pull_share, device, dtype, compute_dtype, calibration_dtype,
            ),
            wanted,
            json,
        )  # fmt: skip
        return
    if output == Path():
        raise PlanError("no output directory", hint="give one with -o DIR")

    from qwenq.checkpoint.reader import open_source
    from qwenq.cli.models import pick_device, resolve_model
    from qwenq.io.safetensors import fingerprint
    from qwenq.pipeline.block import SolverOptions
    from qwenq.pipeline.job import QuantizeJob, partial_directory
    from qwenq.pipeline.quantize import check_places
    from qwenq.pipeline.quantize import quantize as run
    from qwenq.planning.recipefile import RECIPE_NAME, encode_recipe
    from qwenq.solver.gptq import DAMP_PERCENT
    from qwenq.text.calibration import load_windows, overlap
    from qwenq.text.tokens import ModelTokenizer

    source = open_source(resolve_model(model))
    if pad_for_tp is not None:
        source = source.padded(wanted.widened(source.spec).intermediate_size)
    stored = source.dtype_of if dtype == "auto" else lambda name: FLOATS[dtype]
    table = wanted.table(source.spec, fingerprint(source.directory), partial_directory(output) if resume else None)
    wanted.check_method(method, table)
    chosen = wanted.choose(source.spec, table, stored) if wanted.mixed else None  # a prior's, until there is a table
    recipe = chosen.recipe if chosen else wanted.uniform()
    recipe.check(source.spec)
    tokenizer = ModelTokenizer(source.directory)
    picked = pick_device(device)

    def pulled(recipe: Recipe) -> float:
        count, length = windows.ids.shape if windows else (0, 0)
        return chosen_pull(pull, recipe, source.spec, windows=count, length=length, share=pull_share)

    windows = None
    if method == "gptq":  # rounding to nearest reads no calibration text
        windows = load_windows(
            calibration,
            tokenizer,
            source.spec,
            length=sequence_length,
            count=num_samples,
            seed=seed,
            up_to=DEFAULT_WINDOWS,
        )
    held_out = load_windows(
        eval_text,
        tokenizer,
        source.spec,
        length=windows.ids.shape[1] if windows else sequence_length,
        count=eval_samples,
        seed=None,
        up_to=DEFAULT_EVALUATION_WINDOWS,
    )
    compared = windows is not None and not calibration.endswith(".npy") and not eval_text.endswith(".npy")
    job = QuantizeJob(
        source=source,
        out=output,
        recipe=recipe,
        calibration=windows,
        evaluation=held_out,
        options=SolverOptions(
            method=method,
            damp_percent=DAMP_PERCENT if damp_percent is None else damp_percent,
            fold=fold and method == "gptq",
            error_correction=pulled(recipe),
            error_correction_share=pull_share,
        ),
        device=picked,
        compute_dtype=pick_compute_dtype(compute_dtype, picked),
        calibration_dtype=pick_calibration_dtype(calibration_dtype, picked),
        dtype=dtype,
        seed=seed,
        overlap=overlap(calibration, eval_text) if compared else None,
    )
    for name in source.ignored:
        warn(f"{name} is stored but not used by the model: left out")
    with LayerProgress(source.spec.num_hidden_layers, quiet=json) as progress:
        try:
            if table is None and wanted.budgeted and windows is not None:
                check_places(job, resume)
                scratch = output.absolute().parent
                scratch.mkdir(parents=True, exist_ok=True)
                table = measure(
                    source, windows, seed, job.devices[0], job.compute_dtype, scratch, progress, bool(asymmetric)
                )
                chosen = wanted.choose(source.spec, table, stored)
            if chosen:
                files = {RECIPE_NAME: encode_recipe(source.spec, chosen).encode()}
                files |= {SENSITIVITY_NAME: encode_sensitivity(table)} if table else {}
                options = replace(job.options, error_correction=pulled(chosen.recipe))
                job = replace(job, recipe=chosen.recipe, options=options, beside=tuple(files.items()))
                if not json:
                    err.print(recipe_table(source.spec, chosen))
                    err.print(prediction_line(chosen), soft_wrap=True)
            result = run(
                job, resume=resume, listen=lambda e: progress.say(e) if isinstance(e, str) else progress.layer(e)
            )
        except KeyboardInterrupt:
            again = [a for a in sys.argv[1:] if a != "--resume"]
            partial = partial_directory(output)
            if not partial.exists():
                print("\nstopped; nothing was begun", file=sys.stderr)
                raise typer.Exit(130) from None
            print(f"\nstopped; {partial} keeps what is done. Go on with:", file=sys.stderr)
            print(f"  qwenq {shlex.join(again)} --resume", file=sys.stderr)
            raise typer.Exit(130) from None
    if json:
        print_json(result.to_json())
        return
    for line in result.warnings:
        warn(line)
    out.print(drift_table(result.drift))
    out.print(
        f"{result.out}: {job.recipe.label}, {format_gb(result.file_bytes)} "
        f"({result.bits_per_linear_weight:.2f} bits per linear weight), {format_seconds(result.seconds)}, "
        f"peak {format_gb(result.peak_rss_bytes)} of memory",
        soft_wrap=True,
        markup=False,
    )
