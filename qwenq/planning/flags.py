"""Ready-to-paste flags for vLLM, transformers and llama.cpp that carry out a plan."""

from __future__ import annotations

import json
import shlex
from typing import TypedDict

from qwenq.errors import HonestNo
from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import get_engine
from qwenq.planning.ggufsize import gguf_weights
from qwenq.planning.parallel import ParallelOption
from qwenq.planning.placement import Placement, place
from qwenq.planning.plan import Plan, runs_on
from qwenq.planning.terms import Workload
from qwenq.units import GIB


def vllm_flags(plan: Plan) -> str:
    """A `vllm serve ...` that fits, after a comment on what had to be changed; only a comment where none does."""
    for gpu in plan.rig.gpus:
        if not runs_on(get_engine("vllm"), gpu):
            return f"# vLLM does not run on {gpu.name}"
    option = plan.chosen
    reason = (option or plan.options[0]).verdict
    if option is not None and option.works:
        lines = _share_note(plan, option)
        work, kept = plan.work, option
    elif plan.escapes:
        escape = plan.escapes[0]
        work, kept = escape.work, escape.option
        lines = [f"# as asked it does not fit ({reason}); it does with {escape.text}"]
    else:
        return f"# vLLM does not fit, whatever its flags: {reason}"
    return "\n".join([*lines, pci_order(plan) + shlex.join(_words(plan.spec, work, kept, "CHECKPOINT"))])


def _share_note(plan: Plan, option: ParallelOption) -> list[str]:
    """A comment where vLLM can have less of a GPU than asked."""
    part = option.memory.gpu_memory_utilization if option.memory else None
    if part is None or part == plan.work.gpu_memory_utilization:
        return []
    return [
        f"# --gpu-memory-utilization {part:g}, not {plan.work.gpu_memory_utilization:g}: CUDA graphs and context come "
        "on top of it"
    ]


def pci_order(plan: Plan) -> str:
    """What a shell line begins with where CUDA might number a rig's GPUs otherwise than the plan."""
    return "CUDA_DEVICE_ORDER=PCI_BUS_ID " if plan.rig.needs_pci_order else ""


def vllm_words(plan: Plan, checkpoint: str, hosts: int = 1) -> list[str]:
    """The words of `vllm serve CHECKPOINT ...` for a plan that works; HonestNo, with the reason, for one that does not.

    On several hosts tensor parallelism stays inside a host, whose GPUs are the rig's first 1/`hosts`.
    """
    inside = len(plan.rig.gpus) // hosts
    options = [option for option in plan.options if option.works and inside % option.tensor == 0]
    if not options:
        raise HonestNo(
            f"vLLM cannot serve {plan.weights.label} at a context of {plan.work.context} on {plan.rig.label}: "
            + (plan.chosen or plan.options[0]).verdict,
            hint="`qwenq plan --engine vllm` shows every layout; --engine qwenq places layers freely",
        )
    chosen = plan.chosen if plan.chosen in options else max(options, key=lambda option: option.tensor)
    assert chosen is not None
    return _words(plan.spec, plan.work, chosen, checkpoint)


def ray_commands(words: list[str], hosts: list[str]) -> list[str]:
    """vLLM over several hosts: Ray started on each, the first one leading, then the server on the first."""
    head, *others = hosts
    lines = [f"# on {head}", "ray start --head --port=6379"]
    for other in others:
        lines += [f"# on {other}", f"ray start --address={head}:6379"]
    return [*lines, f"# on {head}, when `ray status` shows every host", shlex.join([*words, *_RAY])]


_RAY = ("--distributed-executor-backend", "ray")


def _words(spec: ModelSpec, work: Workload, option: ParallelOption, checkpoint: str) -> list[str]:
    assert option.memory is not None  # else its shapes are not possible
    words = ["vllm", "serve", checkpoint]
    words += ["--tensor-parallel-size", str(option.tensor), "--pipeline-parallel-size", str(option.pipeline)]
    words += ["--max-model-len", str(work.context)]
    words += ["--gpu-memory-utilization", f"{option.memory.gpu_memory_utilization:g}"]
    if work.kv_dtype in ("fp8", "q8_0", "q4_0"):
        words += ["--kv-cache-dtype", "fp8"]
    if work.max_num_seqs:
        words += ["--max-num-seqs", str(work.max_num_seqs)]
    # The override replaces all rope parameters; the base vLLM then takes is Qwen's. For others it refuses the context.
    if yarn := _yarn(spec, work):
        words += ["--hf-overrides", json.dumps({"rope_scaling": yarn, "max_position_embeddings": _reach(yarn)})]
    return words


def transformers_code(plan: Plan) -> str:
    """`max_memory` and `device_map` as Python, for `AutoModelForCausalLM.from_pretrained`."""
    if plan.weights.method == "gguf":
        return "# transformers reads GPTQ and 16-bit checkpoints, not GGUF: plan with --engine transformers"
    placement = plan.offload or plan.placement
    if placement is None:
        placement = place(plan.spec, plan.weights, plan.rig, get_engine("transformers"), _layered(plan.work))
    memory: dict[int | str, str] = {
        index: f"{limit * 0.97 / GIB:.1f}GiB" for index, limit in enumerate(plan.rig.limits)
    }
    if placement.offloaded_bytes:
        memory["cpu"] = f"{placement.offloaded_bytes / GIB + 4:.0f}GiB"
    lines = [f"max_memory = {memory}", f"device_map = {_compact(placement)}"]
    if plan.rig.needs_pci_order:
        lines.insert(0, 'import os; os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # before torch asks for a GPU')
    if yarn := _yarn(plan.spec, plan.work):
        lines += [
            f"yarn = {yarn}",
            'config = AutoConfig.from_pretrained("CHECKPOINT")',
            "config.rope_parameters = config.rope_parameters | yarn  # transformers 4: config.rope_scaling = yarn",
            f"config.max_position_embeddings = {_reach(yarn)}  # then from_pretrained(..., config=config)",
        ]
    return "\n".join(lines)


def llamacpp_flags(plan: Plan) -> str:
    """`llama-server ...` for the nearest GGUF type: Q4_K_M, Q8_0 or F16."""
    file_type = "F16" if plan.weights.bits == 16 else "Q8_0" if plan.weights.bits == 8 else "Q4_K_M"
    weights = gguf_weights(plan.spec, file_type)
    work = plan.work
    kv = "q8_0" if work.kv_dtype in ("fp8", "q8_0") else "q4_0" if work.kv_dtype == "q4_0" else "auto"
    asked = Workload(work.context, work.batch, kv_dtype=kv)
    placement = place(plan.spec, weights, plan.rig, get_engine("llama.cpp"), asked)
    note = f"GGUF {file_type}, {weights.total_bytes / 1e9:.1f} GB"
    layers = 99
    if not placement.fits:
        placement = place(plan.spec, weights, plan.rig, get_engine("llama.cpp"), asked, offload=True)
        layers = placement.gpu_layers
        out = plan.spec.num_hidden_layers - layers
        note += f"; {out} layer{'s' if out > 1 else ''} on the CPU"
    words = ["llama-server", "-m", "MODEL.gguf", "-ngl", str(layers), "-c", str(work.context * work.batch), "-fa", "on"]
    if len(plan.rig.gpus) > 1:
        words += ["-sm", "layer", "-ts", ",".join(str(len(share.layers)) for share in placement.shares)]
    if kv != "auto":
        words += ["--cache-type-k", kv, "--cache-type-v", kv]
    if yarn := _yarn(plan.spec, work):
        words += ["--rope-scaling", "yarn", "--rope-scale", f"{yarn['factor']:g}"]
        words += ["--yarn-orig-ctx", str(yarn["original_max_position_embeddings"])]
    return pci_order(plan) + " ".join(words) + f"  # {note}"


def _compact(placement: Placement) -> str:
    parts = []
    last: int | str = "cpu"
    for index, share in enumerate(placement.shares):
        if share.embed:
            parts += [f'"model.embed_tokens": {index}', f'"model.rotary_emb": {index}']
        if share.layers:
            parts.append(_layer_range(share.layers.start, share.layers.stop, str(index)))
        if share.head:
            last = index
    total = len(placement.memory.weights.layers)
    if placement.gpu_layers < total:
        parts.append(_layer_range(placement.gpu_layers, total, '"cpu"'))
    shown = f'"{last}"' if isinstance(last, str) else str(last)
    return "{" + ", ".join([*parts, f'"model.norm": {shown}', f'"lm_head": {shown}']) + "}"


def _layer_range(start: int, stop: int, device: str) -> str:
    return f'**{{f"model.layers.{{i}}": {device} for i in range({start}, {stop})}}'


def _layered(work: Workload) -> Workload:
    return Workload(work.context, work.batch, prefill_chunk=work.prefill_chunk)


class _Yarn(TypedDict):
    rope_type: str
    factor: float
    original_max_position_embeddings: int


def _yarn(spec: ModelSpec, work: Workload) -> _Yarn | None:
    """YaRN's rope parameters for a context beyond the trained one; none for Llama, whose own scaling stays."""
    original = spec.max_position_embeddings
    if work.context <= original or spec.model_type == "llama":
        return None
    return {
        "rope_type": "yarn",
        "factor": float(-(-work.context // original)),
        "original_max_position_embeddings": original,
    }


def _reach(yarn: _Yarn) -> int:
    """The context that these parameters give; vLLM 0.32 takes that as it stands."""
    return round(yarn["factor"] * yarn["original_max_position_embeddings"])
