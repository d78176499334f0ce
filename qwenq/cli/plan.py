"""`qwenq plan`: does a model fit a rig, how is it split, how fast is it, and what to paste."""

from __future__ import annotations

from typing import Annotated

import typer

from qwenq.cli.plain import options_of, print_json, print_line, print_step
from qwenq.cli.vram import (
    RIG,
    WORKLOAD,
    BatchSize,
    Bits,
    Checkpoint,
    EnforceEager,
    EngineName,
    EngineVersion,
    ExpectParams,
    FollowLinks,
    FormatName,
    GpuRig,
    GroupSize,
    HostRam,
    Json,
    KvDtype,
    MaxNumSeqs,
    Model,
    PadForTp,
    PrefillChunk,
    RecipeFile,
    Reserve,
    TargetSize,
    Utilization,
)
from qwenq.errors import HonestNo, UsageError
from qwenq.planning.case import Case
from qwenq.planning.engines.base import plan_commands
from qwenq.planning.plan import Plan, Recommendation, describe_gpu, make_plan, recommend
from qwenq.planning.questions import Question, context_of
from qwenq.units import GIB, format_gb, format_tokens


def plan(
    context_: typer.Context,
    model: Model,
    context: Annotated[
        str,
        typer.Option(
            "--context", "--max-model-len", "-c", metavar="N", help="Such as 16k. Default: 8k.",
            rich_help_panel=WORKLOAD, show_default=False,
        ),
    ] = "",
    gpu: GpuRig = None,
    detect: Annotated[
        bool, typer.Option("--detect", help="Use this machine's GPUs and their free memory.", rich_help_panel=RIG)
    ] = False,
    recommend_rigs: Annotated[
        bool, typer.Option("--recommend", help="List rigs that hold the model at this context.", rich_help_panel=RIG)
    ] = False,
    bits: Bits = None,
    group_size: GroupSize = None,
    format: FormatName = "",
    target_size: TargetSize = None,
    recipe: RecipeFile = None,
    checkpoint: Checkpoint = None,
    pad_for_tp: PadForTp = None,
    kv_cache_dtype: KvDtype = "auto",
    batch_size: BatchSize = 1,
    engine: EngineName = "qwenq",
    engine_version: EngineVersion = "",
    prefill_chunk: PrefillChunk = 0,
    reserve: Reserve = "",
    ram: HostRam = "",
    max_num_seqs: MaxNumSeqs = 0,
    gpu_memory_utilization: Utilization = None,
    enforce_eager: EnforceEager = False,
    expect_params: ExpectParams = None,
    follow_links: FollowLinks = False,
    as_json: Json = False,
) -> None:
    """Plan MODEL on a rig. Prints the plan either way, and exits with 3 if the model does not fit."""
    if sum((gpu is not None, detect, recommend_rigs)) != 1:
        raise UsageError("give one of --gpu, --detect and --recommend", hint='for instance --gpu "2x RTX 3090"')
    rig = None
    if detect:
        from qwenq.planning.rig import detect_rig

        rig = detect_rig()
        for line in rig.notes:
            print_step(f"warning: {line}")
    asked = options_of(context_, Question, rig=rig).resolve()
    for line in asked.notes:
        print_step(f"warning: {line}")
    case = asked.at(context_of(asked, context))
    if recommend_rigs:
        rigs = recommend(case)
        if as_json:
            print_json({"model": asked.spec.name, "rigs": [found.to_json() for found in rigs]})
        else:
            print_line("\n".join(_recommended(case, rigs)))
        if not rigs:
            raise typer.Exit(HonestNo.exit_code)
        return
    found = make_plan(case)
    if as_json:
        print_json(found.to_json() | {"flags": plan_commands(found)})
    else:
        print_line("\n".join(_text(found)))
    if not found.fits:
        raise typer.Exit(HonestNo.exit_code)


def _text(found: Plan) -> list[str]:
    case, memory = found.case, found.memory
    answer = {"fits": "fits", "tight": "fits, tightly" if found.fits else "does not fit, narrowly"}.get(
        found.certainty, "does not fit"
    )
    if not found.fits and found.offload is not None and found.host is not None and found.host.fits:
        out, layers = len(found.offload.host_layers), case.spec.num_hidden_layers
        gpus = "the GPUs" if len(case.hardware.gpus) > 1 else "the GPU"
        answer = answer.replace("does not fit", f"does not fit on {gpus}")
        answer += f"; fits with {out} of {layers} layers in host memory"
    lines = [
        f"{case.spec.name}, {case.weights.label} ({format_gb(case.weights.total_bytes)}), "
        f"{format_tokens(case.work.context)} context, batch {case.work.batch}, {case.engine.label}, "
        f"on {case.hardware.label}: "
        + answer
    ]
    lines += ["  " + describe_gpu(found, index) for index in range(len(case.hardware.gpus))]
    if found.placement is not None and len(case.hardware.gpus) > 1:
        lines.append(f"  split: {found.placement.reason}")
    lines += [f"  {note}" for note in case.engine.cache_notes(memory)]
    lines += [f"  note: {note}" for note in found.notes]
    longest = format_tokens(found.largest_context) if found.largest_context else "none"
    lines.append(f"largest context that fits: {longest}")
    if found.fits:
        lines.append(f"speed: {found.speed.text()}")
    if found.instead:
        lines += ["would fit here:", *(f"  - {text}" for text in found.instead)]
    if not found.fits and found.offload is not None and found.offload_speed is not None:
        lines.append(
            f"with {found.offload.offloaded_bytes / GIB:.2f} GiB of weights in host memory: {found.offload.reason}"
        )
        lines += [f"  {line}" for line in _host_lines(found)]
        if found.host is None or found.host.fits is not False:
            lines.append(f"  speed then: {found.offload_speed.text()}")
    if not found.fits:
        lines.append("to list rigs that hold it, run the same command with --recommend instead of the rig")
    if not found.serving.case.engine.refusal(case.weights):  # of weights that no server loads it would say nothing
        lines += _parallel_lines(found)
    for name, text in plan_commands(found).items():
        lines += ["", f"# {name}", text]
    return lines


def _parallel_lines(found: Plan) -> list[str]:
    """Ways to share the work out over a server's ranks, and sizes that cut these weights."""
    lines, sizes = [f"{found.serving.case.engine.title}, tensor x pipeline parallel:"], found.tensor_parallel
    for option in found.serving.options:
        cut = sizes.get(str(option.tensor))  # said below, once
        verdict = f"no: see tensor-parallel size {option.tensor} below" if cut else option.verdict
        lines.append(f"  {option.tensor} x {option.pipeline}: {verdict}")
    lines.append("tensor-parallel sizes of these weights:")
    return lines + [f"  {line}" for line in found.tensor_parallel_lines]


def _host_lines(found: Plan) -> list[str]:
    """Whether the machine's own memory holds what is put there."""
    host = found.host
    if host is None:
        return []
    return [f"host memory: {host.said}" + ("; check with --ram 64GB" if host.limit_bytes is None else "")]


def _recommended(case: Case, rigs: tuple[Recommendation, ...]) -> list[str]:
    lines = [
        f"rigs that hold {case.spec.name}, {case.weights.label} ({format_gb(case.weights.total_bytes)}), at "
        f"{format_tokens(case.work.context)} with {case.engine.label}:"
    ]
    for found in rigs:
        most = format_tokens(found.largest_context // 1024 * 1024 or found.largest_context)
        power = "" if found.power_w is None else f"{found.power_w:,.0f} W"
        lines.append(
            f"  {found.count}x {found.gpu.name:<28} {_price(found):<28} {power:<8} up to "
            f"{most}; {found.how}"
        )
    if not rigs:
        lines.append("  none of up to 8 equal GPUs")
    return lines


def _price(found: Recommendation) -> str:
    if found.used_price_usd is not None:
        return f"${found.used_price_usd:,.0f} (used)"
    return "price unknown" if found.price_usd is None else f"${found.price_usd:,.0f} ({found.gpu.price_basis})"
