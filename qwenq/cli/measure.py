"""`qwenq vram measure`: real peak memory against context on this machine, beside the estimate."""

from __future__ import annotations

import json as encoding
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenq import __version__
from qwenq.api import load_options
from qwenq.cli.options import (
    ENGINE,
    JOB,
    WEIGHTS,
    CpuMemory,
    FollowLinks,
    GpuMemory,
    JsonFlag,
    KvDtype,
    OffloadDir,
    PrefillChunk,
    RunDtype,
    fetched,
    load_words,
    option,
)
from qwenq.cli.plain import print_json, print_line, print_step, typed
from qwenq.errors import HonestNo, PlanError, UsageError
from qwenq.pipeline.config import flag
from qwenq.units import GIB, format_tokens, parse_tokens


def measure(
    context: typer.Context,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="A checkpoint directory, a GGUF file, or a hub name.")
    ] = None,
    synthetic: Annotated[
        str, option(WEIGHTS, "--synthetic", help="Use random weights with this model's shapes, e.g. Qwen2.5-72B.")
    ] = "",
    bits: Annotated[int, option(WEIGHTS, "--bits", help="Bits of the random weights: 4, 8, or 16.")] = 4,
    group_size: Annotated[int, option(WEIGHTS, "--group-size", help="Group size of the random weights.")] = 128,
    max_model_len: Annotated[str, option(ENGINE, "--context", "--max-model-len", "-c", help="1k,8k,32k.")] = "1k,4k",
    prefill_chunk: PrefillChunk = 2048,
    kv_cache_dtype: KvDtype = "auto",
    compute_dtype: RunDtype = "auto",
    gpu_memory: GpuMemory = "",
    cpu_memory: CpuMemory = "",
    offload_dir: OffloadDir = None,
    output: Annotated[
        Path | None, option(JOB, "--output", "-o", help="Save the results for `qwenq vram --profile FILE`.")
    ] = None,
    follow_links: FollowLinks = False,
    json: JsonFlag = False,
) -> None:
    """Run a model at each context and compare its real memory peaks with the estimate.

    On GPUs it prints torch's allocated and reserved peaks and the driver's figure, on a CPU resident memory.
    --synthetic downloads nothing: random packed weights with the exact shapes are created on the devices. Exits with 3
    if memory runs out at some context.
    """
    from qwenq.runtime.load import describe
    from qwenq.runtime.measure import DECODE_TOKENS
    from qwenq.runtime.measure import measure as run

    if (checkpoint is None) == (not synthetic):
        raise UsageError("give either a checkpoint or --synthetic MODEL")
    for name in ("bits", "group_size"):
        if checkpoint and typed(context, name):
            raise UsageError(f"{flag(name)} is for random weights, with --synthetic", hint="leave it out")
    if output is not None and output.exists():
        raise PlanError(f"{output}: exists", hint="choose another name with -o")
    if output is not None and not output.absolute().parent.is_dir():
        raise PlanError(f"{output.parent}: no such directory", hint="make it, or choose another name with -o")
    contexts = sorted({parse_tokens(part) for part in max_model_len.split(",")})
    if contexts[0] <= DECODE_TOKENS:
        raise UsageError(f"context is {contexts[0]} tokens, wanted more than {DECODE_TOKENS}")
    words = load_words(context)
    words["max_model_len"] = contexts[-1]
    options = load_options(**words)
    weights, held = _synthetic(synthetic, bits, group_size, options) if synthetic else _stored(str(checkpoint), options)
    with held as found:
        for line in describe(found):
            print_step(line)
        rows, ended = run(found, weights, contexts, print_step)
        facts = _facts(found, weights, synthetic or str(checkpoint))
    from qwenq.planning.profile import profile_json

    result = profile_json(rows, facts | {"ended": ended})
    if output is not None and rows:
        output.write_text(encoding.dumps(result, indent=2) + "\n", encoding="utf-8")
    if json:
        print_json(result)
    else:
        print_line("\n".join(_table(result)))
    if ended:
        raise HonestNo(f"memory ran out, {ended}", hint="the contexts before it are listed above")


def _stored(checkpoint: str, options: Any) -> tuple[Any, Any]:
    from qwenq.checkpoint.reader import open_checkpoint
    from qwenq.runtime.load import loaded, stored_sizes

    opened = open_checkpoint(fetched(checkpoint))
    for line in opened.notes:
        print_step(f"warning: {line}")
    return stored_sizes(opened), loaded(opened, options)


def _synthetic(model: str, bits: int, group_size: int, options: Any) -> tuple[Any, Any]:
    from qwenq.formats.base import Recipe, Scheme
    from qwenq.planning.models import load_spec
    from qwenq.planning.weights import recipe_weights
    from qwenq.runtime.load import load_from
    from qwenq.runtime.synthetic import SyntheticWeights, synthetic_config

    spec = load_spec(model)
    recipe = Recipe(None if bits == 16 else Scheme(bits, group_size))
    recipe.check(spec)
    weights = recipe_weights(spec, recipe)
    source = SyntheticWeights(spec, recipe)
    return weights, load_from(source, weights, synthetic_config(spec), spec, options)


def _facts(found: Any, weights: Any, model: str) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "model": model,
        "weights": weights.label,
        "weight_bytes": weights.total_bytes,
        "compute_dtype": str(found.model.dtype).removeprefix("torch."),
        "kernels": found.model.kernels(),
        "kv_cache_dtype": found.work.kv_dtype,
        "prefill_chunk": found.work.prefill_chunk,
        "device_map": dict(found.model.device_map),
        "versions": {
            "qwenq": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _table(result: dict[str, Any]) -> list[str]:
    def gib(n_bytes: int) -> str:
        return f"{n_bytes / GIB:>10.3f}" if n_bytes else f"{'-':>10}"

    lines = [
        f"{'GiB':<24}{'context':>8}  {'phase':<8}{'peak':>10}{'predicted':>10}{'error':>9}"
        f"{'reserved':>10}{'driver':>10}"
    ]
    for row in result["rows"]:
        error = f"{row['error_percent']:>+8.1f}%" if row["error_percent"] is not None else f"{'-':>9}"
        lines.append(
            f"{row['device'][:23]:<24}{format_tokens(row['context']):>8}  {row['phase']:<8}"
            f"{gib(row['allocated_bytes'])}{gib(row['predicted_bytes'])}{error}"
            f"{gib(row['reserved_bytes'])}{gib(row['driver_bytes'])}"
        )
    for fit in result["fits"]:
        lines.append(
            f"{fit['kind']}: working memory x {fit['scale']:.3f} + {fit['constant_bytes'] / 1e6:.1f} MB fits these "
            f"rows within {fit['worst_error_percent']:.2f} %"
        )
    return lines
