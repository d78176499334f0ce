"""How weights are stored: bits, group size, symmetry. The one source of maths for sizes, headers and config.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwenq.errors import PlanError
from qwenq.spec import LinearSpec, ModelSpec, TensorSpec

GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Scheme:
    """Integer codes of `bits` bits along the input dimension; one float16 scale and one zero point per group and row.

    weight[o, i] = scale[i // group_size, o] * (code[o, i] - zero[i // group_size, o]); symmetric: zero = 2**(bits-1).
    `group_size` -1 means one group over the whole input dimension.
    """

    bits: int
    group_size: int = 128
    sym: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise PlanError(f"bits is {self.bits}, wanted 4 or 8")
        if self.group_size != -1 and self.group_size < 1:
            raise PlanError(f"group size is {self.group_size}, wanted {', '.join(map(str, GROUP_SIZES))} or -1")

    @property
    def levels(self) -> int:
        """Number of codes: 16 or 256."""
        return 1 << self.bits

    @property
    def zero(self) -> int:
        """The code that means 0 in a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def label(self) -> str:
        """`4-bit g128`, `8-bit per channel`, `4-bit g32 asym`."""
        group = "per channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}-bit {group}" + ("" if self.sym else " asym")

    def group_width(self, in_features: int) -> int:
        """Columns per group for a linear of `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        return -(-in_features // self.group_width(in_features))

    def check(self, lin: LinearSpec) -> None:
        """Raise PlanError unless groups divide the input and codes fill whole int32 words both ways."""
        per_word = 32 // self.bits
        if lin.in_features % self.group_width(lin.in_features):
            works = [g for g in GROUP_SIZES if lin.in_features % g == 0]
            raise PlanError(
                f"{lin.name}: group size {self.group_size} does not divide its {lin.in_features} input features",
                hint=f"sizes that divide it: {', '.join(map(str, [*works, -1]))} (-1: one group per row)",
            )
        if lin.in_features % per_word or lin.out_features % per_word:
            raise PlanError(
                f"{lin.name}: shape [{lin.out_features}, {lin.in_features}] does not pack into int32 words of "
                f"{per_word} codes"
            )

    def gptq_tensors(self, lin: LinearSpec, scale_dtype: str = "F16", bias_dtype: str = "BF16") -> Iterator[TensorSpec]:
        """Tensors of `lin` in the GPTQ v1 format (g_idx trivial), in the order they are written."""
        groups, per_word = self.groups(lin.in_features), 32 // self.bits
        yield TensorSpec(lin.name + ".qweight", "I32", (lin.in_features // per_word, lin.out_features))
        yield TensorSpec(lin.name + ".qzeros", "I32", (groups, lin.out_features // per_word))
        yield TensorSpec(lin.name + ".scales", scale_dtype, (groups, lin.out_features))
        yield TensorSpec(lin.name + ".g_idx", "I32", (lin.in_features,))
        if lin.bias:
            yield TensorSpec(lin.name + ".bias", bias_dtype, (lin.out_features,))


@dataclass(frozen=True)
class Recipe:
    """Which scheme each linear gets: `default`, unless `overrides` names the linear (None keeps it in 16 bit)."""

    default: Scheme | None
    overrides: tuple[tuple[str, Scheme | None], ...] = ()

    def scheme_of(self, lin: LinearSpec) -> Scheme | None:
        return dict(self.overrides).get(lin.name, self.default) if self.overrides else self.default

    def check(self, spec: ModelSpec) -> None:
        """Raise PlanError, naming the tensor, when some linear cannot be stored as asked."""
        for lin in spec.linears:
            scheme = self.scheme_of(lin)
            if scheme is not None:
                scheme.check(lin)

    def tensors(self, spec: ModelSpec, dtype: str = "BF16") -> Iterator[TensorSpec]:
        """Every tensor of the quantized checkpoint; what is not quantized stays in `dtype`."""
        yield from spec.outer_tensors(dtype)
        for layer in range(spec.num_hidden_layers):
            yield from self.layer_tensors(spec, layer, dtype)

    def layer_tensors(self, spec: ModelSpec, layer: int, dtype: str = "BF16") -> Iterator[TensorSpec]:
        """Tensors of one decoder layer of the quantized checkpoint."""
        schemes = {lin.name: (lin, self.scheme_of(lin)) for lin in spec.layer_linears(layer)}
        for tensor in spec.layer_tensors(layer, dtype):
            module, _, part = tensor.name.rpartition(".")
            lin, scheme = schemes.get(module, (None, None))
            if lin is None or scheme is None:
                yield tensor
            elif part == "weight":
                yield from scheme.gptq_tensors(lin, bias_dtype=dtype)

    def tensor_bytes(self, spec: ModelSpec) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(t.nbytes for t in self.tensors(spec))

    def bits_per_linear_weight(self, spec: ModelSpec) -> float:
        """Stored bits per weight of the quantizable linears: codes, scales and zero points, without g_idx and bias."""
        total = 0
        for lin in spec.linears:
            scheme = self.scheme_of(lin)
            if scheme is None:
                total += 16 * lin.parameters
            else:
                stored = [t for t in scheme.gptq_tensors(lin) if not t.name.endswith((".g_idx", ".bias"))]
                total += 8 * sum(t.nbytes for t in stored)
        return total / spec.linear_parameters
