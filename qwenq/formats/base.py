"""How weights are stored: schemes, recipes, and the tensors each format keeps of a linear. The one source of sizes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwenq.errors import CheckpointError, PlanError, UnreadScheme, UsageError
from qwenq.io.safetensors import FLOATS, TensorSpec
from qwenq.model.spec import LinearSpec, ModelSpec

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
PACKED_BITS = range(2, 9)  # that one tool or another packs


@dataclass(frozen=True)
class Quantization:
    """How each linear is stored: `rules` in order, the first whose pattern matches the module's name decides."""

    format: str  # one of layout.FORMATS
    default: Scheme | None  # where no rule matches; None leaves the linear in 16 bit
    rules: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()
    version: str = ""  # gptq: "gptq" stores zero points minus one, "gptq_v2" as they are

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of linear `module`, None where it is left in 16 bit."""
        return next((scheme for pattern, scheme in self.rules if pattern.match(module)), self.default)

    def recipe(self, spec: ModelSpec) -> Recipe:
        """The same, as a recipe over the model's linears; the most frequent scheme stands for a missing default."""
        found = [(lin.name, self.scheme_of(lin.name)) for lin in spec.linears]
        default = self.default
        if default is None:
            default = next(iter(Counter(scheme for _, scheme in found if scheme).most_common(1)), (None, 0))[0]
        return Recipe(default, tuple((name, scheme) for name, scheme in found if scheme != default), self.format)


def read_scheme(bits: Any, group_size: Any, sym: Any, where: str) -> Scheme:
    """A grid's scheme from a config's own values; CheckpointError for what this project cannot read."""
    if type(bits) is not int or type(group_size) is not int:
        raise CheckpointError(f"{where}: bits is {bits!r} and group_size {group_size!r}, wanted whole numbers")
    try:
        return Scheme(bits, group_size, bool(sym))
    except PlanError as error:
        other = bits not in (4, 8) and bits in PACKED_BITS
        raise (UnreadScheme if other else CheckpointError)(f"{where}: {error.message}") from None


def read_names(value: Any, where: str) -> list[str]:
    """A list of texts from a config; None is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{where} is {str(value)[:80]!r}, wanted a list of names")
    return value
