"""Linears that stay packed while they multiply, on this project's Triton kernels or those that torch ships.

Which one per linear becomes depends on how its format describes it, on activation dtype and device:
`planning.kernels.choose`.
Shapes: x [..., in]; M rows of x; O outputs, I inputs, G groups of K columns.

- TritonLinear: 4- and 8-bit codes on NVIDIA GPUs, on this project's own kernels (`triton_kernels`).
- CpuLinear: codes of up to 8 bits on x86 CPUs, GGUF's types included, on this project's own kernels (`cpu_kernels`).
- Int4Linear: 4-bit codes in the layout of `_weight_int4pack_mm_for_cpu` or of tinygemm (`_weight_int4pack_mm`). Both
  take (scale, offset) pairs in the activations' dtype: w = (code - 8) * scale + offset. 8-bit codes in groups run there
  as two products, code = 16 * high + low. From `dense_from` rows on, one row block of outputs at a time is
  written out and multiplied densely, which is faster for prompts.
- Int8Linear: `_weight_int8pack_mm`, one scale per row, kept in float32 and applied to the product.
- Nf4Linear: bitsandbytes' table of 16 values, likewise in row blocks.
- TiledLinear: any bits, group and dtype; row blocks of outputs are dequantized in float32 for every call.
- BlockLinear: a GGUF weight as the file has it, of any type, likewise in row blocks.
- StoredLinear: 16-bit weights; where activations have another dtype they stay as stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenq.formats.base import PackedShape
from qwenq.formats.bitsandbytes import Nf4Blocks
from qwenq.formats.gguf import WRITTEN, Blocks, dequantize_blocks, type_scheme
from qwenq.machine import Compute, has_triton, lacks_for_cpu_kernels
from qwenq.model.devices import multiply_into, product_dtype
from qwenq.planning.kernels import (
    CPU_GROUPS,
    Choice,
    Kind,
    choose,
    cpu_bits,
    dense_from,
    kernel_group,
    not_on_cpu_kernels,
    row_block_weights,
)
from qwenq.runtime import cpu_kernels
from qwenq.solver.grid import QTensor

STORED_DENSE_FROM = 4  # rows from which a 16-bit weight is multiplied in `product_dtype`; below, memory is the limit
_PACK_ROWS = 1024  # outputs packed at a time: int32 codes of a whole linear would be 8 times its packed size


def packed_linear(
    stored: QTensor | Nf4Blocks | Blocks,
    shape: PackedShape,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[nn.Module, Choice]:
    """The module that multiplies with `stored`, which its format describes as `shape`, and why that module."""
    if shape.sym and isinstance(stored, QTensor) and not _symmetric(stored):
        shape = replace(shape, sym=False)  # only the config calls it symmetric
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    lacking = lacks_for_cpu_kernels() if device.type == "cpu" else ""
    compute = Compute(str(dtype)[6:], device.type, capability, has_triton(), compiler=not lacking)
    choice = choose(shape, compute)
    if choice.kind == "cpu" and (why := cpu_kernels.refusal()):
        lacking, compute = why, replace(compute, compiler=False)
        choice = choose(shape, compute)
    if choice.kind == "cpu" and isinstance(stored, QTensor | Blocks):
        return CpuLinear(stored, shape, bias, dtype).requires_grad_(False), choice
    if lacking and not choice.reason and choose(shape, replace(compute, compiler=True)).kind == "cpu":
        choice = replace(choice, reason=lacking)
    codes = stored.integers() if isinstance(stored, Blocks) and choice.kind != "blocks" else stored
    if choice.kind == "triton" and isinstance(codes, QTensor):
        own = TritonLinear(codes, bias, dtype, device)
        why = own.refusal()
        if not why:
            return own.requires_grad_(False), choice
        del own  # before another takes its place
        choice = replace(choose(shape, replace(compute, triton=False)), reason=why)
    taken = stored if choice.kind == "blocks" else codes
    return _MODULES[choice.kind](taken, bias, dtype, device).requires_grad_(False), choice


UNIT = 32  # columns whose 4-bit codes are interleaved


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes uint8 [O, I] as the Triton kernels read them, row by row: 8-bit uint8 [O, I], 4-bit uint8 [O, I / 2].

    4-bit codes lie in units of 32 columns and 16 bytes; of a unit's eight little-endian 16-bit words, word u holds
    columns u, 8 + u, 16 + u and 24 + u from its low bits up.
    """
    if bits == 8:
        return codes_OI.contiguous()
    outputs, inputs = codes_OI.shape
    c = codes_OI.reshape(outputs, inputs // UNIT, 4, 8)  # nibble of the word, word
    low, high = c[:, :, 0] | (c[:, :, 1] << 4), c[:, :, 2] | (c[:, :, 3] << 4)
    return torch.stack((low, high), -1).view(outputs, inputs // 2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Codes that `pack_codes` packed, uint8 [O, I]."""
    if bits == 8:
        return packed
    outputs, half = packed.shape
    b = packed.view(outputs, 2 * half // UNIT, 8, 2)  # word, byte
    return torch.stack((b[..., 0] & 15, b[..., 0] >> 4, b[..., 1] & 15, b[..., 1] >> 4), 2).view(outputs, 2 * half)


def _symmetric(q: QTensor) -> bool:
    return bool((q.zeros_OG == q.integers.zero).all())


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


class _Linear(nn.Module):
    """The part that packed linears share: sizes, bias, and columns sorted by group."""

    def __init__(
        self,
        shape: Sequence[int],
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        order_I: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else _parameter(bias.to(device=device, dtype=dtype))
        self.order = None if order_I is None else _parameter(order_I.to(device))

    def rows_of(self, x: Tensor) -> Tensor:
        """x as [M, in], columns in the order of the groups."""
        x_MI = x.reshape(-1, self.in_features)
        return x_MI if self.order is None else x_MI.index_select(1, self.order)

    def finish(self, y_MO: Tensor, x: Tensor) -> Tensor:
        if self.bias is not None:
            y_MO = y_MO.add_(self.bias)
        return y_MO.view(*x.shape[:-1], self.out_features)


class _RowBlockLinear(_Linear):
    """A linear whose weight is written out for every call, a row block of outputs at a time. `is_head`: float32 out."""

    is_head = False

    def forward(self, x: Tensor) -> Tensor:
        x_MI = self.rows_of(x)
        out_dtype = torch.float32 if self.is_head else x.dtype
        y_MO = torch.empty(x_MI.shape[0], self.out_features, dtype=out_dtype, device=x.device)
        x_MI = x_MI.to(product_dtype(x_MI))
        return self.finish(multiply_row_blocks(y_MO, x_MI, self.weight_rows), x)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """The weight's outputs start to stop, [stop - start, in]."""
        raise NotImplementedError


def multiply_row_blocks(y_MO: Tensor, x_MI: Tensor, weight_rows: Callable[[int, int], Tensor]) -> Tensor:
    """y = x w' in the dtype of x, rounded to that of y, with the rows of w, [stop - start, I], that are asked for."""
    step = block_rows(x_MI.shape[1], x_MI.device)
    for start in range(0, y_MO.shape[1], step):
        stop = min(start + step, y_MO.shape[1])
        multiply_into(y_MO[:, start:stop], x_MI, weight_rows(start, stop).to(x_MI.dtype).T)
    return y_MO


class TritonLinear(_Linear):
    """4- or 8-bit codes with the scales and zero points as stored, multiplied by this project's own kernels; bfloat16.

    Few rows are multiplied straight from codes; from `dense_from` rows on blocks of outputs are written out in
    bfloat16. Where no tiling for several rows can be launched, `dense_from` is lowered, with a RuntimeWarning.
    """

    def __init__(self, q: QTensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        from qwenq.runtime import triton_kernels

        super().__init__(q.codes_OI.shape, bias, dtype, device, q.order_I)
        self.kernels, self.bits, self.sym, self.dtype = triton_kernels, q.integers.bits, _symmetric(q), dtype
        self.dense_from = dense_from("triton", device.type)
        codes_OI = q.codes_OI.to(device)
        codes = codes_OI.new_empty(self.out_features, self.in_features * self.bits // 8)
        for start in range(0, self.out_features, _PACK_ROWS):
            rows = slice(start, start + _PACK_ROWS)
            codes[rows] = pack_codes(codes_OI[rows], self.bits)
        self.codes = _parameter(codes)
        wide = self.in_features // q.scales_OG.shape[1]
        # Pairs per kernel group: a wider group repeats its own.
        scales_OG = q.scales_OG if q.scales_OG.dtype.itemsize == 2 else q.scales_OG.to(dtype)
        kept = [scales_OG]
        if not self.sym:
            kept.append((q.zeros_OG.to(torch.int16) - q.integers.zero).to(scales_OG.dtype))
        pairs = torch.stack([each_OG.to(device).T for each_OG in kept])
        self.pairs = _parameter(pairs.repeat_interleave(wide // kernel_group(wide), 1))

    def forward(self, x: Tensor) -> Tensor:
        x_MI = self.rows_of(x).contiguous()
        if x_MI.shape[0] < self.dense_from:
            try:
                y_MO = self.kernels.multiply(x_MI, *self._weight)
                return y_MO.view(*x.shape[:-1], self.out_features)
            except cpu_kernels.KernelRefused as reason:
                self.dense_from = x_MI.shape[0]
                warnings.warn(f"weights dequantized from {self.dense_from} rows on: {reason}", RuntimeWarning, 2)
        y_MO = torch.empty(x_MI.shape[0], self.out_features, dtype=x.dtype, device=x.device)
        step = min(block_rows(self.in_features, x.device), self.out_features)
        w_RI = torch.empty(step, self.in_features, dtype=x.dtype, device=x.device)
        for start in range(0, self.out_features, step):
            part_RI = w_RI[: min(step, self.out_features - start)]
            self.kernels.write_rows(self.codes, self.pairs, self.sym, part_RI, start)
            multiply_into(y_MO[:, start : start + part_RI.shape[0]], x_MI, part_RI.T)
        return self.finish(y_MO, x)

    @property
    def _weight(self) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        return self.codes, self.pairs, self.bias, self.sym

    def refusal(self) -> str:
        """Why this device takes none of the kernels' tilings for one token, or does not write weights out; empty."""
        device, inputs = self.codes.device, self.in_features
        try:
            self.kernels.multiply(torch.zeros(1, inputs, dtype=self.dtype, device=device), *self._weight)
            self.weight_rows(0, 1, self.dtype)
        except cpu_kernels.KernelRefused as reason:
            return str(reason)
        return ""

    def weight_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight's outputs start to stop, transposed, [in, stop - start], columns in the order of the groups."""
        w_RI = torch.empty(stop - start, self.in_features, dtype=dtype, device=self.codes.device)
        self.kernels.write_rows(self.codes, self.pairs, self.sym, w_RI, start)
        return w_RI.T


class CpuLinear(_Linear):
    """Codes of up to 8 bits with scales as stored, multiplied by this project's own CPU kernels; bfloat16.

    Activations are rounded to 16-bit integers with a scale for each kernel group. `is_head`: float32 out.
    """

    def __init__(
        self,
        stored: QTensor | Blocks,
        shape: PackedShape,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        is_head: bool = False,
    ) -> None:
        codes_OI, scales_OG, minima_OG = _signed(stored, cpu_bits(shape))
        order_I = stored.order_I if isinstance(stored, QTensor) else None
        super().__init__(codes_OI.shape, bias, dtype, codes_OI.device, order_I)
        self.bits, self.is_head = cpu_bits(shape), is_head
        wide = self.in_features // scales_OG.shape[1]
        each = wide // kernel_group(wide, CPU_GROUPS)  # a wider group repeats its own
        outputs = -(-self.out_features // cpu_kernels.BLOCK)
        codes = torch.empty(outputs, self.in_features * cpu_kernels.BLOCK * self.bits // 8, dtype=torch.uint8)
        for start in range(0, self.out_features, _PACK_ROWS):
            part_RI = codes_OI[start : start + _PACK_ROWS].view(torch.uint8)  # negative codes begin at 256
            packed = cpu_kernels.pack_codes(part_RI + (1 << (self.bits - 1)), self.bits)
            first = start // cpu_kernels.BLOCK
            codes[first : first + packed.shape[0]] = packed
        self.codes = _parameter(codes)
        self.scales = _parameter(cpu_kernels.pack_groups(_narrow(scales_OG).repeat_interleave(each, 1)))
        self.offsets = None
        if minima_OG is not None:
            self.offsets = _parameter(cpu_kernels.pack_groups(-minima_OG.float().repeat_interleave(each, 1)))

    def forward(self, x: Tensor) -> Tensor:
        x_MI = x.reshape(-1, self.in_features).contiguous()
        y_MO = torch.empty(x_MI.shape[0], self.out_features, dtype=torch.float32 if self.is_head else x.dtype)
        cpu_kernels.multiply(x_MI, self.kernel_linear(), y_MO)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def kernel_linear(self) -> cpu_kernels.Linear:
        """The kernels' view of it; its tensors stay where they are."""
        shape = self.out_features, self.in_features
        return cpu_kernels.packed(shape, self.codes, self.scales, self.offsets, self.bias, self.order)

    def rows(self, outputs_R: Tensor) -> Tensor:
        """The weight's rows of some outputs (int64), float32 [R, in], columns in the order of the groups."""
        codes_RI = cpu_kernels.unpack_codes(self.codes, self.bits, outputs_R).int() - (1 << (self.bits - 1))
        at = outputs_R // cpu_kernels.BLOCK, slice(None), outputs_R % cpu_kernels.BLOCK
        w_RGK = codes_RI.float().view(len(outputs_R), self.scales.shape[1], -1) * self.scales[at].float()[..., None]
        if self.offsets is not None:
            w_RGK = w_RGK - self.offsets[at][..., None]
        return w_RGK.view(len(outputs_R), self.in_features)


def _signed(stored: QTensor | Blocks, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 [out, in] of so many bits, scales and minima [out, groups], so that w = scale * code + minimum."""
    if isinstance(stored, Blocks):
        codes_OI, scales_OG, minima_OG = stored.signed()
        if minima_OG is None or bits == 8:
            return codes_OI, scales_OG, minima_OG
        return codes_OI - 8, scales_OG, minima_OG + 8 * scales_OG  # they were unsigned
    zero = stored.integers.zero
    codes_OI = (stored.codes_OI - zero).view(torch.int8)
    if _symmetric(stored):
        return codes_OI, stored.scales_OG, None
    return codes_OI, stored.scales_OG, stored.scales_OG.float() * (zero - stored.zeros_OG.float())


def _narrow(scales_OG: Tensor) -> Tensor:
    """Scales in float16 where that is exact, else float32."""
    halves_OG = scales_OG.to(torch.float16)
    return halves_OG if bool((halves_OG == scales_OG).all()) else scales_OG.float()


class Int4Linear(_Linear):
    """4-bit codes, or 8-bit ones as high and low halves, in the layout of torch's 4-bit kernel; bfloat16.

    With w = scale * (half - 8) + offset for each half, 16 w_high + w_low =
    scale * (code - 128) + 16 * offset_high + offset_low - 8 * scale. Halves without zero points share their pairs,
    [1, G, O, 2], which saves 4 bytes per group; others have their own, [2, G, O, 2].
    """

    def __init__(self, q: QTensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(q.codes_OI.shape, bias, dtype, device, q.order_I)
        wide = self.in_features // q.scales_OG.shape[1]
        self.group = kernel_group(wide)
        self.cuda_packed = device.type == "cuda"
        self.centred = _symmetric(q)
        self.halves = q.integers.bits // 4
        self.dense_from = dense_from("int4" if self.halves == 1 else "int4 halves", device.type)
        self.packed = _parameter(pack_int4(q.codes_OI.to(device), self.halves))
        # Pairs per kernel group: a wider group repeats its own.
        scale_GO = q.scales_OG.float().to(device).T.repeat_interleave(wide // self.group, 0)
        shift_GO = (q.integers.zero - q.zeros_OG.float()).to(device).T.repeat_interleave(wide // self.group, 0)
        scale_GO = scale_GO.to(dtype).float()  # rounded first, so that offsets are those of the rounded scale
        if self.halves == 1:
            offsets = [scale_GO * shift_GO]
        elif self.centred:
            offsets = [scale_GO * (8 / 17)]
        else:  # what is lost in rounding the high half's goes to the low half
            offset_GO = scale_GO * (shift_GO + 8)
            high_GO = (offset_GO / 17).to(dtype).float()
            offsets = [high_GO, offset_GO - 16 * high_GO]
        self.pairs = _parameter(torch.stack([torch.stack((scale_GO, each), -1).to(dtype) for each in offsets]))

    def forward(self, x: Tensor) -> Tensor:
        x_MI = self.rows_of(x)
        if x_MI.shape[0] >= self.dense_from and (y := self._dense(x_MI)) is not None:
            return self.finish(y, x)
        x_MI = x_MI.contiguous()
        y_MO = self._kernel(x_MI, 0)
        if self.halves == 2:
            y_MO = torch.add(self._kernel(x_MI, 1), y_MO, alpha=16)
        return self.finish(y_MO, x)

    def _kernel(self, x_MI: Tensor, half: int) -> Tensor:
        pairs = self.pairs[half % self.pairs.shape[0]]
        if self.cuda_packed:
            return torch.ops.aten._weight_int4pack_mm(x_MI, self.packed[half], self.group, pairs)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MI, self.packed[half], self.group, pairs)

    def weight_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The weight's outputs start to stop, transposed, [in, stop - start]; None in an unknown layout."""
        codes_KR = unpack_int4(self.packed[0], start, stop, self.out_features, self.in_features)
        if codes_KR is None:
            return None
        zero = 8
        if self.halves == 2:
            low_KR = unpack_int4(self.packed[1], start, stop, self.out_features, self.in_features)
            assert low_KR is not None  # of the same shape as the high half
            codes_KR, zero = codes_KR.mul_(16).add_(low_KR), 128
            del low_KR
        # centred codes fit a signed byte: -8 to 7, -128 to 127
        w_KR = codes_KR.sub_(zero).view(torch.int8).to(dtype)
        scales_G1R = self.pairs[0, :, None, start:stop, 0]
        w_GKR = w_KR.view(scales_G1R.shape[0], self.group, stop - start).mul_(scales_G1R)
        if not self.centred:
            offset_G1R = self.pairs[0, :, None, start:stop, 1]
            if self.halves == 2:
                low_G1R = self.pairs[1, :, None, start:stop, 1].float()
                offset_G1R = 16 * offset_G1R.float() + low_G1R - 8 * scales_G1R.float()
            w_GKR.add_(offset_G1R)
        return w_KR

    def _dense(self, x_MI: Tensor) -> Tensor | None:
        y_MO = torch.empty(x_MI.shape[0], self.out_features, dtype=x_MI.dtype, device=x_MI.device)
        # On a CPU values are written in float32, which its vectors are made for; on a GPU memory is the limit.
        dtype = x_MI.dtype if self.cuda_packed and self.centred else torch.float32
        x_MI = x_MI.to(product_dtype(x_MI))
        step = block_rows(self.in_features, x_MI.device)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            w_IR = self.weight_rows(start, stop, dtype)
            if w_IR is None:
                return None
            multiply_into(y_MO[:, start:stop], x_MI, w_IR.to(x_MI.dtype))
            del w_IR  # before the next block takes its place
        return y_MO


class Int8Linear(_Linear):
    """8-bit codes with one scale per row: `_weight_int8pack_mm`, the float32 scale applied to its product; bfloat16."""

    def __init__(self, q: QTensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(q.codes_OI.shape, bias, dtype, device, q.order_I)
        self.codes = _parameter((q.codes_OI.to(device) ^ 128).view(torch.int8).contiguous())  # code - 128
        self.scale = _parameter(q.scales_OG[:, 0].float().to(device))
        self.ones = _parameter(torch.ones(self.out_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x_MI = self.rows_of(x).contiguous()
        if x_MI.shape[0] < dense_from("int8", x.device.type):
            y_MO = torch.ops.aten._weight_int8pack_mm(x_MI, self.codes, self.ones)
            return self.finish((y_MO.float() * self.scale).to(x.dtype), x)
        y_MO = torch.empty(x_MI.shape[0], self.out_features, dtype=x.dtype, device=x.device)
        x_MI = x_MI.to(product_dtype(x_MI))
        step = block_rows(self.in_features, x.device)
        for start in range(0, self.out_features, step):
            w_RI = self.codes[start : start + step].to(x_MI.dtype)  # whole numbers to 128 are exact
            y_MO[:, start : start + step] = (x_MI @ w_RI.T) * self.scale[start : start + step]
            del w_RI  # before the next block takes its place
        return self.finish(y_MO, x)


class TiledLinear(_RowBlockLinear):
    """Codes as they are (4-bit ones two a byte), dequantized in float32 in row blocks for every call."""

    def __init__(self, q: QTensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(q.codes_OI.shape, bias, dtype, device, q.order_I)
        codes_OI = q.codes_OI.to(device)
        self.bits = q.integers.bits
        self.columns = self.in_features + self.in_features % 2
        if self.bits == 4:  # a byte holds a column of the left half and one of the right half
            if self.columns != self.in_features:
                codes_OI = F.pad(codes_OI, (0, 1))
            codes_OI = codes_OI[:, : self.columns // 2] | (codes_OI[:, self.columns // 2 :] << 4)
        self.codes = _parameter(codes_OI.contiguous())
        self.scales = _parameter(q.scales_OG.to(device).contiguous())
        self.zeros = None if _symmetric(q) else _parameter(q.zeros_OG.to(device).contiguous())
        self.zero = q.integers.zero

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """The weight's outputs start to stop, float32 [stop - start, in]."""
        codes_RI, scales_RG = self.codes[start:stop], self.scales[start:stop].float()
        if self.bits == 4:
            codes_RI = torch.cat((codes_RI & 15, codes_RI >> 4), 1)[:, : self.in_features]
        w_RGK = codes_RI.float().view(stop - start, scales_RG.shape[1], -1)
        w_RGK = w_RGK.sub_(self.zero if self.zeros is None else self.zeros[start:stop, :, None])
        return w_RGK.mul_(scales_RG[:, :, None]).view(stop - start, self.in_features)


class Nf4Linear(_RowBlockLinear):
    """bitsandbytes' NF4 with blocks inside rows, looked up in float32 in row blocks for every call.

    `codes` uint8 [out, in / 2], the first of two columns in the high half; `absmax` float32 [out, in / 64]. Weights are
    rounded to the dtype they came from, as bitsandbytes does.
    """

    def __init__(self, stored: Nf4Blocks, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(stored.shape, bias, dtype, device)
        self.stored_dtype, table = stored.dtype, stored.table
        self.codes = _parameter(stored.codes.to(device).view(self.out_features, -1))
        self.table = _parameter(torch.stack((table.repeat_interleave(16), table.repeat(16)), 1).to(device))  # by byte
        self.absmax = _parameter(stored.absmax.to(device).view(self.out_features, -1))

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """The weight's outputs start to stop, in the dtype it was quantized from."""
        absmax = self.absmax[start:stop]
        w = F.embedding(self.codes[start:stop].int(), self.table).view(*absmax.shape, -1)
        return w.mul_(absmax[:, :, None]).view(absmax.shape[0], self.in_features).to(self.stored_dtype)


class BlockLinear(_RowBlockLinear):
    """A GGUF weight, its bytes as they are: row blocks of outputs are dequantized in float32 for every call."""

    def __init__(
        self, stored: Blocks, bias: Tensor | None, dtype: torch.dtype, device: torch.device, *, is_head: bool = False
    ) -> None:
        super().__init__(stored.shape, bias, dtype, device)
        self.kind, self.is_head = stored.kind, is_head
        self.data = _parameter(stored.data_OB.to(device))

    def weight_rows(self, start: int, stop: int) -> Tensor:
        return dequantize_blocks(self.kind, self.data[start:stop])


class PackedEmbedding(nn.Module):
    """An embedding table that is a head's weight too: rows are dequantized as they are looked up."""

    def __init__(self, head: CpuLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.head, self.dtype = head, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.head.rows(ids.reshape(-1)).to(self.dtype).view(*ids.shape, -1)


class BlockEmbedding(nn.Module):
    """An embedding table of a GGUF file, its bytes as they are: rows are dequantized as they are looked up."""

    def __init__(self, stored: Blocks, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = stored.kind, dtype
        self.data = _parameter(stored.data_OB)

    def forward(self, ids: Tensor) -> Tensor:
        rows = dequantize_blocks(self.kind, self.data[ids.reshape(-1)]).to(self.dtype)
        return rows.view(*ids.shape, -1)


def dequantized_on_host(network: nn.Module) -> str:
    """The GGUF type of a weight whose values come from gguf-py, through host memory, for every call; empty: of none."""
    kinds = (each.kind for each in network.modules() if isinstance(each, BlockLinear | BlockEmbedding))
    return next((kind for kind in kinds if kind not in WRITTEN), "")


def block_head(stored: Blocks, dtype: torch.dtype, device: torch.device) -> CpuLinear | BlockLinear:
    """A GGUF file's head: on the CPU kernels where they take it, else in row blocks."""
    shape = PackedShape(type_scheme(stored.kind).bits, 32, *stored.shape, True, table=True, blocks=stored.kind)
    compute = Compute(str(dtype)[6:], device.type, compiler=not lacks_for_cpu_kernels())
    if not not_on_cpu_kernels(shape, compute) and not cpu_kernels.refusal():
        return CpuLinear(stored, shape, None, dtype, is_head=True)
    return BlockLinear(stored, None, dtype, device, is_head=True)


_MODULES: dict[Kind, Callable[..., nn.Module]] = {
    "int4": Int4Linear,
    "int4 halves": Int4Linear,
    "int8": Int8Linear,
    "tiled": TiledLinear,
    "nf4": Nf4Linear,
    "blocks": BlockLinear,
}


class StoredLinear(nn.Module):
    """A 16-bit weight kept as stored; for activations of another dtype it is converted in row blocks.

    A float16 head takes bfloat16 input in float16 instead: its products are finer and twice as fast on a CPU, and
    what comes out of the last norm cannot overflow. The inputs of other linears can.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, is_head: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias.to(device=weight.device, dtype=dtype))
        self.is_head = is_head

    def forward(self, x: Tensor) -> Tensor:
        # contiguous: for a slice of rows torch's bfloat16 product on a CPU copies the whole weight
        x_MI = x.reshape(-1, self.in_features).contiguous()
        own = x_MI.shape[0] == 1 and x_MI.dtype == torch.bfloat16 and x_MI.device == self.weight.device
        if own and (linear := self.kernel_linear()) is not None:
            y_MO = torch.empty(1, self.out_features, dtype=torch.float32 if self.is_head else x.dtype)
            cpu_kernels.multiply(x_MI, linear, y_MO)
            return y_MO.view(*x.shape[:-1], self.out_features)
        return self._product(x_MI).view(*x.shape[:-1], self.out_features)

    def kernel_linear(self) -> cpu_kernels.Linear | None:
        """This project's CPU kernel's view of it (twice as fast as torch for one row in bfloat16), or None."""
        if self.weight.device.type != "cpu" or self.weight.dtype.itemsize != 2 or cpu_kernels.refusal():
            return None
        return cpu_kernels.stored(self.weight, self.bias)

    def _product(self, x_MI: Tensor) -> Tensor:
        dtype = x_MI.dtype if x_MI.shape[0] < STORED_DENSE_FROM else product_dtype(x_MI)
        if dtype == x_MI.dtype == self.weight.dtype:
            return F.linear(x_MI, self.weight, self.bias)
        if dtype == torch.bfloat16 and self.is_head and self.weight.dtype == torch.float16:
            return F.linear(x_MI.half(), self.weight).float()
        shape, out_dtype = (x_MI.shape[0], self.out_features), dtype if self.is_head else x_MI.dtype
        y_MO = torch.empty(shape, dtype=out_dtype, device=x_MI.device)
        multiply_row_blocks(y_MO, x_MI.to(dtype), lambda start, stop: self.weight[start:stop])
        return y_MO if self.bias is None else y_MO.add_(self.bias)


def kernel_linear(module: nn.Module) -> cpu_kernels.Linear | None:
    """A linear as this project's CPU kernels see it; None where they do not multiply one row in bfloat16 with it."""
    return module.kernel_linear() if isinstance(module, CpuLinear | StoredLinear) else None


def block_rows(columns: int, device: torch.device) -> int:
    """Outputs of a row block."""
    return row_block_weights(columns, device.type) // columns


# ---------------------------------------------------------------------- torch's 4-bit layouts


def pack_int4(codes_OI: Tensor, halves: int = 1) -> Tensor:
    """Codes [out, in] in the kernel's layout, [halves, ...]: 4-bit ones as one, of 8-bit ones the high and low halves.

    Written into place in row blocks: what is allocated and freed beside the result would leave holes between weights.
    """
    packed: Tensor | None = None
    for start in range(0, codes_OI.shape[0], _PACK_ROWS):
        part_RI = codes_OI[start : start + _PACK_ROWS]
        for half, codes_RI in enumerate((part_RI >> 4, part_RI & 15) if halves == 2 else (part_RI,)):
            tiles = _pack(codes_RI)
            per_block = part_RI.shape[0] // tiles.shape[0]
            if packed is None:
                packed = tiles.new_empty((halves, codes_OI.shape[0] // per_block, *tiles.shape[1:]))
            packed[half, start // per_block : start // per_block + tiles.shape[0]] = tiles
    assert packed is not None
    return packed


def _pack(codes_OI: Tensor) -> Tensor:
    if codes_OI.device.type == "cuda":  # two columns a byte, the first one in the high half
        pairs = (codes_OI[:, 0::2] << 4) | codes_OI[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _inner_tiles(codes_OI.shape[1]))
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int().contiguous(), 1)


def _inner_tiles(columns: int) -> int:
    return next(tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0)


def _tile(device: torch.device, columns: int) -> tuple[int, int]:
    """Outputs and columns of a block that is packed by itself. A CPU's depends on its instructions."""
    if device.type == "cuda":
        return 8, 16 * _inner_tiles(columns)
    return next((rows for rows in (64, 32) if _order(rows, 1, device) is not None), 16), 1


_ORDERS: dict[tuple[torch.device, int, int], Tensor | None] = {}


def _order(rows: int, columns: int, device: torch.device) -> Tensor | None:
    """`tile_order` of this device's packer, found once a process and device; an identity as an empty tensor."""
    key = device, rows, columns
    if key not in _ORDERS:
        found = tile_order(_pack_column if device.type == "cpu" else _pack, rows, columns, device)
        _ORDERS[key] = found[:0] if found is not None and is_identity(found) else found
    return _ORDERS[key]


def _pack_column(codes_R1: Tensor) -> Tensor:
    """A CPU's packing of one column; cut short, so that no order is found, if equal columns differ."""
    columns = _pack(codes_R1.expand(-1, 32)).reshape(32, -1)
    return columns[0] if bool((columns == columns[0]).all()) else columns[0, :-1]


def unpack_int4(packed: Tensor, start: int, stop: int, out_features: int, columns: int) -> Tensor | None:
    """Codes of outputs start to stop, transposed, uint8 [columns, stop - start]; None when the layout is unknown.

    `start` is a multiple of 64. A CPU packs 64 outputs (with AVX-512; else 32; the last ones: what is left) one column
    after the other; tinygemm 8 outputs, in tiles of 32 to 128 columns.
    """
    block, width = _tile(packed.device, columns)
    flat = packed.reshape(out_features, -1)
    parts = []
    whole = stop - (stop - start) % block
    for first, last, rows in ((start, whole, block), (whole, stop, stop - whole)):
        if first == last:
            continue
        order = _order(rows, width, packed.device)
        if order is None:
            return None
        blocks, tiles = (last - first) // rows, columns // width
        codes = nibbles(flat[first:last], blocks * tiles)
        if order.numel():
            codes = codes.index_select(1, order)
        codes = codes.view(blocks, tiles, rows, width).permute(1, 3, 0, 2)  # tile, column, block, row
        parts.append(codes.reshape(columns, last - first))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


Packer = Callable[[Tensor], Tensor]  # uint8 codes [rows, columns] -> bytes of any shape and dtype


def nibbles(packed: Tensor, tiles: int) -> Tensor:
    """uint8 [tiles, codes a tile]: all low halves of a tile's bytes, then all high ones."""
    parts = packed.contiguous().view(torch.uint8).view(tiles, -1)
    return torch.cat((parts & 15, parts >> 4), 1)


def tile_order(pack: Packer, rows: int, columns: int, device: torch.device) -> Tensor | None:
    """For a tile [rows, columns], where in `nibbles` the code of each position is; int64 [rows * columns].

    None when the packer does not keep one tile's codes together as 4-bit codes, so nothing can be read back.
    """
    number = torch.arange(rows * columns, device=device)
    at = torch.zeros_like(number)
    for shift in range(0, max(1, (rows * columns - 1).bit_length()), 4):
        digit = ((number >> shift) & 15).to(torch.uint8).view(rows, columns)
        packed = pack(digit)
        if packed.numel() * packed.element_size() * 2 != rows * columns:
            return None
        at += nibbles(packed, 1)[0].long() << shift
    order = torch.argsort(at)
    return order if torch.equal(at[order], number) else None


def is_identity(order: Tensor) -> bool:
    """Whether codes already lie in order."""
    return torch.equal(order, torch.arange(order.numel(), device=order.device))
