"""`qwenq vram`: what a model needs on a rig, term by term, against context; and how right that is."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qwenq.cli.plain import FOLLOW_LINKS, follow_links, names_in, options_of, print_json, print_line, print_step
from qwenq.errors import PlanError, UsageError
from qwenq.planning.engines.base import engine_names
from qwenq.planning.models import format_names
from qwenq.planning.questions import Question, contexts_of, spread


class _ModelOrSubcommand(TyperGroup):
    """`qwenq vram MODEL ...` is `qwenq vram estimate MODEL ...`: what is no subcommand is a model or its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["estimate", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


vram_app = typer.Typer(
    cls=_ModelOrSubcommand,
    no_args_is_help=True,
    help="Show how much memory a model needs on a rig. `qwenq vram MODEL` is short for `qwenq vram estimate MODEL`.",
)
WEIGHTS, WORKLOAD, ENGINE, RIG, ANSWER = "Weights", "Workload", "Engine", "Rig", "Answer"


def _option(panel: str, *names: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    """An option in a panel of the help, which says defaults in words where they need saying."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False, **more)


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Family name (Qwen2.5-72B), directory, GGUF file or hub name.")
]
Bits = Annotated[int | None, _option(WEIGHTS, "--bits", metavar="N", help="4, 8, or 16 (not quantized). Default: 4.")]
GroupSize = Annotated[
    int | None, _option(WEIGHTS, "--group-size", metavar="N", help="128, 64, 32, or -1 (per row). Default: 128.")
]
FormatName = Annotated[
    str,
    _option(
        WEIGHTS,
        "--format",
        metavar="NAME",
        help=f"{', '.join(format_names())}, or a GGUF type.",
    ),
]
TargetSize = Annotated[
    str | None, _option(WEIGHTS, "--target-size", metavar="SIZE", help="Mixed bits as chosen by quantize, e.g. 47GB.")
]
RecipeFile = Annotated[
    Path | None, _option(WEIGHTS, "--recipe", metavar="FILE", help="A recipe from `quantize --save-recipe`.")
]
Checkpoint = Annotated[
    Path | None, _option(WEIGHTS, "--checkpoint", metavar="DIR", help="A real checkpoint, sized by its headers.")
]
PadForTp = Annotated[
    int | None, _option(WEIGHTS, "--pad-for-tp", metavar="N", min=1, help="Pad the FFN, as `quantize --pad-for-tp`.")
]
ExpectParams = Annotated[
    str | None, _option(WEIGHTS, "--expect-params", metavar="N", help="Fail unless shapes add up to this: 72.7B.")
]
BatchSize = Annotated[int, _option(WORKLOAD, "--batch-size", metavar="N", help="Concurrent sequences. Default: 1.")]
KvDtype = Annotated[
    str, _option(WORKLOAD, "--kv-cache-dtype", metavar="DTYPE", help="auto, fp16, bf16, fp8, or the engine's own.")
]
PrefillChunk = Annotated[
    int, _option(WORKLOAD, "--prefill-chunk", metavar="N", help="Prompt tokens per step. Default: the engine's.")
]
EngineName = Annotated[
    str, _option(ENGINE, "--engine", metavar="NAME", help=f"{engine_names()}. Default: {Question.engine}.")
]
EngineVersion = Annotated[str, _option(ENGINE, "--engine-version", metavar="VERSION", help="E.g. 4.46.0.")]
MaxNumSeqs = Annotated[
    int, _option(ENGINE, "--max-num-seqs", metavar="N", help="Servers: concurrent sequences. Default: the server's.")
]
Utilization = Annotated[
    float | None,
    _option(ENGINE, "--gpu-memory-utilization", metavar="PART", help="Servers: share of a GPU. vLLM's default: 0.92."),
]
EnforceEager = Annotated[bool, _option(ENGINE, "--enforce-eager", help="Servers: no CUDA graphs.")]
HostRam = Annotated[str, _option(RIG, "--ram", metavar="SIZE", help="Host memory for offloading, e.g. 64GB.")]
GpuRig = Annotated[
    str | None, _option(RIG, "--gpu", metavar="RIG", help='E.g. "2x RTX 3090" or "RTX 4090 + 2x RTX 3060 12GB".')
]
Reserve = Annotated[str, _option(RIG, "--reserve", metavar="SIZE", help="Memory kept free on every GPU, e.g. 1GiB.")]
ProfileFile = Annotated[
    Path | None, _option(RIG, "--profile", metavar="FILE", help="Measurements from `qwenq vram measure -o FILE`.")
]
FollowLinks = Annotated[bool, _option(WEIGHTS, "--follow-links", help=FOLLOW_LINKS, callback=follow_links)]
Json = Annotated[bool, _option(ANSWER, "--json", help="Print JSON.")]


@vram_app.command("estimate")
def estimate_command(
    context: typer.Context,
    model: Model,
    max_model_len: Annotated[
        str, _option(WORKLOAD, "--context", "--max-model-len", "-c", metavar="N,...", help="E.g. 1k,8k,32k,128k.")
    ] = "",
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
    gpu: GpuRig = None,
    reserve: Reserve = "",
    tensor_parallel_size: Annotated[
        int, _option(ENGINE, "--tensor-parallel-size", metavar="N", help="Servers: ranks. Default: by the rig.")
    ] = 0,
    max_num_seqs: MaxNumSeqs = 0,
    gpu_memory_utilization: Utilization = None,
    enforce_eager: EnforceEager = False,
    expect_params: ExpectParams = None,
    profile: ProfileFile = None,
    follow_links: FollowLinks = False,
    as_json: Json = False,
    as_csv: Annotated[bool, _option(ANSWER, "--csv", help="Print CSV, one line per GPU and term.")] = False,
) -> None:
    """Show the memory of MODEL against context, per GPU, with the provenance of each term."""
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other")
    question = options_of(context, Question).resolve()
    for name, value in (("--max-num-seqs", max_num_seqs), ("--gpu-memory-utilization", gpu_memory_utilization)):
        if value and not question.engine.eager_flag:
            raise UsageError(f"{name} is for servers, and {question.engine.name} is not one", hint="leave it out")
    answer = spread(question, contexts_of(question, max_model_len))
    for line in question.notes:
        print_step(f"warning: {line}")
    for misfit in question.misfits:
        print_step(f"warning: {misfit}")
    if as_json:
        print_json(answer.to_json())
    elif as_csv:
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["context", "gpu", "name", "term", "bytes", "low_bytes", "high_bytes", "provenance", "source"])
        writer.writerows(answer.csv_rows())
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        print_line("\n".join(answer.text(colour)))


@vram_app.command("validate")
def validate_command(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV: model, quant, input_len, gpu_num, mem_gib, env; generated_tokens, prefill_chunk, batch_size, "
            "attention. For vLLM: engine, version, gpu, gpu_memory_utilization, kv_tokens, or its log."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Compare predicted with published memory, row by row: transformers' peaks or the room for a server's KV cache."""
    from qwenq.planning.validate import errors, read_rows, summary

    rows, skipped = read_rows(file)
    for line in skipped:
        print_step(f"warning: {line}")
    if as_json:
        print_json(summary(rows))
        return
    for row in rows:
        pair = f"predicted {row.predicted_gib:7.2f} GiB  published {row.mem_gib:7.2f} GiB"
        if row.kv_tokens is not None:
            pair = f"predicted {row.predicted_tokens:>8} tokens  logged {row.kv_tokens:>8} tokens of KV cache"
        print_line(f"{row.model:<24} {row.quant:<10} {row.input_len:>7} tokens  {pair}  {row.error_percent:+6.2f} %")
    peaks = [row for row in rows if row.kv_tokens is None]
    parts = {
        "all rows": rows,
        "prompts of 6,144 tokens and more": [row for row in peaks if row.input_len >= 6144],
        "one-token prompts": [row for row in peaks if row.input_len == 1],
    }
    for name, part in parts.items():
        if part:
            mean, largest = errors(part)
            print_line(f"{name}: {len(part)}, mean error {mean:.2f} %, largest {largest:.2f} %")


@vram_app.command("gpus")
def gpus_command(as_json: Json = False) -> None:
    """List the GPU catalogue, with the source of each row; `?` is unknown."""
    from dataclasses import asdict

    from qwenq.planning.rig import catalogue

    if as_json:
        print_json([asdict(gpu) for gpu in catalogue()])
        return
    print_line(f"{'GPU':<24}{'GiB':>6}{'usable':>8}{'GB/s':>7}{'TFLOPS':>8}{'W':>5}{'USD':>7}  source")
    for gpu in catalogue():
        cells = [gpu.usable_gib, gpu.bandwidth_gb_s, gpu.tensor_tflops, gpu.power_w, gpu.price_usd]
        shown = [f"{cell:g}" if cell is not None else "?" for cell in cells]
        print_line(
            f"{gpu.name:<24}{gpu.memory_gib:>6g}{shown[0]:>8}{shown[1]:>7}{shown[2]:>8}{shown[3]:>5}{shown[4]:>7}  "
            f"{gpu.source}"
        )


@vram_app.command("serve")
def serve_command(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free port.")] = 8321,
    allowed_hosts: Annotated[
        str, typer.Option("--allowed-hosts", help="Host names to accept besides IP addresses and local names; *: any.")
    ] = "",
) -> None:
    """Serve the calculator page: sliders, charts and a rig builder with the same numbers."""
    try:
        from qwenq.io.http import address_of, is_loopback, listen
        from qwenq.page.app import run_page
    except ImportError as error:
        raise PlanError(f"the page needs {error.name}", hint="pip install 'qwenq[page]'") from None
    with listen(host, port) as bound:
        print_line(f"{address_of(bound, host)}/")
        print_step("Ctrl-C stops it")
        if not is_loopback(host):
            print_step(f"warning: {host} is reachable from other machines, and the page has no key")
        run_page(bound, names_in(allowed_hosts))


@vram_app.command("export")
def export_command(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Models to compare.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output HTML file.")],
    max_model_len: Annotated[str, typer.Option("--context", "--max-model-len", "-c", help="E.g. 1k,8k,32k.")] = "",
    bits: Annotated[str, typer.Option("--bits", help="Bits, e.g. 4,8,16. Default: 4 if no format is given.")] = "",
    kv_cache_dtype: Annotated[str, typer.Option("--kv-cache-dtype", help="KV cache dtypes, e.g. auto,fp8.")] = "auto",
    group_size: GroupSize = None,
    format: FormatName = "",
    batch_size: BatchSize = 1,
    engine: EngineName = "qwenq",
    prefill_chunk: PrefillChunk = 0,
    gpu: GpuRig = None,
) -> None:
    """Write a comparison as a self-contained HTML file: every model with all given bits and KV cache dtypes."""
    from qwenq.page.export import comparison_html

    if output.exists():
        raise PlanError(f"{output}: exists", hint="choose another name with -o")
    widths = _widths(bits) if bits else [None if format else 4]
    variants = []
    for model, width, kind in product(models, widths, kv_cache_dtype.split(",")):
        question = options_of(context, Question, model=model, bits=width, kv_cache_dtype=kind.strip()).resolve()
        variants.append(spread(question, contexts_of(question, max_model_len)))
    title = f"VRAM of {', '.join(models)}" + (
        f" on {variants[0].question.rig.label}" if variants[0].question.rig else ""
    )
    try:
        output.write_text(comparison_html(variants, title), encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{output}: {error.strerror}", hint="choose another name with -o") from None
    print_line(str(output))


def _widths(text: str) -> list[int]:
    for width in text.split(","):
        if not width.strip().isdecimal():
            raise UsageError(f"bits is {width!r}, wanted numbers such as 4,8,16")
    return [int(width) for width in text.split(",")]
