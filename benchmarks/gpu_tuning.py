"""gpu_check.py's part `triton`: are the Triton kernels right, how fast in which tiling, and which one is best.

Every candidate runs behind its own guard: one that does not compile or is wrong is noted and left out. Compiling is
most of the work, so processes of their own fill Triton's cache first, side by side.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_parts import Notes, bandwidths, error_of, replayed_seconds, wait
from torch import Tensor

from qwenq.runtime import triton_kernels as kernels
from qwenq.runtime.cpu_kernels import Head
from qwenq.runtime.linear import unpack_codes
from qwenq.runtime.triton_kernels import Tiling

COMPILERS = 14
RING_BYTES = 200e6  # of weights read before any is read again: more than the second-level cache holds
SPLITS = (1, 2, 4, 8)
SHAPES = {
    "72B": ((29568, 8192), (8192, 29568), (8192, 8192), (1024, 8192)),
    "7B": ((18944, 3584), (3584, 18944), (3584, 3584), (512, 3584)),
}
TILINGS = {
    4: (
        *(Tiling(o, 128, 1, 2 if o == 16 else 4, s) for o in (16, 32, 64, 128) for s in (3, 4, 6)),
        Tiling(32, 128, 1, 2, 4), Tiling(64, 128, 1, 2, 4), Tiling(128, 128, 1, 8, 4), Tiling(64, 256, 1, 4, 4),
        Tiling(32, 128, 1, 4, 4, False), Tiling(64, 128, 1, 4, 4, False),
    ),
    8: (
        *(Tiling(o, 128, 1, 2 if o == 16 else 4, s) for o in (16, 32, 64) for s in (3, 4, 6)),
        Tiling(128, 128, 1, 4, 3), Tiling(64, 128, 1, 8, 4), Tiling(64, 64, 1, 4, 6),
        Tiling(64, 128, 1, 4, 4, False),
    ),
}  # fmt: skip
GROUP = 128
# Compared with float64: bits, outputs, inputs, group, symmetric, rows; each in these WAYS: splits, in place
RIGHT = (
    (4, 1000, 1024, 128, True, 1), (4, 1000, 1024, 128, False, 3), (4, 520, 896, 64, True, 16),
    (4, 512, 448, 32, False, 1), (4, 1032, 2048, 256, True, 40), (4, 64, 192, 64, False, 100),
    (8, 1000, 1024, 128, True, 1), (8, 1000, 1024, 128, False, 3), (8, 520, 896, 64, True, 16),
    (8, 512, 448, 32, False, 1), (8, 1032, 2048, 256, True, 40), (8, 64, 192, 64, False, 100),
)  # fmt: skip
WAYS = ((1, True), (3, True), (1, False))


def times(x: Tensor, found: Weight, tiling: Tiling) -> Callable[[], Tensor]:
    return partial(kernels.multiply, x, found.codes, found.pairs, None, True, tiling)


@dataclass
class Weight:
    """A random packed weight."""

    codes: Tensor
    pairs: Tensor
    sym: bool = True

    @property
    def n_bytes(self) -> int:
        return self.codes.numel() + self.pairs.numel() * 2


def weight(bits: int, outputs: int, inputs: int, device: torch.device, sym: bool = True, group: int = GROUP) -> Weight:
    codes = torch.randint(0, 256, (outputs, inputs * bits // 8), dtype=torch.uint8, device=device)
    scales = (0.5 + torch.rand(inputs // group, outputs, device=device)) * inputs**-0.5 * 3.5 / (1 << bits)
    shifts = torch.zeros_like(scales) if sym else torch.randint_like(scales, -(1 << bits - 2), 1 << bits - 2)
    return Weight(codes, torch.stack((scales, shifts)).half(), sym)


def reference(found: Weight, bits: int, inputs: int) -> Tensor:
    """The weight in float32, [O, I], by plain torch."""
    codes = unpack_codes(found.codes, bits).float() - (1 << bits - 1)
    scale, shift = (p.T.float().repeat_interleave(inputs // found.pairs.shape[1], 1) for p in found.pairs)
    return (codes - shift) * scale


def tune(notes: Notes) -> None:
    if not notes.cuda:
        notes.fact("left_out", "Triton kernels are tuned on a GPU")
        return
    with notes.step("bandwidth"):
        gc.freeze()  # a capture collects garbage first
        notes.fact("gpu", torch.cuda.get_device_name(0))
        _bandwidth(notes)
    with notes.step("compile"):
        children = [
            subprocess.Popen(
                [sys.executable, __file__, str(k), str(COMPILERS)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for k in range(COMPILERS)
        ]  # fmt: skip
        deadline = time.monotonic() + min(60.0, notes.left - 20)
        for child in children:
            try:
                child.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        said = [child.stderr.read().decode(errors="replace")[-600:] for child in children if child.stderr]
        notes.fact("compile_errors", [text for text in said if text.strip()][:3])
    with notes.step("right"):
        _right(notes)
    with notes.step("attention right"):
        _attention_right(notes)
    for family in SHAPES:
        for bits in (4, 8):
            for outputs, inputs in SHAPES[family]:
                name = f"{bits}-bit [{outputs}, {inputs}]"
                with notes.step(name, 6):
                    _tune_shape(notes, name, bits, outputs, inputs)
    with notes.step("rows", 6):
        _rows(notes)
    with notes.step("written out", 6):
        _written(notes)
    with notes.step("attention", 5):
        _attention(notes)
    with notes.step("small kernels", 3):
        _small(notes)


def _bandwidth(notes: Notes) -> None:
    """Copied and read over 2 GiB, ten times each, as the part `environment` measures it."""
    found = bandwidths(notes)
    notes.fact("bandwidths", found)
    notes.fact("bandwidth_gb_s", found["bandwidth_gb_s"])


def _right(notes: Notes) -> None:
    """Odd shapes, groups and zero points, against float64."""
    device = notes.device
    for bits, outputs, inputs, group, sym, rows in RIGHT:
        label = f"{bits}-bit g{group}{'' if sym else ' asym'} [{outputs}, {inputs}], {rows} rows"
        with notes.step(label):
            found = weight(bits, outputs, inputs, device, sym, group)
            w_OI = reference(found, bits, inputs)
            x, bias = (torch.randn(*s, device=device).bfloat16() for s in ((rows, inputs), (outputs,)))
            wanted = x.cpu().double() @ w_OI.cpu().double().T + bias.cpu().double()
            columns = 128 if inputs % 128 == 0 else 64
            for split, in_place in WAYS:
                tiling = Tiling(32, columns, split, 4, 3, in_place)
                got = kernels.multiply(x, found.codes, found.pairs, bias, sym, tiling)
                notes.check(f"{label}, splits {split}, in place {in_place}", error_of(got, wanted), 0.004)
            again = kernels.multiply(x, found.codes, found.pairs, bias, sym, tiling)
            notes.same(f"{label}: the same bits again", torch.equal(got, again), True)
            out = torch.empty(outputs - 8, inputs, dtype=torch.bfloat16, device=device)
            kernels.write_rows(found.codes, found.pairs, sym, out, 8)
            notes.same(f"{label}: weights written out", torch.equal(out, w_OI[8:].bfloat16()), True)


def _attention_right(notes: Notes) -> None:
    for heads, shared, width, capacity, length, kind in (
        (64, 8, 128, 1100, 1, torch.bfloat16), (64, 8, 128, 1100, 777, torch.bfloat16),
        (14, 2, 64, 3000, 2999, torch.bfloat16), (28, 4, 128, 9000, 8191, torch.float8_e4m3fn),
    ):  # fmt: skip
        with notes.step(f"attention {heads}/{shared}/{width}, {length} of {capacity}, {kind}"):
            q = torch.randn(heads, width, device=notes.device).bfloat16()
            kv = [torch.randn(1, shared, capacity, width, device=notes.device).to(kind) for _ in "kv"]
            there = torch.tensor([length], dtype=torch.int32, device=notes.device)
            got = kernels.attend_one(q, (kv[0], kv[1]), there, width**-0.5)
            k, v = (x[0, :, :length].cpu().double().repeat_interleave(heads // shared, 0) for x in kv)
            scores = torch.einsum("hd,hsd->hs", q.cpu().double(), k) * width**-0.5
            wanted = torch.einsum("hs,hsd->hd", torch.softmax(scores, -1), v)
            notes.check(f"attention {heads}/{shared}/{width}, {length} keys, {kind}", error_of(got, wanted), 0.006)


def _timed(calls: Sequence[Callable[[], Any]], notes: Notes) -> float:
    """Seconds of one call inside a CUDA graph."""
    return replayed_seconds(calls, notes, 4)


def _tune_shape(notes: Notes, name: str, bits: int, outputs: int, inputs: int) -> None:
    device = notes.device
    one = outputs * inputs * bits / 8
    ring = [weight(bits, outputs, inputs, device) for _ in range(max(2, min(64, math.ceil(RING_BYTES / one))))]
    x = torch.randn(1, inputs, device=device).bfloat16()
    wanted = x.float() @ reference(ring[0], bits, inputs).T
    found: list[dict[str, Any]] = []
    for tiling in TILINGS[bits]:
        for splits in SPLITS:
            programs = math.ceil(outputs / tiling.outputs) * splits
            if splits > 1 and not 100 <= programs <= 2500:
                continue
            if inputs % tiling.columns:
                continue
            asked = replace(tiling, splits=splits)
            try:
                got = kernels.multiply(x, ring[0].codes, ring[0].pairs, None, True, asked)
                error = error_of(got, wanted)
                took = _timed([times(x, w, asked) for w in ring], notes)
            except Exception as reason:  # a tiling that does not fit is left out
                left_out = notes.facts.setdefault("left_out", {})
                left_out[f"{name} {asked}"] = str(reason)[-300:]
                continue
            rate = round(ring[0].n_bytes / took / 1e9, 1)
            found.append(asdict(asked) | {"us": round(1e6 * took, 2), "gb_s": rate, "error": float(f"{error:.3g}")})
    good = sorted((row for row in found if row["error"] < 0.004), key=lambda row: row["us"])
    wrong = [row for row in found if not row["error"] < 0.004]
    notes.facts.setdefault("tuning", {})[name] = sorted(found, key=lambda row: row["us"])
    notes.same(f"{name}: wrong tilings", wrong[:3], [])
    if good:
        best = good[0]
        share = best["gb_s"] / notes.facts.get("bandwidth_gb_s", math.inf)
        notes.facts.setdefault("best", {})[f"{bits} {outputs} {inputs}"] = best | {"share": round(share, 3)}
        if one > 5e7:
            notes.at_least(f"{name}: share of bandwidth", share, 0.7)
    notes.save()


def best_tiling(facts: dict[str, Any], bits: int, outputs: int, inputs: int) -> Tiling | None:
    """The best one found for a shape."""
    row = facts.get("best", {}).get(f"{bits} {outputs} {inputs}")
    return Tiling(*(row[k] for k in ("outputs", "columns", "splits", "warps", "stages", "in_place"))) if row else None


def use_best(found: dict[str, Any]) -> bool:
    """Have the kernels take what the part `triton` found best, where it did."""
    facts = found.get("parts", {}).get("triton", {}).get("facts", {})
    usual = kernels.tiling_for

    def tiling_for(rows: int, outputs: int, inputs: int, bits: int) -> Tiling:
        return best_tiling(facts, bits, outputs, inputs) or usual(rows, outputs, inputs, bits)

    kernels.tiling_for = tiling_for
    return bool(facts.get("best"))


def _rows(notes: Notes) -> None:
    """Growing rows through the best tiling, beside weights written out and multiplied."""
    for bits in (4, 8):
        for outputs, inputs in ((29568, 8192), (8192, 29568), (8192, 8192)):
            tiling = best_tiling(notes.facts, bits, outputs, inputs)
            ring = [weight(bits, outputs, inputs, notes.device) for _ in range(8 if outputs == inputs else 2)]
            rows = []
            for count in (1, 2, 4, 8, 16, 32, 64, 128, 256) if outputs > 10000 else (1, 2, 4, 8, 16):
                x = torch.randn(count, inputs, device=notes.device).bfloat16()
                row: dict[str, Any] = {"rows": count}
                for name, asked in (("best", tiling), ("stages 3", tiling and replace(tiling, stages=3, splits=1))):
                    if asked is None or (name == "stages 3") != (count > 16):
                        continue
                    try:
                        row[f"{name} us"] = round(1e6 * _timed([times(x, w, asked) for w in ring], notes), 1)
                    except Exception as reason:
                        row[f"{name} error"] = str(reason)[-200:]
                rows.append(row)
            notes.facts.setdefault("rows", {})[f"{bits}-bit [{outputs}, {inputs}]"] = rows
            notes.save()


def _written(notes: Notes) -> None:
    """Row blocks in bfloat16: GB/s read and written; then a chunk of 2,048 rows through the whole linear."""
    inputs, rows = 8192, []
    for bits in (4, 8):
        found = weight(bits, 29568, inputs, notes.device)
        x = torch.randn(2048, inputs, device=notes.device).bfloat16()
        y = torch.empty(2048, 29568, dtype=torch.bfloat16, device=notes.device)
        for count in (2048, 4096, 8192):
            out = torch.empty(count, inputs, dtype=torch.bfloat16, device=notes.device)
            starts = range(0, 29568 - count + 1, count)
            for block, warps in ((16, 4), (32, 4), (64, 4), (64, 8)):
                write = partial(kernels.write_rows, found.codes, found.pairs, True, out, block=block, warps=warps)
                calls = [partial(write, start) for start in starts]
                took = _timed(calls, notes)
                moved = count * inputs * (2 + bits / 8)
                rows.append({
                    "bits": bits, "rows of a block": count, "outputs": block, "warps": warps,
                    "us": round(1e6 * took, 1), "gb_s": round(moved / took / 1e9, 1),
                })  # fmt: skip

            took = _timed([partial(_whole, found, x, out, y)], notes)
            rate = round(2 * 2048 * inputs * 29568 / took / 1e12, 1)
            rows.append({"bits": bits, "rows of a block": count, "whole_ms": round(1e3 * took, 3), "tflops": rate})
            notes.fact("written_out", rows)


def _whole(found: Weight, x: Tensor, out: Tensor, y: Tensor) -> None:
    for start in range(0, y.shape[1], out.shape[0]):
        part = out[: min(out.shape[0], y.shape[1] - start)]
        kernels.write_rows(found.codes, found.pairs, True, part, start)
        torch.mm(x, part.T, out=y[:, start : start + part.shape[0]])


def _attention(notes: Notes) -> None:
    rows = []
    q = torch.randn(64, 128, device=notes.device).bfloat16()
    for keys in (1024, 8192, 32768):
        copies, shape = min(40, max(2, math.ceil(2e8 / (keys * 4096)))), (1, 8, keys + 64, 128)
        kv = [[torch.randn(shape, device=notes.device).bfloat16() for _ in "kv"] for _ in range(copies)]
        length = torch.tensor([keys], dtype=torch.int32, device=notes.device)
        for parts in (16, 32, 64):
            for block in (32, 64, 128):
                row: dict[str, Any] = {"keys": keys, "parts": parts, "block": block}
                try:
                    calls = [partial(kernels.attend_one, q, (c[0], c[1]), length, 0.1, parts, block) for c in kv]
                    took = _timed(calls, notes)
                    row |= {"us": round(1e6 * took, 1), "gb_s": round(keys * 4096 / took / 1e9, 1)}
                except Exception as reason:
                    row["error"] = str(reason)[-200:]
                rows.append(row)
                notes.fact("attention_speed", rows)


def _small(notes: Notes) -> None:
    device = notes.device
    h, w = torch.randn(1, 8192, device=device).bfloat16(), torch.ones(8192, device=device).bfloat16()
    g = torch.randn(1, 29568, device=device).bfloat16()
    q, k = torch.randn(64, 128, device=device).bfloat16(), torch.randn(8, 128, device=device).bfloat16()
    head = Head(torch.ones(1, 128, device=device).bfloat16(), torch.ones(1, 128, device=device).bfloat16())
    cache = tuple(torch.zeros(1, 8, 64, 128, device=device).bfloat16() for _ in "kv")
    length = torch.ones(1, dtype=torch.int32, device=device)
    notes.fact("small_us", {
        name: round(1e6 * _timed([call] * 20, notes), 2)
        for name, call in (
            ("add_norm", lambda: kernels.add_norm(h, h, w, 1e-6)), ("gate", lambda: kernels.gate(g, g)),
            ("turn_and_keep", lambda: kernels.turn_and_keep(q, k, k, head, (cache[0], cache[1]), length)),
        )
    })  # fmt: skip


def compile_some(index: int, of: int) -> None:
    """Run every `of`-th candidate once."""
    device = torch.device("cuda", 0)
    work = [(bits, tiling, splits) for bits in (4, 8) for tiling in TILINGS[bits] for splits in (1, 2)]
    x = torch.randn(1, 1024, device=device).bfloat16()
    calls: list[Callable[[], Any]] = []
    for bits, tiling, splits in work[index::of]:
        calls.append(times(x, weight(bits, 256, 1024, device), replace(tiling, splits=splits)))
    for bits, outputs, inputs, group, sym, rows in RIGHT[index::of]:
        found, many = weight(bits, outputs, inputs, device, sym, group), torch.randn(rows, inputs, device=device)
        bias, out = torch.randn(outputs, device=device).bfloat16(), torch.empty(8, inputs, device=device).bfloat16()
        columns = 128 if inputs % 128 == 0 else 64
        for split, in_place in WAYS:
            tiling = Tiling(32, columns, split, 4, 3, in_place)
            calls.append(partial(kernels.multiply, many.bfloat16(), found.codes, found.pairs, bias, sym, tiling))
        calls.append(partial(kernels.write_rows, found.codes, found.pairs, sym, out, 8))
    for call in calls:
        try:
            call()
        except Exception as reason:
            print(call, str(reason)[-200:], file=sys.stderr)
    wait(device)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    compile_some(int(sys.argv[1]), int(sys.argv[2]))
