"""How weights are stored: bits, group size, symmetry. The one source of maths for sizes, headers and config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from qwenq.errors import PlanError, UsageError
from qwenq.layout import FORMATS, check_linear, check_together, is_description, linear_tensors
from qwenq.spec import LinearSpec, ModelSpec, TensorSpec

GROUP_SIZES = (128, 64, 32)
_LABEL = re.compile(r"(?P<bits>\d+)-bit(?: (?P<row>per channel)| g(?P<group>\d+))(?P<asym> asym)?")


@dataclass(frozen=True)
class Scheme:
    """Integer codes of `bits` bits along the input dimension; one float16 scale and one zero point per group and row.

    weight[o, i] = scale[i // group_size, o] * (code[o, i] - zero[i // group_size, o]); symmetric: zero = 2**(bits-1).
    `group_size` -1 means one group over the whole input dimension.
    `codes` says what a code means: `int` the above; `nf4` an entry of bitsandbytes' table of 16 values, times the
    largest absolute weight of a block of the flattened matrix; `nf4-nested` the same with these in 8 bits.
    """

    bits: int
    group_size: int = 128
    sym: bool = True
    codes: str = "int"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"bits is {self.bits}, wanted 4 or 8")
        if self.codes not in ("int", "nf4", "nf4-nested"):
            raise UsageError(f"codes is {self.codes!r}, wanted int, nf4 or nf4-nested")
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"group size is {self.group_size}, wanted {', '.join(map(str, GROUP_SIZES))} or -1")

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
        """`4-bit g128`, `8-bit per channel`, `4-bit g32 asym`, `NF4 g64`."""
        if self.codes != "int":
            return f"NF4 g{self.group_size}" + (" nested" if self.codes == "nf4-nested" else "")
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


NF4 = Scheme(4, 64, codes="nf4")
INT8_ROWS = Scheme(8, -1)  # LLM.int8: one scale a row


def parse_scheme(label: str) -> Scheme | None:
    """The scheme that a label means, None for `16-bit`; PlanError for anything else."""
    text = " ".join(label.split())
    if text == "16-bit":
        return None
    match = _LABEL.fullmatch(text)
    if not match or match["bits"] not in ("4", "8"):
        raise PlanError(
            f"{label[:40]!r} is no scheme", hint="for instance 4-bit g128, 8-bit g32, 4-bit per channel or 16-bit"
        )
    return Scheme(int(match["bits"]), -1 if match["row"] else int(match["group"]), sym=not match["asym"])


def label_of(scheme: Scheme | None) -> str:
    """`4-bit g128`; `16-bit` for what is not quantized."""
    return scheme.label if scheme else "16-bit"


@dataclass(frozen=True)
class Recipe:
    """Which scheme each linear gets: `default`, unless `overrides` names the linear (None keeps it in 16 bit).

    `format` is one of layout.FORMATS: how the checkpoint stores them.
    """

    default: Scheme | None
    overrides: tuple[tuple[str, Scheme | None], ...] = ()
    format: str = "gptq"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format is {self.format!r}, wanted one of {', '.join(FORMATS)}")

    @cached_property
    def _by_name(self) -> dict[str, Scheme | None]:
        return dict(self.overrides)

    def scheme_of(self, lin: LinearSpec) -> Scheme | None:
        return self._by_name.get(lin.name, self.default)

    @property
    def label(self) -> str:
        """`4-bit g128`, `16-bit`, or `mixed, mostly 4-bit g128`."""
        return ("mixed, mostly " if self.overrides else "") + label_of(self.default)

    def check(self, spec: ModelSpec) -> None:
        """Raise PlanError, naming the tensor, when some linear cannot be stored as asked."""
        schemes = {lin: scheme for lin in spec.linears if (scheme := self.scheme_of(lin)) is not None}
        for lin, scheme in schemes.items():
            check_linear(self.format, scheme, lin)
        check_together(self.format, schemes.values())

    def tensors(self, spec: ModelSpec, dtype: str | Callable[[str], str] = "BF16") -> Iterator[TensorSpec]:
        """Every tensor of the quantized checkpoint; what is not quantized is stored in `dtype`, one or one a name."""
        dtype_of = (lambda name: dtype) if isinstance(dtype, str) else dtype
        for tensor in spec.outer_tensors():
            yield TensorSpec(tensor.name, dtype_of(tensor.name), tensor.shape)
        for layer in range(spec.num_hidden_layers):
            yield from self.layer_tensors(spec, layer, dtype)

    def layer_tensors(
        self, spec: ModelSpec, layer: int, dtype: str | Callable[[str], str] = "BF16"
    ) -> Iterator[TensorSpec]:
        """Tensors of one decoder layer of the quantized checkpoint."""
        dtype_of = (lambda name: dtype) if isinstance(dtype, str) else dtype
        schemes = {lin.name: (lin, self.scheme_of(lin)) for lin in spec.layer_linears(layer)}
        for tensor in spec.layer_tensors(layer):
            module, _, part = tensor.name.rpartition(".")
            lin, scheme = schemes.get(module, (None, None))
            if lin is None or scheme is None:
                yield TensorSpec(tensor.name, dtype_of(tensor.name), tensor.shape)
            elif part == "weight":
                yield from linear_tensors(self.format, scheme, lin, dtype_of)

    def linear_tensors(self, lin: LinearSpec, dtype_of: Callable[[str], str] = lambda name: "BF16") -> list[TensorSpec]:
        """Tensors of one linear, quantized or not, bias last."""
        return list(linear_tensors(self.format, self.scheme_of(lin), lin, dtype_of))

    def tensor_bytes(self, spec: ModelSpec) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(t.nbytes for t in self.tensors(spec))

    def bits_per_linear_weight(self, spec: ModelSpec) -> float:
        """Stored bits per weight of the quantizable linears: codes, scales and zero points, nothing beside them."""
        stored = (t for lin in spec.linears for t in self.linear_tensors(lin) if not is_description(t.name))
        return 8 * sum(t.nbytes for t in stored) / spec.linear_parameters
