"""GPUs and rigs: the catalogue, and `RTX 4090 + 2x RTX 3060 12GB` as people write it. An unknown figure stays None.

A GPU that the catalogue lacks goes by its memory, `2x 24GB`: whether a model fits is then known, how fast it runs not.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from qwenq.errors import PlanError, UsageError
from qwenq.machine import UNTOLD_RAM, available_ram, has_triton, total_memory
from qwenq.units import GIB, format_gib

_CATALOGUE = Path(__file__).parents[1] / "data" / "gpus.csv"
# Memory that the driver keeps, where nobody has published what CUDA sees: (GiB, part of the nameplate), the larger.
# GeForce cards that were measured keep 0.37 GiB of 12, 0.42 and 0.48 of 24, 0.65 of 32 (usable_note of the catalogue).
KEPT = (0.4, 0.02)
KEPT_RANGE = (0.5, 1.6)  # times that
KEPT_SAID = "assumed: 0.4 GiB or 2 % kept by the driver, 0.37 to 0.65 GiB on the GeForce cards that were measured"
MAX_GPUS = 64
GIVEN = "given"  # the source of a GPU named by its memory
_UNKNOWN = "not in the catalogue: only its memory size is known"


# Metal's recommendedMaxWorkingSetSize, from logs of llama.cpp: 11453 MB of 16 GiB, 17180 of 24, 22907 of 32 (two
# thirds), 28991 of 36, 51540 of 64 (three quarters); with recent macOS 12713, 19069, 26801, 55663.
METAL_PARTS = ((32, 2 / 3), (math.inf, 3 / 4))  # up to so many GiB, the part
RECENT_METAL = 0.74
METAL_SAID = (
    "Metal's share of the memory: two thirds up to 32 GB, three quarters beyond (llama.cpp logs; up to 81 % with "
    "recent macOS)"
)


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU as published. `memory_gib` is the nameplate, `usable_gib` what the driver offers a program."""

    name: str
    vendor: str
    memory_gib: float
    usable_gib: float | None = None
    bandwidth_gb_s: float | None = None
    tensor_tflops: float | None = None  # dense 16-bit matmuls with tensor cores
    nvlink_gb_s: float | None = None  # both directions; 0: none
    bus: str = ""
    power_w: float | None = None
    price_usd: float | None = None
    price_basis: str = ""  # launch price, approximate price, or empty
    source: str = ""
    note: str = ""
    tensor_derived: bool = False
    compute_capability: tuple[int, int] | None = None  # NVIDIA's; None: unknown, or of another vendor
    triton: bool = True  # whether Triton is installed beside it: known of this machine's GPUs, else taken to be so
    used_price_usd: float | None = None
    usable_note: str = ""

    @property
    def limit_bytes(self) -> int:
        """Bytes a program can hope for, before its own CUDA context."""
        return round((self.usable_gib if self.usable_gib is not None else self.memory_gib - self._kept_gib) * GIB)

    @property
    def limit_range(self) -> tuple[int, int]:
        """The least and most it may be: the same where it was published, more of a Mac's with a recent macOS."""
        if self.vendor == "apple" and self.usable_gib is not None:
            return self.limit_bytes, round(max(self.usable_gib, RECENT_METAL * self.memory_gib) * GIB)
        if self.usable_gib is not None:
            return self.limit_bytes, self.limit_bytes
        few, many = KEPT_RANGE
        return round((self.memory_gib - many * self._kept_gib) * GIB), round(
            (self.memory_gib - few * self._kept_gib) * GIB
        )

    @property
    def _kept_gib(self) -> float:
        return max(KEPT[0], KEPT[1] * self.memory_gib)

    @property
    def limit_source(self) -> str:
        if self.vendor == "apple":
            return METAL_SAID
        if self.usable_gib is not None:
            return "published"
        low, high = self.limit_range
        return f"{KEPT_SAID}; {low / GIB:.2f} to {high / GIB:.2f} GiB here"

    @property
    def unified(self) -> bool:
        """Memory shared with the operating system."""
        return self.vendor == "apple" or "GB10" in self.name


@dataclass(frozen=True)
class Rig:
    """GPUs of one machine, in device order. `free_bytes` holds measured limits where the machine was asked."""

    gpus: tuple[Gpu, ...]
    free_bytes: tuple[int, ...] = ()
    reserve_bytes: int = 0  # kept free on every GPU, for a desktop for instance
    host_bytes: int | None = None  # of the machine's own memory; None: unknown
    needs_pci_order: bool = False  # CUDA may number these GPUs otherwise, unless CUDA_DEVICE_ORDER=PCI_BUS_ID
    notes: tuple[str, ...] = ()  # how a limit was found, where the driver did not tell

    @property
    def unified_bytes(self) -> int:
        """Memory that GPUs share with the operating system."""
        return round(sum(gpu.memory_gib for gpu in self.gpus if gpu.unified) * GIB)

    @property
    def host_memory(self) -> int | None:
        """Bytes of the machine's own memory: as told, else those of unified GPUs; None: unknown."""
        return self.unified_bytes or None if self.host_bytes is None else self.host_bytes

    @property
    def limits(self) -> tuple[int, ...]:
        """Usable bytes of each GPU."""
        found = self.free_bytes or tuple(gpu.limit_bytes for gpu in self.gpus)
        return tuple(max(0, limit - self.reserve_bytes) for limit in found)

    @property
    def limit_slack(self) -> tuple[tuple[int, int], ...]:
        """Bytes by which each limit may be less and more; none of measured ones."""
        if self.free_bytes:
            return ((0, 0),) * len(self.gpus)
        return tuple(
            (gpu.limit_bytes - low, high - gpu.limit_bytes) for gpu in self.gpus for low, high in (gpu.limit_range,)
        )

    @property
    def label(self) -> str:
        """`RTX 4090 + 2x RTX 3060 12GB`."""
        runs: list[tuple[str, int]] = []
        for gpu in self.gpus:
            if runs and runs[-1][0] == gpu.name:
                runs[-1] = (gpu.name, runs[-1][1] + 1)
            else:
                runs.append((gpu.name, 1))
        return " + ".join(f"{count}x {name}" if count > 1 else name for name, count in runs)


def device(name: str) -> Gpu:
    """A device that is no GPU of a rig: the `CPU`, or some `GPU`."""
    return Gpu(name, vendor="", memory_gib=0)


@cache
def catalogue() -> tuple[Gpu, ...]:
    """Every known GPU, from the shipped table."""
    import csv

    text = _CATALOGUE.read_text(encoding="utf-8")
    return tuple(_gpu(row) for row in csv.DictReader(text.splitlines()))


def find_gpu(name: str) -> Gpu:
    """The GPU people mean by `name`; UsageError with near matches, or with the variants when several are meant."""
    if memory := _MEMORY.fullmatch(name):
        return _by_memory(name.strip(), float(memory[1]))
    if memory := _MAC.fullmatch(name):
        return _mac(float(memory[1] or memory[2]))
    if re.fullmatch(r"\s*\d{1,3}\s*", name):
        raise UsageError(f"GPU {name!r} has no unit", hint=f'for any card with so much memory: "{name.strip()}GB"')
    found = matching_gpus(name)
    others = [other for gpu in found for other in _UNLISTED.get(gpu.name, ()) if _stated_memory(name) is None]
    if len(found) == 1 and not others:
        return found[0]
    if found:
        hint = f"one of: {', '.join([*(gpu.name for gpu in found), *others])}"
        if others:
            hint += f' (not in the catalogue; "{_stated_memory(others[0]):g}GB" plans by its memory)'
        raise UsageError(f"GPU {name.strip()[:60]!r} is ambiguous", hint=hint)
    by_key = {_key(gpu.name): gpu.name for gpu in catalogue()}
    words = set(_key(name).split())
    near = [key for key in by_key if words and words <= set(key.split())]  # the 5060 Ti, where a 5060 is asked for
    near += [key for key in difflib.get_close_matches(_key(name), by_key, n=4, cutoff=0.5) if key not in near]
    hint = f"near: {', '.join(by_key[key] for key in near[:4])}" if near else "`qwenq vram gpus` lists the catalogue"
    size = f"{_stated_memory(name) or 24:g}GB"
    raise UsageError(
        f"unknown GPU {name.strip()[:60]!r}", hint=f'{hint}; for any other, give its memory, for instance "{size}"'
    )


# Sold with another memory too, which the catalogue lacks: a name without a size could be either.
_UNLISTED = {
    "RTX 3060 12GB": ("RTX 3060 8GB",),
    "RTX 5060 Ti 16GB": ("RTX 5060 Ti 8GB",),
    "RTX PRO 5000 Blackwell 48GB": ("RTX PRO 5000 Blackwell 72GB",),
    "Tesla P100 PCIe 16GB": ("Tesla P100 PCIe 12GB",),
    "Arc A770 16GB": ("Arc A770 8GB",),
}


def matching_gpus(name: str) -> list[Gpu]:
    """GPUs of the catalogue that `name` may mean: the one so called, else all that have its words and its memory.

    A word that makes another card, Ti say, is never added; form factors, sizes and brands are.
    """
    wanted = _DRIVER_NAMES.get(_key(name), _key(name))
    exact = [gpu for gpu in catalogue() if _key(gpu.name) == wanted]
    if exact and ("PCIe" not in exact[0].name or "pcie" in name.lower()):  # `A100 80GB` is sold in two forms
        return exact
    memory = _stated_memory(name)
    words = set(wanted.split()) - ({f"{memory:g}"} if memory is not None else set())
    found = []
    for gpu in catalogue():
        own = set(_key(gpu.name).split())
        variants = _VARIANTS | ({"pro"} if gpu.vendor == "apple" else set())
        if words and words <= own and own & variants == words & variants and memory in (None, gpu.memory_gib):
            found.append(gpu)
    if len(found) > 1 and "pcie" in name.lower():
        found = [gpu for gpu in found if "PCIe" in gpu.name]
    return found


def _stated_memory(name: str) -> float | None:
    """The size in a card's name, GB: the 24 of `RTX 4090 24GB`."""
    found = re.search(r"(?<![\d.])(\d{1,4})\s*gi?b\b", name, re.I)
    return float(found[1]) if found else None


_MEMORY = re.compile(r"\s*(\d{1,4}(?:\.\d{1,2})?)\s*gi?b\s*", re.I)


_MAC_WORDS = r"(?:apple|mac(?:book)?(?:\s*(?:studio|mini|pro|air))?)"
_MAC = re.compile(
    rf"\s*{_MAC_WORDS}\s+(\d{{1,4}})\s*gi?b\s*|\s*(\d{{1,4}})\s*gi?b\s+{_MAC_WORDS}\s*", re.I
)  # any with Apple silicon


def _by_memory(name: str, memory_gib: float) -> Gpu:
    """A GPU of which only the nameplate memory is known; cards' gigabytes are binary, whatever their boxes say."""
    if not 1 <= memory_gib <= 1024:
        raise UsageError(f"a GPU of {name!r}, wanted 1GB to 1024GB")
    return Gpu(name, vendor="", memory_gib=memory_gib, source=GIVEN, note=_UNKNOWN)


def _mac(memory_gib: float) -> Gpu:
    """A Mac with Apple silicon of which only the memory is known."""
    if not 8 <= memory_gib <= 1024:
        raise UsageError(f"a Mac of {memory_gib:g}GB, wanted 8GB to 1024GB")
    usable = memory_gib * next(part for most, part in METAL_PARTS if memory_gib <= most)
    return Gpu(f"Mac {memory_gib:g}GB", "apple", memory_gib, usable, bus="unified", source=GIVEN, note=_UNKNOWN)


_COUNT = r"\d{1,3}|\d{4,}(?=\s*[x×*]\s)|\d{5,}"  # `7900xtx` is a name
_SPACED = r"\d{1,2}(?=\s+[a-z])(?!\s+gi?b\b)"  # `2 RTX 3090`; `24 GB` is a memory
_PART = re.compile(
    rf"\s*(?:(?P<before>{_COUNT})\s*[x×*]\s*|(?P<spaced>{_SPACED})\s+)?"
    r"(?P<name>.*?)(?:(?:\s+[x×]\s*|\s*\*\s*)(?P<after>\d+))?\s*",
    re.I,
)


def parse_rig(text: str) -> Rig:
    """A rig from `2x RTX 3090`, `RTX 4090 + 2 RTX 3060 12GB` or `a100 sxm4 80gb*4`; UsageError otherwise."""
    gpus: list[Gpu] = []
    for part in re.split(r"[+,;]", text):
        match = _PART.fullmatch(part)
        before = match and (match["before"] or match["spaced"])
        if not match or not match["name"] or (before and match["after"]):
            raise UsageError(
                f"not a rig: {text[:80]!r}", hint='write for instance "2x RTX 3090" or "RTX 4090 + 2x RTX 3060 12GB"'
            )
        said = before or match["after"] or "1"
        count = int(said) if len(said) < 10 else MAX_GPUS + 1
        if not 1 <= count <= MAX_GPUS:
            raise UsageError(f"{said[:20]} GPUs of a kind in {text[:80]!r}, wanted 1 to {MAX_GPUS}")
        gpus += [find_gpu(match["name"])] * count
    if len(gpus) > MAX_GPUS:
        raise UsageError(f"{len(gpus)} GPUs in {text[:80]!r}, wanted at most {MAX_GPUS}")
    return Rig(tuple(gpus))


def reserved(rig: Rig, n_bytes: int) -> Rig:
    """The rig with so much kept free on every GPU; PlanError when that leaves a GPU nothing."""
    for index, (gpu, limit) in enumerate(zip(rig.gpus, rig.limits, strict=True)):
        if n_bytes >= limit:
            raise PlanError(
                f"--reserve {format_gib(n_bytes)} leaves nothing of GPU {index} {gpu.name}, which has "
                f"{format_gib(limit)}",
                hint="a smaller --reserve",
            )
    return replace(rig, reserve_bytes=n_bytes)


_DRIVER_NAMES = {"h100 80 hbm3": "h100 sxm 80", "h200": "h200 sxm 141"}  # as NVML calls them
_VARIANTS = {"ti", "super", "d", "xt", "xtx", "gre", "nvl", "max", "ultra"}  # words that make another card
_NOISE = {
    "nvidia", "geforce", "amd", "radeon", "intel", "apple", "tesla", "gpu", "graphics", "generation", "workstation",
    "server", "edition", "gtx", "rtx", "rx", "pcie",
}  # fmt: skip


@lru_cache(maxsize=512)
def _key(name: str) -> str:
    """Words that tell GPUs apart, in order: `NVIDIA GeForce RTX3090` and `3090` are both `3090`."""
    text = re.sub(r"\b(?:gtx|rtx|rx)(?=\d)|\bquadro (?=rtx a)", "", name.lower())
    text = re.sub(r"(?<=\d)\s*gi?b\b|(?<=sxm)\d", "", text)
    text = re.sub(r"(?<=\d\d\d\d)(ti|super|xtx|xt|gre)\b", r" \1", text)
    return " ".join(word for word in re.findall(r"[a-z0-9]+", text) if word not in _NOISE)


def _number(text: str) -> float | None:
    return float(text) if text else None


def _gpu(row: dict[str, str]) -> Gpu:
    launch, approximate = _number(row["msrp_usd"]), _number(row["approx_price_usd"])
    measured = _number(row["fp16_tensor_dense_tflops"])
    return Gpu(
        name=row["name"],
        vendor=row["vendor"],
        memory_gib=float(row["vram_gb"]),
        usable_gib=_number(row["usable_vram_gib"]),
        bandwidth_gb_s=_number(row["bandwidth_gb_s"]),
        tensor_tflops=measured if measured is not None else _number(row["fp16_tensor_derived_tflops"]),
        nvlink_gb_s=_number(row["nvlink_gb_s_bidir"]),
        bus=row["bus"],
        power_w=_number(row["tdp_w"]),
        price_usd=launch if launch is not None else approximate,
        price_basis="launch price" if launch is not None else "approximate price" if approximate is not None else "",
        source=row["spec_source"],
        note=row["note"],
        tensor_derived=measured is None,
        compute_capability=_capability(row["compute_capability"]),
        used_price_usd=_number(row["used_price_usd"]),
        usable_note=row["usable_note"],
    )


def _capability(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if text else None


VISIBLE, ORDER, PCI_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"


def detect_rig() -> Rig:
    """This machine's visible GPUs with the memory free right now; PlanError without NVML, a driver or such a GPU.

    They are in the driver's order, by PCI bus. CUDA puts the fastest first unless CUDA_DEVICE_ORDER is
    PCI_BUS_ID, so where there are several kinds the rig says that it needs that setting.
    """
    try:
        import pynvml
    except ImportError:
        raise PlanError("--detect needs nvidia-ml-py", hint="pip install 'qwenq[detect]'") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise PlanError(
            f"no NVIDIA driver responds ({error})", hint='give the rig instead, for instance --gpu "2x RTX 3090"'
        ) from None
    try:
        every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        kinds = {str(pynvml.nvmlDeviceGetName(handle)) for handle in every}
        visible = _visible(pynvml, every, os.environ)
        read = [_read(pynvml, handle) for handle in visible]
    except pynvml.NVMLError as error:
        raise PlanError(f"the NVIDIA driver failed: {error}") from None
    finally:
        pynvml.nvmlShutdown()
    if not every:
        raise PlanError("the NVIDIA driver sees no GPU", hint="name the rig with --gpu")
    if not read:
        raise PlanError(
            f"{VISIBLE}={os.environ[VISIBLE][:80]!r} leaves no GPU, the driver sees {len(every)}",
            hint=f"unset {VISIBLE}, or name the rig with --gpu",
        )
    return Rig(
        tuple(gpu for gpu, _, _ in read),
        host_bytes=ram if (ram := available_ram()) < UNTOLD_RAM else None,
        free_bytes=tuple(free for _, free, _ in read),
        needs_pci_order=len(kinds) > 1 and os.environ.get(ORDER) != PCI_ORDER,
        notes=tuple(dict.fromkeys(note for _, _, note in read if note)),
    )


def sees_gpu() -> bool:
    """Whether the driver tells of a GPU that CUDA_VISIBLE_DEVICES leaves; False too where nothing can ask it."""
    try:
        return bool(detect_rig().gpus)
    except PlanError:
        return False


def known_gpu(name: str, total: int, capability: tuple[int, int] | None) -> Gpu:
    """This machine's GPU: the catalogue's of this name and memory, else one of which only its memory is known."""
    same = [gpu for gpu in matching_gpus(name) if abs(gpu.memory_gib * GIB - total) <= 0.1 * total]
    triton = has_triton()
    if len(same) == 1:
        return replace(same[0], compute_capability=capability or same[0].compute_capability, triton=triton)
    memory = total / GIB
    return Gpu(name, "nvidia", memory, memory, source="NVML", compute_capability=capability, triton=triton)


def _visible(nvml: Any, every: list[Any], environment: Mapping[str, str]) -> list[Any]:
    """Handles that CUDA_VISIBLE_DEVICES names, in its order: numbers, or beginnings of UUIDs; all without it.

    As in CUDA what follows an unknown entry does not count. A number counts in the driver's order.
    """
    named = environment.get(VISIBLE)
    if named is None:
        return every
    uuids = [str(nvml.nvmlDeviceGetUUID(handle)) for handle in every]
    found = []
    for entry in (part.strip() for part in named.split(",")):
        if entry.startswith("MIG-"):
            handle = nvml.nvmlDeviceGetHandleByUUID(entry)
        elif entry.isdecimal():
            handle = every[int(entry)] if len(entry) < 6 and int(entry) < len(every) else None
        else:
            same = [handle for handle, uuid in zip(every, uuids, strict=True) if entry and uuid.startswith(entry)]
            handle = same[0] if len(same) == 1 else None
        if handle is None:
            break
        found.append(handle)
    return found


def _read(nvml: Any, handle: Any) -> tuple[Gpu, int, str]:
    """A GPU, its free bytes, and a note where those are the system's: GPUs without memory of their own tell none."""
    name, note = str(nvml.nvmlDeviceGetName(handle)), ""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except nvml.NVMLError:  # DGX Spark: not supported
        total = free = 0
    if not total:
        total, free = total_memory() or 0, available_ram()
        if not total or free > total:
            raise PlanError(
                f"{name}: neither the driver nor the system reports its memory", hint="name the rig with --gpu"
            )
        note = f"{name}: the driver reports no memory, so the system's free memory is used: {format_gib(free)}"
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = (int(major), int(minor))
    except nvml.NVMLError:  # an old driver, or a part of a GPU
        capability = None
    return known_gpu(name, total, capability), free, note
