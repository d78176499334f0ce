"""NF4 and LLM.int8 by bitsandbytes' own functions: one weight to the tensors transformers saves, and back.

NF4: each block of 64 weights of the flattened matrix stores its largest absolute value and, per weight, the nearest
of 16 values. LLM.int8: each row stores its largest absolute value (SCB) and codes -127 to 127.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import CheckpointError, PlanError
from qwenq.formats.base import NESTED_BLOCK, NF4_BLOCK, NF4_STATE, Scheme
from qwenq.formats.qtensor import QTensor

_STATE = NF4_STATE.removeprefix(".weight.")
_MAX_STATE = 4096  # bytes; some 170 are needed


def round_nf4(weight_OI: Tensor) -> dict[str, Tensor]:
    """Tensors of a weight in float16, bfloat16 or float32, by their names after the linear's.

    The dtype is stored with them: reading gives the weight back in it.
    """
    packed, state = _functional().quantize_4bit(weight_OI.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
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
    zeros_O1 = torch.full(scales_O1.shape, scheme.zero, dtype=torch.uint8, device=codes_OI.device)
    return QTensor(codes_OI, scales_O1, zeros_O1, scheme)


def _loaded(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> Any:
    """bitsandbytes' own QuantState of a stored weight, checked."""
    state = _state(tensors, shape, name)
    stats = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    stats[_STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return _functional().QuantState.from_dict(stats, device=tensors["weight"].device)


def _state(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> dict[str, Any]:
    """The JSON beside an NF4 weight, checked key by key: type, block, dtype, shape, and those of nested values."""
    stored = tensors["weight." + _STATE]
    wrong = f"{name}: quant_state.bitsandbytes__nf4"
    if stored.numel() > _MAX_STATE:
        raise CheckpointError(f"{wrong} has {stored.numel()} bytes, more than it can need")
    try:
        state = json.loads(bytes(stored.tolist()))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{wrong} is not JSON") from None
    wanted: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "shape": list(shape)}
    free: dict[str, tuple[str, ...]] = {"dtype": ("float16", "bfloat16", "float32")}
    if "weight.nested_absmax" in tensors:
        wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        free["nested_offset"] = ()
    if not isinstance(state, dict) or set(state) != set(wanted) | set(free):
        raise CheckpointError(f"{wrong}: wanted exactly {', '.join([*wanted, *free])}")
    for key, value in wanted.items():
        if state[key] != value:
            raise CheckpointError(f"{wrong}: {key} is {str(state[key])[:40]!r}, wanted {value!r}")
    if state["dtype"] not in free["dtype"]:
        known = ", ".join(free["dtype"])
        raise CheckpointError(f"{wrong}: dtype is {str(state['dtype'])[:40]!r}, wanted one of {known}")
    if not isinstance(state.get("nested_offset", 0.0), float | int):
        raise CheckpointError(f"{wrong}: nested_offset is {str(state['nested_offset'])[:40]!r}, wanted a number")
    return state


def _functional() -> Any:
    try:
        with _without_kernels():
            import bitsandbytes.functional as functional
    except ImportError as error:
        raise PlanError(f"bitsandbytes is not installed ({error})", hint="pip install 'qwenq[bnb]'") from None
    return functional


@contextmanager
def _without_kernels() -> Iterator[None]:
    """On some CPUs the library's import fetches compiled code from the hub by the package `kernels`: not here."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    known, level = modules.get("kernels"), logger.level
    modules["kernels"] = None  # importing it raises ImportError, which the library foresees, and says aloud
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        del modules["kernels"]
        if known is not None:
            modules["kernels"] = known
