"""Placement handed to accelerate, without GPUs: uneven rigs, every tensor once, no device over its limit, shortages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import model as family
from torch import nn

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import HonestNo, QwenqError, RunError
from qwenq.formats.base import Recipe, Scheme
from qwenq.machine import Compute
from qwenq.model import devices
from qwenq.model.architectures import ARCHITECTURES
from qwenq.model.spec import ModelSpec
from qwenq.pipeline import monitor
from qwenq.planning.case import Case, Workload
from qwenq.planning.engines.torch import OWN
from qwenq.planning.placement import host_map, place
from qwenq.planning.rig import Rig, find_gpu, parse_rig
from qwenq.planning.weights import Weights, recipe_weights
from qwenq.runtime import model
from qwenq.runtime import peaks as memory
from qwenq.runtime.load import LoadPlan, plan_load
from qwenq.runtime.model import CheckpointWeights, build_model, compute_device
from qwenq.runtime.synthetic import synthetic_config
from qwenq.units import GIB

BF16 = torch.bfloat16
CPU = torch.device("cpu")
RIGS = ["2x RTX 3090", "RTX 4090 + 2x RTX 3060 12GB", "RTX 3060 12GB + RTX 4090", "RTX 3060 12GB", "4x RTX 3090"]


def planned(spec: ModelSpec, rig: Rig, context: int, room: int = 1 << 40) -> tuple[LoadPlan, Weights]:
    weights = recipe_weights(spec, Recipe(Scheme(4, 128)))
    return plan_load(Case(spec, weights, OWN, Workload(context, prefill_chunk=1024), rig), room), weights


@pytest.mark.parametrize("rig", RIGS)
@pytest.mark.parametrize("name", ["Qwen2.5-72B", "Qwen2.5-32B", "Qwen2.5-3B"])  # the last one's head is tied
def test_every_module_has_one_place_and_no_gpu_is_over_its_limit(name: str, rig: str) -> None:
    spec, gpus = family(name), parse_rig(rig)
    plan, weights = planned(spec, gpus, 4096)
    assert set(plan.device_map) == set(host_map(spec))
    with torch.device("meta"):  # accelerate's own check: every tensor is under exactly one key
        network = model._empty_network(synthetic_config(spec), spec, BF16)
    names = [n for n, _ in network.named_parameters()]
    for tensor in names:
        assert sum(tensor.startswith(key + ".") for key in plan.device_map) == 1, tensor
    used = [0] * len(gpus.gpus)
    for layer, n_bytes in enumerate(weights.layer_bytes):
        where = plan.device_map[f"model.layers.{layer}"]
        if isinstance(where, int):
            used[where] += n_bytes
    for index, (n_bytes, limit) in enumerate(zip(used, gpus.limits, strict=True)):
        assert n_bytes < limit
        predicted = [value for device, value in plan.predicted.items() if device.startswith(f"GPU {index} ")]
        assert all(n_bytes <= value <= limit for value in predicted)
    places = [plan.device_map[f"model.layers.{layer}"] for layer in range(spec.num_hidden_layers)]
    order = {**{index: index for index in range(9)}, "cpu": 10, "disk": 11}
    assert [order[place] for place in places] == sorted(order[place] for place in places)  # GPU after GPU, then host


def test_the_map_is_the_planners_own() -> None:
    spec, rig = family("Qwen2.5-32B"), parse_rig("RTX 4090 + RTX 3060 12GB")
    plan, weights = planned(spec, rig, 4096)
    work = Workload(4096, prefill_chunk=1024)
    assert plan.device_map == place(Case(spec, weights, OWN, work, rig)).device_map()


def test_what_host_memory_cannot_take_goes_to_disk() -> None:
    spec, rig = family("Qwen2.5-72B"), parse_rig("RTX 3090")
    plan, weights = planned(spec, rig, 4096)
    assert plan.disk_bytes == 0 and "stay in host memory" in plan.reason
    tight, _ = planned(spec, rig, 4096, room=10 * GIB)
    inside = [k for k in range(80) if tight.device_map[f"model.layers.{k}"] == "cpu"]
    assert 0 < len(inside) < 80 and sum(weights.layer_bytes[k] for k in inside) <= 10 * GIB
    assert tight.disk_bytes > 0 and "layers on disk" in tight.reason
    on_gpus = {k: v for k, v in plan.device_map.items() if isinstance(v, int)}
    assert {k: v for k, v in tight.device_map.items() if isinstance(v, int)} == on_gpus


def test_memory_that_others_hold_is_named() -> None:
    spec, gpu = family("Qwen2.5-72B"), find_gpu("RTX 3090")
    rig = Rig((gpu,), free_bytes=(3 * GIB,))
    with pytest.raises(QwenqError) as caught:
        planned(spec, rig, 4096)
    text = caught.value.message
    assert text.startswith("GPU 0 RTX 3090: needs ") and "3.00 GiB are free" in text and text.endswith(" short")
    assert "are taken by other processes" in text and caught.value.hint
    assert not isinstance(caught.value, HonestNo)


def test_each_gpu_of_a_mixed_rig_counts_what_it_keeps_itself() -> None:
    """A T4 keeps scales and packed zero points as they are, 2.5 bytes a group, where a 3090's kernel keeps 4."""
    spec = family("Qwen2.5-32B")
    weights = recipe_weights(spec, Recipe(Scheme(4, 32, sym=False)))
    work, rig = Workload(512, prefill_chunk=64), parse_rig("Tesla T4 + RTX 3090")
    plan = plan_load(Case(spec, weights, OWN, work, rig), 1 << 40)
    layers = [layer for layer in range(64) if plan.device_map[f"model.layers.{layer}"] == 1]
    kept = weights.kept(Compute(capability=(8, 0))).layer_bytes
    plain = weights.kept(Compute(capability=(7, 0))).layer_bytes
    needed = sum(kept[layer] for layer in layers)
    assert len(layers) > 30 and needed - sum(plain[layer] for layer in layers) > 400_000_000
    assert plan.predicted["GPU 1 RTX 3090"] > needed + sum(weights.head)


def test_visible_gpus_and_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [(20 * GIB, 24 * GIB), (11 * GIB, 12 * GIB)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: free[index])
    names = ["NVIDIA GeForce RTX 3090", "Unheard-of 9000"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    kinds = [SimpleNamespace(total_memory=total, major=7, minor=5 + index) for index, (_, total) in enumerate(free)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: kinds[index])
    rig = memory.visible_rig()
    context = round(0.35 * GIB)  # of this process, which asking made, and which plans count
    limits = (20 * GIB + context, 11 * GIB + context)
    assert rig is not None and rig.label == "RTX 3090 + Unheard-of 9000" and rig.limits == limits
    assert [gpu.compute_capability for gpu in rig.gpus] == [(7, 5), (7, 6)], "what the GPU says, not its name"
    limited = memory.visible_rig([15 * GIB])
    assert limited is not None and limited.limits == (15 * GIB, 11 * GIB + context)
    each = memory.visible_rig([30 * GIB, 5 * GIB])
    assert each is not None and each.limits == (20 * GIB + context, 5 * GIB)
    with pytest.raises(RunError, match="3 limits, the number of GPUs is 2"):
        memory.visible_rig([1, 2, 3])


def test_devices_are_called_as_the_plan_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA GeForce RTX 3090")
    properties = SimpleNamespace(total_memory=24 * GIB, major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    plan, _ = planned(family("Qwen2.5-32B"), parse_rig("2x RTX 3090"), 4096)
    assert [monitor.device_name(torch.device("cuda", index)) for index in (0, 1)] == list(plan.predicted)
    assert monitor.device_name("cpu") == "CPU"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 24 * GIB))
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 23.58 GiB of which ..."
    with pytest.raises(RunError) as caught, monitor.memory_errors("computing", torch.device("cuda", 0), 7, "less"):
        raise torch.OutOfMemoryError(text)
    assert caught.value.message == (
        "GPU 1 RTX 3090: out of memory while computing: needs 2.50 GiB more, 1.00 GiB are free: 1.50 GiB short"
    )


def test_layers_in_host_memory_compute_where_their_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(model, "dispatch_model", lambda network, **options: told.update(options))
    places: dict[str, int | str] = {
        "model.embed_tokens": 1, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": "disk",
    }  # fmt: skip
    network = SimpleNamespace()
    model.dispatch(network, ARCHITECTURES["qwen2"], places, tmp_path, {})
    assert told["device_map"] == places == network.hf_device_map
    assert told["main_device"] == compute_device("cpu", places) == torch.device("cuda", 1)


def test_only_blocks_whose_input_comes_from_elsewhere_are_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs and host memory, in the order of a plan: where each hook brings its block's input."""
    places: dict[str, int | str] = {
        "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1,
        "model.layers.3": "cpu", "model.norm": 1, "lm_head": 0,
    }  # fmt: skip
    modules = {name: nn.Identity() for name in places}
    names = {id(module): name for name, module in modules.items()}
    hooked: dict[str, tuple[str, torch.device]] = {}

    def add_hook(module: nn.Module, hook: Any) -> None:
        device = hook.device if isinstance(hook, model.HostMemoryHook) else hook.execution_device
        hooked[names[id(module)]] = type(hook).__name__, device

    monkeypatch.setattr(model, "add_hook_to_module", add_hook)
    network = SimpleNamespace(get_submodule=modules.__getitem__)
    model.dispatch(network, ARCHITECTURES["qwen2"], places, None, {})
    first, second = (torch.device("cuda", index) for index in (0, 1))
    assert hooked == {
        "model.layers.1": ("AlignDevicesHook", second),
        "model.layers.2": ("AlignDevicesHook", second),  # the rotary cosine and sine are on the first GPU
        "model.layers.3": ("HostMemoryHook", first),
        "model.norm": ("AlignDevicesHook", second),
        "lm_head": ("AlignDevicesHook", first),
    }
    assert network.hf_device_map == places


def test_weights_come_and_go_with_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are seen while the module computes and gone afterwards; a clone stands for a copy to a GPU."""
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).requires_grad_(False)
    x = torch.randn(3, 8)
    wanted, kept = module(x), dict(module.named_parameters())
    copied: list[tuple[int, ...]] = []

    def to(value: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if value is not x:
            copied.append(tuple(value.shape))
        return value.clone()

    model.add_hook_to_module(module, model.HostMemoryHook(torch.device("cpu")))
    inside: list[torch.Tensor] = []
    module[0].register_forward_pre_hook(lambda m, args: inside.append(m.weight))
    monkeypatch.setattr(torch.Tensor, "to", to)
    for _ in range(2):
        assert torch.equal(module(x), wanted)
    assert all(weight is not kept["0.weight"] for weight in inside) and len(inside) == 2
    assert copied == 2 * [tuple(p.shape) for p in kept.values()]
    assert all(p is kept[name] for name, p in module.named_parameters())


def test_damaged_copies_and_gpus_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def arange(count: int, device: torch.device) -> Any:
        sent = torch.zeros(count)
        damaged = sent + (device.index == 1)  # what GPU 1 sends does not arrive
        return SimpleNamespace(to=lambda target: damaged, cpu=lambda: sent)

    monkeypatch.setattr(devices, "torch", SimpleNamespace(arange=arange, equal=torch.equal, cuda=torch.cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_120a", "compute_120"])
    first, second = (torch.device("cuda", index) for index in (0, 1))
    devices.check_gpus([CPU, first, first])
    with pytest.raises(RunError, match="copies from cuda:1 to cuda:0 arrive damaged"):
        devices.check_gpus([first, second])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    with pytest.raises(
        RunError, match=r"cuda:0 Tesla V100: compute capability 7.0, this build of torch needs at least 7.5"
    ):
        devices.check_gpus([first])


def test_where_modules_compute() -> None:
    places: dict[str, int | str] = {"a": 1, "b": "cpu", "c": "disk"}
    assert compute_device("cpu", places) == torch.device("cuda", 1) == compute_device("disk", places)
    assert compute_device("cpu", {"a": "cpu"}) == torch.device("cpu")


def test_weights_go_straight_to_their_device(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices played by `meta`: each tensor is read once and asked for on the device of its module."""
    checkpoint = open_checkpoint(tiny)
    places: dict[str, int | str] = host_map(checkpoint.spec) | {
        "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1,
    }  # fmt: skip
    asked: list[tuple[str, torch.device]] = []
    handed: list[dict[str, int | str]] = []

    class Watched(CheckpointWeights):
        def tensor(self, name: str, device: torch.device) -> torch.Tensor:
            asked.append((name, device))
            return super().tensor(name, torch.device("cpu"))

    def moved(module: nn.Module, *unused: object) -> nn.Module:
        return module

    monkeypatch.setattr(model, "settled", moved)
    monkeypatch.setattr(model, "dispatch", lambda network, names, devices, *unused: handed.append(dict(devices)))
    build_model(Watched(checkpoint), checkpoint.config, checkpoint.spec, places, dtype=torch.float32)
    assert handed == [places]
    assert sorted(name for name, _ in asked) == sorted(checkpoint.tensors)
    for name, device in asked:
        key = next(key for key in places if name.startswith(key + "."))
        assert device == compute_device(places[key], places), name
