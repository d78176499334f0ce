"""Which kernel this project's own engine takes for a packed linear, and what the linear then keeps in memory.

Shared by the runtime, which builds the modules, and by the estimator, which counts them without torch. A kernel keeps
more or less than the file: torch's 4-bit kernels want a bfloat16 scale and offset for each group (4 bytes where a GPTQ
file has 2.5 or 3), and no `g_idx`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwenq.spec import LinearSpec, ModelSpec, TensorSpec

KERNEL_GROUPS = (256, 128, 64, 32)
DENSE_ROWS = 112  # measured on AVX-512: below it the kernel is faster than writing weights out and a dense product
STRIP = 1 << 20  # weights written out at a time on a CPU; their float32 fits the last-level cache
STRIP_CUDA = 1 << 24

Kind = Literal["int4", "int4 halves", "int8", "tiled", "nf4"]

# Bytes a weight of a strip takes at most while it is written out on a GPU (tests/test_runtime_cuda.py counts them):
# codes, their reordered copy, and the 16-bit or float32 values.
STRIP_BYTES: Mapping[Kind, float] = {"int4": 5, "int4 halves": 5, "int8": 2, "tiled": 8, "nf4": 10}

# Rows from which a linear writes its weights out.
DENSE_FROM: Mapping[Kind, int] = {
    "int4": DENSE_ROWS,
    "int4 halves": DENSE_ROWS // 2,
    "int8": DENSE_ROWS,
    "tiled": 1,
    "nf4": 1,
}


@dataclass(frozen=True)
class Choice:
    """The kernel of a linear, and why it is not torch's own (empty when it is)."""

    kind: Kind
    reason: str = ""


def choose(
    bits: int,
    group: int,
    out_features: int,
    in_features: int,
    sym: bool,
    dtype: str = "bfloat16",
    device: str = "cuda",
    capability: tuple[int, int] = (8, 0),
) -> Choice:
    """The kernel for codes of `bits` bits in groups of `group` columns, activations in `dtype`."""
    if dtype != "bfloat16":
        return Choice("tiled", f"{dtype} activations: torch's packed kernels are fast in bfloat16 only")
    if device not in ("cpu", "cuda"):
        return Choice("tiled", f"no packed kernel on {device}")
    if bits == 8 and group == in_features and sym and in_features % 16 == 0:  # else it reads beyond its rows
        return Choice("int8")
    if kernel_group(group) == 0:
        return Choice("tiled", f"groups of {group} columns: the kernel takes {', '.join(map(str, KERNEL_GROUPS))}")
    outputs, inputs = (16, 2) if device == "cpu" else (8, 32)
    if out_features % outputs:
        return Choice("tiled", f"{out_features} outputs: the kernel wants a multiple of {outputs}")
    if in_features % inputs:
        return Choice("tiled", f"{in_features} inputs: the kernel wants a multiple of {inputs}")
    if device == "cuda" and capability < (8, 0):
        return Choice("tiled", "tinygemm needs compute capability 8.0")
    return Choice("int4" if bits == 4 else "int4 halves")


def kernel_group(group: int) -> int:
    """The kernel's group size that a group of `group` columns can be cut into; 0 when there is none."""
    return next((size for size in KERNEL_GROUPS if group % size == 0), 0)


def kept_bytes(kind: Kind, bits: int, group: int, out_features: int, in_features: int, sym: bool) -> list[int]:
    """Sizes of the tensors a linear of this kernel keeps, its bias and column order apart."""
    weights = out_features * in_features
    if kind == "int8":
        return [weights, 4 * out_features, 2 * out_features]
    if kind == "nf4":
        return [math.ceil(weights / 2), 256 * 2 * 4, 4 * math.ceil(weights / 64)]
    if kind == "tiled":
        codes = out_features * math.ceil(in_features / 2) if bits == 4 else weights
        groups = out_features * (in_features // group)
        return [codes, 2 * groups] + ([] if sym else [groups])
    return [weights * bits // 8, 4 * out_features * (in_features // kernel_group(group))]


def kept_layer(
    spec: ModelSpec, layer: int, tensors: Mapping[str, TensorSpec], sym: bool, sorted_columns: bool
) -> tuple[tuple[int, ...], frozenset[Kind]]:
    """Sizes of what a layer keeps on a GPU, read off its stored tensors, and the kernels it runs on."""
    sizes, kinds, linears = list[int](), set[Kind](), spec.layer_linears(layer)
    names = [(lin, {n.removeprefix(lin.name + "."): t for n, t in tensors.items() if n.startswith(lin.name + ".")})
             for lin in linears]  # fmt: skip
    for lin, found in names:
        kind, kept = _kept_linear(lin, found, sym, sorted_columns)
        sizes += kept
        if kind is not None:
            kinds.add(kind)
    inside = tuple(lin.name + "." for lin in linears)
    sizes += [t.nbytes for n, t in tensors.items() if not n.startswith(inside)]
    return tuple(sizes), frozenset(kinds)


def _kept_linear(
    lin: LinearSpec, found: Mapping[str, TensorSpec], sym: bool, sorted_columns: bool
) -> tuple[Kind | None, list[int]]:
    bias = [2 * lin.out_features] if "bias" in found else []
    codes = next((found[name] for name in ("qweight", "weight_packed", "weight") if name in found), None)
    if codes is None or codes.dtype in ("BF16", "F16", "F32"):
        return None, [t.nbytes for t in found.values()]
    if "weight.absmax" in found:
        return "nf4", bias + kept_bytes("nf4", 4, 64, lin.out_features, lin.in_features, True)
    bits = 8 * codes.nbytes // lin.parameters
    scales = next((found[name] for name in ("scales", "weight_scale", "SCB") if name in found), None)
    entries = math.prod(scales.shape) if scales is not None else 0
    if bits not in (4, 8) or entries < lin.out_features or lin.parameters % entries:
        return None, [t.nbytes for t in found.values()]  # fp8 and others that this engine does not run
    group = lin.parameters // entries
    symmetric = "weight_zero_point" not in found and sym
    kind = choose(bits, group, lin.out_features, lin.in_features, symmetric).kind
    order = [8 * lin.in_features] if sorted_columns else []
    return kind, bias + order + kept_bytes(kind, bits, group, lin.out_features, lin.in_features, symmetric)


def strip_weights(columns: int, device: str) -> int:
    """Weights written out at a time: whole multiples of 64 outputs, so that strips begin where packed blocks do."""
    return columns * max(64, (STRIP_CUDA if device == "cuda" else STRIP) // columns // 64 * 64)
