"""This project's own kernels for x86 CPUs (`cpu_kernels.c`): matmuls, and what one token needs between them.

They are built with the machine's C compiler (`cc`, or what `CC` names) once a process, as Triton builds its launchers.
Without one torch's packed kernels take over, and the reason is told. OpenMP comes from torch: a second copy would
bring threads of its own.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qwenq.machine import compiler, lacks_for_cpu_kernels

BLOCK = 16  # outputs
ROWS = 64  # of activations at once: rounded, they stay in a core's cache
BUILD_SECONDS = 60
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "multiply": (_POINTER, *[_SIZE] * 3, *[_POINTER] * 4, *[_SIZE] * 3, _POINTER, _POINTER, _SIZE),
    "add_norm": (*[_POINTER] * 3, _SIZE, ctypes.c_float, _POINTER, _POINTER),
    "gate": (_POINTER, _POINTER, _SIZE, _POINTER),
    "turn_and_keep": (*[_POINTER] * 7, ctypes.c_float, *[_SIZE] * 5, *[_POINTER] * 3),
    "attend_one": (*[_POINTER] * 3, *[_SIZE] * 5, ctypes.c_float, _POINTER, _POINTER),
    "multiply_stored": (_POINTER, *[_SIZE] * 2, *[_POINTER] * 2, _SIZE, _POINTER, _POINTER, _SIZE),
}


class KernelRefused(RuntimeError):
    """Kernels that can't be built or loaded on this machine."""


def refusal() -> str:
    """Why this machine does not take the kernels; empty when it does."""
    found = _built()
    return found if isinstance(found, str) else ""


@cache
def _built(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    if why := lacks_for_cpu_kernels():
        return why
    source, command = Path(__file__).with_suffix(".c"), compiler()
    with tempfile.TemporaryDirectory(prefix="qwenq-kernels-") as directory:
        built, library = Path(directory, "kernels.o"), Path(directory, "kernels.so")
        try:
            for words in ((*flags, "-c", str(source), "-o", str(built)), ("-shared", str(built), "-o", str(library))):
                subprocess.run((*command, *words), check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
            found = ctypes.CDLL(str(library))  # OpenMP's symbols are those that torch has loaded for all
        except subprocess.CalledProcessError as reason:
            said = [line for line in reason.stderr.splitlines() if "error" in line] or ["no message"]
            return f"{command[0]} does not build the CPU kernels: {said[0].rpartition('error: ')[2][:200]}"
        except (OSError, subprocess.SubprocessError) as reason:
            return f"the CPU kernels can't be built or loaded: {str(reason).splitlines()[0][:200]}"
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes, getattr(found, name).restype = arguments, None
    return found


def _library() -> ctypes.CDLL:
    found = _built()
    if isinstance(found, str):
        raise KernelRefused(found)
    return found


# ---------------------------------------------------------------------- layout


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes uint8 [O, I] as the kernels read them: uint8 [blocks, I * 16 * bits / 8], outputs filled up to 16."""
    outputs, inputs = codes_OI.shape
    blocks = -(-outputs // BLOCK)
    if outputs % BLOCK:
        codes_OI = torch.cat((codes_OI, codes_OI.new_zeros(blocks * BLOCK - outputs, inputs)))
    if bits == 8:
        pairs = (codes_OI ^ 128).view(blocks, BLOCK, inputs // 2, 2)  # code - 128, as a signed byte
        return pairs.transpose(1, 2).reshape(blocks, inputs * BLOCK)
    c = codes_OI.view(blocks, BLOCK, inputs // 8, 4, 2).permute(0, 2, 1, 4, 3)  # ..., half, place in it
    return (c[..., 0::2] | (c[..., 1::2] << 4)).reshape(blocks, inputs * BLOCK // 2)


def unpack_codes(packed: Tensor, bits: int, outputs: Tensor) -> Tensor:
    """Codes of some outputs (int64 [R]) that `pack_codes` packed, uint8 [R, I]."""
    block, place = outputs // BLOCK, outputs % BLOCK
    if bits == 8:
        pairs = packed.view(packed.shape[0], -1, BLOCK, 2)
        return pairs[block, :, place].reshape(len(outputs), -1) ^ 128
    words = packed.view(packed.shape[0], -1, BLOCK, 2, 2)[block, :, place]  # [R, I / 8, half, byte]
    nibbles = torch.stack((words & 15, words >> 4), -1).flatten(3)  # [R, I / 8, half, place]
    return nibbles.transpose(2, 3).reshape(len(outputs), -1)


def pack_groups(values_OG: Tensor) -> Tensor:
    """Values of each output and group, [blocks, G, 16], outputs filled up with zeros."""
    outputs, groups = values_OG.shape
    blocks = -(-outputs // BLOCK)
    if outputs % BLOCK:
        values_OG = torch.cat((values_OG, values_OG.new_zeros(blocks * BLOCK - outputs, groups)))
    return values_OG.view(blocks, BLOCK, groups).transpose(1, 2).contiguous()


# ---------------------------------------------------------------------- matmuls


def multiply(
    x_MI: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias_O: Tensor | None, out_MO: Tensor
) -> Tensor:
    """x w' + bias into out [M, O], float32 or bfloat16; x bfloat16; contiguous all of them."""
    (rows, inputs), outputs = x_MI.shape, out_MO.shape[1]
    groups = scales.shape[1]
    bits, step = codes.shape[1] * 8 // (inputs * BLOCK), out_MO.element_size()
    taken = min(rows, ROWS)
    scratch = torch.empty((taken + 8) * (2 * inputs + 8 * groups), dtype=torch.uint8)
    constants = (
        inputs, outputs, codes.data_ptr(), scales.data_ptr(), 0 if offsets is None else offsets.data_ptr(),
        0 if bias_O is None else bias_O.data_ptr(), bits, scales.dtype == torch.float16, inputs // groups,
        scratch.data_ptr(),
    )  # fmt: skip
    call, x, out = _library().multiply, x_MI.data_ptr(), out_MO.data_ptr()
    for start in range(0, rows, ROWS):
        count = min(ROWS, rows - start)
        call(x + 2 * start * inputs, count, *constants, out + step * start * outputs, step == 4)
    return out_MO


def multiply_stored(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_O: Tensor) -> Tensor:
    """w x + bias into out [O], float32 or bfloat16, for one row x bfloat16 and w bfloat16 or float16."""
    outputs, inputs = weight_OI.shape
    scratch = torch.empty(inputs)
    _library().multiply_stored(
        x_I.data_ptr(), inputs, outputs, weight_OI.data_ptr(), 0 if bias_O is None else bias_O.data_ptr(),
        weight_OI.dtype == torch.float16, scratch.data_ptr(), out_O.data_ptr(), out_O.dtype == torch.float32,
    )  # fmt: skip
    return out_O


# ---------------------------------------------------------------------- one token: norms, rotary positions, attention

MOST_WIDTH = 1024  # of a head


def add_norm(h_MI: Tensor, added_MI: Tensor | None, weight_I: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h + added, and its RMS norm, of one row [1, I]; bfloat16."""
    total, out = torch.empty_like(h_MI), torch.empty_like(h_MI)
    _library().add_norm(
        h_MI.data_ptr(), 0 if added_MI is None else added_MI.data_ptr(), weight_I.data_ptr(), h_MI.numel(), eps,
        total.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return total, out


def gate(gate_MI: Tensor, up_MI: Tensor) -> Tensor:
    """silu(gate) up."""
    out = torch.empty_like(gate_MI)
    _library().gate(gate_MI.data_ptr(), up_MI.data_ptr(), out.numel(), out.data_ptr())
    return out


@dataclass(frozen=True)
class Head:
    """How one head is made ready: cosines and sines of its position [1, D], norms of Qwen3 [D], their epsilon."""

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


def turn_and_keep(
    q_HD: Tensor, k_ND: Tensor, v_ND: Tensor, head: Head, cache: tuple[Tensor, Tensor], length: int
) -> Tensor:
    """q turned by its position, [H, D]; k, turned, and v are put at position length - 1 of `cache` [1, N, S, D]."""
    (heads, width), (keys, values) = q_HD.shape, cache
    out = torch.empty_like(q_HD)
    q_norm, k_norm = (0 if norm is None else norm.data_ptr() for norm in (head.q_norm, head.k_norm))
    _library().turn_and_keep(
        q_HD.data_ptr(), k_ND.data_ptr(), v_ND.data_ptr(), head.cos.data_ptr(), head.sin.data_ptr(), q_norm, k_norm,
        head.eps, heads, k_ND.shape[0], width, keys.shape[2], length - 1, out.data_ptr(), keys.data_ptr(),
        values.data_ptr(),
    )  # fmt: skip
    return out


def attend_one(q_HD: Tensor, cache: tuple[Tensor, Tensor], length: int, scaling: float) -> Tensor:
    """Attention of one token over the first `length` of the cache's tokens, [H, D]; D a multiple of 16."""
    (heads, width), (keys, values) = q_HD.shape, cache
    out, scores = torch.empty_like(q_HD), torch.empty(heads * length)
    _library().attend_one(
        q_HD.data_ptr(), keys.data_ptr(), values.data_ptr(), heads, keys.shape[1], width, keys.shape[2], length,
        scaling, scores.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out
