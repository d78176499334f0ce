"""GGUF's types as llama.cpp reads them: blocks of 32 and super-blocks of 256, and its mixtures of them.

A row is whole blocks, one after the other; a block is its fields, in the order of `_FIELDS`. Types and their order of
bits: ggml-common.h and ggml-quants.c. Which tensor of a mixture has which type: llama_tensor_get_type in
llama-quant.cpp, as it decides with an importance matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenq.errors import CheckpointError, PlanError, UsageError
from qwenq.escaping import shown
from qwenq.formats.base import (
    CODES,
    QWENQ,
    ByTransformers,
    Codes,
    ExactNames,
    Format,
    Loader,
    PackedShape,
    Quantization,
    Recipe,
    Scheme,
    Solved,
    StoredDtype,
    Variant,
    of_most_weights,
    register,
    servers,
)
from qwenq.io.gguf import TYPES, BlockTensor
from qwenq.io.safetensors import TensorSpec
from qwenq.model.metadata import names_in_gguf
from qwenq.model.spec import LinearSpec, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qwenq.solver.grid import Grid, QTensor


# ---------------------------------------------------------------------- fields of a block


class _Field(ABC):
    """Some bytes of every block: what they hold of its codes [N, values] and parameters ([N, n] each), both ways."""

    @abstractmethod
    def n_bytes(self, values: int) -> int:
        """Of a block of so many values."""

    @abstractmethod
    def put(self, codes_NK: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The bytes, uint8 [N, n_bytes]."""

    @abstractmethod
    def take(self, data_NB: Tensor, codes_NK: Tensor, parameters: list[Tensor | None]) -> None:
        """Read the bytes: codes are or-ed in, parameters are set."""


@dataclass(frozen=True)
class _Plain(_Field):
    """`count` values of parameter `index` as they are: a float16 for the block, int8 scales of its sub-groups."""

    index: int
    dtype: str = "float16"
    count: int = 1

    def n_bytes(self, values: int) -> int:
        return self.count * (2 if self.dtype == "float16" else 1)

    def put(self, codes_NK: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        import torch

        stored_NC = parameters[self.index].to(getattr(torch, self.dtype))
        return stored_NC.reshape(-1).view(torch.uint8).view(len(stored_NC), -1)

    def take(self, data_NB: Tensor, codes_NK: Tensor, parameters: list[Tensor | None]) -> None:
        import torch

        parameters[self.index] = data_NB.contiguous().view(getattr(torch, self.dtype))


@dataclass(frozen=True)
class _Bits(_Field):
    """`bits` bits of every code, from bit `low` on: `lanes` bytes hold the lowest of so many codes, the next above."""

    bits: int
    lanes: int
    low: int = 0

    def n_bytes(self, values: int) -> int:
        return values * self.bits // 8

    def put(self, codes_NK: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        part_NK = (codes_NK >> self.low) & ((1 << self.bits) - 1)
        part_NCSL = part_NK.view(len(codes_NK), -1, 8 // self.bits, self.lanes)
        out_NCL = part_NCSL[:, :, 0].clone()
        for k in range(1, 8 // self.bits):
            out_NCL |= part_NCSL[:, :, k] << (k * self.bits)
        return out_NCL.flatten(1)

    def take(self, data_NB: Tensor, codes_NK: Tensor, parameters: list[Tensor | None]) -> None:
        data_NCL = data_NB.unflatten(1, (-1, self.lanes))
        into_NCSL = codes_NK.view(len(codes_NK), -1, 8 // self.bits, self.lanes)
        for k in range(8 // self.bits):
            into_NCSL[:, :, k] |= ((data_NCL >> (k * self.bits)) & ((1 << self.bits) - 1)) << self.low


class _SignedCodes(_Field):
    """int8 codes - 128."""

    def n_bytes(self, values: int) -> int:
        return values

    def put(self, codes_NK: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return codes_NK ^ 128

    def take(self, data_NB: Tensor, codes_NK: Tensor, parameters: list[Tensor | None]) -> None:
        codes_NK.copy_(data_NB ^ 128)


class _NibblePairs(_Field):
    """Q2_K: 4-bit scales, parameter 2, below 4-bit minima, parameter 3."""

    def n_bytes(self, values: int) -> int:
        return 16

    def put(self, codes_NK: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return parameters[2] | parameters[3] << 4

    def take(self, data_NB: Tensor, codes_NK: Tensor, parameters: list[Tensor | None]) -> None:
        parameters[2], parameters[3] = data_NB & 15, data_NB >> 4


class _SixBitPairs(_Field):
    """Q4_K, Q5_K: 6-bit scales, parameter 2, and minima, parameter 3, of eight sub-groups in 12 bytes.

    The first four of each lie whole in bytes 0 to 7; of the others, four bits are in bytes 8 to 11 and two above those.
    """

    def n_bytes(self, values: int) -> int:
        return 12

    def put(self, codes_NK: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        import torch

        (s_N4, t_N4), (m_N4, n_N4) = parameters[2].split(4, 1), parameters[3].split(4, 1)
        low = [s_N4 | (t_N4 >> 4) << 6, m_N4 | (n_N4 >> 4) << 6]
        return torch.cat([*low, (t_N4 & 15) | (n_N4 & 15) << 4], 1)

    def take(self, data_NB: Tensor, codes_NK: Tensor, parameters: list[Tensor | None]) -> None:
        import torch

        s_N4, m_N4, rest_N4 = data_NB.split(4, 1)
        parameters[2] = torch.cat([s_N4 & 63, rest_N4 & 15 | (s_N4 >> 6) << 4], 1)
        parameters[3] = torch.cat([m_N4 & 63, rest_N4 >> 4 | (m_N4 >> 6) << 4], 1)


@dataclass(frozen=True)
class _SplitScales(_Field):
    """`count` scales + 32, parameter 1: some bits of all of them, then the others.

    Q3_K has the lower four bits before the upper two, IQ4_XS the upper two before the lower four.
    """

    count: int
    parts: tuple[_Bits, _Bits]

    def n_bytes(self, values: int) -> int:
        return sum(part.n_bytes(self.count) for part in self.parts)

    def put(self, codes_NK: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        import torch

        s_NS = (parameters[1] + 32).to(torch.uint8)
        return torch.cat([part.put(s_NS, ()) for part in self.parts], 1)

    def take(self, data_NB: Tensor, codes_NK: Tensor, parameters: list[Tensor | None]) -> None:
        import torch

        s_NS, size = codes_NK.new_zeros(len(data_NB), self.count), self.parts[0].n_bytes(self.count)
        for part, part_NB in zip(self.parts, (data_NB[:, :size], data_NB[:, size:]), strict=True):
            part.take(part_NB, s_NS, [])
        parameters[1] = s_NS.to(torch.int8) - 32


_FIELDS: dict[str, tuple[_Field, ...]] = {
    "Q4_0": (_Plain(0), _Bits(4, 16)),
    "Q4_1": (_Plain(0), _Plain(1), _Bits(4, 16)),
    "Q5_0": (_Plain(0), _Bits(1, 1, 4), _Bits(4, 16)),
    "Q5_1": (_Plain(0), _Plain(1), _Bits(1, 1, 4), _Bits(4, 16)),
    "Q8_0": (_Plain(0), _SignedCodes()),
    "IQ4_NL": (_Plain(0), _Bits(4, 16)),
    "Q2_K": (_NibblePairs(), _Bits(2, 32), _Plain(0), _Plain(1)),
    "Q3_K": (_Bits(1, 32, 2), _Bits(2, 32), _SplitScales(16, (_Bits(4, 8), _Bits(2, 4, 4))), _Plain(0)),
    "Q4_K": (_Plain(0), _Plain(1), _SixBitPairs(), _Bits(4, 32)),
    "Q5_K": (_Plain(0), _Plain(1), _SixBitPairs(), _Bits(1, 32, 4), _Bits(4, 32)),
    "Q6_K": (_Bits(4, 64), _Bits(2, 32, 4), _Plain(1, "int8", 16), _Plain(0)),
    "IQ4_XS": (_Plain(0), _SplitScales(8, (_Bits(2, 1, 4), _Bits(4, 1))), _Bits(4, 16)),
}


def pack_blocks(kind: str, codes_OI: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Bytes of a weight, uint8 [out, bytes of a row], from codes and the parameters of the type's grid [out, n]."""
    import torch

    values, rows = TYPES[kind].values, len(codes_OI)
    blocks = codes_OI.shape[1] // values
    codes_NK = codes_OI.reshape(-1, values)
    own = [p_ON.reshape(rows * blocks, -1) for p_ON in parameters]
    return torch.cat([field.put(codes_NK, own) for field in _FIELDS[kind]], 1).view(rows, -1)


def unpack_blocks(kind: str, data_OB: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Codes uint8 [out, in] and parameters [out, n] from the bytes of a weight."""
    import torch

    found, rows = TYPES[kind], len(data_OB)
    data_NB = data_OB.reshape(-1, found.n_bytes)
    codes_NK = torch.zeros(len(data_NB), found.values, dtype=torch.uint8, device=data_OB.device)
    parameters: list[Tensor | None] = [None] * 4
    at = 0
    for field in _FIELDS[kind]:
        size = field.n_bytes(found.values)
        field.take(data_NB[:, at : at + size], codes_NK, parameters)
        at += size
    return codes_NK.view(rows, -1), [p_NN.reshape(rows, -1) for p_NN in parameters if p_NN is not None]


# ---------------------------------------------------------------------- types as schemes


class BlockCodes(Codes):
    """Codes of one GGML type, whose name is its label too."""

    def __init__(self, name: str, bits: int, *, sym: bool) -> None:
        self.name = name
        self.values = TYPES[name].values
        self.scheme_fields = bits, self.values, sym

    def check(self, scheme: Scheme) -> None:
        if (scheme.bits, scheme.group_size, scheme.sym) != self.scheme_fields:
            raise UsageError(f"GGUF's {self.name} has {self.scheme_fields[0]} bits in blocks of {self.values}")

    def check_linear(self, scheme: Scheme, lin: LinearSpec) -> None:
        if lin.in_features % self.values:
            raise PlanError(
                f"{lin.name}: blocks of {self.values} ({self.name}) do not divide its {lin.in_features} inputs",
                hint=f"llama.cpp falls back to {fallback(self.name, lin.in_features)} there",
            )

    def label(self, scheme: Scheme) -> str:
        return self.name

    def noise(self, scheme: Scheme) -> float | None:
        return _NOISE.get(self.name)

    def parse(self, label: str) -> Scheme | None:
        return type_scheme(self.name) if label.upper() == self.name else None

    def grid(self, scheme: Scheme) -> Grid:
        from qwenq.solver.grid import IntegerGrid
        from qwenq.solver.superblock import IQ4_LEVELS, AffineGrid, SuperAffineGrid, SuperGrid, TableGrid

        grids: dict[str, Grid] = {
            "Q4_0": IntegerGrid(4, 32), "Q5_0": IntegerGrid(5, 32), "Q8_0": IntegerGrid(8, 32),
            "Q4_1": AffineGrid(4), "Q5_1": AffineGrid(5), "IQ4_NL": TableGrid(),
            "Q2_K": SuperAffineGrid(2, 16, 15), "Q4_K": SuperAffineGrid(4, 32, 63),
            "Q5_K": SuperAffineGrid(5, 32, 63), "Q3_K": SuperGrid(3, 16, -32), "Q6_K": SuperGrid(6, 16, -128),
            "IQ4_XS": SuperGrid(4, 32, -32, IQ4_LEVELS),
        }  # fmt: skip
        return grids[self.name]


# Of errors of the solver on Gaussian weights with correlated inputs, two sweeps.
_NOISE = {
    "Q2_K": 8.5, "Q3_K": 2.2, "Q4_0": 0.70, "IQ4_NL": 0.57, "IQ4_XS": 0.60, "Q4_K": 0.60, "Q4_1": 0.56, "Q5_0": 0.18,
    "Q5_K": 0.15, "Q5_1": 0.13, "Q6_K": 0.032, "Q8_0": 0.0028,
}  # fmt: skip
_AFFINE = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
WRITTEN = ("Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1", "IQ4_NL", "Q4_0", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K")
for _name in WRITTEN:
    CODES[_name] = BlockCodes(_name, int(_name.lstrip("IQ")[0]), sym=_name not in _AFFINE)


class ReadOnlyCodes(BlockCodes):
    """Codes of a type that gguf-py dequantizes, and this project reads but does not make."""

    def parse(self, label: str) -> Scheme | None:
        return None

    def grid(self, scheme: Scheme) -> Grid:
        raise PlanError(f"{self.name} is read here, not written", hint=f"types that are: {', '.join(WRITTEN)}")


_READ_ONLY = {
    "IQ1_S": 1, "IQ1_M": 1, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 2, "IQ3_XXS": 3, "IQ3_S": 3, "TQ1_0": 1, "TQ2_0": 2,
    "MXFP4": 4, "NVFP4": 4,
}  # fmt: skip
for _name, _bits in _READ_ONLY.items():
    CODES[_name] = ReadOnlyCodes(_name, _bits, sym=True)


def type_scheme(kind: str) -> Scheme:
    """The scheme of a GGML type."""
    found = CODES[kind]
    assert isinstance(found, BlockCodes)
    bits, values, sym = found.scheme_fields
    return Scheme(bits, values, sym, codes=kind)


# ---------------------------------------------------------------------- values


def dequantize_blocks(kind: str, data_OB: Tensor) -> Tensor:
    """Values of whole rows, float32 [out, in], from their bytes, uint8; CheckpointError where gguf-py is needed and
    not installed.
    """
    if kind in WRITTEN:
        return _quantized(kind, data_OB).dequantize()
    import numpy as np
    import torch

    try:
        import gguf
    except ModuleNotFoundError:
        raise CheckpointError(
            f"GGUF's {kind} is read with the gguf package, which is not there", hint="pip install 'qwenq[gguf]'"
        ) from None
    with np.errstate(all="ignore"):  # what is no number is found where it is used
        values_OI = gguf.quants.dequantize(data_OB.cpu().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values_OI).to(data_OB.device)


def _quantized(kind: str, data_OB: Tensor) -> QTensor:
    """A weight's codes and parameters on the type's grid."""
    import torch

    from qwenq.solver.grid import IntegerGrid, QTensor

    grid = type_scheme(kind).grid()
    codes_OI, parameters = unpack_blocks(kind, data_OB)
    if isinstance(grid, IntegerGrid):
        zero = torch.full(parameters[0].shape, grid.zero, dtype=torch.uint8, device=codes_OI.device)
        parameters.append(zero)
    return QTensor(codes_OI, tuple(parameters), grid)


_INTEGERS = {"Q4_0": Scheme(4, 32), "Q8_0": Scheme(8, 32), "Q4_1": Scheme(4, 32, sym=False)}
_KERNEL_CODES = ("Q4_0", "Q8_0", "Q4_1", "Q4_K")  # in groups of 32 that have a scale, and a minimum or a zero point


@dataclass(frozen=True)
class Blocks:
    """A weight as a GGUF file has it, to run from: `data_OB` uint8 [out, bytes of a row]."""

    kind: str
    data_OB: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        found = TYPES[self.kind]
        return self.data_OB.shape[0], self.data_OB.shape[1] // found.n_bytes * found.values

    def to(self, device: torch.device) -> Blocks:
        return Blocks(self.kind, self.data_OB.to(device))

    def integers(self) -> QTensor:
        """Integer codes of one of the kernels' types; minima as zero points, which are float32 and no whole numbers."""
        import torch

        from qwenq.solver.grid import IntegerGrid, QTensor

        found = _quantized(self.kind, self.data_OB)
        if isinstance(found.grid, IntegerGrid):
            return found
        scale_OG, minimum_OG = scales_and_minima(found)
        constant_OG = scale_OG == 0  # then all weights are the minimum: code 0 under a zero point of -1
        codes_OI = found.codes_OI.masked_fill(constant_OG.repeat_interleave(32, 1), 0)
        zeros_OG = torch.where(constant_OG, -1.0, -minimum_OG / scale_OG)
        return QTensor(codes_OI, (torch.where(constant_OG, minimum_OG, scale_OG), zeros_OG), IntegerGrid(4, 32, False))

    def signed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes int8 [out, in], scales and minima [out, groups] (None: zeros), so that w = scale * code + minimum.

        Of the types that this project writes; exact, since scales are float32 where they are products.
        """
        import torch

        from qwenq.solver.grid import IntegerGrid
        from qwenq.solver.superblock import IQ4_LEVELS

        q = _quantized(self.kind, self.data_OB)
        if self.kind in _AFFINE:
            return q.codes_OI.view(torch.int8), *scales_and_minima(q)
        if isinstance(q.grid, IntegerGrid):
            return (q.codes_OI - q.grid.zero).view(torch.int8), q.scales_OG, None
        scale_OG = q.parameters[0]
        if len(q.parameters) > 1:
            sub_OS = q.parameters[1].float()
            scale_OG = scale_OG.float().repeat_interleave(sub_OS.shape[1] // scale_OG.shape[1], 1) * sub_OS
        if self.kind not in ("IQ4_NL", "IQ4_XS"):
            return (q.codes_OI - (1 << (type_scheme(self.kind).bits - 1))).view(torch.int8), scale_OG, None
        levels = torch.tensor(IQ4_LEVELS, dtype=torch.int8, device=q.codes_OI.device)
        return levels[q.codes_OI.int()], scale_OG, None


def scales_and_minima(q: QTensor) -> tuple[Tensor, Tensor]:
    """Float32 [out, groups] each, so that a weight is scale * code + minimum: of Q4_1, Q5_1, Q2_K, Q4_K and Q5_K."""
    if len(q.parameters) == 2:
        scale_OG, minimum_OG = (p_OG.float() for p_OG in q.parameters)
        return scale_OG, minimum_OG
    d_ON, dmin_ON, s_OS, m_OS = (p_ON.float() for p_ON in q.parameters)
    groups = s_OS.shape[1] // d_ON.shape[1]
    return d_ON.repeat_interleave(groups, 1) * s_OS, -dmin_ON.repeat_interleave(groups, 1) * m_OS


# ---------------------------------------------------------------------- llama.cpp's mixtures

_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def fallback(kind: str, columns: int) -> str:
    """The type that llama.cpp stores rows of `columns` values in when `kind` is asked for; F16 when none divides."""
    for choice in (kind, _FALLBACK.get(kind, kind)):
        if columns % TYPES[choice].values == 0:
            return choice
    return "F16"


class Mixture(NamedTuple):
    """One of llama.cpp's file types: its number in `general.file_type` and the type that tensors have at least."""

    number: int
    base: str


MIXTURES = {
    "F16": Mixture(1, "F16"), "BF16": Mixture(32, "BF16"), "Q8_0": Mixture(7, "Q8_0"), "Q6_K": Mixture(18, "Q6_K"),
    "Q5_K_M": Mixture(17, "Q5_K"), "Q5_K_S": Mixture(16, "Q5_K"), "Q5_1": Mixture(9, "Q5_1"),
    "Q5_0": Mixture(8, "Q5_0"), "Q4_K_M": Mixture(15, "Q4_K"), "Q4_K_S": Mixture(14, "Q4_K"),
    "Q4_1": Mixture(3, "Q4_1"), "Q4_0": Mixture(2, "Q4_0"), "IQ4_NL": Mixture(25, "IQ4_NL"),
    "IQ4_XS": Mixture(30, "IQ4_XS"), "Q3_K_L": Mixture(13, "Q3_K"), "Q3_K_M": Mixture(12, "Q3_K"),
    "Q3_K_S": Mixture(11, "Q3_K"), "Q2_K": Mixture(10, "Q2_K"),
}  # fmt: skip
DEFAULTS = {4: "Q4_K_M", 8: "Q8_0"}  # of --bits
SOURCES = ("F16", "BF16")  # not quantized


def wanted_types(spec: ModelSpec, name: str) -> dict[str, str]:
    """The type that llama.cpp's mixture means each linear, embedding and head to have, by module; before fallbacks."""
    found, tied = MIXTURES[name], spec.tie_word_embeddings
    if found.base in SOURCES:
        return {lin.name: found.base for lin in (*spec.outer_linears, *spec.linears)}
    head = "Q8_0" if found.base == "Q8_0" or spec.hidden_size % TYPES[found.base].values else "Q6_K"
    embedding, *own_head = (lin.name for lin in spec.outer_linears)
    types = {embedding: head if tied else found.base} | dict.fromkeys(own_head, head)
    family = names_in_gguf(spec.architecture).architecture
    for layer in range(spec.num_hidden_layers):
        prefix = spec.layer_prefix(layer)
        for linear in spec.architecture.linears:
            types[prefix + linear.path] = _linear_type(spec, name, family, layer, linear.kind) or found.base
    return types


def _linear_type(spec: ModelSpec, name: str, family: str, layer: int, linear: str) -> str:
    """The type of a layer's `v_proj`, say, where it is not the mixture's own; `family`: its name in GGUF."""
    if linear not in ("v_proj", "down_proj", "o_proj"):
        return ""
    layers = spec.num_hidden_layers
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    shared = spec.num_attention_heads // spec.num_key_value_heads >= 4
    if linear == "v_proj":
        kind = {
            "Q2_K": "Q4_K" if shared else "Q3_K",
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": "Q5_K" if shared else "",
            "IQ4_XS": "Q5_K" if shared else "",
            "Q4_K_M": "Q6_K" if more else "",
            "Q5_K_M": "Q6_K" if more else "",
            "Q4_K_S": "Q5_K" if layer < 4 else "",
        }.get(name, "")
        grouped = spec.num_key_value_heads < spec.num_attention_heads
        many = layers == 80 and (family == "qwen2" or (family == "llama" and grouped))  # its "70B"
        return "Q5_K" if many and (kind or MIXTURES[name].base) in ("Q3_K", "Q4_K") else kind
    if linear == "down_proj":
        return {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_M": "Q6_K" if more else "",
            "Q5_K_M": "Q6_K" if more else "",
            "Q4_K_S": "Q5_K" if layer < layers // 8 else "",
            "Q4_0": "Q4_1" if layer < layers // 8 else "",
            "Q5_0": "Q5_1" if layer < layers // 8 else "",
        }.get(name, "")
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name, "")


@cache
def scheme_for(kind: str, columns: int) -> Scheme | None:
    """The scheme of a type, or of what llama.cpp falls back to; None for 16 bit."""
    stored = fallback(kind, columns)
    return None if stored in SOURCES else type_scheme(stored)


# ---------------------------------------------------------------------- the format


class Gguf(Format):
    """Every linear, the embedding and the head in a GGML type of its own; norms and biases in float32."""

    name = method = "gguf"
    tags = ("gguf",)
    whole_file = True
    engine = "llama.cpp"
    widened_to = 256  # so that down's rows have the K types, whatever the ranks
    mixes = True
    options = tuple(type_scheme(kind) for kind in WRITTEN)
    outer = True
    mixes_zero_points = False  # minima are a matter of types
    mixtures = tuple(MIXTURES)
    mixture_of_bits = DEFAULTS
    unquantized = SOURCES

    def check_scheme(self, scheme: Scheme) -> None:
        if not isinstance(scheme.meaning, BlockCodes):
            raise PlanError(f"format gguf cannot hold {scheme.label}", hint=f"types: {', '.join(WRITTEN)}")

    def mixture(self, name: str, spec: ModelSpec) -> Recipe:
        """llama.cpp's mixture of that name, fallbacks included; the scheme of most weights is the default."""
        types, first = wanted_types(spec, name), spec.layer_linears(0)
        outer = tuple((lin.name, scheme_for(types[lin.name], lin.in_features)) for lin in spec.outer_linears)
        names = [(spec.layer_prefix(layer) + lin.path, lin) for layer in range(spec.num_hidden_layers) for lin in first]
        linears = [(name, lin, scheme_for(types[name], lin.in_features)) for name, lin in names]
        default = of_most_weights((lin, scheme) for _, lin, scheme in linears)
        rest = tuple((name, scheme) for name, _, scheme in linears if scheme != default)
        return Recipe(default, (*outer, *rest), self.name)

    def notes(self, name: str, spec: ModelSpec) -> list[str]:
        types, fallen = wanted_types(spec, name), dict[tuple[str, int, str], list[str]]()
        for lin in (*spec.outer_linears, *spec.linears):
            kind = types[lin.name]
            stored = fallback(kind, lin.in_features)
            if stored != kind and kind not in SOURCES:
                fallen.setdefault((kind, lin.in_features, stored), []).append(lin.kind)
        return [
            f"rows of {columns} are not whole blocks of {kind}: {', '.join(dict.fromkeys(kinds))} in {stored} "
            f"({len(kinds)} tensors), as in llama.cpp"
            for (kind, columns, stored), kinds in fallen.items()
        ]

    def offered(self, lin: LinearSpec, options: Sequence[Scheme] | None = None) -> tuple[Scheme, ...]:
        """Types that divide its rows, but older ones that lose hardly less than smaller ones: with K types there Q4_1
        and the types of 5 bits in blocks of 32, and Q4_0 beside IQ4_NL.
        """
        found = super().offered(lin, options)
        worse = {"Q4_0", "Q4_1", "Q5_0", "Q5_1"} if any(s.codes == "Q5_K" for s in found) else {"Q4_0"}
        return tuple(scheme for scheme in found if scheme.codes not in worse)

    def held_as(self, scheme: Scheme) -> Scheme:
        """Symmetric groups of whole blocks: their scale is repeated in each."""
        found = {(4, True): "Q4_0", (8, True): "Q8_0"}.get((scheme.bits, scheme.sym))
        if found is None or (scheme.group_size > 0 and scheme.group_size % TYPES[found].values):
            raise PlanError(
                f"{scheme.label} to gguf: no type of GGUF holds its codes as they are",
                hint="symmetric ones in groups of 32, 64 or 128 are Q4_0's and Q8_0's",
            )
        return type_scheme(found)

    def as_integers(self, scheme: Scheme) -> Scheme:
        found = _INTEGERS.get(scheme.codes)
        if found is None:
            raise PlanError(
                f"GGUF's {scheme.codes} stores other values than 4- or 8-bit codes on a grid of float16 scales",
                hint=f"convert goes from {', '.join(_INTEGERS)}; `qwenq quantize` makes it from the 16-bit checkpoint",
            )
        return found

    def integers(self, q: QTensor, lin: LinearSpec) -> QTensor:
        """Q4_1's minima as zero points, where they are whole multiples of their scales."""
        import torch

        from qwenq.solver.grid import IntegerGrid, QTensor

        if isinstance(q.grid, IntegerGrid):
            return q
        scale_OG, minimum_OG = scales_and_minima(q)
        zero_OG = torch.where(minimum_OG == 0, 0.0, -minimum_OG / scale_OG).nan_to_num(-1.0, -1.0, -1.0).round()
        if not bool(((zero_OG >= 0) & (zero_OG <= 15) & (-zero_OG * scale_OG == minimum_OG)).all()):
            raise CheckpointError(
                f"{lin.name}: minima of its Q4_1 groups are not whole multiples of their scales, so zero "
                "points cannot express them"
            )
        return QTensor(q.codes_OI, (q.parameters[0], zero_OG.to(torch.uint8)), IntegerGrid(4, 32, False))

    def file_metadata(self, recipe: Recipe, mixture: str) -> dict[str, Any]:
        """`general.file_type`: for types of one's own what llama.cpp guesses of a file that is mostly of that type, the
        middle one of several mixtures (llama-model-loader.cpp).
        """
        mostly = recipe.default.codes if recipe.default else "F16"
        like = mixture or (mostly if mostly in MIXTURES else f"{mostly}_M")
        return {"general.file_type": MIXTURES[like].number, "general.quantization_version": 2}

    def stored_dtype(self, name: str, dtype: str, mixture: str = "") -> str:
        """Norms and biases in float32; matrices that are not quantized in 16 bit, by a mixture as llama.cpp has it."""
        if name.endswith(".bias") or "norm" in name.removesuffix(".weight").rpartition(".")[2]:
            return "F32"
        wanted = mixture or dtype
        return wanted if wanted in SOURCES else "F16"

    def tensors(self, scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        yield BlockTensor(lin.name + ".weight", scheme.codes, (lin.out_features, lin.in_features))

    def outer_tensors(self, recipe: Recipe, spec: ModelSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        schemes = {lin.name + ".weight": recipe.outer_scheme(lin) for lin in spec.outer_linears}
        for tensor in spec.outer_tensors():
            scheme = schemes.get(tensor.name)
            dtype = dtype_of(tensor.name) if scheme is None else scheme.codes
            yield BlockTensor(tensor.name, dtype, tensor.shape)

    def config(self, recipe: Recipe, spec: ModelSpec, solved: Solved | None = None) -> dict[str, Any]:
        """Types by module, as the tensors of the file have them; a GGUF file has no config.json to hold it."""
        types = {lin.name: recipe.outer_scheme(lin) for lin in spec.outer_linears}
        types |= {lin.name: recipe.scheme_of(lin) for lin in spec.linears}
        return {"quant_method": self.method, "types": {name: s.codes for name, s in types.items() if s is not None}}

    def read_config(self, config: Mapping[str, Any], where: str) -> Quantization:
        types = config.get("types")
        if not isinstance(types, Mapping):
            raise CheckpointError(f"{where}: no types of a GGUF file")
        names: dict[str, set[str]] = {}
        for module, kind in types.items():
            names.setdefault(str(kind), set()).add(module)
        rules = tuple((ExactNames(frozenset(found)), _read_type(kind, where)) for kind, found in names.items())
        return Quantization(self.name, None, rules)

    def pack(self, q: QTensor, version: str = "") -> dict[str, Tensor]:
        return {"weight": pack_blocks(_type_of(q.grid), q.codes_OI, q.parameters)}

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = ""
    ) -> QTensor | Tensor:
        kind, data_OB = scheme.codes, tensors["weight"]
        return _quantized(kind, data_OB) if kind in WRITTEN else dequantize_blocks(kind, data_OB)

    def packed_shape(self, scheme: Scheme, lin: LinearSpec, *, sorted_columns: bool = False) -> PackedShape:
        kind, beside = scheme.codes, (2 * lin.out_features,) if lin.bias else ()
        plain, shape = kind in _KERNEL_CODES, (lin.out_features, lin.in_features)
        return PackedShape(scheme.bits, 32, *shape, scheme.sym, beside, table=not plain, blocks=kind)

    def unpack_to_run(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = ""
    ) -> Blocks:
        return Blocks(scheme.codes, tensors["weight"])

    def loaders(self, variant: Variant) -> list[Loader]:
        tried = Loader("llama.cpp", tried="CPU: KL as eval's")
        return [QWENQ, tried, Loader("Ollama"), *servers("", "GGUF is not its format")]

    def by_transformers(self, recipe: Recipe, schemes: set[Scheme]) -> ByTransformers:
        return ByTransformers(reason="transformers reads GGUF by dequantizing all of it.")


def _read_type(label: str, where: str) -> Scheme | None:
    if label in (*SOURCES, "F32"):
        return None
    read = (*WRITTEN, *_READ_ONLY)
    if label not in read:
        hint = f"read: {', '.join(read)}"
        raise CheckpointError(f"{where}: weights of type {shown(label, 40)} are not read", hint=hint)
    return type_scheme(label)


def _type_of(grid: Grid) -> str:
    return next(kind for kind in WRITTEN if type_scheme(kind).grid() == grid)


GGUF = register(Gguf())
