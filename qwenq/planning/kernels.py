"""Which kernel this project's own engine takes for a packed linear, and what the linear then keeps in memory.

Shared by the runtime, which builds the modules, and by the estimator, which counts them without torch. A kernel keeps
more or less than the file: torch's 4-bit kernels want a bfloat16 scale and offset for each group (4 bytes where a GPTQ
file has 2.5 or 3), and no `g_idx`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from qwenq.io.safetensors import TensorSpec
from qwenq.machine import Compute
from qwenq.model.spec import LinearSpec, ModelSpec
from qwenq.planning.rig import Gpu

KERNEL_GROUPS = (256, 128, 64, 32)
DENSE_ROWS = 112  # measured on AVX-512: below it the kernel is faster than writing weights out and a dense product
INT8_ROWS_CUDA = 4  # `_weight_int8pack_mm` there has one thread an output and reads weights again for each row
STRIP = 1 << 20  # weights written out at a time on a CPU; their float32 fits the last-level cache
STRIP_CUDA = 1 << 24
Kind = Literal["int4", "int4 halves", "int8", "tiled", "nf4"]

# Bytes a weight of a strip takes at most while it is written out, symmetric and with zero points: codes, their
# reordered copy, and 16-bit or float32 values. tests/test_runtime_cuda.py counts them.
STRIP_BYTES: Mapping[Kind, tuple[float, float]] = {
    "int4": (3, 6),
    "int4 halves": (3, 6),
    "int8": (2, 2),
    "tiled": (6, 6),
    "nf4": (6, 6),
}


def dense_from(kind: Kind, device: str) -> int:
    """Rows from which a linear of this kernel writes its weights out."""
    if kind in ("tiled", "nf4"):
        return 1
    if kind == "int8" and device == "cuda":
        return INT8_ROWS_CUDA
    return DENSE_ROWS // 2 if kind == "int4 halves" else DENSE_ROWS


def compute_on(gpu: Gpu, value_bytes: int) -> Compute:
    """How this project's engine computes on a GPU, or on the `CPU`, with activations of so many bytes.

    GPUs of unknown compute capability are taken to have 8.0.
    """
    dtype = "bfloat16" if value_bytes == 2 else "float32"
    if gpu.name == "CPU":
        return Compute(dtype, "cpu")
    return Compute(dtype, "cuda", gpu.compute_capability or (8, 0))


@dataclass(frozen=True)
class Choice:
    """The kernel of a linear, and why it is not torch's own (empty when it is)."""

    kind: Kind
    reason: str = ""


def choose(
    bits: int, group: int, out_features: int, in_features: int, sym: bool, compute: Compute = Compute()
) -> Choice:
    """The kernel for codes of `bits` bits in groups of `group` columns.

    On GPUs 8-bit codes with one scale a row run as two tinygemm products where that can be: torch's int8 kernel there
    is a plain loop (aten/src/ATen/native/cuda/int8mm.cu).
    """
    if compute.dtype != "bfloat16":
        return Choice("tiled", f"{compute.dtype} activations: torch's packed kernels are fast in bfloat16 only")
    if compute.device not in ("cpu", "cuda"):
        return Choice("tiled", f"no packed kernel on {compute.device}")
    rows_alone = bits == 8 and group == in_features and sym and in_features % 16 == 0  # else it reads beyond its rows
    found = _four_bit(bits, group, out_features, in_features, compute)
    if rows_alone and (compute.device == "cpu" or found.kind == "tiled"):
        return Choice("int8")
    return found


def _four_bit(bits: int, group: int, out_features: int, in_features: int, compute: Compute) -> Choice:
    """torch's 4-bit kernel for such codes, or why not."""
    if kernel_group(group) == 0:
        return Choice("tiled", f"groups of {group} columns: the kernel takes {', '.join(map(str, KERNEL_GROUPS))}")
    outputs, inputs = (16, 2) if compute.device == "cpu" else (8, 32)
    if out_features % outputs:
        return Choice("tiled", f"{out_features} outputs: the kernel wants a multiple of {outputs}")
    if in_features % inputs:
        return Choice("tiled", f"{in_features} inputs: the kernel wants a multiple of {inputs}")
    if compute.device == "cuda" and compute.capability < (8, 0):
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
    pairs = 4 * out_features * (in_features // kernel_group(group))
    return [weights * bits // 8, pairs * (2 if bits == 8 and not sym else 1)]


@dataclass(frozen=True)
class PackedShape:
    """What decides the memory of a packed linear. `group` 0: NF4 blocks; `beside`: bytes of bias and column order."""

    bits: int
    group: int
    out_features: int
    in_features: int
    sym: bool
    beside: tuple[int, ...] = ()

    def kind(self, compute: Compute) -> Kind:
        """The kernel it gets."""
        if self.group == 0:
            return "nf4"
        return choose(self.bits, self.group, self.out_features, self.in_features, self.sym, compute).kind

    def kept(self, compute: Compute) -> list[int]:
        """Sizes of what it keeps."""
        shape = self.out_features, self.in_features
        return [*self.beside, *kept_bytes(self.kind(compute), self.bits, self.group, *shape, self.sym)]

    def strip(self, compute: Compute) -> int:
        """Bytes at most while a strip of it is written out."""
        weights = min(self.out_features * self.in_features, strip_weights(self.in_features, compute.device))
        width = STRIP_BYTES[self.kind(compute)][0 if self.sym else 1]
        if compute.widens:
            width = {"int8": 4, "tiled": 5}.get(self.kind(compute), width)  # float32 values, not rounded afterwards
        # a CPU writes values in float32 and then converts them; so does a GPU where there are zero points
        return int(weights * (max(width, 7) if compute.device == "cpu" else width))


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer as stored: its packed linears, and sizes in bytes of all else."""

    packed: tuple[PackedShape, ...]
    others: tuple[int, ...]


def layer_parts(
    spec: ModelSpec,
    layer: int,
    tensors: Mapping[str, TensorSpec],
    sym_of: Callable[[LinearSpec], bool],
    sorted_columns: bool = False,
) -> LayerParts:
    """Read a layer's stored tensors. `sym_of`: whether a linear is declared to have no zero points of its own."""
    packed, others, inside = list[PackedShape](), list[int](), set[str]()
    for lin in spec.layer_linears(layer):
        found = {n.removeprefix(lin.name + "."): t for n, t in tensors.items() if n.startswith(lin.name + ".")}
        inside |= {f"{lin.name}.{name}" for name in found}
        shape = _packed_shape(lin, found, sym_of(lin), sorted_columns)
        if shape is not None:
            packed.append(shape)
        else:
            others += [_sixteen_bit(t) for t in found.values()]
    others += [_sixteen_bit(t) for name, t in tensors.items() if name not in inside]
    return LayerParts(tuple(packed), tuple(others))


def _sixteen_bit(tensor: TensorSpec) -> int:
    """Bytes of a tensor that is not packed: float32 is converted to 16 bit on loading."""
    return tensor.nbytes // 2 if tensor.dtype == "F32" else tensor.nbytes


def _packed_shape(
    lin: LinearSpec, found: Mapping[str, TensorSpec], sym: bool, sorted_columns: bool
) -> PackedShape | None:
    """None for what is not packed, and for what this engine does not run (fp8)."""
    codes = next((found[name] for name in ("qweight", "weight_packed", "weight") if name in found), None)
    scales = next((found[name] for name in ("scales", "weight_scale", "SCB") if name in found), None)
    if codes is None or codes.dtype not in ("I32", "U8", "I8"):
        return None
    shape = lin.out_features, lin.in_features
    beside = (2 * lin.out_features,) if "bias" in found else ()
    if "weight.absmax" in found:
        return PackedShape(4, 0, *shape, True, beside)
    bits, entries = 8 * codes.nbytes // lin.parameters, math.prod(scales.shape) if scales is not None else 0
    if bits not in (4, 8) or entries < lin.out_features or lin.parameters % entries:
        return None
    order = (8 * lin.in_features,) if sorted_columns else ()
    sym = sym and "weight_zero_point" not in found
    return PackedShape(bits, lin.parameters // entries, *shape, sym, beside + order)


def strip_weights(columns: int, device: str) -> int:
    """Weights written out at a time: whole multiples of 64 outputs, so that strips begin where packed blocks do."""
    return columns * max(64, (STRIP_CUDA if device == "cuda" else STRIP) // columns // 64 * 64)
