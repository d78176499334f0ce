"""bitsandbytes as transformers saves it, NF4 and LLM.int8: its own functions round, pack and unpack.

NF4: each block of 64 weights of the flattened matrix stores its largest absolute value and, per weight, the nearest
of 16 values. LLM.int8: each row stores its largest absolute value (SCB) and codes -127 to 127.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenq.errors import CheckpointError, PlanError, UnreadScheme, UsageError
from qwenq.formats.base import (
    CODES,
    LLAMA_CPP,
    QWENQ,
    ByTransformers,
    Codes,
    Format,
    Loader,
    NamePattern,
    PackedShape,
    Quantization,
    Recipe,
    Scheme,
    Solved,
    StoredDtype,
    Variant,
    register,
)
from qwenq.formats.config import check_count, read_names, read_pattern, refuse_unknown
from qwenq.io.safetensors import FLOAT_NAMES, FLOATS, TensorSpec
from qwenq.model.spec import LinearSpec, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qwenq.solver.grid import QTensor

BLOCK = 64  # weights of the flattened matrix that share an absmax; what transformers uses
NESTED_BLOCK = 256  # absmax values that share one, where bitsandbytes quantized them too
NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"  # uint8 [n]: JSON
_MAX_STATE = 4096  # bytes; some 170 are needed


class Nf4Codes(Codes):
    """Entries of bitsandbytes' table of 16 values, times the largest absolute weight of a block of 64."""

    def __init__(self, name: str, ending: str = "") -> None:
        self.name, self.ending = name, ending

    def check(self, scheme: Scheme) -> None:
        if scheme.bits != 4:
            raise UsageError(f"bits is {scheme.bits}, NF4 wants 4")

    def label(self, scheme: Scheme) -> str:
        return f"NF4 g{scheme.group_size}{self.ending}"


CODES.update({codes.name: codes for codes in (Nf4Codes("nf4"), Nf4Codes("nf4-nested", " nested"))})
NF4, NF4_NESTED = Scheme(4, BLOCK, codes="nf4"), Scheme(4, BLOCK, codes="nf4-nested")
INT8_ROWS = Scheme(8, -1)  # LLM.int8: one scale per row


_KEYS = frozenset({
    "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_skip_modules", "llm_int8_threshold",
    "load_in_4bit", "load_in_8bit", "quant_method",
})  # fmt: skip


class Bitsandbytes(Format):
    """The config and the readers that both widths share."""

    method = "bitsandbytes"
    solved = False
    integer_codes = False
    bits: int

    def check(self, scheme: Scheme, lin: LinearSpec) -> None:
        self.check_scheme(scheme)  # any shape will do

    def config(self, recipe: Recipe, spec: ModelSpec, solved: Solved | None = None) -> dict[str, Any]:
        """As transformers' save_pretrained writes it.

        The compute dtype is left to the loader: it is transformers' default, float32, unless the user names another.
        """
        four = self.bits == 4
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4" if four else "fp4",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": recipe.left_out(spec),
            "llm_int8_threshold": 6.0,
        }

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Early checkpoints name no method."""
        early = "load_in_4bit" in config or "load_in_8bit" in config
        return config.get("quant_method", self.method if early else None) == self.method

    def read_config(self, config: Mapping[str, Any], where: str) -> Quantization:
        """Read configs of both widths."""
        refuse_unknown(config, _KEYS, where)
        four = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
        if four == bool(config.get("load_in_8bit", config.get("_load_in_8bit"))):
            raise CheckpointError(f"{where}: wanted one of load_in_4bit and load_in_8bit")
        form, scheme = (BNB_NF4, NF4) if four else (BNB_INT8, INT8_ROWS)
        if four:
            kind, storage = config.get("bnb_4bit_quant_type", "fp4"), config.get("bnb_4bit_quant_storage", "uint8")
            if kind != "nf4" or storage != "uint8":
                raise UnreadScheme(f"{where}: 4-bit type {kind!r} stored as {storage!r}, wanted 'nf4' as 'uint8'")
            scheme = NF4_NESTED if config.get("bnb_4bit_use_double_quant") else NF4
        here = f"{where}: llm_int8_skip_modules"
        kept = read_names(config.get("llm_int8_skip_modules"), here)
        check_count(kept, here)
        rules = tuple((_skip_pattern(name, here), None) for name in kept)
        return Quantization(form.name, scheme, rules)

    def stated(self, config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        return [4], []  # what it has in 8 bits is read

    def pack(self, q: QTensor, version: str = "") -> dict[str, Tensor]:
        raise PlanError(f"{self.name}: codes are made by bitsandbytes' own functions")

    def loaders(self, variant: Variant) -> list[Loader]:
        weights = Loader("transformers (bitsandbytes)", tried="CPU: weights equal")
        return [QWENQ, weights, Loader("vLLM"), LLAMA_CPP]

    def by_transformers(self, recipe: Recipe, schemes: set[Scheme]) -> ByTransformers:
        return ByTransformers("bitsandbytes")


class Nf4(Bitsandbytes):
    """16 unequal values in blocks of 64."""

    name = "bnb-nf4"
    tags = ("bnb-nf4", "bitsandbytes")
    fixed = NF4
    descriptions = (".quant_map", ".nested_quant_map", NF4_STATE)
    bits = 4

    def check_scheme(self, scheme: Scheme) -> None:
        if not isinstance(scheme.meaning, Nf4Codes):
            raise PlanError(
                f"format bnb-nf4 cannot hold {scheme.label}", hint="NF4 has its own 16 values in blocks of 64"
            )

    def tensors(self, scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        blocks, nested = -(-lin.parameters // BLOCK), scheme == NF4_NESTED
        yield TensorSpec(lin.name + ".weight", "U8", ((lin.parameters + 1) // 2, 1))
        yield TensorSpec(lin.name + ".weight.absmax", "U8" if nested else "F32", (blocks,))
        if nested:
            yield TensorSpec(lin.name + ".weight.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),))
            yield TensorSpec(lin.name + ".weight.nested_quant_map", "F32", (256,))
        yield TensorSpec(lin.name + ".weight.quant_map", "F32", (16,))
        state = _state_json(lin, dtype_of(lin.name + ".weight"))
        yield TensorSpec(lin.name + NF4_STATE, "U8", (len(state),))

    def same_shape(self, stored: TensorSpec, wanted: TensorSpec) -> bool:
        """The state is JSON of any length."""
        return stored.shape == wanted.shape or (wanted.name.endswith(NF4_STATE) and len(stored.shape) == 1)

    def packed_shape(self, scheme: Scheme, lin: LinearSpec, *, sorted_columns: bool = False) -> PackedShape:
        beside = (2 * lin.out_features,) if lin.bias else ()
        return PackedShape(4, BLOCK, lin.out_features, lin.in_features, True, beside, table=True)

    def round(self, weight_OI: Tensor, lin: LinearSpec) -> dict[str, Tensor]:
        """Round a float16, bfloat16 or float32 weight; its dtype is stored, and reading restores it."""
        packed, state = _functional().quantize_4bit(weight_OI.contiguous(), blocksize=BLOCK, quant_type="nf4")
        return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = "") -> Tensor:
        """The weight in the dtype it was quantized from, which is how bitsandbytes computes with it."""
        weight: Tensor = _functional().dequantize_4bit(tensors["weight"], _loaded(tensors, lin), quant_type="nf4")
        return weight

    def unpack_to_run(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = ""
    ) -> Nf4Blocks:
        import torch

        if lin.in_features % BLOCK:
            raise CheckpointError(
                f"{lin.name}: NF4 blocks of {BLOCK} cross the ends of its {lin.in_features} inputs",
                hint="`qwenq convert` it to another format",
            )
        loaded = _loaded(tensors, lin)
        absmax = loaded.absmax
        if loaded.nested:
            absmax = _functional().dequantize_blockwise(absmax, loaded.state2) + loaded.offset
        shape = lin.out_features, lin.in_features
        codes = tensors["weight"].view(torch.uint8).reshape(-1)
        return Nf4Blocks(shape, codes, loaded.code.float(), absmax.float(), loaded.dtype)


@dataclass(frozen=True)
class Nf4Blocks:
    """An NF4 weight as it is stored, its blocks inside rows."""

    shape: tuple[int, int]  # [out, in]
    codes: Tensor  # uint8, two a byte, the first one high
    table: Tensor  # float32 [16], the values they mean
    absmax: Tensor  # float32, of each block
    dtype: torch.dtype  # the weight was quantized from, to which bitsandbytes rounds what it reads


class Int8(Bitsandbytes):
    """LLM.int8: symmetric, one scale per row."""

    name = "bnb-int8"
    tags = ("bnb-int8", "bitsandbytes")
    fixed = INT8_ROWS
    descriptions = (".weight_format",)
    bits = 8

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme != INT8_ROWS:
            raise PlanError(
                f"format bnb-int8 cannot hold {scheme.label}", hint="LLM.int8 is symmetric, with one scale per row"
            )

    def tensors(self, scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        yield TensorSpec(lin.name + ".weight", "I8", (lin.out_features, lin.in_features))
        yield TensorSpec(lin.name + ".SCB", "F32", (lin.out_features,))
        yield TensorSpec(lin.name + ".weight_format", "U8", ())

    def round(self, weight_OI: Tensor, lin: LinearSpec) -> dict[str, Tensor]:
        """bitsandbytes rounds the weight to float16 first."""
        import torch

        half = weight_OI.contiguous().half()
        if not bool(torch.isfinite(half).all()):
            raise CheckpointError(
                f"{lin.name}: a weight of {float(weight_OI.abs().max()):.6g} does not fit float16, which LLM.int8 "
                "needs",
                hint="--format bnb-nf4 holds it",
            )
        codes, rows, _ = _functional().int8_vectorwise_quant(half)
        return {"weight": codes, "SCB": rows, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = "") -> QTensor:
        """A symmetric 8-bit grid with one float32 scale per row: SCB / 127."""
        import torch

        from qwenq.solver.grid import QTensor

        if int(tensors["weight_format"]) != 0:
            raise CheckpointError(f"{lin.name}: weight_format is {int(tensors['weight_format'])}, wanted 0 (rows)")
        codes_OI = (tensors["weight"].to(torch.int16) + scheme.zero).to(torch.uint8)
        scales_O1 = tensors["SCB"].float()[:, None] * 7.874015718698502e-3  # 1 / 127, in bitsandbytes' own digits
        zeros_O1 = torch.full(scales_O1.shape, scheme.zero, dtype=torch.uint8, device=codes_OI.device)
        return QTensor(codes_OI, (scales_O1, zeros_O1), scheme.grid())


def _state_json(lin: LinearSpec, dtype: str) -> bytes:
    """`quant_state.bitsandbytes__nf4` as bitsandbytes writes it for a weight of safetensors dtype `dtype`."""
    shape = [lin.out_features, lin.in_features]
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": FLOAT_NAMES[dtype], "shape": shape}
    return json.dumps(state).encode()


def _skip_pattern(name: str, where: str) -> NamePattern:
    """transformers' rule: a pattern up to a module boundary from the start, or the end of the name."""
    return read_pattern(rf"(?:{name})(?:(?<=\.)|(?=\.|$))|.*{re.escape(name)}$", where)


def _loaded(tensors: Mapping[str, Tensor], lin: LinearSpec) -> Any:
    """bitsandbytes' own QuantState of a stored weight, checked."""
    import torch

    state = _state(tensors, lin)
    stats = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    stats[NF4_STATE.removeprefix(".weight.")] = torch.frombuffer(
        bytearray(json.dumps(state).encode()), dtype=torch.uint8
    )
    return _functional().QuantState.from_dict(stats, device=tensors["weight"].device)


def _state(tensors: Mapping[str, Tensor], lin: LinearSpec) -> dict[str, Any]:
    """The JSON beside an NF4 weight, checked key by key: type, block, dtype, shape, and those of nested values."""
    stored = tensors[NF4_STATE[1:]]
    wrong = f"{lin.name}: quant_state.bitsandbytes__nf4"
    if stored.numel() > _MAX_STATE:
        raise CheckpointError(f"{wrong} has {stored.numel()} bytes, more than it can need")
    try:
        state = json.loads(bytes(stored.tolist()))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{wrong} is not JSON") from None
    wanted: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "shape": [lin.out_features, lin.in_features]}
    free = ["dtype"]
    if "weight.nested_absmax" in tensors:
        wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        free.append("nested_offset")
    if not isinstance(state, dict) or set(state) != {*wanted, *free}:
        raise CheckpointError(f"{wrong}: wanted exactly {', '.join([*wanted, *free])}")
    for key, value in wanted.items():
        if state[key] != value:
            raise CheckpointError(f"{wrong}: {key} is {str(state[key])[:40]!r}, wanted {value!r}")
    if state["dtype"] not in [*FLOATS]:  # it may be of any type
        raise CheckpointError(f"{wrong}: dtype is {str(state['dtype'])[:40]!r}, wanted one of {', '.join(FLOATS)}")
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
    import logging

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


BNB_NF4, BNB_INT8 = register(Nf4()), register(Int8())
