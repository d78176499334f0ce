"""Tensor and pipeline parallel options of vLLM for a model on a rig, each with the reason why it works or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import Engine
from qwenq.planning.memory import MemoryEstimate, estimate, rank_shares
from qwenq.planning.placement import search_context
from qwenq.planning.rig import Rig
from qwenq.planning.tensor_parallel import helpful_width, tensor_parallel_reasons
from qwenq.planning.terms import Workload
from qwenq.planning.weights import Weights


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


def cutting_reasons(spec: ModelSpec, weights: Weights, ranks: int) -> list[str]:
    """Why `ranks` tensor-parallel ranks cannot cut these weights, padding included; empty when they can."""
    stored = replace(spec, intermediate_size=weights.intermediate_size)
    return tensor_parallel_reasons(stored, weights.row_groups, ranks)


def padded_weights(spec: ModelSpec, weights: Weights, ranks: int) -> Weights | None:
    """These weights with the FFN padded so that `ranks` ranks can cut them; None when padding cannot bring that about.

    Layers grow in proportion to the weights of their linears.
    """
    stored = replace(spec, intermediate_size=weights.intermediate_size)
    width = helpful_width(stored, weights.row_groups, [ranks])
    if not width:
        return None
    growth = replace(spec, intermediate_size=width).linear_parameters / stored.linear_parameters
    layers = tuple(tuple(round(n_bytes * growth) for n_bytes in layer) for layer in weights.layers)
    return replace(weights, layers=layers, intermediate_size=width, parts=())


def parallel_options(
    spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, rig: Rig
) -> tuple[ParallelOption, ...]:
    """Every way to use all GPUs of the rig with vLLM, most tensor parallelism first."""
    count = len(rig.gpus)
    options = []
    for tensor in sorted((n for n in range(1, count + 1) if count % n == 0), reverse=True):
        stages = count // tensor
        reasons = cutting_reasons(spec, weights, tensor)
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


def largest_vllm_context(
    spec: ModelSpec, weights: Weights, engine: Engine, work: Workload, rig: Rig, option: ParallelOption
) -> int:
    """Most tokens a sequence can have in one vLLM layout; 0 when none."""
    shares = rank_shares(spec, option.tensor, option.pipeline)

    def fits(context: int) -> bool:
        return bool(estimate(spec, weights, engine, replace(work, context=context, prompt=0), rig, shares).fits)

    return search_context(fits, spec.extended_context)
