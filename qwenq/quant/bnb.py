"""NF4 and LLM.int8 by bitsandbytes' own functions: one weight to the tensors transformers saves, and back.

NF4: each block of 64 weights of the flattened matrix stores its largest absolute value and, per weight, the nearest
of 16 values. LLM.int8: each row stores its largest absolute value (SCB) and codes -127 to 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import CheckpointError, PlanError
from qwenq.layout import NF4_STATE
from qwenq.quant.gptq import QTensor
from qwenq.scheme import Scheme

_STATE = NF4_STATE.removeprefix(".weight.")


def round_nf4(weight_OI: Tensor) -> dict[str, Tensor]:
    """Tensors of a weight in float16, bfloat16 or float32, by their names after the linear's; float32 results keep it.

    What bitsandbytes makes of the weight when read depends on its dtype, which is stored with it.
    """
    packed, state = _functional().quantize_4bit(weight_OI.contiguous(), blocksize=64, quant_type="nf4")
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def round_int8(weight_OI: Tensor) -> dict[str, Tensor]:
    """Tensors of a weight; bitsandbytes rounds it to float16 first."""
    codes, rows, _ = _functional().int8_vectorwise_quant(weight_OI.contiguous().half())
    return {"weight": codes, "SCB": rows, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def dequantize_nf4(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str = "linear") -> Tensor:
    """The weight [out, in] in the dtype it was quantized from, which is how bitsandbytes computes with it."""
    return _functional().dequantize_4bit(tensors["weight"], _loaded(tensors, shape, name), quant_type="nf4")


def nf4_blocks(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str = "linear"
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Codes two a byte (the first one high), the 16 values they mean, each block's absolute maximum in float32, dtype.

    The dtype is the one the weight was quantized from, to which bitsandbytes rounds what it reads.
    """
    loaded = _loaded(tensors, shape, name)
    absmax = loaded.absmax
    if loaded.nested:
        absmax = _functional().dequantize_blockwise(absmax, loaded.state2) + loaded.offset
    return tensors["weight"].view(torch.uint8).reshape(-1), loaded.code.float(), absmax.float(), loaded.dtype


def unpack_int8(tensors: Mapping[str, Tensor], scheme: Scheme, name: str = "linear") -> QTensor:
    """LLM.int8 as a symmetric 8-bit grid with one float32 scale a row: SCB / 127."""
    if int(tensors["weight_format"]) != 0:
        raise CheckpointError(f"{name}: weight_format is {int(tensors['weight_format'])}, wanted 0 (rows)")
    codes_OI = (tensors["weight"].to(torch.int16) + scheme.zero).to(torch.uint8)
    scales_O1 = tensors["SCB"].float()[:, None] * 7.874015718698502e-3  # 1 / 127, in bitsandbytes' own digits
    return QTensor(codes_OI, scales_O1, torch.full(scales_O1.shape, scheme.zero, dtype=torch.uint8), scheme)


def _loaded(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> Any:
    """bitsandbytes' own QuantState of a stored weight, checked."""
    state = _state(tensors, shape, name)
    stats = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    stats[_STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return _functional().QuantState.from_dict(stats, device=tensors["weight"].device)


def _state(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> dict[str, Any]:
    """The JSON beside an NF4 weight, checked: it names shape, block and dtype."""
    try:
        state = json.loads(bytes(tensors["weight." + _STATE].tolist()))
        found = state["quant_type"], state["blocksize"], tuple(state["shape"])
        dtype = state["dtype"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise CheckpointError(f"{name}: quant_state.bitsandbytes__nf4 is not what bitsandbytes writes") from None
    if found != ("nf4", 64, tuple(shape)) or dtype not in ("float16", "bfloat16", "float32"):
        raise CheckpointError(f"{name}: quant_state says {(*found, dtype)}, wanted nf4 in blocks of 64 of {shape}")
    return state


def _functional() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise PlanError(f"bitsandbytes is not installed ({error})", hint="pip install 'qwenq[bnb]'") from None
    return functional
