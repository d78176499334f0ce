"""SGLang: a pool of weights and KV cache by `--mem-fraction-static`, and beside it what the server takes at work.

The pool is a fraction of the memory that is free before weights are loaded; the KV cache of the radix tree gets what
the weights leave of it, token by token (python/sglang/srt/model_executor/model_runner_kv_cache_mixin.py,
profile_max_num_token, in 0.5 and, in other words, since 0.1). Prefixes that requests share are stored once; the
estimate counts every sequence in full. Where nobody says a fraction, the server reserves memory for activations, CUDA
graphs and parallelism by the GPU's size (python/sglang/srt/server_args.py, _handle_gpu_memory_settings, sgl-project/
sglang#10975 and #15927; 0.5). Since 0.5.19 it also captures graphs of prefill chunks, 1.8 GB in one report: these are
not counted, `--disable-prefill-cuda-graph` leaves them out.

Measured: QwQ-32B in BF16 on four A10G, in March 2025, whose log gives each step (tests/planning/test_sglang.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from qwenq.planning.case import Case, Share, Workload
from qwenq.planning.engines.base import ServerEngine, rank_context, register, yarn_words
from qwenq.planning.memory import Term, merged, ranged
from qwenq.planning.placement import ParallelOption
from qwenq.planning.rig import Gpu
from qwenq.planning.speed import SpeedFit
from qwenq.planning.weights import Weights
from qwenq.units import GIB

_LOG = "QwQ-32B on four A10G"
LEAST_REQUESTS = 2048  # rows of the table of requests where none are asked for (init_memory_pool; up to 4,096)
# GPU memory below so many GiB -> prompt tokens at once, largest batch of a CUDA graph with less than 4 ranks, and more
DEFAULTS = (
    (20, 2048, 8, 8),
    (35, 2048, 24, 80),
    (60, 4096, 32, 160),
    (160, 8192, 256, 512),
    (float("inf"), 16384, 512, 512),
)


@register
class SglangEngine(ServerEngine):
    """`python -m sglang.launch_server`."""

    name = "sglang"
    title = "SGLang"
    oldest = (0, 4)
    latest = (0, 5)
    kv_dtypes: ClassVar = {"auto": 2.0, "bf16": 2.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0}
    smaller_kv = "fp8_e4m3"
    # The method is read from config.json, without --quantization (docs/advanced_features/quantization.md): gptq and awq
    # by Marlin, compressed-tensors, fp8, bitsandbytes. GGUF files it reads too; the planner knows llama.cpp's.
    unread: ClassVar = {"gguf": "GGUF is planned for llama.cpp"}
    utilization_flag = "--mem-fraction-static"
    context_flag = "--context-length"
    eager_flag = "--disable-cuda-graph"
    requests_flag = "--max-running-requests"
    chunk_flag = "--chunked-prefill-size"
    # Documented (get-started/quickstart: sm75 and above) and enforced by load_model of model_runner.py. Of 0.5, reports
    # differ: a T4 lacked kernels in 2026 (sglang#24224), and an end of 7.5 is announced without a date (#6006).
    least_capability = (7, 5)
    inside = ("weights",)
    outside = ("activations", "logits", "graphs", "non_torch", "context")
    outside_said = "activations, CUDA graphs and context"

    def own_part(self, case: Case, share: Share, gpu: Gpu) -> float:
        """By server_args: MiB for metadata, a chunk's activations, CUDA graphs and parallelism are kept free."""
        total, chunk, batch = 1024 * gpu.memory_gib, *server_defaults(gpu, case.work, share.ranks)
        reserved = 512 + 1.5 * max(chunk, 2048) + 2 * batch + 1024 * share.gpus / 8
        if total > 60 * 1024:
            reserved = max(reserved, 10 * 1024)
        return round((total - reserved) / total, 3)

    def part_of(self, terms: Sequence[Term], total: int, free: int) -> int:
        """The memory that is free before weights are loaded."""
        return max(1, free - sum(t.n_bytes for t in terms if t.name == "context"))

    def terms(self, case: Case, share: Share, gpu: Gpu) -> tuple[tuple[Term, ...], str]:
        """Terms of one rank, at work on a chunk of a prompt."""
        spec, weights, work = case.spec, case.weights, case.work
        chunk, batch = server_defaults(gpu, work, share.ranks)
        chunk = min(chunk, work.prompt_tokens * work.batch)
        moment = f"a chunk of {chunk} tokens"
        mlp = 2 * chunk * (3 * weights.intermediate_size // share.ranks + 4 * spec.hidden_size)
        rows = (work.max_num_seqs or LEAST_REQUESTS) + 1
        table = 4 * rows * (work.context + 4)  # int32 slots of req_to_token
        terms = [
            Term("weights", self.rank_weights(case, share), "exact", weights.source + "; fused and cut by rank"),
            Term("kv_cache", self.cache_bytes(case, share), "exact", "a slot a token, shared prefixes not counted off"),
            ranged("activations", mlp, "reported", f"MLP of {moment}, not measured", 0.7, 2.0),
            ranged(
                "logits", 10 * work.batch * spec.vocab_size if share.head else 0, "reported",
                "last position of each sequence, gathered, float32", 0.6, 1.4,
            ),
            ranged(
                "graphs", 0 if work.enforce_eager else 0.93 / 64 * GIB * len(share.layers), "reported",
                f"0.93 GiB for 64 layers ({_LOG}), batches of up to {batch}", 0.5, 2.0,
            ),
            Term(
                "non_torch", table + round(0.8 * GIB), "reported",
                f"slots of {rows} requests; attention workspaces, 0.8 GiB ({_LOG})",
                table + round(0.4 * GIB), table + round(1.6 * GIB),
            ),
            rank_context(share, gpu),
        ]  # fmt: skip
        return merged(terms), moment

    def speed_fit(self, weights: Weights) -> SpeedFit:
        """No published run of ours: vLLM's kernels and overheads."""
        return SpeedFit(0.15e-3, 0.01e-3, 1.1, 0.7, 1.4, "assumed like vLLM's; SGLang is not measured")

    def words(self, case: Case, option: ParallelOption, checkpoint: str) -> list[str]:
        words = ["python", "-m", "sglang.launch_server", "--model-path", checkpoint]
        words += ["--tp-size", str(option.tensor), "--pp-size", str(option.pipeline)]
        # get_context_length takes max_position_embeddings as it stands where rope_scaling names the original.
        return [*words, *self.limit_words(case.work, option), *yarn_words(case, "--json-model-override-args")]


def server_defaults(gpu: Gpu, work: Workload, ranks: int) -> tuple[int, int]:
    """(chunked_prefill_size, cuda_graph_max_bs) by GPU memory, or the chunk that is asked for."""
    chunk, few, many = next(row[1:] for row in DEFAULTS if gpu.memory_gib < row[0])
    return work.prefill_chunk or chunk, few if ranks < 4 else many
