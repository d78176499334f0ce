"""`qwenq plan`: does a model fit a rig, how is it split, how fast is it, and what to paste."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qwenq.cli.vram import (
    BatchSize,
    Bits,
    Checkpoint,
    EngineName,
    EngineVersion,
    ExpectParams,
    GpuRig,
    GroupSize,
    Json,
    KvDtype,
    MaxNumSeqs,
    PadForTp,
    PrefillChunk,
    RecipeFile,
    Reserve,
    TargetSize,
    Utilization,
)
from qwenq.errors import UsageError
from qwenq.planning.asking import Question, Resolved, contexts_of
from qwenq.planning.plan import Plan, Recommendation, describe_gpu, make_plan, recommend
from qwenq.planning.speed import Speed
from qwenq.units import GIB, format_gb, format_gib, format_tokens

NOT_FITTING = 3  # exit code of an honest no


def plan(
    model: Annotated[str, typer.Argument(help="Family name (Qwen2.5-72B), directory or hub name.")],
    context: Annotated[str, typer.Option("--context", "--max-model-len", "-c", help="Tokens, e.g. 16k.")] = "8k",
    gpu: GpuRig = None,
    detect: Annotated[bool, typer.Option("--detect", help="This machine's GPUs and their free memory.")] = False,
    recommend_rigs: Annotated[
        bool, typer.Option("--recommend", help="List rigs that hold the model at this context.")
    ] = False,
    bits: Bits = None,
    group_size: GroupSize = None,
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
    max_num_seqs: MaxNumSeqs = 0,
    gpu_memory_utilization: Utilization = 0.9,
    expect_params: ExpectParams = None,
    as_json: Json = False,
) -> None:
    """Plan MODEL on a rig. Exit code 3 when it does not fit; the plan is printed all the same."""
    if sum((gpu is not None, detect, recommend_rigs)) != 1:
        raise UsageError("give one of --gpu, --detect and --recommend", hint='for instance --gpu "2x RTX 3090"')
    rig = None
    if detect:
        from qwenq.planning.rig import detect_rig

        rig = detect_rig()
    asked = Question(
        model=model,
        bits=bits,
        group_size=group_size,
        target_size=target_size,
        recipe=recipe,
        checkpoint=checkpoint,
        pad_for_tp=pad_for_tp,
        kv_cache_dtype=kv_cache_dtype,
        batch_size=batch_size,
        engine=engine,
        engine_version=engine_version,
        prefill_chunk=prefill_chunk,
        gpu=gpu,
        reserve=reserve,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        expect_params=expect_params,
        rig=rig,
    ).resolve()
    contexts = contexts_of(asked, context)
    if len(contexts) != 1:
        raise UsageError("one context, please", hint="`qwenq vram` takes several")
    work = asked.at(contexts[0])
    if recommend_rigs:
        rigs = recommend(asked.spec, asked.weights, asked.engine, work)
        if as_json:
            print(json.dumps({"model": asked.spec.name, "rigs": [found.to_json() for found in rigs]}, indent=2))
        else:
            print("\n".join(_recommended(asked, rigs, contexts[0])))
        if not rigs:
            raise typer.Exit(NOT_FITTING)
        return
    assert asked.rig is not None
    found = make_plan(asked.spec, asked.weights, asked.rig, asked.engine, work)
    if as_json:
        print(json.dumps(found.to_json() | {"flags": _flags(found)}, indent=2))
    else:
        print("\n".join(_text(found)))
    if not found.fits:
        raise typer.Exit(NOT_FITTING)


def _flags(found: Plan) -> dict[str, str]:
    from qwenq.planning.flags import llamacpp_flags, transformers_code, vllm_flags

    return {
        "vllm": vllm_flags(found),
        "transformers": transformers_code(found),
        "llama.cpp": llamacpp_flags(found),
    }


def _text(found: Plan) -> list[str]:
    work, memory = found.work, found.memory
    answer = {"fits": "fits", "tight": "fits, tightly" if found.fits else "does not fit, narrowly"}.get(
        found.certainty, "does not fit"
    )
    lines = [
        f"{found.spec.name}, {found.weights.label} ({format_gb(found.weights.total_bytes)}), "
        f"{format_tokens(work.context)} context, batch {work.batch}, {found.engine.label}, on {found.rig.label}: "
        + answer
    ]
    lines += ["  " + describe_gpu(found, index) for index in range(len(found.rig.gpus))]
    if found.placement is not None:
        lines.append(f"  split: {found.placement.reason}")
    if memory.kv_capacity_tokens is not None:
        lines += _vllm_cache(found)
    lines += [f"  note: {note}" for note in found.notes]
    longest = format_tokens(found.largest_context) if found.largest_context else "none"
    lines.append(f"largest context that fits: {longest}")
    if found.fits:
        lines.append(_speed_line("speed", found.speed))
    if found.instead:
        lines += ["would fit here:", *(f"  - {text}" for text in found.instead)]
    if not found.fits and found.offload is not None and found.offload_speed is not None:
        lines.append(
            f"with {found.offload.offloaded_bytes / GIB:.2f} GiB of weights in host memory: {found.offload.reason}"
        )
        lines.append(_speed_line("  speed then", found.offload_speed))
    if not found.fits:
        lines.append("rigs that hold it: qwenq plan MODEL --recommend")
    lines.append("vLLM, tensor x pipeline parallel:")
    sizes = found.tensor_parallel
    for option in found.options:
        cut = sizes.get(str(option.tensor))  # said below, once
        verdict = f"no: tensor parallel size {option.tensor}, see below" if cut else option.verdict
        lines.append(f"  {option.tensor} x {option.pipeline}: {verdict}")
    lines.append("tensor parallel sizes of these weights:")
    lines += [f"  {line}" for line in found.tensor_parallel_lines]
    for name, text in _flags(found).items():
        lines += ["", f"# {name}", text]
    return lines


def _vllm_cache(found: Plan) -> list[str]:
    """How many tokens vLLM's cache holds, and what comes on top of its part where that is less than asked."""
    memory, asked = found.memory, found.work.gpu_memory_utilization
    lines = [f"  vLLM's KV cache would hold {memory.kv_capacity_tokens} tokens"]
    if memory.gpu_memory_utilization != asked:
        outside = max(gpu.term("graphs") + gpu.term("context") for gpu in memory.gpus)
        lines.append(
            f"  vLLM can have {memory.gpu_memory_utilization:g} of each GPU, not {asked:g}: CUDA graphs and context "
            f"come on top, {format_gib(outside)}"
        )
    return lines


def _speed_line(name: str, speed: Speed) -> str:
    def shown(pair: tuple[float, float] | None) -> str:
        return "unknown" if pair is None else f"{pair[0]:.3g} to {pair[1]:.3g} tokens/s"

    return f"{name}: decode {shown(speed.decode)}, prefill {shown(speed.prefill)} ({speed.basis})"


def _recommended(asked: Resolved, rigs: tuple[Recommendation, ...], context: int) -> list[str]:
    lines = [
        f"rigs that hold {asked.spec.name}, {asked.weights.label} ({format_gb(asked.weights.total_bytes)}), at "
        f"{format_tokens(context)} with {asked.engine.label}:"
    ]
    for found in rigs:
        price = "price unknown" if found.price_usd is None else f"${found.price_usd:,.0f} ({found.gpu.price_basis})"
        lines.append(
            f"  {found.count}x {found.gpu.name:<28} {price:<28} up to {found.largest_context // 1024}k; " + found.how
        )
    if not rigs:
        lines.append("  none of up to 8 equal GPUs")
    return lines
