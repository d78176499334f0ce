"""vLLM: profiled activation peak, non-torch growth, CUDA graphs, and the paged KV cache that takes the rest.

vLLM gives the KV cache `total * gpu_memory_utilization - (weights + activation peak + non-torch growth)`
(vllm/v1/worker/gpu_worker.py, determine_available_memory). In 0.19 the CUDA graphs and what the process held before
loading come on top. Constants fitted to 0.19 start-up logs on H100 (llm-d-planner): Qwen2.5-7B at TP 1, 2, 4 and two
72B models at TP 2, 4.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import ClassVar

from qwenq.planning.case import Case, Share, Workload
from qwenq.planning.engines.base import ServerEngine, rank_context, register, yarn_of, yarn_reach
from qwenq.planning.memory import Term, merged, ranged
from qwenq.planning.placement import ParallelOption
from qwenq.planning.rig import Gpu
from qwenq.planning.speed import SpeedFit
from qwenq.planning.weights import Weights
from qwenq.units import GIB

_LOGS = "fitted to vLLM 0.19 logs on H100 (llm-d-planner)"
_RUNS = "Qwen2.5 A100 runs, vLLM 0.6.3"
SPEEDS = {
    ("none", 16): SpeedFit(0.112e-3, 0.030e-3, 1.17, 0.95, 1.13, _RUNS),
    ("gptq", 8): SpeedFit(0.146e-3, 0.015e-3, 1.05, 0.94, 1.16, _RUNS),
    ("gptq", 4): SpeedFit(0.144e-3, 0.0, 1.05, 0.94, 1.20, _RUNS),
    ("awq", 4): SpeedFit(0.148e-3, 0.007e-3, 1.05, 0.96, 1.17, _RUNS),
}
UNMEASURED = SpeedFit(0.15e-3, 0.01e-3, 1.1, 0.8, 1.2, "between vLLM's measured formats")


@register
@dataclass(frozen=True)
class VllmEngine(ServerEngine):
    """`vllm serve`."""

    name = "vllm"
    title = "vLLM"
    latest = (0, 19)
    kv_dtypes: ClassVar = {"auto": 2.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0}
    smaller_kv = "fp8"
    started = True
    unread: ClassVar = {"gguf": "GGUF is llama.cpp's format"}
    block_tokens = 16
    inside = ("weights", "activations", "non_torch")
    outside = ("graphs", "context")
    utilization_flag = "--gpu-memory-utilization"
    context_flag = "--max-model-len"

    def own_part(self, case: Case, share: Share, gpu: Gpu) -> float:
        return 0.9

    def terms(self, case: Case, share: Share, gpu: Gpu) -> tuple[tuple[Term, ...], str]:
        """Terms of one rank, and the moment of its profiled peak."""
        peak, moment = self._activation_peak(case, share, gpu.name)
        graphs = (0.0173 * len(share.layers) + 0.386 / share.ranks ** (2 / 3)) * GIB
        source = case.weights.source + "; fused and cut by rank"
        terms = [
            Term("weights", self.rank_weights(case, share), "exact", source),
            Term("kv_cache", self.cache_bytes(case, share), "exact", f"blocks of {self.block_tokens} tokens"),
            ranged("activations", peak, "fitted", f"{moment}; {_LOGS}", 0.95, 1.1),
            non_torch(share, gpu.name),
            ranged("graphs", graphs, "fitted", f"0.0173 GiB a layer and 0.386 / TP^(2/3); {_LOGS}", 0.85, 1.25),
            rank_context(share, gpu),
        ]
        return merged(terms), moment

    def _activation_peak(self, case: Case, share: Share, gpu: str) -> tuple[float, str]:
        """The larger of the sampler's peak (last stage) and the MLP's, in a dummy run of the largest batch."""
        seqs, tokens = default_batch(gpu, case.work)
        h, i = case.spec.hidden_size, case.weights.intermediate_size
        fixed = 0.13 * GIB  # workspaces; fitted
        mlp = tokens * (3 * i / share.ranks + 4 * h) * 2 + fixed
        if not share.head:
            return mlp, f"MLP of {tokens} tokens"
        # 16-bit logits, and three float32 tensors of their size; 0.15 and 0.16 sorted them and held about ten
        per_logit = 14 if self.version >= (0, 17) else 38
        sampler = seqs * case.spec.vocab_size * per_logit + tokens * h * 2 + fixed
        return (sampler, f"sampler of {seqs} sequences") if sampler > mlp else (mlp, f"MLP of {tokens} tokens")

    def speed_fit(self, weights: Weights) -> SpeedFit:
        return SPEEDS.get((weights.method, weights.bits), UNMEASURED)

    def words(self, case: Case, option: ParallelOption, checkpoint: str) -> list[str]:
        assert option.memory is not None  # else its shapes are not possible
        work = case.work
        words = ["vllm", "serve", checkpoint]
        words += ["--tensor-parallel-size", str(option.tensor), "--pipeline-parallel-size", str(option.pipeline)]
        words += [self.context_flag, str(work.context)]
        words += [self.utilization_flag, f"{option.memory.gpu_memory_utilization:g}"]
        if work.kv_dtype == self.smaller_kv:
            words += ["--kv-cache-dtype", work.kv_dtype]
        if work.max_num_seqs:
            words += ["--max-num-seqs", str(work.max_num_seqs)]
        # The override replaces all rope parameters; the base vLLM then takes is Qwen's. Others' contexts it refuses.
        # 0.32 takes max_position_embeddings as it stands.
        if yarn := yarn_of(case):
            overrides = {"rope_scaling": yarn, "max_position_embeddings": yarn_reach(yarn)}
            words += ["--hf-overrides", json.dumps(overrides)]
        return words


def default_batch(gpu: str, work: Workload) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) that vLLM's server takes: larger from 70 GiB on, A100 excepted."""
    large = any(part in gpu for part in ("H100", "H200", "MI300", "PRO 6000"))
    seqs = work.max_num_seqs or (1024 if large else 256)
    return seqs, work.prefill_chunk or (8192 if large else 2048)


def non_torch(share: Share, gpu: str) -> Term:
    """Memory of libraries that torch's allocator does not see: NCCL's above all."""
    if share.ranks == 1:
        return ranged("non_torch", 0.24 * GIB, "fitted", _LOGS, 0.8, 1.5)
    if "H100" in gpu or "H200" in gpu:
        many = 2.075 if share.ranks == 2 else 2.17
        return ranged("non_torch", many * GIB, "fitted", f"NCCL and custom all-reduce; {_LOGS}", 0.95, 1.1)
    return Term(
        "non_torch", round(0.43 * GIB), "reported", "0.25 to 0.43 GiB on PCIe cards with older vLLM; 2.1 on H100",
        round(0.25 * GIB), round(2.1 * GIB),
    )  # fmt: skip


_RAY = ("--distributed-executor-backend", "ray")


def ray_commands(words: list[str], hosts: list[str]) -> list[str]:
    """vLLM over several hosts: Ray started on each, the first one leading, then the server on the first."""
    head, *others = hosts
    lines = [f"# on {head}", "ray start --head --port=6379"]
    for other in others:
        lines += [f"# on {other}", f"ray start --address={head}:6379"]
    return [*lines, f"# on {head}, when `ray status` shows every host", shlex.join([*words, *_RAY])]
