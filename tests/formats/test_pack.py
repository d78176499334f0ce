import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.errors import CheckpointError
from qwenq.formats.base import Scheme
from qwenq.formats.gptq import GPTQ
from qwenq.model.spec import LinearSpec
from qwenq.solver.grid import IntegerGrid, QTensor


def random_q(seed, bits, group, rows, columns, sym=True):
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme(bits, group, sym)
    groups = scheme.groups(columns)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.randn(rows, groups, generator=generator).half()
    zeros = torch.randint(0, scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    return QTensor(codes, (scales, torch.full_like(zeros, scheme.zero) if sym else zeros), scheme.grid())


def unpack_gptq(packed, grid, version="gptq", name="linear"):
    lin = LinearSpec(name, "b", "o", 0, 0, 0, False)
    return GPTQ.unpack(packed, Scheme(grid.bits, grid.group_size, grid.sym), lin, version)


def dequantize_gptq(*packed, **name):
    found = unpack_gptq(*packed, **name)
    return found.dequantize() if isinstance(found, QTensor) else found


def words(*values):
    return [v - (1 << 32) if v >= 1 << 31 else v for v in values]


def test_four_bits_by_hand():
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    codes[0] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0], dtype=torch.uint8)
    codes[7, 8] = 15
    scales = torch.arange(16).reshape(8, 2).half()
    q = QTensor(codes, (scales, torch.full((8, 2), 8, dtype=torch.uint8)), IntegerGrid(4, 8))
    packed = GPTQ.pack(q)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == {
        "qweight": (torch.int32, (2, 8)),
        "qzeros": (torch.int32, (2, 1)),
        "scales": (torch.float16, (2, 8)),
        "g_idx": (torch.int32, (16,)),
    }
    assert all(t.is_contiguous() for t in packed.values())
    assert packed["qweight"].tolist() == [
        words(0x87654321, 0, 0, 0, 0, 0, 0, 0),
        words(0x0FEDCBA9, 0, 0, 0, 0, 0, 0, 15),
    ]
    assert packed["qzeros"].tolist() == [[0x77777777]] * 2
    assert packed["scales"].tolist() == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    assert packed["g_idx"].tolist() == [0] * 8 + [1] * 8


def test_eight_bits_by_hand():
    codes = torch.tensor([[0x12, 0x34, 0x56, 0x78], [0xFF, 0, 0, 0x80], [0] * 4, [1] * 4], dtype=torch.uint8)
    q = QTensor(codes, (torch.ones(4, 1).half(), torch.full((4, 1), 128, dtype=torch.uint8)), IntegerGrid(8, -1))
    packed = GPTQ.pack(q)
    assert packed["qweight"].tolist() == [words(0x78563412, 0x800000FF, 0, 0x01010101)]
    assert packed["qzeros"].tolist() == [[0x7F7F7F7F]]
    assert packed["g_idx"].tolist() == [0] * 4


def test_zero_points_are_stored_minus_one():
    q = random_q(0, 4, 8, 8, 8, sym=False)
    q.zeros_OG[:, 0] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 15], dtype=torch.uint8)
    packed = GPTQ.pack(q)
    assert packed["qzeros"].tolist() == [words(0xE543210F)]
    second = dict(packed, qzeros=torch.tensor([words(0xF6543210)], dtype=torch.int32))
    assert torch.equal(dequantize_gptq(packed, q.grid), q.dequantize())
    assert torch.equal(dequantize_gptq(second, q.grid, "gptq_v2"), q.dequantize())
    assert torch.equal(unpack_gptq(second, q.grid, "gptq_v2").zeros_OG, q.zeros_OG)


@given(
    seed=st.integers(0, 10**6), bits=st.sampled_from([4, 8]), sym=st.booleans(),
    group=st.sampled_from([8, 32, 64, -1]), rows=st.sampled_from([8, 24, 64]), groups=st.integers(1, 5),
    version=st.sampled_from(["gptq", "gptq_v2"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_unpack_after_pack_is_the_identity(seed, bits, sym, group, rows, groups, version):
    q = random_q(seed, bits, group, rows, 64 * groups, sym)
    packed = GPTQ.pack(q, version)
    back = unpack_gptq(packed, q.grid, version)
    assert torch.equal(back.codes_OI, q.codes_OI)
    assert torch.equal(back.scales_OG, q.scales_OG)
    assert torch.equal(back.zeros_OG, q.zeros_OG)
    assert torch.equal(dequantize_gptq(packed, q.grid, version), q.dequantize())


def test_dequantize_by_hand_and_dtype():
    q = QTensor(
        torch.tensor([[0, 15], [8, 9]], dtype=torch.uint8),
        (torch.tensor([[0.5], [-2.0]]).half(), torch.full((2, 1), 8, dtype=torch.uint8)), IntegerGrid(4, 2),
    )  # fmt: skip
    assert q.dequantize().tolist() == [[-4.0, 3.5], [0.0, -2.0]]
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_others_group_order_is_honoured():
    q = random_q(1, 4, 8, 8, 32)
    packed = GPTQ.pack(q)
    shuffled = torch.tensor([i % 4 for i in range(32)], dtype=torch.int32)
    tensors = dict(packed, g_idx=shuffled)
    wanted = q.scales_OG.float()[:, shuffled.long()] * (q.codes_OI.float() - 8)
    assert torch.equal(dequantize_gptq(tensors, q.grid), wanted)
    back = unpack_gptq(tensors, q.grid)  # columns sorted by group
    assert back.order_I.tolist() == [4 * k + g for g in range(4) for k in range(8)]
    assert torch.equal(back.codes_OI, q.codes_OI[:, back.order_I])
    uneven = dict(packed, g_idx=torch.tensor([0] * 16 + [1] * 8 + [2] * 4 + [3] * 4, dtype=torch.int32))
    wanted = q.scales_OG.float()[:, uneven["g_idx"].long()] * (q.codes_OI.float() - 8)
    assert torch.equal(dequantize_gptq(uneven, q.grid), wanted)
    with pytest.raises(CheckpointError, match=r"^a\.b: g_idx makes groups of 4 to 16 columns$"):
        GPTQ.unpack_to_run(uneven, Scheme(4, 8), LinearSpec("a.b", "b", "o", 0, 32, 8, False))
    without = {k: v for k, v in packed.items() if k != "g_idx"}
    assert torch.equal(dequantize_gptq(without, q.grid), q.dequantize())


def test_bad_tensors_are_named():
    q = random_q(2, 4, 8, 16, 32)
    packed = GPTQ.pack(q)
    with pytest.raises(CheckpointError, match=r"a\.b: no qzeros"):
        dequantize_gptq({k: v for k, v in packed.items() if k != "qzeros"}, q.grid, name="a.b")
    with pytest.raises(CheckpointError, match=r"a\.b: shapes do not fit"):
        dequantize_gptq(dict(packed, scales=packed["scales"][:, :8]), q.grid, name="a.b")
    with pytest.raises(CheckpointError, match=r"a\.b: g_idx"):
        dequantize_gptq(dict(packed, g_idx=packed["g_idx"] + 1), q.grid, name="a.b")
    with pytest.raises(CheckpointError, match="checkpoint_format 'marlin'"):
        dequantize_gptq(packed, q.grid, "marlin")
