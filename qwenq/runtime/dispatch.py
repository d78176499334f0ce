"""A model over several devices: what moves where while it runs, through accelerate's hooks.

- Layers on another GPU than the embedding have their inputs brought there. Blocks that find their inputs in place get
  no hook: one on every module, as `dispatch_model` sets, costs 0.5 ms a layer and token (reports/LOG.md).
- Layers in host memory are copied to the GPU whole, when their turn comes, and let go of afterwards. The same blocks of
  the allocator serve one layer after the other.
- With layers on disk everything goes through `dispatch_model`, which reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from accelerate.utils import offload_weight, save_offload_index, send_to_device
from torch import nn

DISK = "disk"
CACHE = "past_key_values"  # knows by itself where its tensors are

DeviceMap = Mapping[str, int | str]


def compute_device(place: int | str, device_map: DeviceMap) -> torch.device:
    """Where a module at `place` computes: host memory and disk feed the first GPU, or the CPU where there is none."""
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


def dispatch(network: Any, device_map: DeviceMap, offload_directory: Path | None, index: dict[str, Any]) -> None:
    """Have every module of `device_map` compute where it should. `index`: of what lies in `offload_directory`."""
    network.hf_device_map = dict(device_map)
    if DISK in device_map.values():
        _dispatch_with_disk(network, device_map, offload_directory, index)
        return
    before = main = compute_device(device_map["model.embed_tokens"], device_map)
    for name, place in device_map.items():
        device, module = compute_device(place, device_map), network.get_submodule(name)
        if name == "model.rotary_emb":
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
