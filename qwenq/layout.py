"""How each format stores a quantized linear: names, dtypes and shapes of its tensors, and what it can hold. No torch.

Formats: gptq (AutoGPTQ's, read by GPTQModel, vLLM, SGLang and ExLlama), awq (AutoAWQ's "gemm"), compressed-tensors
("pack-quantized"), bnb-nf4 and bnb-int8 (bitsandbytes as transformers saves it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from qwenq.errors import PlanError
from qwenq.spec import FLOATS, LinearSpec, TensorSpec

if TYPE_CHECKING:
    from qwenq.scheme import Scheme

FORMATS = ("gptq", "awq", "compressed-tensors", "bnb-nf4", "bnb-int8")
BNB_FORMATS = ("bnb-nf4", "bnb-int8")
GRID_FORMATS = ("gptq", "awq", "compressed-tensors")  # integer codes on a grid of scales and zero points

NF4_BLOCK = 64  # weights of the flattened matrix that share an absmax; what transformers uses
NESTED_BLOCK = 256  # absmax values that share one, where bitsandbytes quantized them too
NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"  # uint8 [n]: JSON

# Stored beside codes, scales and zero points; says how to read them, and is not counted as bits of the weights.
_DESCRIPTIONS = (".g_idx", ".bias", ".weight_shape", ".weight_format", ".quant_map", ".nested_quant_map", NF4_STATE)

StoredDtype = Callable[[str], str]  # name of an unquantized tensor -> safetensors dtype it is stored in


def linear_tensors(
    format: str, scheme: Scheme | None, lin: LinearSpec, dtype_of: StoredDtype = lambda name: "BF16"
) -> Iterator[TensorSpec]:
    """Tensors of `lin` in `format`, or in 16 bit where `scheme` is None; its bias last."""
    if scheme is None:
        yield TensorSpec(lin.name + ".weight", dtype_of(lin.name + ".weight"), (lin.out_features, lin.in_features))
    else:
        yield from _TENSORS[format](scheme, lin, dtype_of)
    if lin.bias:
        yield TensorSpec(lin.name + ".bias", dtype_of(lin.name + ".bias"), (lin.out_features,))


def is_description(name: str) -> bool:
    """Whether a linear's tensor holds neither codes nor scales nor zero points."""
    return name.endswith(_DESCRIPTIONS)


def check_linear(format: str, scheme: Scheme, lin: LinearSpec) -> None:
    """Raise PlanError, naming the linear, unless `format` can store it by `scheme`."""
    check_scheme(format, scheme)
    if format in GRID_FORMATS:
        scheme.check(lin)


def check_scheme(format: str, scheme: Scheme) -> None:
    """Raise PlanError unless `format` can hold linears of `scheme`."""
    wanted, hint = {
        "gptq": (scheme.codes == "int", "NF4 goes into --format bnb-nf4"),
        "awq": (scheme.codes == "int" and scheme.bits == 4 and not scheme.sym,
                "AWQ is 4-bit with zero points; gptq and compressed-tensors hold this"),
        "compressed-tensors": (scheme.codes == "int", "NF4 goes into --format bnb-nf4"),
        "bnb-nf4": (scheme.codes in ("nf4", "nf4-nested"), "NF4 has its own 16 values in blocks of 64"),
        "bnb-int8": (scheme.codes == "int" and (scheme.bits, scheme.group_size, scheme.sym) == (8, -1, True),
                     "LLM.int8 is symmetric, with one scale a row"),
    }[format]  # fmt: skip
    if not wanted:
        raise PlanError(f"format {format} cannot hold {scheme.label}", hint=hint)


def check_together(format: str, schemes: Iterable[Scheme]) -> None:
    """Raise PlanError unless one checkpoint of `format` can hold linears of all these schemes."""
    labels = sorted({scheme.label for scheme in schemes})
    if format not in ("gptq", "compressed-tensors") and len(labels) > 1:
        raise PlanError(
            f"format {format} holds one scheme a checkpoint, asked for {', '.join(labels)}",
            hint="mixed bits go into --format compressed-tensors or gptq",
        )


def nf4_state_json(lin: LinearSpec, dtype: str) -> bytes:
    """What bitsandbytes writes into `quant_state.bitsandbytes__nf4` for a weight of safetensors dtype `dtype`."""
    name = next(name for name, stored in FLOATS.items() if stored == dtype)
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": name,
             "shape": [lin.out_features, lin.in_features]}  # fmt: skip
    return json.dumps(state).encode()


def _gptq(scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
    groups, per_word = scheme.groups(lin.in_features), 32 // scheme.bits
    yield TensorSpec(lin.name + ".qweight", "I32", (lin.in_features // per_word, lin.out_features))
    yield TensorSpec(lin.name + ".qzeros", "I32", (groups, lin.out_features // per_word))
    yield TensorSpec(lin.name + ".scales", "F16", (groups, lin.out_features))
    yield TensorSpec(lin.name + ".g_idx", "I32", (lin.in_features,))


def _awq(scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
    groups, per_word = scheme.groups(lin.in_features), 32 // scheme.bits
    yield TensorSpec(lin.name + ".qweight", "I32", (lin.in_features, lin.out_features // per_word))
    yield TensorSpec(lin.name + ".qzeros", "I32", (groups, lin.out_features // per_word))
    yield TensorSpec(lin.name + ".scales", "F16", (groups, lin.out_features))


def _compressed(scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
    groups, per_word = scheme.groups(lin.in_features), 32 // scheme.bits
    yield TensorSpec(lin.name + ".weight_packed", "I32", (lin.out_features, lin.in_features // per_word))
    yield TensorSpec(lin.name + ".weight_scale", "F16", (lin.out_features, groups))
    if not scheme.sym:
        yield TensorSpec(lin.name + ".weight_zero_point", "I32", (lin.out_features // per_word, groups))
    yield TensorSpec(lin.name + ".weight_shape", "I64", (2,))


def _nf4(scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
    blocks, nested = -(-lin.parameters // NF4_BLOCK), scheme.codes == "nf4-nested"
    yield TensorSpec(lin.name + ".weight", "U8", ((lin.parameters + 1) // 2, 1))
    yield TensorSpec(lin.name + ".weight.absmax", "U8" if nested else "F32", (blocks,))
    if nested:
        yield TensorSpec(lin.name + ".weight.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),))
        yield TensorSpec(lin.name + ".weight.nested_quant_map", "F32", (256,))
    yield TensorSpec(lin.name + ".weight.quant_map", "F32", (16,))
    state = nf4_state_json(lin, dtype_of(lin.name + ".weight"))
    yield TensorSpec(lin.name + NF4_STATE, "U8", (len(state),))


def _int8(scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
    yield TensorSpec(lin.name + ".weight", "I8", (lin.out_features, lin.in_features))
    yield TensorSpec(lin.name + ".SCB", "F32", (lin.out_features,))
    yield TensorSpec(lin.name + ".weight_format", "U8", ())


_TENSORS: dict[str, Callable[[Scheme, LinearSpec, StoredDtype], Iterator[TensorSpec]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "bnb-nf4": _nf4,
    "bnb-int8": _int8,
}
