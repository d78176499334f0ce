"""What the planner says of a finished checkpoint: on rigs, against context, and cut over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from qwenq.errors import QwenqError, UsageError
from qwenq.headers import shown
from qwenq.planning.engines import Engine, get_engine
from qwenq.planning.memory import MemoryEstimate, estimate
from qwenq.planning.models import load_model, model_weights
from qwenq.planning.parallel import best_option, cutting_reasons, largest_vllm_context, parallel_options
from qwenq.planning.placement import largest_context
from qwenq.planning.plan import runs_on
from qwenq.planning.rig import Rig, parse_rig
from qwenq.planning.terms import Workload
from qwenq.planning.weights import Weights
from qwenq.report.runs import Run
from qwenq.spec import ModelSpec

RIGS = (
    "RTX 3060 12GB", "RTX 5080", "RTX 4090", "RTX 5090", "2x RTX 3060 12GB", "2x RTX 3090", "2x RTX 5090",
    "3x RTX 3090", "4x RTX 3090", "RTX A6000", "RTX PRO 6000 Blackwell", "A100 PCIe 80GB", "H200 SXM 141GB",
)  # fmt: skip
REFERENCE_GPUS = ("RTX 3060 12GB", "RTX 5080", "RTX 4090", "RTX 5090", "RTX A6000", "A100 PCIe 80GB", "H200 SXM 141GB")
RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Loaded:
    """A run's checkpoint as the planner sees it, from config.json and the shards' headers."""

    run: Run
    spec: ModelSpec
    weights: Weights
    quantization: str  # quant_method of config.json, or gptq_v2
    mixed: bool

    @property
    def tensor_parallel(self) -> dict[int, str]:
        """Ranks to the reason why the shapes forbid them; empty when they do not."""
        return {n: next(iter(cutting_reasons(self.spec, self.weights, n)), "") for n in RANKS}


def load(run: Run, engine: str) -> Loaded | str:
    """The checkpoint beside the manifest, or why it cannot be planned with."""
    if not any(run.directory.glob("*.safetensors")):
        return f"{run.name}: no tensors beside its manifest"
    try:
        model = load_model(str(run.directory))
        weights = model_weights(model, engine)
    except QwenqError as error:
        return f"{run.name}: {error.message}"
    quantization = model.config.get("quantization_config")
    method = "none"
    if isinstance(quantization, dict):
        method = str(quantization.get("quant_method", "bitsandbytes"))
        if quantization.get("checkpoint_format") == "gptq_v2":
            method = "gptq_v2"
    schemes = {scheme for layer in run.layers for scheme in layer.schemes}
    return Loaded(run, model.spec, weights, shown(method, 40), len(schemes) > 1)


def longest_context(loaded: Loaded, rig: Rig, engine: Engine) -> int | None:
    """Most tokens of one sequence with everything on the rig's GPUs; 0 when none, None where the engine cannot run."""
    if not all(runs_on(engine, gpu) for gpu in rig.gpus):
        return None
    spec, weights, work = loaded.spec, loaded.weights, Workload(1)
    if engine.layered:
        return largest_context(spec, weights, rig, engine, work)
    option = best_option(parallel_options(spec, weights, engine, work, rig))
    return largest_vllm_context(spec, weights, engine, work, rig, option) if option else 0


def contexts_of(spec: ModelSpec) -> list[int]:
    """Powers of two from 1,024 (less for small models) to the model's longest context, and that one."""
    limit = spec.extended_context
    first = min(1024, max(1, limit // 4))
    found = []
    while first < limit:
        found.append(first)
        first *= 2
    return [*found, limit]


def memory_by_context(loaded: Loaded, engine: Engine) -> list[MemoryEstimate]:
    """The estimate at each context, everything on one GPU."""
    spec, weights = loaded.spec, loaded.weights
    return [estimate(spec, weights, engine, Workload(context)) for context in contexts_of(spec)]


def rigs_named(names: tuple[str, ...]) -> list[Rig]:
    """The rigs asked for, or those people have; PlanError for one that nobody knows."""
    return [parse_rig(name) for name in names or RIGS]


def engine_named(name: str) -> Engine:
    """The engine; PlanError for one that nobody knows, or that reads none of these checkpoints."""
    if name == "llama.cpp":
        raise UsageError("llama.cpp reads GGUF, not these checkpoints", hint="--engine qwenq, transformers or vllm")
    return get_engine(name)
