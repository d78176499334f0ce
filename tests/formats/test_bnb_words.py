"""bitsandbytes' tensors: worked by hand, read back, and states of NF4 that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from qwenq.errors import CheckpointError
from qwenq.formats.bitsandbytes import BNB_INT8, BNB_NF4, INT8_ROWS, NF4
from qwenq.model.spec import LinearSpec

LIN = LinearSpec("a.b", "b", "o", 0, 64, 2, False)  # [2, 64]
STATE = "weight.quant_state.bitsandbytes__nf4"


def test_nf4_by_hand() -> None:
    """A block's largest value is code 15, its negative code 0, nothing code 7; the first of a byte is its high half."""
    weight = torch.zeros(2, 64, dtype=torch.float16)
    weight[0, 0], weight[0, 1], weight[1, 3] = 2.0, -2.0, 0.5
    stored = BNB_NF4.round(weight, LIN)
    assert stored["weight"].shape == (64, 1) and stored["weight"].dtype == torch.uint8
    assert stored["weight"][:, 0].tolist() == [0xF0] + [0x77] * 31 + [0x77, 0x7F] + [0x77] * 30
    assert stored["weight.absmax"].tolist() == [2.0, 0.5] and stored["weight.absmax"].dtype == torch.float32
    assert stored["weight.quant_map"][[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    assert json.loads(bytes(stored[STATE].tolist())) == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64],
    }  # fmt: skip
    found = BNB_NF4.unpack(stored, NF4, LIN)
    assert found.dtype == torch.float16 and torch.equal(found, weight)


def test_int8_by_hand() -> None:
    """A row's largest absolute value is 127; halves round to even."""
    weight = torch.tensor([[1.0, -0.5, 0.0, 0.25], [-4.0, 4.0, 1.0, 0.0]])
    stored = BNB_INT8.round(weight, LIN)
    assert stored["weight"].tolist() == [[127, -64, 0, 32], [-127, 127, 32, 0]]
    assert stored["SCB"].tolist() == [1.0, 4.0] and int(stored["weight_format"]) == 0
    found = BNB_INT8.unpack(stored, INT8_ROWS, LIN)
    assert found.codes_OI.tolist() == [[255, 64, 128, 160], [1, 255, 160, 128]]
    wanted = torch.tensor([[127, -64, 0, 32], [-127 * 4, 127 * 4, 32 * 4, 0]]) / 127
    torch.testing.assert_close(found.dequantize(), wanted, rtol=1e-6, atol=0)
    with pytest.raises(CheckpointError, match=r"a\.b: weight_format is 1, wanted 0"):
        BNB_INT8.unpack(stored | {"weight_format": torch.tensor(1)}, INT8_ROWS, LIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type is 'fp4', wanted 'nf4'"),
        ({"blocksize": 128}, "blocksize is '128', wanted 64"),
        ({"shape": [64, 2]}, r"shape is '\[64, 2\]', wanted \[2, 64\]"),
        ({"dtype": "load"}, "dtype is 'load', wanted one of float16"),
        ({"more": 1}, "wanted exactly quant_type, blocksize, shape, dtype"),
    ],
)
def test_a_state_that_contradicts_the_weight(change: dict[str, Any], message: str) -> None:
    stored = BNB_NF4.round(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), LIN)
    state = json.loads(bytes(stored[STATE].tolist())) | change
    blob = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"^a\.b: quant_state\.bitsandbytes__nf4: " + message):
        BNB_NF4.unpack(stored | {STATE: blob}, NF4, LIN)


@pytest.mark.parametrize(("blob", "message"), [(b"[" * 3000, "is not JSON"), (b" " * 5000, "has 5000 bytes")])
def test_a_state_that_is_none(blob: bytes, message: str) -> None:
    stored = BNB_NF4.round(torch.zeros(2, 64), LIN) | {STATE: torch.tensor(list(blob), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=message):
        BNB_NF4.unpack(stored, NF4, LIN)
