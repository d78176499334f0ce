"""The parts of gpu_check.py, each run in a process of its own: `gpu_parts.py PART --notes FILE ...`.

A part is a function of `Notes`. It writes down facts (figures) and checks (a figure beside its limit) as it goes; an
error inside a `step` is kept as a traceback and the part goes on with its next step.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import hashlib
import io
import json
import math
import os
import pstats
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.errors import QwenqError
from qwenq.formats.base import PackedShape, Recipe, Scheme
from qwenq.formats.bitsandbytes import Nf4Blocks
from qwenq.io.gguf import gguf_model
from qwenq.machine import has_triton, host_facts, versions
from qwenq.model.attention import causal_attention
from qwenq.planning.case import Case
from qwenq.planning.engines.torch import OWN
from qwenq.planning.kernels import kernel_group, row_block_weights
from qwenq.planning.models import load_spec
from qwenq.planning.weights import recipe_weights
from qwenq.runtime import measure as measuring
from qwenq.runtime.cache import KvCache, attend
from qwenq.runtime.forecast import forecast
from qwenq.runtime.generate import KV_DTYPES, Session, Timing
from qwenq.runtime.linear import Int4Linear, Nf4Linear, StoredLinear, TritonLinear, packed_linear
from qwenq.runtime.load import LoadOptions, asked_of_machine, load_from, loaded, plan_load
from qwenq.runtime.peaks import driver_bytes, forget_peaks, read_peaks, visible_rig
from qwenq.runtime.synthetic import SyntheticWeights, synthetic_config
from qwenq.solver.gptq import solve_linears
from qwenq.solver.grid import QTensor
from qwenq.solver.triangle import Triangle

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = ROOT / "tests" / "data" / "tiny-qwen2"
CALIBRATION, HELD_OUT = (ROOT / "tests" / "data" / name for name in ("calib.txt", "heldout.txt"))
FAMILY = ("Qwen2.5-72B", "Qwen2.5-32B", "Qwen2.5-14B", "Qwen2.5-7B", "Qwen2.5-3B", "Qwen2.5-0.5B")
CPU = torch.device("cpu")
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}

# Relative errors |got - wanted| / |wanted| that are allowed. In bfloat16 scales, outputs and two half sums are rounded.
BFLOAT16, FLOAT32 = 0.01, 5e-5
ESTIMATE_PERCENT = 3.0  # the estimator's bar, on settings that were not used for a fit
PROFILED_LAYERS = 4  # of a prompt's chunk
DECODE_SHARE = 0.6  # of the bandwidth limit, at 4 bits


@dataclass
class Notes:
    """What a part finds, on disk after each entry."""

    file: Path | None = None
    device: torch.device = CPU
    tiny: bool = False
    work: Path = Path()
    deadline: float = math.inf  # on the monotonic clock
    found: dict[str, Any] = field(default_factory=dict)  # by the parts before
    real: bool = True  # False over fake tensors: no graphs, no profiles
    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds to the end of the part's time."""
        return self.deadline - time.monotonic()

    def fact(self, name: str, value: Any) -> None:
        self.facts[name] = value
        self.save()

    def check(self, name: str, got: float, limit: float) -> None:
        """A figure that may be `limit` at most, either way from 0."""
        good = math.isfinite(got) and abs(got) <= limit
        self.checks.append({"name": name, "got": _figure(got), "wanted": f"at most {limit:g}", "ok": good})
        self.save()

    def at_least(self, name: str, got: float, least: float) -> None:
        good = math.isfinite(got) and got >= least
        self.checks.append({"name": name, "got": _figure(got), "wanted": f"at least {least:g}", "ok": good})
        self.save()

    def same(self, name: str, got: Any, wanted: Any) -> None:
        self.checks.append({"name": name, "got": got, "wanted": wanted, "ok": bool(got == wanted)})
        self.save()

    def rate(self, name: str) -> float | None:
        """A rate that the part `environment` or `triton` measured."""
        parts = self.found.get("parts", {})
        rates = parts.get("environment", {}).get("facts", {}).get("rates", {})
        return rates.get(name) or parts.get("triton", {}).get("facts", {}).get(name)

    @contextlib.contextmanager
    def step(self, name: str, needs_s: float = 0.0) -> Iterator[None]:
        """Time it, keep the traceback of an error, and go on; not begun when less than `needs_s` is left."""
        print(f"-- {name}", flush=True)
        began = time.monotonic()
        try:
            if self.left < needs_s:
                raise TimeoutError(f"{self.left:.0f} s were left, it needs about {needs_s:.0f}")
            yield
        except Exception as error:
            lines = traceback.format_exc()
            if isinstance(error, QwenqError) and error.hint:
                lines += f"hint: {error.hint}\n"
            self.errors[name] = lines[-5000:]
            print(lines, flush=True)
        finally:
            self.facts.setdefault("steps_s", {})[name] = round(time.monotonic() - began, 2)
            self.save()

    def save(self) -> None:
        if self.file is None:
            return
        beside = self.file.with_suffix(".writing")
        beside.write_text(json.dumps({"facts": self.facts, "checks": self.checks, "errors": self.errors}, default=str))
        beside.replace(self.file)


def _figure(value: float) -> float | str:
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def error_of(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, in float64 on the CPU."""
    got, wanted = got.detach().cpu().double(), wanted.detach().cpu().double()
    return float((got - wanted).norm() / wanted.norm())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 5, warm: int = 2) -> float:
    """Seconds of a call, the mean of `repeats` calls in a row after some that warm up."""
    for _ in range(warm):
        call()
    wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return (time.perf_counter() - began) / repeats


def replayed_seconds(calls: Sequence[Callable[[], Any]], notes: Notes, repeats: int = 5) -> float:
    """Seconds of one of `calls`, all captured in one CUDA graph: what the GPU takes, without Python's share.

    Calls over different weights keep the second-level cache cold. Without CUDA they are simply made.
    """
    if not (notes.cuda and notes.real):
        return seconds_of(lambda: [call() for call in calls], notes.device, 1, 1) / len(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return seconds_of(graph.replay, notes.device, repeats) / len(calls)


def profiled(call: Callable[[], Any], notes: Notes, rows: int = 14) -> dict[str, Any]:
    """Kernels of a call by time on the GPU, and what share of its wall time the GPU was busy."""
    from torch.profiler import ProfilerActivity, profile

    call()
    wait(notes.device)
    kinds = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if notes.cuda else [ProfilerActivity.CPU]
    began = time.perf_counter()
    with profile(activities=kinds, acc_events=True) as found:
        call()
        wait(notes.device)
    wall_s = time.perf_counter() - began
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        on_device = notes.cuda and "CUDA" in str(event.device_type)
        if on_device or (not notes.cuda and event.cpu_parent is None):
            spent = event.time_range.elapsed_us()
            entry = kernels.setdefault(event.name[:110], [0.0, 0])
            entry[0] += spent
            entry[1] += 1
    busy_s = sum(entry[0] for entry in kernels.values()) / 1e6
    most = sorted(kernels.items(), key=lambda item: -item[1][0])[:rows]
    return {
        "wall_ms_under_profiler": round(1e3 * wall_s, 3),
        "device_ms": round(1e3 * busy_s, 3),
        "kernels": [{"ms": round(us / 1e3, 3), "calls": int(n), "name": name} for name, (us, n) in most],
    }


# ---------------------------------------------------------------------- environment


def environment(notes: Notes) -> None:
    """The machine, its rates, and what of its memory is gone before a model comes."""
    device, tiny = notes.device, notes.tiny
    with notes.step("versions"):
        notes.fact("versions", versions() | {"numpy": np.__version__})
        free = round(shutil.disk_usage(notes.work).free / 2**30, 1)
        notes.fact("host", host_facts() | {"disk_free_gib": free, "cpu": torch.backends.cpu.get_cpu_capability()})
    if notes.cuda:
        with notes.step("gpu"):
            _gpu_facts(notes)
        with notes.step("workspace"):
            _workspace(notes)
    with notes.step("rates"):
        _rates(notes)
    if notes.cuda:
        with notes.step("transfers"):
            _transfers(notes)
        with notes.step("launches"):
            one = torch.zeros(1, device=device)
            notes.facts["rates"]["launch_us"] = round(1e6 * seconds_of(lambda: one.add_(1), device, 5000), 2)
        with notes.step("driver's view"):
            notes.fact("driver_bytes", driver_bytes())
            rig = visible_rig()
            notes.fact("planner_sees", None if rig is None else {"gpu": rig.gpus[0].name, "free_bytes": rig.free_bytes})
    with notes.step("disk"):
        block, path = os.urandom(1 << 24), notes.work / "disk"
        count = 2 if tiny else 32
        began = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        notes.fact("disk_write_gb_s", round(count * len(block) / (time.perf_counter() - began) / 1e9, 3))


def _gpu_facts(notes: Notes) -> None:
    free, total = torch.cuda.mem_get_info(0)  # makes the context
    found = torch.cuda.get_device_properties(0)
    query = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,power.limit,pstate"
    notes.fact("gpu", {
        "name": found.name, "capability": f"{found.major}.{found.minor}", "total_bytes": total,
        "context_bytes": total - free, "multiprocessors": found.multi_processor_count,
        "l2_bytes": getattr(found, "L2_cache_size", None), "cuda": torch.version.cuda,
        "arch_list": torch.cuda.get_arch_list(), "count": torch.cuda.device_count(),
        "allocator": torch.cuda.get_allocator_backend(), "cudnn": torch.backends.cudnn.version(),
        "nvidia-smi": _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv"]),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    })  # fmt: skip


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()[:2000]


def _workspace(notes: Notes) -> None:
    """What cuBLAS takes of the allocator at its first matmul, and at the first with a bias, which cuBLASLt does."""
    x = torch.randn(256, 256, dtype=torch.bfloat16, device=notes.device)
    bias = torch.randn(256, dtype=torch.bfloat16, device=notes.device)
    taken = {}
    before = torch.cuda.memory_allocated()
    for name, call in (
        ("mm", lambda: x @ x),
        ("linear with bias", lambda: F.linear(x, x, bias)),
        ("float32 mm", lambda: x.float() @ x.float()),
        ("bmm", lambda: x.view(4, 64, 256) @ x.view(4, 256, 64)),
        ("cholesky", lambda: torch.linalg.cholesky_ex(torch.eye(1024, device=notes.device))),
    ):
        call()
        wait(notes.device)
        taken[name] = torch.cuda.memory_allocated() - before
    notes.fact("workspace_bytes_after", taken)


def _rates(notes: Notes) -> None:
    device, size = notes.device, 256 if notes.tiny else 8192
    rates: dict[str, float] = {}
    for name, dtype, tf32 in (
        ("bfloat16_tflops", torch.bfloat16, False), ("float32_tflops", torch.float32, False),
        ("tf32_tflops", torch.float32, True),
    ):  # fmt: skip
        if tf32 and not notes.cuda:
            continue
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in "ab")
        torch.backends.cuda.matmul.allow_tf32 = tf32
        took = seconds_of(lambda a=a, b=b: a @ b, device, 10 if dtype == torch.bfloat16 else 4)
        torch.backends.cuda.matmul.allow_tf32 = False
        rates[name] = round(2 * size**3 / took / 1e12, 2)
        notes.fact("rates", rates)
    rates |= bandwidths(notes)
    notes.fact("rates", rates)


def bandwidths(notes: Notes) -> dict[str, float]:
    """GB/s copied and read, over 2 GiB: far more than second-level caches hold."""
    count = 1 << (20 if notes.tiny else 30)
    a = torch.zeros(count, dtype=torch.bfloat16, device=notes.device)
    b = torch.ones_like(a)
    copied = 4 * count / seconds_of(lambda: a.copy_(b), notes.device, 10)
    read = 2 * count / seconds_of(lambda: b.view(torch.int16).amax(), notes.device, 10)
    rates = {"copy_gb_s": round(copied / 1e9, 1), "read_gb_s": round(read / 1e9, 1)}
    return rates | {"bandwidth_gb_s": max(rates.values())}


def _transfers(notes: Notes) -> None:
    n_bytes = 1 << 30
    there = torch.empty(n_bytes, dtype=torch.uint8, device=notes.device)
    found = {}
    for kind, pinned in (("pageable", False), ("pinned", True)):
        here = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=pinned)
        for way, call in (("to", lambda h=here: there.copy_(h)), ("from", lambda h=here: h.copy_(there))):
            found[f"{kind}_{way}_gpu_gb_s"] = round(n_bytes / seconds_of(call, notes.device, 3, 1) / 1e9, 2)
    notes.facts["rates"] |= found


# ---------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class LinearCase:
    """A packed linear: its codes, its shape, the kernel that CUDA is to take for it, and the rows it is tried with."""

    kind: str
    bits: int
    group: int
    sym: bool
    outputs: int
    inputs: int
    rows: tuple[int, ...] = (1, 2, 17, 111, 112, 500)
    dtype: str = "bfloat16"
    sorted: bool = False  # columns in an order of their own, as act-order files have them

    @property
    def on_cuda(self) -> str:
        """The kernel that a GPU is to take."""
        group = self.inputs if self.group == -1 else self.group
        own = self.dtype == "bfloat16" and self.inputs % 64 == 0 and kernel_group(group) and has_triton()
        return "triton" if own else self.kind

    @property
    def label(self) -> str:
        scheme = Scheme(self.bits, self.group, self.sym).label
        return f"{self.kind}: {scheme} [{self.outputs}, {self.inputs}] {self.dtype}{' sorted' if self.sorted else ''}"


LINEARS = (
    LinearCase("int4", 4, 128, True, 3584, 3584),
    LinearCase("int4", 4, 128, False, 3584, 3584),
    LinearCase("int4", 4, 64, True, 4864, 896),
    LinearCase("int4", 4, 32, False, 512, 896),
    LinearCase("int4", 4, -1, True, 1032, 3584),
    LinearCase("int4", 4, 64, True, 1096, 320),  # 4 tiles of 16 columns, and outputs that fill no block of 64
    LinearCase("int4", 4, 32, True, 264, 96),  # 2 tiles
    LinearCase("int4", 4, 128, False, 1024, 3584, sorted=True),
    LinearCase("int4", 4, 128, True, 8192, 29568, (1, 300)),  # down of the 72B
    LinearCase("int4", 4, 128, True, 29568, 8192, (1, 300)),  # gate and up
    LinearCase("int4 halves", 8, 128, True, 3584, 3584),
    LinearCase("int4 halves", 8, 128, False, 3584, 3584),
    LinearCase("int4 halves", 8, -1, True, 1024, 3584),
    LinearCase("int4 halves", 8, 32, True, 4864, 896, sorted=True),
    LinearCase("int8", 8, -1, True, 1020, 3584, (1, 3, 4, 300)),
    LinearCase("tiled", 4, 128, True, 3584, 3584, (1, 300), "float32"),
    LinearCase("tiled", 8, 128, False, 1024, 3584, (1, 300), "float32"),
    LinearCase("tiled", 4, 48, True, 1024, 960, (1, 300)),
    LinearCase("tiled", 4, -1, False, 1020, 101, (1, 300)),
    LinearCase("tiled", 8, 128, False, 1020, 3584, (1, 300), sorted=True),
)
TINY_LINEARS = (
    LinearCase("int4", 4, 128, True, 256, 256, (1, 130)),
    LinearCase("int4 halves", 8, 32, False, 64, 128, (1, 130)),
    LinearCase("tiled", 4, 48, True, 64, 96, (1, 130), sorted=True),
)


def kernels(notes: Notes) -> None:
    """Every kernel path against float32 values of the CPU; then how fast those of the 72B's shapes are."""
    torch.manual_seed(0)
    for case in TINY_LINEARS if notes.tiny else LINEARS:
        with notes.step(case.label):
            _linear(notes, case)
    with notes.step("NF4"):
        _nf4(notes)
    with notes.step("16-bit"):
        _stored(notes)
    for name, shape in ATTENTIONS.items():
        with notes.step(f"attention: {name}"):
            _attention(notes, name, *shape)
    with notes.step("KV cache"):
        _caches(notes)
    if notes.real:
        for outputs, inputs in ((512, 256),) if notes.tiny else ((29568, 8192), (8192, 29568), (8192, 8192)):
            for bits in (4, 8):
                with notes.step(f"speed: {bits}-bit [{outputs}, {inputs}]", 4 if notes.cuda else 0):
                    _linear_speed(notes, bits, outputs, inputs)
        with notes.step("speed: attention", 3 if notes.cuda else 0):
            _attention_speed(notes)


def random_codes(scheme: Scheme, outputs: int, inputs: int, device: torch.device = CPU) -> QTensor:
    codes = torch.randint(0, scheme.levels, (outputs, inputs), dtype=torch.uint8, device=device)
    shape = outputs, scheme.groups(inputs)
    sign = torch.where(torch.rand(shape, device=device) < 0.5, -1.0, 1.0)
    scales = (sign * (0.5 + torch.rand(shape, device=device)) * inputs**-0.5 * 3.5 / scheme.levels).half()
    if scheme.sym:
        zeros = torch.full(shape, scheme.zero, dtype=torch.uint8, device=device)
    else:
        zeros = torch.randint(scheme.levels // 4, 3 * scheme.levels // 4, shape, dtype=torch.uint8, device=device)
    return QTensor(codes, (scales, zeros), scheme.grid())


def _linear(notes: Notes, case: LinearCase) -> None:
    dtype = getattr(torch, case.dtype)
    q = random_codes(Scheme(case.bits, case.group, case.sym), case.outputs, case.inputs)
    bias = torch.randn(case.outputs).to(dtype)
    order = torch.randperm(case.inputs) if case.sorted else None
    w_OI = q.dequantize()  # columns in the order of the groups
    q = replace(q, order_I=order)
    module, choice = packed(q, bias, dtype, notes.device)
    if notes.cuda:
        notes.same(f"{case.label}: its kernel", choice.kind, case.on_cuda)
    limit = FLOAT32 if dtype == torch.float32 else BFLOAT16
    errors = {}
    for rows in case.rows:
        x_MI = torch.randn(rows, case.inputs).to(dtype)
        sorted_MI = x_MI if order is None else x_MI[:, order]
        wanted = sorted_MI.float() @ w_OI.T + bias.float()
        errors[rows] = error_of(module(x_MI.to(notes.device)), wanted)
    notes.facts.setdefault("linear_errors", {})[case.label] = {rows: float(f"{e:.3g}") for rows, e in errors.items()}
    worst = max(errors.values(), key=lambda e: e if math.isfinite(e) else math.inf)
    notes.check(f"{case.label}, {'/'.join(map(str, case.rows))} rows", worst, limit)
    if isinstance(module, Int4Linear | TritonLinear):
        _written_out(notes, case, module, q)


def packed(q: QTensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """`packed_linear` of integer codes."""
    (outputs, inputs), groups = q.codes_OI.shape, q.scales_OG.shape[1]
    shape = PackedShape(q.integers.bits, inputs // groups, outputs, inputs, bool((q.zeros_OG == q.integers.zero).all()))
    return packed_linear(q, shape, bias, dtype, device)


def _written_out(notes: Notes, case: LinearCase, module: Int4Linear | TritonLinear, q: QTensor) -> None:
    """Weights read back from the packed layout: exact where there are no zero points, but for the bfloat16 scale."""
    step = row_block_weights(case.inputs, notes.device.type) // case.inputs
    stop = min(step, case.outputs)
    found = module.weight_rows(0, stop)
    if found is None:
        notes.same(f"{case.label}: the layout is known", False, notes.device.type == "cpu")
        return
    exact = case.sym or isinstance(module, TritonLinear)
    if isinstance(module, Int4Linear) and case.sym:
        q = replace(q, parameters=(q.scales_OG.bfloat16(), q.zeros_OG))
    wanted = replace(q, order_I=None).dequantize()[:stop].T
    notes.check(f"{case.label}: weights read back", error_of(found, wanted), 0.0 if exact else 0.005)


def _nf4(notes: Notes) -> None:
    outputs, inputs = (64, 128) if notes.tiny else (1536, 3584)
    table = torch.linspace(-1, 1, 16).pow(3)
    codes = torch.randint(0, 256, (outputs * inputs // 2, 1), dtype=torch.uint8)
    absmax = 0.5 + torch.rand(outputs * inputs // 64)
    each = torch.stack((codes[:, 0] >> 4, codes[:, 0] & 15), 1).view(-1).long()
    w_OI = (table[each].view(-1, 64) * absmax[:, None]).view(outputs, inputs).bfloat16()
    blocks = Nf4Blocks((outputs, inputs), codes, table, absmax, torch.bfloat16)
    module = Nf4Linear(blocks, None, torch.bfloat16, notes.device)
    for rows in (1, 300):
        x = torch.randn(rows, inputs).bfloat16()
        notes.check(f"nf4, {rows} rows", error_of(module(x.to(notes.device)), x.float() @ w_OI.float().T), BFLOAT16)


def _stored(notes: Notes) -> None:
    outputs, inputs = (256, 128) if notes.tiny else (4096, 3584)
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    bias = torch.randn(outputs)
    for stored, dtype, is_head in (
        (torch.bfloat16, torch.bfloat16, False), (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False), (torch.float16, torch.bfloat16, False),
    ):  # fmt: skip
        kept = weight.to(stored).to(notes.device)
        module = StoredLinear(kept, None if is_head else bias, dtype, is_head=is_head)
        for rows in (1, 300):
            x = torch.randn(rows, inputs).to(dtype)
            wanted = x.float() @ weight.to(stored).float().T + (0 if is_head else bias.to(dtype).float())
            name = f"16-bit: {str(stored)[6:]} weight, {str(dtype)[6:]} input{', head' if is_head else ''}, {rows} rows"
            limit = FLOAT32 if dtype == torch.float32 else BFLOAT16
            notes.check(name, error_of(module(x.to(notes.device)), wanted), limit)


# heads, key-value heads, queries, keys, head size, batch, dtype
ATTENTIONS: dict[str, tuple[int, int, int, int, int, int, str]] = {
    "windows": (8, 2, 256, 256, 128, 2, "bfloat16"),
    "a long window": (28, 4, 1100, 1100, 128, 1, "bfloat16"),
    "head size 64": (14, 2, 200, 200, 64, 1, "bfloat16"),
    "a chunk behind a cache": (28, 4, 300, 1500, 128, 1, "bfloat16"),
    "one token": (64, 8, 1, 777, 128, 1, "bfloat16"),
    "one token, head size 64": (14, 2, 1, 333, 64, 1, "bfloat16"),
    "a chunk in float32": (28, 4, 300, 1500, 128, 1, "float32"),
    "one token in float32": (28, 4, 1, 777, 128, 1, "float32"),
}


def _attention(
    notes: Notes, name: str, heads: int, shared: int, tokens: int, keys: int, width: int, batch: int, dtype: str
) -> None:
    kind, scaling = getattr(torch, dtype), width**-0.5
    q = torch.randn(batch, heads, tokens, width).to(kind)
    k, v = (torch.randn(batch, shared, keys, width).to(kind) for _ in "kv")
    k = k * 3  # scores of some size
    stored = [torch.zeros(batch, shared, keys + 96, width, dtype=kind, device=notes.device) for _ in "kv"]
    for kept, value in zip(stored, (k, v), strict=True):
        kept[:, :, :keys] = value.to(notes.device)
    there = [kept[:, :, :keys] for kept in stored]  # as a cache gives them: parts of longer tensors
    each = heads // shared
    scores = (q.double() * scaling) @ k.double().repeat_interleave(each, 1).transpose(2, 3)
    scores += torch.full((tokens, keys), -torch.inf, dtype=torch.float64).triu_(1 + keys - tokens)
    wanted = (torch.softmax(scores, -1) @ v.double().repeat_interleave(each, 1)).transpose(1, 2)
    with torch.inference_mode():
        if tokens > 1:
            got = causal_attention(q.to(notes.device), *there, scaling)
        else:
            got = attend(None, q.to(notes.device), *there, None, scaling)[0]
    notes.check(f"attention: {name}", error_of(got, wanted), FLOAT32 if dtype == "float32" else BFLOAT16)


def _caches(notes: Notes) -> None:
    """Caches of every dtype hold on the device, to the bit, what they hold on a CPU."""
    key, value = (torch.randn(1, 2, 70, 128) * scale for scale in (200.0, 3.0))
    key[0, 0, 0, :4] = torch.tensor([1e5, -1e5, 447.0, 449.0])
    for dtype in (torch.bfloat16, torch.float32):
        for name, kept in KV_DTYPES.items():
            found = []
            for device in (CPU, notes.device):
                cache = KvCache([device], 96, 2, 128, kept or dtype)
                for start, stop in ((0, 64), (64, 69), (69, 70)):
                    parts = (x[:, :, start:stop].to(dtype).to(device) for x in (key, value))
                    read = cache.update(*parts, 0)
                found.append([x.cpu().float() for x in read])
            equal = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            notes.same(f"KV cache {name}, {str(dtype)[6:]} activations: the CPU's bits", equal, True)


def _linear_speed(notes: Notes, bits: int, outputs: int, inputs: int) -> None:
    """The kernel and the dense path at growing rows; GB/s of packed weights, TFLOP/s of products."""
    scheme, dtype, device = Scheme(bits, 128), torch.bfloat16, notes.device
    copies = 1 if notes.tiny else max(1, math.ceil(2.5e8 / (outputs * inputs * bits / 8)))
    modules = []
    for _ in range(copies):
        module, _ = packed(random_codes(scheme, outputs, inputs, device), None, dtype, device)
        modules.append(module)
    weight_bytes = sum(p.numel() * p.element_size() for p in modules[0].parameters())
    rows: list[dict[str, Any]] = []
    paths = {"kernel": 1 << 30, "dense": 1}
    usual = getattr(modules[0], "dense_from", 0)
    if not usual:  # the CPU kernels write no weights out
        del paths["dense"]
    for count in (1, 130) if notes.tiny else (1, 4, 16, 32, 64, 112, 256, 2048):
        x = torch.randn(count, inputs, dtype=dtype, device=device)
        row: dict[str, Any] = {"rows": count}
        for path, dense_from in paths.items():
            if path == "kernel" and count > 256:
                continue
            for module in modules:
                module.dense_from = dense_from
            calls = [lambda m=m, x=x: m(x) for m in modules]
            with torch.inference_mode():
                if path == "kernel" and count <= 16:  # one launch: Python's share would be what is measured
                    took = replayed_seconds(calls, notes)
                else:
                    took = seconds_of(lambda calls=calls: [call() for call in calls], device, 3) / copies
            row[f"{path}_us"] = round(1e6 * took, 1)
            row[f"{path}_tflops"] = round(2 * count * outputs * inputs / took / 1e12, 2)
            if count == 1 and path == "kernel":
                row["gb_s"] = round(weight_bytes / took / 1e9, 1)
                if bandwidth := notes.rate("bandwidth_gb_s"):
                    row["share_of_bandwidth"] = round(weight_bytes / took / 1e9 / bandwidth, 3)
        rows.append(row)
        notes.facts.setdefault("linear_speed", {})[f"{bits}-bit g128 [{outputs}, {inputs}], dense from {usual}"] = rows
        notes.save()


def _attention_speed(notes: Notes) -> None:
    heads, shared, width = (4, 2, 64) if notes.tiny else (64, 8, 128)
    lengths = (64,) if notes.tiny else (1024, 8192, 32768)
    rows = []
    for keys in lengths:
        kv = [torch.randn(1, shared, keys, width, dtype=torch.bfloat16, device=notes.device) for _ in "kv"]
        one = torch.randn(1, heads, 1, width, dtype=torch.bfloat16, device=notes.device)
        chunk = torch.randn(1, heads, min(2048, keys // 2), width, dtype=torch.bfloat16, device=notes.device)
        with torch.inference_mode():
            token = replayed_seconds([lambda q=one, kv=kv: attend(None, q, *kv, None, 0.1)], notes)
            prompt = seconds_of(lambda q=chunk, kv=kv: causal_attention(q, *kv, 0.1), notes.device, 3)
        tokens = chunk.shape[2]
        flops = 4 * heads * width * tokens * (keys - tokens / 2)
        rows.append({
            "keys": keys, "token_us": round(1e6 * token, 1), "token_gb_s": round(4 * kv[0].numel() / token / 1e9, 1),
            "chunk_rows": tokens, "chunk_ms": round(1e3 * prompt, 3), "chunk_tflops": round(flops / prompt / 1e12, 1),
        })  # fmt: skip
    notes.fact("attention_speed", rows)


# ---------------------------------------------------------------------- memory and speed of whole models


class TimedSession(Session):
    """A session that keeps its times; of a long prompt it computes the first chunk and the last one alone.

    Chunks between them take no more memory than the last one: all that differs is how much of the cache is read.
    """

    times: list[dict[str, Any]] = []  # noqa: RUF012, one list for all sessions of a part
    whole_up_to = 1 << 60

    def prefill(self, ids: Any, timing: Any, stopped: Any = lambda: False, *, repeatable: bool = False) -> Any:
        self.times.append({"context": self.max_model_len, "token_ms": []})
        began = time.perf_counter()
        if len(ids) <= self.whole_up_to:
            logits, computed = super().prefill(ids, timing, stopped, repeatable=repeatable), len(ids)
        else:
            starts = range(0, len(ids), self.prefill_chunk)
            self._common(ids, repeatable)
            logits, computed = None, 0
            for start in sorted({starts[0], starts[-1]}):
                if start and self._cache is not None:
                    self._cache._lengths = [start] * len(self._cache._lengths)
                    self._ids = list(ids[:start])
                part = ids[start : start + self.prefill_chunk]
                logits, computed = self.forward(part), computed + len(part)
        took = time.perf_counter() - began
        speed = round(computed / took, 1)
        self.times[-1] |= {"prompt_tokens": computed, "prefill_s": round(took, 3), "prefill_tokens_per_s": speed}
        return logits

    def forward(self, ids: Any) -> Any:
        began = time.perf_counter()
        logits = super().forward(ids)
        if len(ids) == 1:
            took_ms = round(1e3 * (time.perf_counter() - began), 2)
            self.times[-1]["token_ms"].append(took_ms)
        return logits


def vram_4(notes: Notes) -> None:
    """`vram measure --synthetic` of the largest model that fits, in 4 bits."""
    vram(notes, 4)


def vram_8(notes: Notes) -> None:
    """The same in 8 bits."""
    vram(notes, 8)


def decode_4(notes: Notes) -> None:
    """How fast tokens and prompts of the largest model that fits are, in 4 bits."""
    decode(notes, 4)


def decode_8(notes: Notes) -> None:
    """The same in 8 bits."""
    decode(notes, 8)


def decode(notes: Notes, bits: int) -> None:
    """Tokens by themselves and as a CUDA graph at growing contexts, what a graph keeps, and a prompt's chunk."""
    recipe = Recipe(Scheme(bits, 64 if notes.tiny else 128))
    if notes.cuda and notes.real and has_triton():
        with notes.step("tuned tilings"):
            from gpu_tuning import use_best

            notes.fact("tuned", use_best(notes.found))
    with notes.step("plan"):
        spec, longest = _largest(notes, recipe)
        weights = recipe_weights(spec, recipe)
        contexts = [64] if notes.tiny else [c for c in (1024, 8192, 32768) if c <= longest]
        notes.fact("model", f"{spec.name}, {spec.num_hidden_layers} layers, {bits}-bit")
        options = LoadOptions(max_model_len=max(contexts), prefill_chunk=48 if notes.tiny else 2048)
    if "plan" in notes.errors:
        return
    loading = _synthetic(notes, spec, recipe, weights, options)
    with notes.step("load and measure"), torch.inference_mode(), loading as found:
        notes.fact("fallbacks", found.model.fallbacks())
        for context in contexts:
            with notes.step(f"context {context}", 6 if notes.cuda else 0):
                _tokens(notes, found, bits, context)
        with notes.step("a chunk", 4 if notes.cuda else 0):
            _chunk(notes, found)
        if notes.real:
            with notes.step("profile of a token", 8 if notes.cuda else 0):
                notes.fact("token_profile", _profiled_token(notes, found))
            with notes.step("profile of a chunk", 8 if notes.cuda else 0):
                notes.fact("chunk_profile", _profiled_chunk(notes, found))
        with notes.step("estimate", 8 if notes.cuda else 0):
            _contexts(notes, found, weights, contexts[1:2] or contexts)


def weight_bytes_read(network: Any) -> int:
    """Bytes of weights that a token reads: all but the embedding table."""
    table = network.get_submodule("model.embed_tokens").weight
    total = sum(p.numel() * p.element_size() for p in network.parameters())
    return int(total - table.numel() * table.element_size())


def _tokens(notes: Notes, found: Any, bits: int, context: int) -> None:
    """Greedy tokens near the end of a context, first without a graph, then with one; they must be the same."""
    count = 4 if notes.tiny else 24
    facts: dict[str, Any] = {"context": context}
    chosen: dict[bool, list[int]] = {}
    for graphs in (False, True):
        session = Session(found.model, context, found.work.prefill_chunk, graphs=graphs)
        session.prefill([1], Timing())
        facts["decoding"] = session.decoding
        cache = session._cache
        assert cache is not None
        generator = torch.Generator(notes.device).manual_seed(0)
        for layer in range(len(found.model.network.model.layers)):  # as if a prompt had filled it
            for kept in cache.stored(layer):
                kept.normal_(generator=generator)
        cache._lengths = [context - count - 4] * len(cache._lengths)
        token, times, tokens = 1, [], []
        before = torch.cuda.memory_allocated() if notes.cuda else 0
        for _ in range(count):
            began = time.perf_counter()
            token = int(session.forward([token]).argmax())
            times.append(time.perf_counter() - began)
            tokens.append(token)
        if graphs and notes.cuda:
            facts["graph_bytes"] = torch.cuda.memory_allocated() - before
            facts["graph_reserved_bytes"] = torch.cuda.memory_reserved()
        chosen[graphs] = tokens
        facts["graph_ms" if graphs else "eager_ms"] = round(1e3 * statistics.median(times[4:] or times), 3)
        facts["first_ms_graph" if graphs else "first_ms_eager"] = [round(1e3 * t, 1) for t in times[:4]]
        session.release()
        del session, cache
        gc.collect()
    spec = found.model.spec
    read = weight_bytes_read(found.model.network)
    read_kv = 4 * spec.num_hidden_layers * spec.kv_size * (context - count)
    facts["tokens_per_s"] = round(1e3 / facts["graph_ms"], 2)
    if bandwidth := notes.rate("bandwidth_gb_s"):
        facts["limit_ms"] = round((read + read_kv) / bandwidth / 1e6, 3)
        facts["share_of_limit"] = round(facts["limit_ms"] / facts["graph_ms"], 3)
        if notes.cuda:
            name = f"{bits}-bit, context {context}: share of the bandwidth limit"
            notes.at_least(name, facts["share_of_limit"], DECODE_SHARE)
    notes.same(f"{bits}-bit, context {context}: greedy tokens with a graph", chosen[True], chosen[False])
    notes.facts.setdefault("decoding", []).append(facts)
    notes.save()


def _chunk(notes: Notes, found: Any) -> None:
    """Prompt tokens a second, of one chunk behind none and behind a filled cache."""
    chunk, rows = found.work.prefill_chunk, []
    for behind in (0, 0, 3 * chunk):
        session = Session(found.model, 4 * chunk + 2 if not notes.tiny else 4 * chunk, chunk)
        session.prefill([1], Timing())
        cache = session._cache
        assert cache is not None
        cache._lengths = [behind] * len(cache._lengths)
        ids = [1 + k % 1000 for k in range(chunk)]
        wait(notes.device)
        began = time.perf_counter()
        session.forward(ids)
        took = time.perf_counter() - began
        rows.append({"behind": behind, "ms": round(1e3 * took, 1), "tokens_per_s": round(chunk / took, 1)})
        session.release()
    notes.fact("prefill", rows)


def triton(notes: Notes) -> None:
    """The Triton kernels: are they right, how fast in which tiling."""
    if not has_triton():
        notes.fact("left_out", "Triton is not installed")
        return
    from gpu_tuning import tune

    tune(notes)


def vram(notes: Notes, bits: int) -> None:
    recipe = Recipe(Scheme(bits, 64 if notes.tiny else 128))
    with notes.step("plan"):
        spec, longest = _largest(notes, recipe)
        weights = recipe_weights(spec, recipe)
        contexts = (64, 160) if notes.tiny else (*(c for c in (1024, 8192, 32768) if c < longest), longest)
        notes.fact("model", f"{spec.name}, {spec.num_hidden_layers} layers, {bits}-bit")
        notes.fact("longest_context_planned", longest)
        options = LoadOptions(max_model_len=max(contexts), prefill_chunk=48 if notes.tiny else 2048)
        notes.fact("speed_forecast", forecast(spec, weights, options).speed.to_json())
    if "plan" in notes.errors:
        return
    loading = _synthetic(notes, spec, recipe, weights, options)
    with notes.step("load and measure"), torch.inference_mode(), loading as found:
        notes.fact("predicted_bytes", found.plan.predicted)
        with notes.step("contexts"):
            _contexts(notes, found, weights, contexts)
        for name, work in (("fp8 cache", {"kv_dtype": "fp8"}), ("chunks of 512", {"prefill_chunk": 512})):
            with notes.step(name, 6 if notes.cuda else 0):
                other = replace(found, work=replace(found.work, **work))
                _contexts(notes, other, weights, [min(4096, longest)], f"{name}, ")
        with notes.step("decode speed"):
            _decode_speed(notes, found, bits)
        if notes.real:
            with notes.step("profile of a token"):
                notes.fact("token_profile", _profiled_token(notes, found))
            with notes.step("profile of a chunk", 5 if notes.cuda else 0):
                notes.fact("chunk_profile", _profiled_chunk(notes, found))


@contextlib.contextmanager
def _synthetic(notes: Notes, spec: Any, recipe: Recipe, weights: Any, options: LoadOptions) -> Iterator[Any]:
    """A model of random weights, loaded, with its kernels noted."""
    source = SyntheticWeights(spec, recipe)
    with load_from(source, weights, synthetic_config(spec), spec, options) as found:
        notes.fact("load_s", round(found.seconds, 2))
        notes.fact("kernels", found.model.kernels())
        yield found


def _largest(notes: Notes, recipe: Recipe) -> tuple[Any, int]:
    """The largest model whose layers all go onto the GPU, and the longest context that is planned for it there."""
    if notes.tiny:
        return replace(load_spec("Qwen2.5-0.5B"), num_hidden_layers=2, vocab_size=4096), 160
    for name in FAMILY:
        spec = load_spec(name)
        weights = recipe_weights(spec, recipe)

        def fits(context: int, spec: Any = spec, weights: Any = weights) -> bool:
            options = LoadOptions(max_model_len=context)
            try:
                rig, work, room = asked_of_machine(spec, options)
                plan = plan_load(Case(spec, weights, OWN, work, rig), room)
            except QwenqError:
                return False
            return all(isinstance(place, int) for place in plan.device_map.values())

        low, high = 2, spec.extended_context // 1024 + 1  # in 1,024 tokens; the first fits, the second does not
        if not fits(1024 * low):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(1024 * middle) else (low, middle)
        return spec, 1024 * low
    raise RuntimeError("no model of the family fits")


def _contexts(notes: Notes, found: Any, weights: Any, contexts: Sequence[int], setting: str = "") -> None:
    """Measure each context beside its estimate, and keep what it took; the facts get a row a context and phase."""
    TimedSession.times = []
    TimedSession.whole_up_to = 8192
    usual, measuring.Session = measuring.Session, TimedSession  # type: ignore[misc]
    rows, times = notes.facts.setdefault("rows", []), notes.facts.setdefault("times", [])
    try:
        for context in contexts:
            if notes.left < 12:
                notes.fact("contexts_left_out", [c for c in contexts if c >= context])
                break
            measured, ended = measuring.measure(found, weights, [context])
            for row in measured:
                rows.append({"setting": setting.rstrip(", ")} | row.to_json())
                name = f"estimate, {setting}context {row.context}, {row.phase}: error in percent"
                if notes.cuda:
                    notes.check(name, round(row.error_percent, 3), ESTIMATE_PERCENT)
            notes.save()
            if ended:
                notes.same(f"context {context}, which was planned to fit", ended, "measured")
                break
    finally:
        times += [{"setting": setting.rstrip(", ")} | row for row in TimedSession.times]
        measuring.Session = usual  # type: ignore[misc]


def _decode_speed(notes: Notes, found: Any, bits: int) -> None:
    """Tokens a second behind a short prompt, beside what reading all weights once would allow."""
    context, count = (64, 4) if notes.tiny else (2048, 24)
    session = TimedSession(found.model, context, found.work.prefill_chunk)
    TimedSession.times = []
    session.prefill(list(range(context // 4)), Timing())
    for token in range(count):
        session.forward([token])
    times = sorted(TimedSession.times[-1]["token_ms"])
    read = weight_bytes_read(found.model.network)
    median = statistics.median(times)
    facts = {
        "tokens": count, "median_ms": median, "fastest_ms": times[0], "slowest_ms": times[-1],
        "tokens_per_s": round(1e3 / median, 2), "weight_bytes_read": read,
    }  # fmt: skip
    if bandwidth := notes.rate("bandwidth_gb_s"):
        limit_ms = read / bandwidth / 1e6
        facts |= {"limit_ms": round(limit_ms, 3), "share_of_limit": round(limit_ms / median, 3)}
    notes.fact("decode", facts)
    if notes.cuda and "share_of_limit" in facts:
        notes.at_least("decode speed, share of the bandwidth limit", facts["share_of_limit"], DECODE_SHARE)
    session.release()


def _profiled_token(notes: Notes, found: Any) -> dict[str, Any]:
    session = Session(found.model, 64 if notes.tiny else 2048, found.work.prefill_chunk)
    session.prefill(list(range(24 if notes.tiny else 512)), Timing())
    for token in range(3):  # the third is captured as a graph
        session.forward([token])
    try:
        return profiled(lambda: session.forward([1]), notes)
    finally:
        session.release()


def _profiled_chunk(notes: Notes, found: Any) -> dict[str, Any]:
    """Through the first layers alone: all of them make more events than there is time to read."""
    chunk, inner = found.work.prefill_chunk, found.model.network.model
    every = inner.layers
    session = Session(found.model, 2 * chunk + 2, chunk)
    session.prefill([1], Timing())
    ids = [1] * chunk
    try:
        inner.layers = every[:PROFILED_LAYERS]
        return {"layers": len(inner.layers)} | profiled(lambda: session.forward(ids), notes)
    finally:
        inner.layers = every
        session.release()


# ---------------------------------------------------------------------- quantizing


def make_checkpoint(
    directory: Path, *, hidden: int, ffn: int, heads: int, shared: int, layers: int, device: torch.device
) -> None:
    """A Qwen2 checkpoint of random bfloat16 weights, with the tiny tokenizer.

    Some channels are larger than others, but no attention score so large that a last bit decides between two tokens.
    """
    width, vocab = 128 if hidden >= 1024 else 64, 1024
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": width,
        "vocab_size": vocab, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        weight.normal_(std=columns**-0.5, generator=generator)
        weight[:, ::64] *= 2
        return weight.cpu()

    norm = torch.ones(hidden, dtype=torch.bfloat16)
    norm[::64] = 3
    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden), "lm_head.weight": matrix(vocab, hidden)}
    tensors["model.norm.weight"] = norm.clone()
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input", "post_attention"):
            tensors[f"{prefix}{name}_layernorm.weight"] = norm.clone()
        for name, rows, columns in (
            ("self_attn.q_proj", heads * width, hidden), ("self_attn.k_proj", shared * width, hidden),
            ("self_attn.v_proj", shared * width, hidden), ("self_attn.o_proj", hidden, heads * width),
            ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden), ("mlp.down_proj", hidden, ffn),
        ):  # fmt: skip
            tensors[f"{prefix}{name}.weight"] = matrix(rows, columns)
            if name[-6] in "qkv" and name.startswith("self_attn"):
                tensors[f"{prefix}{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_MODEL / name, directory / name)


def token_file(path: Path, windows: int, length: int) -> Path:
    np.save(path, np.random.default_rng(len(path.name)).integers(0, 1000, (windows, length), dtype=np.int64))
    return path


def command_line(words: Sequence[str]) -> tuple[int, str]:
    """`qwenq WORDS` in this process, so that torch's memory counters can be read afterwards: exit code, stdout."""
    printed, usual = io.StringIO(), sys.argv
    sys.argv = ["qwenq", *words]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module("qwenq", run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = usual
    return code, printed.getvalue()


@dataclass
class Run:
    """A `qwenq` command, or another Python program, in a process of its own."""

    name: str
    words: list[str]
    environment: dict[str, str]
    log: Path
    program: tuple[str, ...] = ("-m", "qwenq")
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Run:
        out, err = self.log.with_suffix(".out"), self.log.with_suffix(".err")
        with open(out, "wb") as stdout, open(err, "ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, *self.words], stdout=stdout, stderr=stderr, cwd=ROOT,
                env=os.environ | self.environment,
            )  # fmt: skip
        return self

    def finish(self, limit_s: float) -> dict[str, Any]:
        """The JSON that it printed; RuntimeError with the end of its log when it failed."""
        assert self.process is not None
        try:
            code = self.process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        if code != 0:
            said = self.log.with_suffix(".err").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self.name}: exit code {code}\n{' '.join((*self.program, *self.words))}\n{said}")
        found: dict[str, Any] = json.loads(self.log.with_suffix(".out").read_text())
        return found


def threads(notes: Notes, processes: int) -> dict[str, str]:
    """The environment of one of so many processes that share the cores."""
    return {"OMP_NUM_THREADS": "1" if notes.tiny else str(max(1, (os.cpu_count() or 1) // processes))}


def quantize(notes: Notes) -> None:
    """Small models quantized on the device and on a CPU, twice, and once killed and resumed."""
    work, device = notes.work, notes.device.type
    layers, hidden = (2, 128) if notes.tiny else (3, 1024)
    random_model = work / "random-model"  # "random" is a run and its output
    shape = {"ffn": 2 * hidden if notes.tiny else 2816, "heads": hidden // (64 if notes.tiny else 128), "shared": 2}
    with notes.step("make the random model"):
        make_checkpoint(random_model, hidden=hidden, layers=layers, device=notes.device, **shape)
    windows, length = (8, 64) if notes.tiny else (24, 256)
    random_text = [
        "--calibration", str(token_file(work / "calibration.npy", windows, length)),
        "--eval-text", str(token_file(work / "evaluation.npy", 4, length)), "--group-size", "64",
    ]  # fmt: skip
    real_text = [
        "--calibration", str(CALIBRATION), "--eval-text", str(HELD_OUT), "--sequence-length", "128",
        "--eval-samples", "8", "--group-size", "32", "-n", "8" if notes.tiny else "32",
    ]  # fmt: skip
    float32 = ["--compute-dtype", "float32", "--calibration-dtype", "float32"]
    wanted: list[tuple[str, Path, list[str], str, list[str]]] = [
        ("real-cpu", TINY_MODEL, real_text, "cpu", float32),
        ("real", TINY_MODEL, real_text, device, float32),
        ("random-1", random_model, random_text, device, []),
        ("random-killed", random_model, random_text, device, []),
    ]
    if not notes.tiny:
        wanted += [
            ("real-default", TINY_MODEL, real_text, device, []),
            ("random-2", random_model, random_text, device, []),
            ("random-cpu", random_model, random_text, "cpu", float32),
            ("random", random_model, random_text, device, float32),
            ("real-8", TINY_MODEL, [*real_text, "--bits", "8"], device, []),
        ]
    runs = {}
    for name, model, text, where, more in wanted:
        words = ["quantize", str(model), "-o", str(work / name), *text, "--device", where, "--json", *more]
        # what a GPU computes keeps one core busy
        environment = threads(notes, 3) | WITHOUT_GPU if where == "cpu" else threads(notes, 8)
        runs[name] = Run(name, words, environment, work / f"{name}.log")
        if not (notes.tiny and name == "random-killed"):
            runs[name].start()
    results: dict[str, dict[str, Any]] = {}
    with notes.step("killed and resumed"):
        if notes.tiny:
            runs["random-killed"].start()
        runs["random-killed"] = _killed(notes, runs["random-killed"])
    for name, run in runs.items():
        with notes.step(name):
            results[name] = run.finish(notes.left - 5)
            notes.facts.setdefault("runs", {})[name] = _row_of(results[name])
    with notes.step("compare"):
        _compare(notes, work, results)


def _row_of(result: dict[str, Any]) -> dict[str, Any]:
    drift = result["drift"]
    return {
        "kl": drift["kl"]["mean"], "noise_floor_kl": drift["noise_floor_kl"], "seconds": round(result["seconds"], 2),
        "perplexity": drift["perplexity"], "reference_perplexity": drift["reference_perplexity"],
        "dtype": drift["compute_dtype"], "warnings": result["warnings"],
        "layer_s": [round(layer["seconds"], 2) for layer in result["layers"]],
    }  # fmt: skip


def _killed(notes: Notes, run: Run) -> Run:
    """Kill a run (SIGKILL) once its journal names a layer, and start it again with --resume."""
    assert run.process is not None
    partial = Path(run.words[run.words.index("-o") + 1] + ".partial")
    while run.process.poll() is None and notes.left > 20:
        journals = [path for path in partial.glob("*.jsonl") if path.is_file()]
        if any(path.read_bytes().count(b"\n") >= 2 for path in journals):
            run.process.send_signal(signal.SIGKILL)
            run.process.wait()
            break
        time.sleep(0.002)
    lines = max((path.read_bytes().count(b"\n") for path in partial.glob("*.jsonl")), default=0)
    notes.same("a run was killed between two layers", partial.exists(), True)
    notes.fact("journal_lines_when_killed", lines)
    if not partial.exists():
        return run
    return Run(run.name, [*run.words, "--resume"], run.environment, run.log).start()


def _same_files(notes: Notes, what: str, *directories: Path) -> None:
    """Whether two directories hold the same weight files, byte for byte."""
    first, second = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
         for path in directory.iterdir() if path.suffix in (".safetensors", ".gguf")}
        for directory in directories
    )  # fmt: skip
    differ = [file for file in first.keys() | second.keys() if first.get(file) != second.get(file)]
    notes.same(f"{what}: files that differ", sorted(differ), [])


def _compare(notes: Notes, work: Path, results: dict[str, dict[str, Any]]) -> None:
    def both(a: str, b: str) -> bool:
        return a in results and b in results

    for what, a, b in (("killed and resumed", "random-1", "random-killed"), ("two runs", "random-1", "random-2")):
        if both(a, b):
            _same_files(notes, what, work / a, work / b)
    for a, b in (("real-cpu", "real"), ("random-cpu", "random")):
        if both(a, b):
            share, scales = _agreement(work / a, work / b)
            notes.fact(f"{b}: agreement with the CPU", {"codes": share, "scales": scales})
            _beside_the_cpus(notes, b, results[a], results[b])
    if both("real-cpu", "real-default"):
        kl = [results[name]["drift"]["kl"]["mean"] for name in ("real-cpu", "real-default")]
        notes.check("real-default: KL beside the CPU's float32, relative difference", kl[1] / kl[0] - 1, 0.1)


def _beside_the_cpus(notes: Notes, name: str, cpu: dict[str, Any], there: dict[str, Any]) -> None:
    """Which codes is chaotic (one rounding decides over what follows); how good they are is not."""
    dbs = [statistics.mean(row["error_db"] for each in found["layers"] for row in each["linears"])
           for found in (cpu, there)]  # fmt: skip
    objective = 10 ** ((dbs[1] - dbs[0]) / 10)
    notes.check(f"{name}: the solver's objective beside the CPU's, relative difference", objective - 1, 0.01)
    kl = there["drift"]["kl"]["mean"] / cpu["drift"]["kl"]["mean"]
    notes.check(f"{name}: KL beside the CPU's, relative difference", kl - 1, 0.03)


def _agreement(first: Path, second: Path) -> tuple[float, float]:
    """Shares of 4-bit codes and of scales that two GPTQ checkpoints have in common."""
    same, total, scales, all_scales = 0, 0, 0, 0
    for path in sorted(first.glob("*.safetensors")):
        with safe_open(path, "pt") as one, safe_open(second / path.name, "pt") as other:
            for name in one.keys():  # noqa: SIM118, no mapping
                if name.endswith(".qweight"):
                    differ = (one.get_tensor(name) ^ other.get_tensor(name)).view(torch.uint8)
                    same += int((differ & 15 == 0).sum()) + int((differ >> 4 == 0).sum())
                    total += 2 * differ.numel()
                elif name.endswith(".scales"):
                    a, b = one.get_tensor(name), other.get_tensor(name)
                    scales += int((a == b).sum())
                    all_scales += a.numel()
    return round(same / max(1, total), 5), round(scales / max(1, all_scales), 5)


def layer_72b(notes: Notes) -> None:
    """Two decoder layers of the 72B's shape through `qwenq quantize`: time by stage, peak, rates, calls of the host.

    The first pays for libraries that load and for memory that is touched for the first time.
    """
    work = notes.work
    hidden, ffn, heads, shared = (128, 256, 2, 2) if notes.tiny else (8192, 29568, 64, 8)
    windows, held_out, length = (8, 2, 64) if notes.tiny else (128, 8, 512)
    with notes.step("make the model"):
        make_checkpoint(
            work / "model", hidden=hidden, ffn=ffn, heads=heads, shared=shared, layers=2, device=notes.device
        )
        if notes.cuda:
            torch.cuda.empty_cache()
    words = [
        "quantize", str(work / "model"), "-o", str(work / "out"), "--bits", "4",
        "--group-size", "64" if notes.tiny else "128", "--device", notes.device.type, "--json",
        "--calibration", str(token_file(work / "calibration.npy", windows, length)),
        "--eval-text", str(token_file(work / "evaluation.npy", held_out, length)),
    ]  # fmt: skip
    predicted = None
    with notes.step("dry run"):
        code, said = command_line([*words, "--dry-run"])
        if code:
            raise RuntimeError(f"exit code {code}: {said[-1000:]}")
        dry = json.loads(said)
        predicted = dry["peak_vram_bytes"] + dry["state_vram_bytes"]
        notes.fact("predicted", {"vram_bytes": predicted, "ram_bytes": dry["peak_ram_bytes"]})
    with notes.step("quantize"):
        if notes.cuda:
            torch.cuda.reset_peak_memory_stats()
        profile = cProfile.Profile()
        code, said = profile.runcall(command_line, words)
        notes.fact("host_calls", _host_calls(profile))
        if notes.cuda:
            peak = torch.cuda.max_memory_allocated()
            notes.fact("peak", {
                "allocated_bytes": peak, "reserved_bytes": torch.cuda.max_memory_reserved(),
                "driver_bytes": driver_bytes(),
            })  # fmt: skip
            if predicted:
                notes.fact("prediction_error_percent", round(100 * (predicted / peak - 1), 2))
                notes.at_least("predicted peak over the allocator's", predicted / peak, 1.0)
        if code:
            raise RuntimeError(f"exit code {code}: {said[-1000:]}")
        result = json.loads(said)
        first, layer = result["layers"]
        stages = {stage: round(seconds, 2) for stage, seconds in layer["stages_s"].items()}
        notes.fact("layer", {
            "seconds": round(layer["seconds"], 2), "first_layer_s": round(first["seconds"], 2), "stages_s": stages,
            "whole_run_s": round(result["seconds"], 2),
            "peak_rss_bytes": result["peak_rss_bytes"], "calibration_tokens": windows * length,
            "evaluation_tokens": held_out * length, "hours_for_80_layers": round(layer["seconds"] * 80 / 3600, 3),
            "errors_db": {row["name"]: round(row["error_db"], 2) for row in layer["linears"]},
        })  # fmt: skip
    with notes.step("work done"):
        _work_done(notes, hidden, ffn, heads * (128 if hidden >= 1024 else 64), windows * length)


def _host_calls(profile: cProfile.Profile, rows: int = 40) -> list[dict[str, Any]]:
    """Where the host's time went, by function with all that it calls."""
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    most = sorted(found.items(), key=lambda item: -item[1][3])
    ours = [item for item in most if "qwenq" in item[0][0] or item[1][2] > 0.02 * most[0][1][3]][:rows]
    return [
        {"at": f"{'/'.join(Path(file).parts[-2:])}:{line} {name}", "calls": calls, "own_s": round(own, 3),
         "s": round(whole, 3)}
        for (file, line, name), (_, calls, own, whole, _) in ours
    ]  # fmt: skip


def _work_done(notes: Notes, hidden: int, ffn: int, q_size: int, tokens: int) -> None:
    """Floating-point operations of the stages, as the code does them, and what share of the card's rate that is.

    Counted: forward 2 T (qkv + 2 o + gate, up + 2 down), the 16-bit windows left out; Hessians 17/16 T I^2; solving
    I^3 / 3 for the factor and 5 O I^2 for GPTQ and two sweeps; matmuls alone, in the dtype the stage computes in.
    """
    stages = notes.facts["layer"]["stages_s"]
    qkv = (q_size + 2 * q_size // 8) * hidden
    o, gate_up, down = q_size * hidden, 2 * ffn * hidden, ffn * hidden
    work = {
        "forward": ("bfloat16_tflops", 2 * tokens * (qkv + 2 * o + gate_up + 2 * down)),
        "hessian": ("float32_tflops", 17 / 16 * tokens * (2 * hidden**2 + q_size**2 + ffn**2)),
        "solve qkv": ("float32_tflops", hidden**3 / 3 + 5 * qkv * hidden),
        "solve o": ("float32_tflops", q_size**3 / 3 + 5 * o * q_size),
        "solve gate_up": ("float32_tflops", hidden**3 / 3 + 5 * gate_up * hidden),
        "solve down": ("float32_tflops", ffn**3 / 3 + 5 * down * ffn),
    }
    rows = {}
    for stage, (kind, flops) in work.items():
        if not stages.get(stage):
            continue
        rate = flops / stages[stage] / 1e12
        rows[stage] = {"seconds": stages[stage], "tflop": round(flops / 1e12, 1), "tflops": round(rate, 2)}
        if ceiling := notes.rate(kind):
            rows[stage] |= {f"share_of_{kind}": round(rate / ceiling, 4)}
    notes.fact("work", rows)


# ---------------------------------------------------------------------- whole models, and the solver by itself


def model(notes: Notes) -> None:
    """Logits of small checkpoints on the device beside the CPU's in float32; the command line's run, eval, measure.

    Whatever another process can do is begun as soon as its input is there: starting one takes longer than its work.
    """
    work, device = notes.work, notes.device.type
    here = threads(notes, 6)
    kinds = (
        ("trained-4", TINY_MODEL, ["--bits", "4", "--group-size", "32"]),
        ("random-8", work / "random", ["--bits", "8", "--group-size", "64"]),
        ("random-4", work / "random", ["--bits", "4", "--group-size", "64", "--asymmetric"]),
    )[: 1 if notes.tiny else 3]  # fmt: skip
    references, commands = dict[str, Run](), dict[str, Run]()
    made: list[Run] = []

    def begin(name: str, words: list[str]) -> None:
        commands[name] = Run(name, words, here, work / f"{name}.log").start()

    with notes.step("make checkpoints"):
        if not notes.tiny:
            begin("sensitivity", [
                "sensitivity", str(TINY_MODEL), "-o", str(work / "sensitivity.json"), "--device", device, "--json",
                "--calibration", str(CALIBRATION), "--sequence-length", "64", "-n", "16",
            ])  # fmt: skip
            begin("host", [
                "vram", "measure", "--synthetic", "Qwen2.5-7B", "-c", "1k", "--gpu-memory", "4GiB", "--json",
            ])  # fmt: skip
        shape = {"hidden": 128, "ffn": 256, "heads": 2} if notes.tiny else {"hidden": 896, "ffn": 4864, "heads": 14}
        make_checkpoint(work / "random", shared=2, layers=2, device=CPU, **shape)
        for name, source, more in kinds:
            words = [
                "quantize", str(source), "-o", str(work / name), "--method", "rtn", "--device", "cpu", "--json",
                "--eval-text", str(HELD_OUT), "--eval-samples", "1", "--sequence-length", "64", *more,
            ]  # fmt: skip
            made.append(Run(name, words, here | WITHOUT_GPU, work / f"{name}.log").start())
        references["random"] = _begin_cpu_logits(notes, "random", ("auto", "fp8"))
    caches = (
        ("float32", {"compute_dtype": "float32"}), ("bfloat16", {}),
        ("bfloat16, fp8 cache", {"kv_dtype": "fp8"}), ("bfloat16, fp16 cache", {"kv_dtype": "fp16"}),
    )  # fmt: skip
    with notes.step("logits of random"):
        _beside_cpu_logits(notes, references["random"], caches)
    with notes.step("quantized checkpoints"):
        for run in made:
            run.finish(notes.left)
            references[run.name] = _begin_cpu_logits(notes, run.name)
            if run.name == "trained-4":
                begin("run", ["run", str(work / "trained-4"), "--raw", "-p", "The sea is", "-n", "12", "--temperature",
                              "0", "-c", "128", "--json"])  # fmt: skip
                begin("eval", ["eval", str(work / "trained-4"), "--reference", str(TINY_MODEL), "--text", str(HELD_OUT),
                               "--sequence-length", "64", "--device", device, "--json"])  # fmt: skip
    for run in made:
        if run.name in references:
            with notes.step(f"logits of {run.name}"):
                _beside_cpu_logits(notes, references[run.name], caches[:2])
    for name in ("run", "eval", "sensitivity"):
        if name in commands:
            with notes.step(f"qwenq {name}"):
                found = commands[name].finish(notes.left)
                notes.fact(name, str(found)[:600] if name == "sensitivity" else found)
    if "host" in commands:
        with notes.step("layers in host memory"):
            found = commands["host"].finish(notes.left)
            notes.fact("host_memory_rows", found["rows"])
            for row in found["rows"]:
                name = f"layers in host memory, {row['phase']}: error of the estimate in percent"
                notes.check(name, row["error_percent"], ESTIMATE_PERCENT)


def _begin_cpu_logits(notes: Notes, name: str, caches: Sequence[str] = ("auto",)) -> Run:
    """The CPU's float32 logits of WORK/NAME in a process that sees no GPU."""
    words = ["logits", "--work", str(notes.work), "--checkpoints", name, "--caches", ",".join(caches)]
    environment = threads(notes, 6) | WITHOUT_GPU
    return Run(name, words, environment, notes.work / f"{name}-logits.log", program=(__file__,)).start()


def _beside_cpu_logits(notes: Notes, reference: Run, settings: Sequence[tuple[str, dict[str, str]]]) -> None:
    """The device's logits with each of these options, compared with what `reference` makes meanwhile."""
    name = reference.name
    found = {label: _logits(notes.work / name, options) for label, options in settings}
    reference.finish(notes.left)
    for label, options in settings:
        cached = "fp8" if options.get("kv_dtype") == "fp8" else "auto"
        got, wanted = found[label], torch.from_numpy(np.load(notes.work / f"{name}-{cached}.npy"))
        limit = 1e-3 if label == "float32" else 0.1 if cached == "fp8" else 0.05
        notes.check(f"{name}, {label}: logits", error_of(got.logits, wanted), limit)
        top = float((got.logits.argmax(-1) == wanted.argmax(-1)).float().mean())
        notes.facts.setdefault("logits", {})[f"{name}, {label}"] = got.facts | {"top1": round(top, 3)}


@dataclass(frozen=True)
class Logits:
    """Behind a prompt in chunks and behind each of 20 tokens after it, float32 [21, vocabulary]; by which kernels."""

    logits: Tensor
    facts: dict[str, Any]


def _logits(checkpoint: Path, options: dict[str, str]) -> Logits:
    ids = [int(k) for k in np.random.default_rng(0).integers(5, 1000, 150)]
    opened = open_checkpoint(gguf_model(checkpoint) or checkpoint)
    with loaded(opened, LoadOptions(max_model_len=192, prefill_chunk=48, **options)) as found:
        session = Session(found.model, 192, 48, found.work.kv_dtype)
        forget_peaks(found.model.devices)
        rows = [session.prefill(ids[:130], Timing())]
        rows += [session.forward([token]) for token in ids[130:]]
        facts = {"kernels": found.model.kernels(), "fallbacks": found.model.fallbacks(), "decoding": session.decoding}
        peaks = found.beside_prediction(read_peaks(found.model.devices, found.base_rss))
        facts["estimate_error_percent"] = [round(row["error_percent"] or 0.0, 2) for row in peaks]
        session.release()
    del found, session
    gc.collect()
    return Logits(torch.stack([row.cpu() for row in rows]), facts)


def cpu_logits(work: Path, names: Sequence[str], caches: Sequence[str]) -> None:
    """What `model` and `gguf` compare with, made where no GPU is visible."""
    for name in names:
        for cached in caches:
            found = _logits(work / name, {"compute_dtype": "float32", "kv_dtype": cached})
            np.save(work / f"{name}-{cached}.npy", found.logits.numpy())
    print(json.dumps({"checkpoints": list(names)}))


MIXTURES = ("Q4_K_M", "Q2_K", "Q8_0", "Q4_0", "IQ4_XS")  # with them every type but Q4_1, Q5_0, Q5_1 and IQ4_NL


def gguf(notes: Notes) -> None:
    """GGUF files made on the device beside the CPU's, twice the same; run there beside the CPU's logits; evaluated."""
    work, device = notes.work, notes.device.type
    source, results = work / "source", dict[str, dict[str, Any]]()
    shape = (
        {"hidden": 256, "ffn": 512, "heads": 4, "layers": 2} if notes.tiny
        else {"hidden": 1024, "ffn": 2816, "heads": 8, "layers": 2}
    )  # fmt: skip
    windows, length = (8, 64) if notes.tiny else (24, 256)
    mixtures = MIXTURES[: 1 if notes.tiny else None]
    runs: dict[str, Run] = {}
    with notes.step("make the model"):
        make_checkpoint(source, shared=2, device=CPU, **shape)
        held_out = str(token_file(work / "evaluation.npy", 4, length))
        text = ["--calibration", str(token_file(work / "calibration.npy", windows, length)), "--eval-text", held_out]
        float32 = ["--compute-dtype", "float32", "--calibration-dtype", "float32"]
        for name, mixture, where in (
            *((f"{kind} again", kind, device) for kind in mixtures[:1]),
            *((name, kind, where) for kind in mixtures for name, where in ((kind, device), (f"{kind} cpu", "cpu"))),
        ):
            words = ["quantize", str(source), "-o", str(work / name), "--format", "gguf", "--gguf-type", mixture]
            environment = threads(notes, 6) | WITHOUT_GPU if where == "cpu" else threads(notes, 16)
            log = work / f"{name}.log"
            runs[name] = Run(name, [*words, *text, *float32, "--device", where, "--json"], environment, log).start()
    references: dict[str, Run] = {}
    evaluating: Run | None = None
    for kind in mixtures:
        with notes.step(f"{kind} on the device"):
            results[kind] = runs[kind].finish(notes.left - 35)  # of a limit of 120: time for logits
            notes.facts.setdefault("runs", {})[kind] = _row_of(results[kind])
            references[kind] = _begin_cpu_logits(notes, kind)
            if evaluating is None:
                file = str(gguf_model(work / kind))
                words = ["eval", file, "--reference", str(source), "--text", held_out, "--device", device, "--json"]
                evaluating = Run(kind, [*words, *float32[:2]], threads(notes, 16), work / "eval.log").start()
    for kind, reference in references.items():
        with notes.step(f"logits of {kind}"):
            settings = ("float32", {"compute_dtype": "float32"}), ("bfloat16", dict[str, str]())
            _beside_cpu_logits(notes, reference, settings)
    for kind in mixtures:
        with notes.step(f"{kind} on the CPU"):
            results[f"{kind} cpu"] = runs[f"{kind} cpu"].finish(notes.left - 3)
            notes.facts.setdefault("runs", {})[f"{kind} cpu"] = _row_of(results[f"{kind} cpu"])
            if kind in results:
                _beside_the_cpus(notes, kind, results[f"{kind} cpu"], results[kind])
    with notes.step("two runs"):
        again = f"{mixtures[0]} again"
        runs[again].finish(notes.left - 2)
        _same_files(notes, f"{mixtures[0]}, two runs", work / mixtures[0], work / again)
    with notes.step("qwenq eval"):
        if evaluating is None:
            raise RuntimeError("no file was made")
        kl = evaluating.finish(notes.left)["kl"]["mean"]
        notes.fact("eval_kl", kl)
        wanted = results[evaluating.name]["drift"]["kl"]["mean"]
        notes.check(f"{evaluating.name}: KL by eval over the job's, - 1", kl / wanted - 1, 1e-3)


def solver(notes: Notes) -> None:
    """One weight solved on the device and on the CPU; where the solver's time goes; Hessians in other dtypes."""
    device = notes.device
    with notes.step("against the CPU"):
        rows, columns, tokens = (64, 128, 512) if notes.tiny else (512, 1024, 8192)
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(columns, columns, generator=generator) * columns**-0.5
        x = torch.randn(tokens, columns, generator=generator) @ mixed
        w = torch.randn(rows, columns, generator=generator) * columns**-0.5
        found = []
        for where in (CPU, device):
            triangle = Triangle(columns)
            flat = torch.zeros(triangle.size, device=where)
            triangle.add_products(flat, x.to(where))
            found.append(solve_linears({"w": w.to(where)}, triangle.square(flat), Scheme(4, 64).grid())["w"])
        (q_cpu, cpu), (q_device, there) = found
        share = float((q_cpu.codes_OI == q_device.codes_OI.cpu()).float().mean())
        notes.fact("share_of_codes_like_the_cpus", round(share, 4))
        notes.check("output error beside the CPU's, in dB", there.error_db - cpu.error_db, 0.02)
    if notes.real:
        with notes.step("profile", 8 if notes.cuda else 0):
            rows, columns = (64, 128) if notes.tiny else (8192, 256)
            w = torch.randn(rows, columns, device=device)
            h = torch.eye(columns, device=device) * 1000 + 1

            def solve() -> None:
                solve_linears({"w": w}, h.clone(), Scheme(4, 128).grid())

            notes.fact("solve_s", {"shape": [rows, columns], "seconds": round(seconds_of(solve, device, 1, 1), 3)})
            notes.fact("solve_profile", profiled(solve, notes))
    with notes.step("time by shape", 15 if notes.cuda else 0):
        times = {}
        for rows, columns in ((64, 128),) if notes.tiny else ((1024, 4096), (8192, 4096), (59136, 4096)):
            w = torch.randn(rows, columns, device=device)
            h = torch.eye(columns, device=device) * 1000 + 1
            began = time.perf_counter()
            solve_linears({"w": w}, h, Scheme(4, 128).grid())
            wait(device)
            times[f"[{rows}, {columns}]"] = round(time.perf_counter() - began, 3)
            notes.fact("solve_by_shape_s", times)
    with notes.step("Hessians", 3 if notes.cuda else 0):
        width = 256 if notes.tiny else 8192
        x = torch.randn(width, width, device=device).bfloat16()
        triangle = Triangle(width)
        flat = torch.zeros(triangle.size, device=device)
        took = seconds_of(lambda: triangle.add_products(flat, x), device, 2, 1)
        facts = {"float32_ms": round(1e3 * took, 2), "float32_tflops": round(17 / 16 * width**3 / took / 1e12, 2)}
        if notes.cuda and notes.real:
            wanted = (x.float().T @ x.float()).cpu()
            summed = torch.mm(x.T, x, out_dtype=torch.float32)
            facts["bfloat16_error"] = error_of(summed, wanted)
            took = seconds_of(lambda: torch.mm(x.T, x, out_dtype=torch.float32), device, 3, 1)
            facts |= {"bfloat16_ms": round(1e3 * took, 2), "bfloat16_tflops": round(2 * width**3 / took / 1e12, 1)}
        notes.fact("hessian_speed", facts)


def ranks(notes: Notes) -> None:
    """The same job by one process and by two ranks on one device, which talk over gloo.

    On a CPU their bytes are the same. A GPU's matmuls depend on the number of rows, in last bits: some codes differ.
    """
    if not notes.real:
        notes.fact("left_out", "processes of their own see no fake tensors")
        return
    device = "cuda:0" if notes.cuda else "cpu"
    text = ["--calibration", str(CALIBRATION), "--eval-text", str(HELD_OUT), "--builtin-share", "0"]
    words = ["quantize", str(TINY_MODEL), *text, "--device", device, "--group-size", "32", "-n", "8", "--json"]
    words += ["--sequence-length", "128", "--eval-samples", "4", "--error-correction", "1"]
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both["GLOO_SOCKET_IFNAME"] = "lo"  # a machine without a network may not resolve its own name
    one = Run("one", [*words, "-o", str(notes.work / "ranks-1")], {"OMP_NUM_THREADS": "1"}, notes.work / "one.log")
    one.start()
    started = [
        Run(
            f"rank {k}", [*words, "-o", str(notes.work / "ranks-2")], both | {"RANK": str(k)},
            notes.work / f"rank-{k}.log",
        ).start()
        for k in range(2)
    ]  # fmt: skip
    with notes.step("one process"):
        kl = one.finish(notes.left)["drift"]["kl"]["mean"]
    with notes.step("two ranks"):
        kl_of_two = started[0].finish(notes.left)["drift"]["kl"]["mean"]
        assert started[1].process is not None
        notes.same("exit code of the second rank", started[1].process.wait(max(1.0, notes.left)), 0)
    if notes.errors:
        return
    with notes.step("compare"):
        notes.check("KL of two ranks over one's, - 1", kl_of_two / kl - 1, 0.1 if notes.cuda else 0.0)
        shards = [sorted((notes.work / f"ranks-{size}").glob("*.safetensors")) for size in (1, 2)]
        pairs = [(a.read_bytes(), b.read_bytes()) for a, b in zip(*shards, strict=True)]
        other = sum(sum(x != y for x, y in zip(a, b, strict=True)) for a, b in pairs)
        notes.fact("bytes_that_differ", {"of": sum(len(a) for a, _ in pairs), "are": other})
        if not notes.cuda:
            notes.same("bytes of two ranks are one's", other, 0)


PARTS: dict[str, Callable[[Notes], None]] = {
    "triton": triton, "decode-4": decode_4, "decode-8": decode_8, "environment": environment, "kernels": kernels,
    "vram-4": vram_4, "vram-8": vram_8, "quantize": quantize,
    "layer-72b": layer_72b, "model": model, "gguf": gguf, "solver": solver, "ranks": ranks,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "logits"])
    parser.add_argument("--notes", type=Path)
    parser.add_argument("--found", type=Path, help="JSON of the parts before")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--checkpoints", default="", help="of `logits`: names under --work, with commas between")
    parser.add_argument("--caches", default="auto", help="of `logits`: dtypes of the KV cache")
    asked = parser.parse_args()
    if asked.part == "logits":
        cpu_logits(asked.work, asked.checkpoints.split(","), asked.caches.split(","))
        return 0
    device = torch.device("cuda", 0) if asked.device == "cuda" else CPU
    found = json.loads(asked.found.read_text()) if asked.found else {}
    notes = Notes(asked.notes, device, asked.tiny, asked.work, time.monotonic() + asked.seconds, found)
    if asked.device == "cuda" and not torch.cuda.is_available():
        notes.errors["device"] = "torch sees no CUDA GPU\n"
        notes.save()
        return 1
    PARTS[asked.part](notes)
    notes.save()
    return 1 if notes.errors else 0


if __name__ == "__main__":
    sys.exit(main())
