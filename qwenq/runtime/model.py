"""transformers' model without weights, its linears replaced by packed ones, one tensor after another from the shards.

Weights go straight to the device they stay on: a GPU load needs host memory for one tensor at a time, a CPU load the
packed bytes and one linear unpacked. Nothing is ever decompressed to 16 bit as a whole.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from accelerate.utils import offload_weight, save_offload_index, send_to_device
from torch import Tensor, nn

from qwenq.checkpoint.reader import Checkpoint
from qwenq.formats.base import get_format
from qwenq.formats.gguf import Blocks
from qwenq.io.tensors import TORCH_DTYPES
from qwenq.machine import return_freed_memory
from qwenq.model.architectures import Architecture
from qwenq.model.layer import model_config, refused_by_transformers
from qwenq.model.spec import LinearSpec, ModelSpec
from qwenq.pipeline.monitor import memory_errors
from qwenq.planning.kernels import Choice
from qwenq.runtime.cache import ATTENTION, register
from qwenq.runtime.linear import BlockEmbedding, CpuLinear, PackedEmbedding, StoredLinear, block_head, packed_linear

DeviceMap = Mapping[str, int | str]  # name of a module: the index of a GPU, `cpu` or `disk`


@dataclass(frozen=True)
class RunningModel:
    """A model ready to compute: input ids on `device` to logits, weights where `device_map` says."""

    network: Any  # transformers' ...ForCausalLM
    spec: ModelSpec
    dtype: torch.dtype
    device_map: DeviceMap
    choices: Mapping[str, Choice]  # by linear name; 16-bit linears have none

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return compute_device(self.device_map[self.spec.architecture.embedding], self.device_map)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device that computes, in order."""
        found = {compute_device(place, self.device_map): None for place in self.device_map.values()}
        return tuple(found)

    def kernels(self) -> dict[str, int]:
        """Number of linears for each kind of kernel."""
        kinds = [choice.kind for choice in self.choices.values()]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def fallbacks(self) -> dict[str, int]:
        """Why linears are not on a faster kernel, and how many each reason concerns."""
        reasons = [choice.reason for choice in self.choices.values() if choice.reason]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


class StoredEmbedding(nn.Module):
    """The embedding table as stored; rows are converted to the activations' dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.dtype)


class Weights(Protocol):
    """Source of weights: shards, or random numbers (`synthetic`)."""

    def tensor(self, name: str, device: torch.device) -> Tensor: ...

    def table(self, name: str, device: torch.device) -> Tensor | Blocks: ...

    def linear(self, lin: LinearSpec, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Choice | None]: ...


class CheckpointWeights:
    """Weights read from shards, one tensor at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def tensor(self, name: str, device: torch.device) -> Tensor:
        return self._finite(name, self.checkpoint.read(name).to(device))

    def table(self, name: str, device: torch.device) -> Tensor | Blocks:
        """Embedding or head: as a tensor, or as a GGUF file has it."""
        kind = self.checkpoint.tensors[name].spec.dtype
        if kind in TORCH_DTYPES:
            return self.tensor(name, device)
        return Blocks(kind, self.checkpoint.read_packed(name).to(device))

    def _finite(self, name: str, value: Tensor) -> Tensor:
        if value.ndim == 1:
            self.checkpoint.refuse_non_finite(name, value)
            if name.endswith(".weight"):  # a norm's
                self.checkpoint.refuse_blank(name, value)
        return value

    def linear(self, lin: LinearSpec, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Choice | None]:
        """The module of one linear; no choice where it is stored in 16 bit."""
        bias = self.tensor(lin.name + ".bias", device) if lin.bias else None
        stored = self.checkpoint.quantized
        scheme = stored.scheme_of(lin.name) if stored is not None else None
        if stored is None or scheme is None:
            weight = self.tensor(lin.name + ".weight", device)
            # in the activations' dtype when that is 16 bit too
            return StoredLinear(weight if dtype == torch.float32 else weight.to(dtype), bias, dtype), None
        form = get_format(stored.format)
        names = self.checkpoint.packed_names(lin)
        packed = {
            name.removeprefix(lin.name + "."): self._finite(name, self.checkpoint.read_packed(name).to(device))
            for name in names
        }
        found, shape = form.unpack_to_run(packed, scheme, lin, stored.version), form.packed_shape(scheme, lin)
        assert shape is not None  # or it would not have been unpacked
        return packed_linear(found, shape, bias, dtype, device)


def build_model(
    weights: Weights,
    config: Mapping[str, Any],
    spec: ModelSpec,
    device_map: DeviceMap,
    *,
    dtype: torch.dtype,
    offload_directory: Path | None = None,
    listen: Callable[[int], None] = lambda layer: None,
) -> RunningModel:
    """Fill transformers' model from `weights` dispatched by accelerate as `device_map` says.

    `offload_directory` takes the layers that live on disk. `listen` is told each finished layer. RunError, naming the
    device, when memory does not suffice.
    """
    network = _empty_network(config, spec, dtype)
    choices: dict[str, Choice] = {}
    disk_index: dict[str, Any] = {}

    def place(module: str) -> tuple[int | str, torch.device]:
        return device_map[module], compute_device(device_map[module], device_map)

    def keep(name: str, module: nn.Module, where: int | str) -> None:
        network.set_submodule(name, settled(module, name, where, offload_directory, disk_index))

    names = spec.architecture
    where, device = place(names.embedding)
    with memory_errors("loading the embedding", device, 2 * spec.vocab_size * spec.hidden_size, _SMALLER):
        table = weights.table(spec.embedding_tensor, device)
        embedding, tied = _embedding(table, spec, dtype, device)
        keep(names.embedding, embedding, where)
    for layer in range(spec.num_hidden_layers):
        where, device = place(spec.layer_name(layer))
        linears = {lin.name: lin for lin in spec.layer_linears(layer)}
        need = max(lin.parameters for lin in linears.values()) * 5  # codes, and their packing in int32, in row blocks
        with memory_errors(f"loading layer {layer}", device, need, _SMALLER):
            for lin in linears.values():
                module, choice = weights.linear(lin, dtype, device)
                if choice is not None:
                    choices[lin.name] = choice
                keep(lin.name, module, where)
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # else the next weights settle in what unpacking freed, and leave holes
            for tensor in spec.layer_tensors(layer):
                owner = tensor.name.rpartition(".")[0]
                if owner not in linears:
                    norm = network.get_submodule(owner)
                    norm.weight = nn.Parameter(weights.tensor(tensor.name, device).to(dtype), requires_grad=False)
                    keep(owner, norm, where)
        return_freed_memory()  # what unpacking needed; the C library would keep it
        listen(layer)
    where, device = place(names.norm)
    norm = network.get_submodule(names.norm)
    norm.weight = nn.Parameter(weights.tensor(spec.norm_tensor, device).to(dtype), requires_grad=False)
    where, device = place(names.head)
    with memory_errors("loading the head", device, 2 * spec.vocab_size * spec.hidden_size, _SMALLER):
        head = table.to(device) if spec.tie_word_embeddings else weights.table(spec.head_tensor, device)
        keep(names.head, tied or _head(head, dtype, device), where)
    network.eval().requires_grad_(False)
    dispatch(network, names, device_map, offload_directory, disk_index)
    return_freed_memory()
    return RunningModel(network, spec, dtype, dict(device_map), choices)


def _embedding(
    table: Tensor | Blocks, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, nn.Module | None]:
    """The embedding, and the head where that keeps the table for both."""
    if not isinstance(table, Blocks):
        return StoredEmbedding(table, dtype), None
    if spec.tie_word_embeddings and isinstance(head := _head(table, dtype, device), CpuLinear):
        return PackedEmbedding(head, dtype), head
    return BlockEmbedding(table, dtype), None


def _head(table: Tensor | Blocks, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if isinstance(table, Blocks):
        return block_head(table, dtype, device)
    return StoredLinear(table, None, dtype, is_head=True)


_SMALLER = "lower --gpu-memory or --context to keep more in host memory, or close other programs on the device"


def modeling_code(spec: ModelSpec) -> Any:
    """transformers' module of the architecture; asked for early, its memory is not counted as the model's."""
    register()
    return importlib.import_module(spec.architecture.modules[1])


def _empty_network(config: Mapping[str, Any], spec: ModelSpec, dtype: torch.dtype) -> Any:
    modeling, prefix = modeling_code(spec), spec.architecture.classes
    settings = model_config(config, spec)
    settings._attn_implementation = ATTENTION
    settings.tie_word_embeddings = False  # a tied head is put in place below
    settings.dtype = dtype
    with refused_by_transformers(), init_empty_weights():
        return getattr(modeling, prefix + "ForCausalLM")(settings)


DISK = "disk"
CACHE = "past_key_values"  # knows by itself where its tensors are


def compute_device(place: int | str, device_map: DeviceMap) -> torch.device:
    """The device that computes a module at `place`: for host memory and disk the first GPU, or the CPU without one."""
    if isinstance(place, int):
        return torch.device("cuda", place)
    first = next((other for other in device_map.values() if isinstance(other, int)), None)
    return torch.device("cpu") if first is None else torch.device("cuda", first)


def settled(
    module: nn.Module, name: str, where: int | str, offload_directory: Path | None, index: dict[str, Any]
) -> nn.Module:
    """The module with its tensors where they stay: on their device, in host memory, or in a file and on `meta`.

    `index` collects what accelerate wants to know of files.
    """
    if isinstance(where, int):
        return module
    for path, parameter in list(module.named_parameters()):
        kept = parameter.detach().cpu()
        if where == DISK:
            assert offload_directory is not None
            offload_weight(kept, f"{name}.{path}", str(offload_directory), index)
            kept = torch.empty_like(kept, device="meta")
        owner, _, last = path.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(kept, requires_grad=False))
    return module


def dispatch(
    network: Any, names: Architecture, device_map: DeviceMap, offload_directory: Path | None, index: dict[str, Any]
) -> None:
    """Have every module of `device_map` compute where it should. `index`: of what lies in `offload_directory`."""
    network.hf_device_map = dict(device_map)
    if DISK in device_map.values():
        _dispatch_with_disk(network, device_map, offload_directory, index)
        return
    before = main = compute_device(device_map[names.embedding], device_map)
    for name, place in device_map.items():
        device, module = compute_device(place, device_map), network.get_submodule(name)
        if name == names.rotary:
            module.to(device)
        elif place == "cpu" and device.type == "cuda":
            add_hook_to_module(module, HostMemoryHook(device))
        elif (before, device) != (main, main):
            # later blocks there too: the rotary cosine and sine come from the first GPU
            add_hook_to_module(module, AlignDevicesHook(device, skip_keys=[CACHE]))
        before = device


class HostMemoryHook(ModelHook):
    """A module whose weights stay in host memory: on `device` while it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Remember the weights."""
        self.kept = [(m, name, p) for m in module.modules() for name, p in m.named_parameters(recurse=False)]
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Copy weights and inputs to the device."""
        for owner, name, parameter in self.kept:
            owner.register_parameter(name, nn.Parameter(parameter.detach().to(self.device), requires_grad=False))
        return send_to_device(args, self.device), send_to_device(kwargs, self.device, skip_keys=[CACHE])

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Let go of the copies."""
        for owner, name, parameter in self.kept:
            owner.register_parameter(name, parameter)
        return output


def _dispatch_with_disk(
    network: Any, device_map: DeviceMap, offload_directory: Path | None, index: dict[str, Any]
) -> None:
    save_offload_index(index, str(offload_directory))
    main = compute_device("cpu", device_map)
    logger = logging.getLogger("accelerate.big_modeling")
    logger.addFilter(_not_about_meta)
    try:
        dispatch_model(
            network,
            device_map=dict(device_map),
            main_device=main if main.type == "cuda" else "cpu",  # where layers in host memory compute
            offload_dir=str(offload_directory),
            skip_keys=[CACHE],
            force_hooks=True,
        )
    finally:
        logger.removeFilter(_not_about_meta)


def _not_about_meta(record: logging.LogRecord) -> bool:
    """Without the warning that some parameters are on `meta`, which is the point."""
    return "meta device" not in record.getMessage()
