"""torch's packed kernels against plain dequantization: every group size, rows on both sides of the dense path.

This project's own CPU kernels are in test_cpu_kernels.py; here they are taken away.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_codes import random_q
from torch import Tensor, nn

from qwenq.formats.base import PackedShape
from qwenq.machine import Compute
from qwenq.planning import kernels
from qwenq.planning.kernels import DENSE_ROWS, Choice, choose, kept_bytes
from qwenq.runtime import linear
from qwenq.runtime.linear import Int4Linear, StoredLinear, nibbles, tile_order, unpack_int4
from qwenq.solver.grid import QTensor

CPU = torch.device("cpu")
BF16 = torch.bfloat16


NO_COMPILER = "no compiler"


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "lacks_for_cpu_kernels", lambda: NO_COMPILER)


def shape_of(q: QTensor) -> PackedShape:
    outputs, inputs = q.codes_OI.shape
    return PackedShape(q.integers.bits, q.grid.group_width(inputs), outputs, inputs, q.integers.sym)


def packed_linear(q: QTensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[nn.Module, Choice]:
    return linear.packed_linear(q, shape_of(q), bias, dtype, CPU)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


CASES = [
    (4, 32, 64, 192, True, "int4"),
    (4, 64, 192, 128, True, "int4"),
    (4, 128, 80, 256, True, "int4"),  # 64 outputs in a block of the layout and 16 in the last one
    (4, 64, 128, 192, False, "int4"),
    (4, -1, 48, 192, True, "int4"),  # one group a row, cut into kernel groups of 64
    (8, 32, 64, 192, True, "int4 halves"),
    (8, 128, 80, 256, True, "int4 halves"),
    (8, 64, 64, 128, False, "int4 halves"),
    (8, -1, 42, 112, True, "int8"),
    (8, -1, 40, 100, True, "tiled"),  # 100 inputs crash torch's int8 kernel
    (8, -1, 48, 192, False, "int4 halves"),
    (4, 24, 64, 48, True, "tiled"),  # no such group
    (4, 32, 40, 64, False, "tiled"),  # 40 outputs
    (8, 25, 10, 100, True, "tiled"),
]


@pytest.mark.parametrize("rows", [1, 3, DENSE_ROWS + 5])
@pytest.mark.parametrize(("bits", "group", "outputs", "inputs", "sym", "kind"), CASES)
def test_products_in_bfloat16(
    bits: int, group: int, outputs: int, inputs: int, sym: bool, kind: str, rows: int
) -> None:
    q = random_q(bits, group, outputs, inputs, sym)
    bias = torch.randn(outputs)
    module, choice = packed_linear(q, bias, BF16)
    assert choice.kind == kind and (choice.reason == NO_COMPILER) == (kind != "tiled") and choice.reason
    kept = sorted(p.numel() * p.element_size() for p in module.parameters())
    assert kept == sorted([2 * outputs, *kept_bytes(shape_of(q), choice.kind)])
    x = torch.randn(2, rows, inputs).to(BF16)
    wanted = x.double() @ q.dequantize().double().T + bias.double()
    found = module(x)
    assert found.dtype == BF16 and found.shape == wanted.shape
    # 2**-9: inputs exact, scales and the product rounded to bfloat16, each with an error below half of 2**-8
    assert relative(found, wanted) < 1.5 * 2**-8


@pytest.mark.parametrize(("bits", "group", "outputs", "inputs", "sym", "kind"), CASES)
def test_products_in_float32_are_exact(
    bits: int, group: int, outputs: int, inputs: int, sym: bool, kind: str
) -> None:
    q = random_q(bits, group, outputs, inputs, sym)
    module, choice = packed_linear(q, None, torch.float32)
    assert choice.kind == "tiled" and "float32" in choice.reason
    x = torch.randn(5, inputs)
    assert torch.equal(module(x), x @ q.dequantize().T) or relative(module(x), x @ q.dequantize().T) < 1e-6


def test_row_blocks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights written out in several row blocks, the last one short, give what one row block gives."""
    q = random_q(4, 32, 208, 64)
    wide, _ = packed_linear(q, None, BF16)
    exact, _ = packed_linear(q, None, torch.float32)
    x = torch.randn(DENSE_ROWS, 64)
    once, exactly = wide(x.to(BF16)), exact(x)
    monkeypatch.setattr(kernels, "ROW_BLOCK", 64 * 64)
    assert linear.block_rows(64, CPU) == 64
    assert torch.equal(wide(x.to(BF16)), once) and relative(exact(x), exactly) < 1e-6


def test_wide_codes_with_zero_points_have_no_bias() -> None:
    """Inputs of one sign add up what offsets lose; random signs would hide it."""
    q = random_q(8, 128, 64, 512, sym=False)
    module, choice = packed_linear(q, None, BF16)
    assert choice.kind == "int4 halves"
    for rows in (3, DENSE_ROWS):
        x = torch.randn(rows, 512).abs().to(BF16)
        assert relative(module(x), x.double() @ q.dequantize().double().T) < 1.5 * 2**-8


def test_columns_out_of_order() -> None:
    """Act-order: the module sorts its input as the columns were sorted."""
    q = random_q(4, 32, 64, 128)
    order = torch.randperm(128)
    weight = torch.empty(64, 128)
    weight[:, order] = q.dequantize()
    for dtype, limit in ((torch.float32, 1e-6), (BF16, 1.5 * 2**-8)):
        module, _ = packed_linear(replace(q, order_I=order), None, dtype)
        x = torch.randn(3, 128).to(dtype)
        assert relative(module(x), x.float() @ weight.T) < limit


@pytest.mark.parametrize("outputs", [16, 48, 64, 80, 192])
def test_codes_come_back_out_of_torchs_layout(outputs: int) -> None:
    codes = torch.randint(0, 16, (outputs, 96), dtype=torch.uint8)
    packed = linear.pack_int4(codes)[0]
    assert packed.numel() * packed.element_size() * 2 == codes.numel()
    found = unpack_int4(packed, 0, outputs, outputs, 96)
    assert found is not None and torch.equal(found.T, codes)
    if outputs > 64:
        found = unpack_int4(packed, 64, outputs, outputs, 96)
        assert found is not None and torch.equal(found.T, codes[64:])


def test_any_tile_layout_is_found_out() -> None:
    """tinygemm's packer needs a GPU; one that shuffles a tile of 8 x 128 codes into bytes stands in for it."""
    shuffle = torch.randperm(1024, generator=torch.Generator().manual_seed(1))

    def pack(codes: Tensor) -> Tensor:
        flat = codes.reshape(-1)[shuffle]
        return (flat[0::2] | (flat[1::2] << 4)).view(torch.int32)

    order = tile_order(pack, 8, 128, CPU)
    codes = torch.randint(0, 16, (8, 128), dtype=torch.uint8)
    assert order is not None and torch.equal(nibbles(pack(codes), 1)[0][order], codes.view(-1))


def test_a_layout_that_loses_codes_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_order(lambda codes: codes.reshape(-1), 8, 8, CPU) is None  # a byte a code
    assert tile_order(lambda codes: torch.zeros(32, dtype=torch.uint8), 8, 8, CPU) is None
    module, _ = packed_linear(random_q(4, 32, 64, 64), None, BF16)
    x = torch.randn(DENSE_ROWS, 64).to(BF16)
    dense = module(x)
    assert isinstance(module, Int4Linear) and module.weight_rows(0, 64) is not None
    monkeypatch.setattr(linear, "_ORDERS", {(CPU, rows, 1): None for rows in (64, 32, 16)})
    assert module.weight_rows(0, 64) is None
    assert relative(module(x), dense) < 2**-7  # the kernel then takes every row count


def test_what_a_gpu_without_triton_would_get() -> None:
    plain = Compute(triton=False)
    assert choose(PackedShape(4, 64, 44, 64, True), plain).reason == "44 outputs: the kernel needs a multiple of 8"
    three_groups_of_32 = choose(PackedShape(4, 96, 64, 192, True), plain)
    assert three_groups_of_32 == Choice("int4", "Triton is not installed")
    assert choose(PackedShape(4, 64, 64, 64, True), Compute("float32")).kind == "tiled"
    assert choose(PackedShape(4, 64, 64, 64, True), Compute(device="mps")).reason == "no packed kernel on mps"
    old = Compute(capability=(7, 5))
    assert choose(PackedShape(4, 64, 64, 64, True), old).reason == "tinygemm needs compute capability 8.0"


def test_sixteen_bit_weights_keep_their_dtype() -> None:
    weight, x = torch.randn(40, 32).half(), torch.randn(2, 3, 32)
    head = StoredLinear(weight, None, BF16, is_head=True)
    inner = StoredLinear(weight, torch.ones(40), BF16)
    wanted = x.to(BF16).double() @ weight.double().T
    assert head.weight.dtype == torch.float16 and head(x.to(BF16)).dtype == torch.float32
    assert relative(head(x.to(BF16)), wanted) < 2**-10  # finer than bfloat16 could be
    assert relative(inner(x.to(BF16)), wanted + 1) < 1.5 * 2**-8
    assert relative(StoredLinear(weight, None, torch.float32)(x), x.double() @ weight.double().T) < 1e-6
    large = torch.full((1, 32), 1e6).to(BF16)  # overflows float16: only the head may go there
    assert bool(inner(large).isfinite().all())
