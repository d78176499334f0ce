"""This project's own kernels for x86 CPUs (`cpu_kernels.c`): matmuls, and what one token needs between them.

They are built with the machine's C compiler (`cc`, or what `CC` names), as Triton builds its launchers, and kept in the
user's cache. Without a compiler torch's packed kernels take over, and the reason is told. OpenMP comes from torch: a
second copy would bring threads of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qwenq.io.durable import write_bytes
from qwenq.machine import compiler, lacks_for_cpu_kernels

SOURCE = Path(__file__).with_suffix(".c")
BLOCK = 16  # outputs
ROWS = 64  # of activations at once: rounded, they stay in a core's cache
BUILD_SECONDS = 60
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "multiply": (_POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE),
    "add_norm": (*[_POINTER] * 3, _SIZE, ctypes.c_float, _POINTER, _POINTER),
    "gate": (_POINTER, _POINTER, _SIZE, _POINTER),
    "turn_and_keep": (*[_POINTER] * 7, ctypes.c_float, *[_SIZE] * 5, *[_POINTER] * 3),
    "attend_one": (*[_POINTER] * 3, *[_SIZE] * 5, ctypes.c_float, _POINTER, _POINTER),
    "pass_token": (*[_POINTER] * 4, _SIZE, _POINTER),
}


class KernelRefused(RuntimeError):
    """A kernel of this project's that can't be built, compiled or launched on this machine, in any tiling."""


def refusal() -> str:
    """Why this machine does not take the kernels; empty when it does."""
    found = _built()
    return found if isinstance(found, str) else ""


@cache
def _built(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    if why := lacks_for_cpu_kernels():
        return why
    try:
        place = _place(flags)
        found = _loaded(place) or _compiled(flags, place)
    except subprocess.CalledProcessError as reason:
        said = [line for line in reason.stderr.splitlines() if "error" in line] or ["no message"]
        return f"{reason.cmd[0]} cannot compile the CPU kernels: {said[0].rpartition('error: ')[2][:200]}"
    except (OSError, subprocess.SubprocessError) as reason:
        return f"the CPU kernels cannot be compiled or loaded: {str(reason).splitlines()[0][:200]}"
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes, getattr(found, name).restype = arguments, None
    return found


def _run_compiler(*words: str) -> str:
    """What the compiler prints to stderr; it is asked for English, where an error is called one."""
    english = os.environ | {"LC_ALL": "C"}
    return subprocess.run(
        (*compiler(), *words), env=english, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS
    ).stderr


def _place(flags: tuple[str, ...]) -> Path | None:
    """The library's file in the user's cache, where there is one that nobody else can write to.

    Its name stands for the source and all that decides what becomes of it: `-###` compiles nothing, and prints the
    compiler's version and what the flags mean on this CPU.
    """
    meant = _run_compiler(*flags, "-###", "-S", "-x", "c", os.devnull, "-o", os.devnull)
    try:
        meant = meant.replace(os.getcwd(), "")  # which Clang notes for a debugger
        caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (caches if caches.is_absolute() else Path.home() / ".cache") / "qwenq"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError):  # read-only, or nobody's home
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    name = hashlib.sha256(SOURCE.read_bytes() + meant.encode()).hexdigest()
    return folder / f"cpu-kernels-{name[:32]}.so" if private else None


def _loaded(place: Path | None) -> ctypes.CDLL | None:
    """The kept library; None where there is none that is whole and loads. Its SHA-256 stands behind it."""
    if place is not None:
        with suppress(OSError):
            content = place.read_bytes()
            if hashlib.sha256(content[:-32]).digest() == content[-32:]:
                return ctypes.CDLL(str(place))
    return None


def _compiled(flags: tuple[str, ...], place: Path | None) -> ctypes.CDLL:
    """The library, built and kept at `place`, where that can be."""
    with tempfile.TemporaryDirectory(prefix="qwenq-kernels-") as directory:
        built, library = Path(directory, "kernels.o"), Path(directory, "kernels.so")
        _run_compiler(*flags, "-c", str(SOURCE), "-o", str(built))
        _run_compiler("-shared", str(built), "-o", str(library))
        found = ctypes.CDLL(str(library))  # OpenMP's symbols are those that torch has loaded for all
        content = library.read_bytes()
    if place is not None:
        with suppress(OSError):
            write_bytes(place, content + hashlib.sha256(content).digest())
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


class Linear(ctypes.Structure):
    """A linear as the kernels see it (`linear` in cpu_kernels.c): where its tensors lie, which must outlive it."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scales", "offsets", "bias", "order")),
        *((name, _SIZE) for name in ("inputs", "outputs", "group", "bits", "halves")),
    )

    def scratch_bytes(self, rows: int) -> int:
        """Scratch bytes that `multiply` needs for prepared activations."""
        return (rows + 8) * (2 * self.inputs + 8 * (self.inputs // self.group))


def _at(*tensors: Tensor | None) -> Iterator[int]:
    """Addresses of tensors; 0 for None."""
    return (0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def packed(
    shape: tuple[int, int], codes: Tensor, scales: Tensor, offsets: Tensor | None, bias_O: Tensor | None,
    order_I: Tensor | None,
) -> Linear:  # fmt: skip
    """A linear [O, I] of codes and groups as packed above; bias bfloat16. order: a column's place in x, int64."""
    outputs, inputs = shape
    bits, halves = codes.shape[1] * 8 // (inputs * BLOCK), scales.dtype == torch.float16
    at = _at(codes, scales, offsets, bias_O, order_I)
    return Linear(*at, inputs, outputs, inputs // scales.shape[1], bits, halves)


def stored(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """A linear of a weight in bfloat16 or float16; bias bfloat16."""
    outputs, inputs = weight_OI.shape
    at = _at(weight_OI, None, None, bias_O, None)
    return Linear(*at, inputs, outputs, inputs, 16, weight_OI.dtype == torch.float16)


def multiply(x_MI: Tensor, linear: Linear, out_MO: Tensor) -> Tensor:
    """x w' + bias into out [M, O], float32 or bfloat16; x bfloat16, of one row for 16-bit weights; both contiguous."""
    (rows, inputs), step = x_MI.shape, out_MO.element_size()
    scratch = torch.empty(linear.scratch_bytes(min(rows, ROWS)), dtype=torch.uint8)
    call, x, out = _library().multiply, x_MI.data_ptr(), out_MO.data_ptr()
    for start in range(0, rows, ROWS):
        to = out + step * start * out_MO.shape[1]
        call(ctypes.byref(linear), x + 2 * start * inputs, min(ROWS, rows - start), scratch.data_ptr(), to, step == 4)
    return out_MO


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
    """Inputs for preparing one head: cosines and sines of its position [1, D], norms of Qwen3 [D], their epsilon."""

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
    q_norm, k_norm = _at(head.q_norm, head.k_norm)
    _library().turn_and_keep(
        q_HD.data_ptr(), k_ND.data_ptr(), v_ND.data_ptr(), head.cos.data_ptr(), head.sin.data_ptr(), q_norm, k_norm,
        head.eps, heads, k_ND.shape[0], width, keys.shape[2], length - 1, out.data_ptr(), keys.data_ptr(),
        values.data_ptr(),
    )  # fmt: skip
    return out


def attend_one(q_HD: Tensor, cache: tuple[Tensor, Tensor], length: int, scaling: float) -> Tensor:
    """Attention of one token over the first `length` of the cache's tokens, [H, D]; D a multiple of 16."""
    (heads, width), (keys, values) = q_HD.shape, cache
    out, scores = torch.empty_like(q_HD), torch.empty(heads, length + 15)
    _library().attend_one(
        q_HD.data_ptr(), keys.data_ptr(), values.data_ptr(), heads, keys.shape[1], width, keys.shape[2], length,
        scaling, scores.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------- one token through all layers and the head


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class Layer(ctypes.Structure):
    """A layer's linears, norms and cache (`layer` in cpu_kernels.c)."""

    _fields_ = (
        *((name, Linear) for name in LINEARS),
        *((name, _POINTER) for name in ("before", "after", "q_norm", "k_norm", "keys", "values")),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("head", Linear),
        ("norm", _POINTER),
        *((name, _SIZE) for name in ("count", "hidden", "heads", "shared", "width", "capacity")),
        *((name, ctypes.c_float) for name in ("eps", "scaling")),
        *((name, _POINTER) for name in ("x", "y", "added", "scores", "scratch")),
    )


def layer(linears: Sequence[Linear], norms: Sequence[Tensor | None], cache: tuple[Tensor, Tensor]) -> Layer:
    """linears: in the order of `Layer`; norms: before and behind attention, of q's and of k's heads (or none)."""
    return Layer(*linears, *_at(*norms, *cache))


class Network:
    """All layers and the head in one call a token, and room for what is between them.

    norm: behind the last layer; keys: of any layer's cache, [1, N, S, D]. Tensors must outlive it.
    """

    def __init__(
        self, layers: Sequence[Layer], head: Linear, norm_I: Tensor, eps: float, scaling: float, keys: Tensor
    ) -> None:
        (_, shared, capacity, width), hidden, first = keys.shape, norm_I.numel(), layers[0]
        heads, inner = first.q.outputs // width, first.gate.outputs
        every = [head, *(getattr(each, name) for each in layers for name in LINEARS)]
        most = max(hidden, heads * width, inner), max((heads + 2 * shared) * width, 2 * inner), hidden
        self._room = [torch.empty(size, dtype=torch.bfloat16) for size in most]
        self._room.append(torch.empty(heads, capacity + 15))
        self._room.append(torch.empty(max(each.scratch_bytes(1) for each in every), dtype=torch.uint8))
        self._layers = (Layer * len(layers))(*layers)
        sizes = len(layers), hidden, heads, shared, width, capacity
        self._network = _Network(self._layers, head, *_at(norm_I), *sizes, eps, scaling, *_at(*self._room))

    def __call__(self, h_1I: Tensor, cos: Tensor, sin: Tensor, length: int) -> Tensor:
        """Logits float32 [V] behind the token whose embedding is h (written over), with `length` tokens in the cache.

        cos, sin: of its position, bfloat16 [1, D].
        """
        logits_V = torch.empty(self._network.head.outputs)
        h, cosine, sine, logits = _at(h_1I, cos, sin, logits_V)
        _library().pass_token(ctypes.byref(self._network), h, cosine, sine, length - 1, logits)
        return logits_V
