"""Tensor and pipeline parallel options of vLLM for a model on a rig, each with the reason why it works or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwenq.planning.engines import Engine
from qwenq.planning.memory import MemoryEstimate, estimate, rank_shares
from qwenq.planning.rig import Rig
from qwenq.planning.terms import Workload
from qwenq.planning.weights import Weights
from qwenq.spec import ModelSpec


@dataclass(frozen=True)
class ParallelOption:
    """`tensor` ranks times `pipeline` stages; `reasons` says why not, empty when the shapes allow it."""

    tensor: int
    pipeline: int
    reasons: tuple[str, ...]
    memory: MemoryEstimate | None  # None when the shapes forbid it

    @property
    def works(self) -> bool:
        return not self.reasons and self.memory is not None and self.memory.fits is True

    @property
    def verdict(self) -> str:
        """One line: possible and fits, possible and short by how much, or why not."""
        if self.reasons or self.memory is None:
            return "no: " + "; ".join(self.reasons)
        if self.memory.fits:
            return f"fits, KV cache of {self.memory.kv_capacity_tokens} tokens"
        worst = min(gpu.free_bytes or 0 for gpu in self.memory.gpus)
        return f"shapes allow it, but a GPU is short of {-worst / (1 << 30):.2f} GiB"

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "possible": not self.reasons,
            "fits": self.memory.fits if self.memory else False,
            "kv_capacity_tokens": self.memory.kv_capacity_tokens if self.memory else None,
            "verdict": self.verdict,
        }


def tensor_parallel_reasons(spec: ModelSpec, weights: Weights, ranks: int) -> list[str]:
    """Why `ranks` tensor-parallel ranks cannot cut this checkpoint; empty when they can."""
    reasons = []
    heads, kv_heads, inner = spec.num_attention_heads, spec.num_key_value_heads, weights.intermediate_size
    if heads % ranks:
        reasons.append(f"{heads} heads are not divisible by {ranks}")
    if kv_heads % ranks and ranks % kv_heads:
        reasons.append(f"{kv_heads} KV heads cannot be shared out or copied evenly over {ranks}")
    if inner % ranks:
        reasons.append(f"FFN width {inner} is not divisible by {ranks}")
    group = weights.group_size
    if group > 0 and not reasons:
        for width, what in ((inner, "FFN width"), (spec.q_size, "attention width")):
            if (width // ranks) % group:
                reasons.append(
                    f"{what} {width} / {ranks} = {width // ranks} is not a multiple of the group size {group}, "
                    "so a quantization group would straddle ranks"
                )
    return reasons


def padded_width(width: int, group: int, ranks: int) -> int:
    """Smallest FFN width from `width` on whose groups no rank shares (29696 for 29568, g128 and up to 8 ranks)."""
    step = group * ranks
    return -(-width // step) * step


def parallel_options(
    spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, rig: Rig
) -> tuple[ParallelOption, ...]:
    """Every way to use all GPUs of the rig with vLLM, most tensor parallelism first."""
    count = len(rig.gpus)
    options = []
    for tensor in sorted((n for n in range(1, count + 1) if count % n == 0), reverse=True):
        stages = count // tensor
        reasons = tensor_parallel_reasons(spec, weights, tensor)
        if stages > spec.num_hidden_layers:
            reasons.append(f"{stages} stages for {spec.num_hidden_layers} layers")
        if weights.method == "gguf":
            reasons.append("GGUF is llama.cpp's format")
        memory = None
        if not reasons:
            memory = estimate(spec, weights, engine, work, rig, rank_shares(spec, tensor, stages))
        options.append(ParallelOption(tensor, stages, tuple(reasons), memory))
    return tuple(options)


def best_option(options: Sequence[ParallelOption]) -> ParallelOption | None:
    """The option that fits with the largest cache, else one that the shapes allow, else None."""
    possible = [option for option in options if not option.reasons]
    fitting = [option for option in possible if option.works]
    if fitting:
        return max(fitting, key=lambda o: (o.memory.kv_capacity_tokens or 0) if o.memory else 0)
    return possible[0] if possible else None
