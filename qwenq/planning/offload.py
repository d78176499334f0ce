"""Layers that are not on a GPU: which stay in host memory, which go to disk, and what a run on a CPU needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwenq.model.spec import ModelSpec
from qwenq.planning.engines import Engine, get_engine, kv_bytes_per_value
from qwenq.planning.memory import NOT_ALLOCATED, whole
from qwenq.planning.rig import device
from qwenq.planning.terms import Term, Workload
from qwenq.planning.torch_terms import run_weights, torch_terms
from qwenq.planning.weights import Weights

NOT_ON_A_CPU = (*NOT_ALLOCATED, "non_torch")
DeviceMap = dict[str, int | str]


@dataclass(frozen=True)
class HostNeed:
    """Bytes a run takes in host memory beyond the empty process."""

    terms: tuple[Term, ...]

    @property
    def total_bytes(self) -> int:
        return sum(term.n_bytes for term in self.terms)


def host_map(spec: ModelSpec) -> DeviceMap:
    """Everything on the CPU, under transformers' module names."""
    layers = {f"model.layers.{layer}": "cpu" for layer in range(spec.num_hidden_layers)}
    return {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", **layers, "model.norm": "cpu", "lm_head": "cpu"}


def spill_to_disk(devices: DeviceMap, weights: Weights, room_bytes: int) -> DeviceMap:
    """The same map with the last of the CPU's layers on `disk`, so that the others take at most `room_bytes`."""
    found, taken, full = dict(devices), 0, False
    for layer, n_bytes in enumerate(weights.layer_bytes):
        name = f"model.layers.{layer}"
        if devices[name] == "cpu":
            taken += n_bytes
            full = full or taken > room_bytes
            if full:
                found[name] = "disk"
    return found


def host_layers_bytes(
    spec: ModelSpec, layer_bytes: Sequence[int], engine: Engine, work: Workload, gpu_layers: int
) -> int:
    """What layers that are not on a GPU still take on the first one: their KV cache, and one of them while it runs."""
    out = spec.num_hidden_layers - gpu_layers
    if out == 0 or engine.name == "llama.cpp":
        return 0
    value = kv_bytes_per_value(engine, work.kv_dtype)
    kv = 2 * out * spec.kv_size * value * work.context * work.batch
    return round(kv) + max(layer_bytes[gpu_layers:])


def host_need(spec: ModelSpec, weights: Weights, work: Workload, phase: str = "") -> HostNeed:
    """Weights, cache and working memory of a run on a CPU."""
    engine = get_engine("qwenq")
    weights = run_weights(weights, engine, work, device("CPU"))
    terms, _ = torch_terms(spec, weights, engine, work, whole(spec), device("CPU"), phase)
    found = []
    for term in terms:
        if term.name not in NOT_ON_A_CPU:
            # bytes of the tensors: what a CUDA allocator adds to them does not happen here
            n_bytes = weights.total_bytes if term.name == "weights" else term.n_bytes
            found.append(replace(term, n_bytes=n_bytes, low_bytes=n_bytes, high_bytes=n_bytes))
    return HostNeed(tuple(found))
