"""Bytes of GGUF's blocks: worked by hand, and against gguf-py; llama.cpp's mixtures by published sizes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from families import model

from qwenq.errors import PlanError, UsageError
from qwenq.formats.base import Scheme, parse_scheme
from qwenq.formats.gguf import (
    GGUF,
    MIXTURES,
    WRITTEN,
    fallback,
    pack_blocks,
    type_scheme,
    unpack_blocks,
    wanted_types,
)
from qwenq.io.gguf import TYPES
from qwenq.model.spec import LinearSpec
from qwenq.solver.gptq import solve_linears
from qwenq.solver.grid import IntegerGrid, QTensor

ONE = bytes.fromhex("003c")  # float16 1.0
TWO = bytes.fromhex("0040")


def packed(kind: str, codes: list[int], *parameters: list[float]) -> bytes:
    dtypes = type_scheme(kind).grid().stored_dtypes
    stored = [torch.tensor([p], dtype=dtype) for p, dtype in zip(parameters, dtypes, strict=False)]
    return pack_blocks(kind, torch.tensor([codes], dtype=torch.uint8), stored).numpy().tobytes()


def test_hand_worked_blocks_of_32() -> None:
    up = list(range(16)) * 2
    same = bytes(17 * k for k in range(16))  # weight k below weight k + 16
    assert packed("Q4_0", up, [1.0]) == ONE + same
    assert packed("Q4_1", up, [1.0], [2.0]) == ONE + TWO + same
    assert packed("IQ4_NL", up, [2.0]) == TWO + same
    high = [16 + k if k < 8 else k for k in range(16)] + list(range(16))  # fifth bits: of weights 0 to 7
    assert packed("Q5_0", high, [1.0]) == ONE + bytes([255, 0, 0, 0]) + same
    assert packed("Q5_1", high, [1.0], [2.0]) == ONE + TWO + bytes([255, 0, 0, 0]) + same
    assert packed("Q8_0", [128 + k for k in range(32)], [1.0]) == ONE + bytes(range(32))


def test_hand_worked_super_blocks() -> None:
    scales, minima = [1, 2, 3, 4, 5, 6, 7, 63], [8, 9, 10, 11, 12, 13, 14, 48]
    #  bytes 0-3: scales 0-3, and the two upper bits of scales 4-7; 4-7: minima; 8-11: lower halves of 4-7 of both
    six = bytes([1, 2, 3, 4 + (3 << 6), 8, 9, 10, 11 + (3 << 6)])
    six += bytes([5 + (12 << 4), 6 + (13 << 4), 7 + (14 << 4), 15 + (0 << 4)])
    codes = [(k // 32) for k in range(256)]  # sub-group 0 beside 1, 2 beside 3, ...
    low = bytes([0x10] * 32 + [0x32] * 32 + [0x54] * 32 + [0x76] * 32)
    assert packed("Q4_K", codes, [1.0], [2.0], scales, minima) == ONE + TWO + six + low
    fifth = [code + (16 if code in (0, 7) else 0) for code in codes]
    assert packed("Q5_K", fifth, [1.0], [2.0], scales, minima) == ONE + TWO + six + bytes([0x81] * 32) + low
    sixth = [k // 64 for k in range(256)]  # 6-bit codes: 0 0 1 1 in each half of 128, then 2 2 3 3
    halves = [0x10] * 64 + [0x32] * 64
    q6 = packed("Q6_K", sixth, [1.0], list(range(-8, 8)))
    assert q6 == bytes(halves) + bytes(64) + bytes(k % 256 for k in range(-8, 8)) + ONE
    two = [k // 32 % 4 for k in range(256)]
    q2 = packed("Q2_K", two, [1.0], [2.0], list(range(16)), [15 - k for k in range(16)])
    assert q2 == bytes(k + (15 - k) * 16 for k in range(16)) + bytes([0b11100100] * 64) + ONE + TWO
    q3 = packed("Q3_K", [4 + code for code in two], [1.0], [-32] * 15 + [31])
    assert q3 == bytes([255] * 32) + bytes([0b11100100] * 64) + bytes([0] * 7 + [0xF0, 0, 0, 0, 0xC0]) + ONE
    xs = packed("IQ4_XS", [3] * 256, [1.0], [-32, 31, -32, -32, -32, -32, -32, -16])
    assert xs == ONE + bytes([0b1100, 0b01000000]) + bytes([0xF0, 0, 0, 0]) + bytes([0x33] * 128)


@pytest.mark.parametrize("kind", WRITTEN)
def test_solved_weights_are_what_gguf_py_reads(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(6, 512, generator=generator) * torch.rand(6, 512, generator=generator)
    x_TI = torch.randn(700, 512, generator=generator)
    q, _ = solve_linears({"w": w_OI}, x_TI.T @ x_TI, type_scheme(kind).grid())["w"]
    data_OB = GGUF.pack(q)["weight"]
    assert data_OB.shape == (6, 512 // TYPES[kind].values * TYPES[kind].n_bytes)
    theirs = gguf.quants.dequantize(data_OB.numpy(), gguf.GGMLQuantizationType[kind])
    assert theirs.tobytes() == q.dequantize().numpy().tobytes() or np.array_equal(theirs, q.dequantize().numpy())
    lin = LinearSpec("w", "w", "o", 0, 512, 6, False)
    back = GGUF.unpack({"weight": data_OB}, type_scheme(kind), lin)
    assert isinstance(back, QTensor) and torch.equal(back.codes_OI, q.codes_OI)
    for ours, again in zip(q.parameters, back.parameters, strict=True):
        assert torch.equal(ours, again)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kind", WRITTEN)
def test_any_bytes_are_read_as_gguf_py_reads_them_and_packed_back(kind: str) -> None:
    size = 4 * TYPES[kind].n_bytes
    data_OB = torch.randint(0, 256, (8, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    codes_OI, parameters = unpack_blocks(kind, data_OB)
    assert torch.equal(pack_blocks(kind, codes_OI, parameters), data_OB)
    grid = type_scheme(kind).grid()
    if isinstance(grid, IntegerGrid):
        parameters.append(torch.full_like(parameters[0], grid.zero, dtype=torch.uint8))
    ours = QTensor(codes_OI, tuple(parameters), grid).dequantize().numpy()
    theirs = gguf.quants.dequantize(data_OB.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_types_are_schemes_with_labels() -> None:
    assert parse_scheme("Q4_K") == type_scheme("Q4_K") == Scheme(4, 256, sym=False, codes="Q4_K")
    assert parse_scheme("Q8_0") == Scheme(8, 32, codes="Q8_0")
    with pytest.raises(UsageError, match="GGUF's Q4_K has 4 bits in blocks of 256"):
        Scheme(4, 32, codes="Q4_K")
    lin = LinearSpec("layers.0.down", "down", "down", 0, 896, 128, False)
    with pytest.raises(PlanError, match=r"layers.0.down: blocks of 256 \(Q6_K\) do not divide its 896 inputs") as error:
        GGUF.check(type_scheme("Q6_K"), lin)
    assert error.value.hint == "llama.cpp falls back to Q8_0 there"
    with pytest.raises(PlanError, match="format gguf cannot hold 4-bit g128"):
        GGUF.check(Scheme(4, 128), lin)


# GB of published files (mradermacher/Qwen2.5-72B-Instruct-GGUF), with one digit after the point: the tokenizer has 6 MB
PUBLISHED = {
    "Q2_K": 29.8, "Q3_K_S": 34.5, "Q3_K_M": 37.7, "Q3_K_L": 39.5, "Q4_K_S": 43.9, "Q4_K_M": 47.4, "Q5_K_M": 54.4,
    "Q6_K": 64.3, "Q8_0": 77.3,
}  # fmt: skip
FAMOUS = {"Q4_K_M": 47.41, "Q8_0": 77.26}  # without it


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_the_72b_are_those_published(name: str) -> None:
    spec = model("Qwen2.5-72B-Instruct")
    recipe = GGUF.mixture(name, spec)
    recipe.check(spec)
    size = sum(t.nbytes for t in recipe.tensors(spec, lambda tensor: GGUF.stored_dtype(tensor, "BF16"))) / 1e9
    assert size == pytest.approx(PUBLISHED[name], abs=0.05 + 0.006)
    assert size == pytest.approx(FAMOUS.get(name, size), abs=0.005)


def test_types_of_a_mixture() -> None:
    spec = model("Qwen2.5-7B-Instruct")  # 28 layers: the first and last eighth, and every third, have more bits
    types = wanted_types(spec, "Q4_K_M")
    more = [k for k in range(28) if types[f"model.layers.{k}.mlp.down_proj"] == "Q6_K"]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert types["lm_head"] == "Q6_K" and types["model.embed_tokens"] == "Q4_K"
    assert types["model.layers.3.self_attn.v_proj"] == "Q4_K" == types["model.layers.0.self_attn.k_proj"]
    assert wanted_types(spec, "Q2_K")["model.layers.0.self_attn.v_proj"] == "Q4_K"  # seven heads share one of v
    assert fallback("Q4_K", 896) == "Q5_0" and fallback("Q4_K", 48) == "F16" and fallback("Q4_K", 512) == "Q4_K"
    assert len(MIXTURES) == 18
    small = model("Qwen2.5-0.5B-Instruct")  # a tied embedding of 896 columns
    assert wanted_types(small, "Q4_K_M")["model.embed_tokens"] == "Q8_0"
    assert wanted_types(small, "Q4_0")["model.embed_tokens"] == "Q6_K"
    notes = GGUF.notes("Q4_0", small)
    assert notes == ["rows of 896 are not whole blocks of Q6_K: embed_tokens in Q8_0 (1 tensors), as in llama.cpp"]
