"""Which kernel this project's own engine takes for a packed linear, and what the linear then keeps in memory.

Shared by the runtime, which builds the modules, and by the estimator, which counts them without torch. A kernel keeps
more or less than the file: torch's 4-bit kernels want a bfloat16 scale and offset for each group (4 bytes where a GPTQ
file has 2.5 or 3), and no `g_idx`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from qwenq.formats.base import PackedShape, Recipe, get_format
from qwenq.io.gguf import TYPES
from qwenq.io.safetensors import TensorSpec
from qwenq.machine import Compute, lacks_for_cpu_kernels
from qwenq.model.spec import ModelSpec
from qwenq.planning.rig import Gpu

KERNEL_GROUPS = (256, 128, 64, 32)
CPU_GROUPS = (*KERNEL_GROUPS, 16)
DENSE_ROWS = 112  # measured on AVX-512: below it the kernel is faster than writing weights out and a dense matmul
INT8_ROWS_CUDA = 4  # `_weight_int8pack_mm` there has one thread an output and reads weights again for each row
TRITON_DENSE_ROWS = 65  # more than one tile of rows: the kernel would read weights again
ROW_BLOCK = 1 << 20  # weights written out at a time on a CPU; their float32 fits the last-level cache
ROW_BLOCK_CUDA = 1 << 24
NEVER = 1 << 60
Kind = Literal["triton", "cpu", "int4", "int4 halves", "int8", "tiled", "nf4", "blocks"]
_SUB_GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}  # GGUF types whose scales are not one a 32 columns
_WIDE_SCALES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")  # products of two numbers, so float32
_CPU_BLOCKS = (*_WIDE_SCALES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")

# Bytes a weight of a row block takes at most while it is written out, symmetric and with zero points: codes, their
# reordered copy, and 16-bit or float32 values. tests/runtime/test_runtime_cuda.py counts them.
ROW_BLOCK_BYTES: Mapping[Kind, tuple[float, float]] = {
    "cpu": (0, 0),  # it writes none out
    "triton": (3, 6),  # it takes 2; the estimate leaves room for tinygemm, which steps in where a kernel is refused
    "int4": (3, 6),
    "int4 halves": (3, 6),
    "int8": (2, 2),
    "tiled": (6, 6),
    "nf4": (6, 6),
    "blocks": (13.3, 13.3),  # codes, their indices or values, those times scales; of types without a table 9.6 at most
}


def dense_from(kind: Kind, device: str) -> int:
    """Rows from which a linear of this kernel writes its weights out."""
    if kind in ("tiled", "nf4", "blocks"):
        return 1
    if kind == "cpu":
        return NEVER
    if kind == "triton":
        return TRITON_DENSE_ROWS
    if kind == "int8" and device == "cuda":
        return INT8_ROWS_CUDA
    return DENSE_ROWS // 2 if kind == "int4 halves" else DENSE_ROWS


def compute_on(gpu: Gpu, value_bytes: int) -> Compute:
    """The Compute of qwenq's own engine on a GPU, or on the `CPU`, with activations of this many bytes.

    GPUs of unknown compute capability are taken to have 8.0.
    """
    dtype = "bfloat16" if value_bytes == 2 else "float32"
    if gpu.name == "CPU":
        return Compute(dtype, "cpu", compiler=not lacks_for_cpu_kernels())
    return Compute(dtype, "cuda", gpu.compute_capability or (8, 0), gpu.triton)


@dataclass(frozen=True)
class Choice:
    """The kernel of a linear, and why it is not a faster one (empty when there is none)."""

    kind: Kind
    reason: str = ""


def choose(shape: PackedShape, compute: Compute = Compute()) -> Choice:
    """The kernel of a packed linear, chosen once: by what its format says of it.

    On GPUs 8-bit codes with one scale per row run as two tinygemm matmuls where that can be: torch's int8 kernel there
    is a plain loop (aten/src/ATen/native/cuda/int8mm.cu).
    """
    if not not_on_cpu_kernels(shape, compute):
        return Choice("cpu")
    if shape.blocks:
        return _blocks(shape, compute)
    if shape.table:
        return Choice("nf4", "NF4: torch ships no kernel for its table")
    if compute.dtype != "bfloat16":
        return Choice("tiled", f"{compute.dtype} activations: torch's packed kernels are fast in bfloat16 only")
    if compute.device not in ("cpu", "cuda"):
        return Choice("tiled", f"no packed kernel on {compute.device}")
    one_scale_a_row = shape.bits == 8 and shape.group == shape.in_features and shape.sym
    int8 = one_scale_a_row and shape.in_features % 16 == 0  # else the kernel reads beyond its rows
    why = _not_triton(shape, compute)
    if not why:
        return Choice("triton")
    found = _four_bit(shape, compute)
    if compute.device == "cuda" and compute.capability >= (8, 0) and found.kind != "tiled":
        found = Choice(found.kind, why)
    if int8 and (compute.device == "cpu" or found.kind == "tiled"):
        return Choice("int8")
    return found


def not_on_cpu_kernels(shape: PackedShape, compute: Compute) -> str:
    """Why this project's own CPU kernels do not take such codes; empty when they do."""
    if compute.device != "cpu" or compute.dtype != "bfloat16":
        return "CPU kernels take bfloat16 activations on a CPU"
    if not compute.compiler:
        return "CPU kernels cannot be compiled"
    if shape.table and shape.blocks not in _CPU_BLOCKS:
        return f"CPU kernels have no table for {shape.blocks or 'NF4'}"
    group = shape.group if not shape.blocks else _SUB_GROUPS.get(shape.blocks, 32)
    if kernel_group(group, CPU_GROUPS) == 0:
        return f"groups of {group} columns: CPU kernels need a multiple of 16"
    return ""


def _not_triton(shape: PackedShape, compute: Compute) -> str:
    """Why this project's own kernels do not take such codes; empty when they do."""
    if compute.device != "cuda" or compute.capability < (8, 0):
        return "Triton kernels need compute capability 8.0"
    if not compute.triton:
        return "Triton is not installed"
    if shape.in_features % 64 or kernel_group(shape.group) == 0:
        return f"{shape.in_features} inputs in groups of {shape.group}: Triton kernels need a multiple of 64 and of 32"
    return ""


def _blocks(shape: PackedShape, compute: Compute) -> Choice:
    """A kernel for a GGUF weight whose codes one takes, else row blocks out of the bytes as they are."""
    kind = shape.blocks
    if shape.table or shape.bits not in (4, 8):
        return Choice("blocks", f"{kind}: no kernel, so weights are dequantized in row blocks")
    found = choose(replace(shape, blocks=""), replace(compute, triton=compute.triton and shape.sym))
    if found.kind == "tiled":
        return Choice("blocks", f"{kind} in row blocks: {found.reason}")
    if compute.device == "cuda" and compute.triton and not shape.sym:
        return Choice(found.kind, f"{kind}: Triton kernels need integer zero points")
    return found


def _four_bit(shape: PackedShape, compute: Compute) -> Choice:
    """torch's 4-bit kernel for such codes, or why not."""
    if kernel_group(shape.group) == 0:
        sizes = ", ".join(map(str, KERNEL_GROUPS))
        return Choice("tiled", f"groups of {shape.group} columns: the kernel takes {sizes}")
    outputs, inputs = (16, 2) if compute.device == "cpu" else (8, 32)
    if shape.out_features % outputs:
        return Choice("tiled", f"{shape.out_features} outputs: the kernel needs a multiple of {outputs}")
    if shape.in_features % inputs:
        return Choice("tiled", f"{shape.in_features} inputs: the kernel needs a multiple of {inputs}")
    if compute.device == "cuda" and compute.capability < (8, 0):
        return Choice("tiled", "tinygemm needs compute capability 8.0")
    return Choice("int4" if shape.bits == 4 else "int4 halves")


def kernel_group(group: int, sizes: tuple[int, ...] = KERNEL_GROUPS) -> int:
    """The kernel's group size that a group of `group` columns can be cut into; 0 when there is none."""
    return next((size for size in sizes if group % size == 0), 0)


def cpu_bits(shape: PackedShape) -> int:
    """Bits of a code on the CPU kernels: 4 where that suffices; else 8, levels of a table of GGUF's among them."""
    return 4 if shape.bits <= 4 and not shape.blocks.startswith("IQ") else 8


def kept_bytes(shape: PackedShape, kind: Kind) -> list[int]:
    """Sizes of the tensors a linear of this kernel keeps, its bias and column order apart."""
    outputs, inputs = shape.out_features, shape.in_features
    weights = outputs * inputs
    if kind == "cpu":
        rows = math.ceil(outputs / 16) * 16
        group = _SUB_GROUPS.get(shape.blocks, 32) if shape.blocks else shape.group
        groups = rows * (inputs // kernel_group(group, CPU_GROUPS))
        scales = groups * (4 if shape.blocks in _WIDE_SCALES else 2)
        return [rows * inputs * cpu_bits(shape) // 8, scales] + ([] if shape.sym else [4 * groups])
    if kind == "int8":
        return [weights, 4 * outputs, 2 * outputs]
    if kind == "nf4":
        return [math.ceil(weights / 2), 256 * 2 * 4, 4 * math.ceil(weights / shape.group)]
    if kind == "blocks":
        found = TYPES[shape.blocks]
        return [weights // found.values * found.n_bytes]
    if kind == "tiled":
        codes = outputs * math.ceil(inputs / 2) if shape.bits == 4 else weights
        groups = outputs * (inputs // shape.group)
        return [codes, 2 * groups] + ([] if shape.sym else [groups])
    pairs = 4 * outputs * (inputs // kernel_group(shape.group))
    if kind == "triton" and shape.sym:  # scales alone
        pairs //= 2
    twice = kind == "int4 halves" and not shape.sym
    return [weights * shape.bits // 8, pairs * (2 if twice else 1)]


def kept(shape: PackedShape, compute: Compute) -> list[int]:
    """Sizes of all that a packed linear keeps."""
    return [*shape.beside, *kept_bytes(shape, choose(shape, compute).kind)]


def row_block_bytes(shape: PackedShape, compute: Compute) -> int:
    """Bytes at most while a row block of a packed linear is written out."""
    kind = choose(shape, compute).kind
    if kind == "cpu":
        return 0
    weights = min(shape.out_features * shape.in_features, row_block_weights(shape.in_features, compute.device))
    width = ROW_BLOCK_BYTES[kind][0 if shape.sym else 1]
    if compute.widens:
        width = {"int8": 4, "tiled": 5}.get(kind, width)  # float32 values, not rounded afterwards
    # a CPU writes values in float32 and then converts them; so does a GPU where there are zero points
    return int(weights * (max(width, 7) if compute.device == "cpu" else width))


class LayerParts(NamedTuple):
    """A decoder layer as stored: its packed linears, and sizes in bytes of all else."""

    packed: tuple[PackedShape, ...]
    others: tuple[int, ...]


def layer_parts(
    spec: ModelSpec, layer: int, tensors: Mapping[str, TensorSpec], recipe: Recipe, sorted_columns: bool = False
) -> LayerParts:
    """A layer's stored tensors, packed linears as the recipe's format describes them."""
    form = get_format(recipe.format)
    packed, others, inside = list[PackedShape](), list[int](), set[str]()
    for lin in spec.layer_linears(layer):
        found = {name: t for name, t in tensors.items() if name.startswith(lin.name + ".")}
        inside |= found.keys()
        scheme, shape = recipe.scheme_of(lin), None
        if scheme is not None and not any(form.lacks(found.keys(), name) for name in form.packed_names(scheme, lin)):
            shape = form.packed_shape(scheme, lin, sorted_columns=sorted_columns)
        if shape is not None:
            packed.append(shape)
        else:
            others += [_sixteen_bit(t) for t in found.values()]
    others += [_sixteen_bit(t) for name, t in tensors.items() if name not in inside]
    return LayerParts(tuple(packed), tuple(others))


def _sixteen_bit(tensor: TensorSpec) -> int:
    """Bytes of a tensor that is not packed: float32 is converted to 16 bit on loading."""
    return tensor.nbytes // 2 if tensor.dtype == "F32" else tensor.nbytes


def row_block_weights(columns: int, device: str) -> int:
    """Weights written out at a time: whole multiples of 64 outputs, so that row blocks begin where packed blocks do."""
    return columns * max(64, (ROW_BLOCK_CUDA if device == "cuda" else ROW_BLOCK) // columns // 64 * 64)
