"""Memory of vLLM: profiled activation peak, non-torch growth, CUDA graphs, and the paged KV cache that takes the rest.

vLLM gives the KV cache `total * gpu_memory_utilization - (weights + activation peak + non-torch growth)`
(vllm/v1/worker/gpu_worker.py, determine_available_memory). In 0.19 the CUDA graphs and what the process held before
loading come on top. Constants fitted to 0.19 start-up logs on H100 (llm-d-planner): Qwen2.5-7B at TP 1, 2, 4 and two
72B models at TP 2, 4.
"""

from __future__ import annotations

import math

from qwenq.model.spec import ModelSpec
from qwenq.planning.allocator import allocated_bytes
from qwenq.planning.engines import VLLM_BLOCK_TOKENS, Engine, kv_bytes_per_value
from qwenq.planning.terms import Share, Term, Workload, context_term, merged, ranged
from qwenq.planning.weights import Weights
from qwenq.units import GIB

_LOGS = "fitted to vLLM 0.19 logs on H100 (llm-d-planner)"


def vllm_terms(
    spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, share: Share, gpu: str
) -> tuple[tuple[Term, ...], str]:
    """Terms of one rank, and the moment of its profiled peak."""
    ranks = share.ranks
    peak, moment = _activation_peak(spec, weights, engine, work, share, gpu)
    graphs = (0.0173 * len(share.layers) + 0.386 / ranks ** (2 / 3)) * GIB
    terms = [
        Term("weights", _rank_weights(spec, weights, share), "exact", weights.source + "; fused and cut by rank"),
        Term("kv_cache", cache_bytes(spec, engine, work, share), "exact", f"blocks of {VLLM_BLOCK_TOKENS} tokens"),
        ranged("activations", peak, "fitted", f"{moment}; {_LOGS}", 0.95, 1.1),
        _non_torch(share, gpu),
        ranged("graphs", graphs, "fitted", f"0.0173 GiB a layer and 0.386 / TP^(2/3); {_LOGS}", 0.85, 1.25),
        _start(share, gpu),
    ]
    return merged(terms), moment


def cache_bytes(spec: ModelSpec, engine: Engine, work: Workload, share: Share) -> int:
    """KV bytes of one rank for the whole batch, in whole blocks."""
    blocks = -(-work.context // VLLM_BLOCK_TOKENS) * work.batch
    return blocks * VLLM_BLOCK_TOKENS * token_bytes(spec, engine, work, share)


def token_bytes(spec: ModelSpec, engine: Engine, work: Workload, share: Share) -> int:
    """KV bytes of one token on one rank; heads are copied when there are fewer than ranks."""
    heads = max(1, spec.num_key_value_heads // share.ranks)
    return int(2 * len(share.layers) * heads * spec.head_dim * kv_bytes_per_value(engine, work.kv_dtype))


def kv_tokens(
    spec: ModelSpec, engine: Engine, work: Workload, share: Share, terms: tuple[Term, ...], total: int, part: float
) -> int:
    """Tokens the cache of a rank will hold in its `part` of `total` bytes, in whole blocks; 0 when nothing is left."""
    left = total * part - profiled_bytes(terms)
    per_block = VLLM_BLOCK_TOKENS * token_bytes(spec, engine, work, share)
    return max(0, int(left // per_block)) * VLLM_BLOCK_TOKENS if per_block else 0


def profiled_bytes(terms: tuple[Term, ...]) -> int:
    """What vLLM subtracts before it sizes the cache: weights, activation peak, non-torch growth."""
    return sum(t.n_bytes for t in terms if t.name in ("weights", "activations", "non_torch"))


def outside_bytes(terms: tuple[Term, ...]) -> int:
    """What comes on top of vLLM's part of a GPU: CUDA graphs, and what the process held before it loaded."""
    return sum(t.n_bytes for t in terms if t.name in ("graphs", "context"))


def possible_utilization(work: Workload, terms: tuple[Term, ...], free: int, total: int) -> float:
    """The part of a GPU's `total` bytes that vLLM can have: as asked, or, rounded down, what leaves `outside_bytes`.

    vLLM fills its part with KV cache whatever the context, so with more it would run out when it captures CUDA graphs.
    """
    most = math.floor(1000 * (free - outside_bytes(terms)) / total) / 1000
    return max(0.0, min(work.gpu_memory_utilization, most))


def budget_bytes(terms: tuple[Term, ...], total: int, part: float) -> int:
    """The limit all terms together must keep: vLLM's part of the GPU, and what comes on top of it."""
    return round(total * part) + outside_bytes(terms)


def _rank_weights(spec: ModelSpec, weights: Weights, share: Share) -> int:
    """Fused linears cut by rank, norms whole, one rotary table; with torch's allocator rounding."""
    r, h, i = share.ranks, spec.hidden_size, weights.intermediate_size
    shapes = ((spec.q_size + 2 * spec.kv_size) * h, spec.q_size * h, 2 * i * h, i * h)
    sizes: list[int] = [part // r for part in weights.embed] if share.embed else []
    for layer in share.layers:
        stored = weights.layer_bytes[layer]
        sizes += [round(stored / sum(shapes) * shape / r) for shape in shapes]
    if share.head:
        sizes += [*weights.norm, *(part // r for part in weights.head)]
        if not weights.head and not share.embed:
            sizes += [part // r for part in weights.embed]  # a tied head on another stage is a copy
    sizes.append(2 * spec.max_position_embeddings * spec.head_dim)
    return allocated_bytes(sizes)


def _activation_peak(
    spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, share: Share, gpu: str
) -> tuple[float, str]:
    """The larger of the sampler's peak (last stage) and the MLP's, in a dummy run of the largest batch."""
    seqs, tokens = default_batch(gpu, work)
    h, i = spec.hidden_size, weights.intermediate_size
    fixed = 0.13 * GIB  # workspaces; fitted
    mlp = tokens * (3 * i / share.ranks + 4 * h) * 2 + fixed
    if not share.head:
        return mlp, f"MLP of {tokens} tokens"
    # 16-bit logits, and three float32 tensors of their size; 0.15 and 0.16 sorted them and held about ten
    per_logit = 14 if engine.version >= (0, 17) else 38
    sampler = seqs * spec.vocab_size * per_logit + tokens * h * 2 + fixed
    return (sampler, f"sampler of {seqs} sequences") if sampler > mlp else (mlp, f"MLP of {tokens} tokens")


def default_batch(gpu: str, work: Workload) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) that vLLM's server takes: larger from 70 GiB on, A100 excepted."""
    large = any(part in gpu for part in ("H100", "H200", "MI300", "PRO 6000"))
    seqs = work.max_num_seqs or (1024 if large else 256)
    return seqs, work.prefill_chunk or (8192 if large else 2048)


def _non_torch(share: Share, gpu: str) -> Term:
    if share.ranks == 1:
        return ranged("non_torch", 0.24 * GIB, "fitted", _LOGS, 0.8, 1.5)
    if "H100" in gpu or "H200" in gpu:
        many = 2.075 if share.ranks == 2 else 2.17
        return ranged("non_torch", many * GIB, "fitted", f"NCCL and custom all-reduce; {_LOGS}", 0.95, 1.1)
    return Term(
        "non_torch", round(0.43 * GIB), "reported", "0.25 to 0.43 GiB on PCIe cards with older vLLM; 2.1 on H100",
        round(0.25 * GIB), round(2.1 * GIB),
    )  # fmt: skip


def _start(share: Share, gpu: str) -> Term:
    """What a rank holds before it loads: the CUDA context, and NCCL's own when there are several ranks."""
    base = context_term(gpu)
    if share.gpus == 1:
        return base
    extra = round(1.02 * GIB) if "H100" in gpu or "H200" in gpu else round(0.3 * GIB)
    return Term(
        "context", base.n_bytes + extra, "reported", base.source + "; 1.53 GiB with several H100 (same logs)",
        base.low_bytes, base.high_bytes + round(1.02 * GIB),
    )  # fmt: skip
