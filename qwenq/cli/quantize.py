"""`qwenq quantize`: the main job, and its dry run."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import typer
from rich.table import Table

from qwenq.cli import options as ask
from qwenq.cli.console import LayerProgress, drift_table, err, out, warn
from qwenq.cli.options import warn_of_shipped
from qwenq.cli.plain import options_of, print_json, print_step, typed
from qwenq.cli.ranks import fetched_once, over_ranks
from qwenq.errors import UsageError
from qwenq.formats.base import get_format, label_of
from qwenq.launch import refuse_ranks
from qwenq.model.spec import ModelSpec, family_spec
from qwenq.pipeline.config import QuantizeConfig
from qwenq.pipeline.dryrun import DryRun, dry_run
from qwenq.pipeline.preflight import check_output, partial_directory, refuse_place
from qwenq.planning.budget import Budgeted
from qwenq.planning.sensitivity import OUTER
from qwenq.units import format_gb, format_seconds


def quantize(
    context_: typer.Context,
    model: ask.Original,
    output: ask.Output = Path(),
    bits: ask.Bits = QuantizeConfig.bits,
    group_size: ask.GroupSize = QuantizeConfig.group_size,
    format: ask.Format = QuantizeConfig.format,
    gguf_type: ask.GgufType = QuantizeConfig.gguf_type,
    split_size: ask.SplitSize = QuantizeConfig.split_size,
    asymmetric: ask.Asymmetric = QuantizeConfig.asymmetric,
    fold: ask.Fold = QuantizeConfig.fold,
    rotate: ask.Rotate = QuantizeConfig.rotate,
    pad_for_tp: ask.PadForTp = QuantizeConfig.pad_for_tp,
    target_size: ask.TargetSize = QuantizeConfig.target_size,
    bpw: ask.BitsPerWeight = QuantizeConfig.bpw,
    fit: ask.Fit = QuantizeConfig.fit,
    context: ask.Context = QuantizeConfig.context,
    engine: ask.FitEngine = QuantizeConfig.engine,
    recipe: ask.RecipeFile = QuantizeConfig.recipe,
    sensitivity: ask.SensitivityFile = QuantizeConfig.sensitivity,
    save_recipe: ask.SaveRecipe = None,
    calibration: ask.Calibration = QuantizeConfig.calibration,
    num_samples: ask.NumSamples = QuantizeConfig.num_samples,
    builtin_share: ask.BuiltinShare = QuantizeConfig.builtin_share,
    sequence_length: ask.SequenceLength = QuantizeConfig.sequence_length,
    seed: ask.Seed = QuantizeConfig.seed,
    eval_text: ask.EvalText = QuantizeConfig.eval_text,
    eval_samples: ask.EvalSamples = QuantizeConfig.eval_samples,
    method: ask.Method = QuantizeConfig.method,
    damp_percent: ask.DampPercent = QuantizeConfig.damp_percent,
    error_correction: ask.ErrorCorrection = QuantizeConfig.error_correction,
    error_correction_share: ask.ErrorCorrectionShare = QuantizeConfig.error_correction_share,
    sink_weight: ask.SinkWeight = QuantizeConfig.sink_weight,
    save_imatrix: ask.SaveImatrix = QuantizeConfig.save_imatrix,
    device: ask.Device = QuantizeConfig.device,
    dtype: ask.StoredDtype = QuantizeConfig.dtype,
    compute_dtype: ask.ComputeDtype = QuantizeConfig.compute_dtype,
    calibration_dtype: ask.CalibrationDtype = QuantizeConfig.calibration_dtype,
    strict: ask.Strict = QuantizeConfig.strict,
    dry_run: ask.DryRun = False,
    ranks: ask.RankCount = 1,
    network: ask.Network = "",
    follow_links: ask.FollowLinks = False,
    resume: ask.Resume = False,
    json: ask.JsonFlag = False,
) -> None:
    """Turn a 16-bit checkpoint into a 4-bit, 8-bit or mixed one, layer by layer, and measure what it lost.

    Layers are streamed, so peak memory is that of one layer, not of the model.
    """
    config = options_of(context_, QuantizeConfig)
    config.refuse_idle([name for name in context_.params if typed(context_, name)])  # before any download
    if save_recipe is not None and not (dry_run and config.mixed):
        raise UsageError("--save-recipe goes with --dry-run and --target-size, --bpw, --fit or --recipe")
    if (ranks > 1 or network) and not dry_run:
        raise UsageError("--ranks and --network go with --dry-run: torchrun starts the real job")
    if dry_run and resume:
        raise UsageError("--resume and --dry-run exclude each other")
    place = output if output != Path() else None
    if dry_run:
        refuse_ranks("quantize --dry-run", "start it once, with --ranks")
        _dry_run(model, config, place, save_recipe, json, ranks, network)
    elif place is None:
        raise UsageError("no output directory", hint="give one with -o DIR")
    else:
        _quantize(model, config, place, resume, json)


def _quantize(model: str, config: QuantizeConfig, output: Path, resume: bool, json: bool) -> None:
    from qwenq.pipeline.prepare import check_asked, prepare
    from qwenq.pipeline.quantize import check_places
    from qwenq.pipeline.quantize import quantize as run

    with over_ranks(config.device) as (ranks, device):
        check_asked(model, config, output, resume=resume, ranks=ranks)
        prepared = prepare(
            fetched_once(model, ranks), output, replace(config, device=device),
            resume=resume, listen=(lambda line: None) if json else print_step, ranks=ranks,
        )  # fmt: skip
        spec = prepared.source.spec
        for line in prepared.notes:
            warn(line)
        if prepared.calibrates and ranks.first and not json:
            check_places(prepared.job, resume)  # of a job that cannot begin nothing is told
            print_step(prepared.calibrates)
        with LayerProgress(spec.num_hidden_layers, quiet=json or not ranks.first) as progress:
            try:
                prepared = prepared.measured(resume=resume, listen=progress.say, ranks=ranks)
                if prepared.budgeted and not json:
                    err.print(recipe_table(spec, prepared.budgeted))
                    err.print(prediction_line(prepared.budgeted), soft_wrap=True)
                result = run(prepared.job, resume=resume, listen=progress, ranks=ranks)
            except KeyboardInterrupt:
                if ranks.first:
                    _say_how_to_go_on(output)
                raise typer.Exit(130) from None
    if not ranks.first:
        return
    if json:
        print_json(result.to_json())
        return
    for line in result.warnings:
        if line not in prepared.job.notes:  # said at the start
            warn(line)
    out.print(drift_table(result.drift))
    out.print(
        f"{result.out}: {config.mixture or prepared.resolution.recipe.label}, {format_gb(result.file_bytes)} "
        f"({result.bits_per_linear_weight:.2f} bits per linear weight), {format_seconds(result.seconds)}, "
        f"peak {format_gb(result.peak_rss_bytes)} of memory",
        soft_wrap=True,
    )


def _say_how_to_go_on(output: Path) -> None:
    partial = partial_directory(output)
    if not partial.exists():
        print_step("\nstopped; nothing had been started")
        return
    again = [word for word in sys.argv[1:] if word != "--resume"]
    print_step(f"\nstopped; {partial} keeps what is done. Continue with:")
    print_step(f"  qwenq {shlex.join(again)} --resume")


# ---------------------------------------------------------------------- dry run


def _dry_run(
    model: str, config: QuantizeConfig, output: Path | None, save_to: Path | None, json: bool, ranks: int, network: str
) -> None:
    """Print sizes, peaks, disk and warnings; raises JobError where a given output would be refused."""
    if not Path(model).is_dir() and family_spec(model) is not None:
        warn_of_shipped(model)
    found = dry_run(model, config, output, ranks=ranks, network=network)
    if save_to is not None and found.budgeted is not None:
        from qwenq.planning.recipefile import save_recipe

        save_recipe(save_to, found.spec, found.budgeted)
    if json:
        print_json(found.to_json())
    else:
        out.print(_sizes_table(found, config.mixture))
        out.print(found.assumed.line(config.calibration), soft_wrap=True)
        if found.budgeted:
            out.print(recipe_table(found.spec, found.budgeted))
            out.print(prediction_line(found.budgeted), soft_wrap=True)
        for line in found.warnings:
            warn(line)
    if output is not None:  # without an output directory the disk it will be on is a guess
        if found.local:
            refuse_place(output, Path(model))
        check_output(output, resume=False)
        found.preflight.check_disk(output)


def _sizes_table(found: DryRun, mixture: str) -> Table:
    check = found.preflight
    table = Table(title=f"dry run: {check.model} to {mixture or check.scheme} ({check.format})")
    table.add_column("part")
    table.add_column("size", justify="right")
    for stage, label in check.schemes.items():
        table.add_row(f"{stage}: {label}", format_gb(check.stage_bytes[stage]))
    rest = check.tensor_bytes - sum(check.stage_bytes.values())
    table.add_row("embedding, head, norms and biases", format_gb(rest))
    table.add_row("all tensors", f"{format_gb(check.tensor_bytes)} ({check.tensor_bytes:,} bytes)")
    table.add_row("files", f"{format_gb(check.file_bytes)} ({check.file_bytes:,} bytes)")
    table.add_row("source tensors", format_gb(check.source_tensor_bytes))
    table.add_row("bits per linear weight", f"{check.bits_per_linear_weight:.3f}")
    peaks = [("", check.peak_ram_bytes, check.peak_vram_bytes)]
    if found.sensitivity_bytes:
        peaks.append((", measuring sensitivities", *found.sensitivity_bytes))
    of_rank = " of a rank" if check.ranks > 1 else ""
    for what, host, gpu in peaks:
        table.add_row(f"peak memory{of_rank}, predicted{what}", format_gb(host))
        if gpu:
            table.add_row(f"peak memory of a GPU, predicted{what}", format_gb(gpu))
            if check.state_vram_bytes and not what:
                states = format_gb(check.state_vram_bytes)
                table.add_row("additional, for hidden states, if a single GPU has room", states)
    if check.ranks > 1:
        for what, count in (("a layer", check.wire_layer_bytes), ("the head", check.wire_head_bytes)):
            if not count:  # of a head that is not solved
                continue
            table.add_row(f"received by a rank, {what}", format_gb(count))
            if found.network:
                table.add_row(f"the same at {found.network}", format_seconds(found.wire_s(count)))
        table.add_row("hidden states sent to the first rank when saved", format_gb(check.wire_state_bytes))
    table.add_row("disk needed (hidden states included)", format_gb(check.disk_needed_bytes))
    if not found.local:
        table.add_row("additional download of the source", format_gb(check.source_tensor_bytes))
    table.add_row("disk free", format_gb(check.disk_free_bytes or 0))
    for sizes, verdict in (line.split(": ", 1) for line in found.tensor_parallel):
        table.add_row(f"tensor parallel {sizes}", verdict)
    return table


def recipe_table(spec: ModelSpec, found: Budgeted) -> Table:
    """One line for each run of layers with equal schemes."""
    title = f"recipe: {format_gb(found.file_bytes)}, {found.bits_per_linear_weight:.3f} bits per linear weight"
    if get_format(found.recipe.format).outer:
        title += f", {found.recipe.bits_per_weight(spec):.3f} with embedding and head"
    table = Table(title=title)
    table.add_column("layers")
    stages = [name for layer, name in found.choice if layer == 0]
    for stage in stages:
        table.add_column(stage)
    rows = [tuple(label_of(found.choice[layer, stage]) for stage in stages) for layer in range(spec.num_hidden_layers)]
    start = 0
    for layer, row in enumerate(rows):
        if layer + 1 == len(rows) or rows[layer + 1] != row:
            table.add_row(str(start) if start == layer else f"{start}-{layer}", *row)
            start = layer + 1
    outer = [f"{name} {label_of(scheme)}" for (layer, name), scheme in found.choice.items() if layer == OUTER]
    table.caption = ", ".join(outer) or None
    return table


def prediction_line(found: Budgeted) -> str:
    """The loss predicted for a recipe, and what the prediction rests on."""
    proof = ""
    if found.bound_kl is not None:
        gap = found.predicted_kl - found.bound_kl
        proof = "; no recipe of this size is predicted to lose less"
        if gap > 1e-9 * found.predicted_kl:
            proof = f"; no recipe of this size is predicted to lose less than {found.bound_kl:.5f}"
    return f"predicted KL {found.predicted_kl:.5f} nats per token (sensitivities: {found.sensitivity}){proof}"
