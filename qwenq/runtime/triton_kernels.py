"""Triton kernels for NVIDIA GPUs: matmuls straight from packed codes, and the small steps between them for one token.

Shapes: x [M, I] activations, M rows; O outputs, I inputs, G groups of K columns; H heads of D values, N heads of keys.

Codes are laid out by `linear.pack_codes`: a thread that loads 16 bytes of 4-bit codes gets from each shift of its
16-bit words codes of consecutive columns, two to a register as tensor cores want them.
`pairs` [2, G, O], 16-bit: scales, and zero points less the middle code 2 ** (bits - 1); both as stored, so exact. Of
symmetric weights the scales alone, [1, G, O].

Sums are taken in float32 in a fixed order (no atomics): the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from subprocess import SubprocessError
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenq.runtime.cpu_kernels import Head, KernelRefused
from qwenq.runtime.linear import UNIT

FEW_ROWS = 16  # a tensor core's rows: up to here columns are split and one tile has them all
PLAIN_SHARED_BYTES = 48 << 10  # a block's shared memory on any CUDA GPU without opting in for more
SCRATCH_BYTES = 8 << 10  # beside a kernel's loads in flight: what Triton changes layouts through

A = TypeVar("A")


@dataclass(frozen=True)
class Tiling:
    """Tiling of `multiply`: outputs and columns at a time, splits of the columns, warps, loads in flight, rows."""

    outputs: int = 64
    columns: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4
    in_place: bool = True  # codes to bfloat16 by bit patterns, in PTX
    rows: int = 64  # at most, at a time

    def tile(self, rows: int) -> int:
        """Rows at a time out of so many."""
        return min(self.rows, 16 if rows <= 16 else 32 if rows <= 32 else 64)

    def shared_bytes(self, rows: int, bits: int, group: int) -> int:
        """Shared memory of a block: codes, and activations once a group of the step, for each load in flight.

        On an H200 4 loads of 64 rows, 128 columns in groups of 32 and 16 outputs took 269,312 bytes; here 274,432.
        """
        x = 2 * self.tile(rows) * self.columns * max(1, self.columns // group)
        return self.stages * (x + self.outputs * self.columns * bits // 8) + SCRATCH_BYTES


# ---------------------------------------------------------------------- what a GPU takes

# The last two: Triton builds its launchers with the machine's C compiler, in a folder of its own.
LAUNCH_ERRORS = (triton.TritonError, RuntimeError, OSError, SubprocessError)
_taken: dict[tuple[Any, ...], int] = {}  # by kernel and case: which of the choices was launched


@cache
def shared_limit(device: torch.device) -> int:
    """Shared memory of one block of the device, in bytes."""
    if device.type != "cuda":
        return 1 << 30  # Triton's interpreter has no such limit
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", PLAIN_SHARED_BYTES))


def launched(case: tuple[Any, ...], choices: Sequence[A], launch: Callable[[A], Any]) -> A:
    """The first of `choices` that compiles and is launched; remembered by `case`. KernelRefused when none is."""
    why: Exception | None = None
    for at in range(_taken.get(case, 0), len(choices)):
        try:
            launch(choices[at])
        except LAUNCH_ERRORS as reason:
            if isinstance(reason, torch.OutOfMemoryError):
                raise
            why = reason
            continue
        _taken[case] = at
        return choices[at]
    said = (str(why).strip().splitlines() or [type(why).__name__])[0]
    raise KernelRefused(f"Triton kernel {case[0]}: {said}") from why


def launched_once(name: str, out: Tensor, launch: Callable[[], Any]) -> None:
    """A kernel without choices, which writes `out`; KernelRefused when it does not compile or is not launched."""
    launched((name, out.device, out.dtype), (None,), lambda _: launch())


@cache
def ladder(tiling: Tiling, rows: int, bits: int, group: int, limit_bytes: int) -> list[Tiling]:
    """`tiling`, then smaller ones, of which each fits; the smallest alone when none should."""
    steps = [tiling]
    while True:
        last = steps[-1]
        if last.stages > 2:
            steps.append(replace(last, stages=last.stages - 1))
        elif last.tile(rows) > 16:
            steps.append(replace(last, rows=last.tile(rows) // 2))
        elif last.columns > 64:
            steps.append(replace(last, columns=last.columns // 2))
        elif last.outputs > 16:
            steps.append(replace(last, outputs=last.outputs // 2))
        elif last.stages > 1:
            steps.append(replace(last, stages=1))
        else:
            break
    return [t for t in steps if t.shared_bytes(rows, bits, group) <= limit_bytes] or steps[-1:]


# ---------------------------------------------------------------------- matmuls of few rows

# Four times two codes out of two 16-bit words: (word >> 4 i) & 15 is put behind the bits of 128, then 136 is taken off.
_FOUR_CODES = tl.constexpr("""{
.reg .b32 word, one, middle;
mov.b32 one, 0x3f803f80;
mov.b32 middle, 0xc308c308;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 word, $4, 4;
lop3.b32 $1, word, 0x000f000f, 0x43004300, 0xea;
shr.u32 word, $4, 8;
lop3.b32 $2, word, 0x000f000f, 0x43004300, 0xea;
shr.u32 word, $4, 12;
lop3.b32 $3, word, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, one, middle;
fma.rn.bf16x2 $1, $1, one, middle;
fma.rn.bf16x2 $2, $2, one, middle;
fma.rn.bf16x2 $3, $3, one, middle;
}""")


# Four bytes: the low seven bits behind those of 128, less 128 where the top bit is set and 256 where it is not.
_BYTES = tl.constexpr("""{
.reg .b32 a, b, zero, minus;
mov.b32 zero, 0;
mov.b32 minus, 0xbf80bf80;
prmt.b32 a, $2, zero, 0x4140;
prmt.b32 b, $2, zero, 0x4342;
lop3.b32 $0, a, 0x007f007f, 0x43004300, 0xea;
lop3.b32 $1, b, 0x007f007f, 0x43004300, 0xea;
lop3.b32 a, a, 0x00800080, 0x43804380, 0x6a;
lop3.b32 b, b, 0x00800080, 0x43804380, 0x6a;
fma.rn.bf16x2 $0, a, minus, $0;
fma.rn.bf16x2 $1, b, minus, $1;
}""")


@triton.jit
def _one_tile(codes, dtype: tl.constexpr, IN_PLACE: tl.constexpr):
    """8-bit codes less 128, as numbers of `dtype`."""
    if IN_PLACE:
        return tl.inline_asm_elementwise(_BYTES, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    return (codes.to(tl.int16) - 128).to(dtype)


@triton.jit
def _four_tiles(words, dtype: tl.constexpr, IN_PLACE: tl.constexpr):
    """The four codes of each word less 8, as numbers of `dtype`."""
    if IN_PLACE:
        return tl.inline_asm_elementwise(
            _FOUR_CODES, "=&r,=&r,=&r,=&r,r", [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    w = words.to(tl.int32)
    return (
        ((w & 15) - 8).to(dtype),
        (((w >> 4) & 15) - 8).to(dtype),
        (((w >> 8) & 15) - 8).to(dtype),
        (((w >> 12) & 15) - 8).to(dtype),
    )


@triton.jit(do_not_specialize=["rows", "units", "groups", "steps"])
def _multiply(
    x_ptr, codes_ptr, pairs_ptr, bias_ptr, out_ptr, rows, outputs, units, groups, steps,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """x w' for ROWS rows and BLOCK_O outputs; of the columns, one split: `steps` times BLOCK_K."""
    TILES: tl.constexpr = 4 if BITS == 4 else 1
    PARTS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1  # groups of a step
    split, inputs = tl.program_id(1), units * 32
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_read = tl.minimum(o, outputs - 1)
    t = tl.arange(0, BLOCK_K // TILES)
    column = t // 8 * 32 + t % 8 if BITS == 4 else t
    row_read = units * 8 if BITS == 4 else inputs
    codes_at = codes_ptr + o_read[None, :].to(tl.int64) * row_read + t[:, None]
    x_at = x_ptr + m[:, None] * inputs + column[None, :]
    acc = tl.zeros((ROWS, BLOCK_O), tl.float32)
    first = split * steps
    for step in range(first, tl.minimum(first + steps, inputs // BLOCK_K)):
        codes = tl.load(codes_at + step * (BLOCK_K // TILES))
        if BITS == 4:
            w_0, w_1, w_2, w_3 = _four_tiles(codes, x_ptr.dtype.element_ty, IN_PLACE)
        else:
            w_0 = _one_tile(codes, x_ptr.dtype.element_ty, IN_PLACE)
        for part in tl.static_range(PARTS):
            seen = (m < rows)[:, None]
            if PARTS > 1:
                seen = seen & (t // (GROUP // TILES) == part)[None, :]
            x = tl.load(x_at + step * BLOCK_K, mask=seen, other=0.0)
            part_acc = tl.dot(x, w_0, input_precision="ieee")
            if not SYM:
                sums = tl.sum(x.to(tl.float32), 1)
            if BITS == 4:
                x_1 = tl.load(x_at + step * BLOCK_K + 8, mask=seen, other=0.0)
                x_2 = tl.load(x_at + step * BLOCK_K + 16, mask=seen, other=0.0)
                x_3 = tl.load(x_at + step * BLOCK_K + 24, mask=seen, other=0.0)
                part_acc = tl.dot(x_1, w_1, part_acc, input_precision="ieee")
                part_acc = tl.dot(x_2, w_2, part_acc, input_precision="ieee")
                part_acc = tl.dot(x_3, w_3, part_acc, input_precision="ieee")
                if not SYM:
                    sums += tl.sum(x_1.to(tl.float32), 1)
                    sums += tl.sum(x_2.to(tl.float32), 1)
                    sums += tl.sum(x_3.to(tl.float32), 1)
            pair_at = pairs_ptr + (step * BLOCK_K // GROUP + part) * outputs + o_read
            if not SYM:
                part_acc -= sums[:, None] * tl.load(pair_at + groups * outputs).to(tl.float32)[None, :]
            acc += part_acc * tl.load(pair_at).to(tl.float32)[None, :]
    kept = (m < rows)[:, None] & (o < outputs)[None, :]
    at = m[:, None] * outputs + o[None, :]
    if not SPLIT:
        if HAS_BIAS:
            # rounded first, as a bias added afterwards would find it
            acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32) + tl.load(bias_ptr + o_read).to(tl.float32)[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=kept)
    else:
        tl.store(out_ptr + split * rows * outputs + at, acc, mask=kept)


@triton.jit
def _add_splits(
    partial_ptr, bias_ptr, out_ptr, count, outputs,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = at < count
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + split * count + at, mask=kept, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + at % outputs, mask=kept, other=0.0).to(tl.float32)
        acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32) + bias
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=kept)


def multiply(
    x_MI: Tensor, codes: Tensor, pairs_2GO: Tensor, bias_O: Tensor | None, sym: bool, tiling: Tiling | None = None
) -> Tensor:
    """x w' + bias, [M, O] in the dtype of x; w as `linear.pack_codes` and `pairs` keep it.

    Without a `tiling` the GPU's own is found. ValueError when columns of a tiling do not divide the inputs;
    KernelRefused when no tiling can be compiled and launched.
    """
    (rows, inputs), (_, groups, outputs) = x_MI.shape, pairs_2GO.shape
    bits, group = 8 if codes.shape[1] == inputs else 4, inputs // groups
    if tiling is not None and inputs % tiling.columns:
        raise ValueError(f"{tiling.columns} columns at a time do not divide {inputs} inputs")
    in_place = x_MI.is_cuda and x_MI.dtype == torch.bfloat16
    out = torch.empty(rows, outputs, dtype=x_MI.dtype, device=x_MI.device)
    usual = tiling or tiling_for(rows, outputs, inputs, bits)
    most = min(usual.splits, inputs // usual.columns)
    partial = torch.empty(most, rows, outputs, device=x_MI.device) if most > 1 else out
    bias = out if bias_O is None else bias_O

    def launch(asked: Tiling) -> None:
        steps, tile = inputs // asked.columns, asked.tile(rows)
        _multiply[triton.cdiv(outputs, asked.outputs), most, triton.cdiv(rows, tile)](
            x_MI, codes if bits == 8 else codes.view(torch.int16), pairs_2GO, bias, partial,
            rows, outputs, inputs // UNIT, groups, triton.cdiv(steps, most),
            BITS=bits, GROUP=group, SYM=sym, HAS_BIAS=bias_O is not None, SPLIT=most > 1,
            ROWS=tile, BLOCK_O=asked.outputs, BLOCK_K=asked.columns, IN_PLACE=asked.in_place and in_place,
            num_warps=asked.warps, num_stages=asked.stages,
        )  # fmt: skip

    if tiling is not None:
        launch(tiling)
    else:
        limit = shared_limit(x_MI.device)
        case = ("multiply", x_MI.device, x_MI.dtype, bits, group, sym, bias_O is not None, usual, usual.tile(rows))
        launched(case, ladder(usual, usual.tile(rows), bits, group, limit), launch)
    if most > 1:
        launched_once("add_splits", out, lambda: _add_splits[(triton.cdiv(rows * outputs, 512),)](
            partial, bias, out, rows * outputs, outputs, HAS_BIAS=bias_O is not None, SPLITS=most, BLOCK=512
        ))  # fmt: skip
    return out


def tiling_for(rows: int, outputs: int, inputs: int, bits: int) -> Tiling:
    """The tiling of a shape: of those that gave right results on an H200, the fastest there, or close to it.

    reports/gpu.md has the times. Rows beyond `FEW_ROWS` and inputs that 128 does not divide were tried in one tiling.
    """
    if inputs % 128:
        return Tiling(32, 64, 1 if outputs >= 4096 else 3, 4, 3)
    if rows > FEW_ROWS:
        return Tiling(32, 128, 1, 4, 3)
    if outputs >= 8192:
        return Tiling(128, 128, 8, 4, 3)
    if outputs >= 2048:
        return Tiling(64 if bits == 4 else 32, 128, 8, 4, 3)
    return Tiling(32, 128, 8, 4, 3) if bits == 4 else Tiling(16, 128, 8, 2, 3)


# ---------------------------------------------------------------------- weights written out


@triton.jit(do_not_specialize=["start", "stop", "units", "groups"])
def _write_rows(
    codes_ptr, pairs_ptr, out_ptr, start, stop, outputs, units, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = 4 if BITS == 4 else 1
    group, inputs = tl.program_id(1), units * 32
    o = start + tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    kept = o < stop
    t = tl.arange(0, GROUP // TILES)
    row_read = units * 8 if BITS == 4 else inputs
    codes_at = codes_ptr + o[:, None].to(tl.int64) * row_read + group * (GROUP // TILES) + t[None, :]
    codes = tl.load(codes_at, mask=kept[:, None], other=0).to(tl.int32)
    scale = tl.load(pairs_ptr + group * outputs + o, mask=kept, other=0.0).to(tl.float32)
    middle = tl.full((BLOCK_O,), 8.0 if BITS == 4 else 128.0, tl.float32)
    if not SYM:
        middle += tl.load(pairs_ptr + (groups + group) * outputs + o, mask=kept, other=0.0).to(tl.float32)
    column = t // 8 * 32 + t % 8 if BITS == 4 else t
    out_at = out_ptr + (o - start)[:, None].to(tl.int64) * inputs + group * GROUP + column[None, :]
    for tile in tl.static_range(TILES):
        code = (codes >> (4 * tile)) & 15 if BITS == 4 else codes
        w = (code.to(tl.float32) - middle[:, None]) * scale[:, None]
        tl.store(out_at + 8 * tile, w.to(out_ptr.dtype.element_ty), mask=kept[:, None])


def write_rows(codes: Tensor, pairs_2GO: Tensor, sym: bool, out_RI: Tensor, start: int) -> None:
    """Outputs `start` and on of the weight, each value rounded once, into out [R, I]."""
    (rows, inputs), (_, groups, outputs) = out_RI.shape, pairs_2GO.shape
    bits, group = 8 if codes.shape[1] == inputs else 4, inputs // groups
    launched_once("write_rows", out_RI, lambda: _write_rows[triton.cdiv(rows, 32), groups](
        codes if bits == 8 else codes.view(torch.int16), pairs_2GO, out_RI, start, start + rows, outputs,
        inputs // UNIT, groups, BITS=bits, GROUP=group, SYM=sym, BLOCK_O=32, num_warps=4,
    ))  # fmt: skip


# ---------------------------------------------------------------------- one token: norms, rotary positions, attention


@triton.jit
def _add_norm(
    h_ptr, added_ptr, weight_ptr, sum_ptr, out_ptr, width, eps, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    kept = c < width
    h = tl.load(h_ptr + row * width + c, mask=kept, other=0.0)
    if HAS_ADDED:
        h = (h.to(tl.float32) + tl.load(added_ptr + row * width + c, mask=kept, other=0.0).to(tl.float32)).to(h.dtype)
        tl.store(sum_ptr + row * width + c, h, mask=kept)
    f = h.to(tl.float32)
    scaled = (f * tl.rsqrt(tl.sum(f * f, 0) / width + eps)).to(h.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + c, (scaled * weight).to(h.dtype), mask=kept)


def add_norm(h_MI: Tensor, added_MI: Tensor | None, weight_I: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h + added, and its RMS norm, rounded where transformers' modules round."""
    rows, width = h_MI.shape
    total, out = (h_MI if added_MI is None else torch.empty_like(h_MI)), torch.empty_like(h_MI)
    launched_once("add_norm", out, lambda: _add_norm[(rows,)](
        h_MI, h_MI if added_MI is None else added_MI, weight_I, total, out, width, eps,
        HAS_ADDED=added_MI is not None, BLOCK=triton.next_power_of_2(width), num_warps=8 if width > 2048 else 4,
    ))  # fmt: skip
    return total, out


@triton.jit
def _gate(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = at < count
    gate = tl.load(gate_ptr + at, mask=kept, other=0.0)
    g = gate.to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(gate.dtype).to(tl.float32)
    up = tl.load(up_ptr + at, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (silu * up).to(gate.dtype), mask=kept)


def gate(gate_MI: Tensor, up_MI: Tensor) -> Tensor:
    """silu(gate) up."""
    out = torch.empty_like(gate_MI)
    blocks = triton.cdiv(out.numel(), 1024)
    launched_once("gate", out, lambda: _gate[(blocks,)](gate_MI, up_MI, out, out.numel(), BLOCK=1024))
    return out


@triton.jit
def _turned(x_ptr, norm_ptr, cos, sin, eps, HALF: tl.constexpr, NORMED: tl.constexpr):
    """Both halves of a head, normed (Qwen3) and turned by their positions; in the dtype of x after each step."""
    c = tl.arange(0, HALF)
    a, b = tl.load(x_ptr + c), tl.load(x_ptr + HALF + c)
    kind = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if NORMED:
        factor = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + eps)
        a = (a * factor).to(kind).to(tl.float32) * tl.load(norm_ptr + c).to(tl.float32)
        b = (b * factor).to(kind).to(tl.float32) * tl.load(norm_ptr + HALF + c).to(tl.float32)
        a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
    left = (a * cos).to(kind).to(tl.float32) - (b * sin).to(kind).to(tl.float32)
    right = (b * cos).to(kind).to(tl.float32) + (a * sin).to(kind).to(tl.float32)
    return left.to(kind), right.to(kind)


@triton.jit
def _clamped(x, limit, CLAMPED: tl.constexpr):
    return tl.clamp(x.to(tl.float32), -limit, limit) if CLAMPED else x


@triton.jit(do_not_specialize=["heads", "capacity"])
def _turn_and_keep(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, keys_ptr, values_ptr, length_ptr,
    heads, capacity, limit, eps, HALF: tl.constexpr, NORMED: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    c = tl.arange(0, HALF)
    cos, sin = tl.load(cos_ptr + c).to(tl.float32), tl.load(sin_ptr + c).to(tl.float32)
    if head < heads:
        left, right = _turned(q_ptr + head * 2 * HALF, q_norm_ptr, cos, sin, eps, HALF, NORMED)
        tl.store(q_out_ptr + head * 2 * HALF + c, left)
        tl.store(q_out_ptr + head * 2 * HALF + HALF + c, right)
    else:
        head = head - heads
        k_left, k_right = _turned(k_ptr + head * 2 * HALF, k_norm_ptr, cos, sin, eps, HALF, NORMED)
        v_left, v_right = tl.load(v_ptr + head * 2 * HALF + c), tl.load(v_ptr + head * 2 * HALF + HALF + c)
        kind = keys_ptr.dtype.element_ty
        at = (head.to(tl.int64) * capacity + tl.load(length_ptr) - 1) * 2 * HALF + c
        tl.store(keys_ptr + at, _clamped(k_left, limit, CLAMPED).to(kind))
        tl.store(keys_ptr + at + HALF, _clamped(k_right, limit, CLAMPED).to(kind))
        tl.store(values_ptr + at, _clamped(v_left, limit, CLAMPED).to(kind))
        tl.store(values_ptr + at + HALF, _clamped(v_right, limit, CLAMPED).to(kind))


def turn_and_keep(
    q_HD: Tensor, k_ND: Tensor, v_ND: Tensor, head: Head, cache: tuple[Tensor, Tensor], length: Tensor
) -> Tensor:
    """q turned by its position, [H, D]; k, turned, and v are put at position length - 1 of `cache` [1, N, S, D].

    `length` int32 [1]: tokens in the cache, this one among them.
    """
    (heads, width), (keys, values) = q_HD.shape, cache
    out = torch.empty_like(q_HD)
    normed = head.q_norm is not None
    clamped = keys.dtype in (torch.float8_e4m3fn, torch.float16)
    launched_once("turn_and_keep", out, lambda: _turn_and_keep[(heads + k_ND.shape[0],)](
        q_HD, k_ND, v_ND, head.cos, head.sin, head.q_norm if normed else q_HD, head.k_norm if normed else k_ND,
        out, keys, values, length, heads, keys.shape[2], torch.finfo(keys.dtype).max, head.eps,
        HALF=width // 2, NORMED=normed, CLAMPED=clamped, num_warps=1,
    ))  # fmt: skip
    return out


@triton.jit(do_not_specialize=["capacity"])
def _attend_part(
    q_ptr, keys_ptr, values_ptr, out_ptr, stats_ptr, length_ptr, scaling, capacity,
    EACH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of the keys for the heads that share them."""
    shared, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(length_ptr)
    r, d, s = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    heads_at = shared * EACH + r
    q = tl.load(q_ptr + heads_at[:, None] * WIDTH + d[None, :], mask=(r < EACH)[:, None], other=0.0)
    blocks = tl.cdiv(tl.cdiv(length, BLOCK), parts)
    first = part * blocks * BLOCK
    base = shared.to(tl.int64) * capacity * WIDTH
    most = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, tl.minimum(first + blocks * BLOCK, length), BLOCK):
        at = start + s
        inside = at < length
        k = tl.load(keys_ptr + base + at[None, :] * WIDTH + d[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(values_ptr + base + at[:, None] * WIDTH + d[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scaling
        scores = tl.where(inside[None, :], scores, -1e30)
        now = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp(scores - now[:, None])
        p = tl.where(inside[None, :], p, 0.0)
        factor = tl.exp(most - now)
        total = total * factor + tl.sum(p, 1)
        acc = acc * factor[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        most = now
    row = heads_at * parts + part
    kept = r < EACH
    tl.store(out_ptr + row[:, None] * WIDTH + d[None, :], acc, mask=kept[:, None])
    tl.store(stats_ptr + 2 * row, most, mask=kept)
    tl.store(stats_ptr + 2 * row + 1, total, mask=kept)


@triton.jit
def _join_parts(parts_ptr, stats_ptr, out_ptr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    head = tl.program_id(0)
    p, d = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    most = tl.load(stats_ptr + 2 * (head * PARTS + p))
    total = tl.load(stats_ptr + 2 * (head * PARTS + p) + 1)
    factor = tl.exp(most - tl.max(most, 0))
    acc = tl.load(parts_ptr + (head * PARTS + p)[:, None] * WIDTH + d[None, :])
    out = tl.sum(acc * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(out_ptr + head * WIDTH + d, out.to(out_ptr.dtype.element_ty))


PARTS = 32
KEYS_AT_ONCE = ((64, 3), (64, 2), (32, 2), (16, 2), (16, 1))  # keys of a block, loads in flight


def attend_one(
    q_HD: Tensor, cache: tuple[Tensor, Tensor], length: Tensor, scaling: float, parts: int = PARTS,
    block: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one token over the first `length` (int32 [1]) of the cache's tokens, [H, D].

    Without a `block` of keys the GPU's own is found. KernelRefused when none can be compiled and launched.
    """
    (heads, width), (keys, values) = q_HD.shape, cache
    shared = keys.shape[1]
    each = heads // shared
    rows = max(16, triton.next_power_of_2(each))
    partial = torch.empty(heads, parts, width, device=q_HD.device)
    stats = torch.empty(heads, parts, 2, device=q_HD.device)

    def launch(asked: tuple[int, int]) -> None:
        _attend_part[shared, parts](
            q_HD, keys, values, partial, stats, length, scaling, keys.shape[2],
            EACH=each, ROWS=rows, WIDTH=width, BLOCK=asked[0], num_warps=4, num_stages=asked[1],
        )  # fmt: skip

    def fits(asked: tuple[int, int]) -> bool:
        of_keys = 2 * width * keys.element_size() * asked[0] * asked[1]
        return of_keys + 2 * rows * (width + asked[0]) <= shared_limit(q_HD.device)

    if block is not None:
        launch((block, 3))
    else:
        case = ("attend_one", q_HD.device, q_HD.dtype, keys.dtype, rows, each, width)
        launched(case, [asked for asked in KEYS_AT_ONCE if fits(asked)] or KEYS_AT_ONCE[-1:], launch)
    out = torch.empty_like(q_HD)
    launched_once(
        "join_parts", out, lambda: _join_parts[(heads,)](partial, stats, out, PARTS=parts, WIDTH=width, num_warps=4)
    )
    return out
