"""vLLM: profiled activation peak, non-torch growth, CUDA graphs, and the paged KV cache that takes the rest.

vLLM gives the KV cache `total * gpu_memory_utilization - (weights + activation peak + non-torch growth)`
(vllm/v1/worker/gpu_worker.py, determine_available_memory), and since it profiles them the CUDA graphs' estimate too.
What the process held before loading comes on top. Fitted and checked on logs of vLLM's own:
0.7.2 and 0.8 (V0) on RTX 4090, A10, RTX 2080 Ti; 0.10.0 on L40S, 0.10.2 and early 2026 on 24 and 48 GB cards (V1);
0.19.0 on H100 (llm-d-planner: Qwen2.5-7B at TP 1, 2, 4, two 72B models at TP 2, 4); 0.19.1 on A10G and RTX 5090; 0.26.0
on a 16 GB card and a 16 GB part of an H100 (reports/engine-logs.md).
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import cache
from typing import ClassVar

from qwenq.planning.case import Case, Share, Workload
from qwenq.planning.engines.base import ServerEngine, rank_context, register, yarn_words
from qwenq.planning.memory import Term, merged, ranged
from qwenq.planning.placement import ParallelOption
from qwenq.planning.rig import Gpu
from qwenq.planning.speed import SpeedFit
from qwenq.planning.weights import Weights
from qwenq.units import GIB

_LOGS = "fitted to vLLM 0.19 logs on H100 (llm-d-planner), A10G and RTX 5090"
GRAPH_BYTES = 0.79 * GIB / (86 * 48)  # a graph's and layer's; 0.61 GiB for 102 of 28, 1.63 for 102 of 80 on H100
_RUNS = "Qwen2.5 A100 runs, vLLM 0.6.3"
SPEEDS = {
    ("none", 16): SpeedFit(0.112e-3, 0.030e-3, 1.17, 0.95, 1.13, _RUNS),
    ("gptq", 8): SpeedFit(0.143e-3, 0.015e-3, 1.05, 0.94, 1.16, _RUNS),
    ("gptq", 4): SpeedFit(0.144e-3, 0.0, 1.05, 0.94, 1.20, _RUNS),
    ("awq", 4): SpeedFit(0.148e-3, 0.007e-3, 1.05, 0.96, 1.17, _RUNS),
}
DEFAULT_SEQUENCES = 256  # --max-num-seqs, on GPUs below 70 GiB
UNMEASURED = SpeedFit(0.15e-3, 0.01e-3, 1.1, 0.8, 1.2, "between vLLM's measured formats")


@register
class VllmEngine(ServerEngine):
    """`vllm serve`."""

    name = "vllm"
    title = "vLLM"
    oldest = (0, 7)
    latest = (0, 26)
    kv_dtypes: ClassVar = {"auto": 2.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0}
    smaller_kv = "fp8"
    started = True
    unread: ClassVar = {"gguf": "GGUF is llama.cpp's format"}
    block_tokens = 16
    spared_stages = 1  # vllm/distributed/utils.py, get_pp_indices; since 0.8 (#13839)
    utilization_flag = "--gpu-memory-utilization"
    context_flag = "--max-model-len"
    eager_flag = "--enforce-eager"
    requests_flag = "--max-num-seqs"
    chunk_flag = "--max-num-batched-tokens"

    @property
    def least_capability(self) -> tuple[int, int]:
        """By vLLM's installation guide: 7.0 in 0.14's, 7.5 in 0.21's (gpu.cuda.inc.md; CUDA 13 by default, #39878)."""
        return (7, 5) if self.version >= (0, 21) else (7, 0)

    def contradiction(self, work: Workload) -> str:
        """vLLM wants tokens for all sequences of a step (vllm/config/scheduler.py)."""
        seqs, tokens = asked_sequences(work), work.prefill_chunk
        return f"{self.chunk_flag} {tokens} is less than {self.requests_flag} {seqs}" if 0 < tokens < seqs else ""

    def cache_barred(self, work: Workload, gpu: Gpu) -> str:
        """An fp8 cache below 8.9 is read by FlashInfer alone, whose backend wants 8.0 from 0.24 on and 7.5 before; that
        of Triton wants 8.9 (#47549). Up to 0.10 V0 had kernels that convert it anywhere (#4827).
        """
        has, needs = gpu.compute_capability, (8, 0) if self.version >= (0, 24) else (7, 5)
        if has is None or has >= needs or self.version < (0, 11) or self.kv_bytes(work.kv_dtype) >= 2:
            return ""
        said = f"{self.title} has no {work.kv_dtype} KV cache on {gpu.name}"
        return f"{said}: compute capability {has[0]}.{has[1]}, {self.label} needs {needs[0]}.{needs[1]} for it"

    def notes(self, case: Case, gpu: Gpu) -> list[str]:
        """An fp8 cache where FlashInfer alone reads it, which compiles its kernels."""
        has = gpu.compute_capability
        if has is None or has >= (8, 9) or self.version < (0, 11) or self.kv_bytes(case.work.kv_dtype) >= 2:
            return []
        return [f"{gpu.name}: vLLM reads an fp8 KV cache by FlashInfer alone, which needs nvcc to compile its kernels"]

    @property
    def profiles_graphs(self) -> bool:
        """CUDA graphs are counted in the utilized part.

        By default from 0.21 on (VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS). The container of 0.19.1 had them in it on an
        A10G, the package of 0.19.1 on an RTX 5090 had not: the careful side is counted.
        """
        return self.version >= (0, 19, 1)

    @property
    def inside(self) -> tuple[str, ...]:
        return ("weights", "activations", "non_torch", *(("graphs",) if self.profiles_graphs else ()))

    @property
    def outside(self) -> tuple[str, ...]:
        return ("context",) if self.profiles_graphs else ("graphs", "context")

    @property
    def outside_said(self) -> str:
        return "CUDA context" if self.profiles_graphs else "CUDA graphs and context"

    def own_part(self, case: Case, share: Share, gpu: Gpu) -> float:
        """0.92 from 0.25 on (vllm/config/cache.py), 0.9 before."""
        return 0.92 if self.version >= (0, 25) else 0.9

    def terms(self, case: Case, share: Share, gpu: Gpu) -> tuple[tuple[Term, ...], str]:
        """Terms of one rank, and the moment of its profiled peak."""
        peak, moment = self._activation_peak(case, share, gpu)
        source = case.weights.source + "; fused and cut by rank"
        terms = [
            Term("weights", self.rank_weights(case, share), "exact", source),
            Term("kv_cache", self.cache_bytes(case, share), "exact", f"blocks of {self.block_tokens} tokens"),
            ranged("activations", peak, "fitted", f"{moment}; {_LOGS}", 0.95, 1.1),
            self._non_torch(share, gpu),
            self._graphs(case, share, gpu),
            rank_context(share, gpu),
        ]
        return merged(terms), moment

    def _activation_peak(self, case: Case, share: Share, gpu: Gpu) -> tuple[float, str]:
        """The larger of the sampler's peak (last stage) and the MLP's, in a dummy run of the largest batch.

        MLP: gate and up, their product, three hidden states a token. Sampler: logits of 16 bits and three float32
        tensors of their size; before 0.17 they were sorted, which held about ten (vllm#33538). V0 left the sampler out
        where it read prompts in chunks of its own, which it did for contexts beyond 32,768.
        """
        seqs, tokens = default_batch(gpu, case.work)
        h, i = case.spec.hidden_size, case.weights.intermediate_size
        mlp = tokens * (3 * i / share.ranks + 3 * h) * 2
        chunked_v0 = self.version < (0, 9) and case.work.context > 32768 and not case.work.prefill_chunk
        if not share.head or chunked_v0:
            return mlp, f"MLP of {tokens} tokens"
        per_logit, fixed = (14, 0.13 * GIB) if self.version >= (0, 17) else (38, 0)
        sampler = seqs * case.spec.vocab_size * per_logit + tokens * h * 2 + fixed
        return (sampler, f"sampler of {seqs} sequences") if sampler > mlp else (mlp, f"MLP of {tokens} tokens")

    def _non_torch(self, share: Share, gpu: Gpu) -> Term:
        """Growth of memory that torch's allocator does not see: loaded kernels, NCCL's buffers."""
        hopper = "H100" in gpu.name or "H200" in gpu.name
        if share.ranks > 1 and hopper:
            many = 2.075 if share.ranks == 2 else 2.17
            return ranged("non_torch", many * GIB, "fitted", f"NCCL and custom all-reduce; {_LOGS}", 0.95, 1.1)
        if share.ranks > 1:
            return Term(
                "non_torch", round(0.25 * GIB), "reported", "0.09 to 0.43 GiB on PCIe cards; 2.1 on H100",
                round(0.09 * GIB), round(2.1 * GIB),
            )  # fmt: skip
        if share.gpus > 1:
            return ranged("non_torch", 0.07 * GIB, "reported", "a stage of a pipeline, vLLM 0.19 on H100", 0.5, 4)
        if self.version < (0, 17):
            return ranged("non_torch", (0.07 if hopper else 0.03) * GIB, "fitted", "logs of vLLM 0.10 to 0.15", 0.6, 3)
        return ranged("non_torch", (0.24 if hopper else 0.143) * GIB, "fitted", _LOGS, 0.5, 2)

    def _graphs(self, case: Case, share: Share, gpu: Gpu) -> Term:
        """CUDA graphs: what capturing takes, or vLLM's own estimate where it is that which leaves the cache less."""
        count = 0 if case.work.enforce_eager else sum(captured_graphs(default_batch(gpu, case.work)[0]))
        if self.profiles_graphs:
            source = f"vLLM's estimate for {count} graphs: 0.79 GiB for 86 of 48 layers on A10G, by layers and graphs"
            return ranged("graphs", GRAPH_BYTES * count * len(share.layers), "fitted", source, 0.55, 1.6)
        n_bytes = (0.0173 * len(share.layers) + 0.386 / share.ranks ** (2 / 3)) * GIB * count / 102
        source = f"{count} graphs; 0.0173 GiB per layer and 0.386 / TP^(2/3) for 102, {_LOGS}"
        return ranged("graphs", n_bytes, "fitted", source, 0.7, 1.25)

    def speed_fit(self, weights: Weights) -> SpeedFit:
        return SPEEDS.get((weights.method, weights.bits), UNMEASURED)

    def words(self, case: Case, option: ParallelOption, checkpoint: str) -> list[str]:
        words = ["vllm", "serve", checkpoint]
        words += ["--tensor-parallel-size", str(option.tensor), "--pipeline-parallel-size", str(option.pipeline)]
        # The override replaces all rope parameters; the base vLLM then takes is Qwen's. Others' contexts it refuses.
        # 0.32 takes max_position_embeddings as it stands.
        work = replace(case.work, max_num_seqs=asked_sequences(case.work))
        return [*words, *self.limit_words(work, option), *yarn_words(case, "--hf-overrides")]


def asked_sequences(work: Workload) -> int:
    """--max-num-seqs as the command names it: as asked, or for a batch beyond the default; else 0."""
    return work.max_num_seqs or (work.batch if work.batch > DEFAULT_SEQUENCES else 0)


def default_batch(gpu: Gpu, work: Workload) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) that vLLM's server takes: larger from 70 GiB on, A100 excepted."""
    large = gpu.memory_gib >= 70 and "A100" not in gpu.name  # vllm/engine/arg_utils.py, get_batch_defaults
    tokens = work.prefill_chunk or (8192 if large else 2048)
    return asked_sequences(work) or min(1024 if large else DEFAULT_SEQUENCES, tokens), tokens


@cache
def captured_graphs(seqs: int) -> tuple[int, int]:
    """(piecewise, full) CUDA graphs: batch sizes up to twice `seqs` and up to `seqs`, at most 512.

    Sizes 1, 2, 4, then by 8, from 256 on by 16 (vllm/config/vllm.py, _set_cudagraph_sizes): (51, 51) for 1,024
    sequences, (51, 35) for 256, (4, 3) for 4, as logs have them.
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    largest = min(2 * seqs, 512)
    return sum(size <= largest for size in sizes), sum(size <= min(seqs, 512) for size in sizes)


_RAY = ("--distributed-executor-backend", "ray")


def ray_commands(words: list[str], hosts: list[str]) -> list[str]:
    """vLLM over several hosts: Ray started on each, the first one leading, then the server on the first."""
    head, *others = hosts
    lines = [f"# on {head}", "ray start --head --port=6379"]
    for other in others:
        lines += [f"# on {other}", f"ray start --address={head}:6379"]
    return [*lines, f"# on {head}, when `ray status` shows every host", shlex.join([*words, *_RAY])]
