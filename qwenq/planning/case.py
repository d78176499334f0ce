"""A question to the planner: a model in certain weights, in an engine, under a workload, on a rig."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenq.errors import PlanError, UsageError
from qwenq.model.spec import ModelSpec
from qwenq.planning.rig import Rig
from qwenq.planning.weights import Weights

if TYPE_CHECKING:
    from qwenq.planning.engines.base import Engine  # whose methods take a case


@dataclass(frozen=True)
class Workload:
    """Tokens to hold and compute; lengths per sequence.

    `context` counts prompt and generated tokens. `prompt` is how much of it is one prompt (all of it unless said).
    """

    context: int
    batch: int = 1
    prompt: int = 0
    kv_dtype: str = "auto"
    prefill_chunk: int = 0  # 0: the engine's own
    max_num_seqs: int = 0  # of a server; 0: its default for the GPU
    gpu_memory_utilization: float | None = None  # a server's part of each GPU; None: its own
    enforce_eager: bool = False  # a server without CUDA graphs
    value_bytes: int = 2  # of an activation, in this project's own engine: 4 where it computes in float32

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("context", self.context, 1, 1 << 40),
            ("batch size", self.batch, 1, 1 << 16),
            ("prompt", self.prompt, 0, 1 << 40),
            ("prefill chunk", self.prefill_chunk, 0, 1 << 40),
            ("max_num_seqs", self.max_num_seqs, 0, 1 << 16),
        ):
            if value < least:
                raise UsageError(f"{name} is {value}, wanted at least {least}")
            if value > most:
                got = value if value < 10**15 else f"a number of {len(str(value))} digits"
                raise UsageError(f"{name} is {got}, wanted at most {most}")
        if 0 < self.max_num_seqs < self.batch:
            raise UsageError(
                f"batch size is {self.batch}, but max_num_seqs lets {self.max_num_seqs} run at once",
                hint="raise --max-num-seqs, or leave it out",
            )
        if self.prompt > self.context:
            raise UsageError(f"prompt is {self.prompt} tokens, more than the context of {self.context}")
        part = self.gpu_memory_utilization
        if part is not None and not 0 < part <= 1:
            raise UsageError(f"gpu_memory_utilization is {part}, wanted more than 0, at most 1")

    @property
    def prompt_tokens(self) -> int:
        return self.prompt or self.context


@dataclass(frozen=True)
class Case:
    """A question, as the planner's functions take it. Without a rig GPUs are of no kind, and no limit is compared."""

    spec: ModelSpec
    weights: Weights
    engine: Engine
    work: Workload
    rig: Rig | None = None

    @property
    def hardware(self) -> Rig:
        """The rig; PlanError where none was named."""
        if self.rig is None:
            raise PlanError("no rig was given", hint='for instance "2x RTX 3090"')
        return self.rig

    @property
    def kv_bytes(self) -> float:
        """Bytes of a cached value, its scales included; UsageError when the engine has no such cache."""
        return self.engine.kv_bytes(self.work.kv_dtype)

    @property
    def layer_kv_bytes(self) -> float:
        """KV cache of one layer for every sequence at the whole context."""
        return 2 * self.spec.kv_size * self.kv_bytes * self.work.context * self.work.batch

    def asking(self, **changes: Any) -> Case:
        """The same with fields of the workload changed."""
        return replace(self, work=replace(self.work, **changes))

    def at(self, context: int) -> Case:
        """The same at another context, all of which may be one prompt."""
        return self.asking(context=context, prompt=0)


def default_context(spec: ModelSpec) -> int:
    """Tokens that a plan is for where none are asked for: 8k, or as far as the model goes."""
    return min(8192, spec.extended_context)


def check_context(spec: ModelSpec, work: Workload) -> None:
    """PlanError when the context is beyond what the model's card allows."""
    if work.context > spec.extended_context:
        raise PlanError(
            f"context is {work.context} tokens, {spec.name or 'the model'} allows {spec.extended_context}",
            hint=f"ask for at most {spec.extended_context}"
            + (" (with YaRN)" if spec.extended_context > spec.max_position_embeddings else ""),
        )


@dataclass(frozen=True)
class Share:
    """One GPU's part: decoder layers, embedding, head (with the final norm); a 1/`ranks` part of each."""

    layers: range
    embed: bool
    head: bool
    ranks: int = 1
    gpus: int = 1  # in the whole rig, ranks included
    offloads: bool = False  # some of the model's layers are in host memory

    @property
    def used(self) -> bool:
        return bool(self.layers) or self.embed or self.head

    def to_json(self) -> dict[str, Any]:
        return {"layers": [self.layers.start, self.layers.stop], "embedding": self.embed, "head": self.head}


def whole(spec: ModelSpec) -> Share:
    """Everything on one GPU."""
    return Share(range(spec.num_hidden_layers), embed=True, head=True)


def even_shares(spec: ModelSpec, gpus: int) -> tuple[Share, ...]:
    """Layers spread evenly over `gpus`; embedding on the first, head on the last (the first when they are tied)."""
    n = spec.num_hidden_layers
    head = 0 if spec.tie_word_embeddings else gpus - 1
    return tuple(
        Share(range(n * g // gpus, n * (g + 1) // gpus), embed=g == 0, head=g == head, gpus=gpus) for g in range(gpus)
    )


def rank_shares(
    spec: ModelSpec, tensor_parallel: int, pipeline_parallel: int = 1, spared: int = 0
) -> tuple[Share, ...]:
    """A server's ranks: stages of whole layers, each cut `tensor_parallel` ways.

    What is left over of an even division goes, a layer each, to the last stages before the `spared` ones.
    """
    p = pipeline_parallel
    each, more = divmod(spec.num_hidden_layers, p)
    shares, start = [], 0
    for stage in range(p):
        layers = range(start, start + each + (p - spared - more <= stage < p - spared))
        start = layers.stop
        share = Share(layers, stage == 0, stage == p - 1, tensor_parallel, tensor_parallel * p)
        shares += [share] * tensor_parallel
    return tuple(shares)
