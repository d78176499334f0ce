"""This machine's GPUs as the driver tells them, and as CUDA's environment variables leave them; a driver made up."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwenq import machine
from qwenq.errors import PlanError
from qwenq.formats.base import Recipe, Scheme
from qwenq.model.spec import family_spec
from qwenq.planning.case import Case, Workload
from qwenq.planning.engines.base import get_engine, plan_commands
from qwenq.planning.plan import make_plan
from qwenq.planning.rig import detect_rig, known_gpu, sees_gpu
from qwenq.planning.weights import recipe_weights
from qwenq.units import GIB
from tests.conftest import run


@dataclass(frozen=True)
class Card:
    name: str
    uuid: str
    memory: float = 23.6
    capability: tuple[int, int] | None = (8, 6)


class NVMLError(Exception):
    pass


def driver(*cards: Card) -> SimpleNamespace:
    def capability(card: Card) -> tuple[int, int]:
        if card.capability is None:
            raise NVMLError("not supported")
        return card.capability

    def memory(card: Card) -> SimpleNamespace:
        return SimpleNamespace(total=int(card.memory * GIB), free=int((card.memory - 1) * GIB))

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda index: cards[index],
        nvmlDeviceGetHandleByUUID=lambda uuid: Card("NVIDIA A30 MIG 1g.6gb", uuid, 5.8, (8, 0)),
        nvmlDeviceGetName=lambda card: card.name,
        nvmlDeviceGetUUID=lambda card: card.uuid,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetCudaComputeCapability=capability,
    )


A = Card("NVIDIA GeForce RTX 3060", "GPU-aaaa-1", 12.0)
B = Card("NVIDIA GeForce RTX 4090", "GPU-abbb-2", 23.99, (8, 9))
C = Card("NVIDIA GeForce RTX 3090", "GPU-cccc-3", 24.0)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(sys.modules, "pynvml", driver(A, B, C))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("visible", "label"),
    [
        (None, "RTX 3060 12GB + RTX 4090 + RTX 3090"),
        ("2,0", "RTX 3090 + RTX 3060 12GB"),
        (" 1 ", "RTX 4090"),
        ("GPU-cccc-3", "RTX 3090"),
        ("GPU-ab,GPU-c", "RTX 4090 + RTX 3090"),
        ("0,7,1", "RTX 3060 12GB"),  # what follows an unknown number does not count
        ("1,GPU-a,0", "RTX 4090"),  # two begin like that
        ("MIG-1234", "NVIDIA A30 MIG 1g.6gb"),
    ],
)
def test_visible_gpus(visible: str | None, label: str, three: pytest.MonkeyPatch) -> None:
    if visible is not None:
        three.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect_rig().label == label and sees_gpu()


@pytest.mark.parametrize("visible", ["", "-1", "9", "NoDevFiles", "99999999999999999999"])
def test_no_gpu_left(visible: str, three: pytest.MonkeyPatch) -> None:
    three.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(PlanError, match="leaves no GPU, the driver sees 3") as caught:
        detect_rig()
    assert "unset CUDA_VISIBLE_DEVICES" in caught.value.hint and not sees_gpu()


def test_free_memory_and_capabilities_are_the_visible_ones(three: pytest.MonkeyPatch) -> None:
    three.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    rig = detect_rig()
    assert rig.free_bytes == (23 * GIB, int(22.99 * GIB))
    assert [gpu.compute_capability for gpu in rig.gpus] == [(8, 6), (8, 9)]


@pytest.mark.parametrize(("free", "told"), [(0, 0), (5 * GIB, 5 * GIB), (1 << 60, None)])
def test_host_memory_of_which_nothing_is_free_is_known(free: int, told: int | None, three: pytest.MonkeyPatch) -> None:
    """A container at its limit has no room for layers; only a system that does not tell has no limit."""
    three.setenv("CUDA_VISIBLE_DEVICES", "0")
    three.setattr("qwenq.planning.rig.available_ram", lambda: free)
    assert detect_rig().host_bytes == told
    host = json.loads(run("plan", "Qwen2.5-32B", "--detect", "--json").stdout)["host"]
    assert (host["limit_bytes"], host["fits"]) == (told, None if told is None else False)


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    with pytest.raises(PlanError, match="the NVIDIA driver sees no GPU"):
        detect_rig()


def test_unknown_gpus_keep_their_memory_and_capability() -> None:
    gpu = known_gpu("NVIDIA GeForce RTX 2060", 6 * GIB, (7, 5))
    assert (gpu.limit_bytes, gpu.compute_capability, gpu.bandwidth_gb_s) == (6 * GIB, (7, 5), None)
    # a name of two cards goes by the memory, and a memory of none is of none
    assert known_gpu("NVIDIA GeForce RTX 4060 Ti", 8 * GIB, (8, 9)).name == "RTX 4060 Ti 8GB"
    assert known_gpu("NVIDIA GeForce RTX 3060", 8 * GIB, (8, 6)).bandwidth_gb_s is None
    assert known_gpu("NVIDIA GeForce RTX 3090", 24 * GIB, None).compute_capability == (8, 6)


def test_a_driver_that_tells_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "pynvml", driver(Card("Tesla T4", "GPU-1", 15.8, None), Card("X", "GPU-2", 8, None))
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.compute_capability for gpu in detect_rig().gpus] == [(7, 5), None]


@pytest.mark.parametrize("silent", [NVMLError("not supported"), 0])
def test_a_gpu_that_shares_the_systems_memory_has_what_the_system_has_free(
    silent: NVMLError | int, three: pytest.MonkeyPatch
) -> None:
    """DGX Spark: the driver refuses to tell its memory, or tells none."""
    made = driver(Card("NVIDIA GB10", "GPU-1", 0, (12, 1)))

    def memory(card: Card) -> SimpleNamespace:
        if isinstance(silent, NVMLError):
            raise silent
        return SimpleNamespace(total=silent, free=silent)

    made.nvmlDeviceGetMemoryInfo = memory
    three.setitem(sys.modules, "pynvml", made)
    three.setattr("qwenq.planning.rig.total_memory", lambda: int(119.6 * GIB))
    three.setattr("qwenq.planning.rig.available_ram", lambda: 100 * GIB)
    rig = detect_rig()
    assert rig.label == "DGX Spark (GB10)" and rig.limits == (100 * GIB,) and sees_gpu()
    done = run("plan", "Qwen2.5-72B", "--detect", "--json")
    assert done.exit_code == 0
    assert "NVIDIA GB10: the driver reports no memory, so the system's free memory is used: 100.00 GiB" in done.stderr
    three.setattr("qwenq.planning.rig.available_ram", lambda: 0)  # its container is full
    assert detect_rig().limits == (0,)
    three.setattr("qwenq.planning.rig.available_ram", lambda: 1 << 60)  # a system that tells nothing either
    with pytest.raises(PlanError, match="neither the driver nor the system reports its memory"):
        detect_rig()


@pytest.mark.parametrize(
    ("cards", "order", "needed"),
    [((A, B), "", True), ((A, B), "FASTEST_FIRST", True), ((A, B), "PCI_BUS_ID", False), ((C, C), "", False)],
)
def test_the_order_of_different_gpus(
    cards: tuple[Card, ...], order: str, needed: bool, three: pytest.MonkeyPatch
) -> None:
    three.setitem(sys.modules, "pynvml", driver(*cards))
    if order:
        three.setenv("CUDA_DEVICE_ORDER", order)
    spec = family_spec("Qwen2.5-7B")
    assert spec is not None
    weights = recipe_weights(spec, Recipe(Scheme(4, 128)))
    plan = make_plan(Case(spec, weights, get_engine("qwenq"), Workload(2048), detect_rig()))
    commands = plan_commands(plan)
    setting = "CUDA_DEVICE_ORDER=PCI_BUS_ID "
    assert commands["vllm"].splitlines()[-1].startswith(setting + "vllm serve" if needed else "vllm serve")
    assert commands["llama.cpp"].startswith(setting + "llama-server" if needed else "llama-server")
    assert ("CUDA_DEVICE_ORDER" in commands["transformers"]) == needed
    assert any("CUDA_DEVICE_ORDER=PCI_BUS_ID" in note for note in plan.notes) == needed


GROUPS = {
    "version 2, by the group around it": (
        "0::/docker/abc\n",
        {
            "docker/abc": {"memory.max": "max", "memory.current": 10 * GIB},
            "docker": {"memory.max": 8 * GIB, "memory.current": 6 * GIB},
        },
        "",
    ),
    "version 1, seen from inside": (
        "4:cpu,memory:/docker/abc\n0::/\n",
        {"memory": {"memory.limit_in_bytes": 8 * GIB, "memory.usage_in_bytes": 6 * GIB}},
        "total_",
    ),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_a_container_has_its_share_of_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 GiB it may use 8; of the 6 in use 1.5 are file pages, which are given up on demand."""
    line, groups, prefix = GROUPS[kind]
    (tmp_path / "own").write_text(line)
    for group, files in groups.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (tmp_path / group / name).write_text(f"{value}\n")
        pages = {"anon": 4 * GIB, "active_file": GIB, "inactive_file": GIB // 2}
        rows = "".join(f"{prefix}{name} {value}\n" for name, value in pages.items())
        (tmp_path / group / "memory.stat").write_text(rows)
    page = os.sysconf("SC_PAGE_SIZE")
    sizes = {"SC_PAGE_SIZE": page, "SC_PHYS_PAGES": 64 * GIB // page}
    monkeypatch.setattr(machine.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(machine, "_kibibytes", lambda path, name: 60 * GIB)
    for groups_at, total, free in ((tmp_path / "none", 64, 60), (tmp_path, 8, 3.5)):
        monkeypatch.setattr(machine, "_OWN_CGROUPS", groups_at / "own")
        monkeypatch.setattr(machine, "_CGROUPS", groups_at)
        assert (machine.total_memory(), machine.available_ram()) == (total * GIB, free * GIB)
