"""GPUs and rigs: the catalogue, and `RTX 4090 + 2x RTX 3060 12GB` as people write it. An unknown figure stays None."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from qwenq.errors import PlanError
from qwenq.units import GIB

ASSUMED_USABLE = 0.98  # of the nominal memory, where nobody has published what CUDA sees; known cards: 0.93 to 1.00
MAX_GPUS = 64


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU as published. `memory_gib` is the nameplate, `usable_gib` what the driver offers a program."""

    name: str
    vendor: str
    memory_gib: float
    usable_gib: float | None
    bandwidth_gb_s: float | None
    tensor_tflops: float | None  # dense 16-bit products with tensor cores
    nvlink_gb_s: float | None  # both directions; 0: none
    bus: str
    power_w: float | None
    price_usd: float | None
    price_basis: str  # launch price, approximate price, or empty
    source: str
    note: str = ""
    tensor_derived: bool = False

    @property
    def limit_bytes(self) -> int:
        """Bytes a program can hope for, before its own CUDA context."""
        usable = self.usable_gib if self.usable_gib is not None else self.memory_gib * ASSUMED_USABLE
        return round(usable * GIB)

    @property
    def limit_source(self) -> str:
        if self.usable_gib is not None:
            return "published"
        return f"assumed: {ASSUMED_USABLE:.0%} of the nameplate"

    @property
    def unified(self) -> bool:
        """Memory shared with the operating system, whose share is not counted here."""
        return self.vendor == "apple" or "GB10" in self.name


@dataclass(frozen=True)
class Rig:
    """GPUs of one machine, in device order. `free_bytes` holds measured limits where the machine was asked."""

    gpus: tuple[Gpu, ...]
    free_bytes: tuple[int, ...] = ()
    reserve_bytes: int = 0  # kept free on every GPU, for a desktop for instance

    @property
    def limits(self) -> tuple[int, ...]:
        """Usable bytes of each GPU."""
        found = self.free_bytes or tuple(gpu.limit_bytes for gpu in self.gpus)
        return tuple(max(0, limit - self.reserve_bytes) for limit in found)

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


@cache
def catalogue() -> tuple[Gpu, ...]:
    """Every known GPU, from the shipped table."""
    text = resources.files("qwenq").joinpath("data/gpus.csv").read_text(encoding="utf-8")
    return tuple(_gpu(row) for row in csv.DictReader(text.splitlines()))


def find_gpu(name: str) -> Gpu:
    """The GPU people mean by `name`; PlanError with near matches, or with the variants when several are meant."""
    wanted = _DRIVER_NAMES.get(_key(name), _key(name))
    by_key = {_key(gpu.name): gpu for gpu in catalogue()}
    if wanted in by_key:
        return by_key[wanted]
    parts = [gpu for key, gpu in by_key.items() if wanted and set(wanted.split()) <= set(key.split())]
    if len(parts) > 1 and "pcie" in name.lower():
        parts = [gpu for gpu in parts if "PCIe" in gpu.name]
    if len(parts) == 1:
        return parts[0]
    if parts:
        raise PlanError(
            f"GPU {name.strip()!r} could be several", hint=f"one of: {', '.join(gpu.name for gpu in parts)}"
        )
    near = difflib.get_close_matches(wanted, by_key, n=4, cutoff=0.5)
    hint = f"near: {', '.join(by_key[key].name for key in near)}" if near else "`qwenq vram gpus` lists the catalogue"
    raise PlanError(f"unknown GPU {name.strip()[:60]!r}", hint=hint)


_PART = re.compile(
    r"\s*(?:(?P<before>\d{1,3})\s*[x×*]\s*)?(?P<name>.*?)(?:(?:\s+[x×]\s*|\s*\*\s*)(?P<after>\d{1,3}))?\s*", re.I
)


def parse_rig(text: str) -> Rig:
    """A rig from `2x RTX 3090`, `RTX 4090 + 2x RTX 3060 12GB` or `a100 sxm4 80gb*4`; PlanError for anything else."""
    gpus: list[Gpu] = []
    for part in re.split(r"[+,;]", text):
        match = _PART.fullmatch(part)
        if not match or not match["name"] or (match["before"] and match["after"]):
            raise PlanError(
                f"not a rig: {text[:80]!r}", hint='write for instance "2x RTX 3090" or "RTX 4090 + 2x RTX 3060 12GB"'
            )
        count = int(match["before"] or match["after"] or 1)
        if not 1 <= count <= MAX_GPUS:
            raise PlanError(f"{count} GPUs of a kind in {text[:80]!r}, wanted 1 to {MAX_GPUS}")
        gpus += [find_gpu(match["name"])] * count
    if len(gpus) > MAX_GPUS:
        raise PlanError(f"{len(gpus)} GPUs in {text[:80]!r}, wanted at most {MAX_GPUS}")
    return Rig(tuple(gpus))


def rig_of(gpus: Sequence[Gpu]) -> Rig:
    """A rig of these GPUs, in this order."""
    return Rig(tuple(gpus))


_DRIVER_NAMES = {"h100 80 hbm3": "h100 sxm 80", "h200": "h200 sxm 141"}  # as NVML calls them
_NOISE = {
    "nvidia",
    "geforce",
    "amd",
    "radeon",
    "intel",
    "apple",
    "tesla",
    "quadro",
    "gpu",
    "graphics",
    "rtx",
    "rx",
    "pcie",
}


def _key(name: str) -> str:
    """Words that tell GPUs apart, in order: `NVIDIA GeForce RTX3090` and `3090` are both `3090`."""
    text = re.sub(r"\b(?:rtx|rx)(?=\d)", "", name.lower())
    text = re.sub(r"(?<=\d)\s*gi?b\b|(?<=sxm)\d", "", text)
    text = re.sub(r"(?<=\d\d\d\d)(ti|super|xtx)\b", r" \1", text)
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
    )
