"""Storage of weights: schemes, recipes and the Format class. The only source of sizes. No torch.

A format is one file of this folder with one object in it: which schemes it holds, its tensors byte for byte, what
config.json says of it, both ways, and how its tensors are packed and unpacked. Everything else asks the object.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenq.errors import CheckpointError, PlanError, UnreadScheme, UsageError
from qwenq.escaping import shown
from qwenq.io.safetensors import TensorSpec
from qwenq.model.spec import LinearSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from qwenq.solver.grid import Grid, QTensor

GROUP_SIZES = (128, 64, 32)


# ---------------------------------------------------------------------- schemes


@dataclass(frozen=True)
class Scheme:
    """Codes of `bits` bits along the input dimension, with parameters for each group of columns and row.

    `codes` names what a code means, one of CODES. Plain integers, `int`: one float16 scale and one zero point a group,
    weight[o, i] = scale[i // group_size, o] * (code[o, i] - zero[i // group_size, o]); symmetric: zero = 2**(bits-1).
    `group_size` -1 means one group over the whole input dimension.
    """

    bits: int
    group_size: int = 128
    sym: bool = True
    codes: str = "int"

    def __post_init__(self) -> None:
        if self.codes not in CODES:
            raise UsageError(f"codes is {self.codes!r}, wanted one of {', '.join(CODES)}")
        if (type(self.bits), type(self.group_size), type(self.sym)) != (int, int, bool):
            raise UsageError(
                f"bits is {self.bits!r}, group size {self.group_size!r} and sym {self.sym!r}, wanted whole numbers and "
                "a truth value"
            )
        self.meaning.check(self)
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"group size is {self.group_size}, wanted {', '.join(map(str, GROUP_SIZES))} or -1")

    @property
    def meaning(self) -> Codes:
        """The meaning of its codes."""
        return CODES[self.codes]

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def zero(self) -> int:
        """The code that means 0 in a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def label(self) -> str:
        """`4-bit g128`, `8-bit per channel`, `4-bit g32 asym`, `NF4 g64`."""
        return self.meaning.label(self)

    def group_width(self, in_features: int) -> int:
        """Columns per group for a linear of `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        return -(-in_features // self.group_width(in_features))

    def check(self, lin: LinearSpec) -> None:
        """Raise PlanError, naming the linear, unless its weights divide into what the codes are packed in."""
        self.meaning.check_linear(self, lin)

    def grid(self) -> Grid:
        """Its grid, which the solver rounds to; PlanError for codes that a library's own functions make."""
        return self.meaning.grid(self)


class Codes:
    """The meaning of a scheme's codes. A format that brings codes of its own makes an object of a subclass."""

    name: str  # as `Scheme.codes` says it

    def check(self, scheme: Scheme) -> None:
        """Raise UsageError for bits, groups or symmetry that these codes do not come in."""

    def check_linear(self, scheme: Scheme, lin: LinearSpec) -> None:
        """Raise PlanError, naming the linear, unless its weights divide into groups and whole packed codes."""

    def label(self, scheme: Scheme) -> str:
        """The scheme's name: `4-bit g128`."""
        raise NotImplementedError

    def parse(self, label: str) -> Scheme | None:
        """The scheme with that label; None for what is no label of these codes, or is not chosen by its label."""
        return None

    def noise(self, scheme: Scheme) -> float | None:
        """Energy of the rounding error relative to 4-bit integers in groups of 128, a rule of thumb; None: unknown."""
        return None

    def grid(self, scheme: Scheme) -> Grid:
        """The grid of the scheme."""
        raise PlanError(f"{scheme.label} is rounded by a library's own functions, not solved")


class IntegerCodes(Codes):
    """4- or 8-bit integers packed into int32, with a scale and a zero point for each group."""

    name = "int"
    _LABEL = re.compile(r"(?P<bits>[48])-bit(?: (?P<row>per channel)| g(?P<group>[0-9]{1,6}))(?P<asym> asym)?")

    def check(self, scheme: Scheme) -> None:
        if scheme.bits not in (4, 8):
            raise UsageError(f"bits is {scheme.bits}, wanted 4 or 8")

    def check_linear(self, scheme: Scheme, lin: LinearSpec) -> None:
        if lin.in_features % scheme.group_width(lin.in_features):
            works = [g for g in GROUP_SIZES if lin.in_features % g == 0]
            raise PlanError(
                f"{lin.name}: group size {scheme.group_size} does not divide its {lin.in_features} input features",
                hint=f"sizes that divide it: {', '.join(map(str, [*works, -1]))} (-1: one group per row)",
            )
        per_word = 32 // scheme.bits
        if lin.in_features % per_word or lin.out_features % per_word:
            raise PlanError(
                f"{lin.name}: shape [{lin.out_features}, {lin.in_features}] does not pack into int32 words of "
                f"{per_word} codes"
            )

    def label(self, scheme: Scheme) -> str:
        group = "per channel" if scheme.group_size == -1 else f"g{scheme.group_size}"
        return f"{scheme.bits}-bit {group}" + ("" if scheme.sym else " asym")

    def parse(self, label: str) -> Scheme | None:
        match = self._LABEL.fullmatch(label)
        if not match:
            return None
        return Scheme(int(match["bits"]), -1 if match["row"] else int(match["group"]), sym=not match["asym"])

    def grid(self, scheme: Scheme) -> Grid:
        from qwenq.solver.grid import IntegerGrid

        return IntegerGrid(scheme.bits, scheme.group_size, scheme.sym)


CODES: dict[str, Codes] = {IntegerCodes.name: IntegerCodes()}  # a format adds its own


SYMMETRIC = tuple(Scheme(bits, group) for bits in (4, 8) for group in GROUP_SIZES)  # what vLLM's fused linears accept
ASYMMETRIC = tuple(Scheme(4, group, sym=False) for group in GROUP_SIZES)


def parse_scheme(label: str) -> Scheme | None:
    """The scheme that a label means, None for `16-bit`; PlanError for anything else."""
    text = " ".join(label.split())
    if text == "16-bit":
        return None
    found = next((scheme for codes in CODES.values() if (scheme := codes.parse(text)) is not None), None)
    if found is None:
        raise PlanError(
            f"{shown(label, 40)!r} is not a scheme",
            hint="for instance 4-bit g128, 8-bit g32, 4-bit per channel or 16-bit",
        )
    return found


def of_most_weights(schemes: Iterable[tuple[LinearSpec, Scheme | None]]) -> Scheme | None:
    """The scheme that most weights of these linears have; None where none is quantized."""
    weights = Counter[Scheme]()
    for lin, scheme in schemes:
        if scheme is not None:
            weights[scheme] += lin.parameters
    return max(weights, key=weights.__getitem__, default=None)


def label_of(scheme: Scheme | None) -> str:
    """`4-bit g128`; `16-bit` for what is not quantized."""
    return scheme.label if scheme else "16-bit"


# ---------------------------------------------------------------------- recipes

StoredDtype = Callable[[str], str]  # name of an unquantized tensor -> safetensors dtype it is stored in


@dataclass(frozen=True)
class Recipe:
    """Which scheme each linear gets: `default`, unless `overrides` names the linear (None keeps it in 16 bit).

    `format`: the name of the format that the checkpoint is stored in, one of FORMATS.
    """

    default: Scheme | None
    overrides: tuple[tuple[str, Scheme | None], ...] = ()
    format: str = "gptq"

    def __post_init__(self) -> None:
        get_format(self.format)

    @cached_property
    def _by_name(self) -> dict[str, Scheme | None]:
        return dict(self.overrides)

    def scheme_of(self, lin: LinearSpec) -> Scheme | None:
        return self._by_name.get(lin.name, self.default)

    def layer_kinds(self, spec: ModelSpec, dtype: StoredDtype | str = "BF16") -> list[int]:
        """For each decoder layer, the first layer stored the same way, apart from tensor names."""
        if not self.overrides and isinstance(dtype, str):
            return [0] * spec.num_hidden_layers
        paths = [linear.path for linear in spec.architecture.linears]
        tensors = [] if isinstance(dtype, str) else [t.name for t in spec.layer_tensors(0)]
        endings = [name.removeprefix(spec.layer_prefix(0)) for name in tensors]
        schemes, default, dtype_of = self._by_name, self.default, _by_name(dtype)
        first: dict[tuple[Scheme | str | None, ...], int] = {}
        found = []
        for layer in range(spec.num_hidden_layers):
            prefix = spec.layer_prefix(layer)
            kind = [schemes.get(prefix + path, default) for path in paths]
            found.append(first.setdefault((*kind, *(dtype_of(prefix + ending) for ending in endings)), layer))
        return found

    def left_out(self, spec: ModelSpec) -> list[str]:
        """Modules that stay in 16 bit, as configs with one scheme list them: the head, and linears named for that."""
        return [spec.architecture.head, *(name for name, scheme in self.overrides if scheme is None)]

    def outer_scheme(self, lin: LinearSpec) -> Scheme | None:
        """The scheme of embedding or head, which stay in 16 bit unless they are named."""
        return self._by_name.get(lin.name)

    def schemes(self, spec: ModelSpec) -> set[Scheme]:
        """Those met in the model's linears."""
        layers = set(self.layer_kinds(spec))
        linears = (lin for layer in layers for lin in spec.layer_linears(layer))
        return {scheme for lin in linears if (scheme := self.scheme_of(lin)) is not None}

    def uniform_bits(self, spec: ModelSpec) -> float:
        """Stored bits per weight, scales included, where all linears have one scheme; infinite elsewhere."""
        layers = set(self.layer_kinds(spec))
        found = {self.scheme_of(lin) for layer in layers for lin in spec.layer_linears(layer)}
        return self.bits_per_linear_weight(spec) if len(found) == 1 else math.inf

    @property
    def mixed(self) -> bool:
        """Whether anything it names is stored otherwise than most linears are."""
        return any(scheme != self.default for _, scheme in self.overrides)

    @property
    def label(self) -> str:
        """`4-bit g128`, `16-bit`, or `mixed, mostly 4-bit g128`."""
        return ("mixed, mostly " if self.mixed else "") + label_of(self.default)

    def check(self, spec: ModelSpec) -> None:
        """Raise PlanError, naming the tensor, when some linear cannot be stored as asked."""
        form = get_format(self.format)
        for layer in sorted(set(self.layer_kinds(spec))):
            for lin in spec.layer_linears(layer):
                if (scheme := self.scheme_of(lin)) is not None:
                    form.check(scheme, lin)
        for lin in spec.outer_linears:
            if (scheme := self.outer_scheme(lin)) is not None:
                form.check(scheme, lin)
        form.check_together(self.schemes(spec))

    def tensors(self, spec: ModelSpec, dtype: StoredDtype | str = "BF16") -> Iterator[TensorSpec]:
        """Every tensor of the quantized checkpoint; what is not quantized is stored in `dtype`, one or one a name."""
        yield from self.outer_tensors(spec, dtype)
        for layer in range(spec.num_hidden_layers):
            yield from self.layer_tensors(spec, layer, dtype)

    def outer_tensors(self, spec: ModelSpec, dtype: StoredDtype | str = "BF16") -> Iterator[TensorSpec]:
        """Those outside the decoder layers."""
        return get_format(self.format).outer_tensors(self, spec, _by_name(dtype))

    def layer_tensors(self, spec: ModelSpec, layer: int, dtype: StoredDtype | str = "BF16") -> Iterator[TensorSpec]:
        """Those of one decoder layer."""
        return get_format(self.format).layer_tensors(self, spec, layer, _by_name(dtype))

    def linear_tensors(self, lin: LinearSpec, dtype_of: StoredDtype = lambda name: "BF16") -> list[TensorSpec]:
        """Tensors of one linear, quantized or not, bias last."""
        return get_format(self.format).linear_tensors(self.scheme_of(lin), lin, dtype_of)

    def bits_per_linear_weight(self, spec: ModelSpec) -> float:
        """Stored bits per weight of the quantizable linears: codes, scales and zero points, nothing beside them."""
        return self._linear_bits(spec) / spec.linear_parameters

    def bits_per_weight(self, spec: ModelSpec) -> float:
        """The same with embedding and head, as budgets of formats count that quantize them too."""
        form, outer = get_format(self.format), spec.outer_linears
        bits = self._linear_bits(spec) + sum(form.stored_bits(self.outer_scheme(lin), lin) for lin in outer)
        return bits / (spec.linear_parameters + sum(lin.parameters for lin in outer))

    def _linear_bits(self, spec: ModelSpec) -> int:
        form = get_format(self.format)
        return sum(form.stored_bits(self.scheme_of(lin), lin) for lin in spec.linears)


def _by_name(dtype: StoredDtype | str) -> StoredDtype:
    return (lambda name: dtype) if isinstance(dtype, str) else dtype


MAX_STEPS = 300_000_000  # of matching, patterns times names: about three seconds


@dataclass(frozen=True)
class NamePattern:
    """A regular expression for modules' names, matched from the beginning; `steps`: the most that one name may take."""

    expression: re.Pattern[str]
    steps: int

    def match(self, module: str) -> bool:
        return self.expression.match(module) is not None


@dataclass(frozen=True)
class ExactNames:
    """Modules by their own names, however many."""

    names: frozenset[str]
    steps: int = 1

    def match(self, module: str) -> bool:
        return module in self.names


Matcher = NamePattern | ExactNames
Rule = tuple[Matcher, Scheme | None]


@dataclass(frozen=True)
class Quantization:
    """Storage of each linear according to a config: the first of `rules` that matches a module's name."""

    format: str  # one of FORMATS
    default: Scheme | None  # where no rule matches; None leaves the linear in 16 bit
    rules: tuple[Rule, ...] = ()
    version: str = ""  # of the format, where there are several
    sorted_columns: bool = False  # columns may be stored out of the order of their groups

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of linear `module`, None where it is left in 16 bit."""
        return next((scheme for pattern, scheme in self.rules if pattern.match(module)), self.default)

    def recipe(self, spec: ModelSpec) -> Recipe:
        """The same, as a recipe over the model's linears; the scheme of most weights stands for a missing default.

        CheckpointError for rules that would take long over so many names.
        """
        steps, names = sum(rule.steps for rule, _ in self.rules), len(spec.linears)
        if steps * names > MAX_STEPS:
            raise CheckpointError(
                f"quantization_config: {len(self.rules)} patterns for the names of {names} linears could take long: "
                "refused",
                hint="write patterns without `.*`, or several names in one",
            )
        found = [(lin, self.scheme_of(lin.name)) for lin in spec.linears]
        default = of_most_weights(found) if self.default is None else self.default
        outer = spec.outer_linears if get_format(self.format).outer else ()
        others = [(lin.name, self.scheme_of(lin.name)) for lin in outer]
        others += [(lin.name, scheme) for lin, scheme in found if scheme != default]
        return Recipe(default, tuple(others), self.format)


# ---------------------------------------------------------------------- what a format says of itself


@dataclass(frozen=True)
class PackedShape:
    """A packed linear as its kernel is chosen by, and so the memory it takes while it runs.

    `table`: codes are entries of a table of values, in blocks of `group`; otherwise integers in groups of `group`
    columns. `beside`: bytes of bias and column order. `blocks`: GGML type of a GGUF file's weight, whose bytes are kept
    as they are where no kernel takes its codes.
    """

    bits: int
    group: int
    out_features: int
    in_features: int
    sym: bool
    beside: tuple[int, ...] = ()
    table: bool = False
    blocks: str = ""


UNTRIED = "untried"
CPU_LOGITS = "CPU: logits equal"
PLAIN_8_BIT = "CPU: logits equal, 8-bit products by plain torch"  # vLLM's CPU build has kernels for 4 bits only


class Loader(NamedTuple):
    """One engine and one checkpoint; `reason` says why it does not read it, empty when it does."""

    name: str
    tensor_parallel: bool = False
    tried: str = UNTRIED  # here, on small models
    reason: str = ""


class Variant(NamedTuple):
    """Traits of a checkpoint by which engines read it or do not."""

    bits: int  # of most linears
    group_size: int  # the largest
    mixed: bool  # several schemes in it
    version: str = ""  # as `Quantization.version`


class ByTransformers(NamedTuple):
    """Loading a checkpoint with transformers: packages to install, a config object, or the reason it cannot."""

    install: str = ""
    config: str = ""  # `CompressedTensorsConfig(dequantize=True)`, of transformers
    reason: str = ""


class Solved(NamedTuple):
    """How the codes were solved, for configs that record it."""

    method: str
    damp_percent: float | None


class Format(ABC):
    """Everything there is to know of one way to store a quantized checkpoint. Torch is imported inside methods only."""

    name: str  # as --format calls it: gptq, bnb-nf4
    method: str  # `quant_method` of config.json, by which other tools call it
    tags: tuple[str, ...]  # of a model card
    whole_file: bool = False  # tensors, configuration and tokenizer are one file; else safetensors and files beside
    engine: str = "qwenq"  # that --fit plans for where none is named
    widened_to: int | None = None  # columns of a block that --pad-for-tp fills up; None: what ranks ask for
    mixes: bool = False  # several schemes in one checkpoint
    options: tuple[Scheme, ...] = ()  # schemes that a mixture may be chosen from
    outer: bool = False  # embedding and head are quantized too
    mixtures: tuple[str, ...] = ()  # fixed ones, that have names: Q4_K_M
    mixture_of_bits: Mapping[int, str] = {}  # those that --bits means
    unquantized: tuple[str, ...] = ()  # those that leave every tensor in 16 bit
    asymmetric: bool = False  # by default
    fixed: Scheme | None = None  # the only scheme that may be asked for
    solved: bool = True  # by this project's solver; else rounded by functions of the library that defines the format
    integer_codes: bool = True  # codes, scales and zero points, which another such format may hold as well
    published: tuple[tuple[str, Scheme], ...] = ()  # names of the publisher's own files, in capitals, and their scheme
    descriptions: tuple[str, ...] = ()  # endings of tensors that hold neither codes nor scales nor zero points
    optional: tuple[str, ...] = ()  # endings of tensors that other tools may leave out, for they say the usual

    # ------------------------------------------------------------------ what it holds

    @abstractmethod
    def check_scheme(self, scheme: Scheme) -> None:
        """Raise PlanError unless linears of `scheme` can be held."""

    def check(self, scheme: Scheme, lin: LinearSpec) -> None:
        """Raise PlanError, naming the linear, unless it can be held by `scheme`."""
        self.check_scheme(scheme)
        scheme.check(lin)

    def check_together(self, schemes: Iterable[Scheme]) -> None:
        """Raise PlanError unless one checkpoint can hold linears of all these schemes."""
        labels = sorted({scheme.label for scheme in schemes})
        if not self.mixes and len(labels) > 1:
            raise PlanError(
                f"format {self.name} holds one scheme per checkpoint, got {', '.join(labels)}",
                hint=f"mixed bits go into --format {names_of(sorted(mixing(), key=lambda form: form.name))}",
            )

    def mixture(self, name: str, spec: ModelSpec) -> Recipe:
        """The recipe that one of `mixtures` means for a model."""
        raise NotImplementedError(f"{self.name} has no named mixtures")

    def notes(self, name: str, spec: ModelSpec) -> list[str]:
        """One line for each place where a mixture cannot be what its name says."""
        return []

    def file_metadata(self, recipe: Recipe, mixture: str) -> dict[str, Any]:
        """A container's metadata about the recipe; mixture: its name, or empty."""
        return {}

    @property
    def mixes_zero_points(self) -> bool:
        """Whether a mixture may have zero points of each group's own."""
        return any(not scheme.sym for scheme in self.options)

    def offered(self, lin: LinearSpec, options: Sequence[Scheme] | None = None) -> tuple[Scheme, ...]:
        """Schemes that mixtures are chosen from for a linear: those of `options` that it divides into."""

        def held(scheme: Scheme) -> bool:
            try:
                scheme.check(lin)
            except PlanError:
                return False
            return True

        return tuple(filter(held, self.options if options is None else options))

    def mixes_in(self, scheme: Scheme) -> bool:
        """Whether a recipe file may ask for `scheme` in a mixture: an option, or one group a row where groups are."""
        bits, sym, codes = scheme.bits, scheme.sym, scheme.codes
        per_row = scheme.group_size == -1 and any((o.bits, o.sym, o.codes) == (bits, sym, codes) for o in self.options)
        return per_row or scheme in self.options

    def held_as(self, scheme: Scheme) -> Scheme:
        """The scheme that holds integer codes of `scheme` from another format; `check` says whether it can."""
        return scheme

    def as_integers(self, scheme: Scheme) -> Scheme:
        """The scheme of integer codes that says the same, for another format to hold; PlanError where there is none."""
        return scheme

    def centred(self, read: Callable[[str], Tensor], lin: LinearSpec) -> bool:
        """Whether a linear's zero points are all the middle code, though the format has no symmetric scheme to say so.

        read: gives a tensor by its name.
        """
        return False

    def integers(self, q: QTensor, lin: LinearSpec) -> QTensor:
        """A linear of `as_integers`, from one as `unpack` gives it; CheckpointError, naming it, unless it is exact."""
        return q

    # ------------------------------------------------------------------ tensors and sizes

    def stored_dtype(self, name: str, dtype: str, mixture: str = "") -> str:
        """safetensors dtype in which unquantized tensor `name` is stored where the source or --dtype has `dtype`.

        mixture: the name of the recipe, if it is one of the format's own.
        """
        return dtype

    @abstractmethod
    def tensors(self, scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        """Tensors that hold a quantized linear's weight: names, dtypes and shapes as stored."""

    def linear_tensors(
        self, scheme: Scheme | None, lin: LinearSpec, dtype_of: StoredDtype = lambda name: "BF16"
    ) -> list[TensorSpec]:
        """Tensors of a linear, in 16 bit where `scheme` is None; its bias last."""
        weight, bias = lin.name + ".weight", lin.name + ".bias"
        if scheme is not None:
            found = list(self.tensors(scheme, lin, dtype_of))
        else:
            found = [TensorSpec(weight, dtype_of(weight), (lin.out_features, lin.in_features))]
        return [*found, TensorSpec(bias, dtype_of(bias), (lin.out_features,))] if lin.bias else found

    def outer_tensors(self, recipe: Recipe, spec: ModelSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        """Tensors outside the decoder layers: embedding, last norm and, when untied, head, as stored in 16 bit."""
        for tensor in spec.outer_tensors():
            yield TensorSpec(tensor.name, dtype_of(tensor.name), tensor.shape)

    def layer_tensors(self, recipe: Recipe, spec: ModelSpec, layer: int, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        """Tensors of one decoder layer, as stored by `recipe`."""
        linears = {lin.name: lin for lin in spec.layer_linears(layer)}
        for tensor in spec.layer_tensors(layer):
            module, _, part = tensor.name.rpartition(".")
            if module not in linears:
                yield TensorSpec(tensor.name, dtype_of(tensor.name), tensor.shape)
            elif part == "weight":
                yield from self.linear_tensors(recipe.scheme_of(linears[module]), linears[module], dtype_of)

    def packed_names(self, scheme: Scheme, lin: LinearSpec) -> list[str]:
        """Names of the tensors that hold a quantized linear's weight."""
        return [t.name for t in self.tensors(scheme, lin, lambda name: "BF16")]

    def lacks(self, stored: Collection[str], name: str) -> bool:
        """Whether a checkpoint lacks a tensor that it has to have."""
        return name not in stored and not name.endswith(self.optional)

    def stored_bits(self, scheme: Scheme | None, lin: LinearSpec) -> int:
        """Bits of a linear's codes, scales and zero points, or of its weight in 16 bit."""
        endings = (".bias", *self.descriptions)
        return 8 * sum(t.nbytes for t in self.linear_tensors(scheme, lin) if not t.name.endswith(endings))

    def same_shape(self, stored: TensorSpec, wanted: TensorSpec) -> bool:
        """Whether a stored tensor has the shape that `tensors` says."""
        return stored.shape == wanted.shape

    def packed_shape(self, scheme: Scheme, lin: LinearSpec, *, sorted_columns: bool = False) -> PackedShape | None:
        """A linear's shape for choosing a kernel of qwenq's own engine. None if no kernel runs it."""
        if not isinstance(scheme.meaning, IntegerCodes):
            return None
        beside = (2 * lin.out_features,) if lin.bias else ()
        order = (8 * lin.in_features,) if sorted_columns else ()
        width = scheme.group_width(lin.in_features)
        return PackedShape(scheme.bits, width, lin.out_features, lin.in_features, scheme.sym, beside + order)

    # ------------------------------------------------------------------ config.json

    @abstractmethod
    def config(self, recipe: Recipe, spec: ModelSpec, solved: Solved | None = None) -> dict[str, Any]:
        """`quantization_config` of a checkpoint by `recipe`, which has a default scheme.

        solved: None when the codes were converted, so that how they were made is not known here.
        """

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether `read_config` is what reads a `quantization_config`."""
        return config.get("quant_method") == self.method

    @abstractmethod
    def read_config(self, config: Mapping[str, Any], where: str) -> Quantization:
        """A `quantization_config` read and checked; CheckpointError for what contradicts itself, UnreadScheme for what
        another tool may have written as it should be but this version does not read.
        """

    def stated(self, config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Bits and group sizes that a `quantization_config` states, of a scheme that this version does not read."""
        return stated_numbers(config)

    def small_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """JSON files that loaders look for beside config.json, given its `quantization_config`."""
        return {}

    # ------------------------------------------------------------------ tensors, both ways

    def round(self, weight_OI: Tensor, lin: LinearSpec) -> dict[str, Tensor]:
        """A weight rounded and packed by the library's own functions, where codes are not solved for."""
        raise NotImplementedError(f"{self.name} is solved")

    def version(self, recipe: Recipe) -> str:
        """The version of the format that a whole checkpoint by `recipe` is stored in, where there are several."""
        return ""

    @abstractmethod
    def pack(self, q: QTensor, version: str = "") -> dict[str, Tensor]:
        """Tensors of one linear by their names after the linear's, contiguous, on the codes' device."""

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = ""
    ) -> QTensor | Tensor:
        """One stored linear, from its tensors by their names after the linear's.

        Still quantized where its codes lie on a grid; else the weight [out, in], in float32 or the dtype it was
        quantized from. CheckpointError, naming the linear, when the tensors contradict each other. `version`: as
        `Quantization.version`.
        """

    def unpack_to_run(self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = "") -> Any:
        """A stored linear for the kernel of `packed_shape`: a QTensor of integer codes, or what it takes instead.

        CheckpointError for what no kernel runs.
        """
        if self.packed_shape(scheme, lin) is None:
            raise CheckpointError(
                f"{lin.name}: no kernel of qwenq supports {scheme.label} of {self.name}",
                hint="`qwenq eval` reads it, and the engines it was made for can run it",
            )
        return self.unpack(tensors, scheme, lin, version)

    # ------------------------------------------------------------------ who reads it

    def loaders(self, variant: Variant) -> list[Loader]:
        """Engines for such a checkpoint, what was tried, and why they do not read it."""
        return [QWENQ]

    def by_transformers(self, recipe: Recipe, schemes: set[Scheme]) -> ByTransformers:
        """Loading a checkpoint of `recipe` with transformers; `schemes`: those in it."""
        return ByTransformers(reason="transformers does not read this format.")


class SizedOnly(ABC):
    """A way to store weights that other tools write and read; this project only says how large it is."""

    method: str  # `quant_method` of config.json
    bits: int
    group_size: int
    published: tuple[str, ...]  # names of the publisher's own files, in capitals

    @abstractmethod
    def linear_bytes(self, lin: LinearSpec) -> Iterator[int]:
        """Sizes of the tensors that hold a linear's weight."""

    @abstractmethod
    def stated(self, config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Bits and group sizes that a `quantization_config` states."""


def integer_engines(variant: Variant, readers: Sequence[Loader], *, tried: str, reason: str = "") -> list[Loader]:
    """Engines for integer codes: this project's, `readers` that know the format by name, servers, and llama.cpp.

    `tried` and `reason` are the servers'.
    """
    vllm = variant.group_size in (-1, 32, 64, 128)
    reason = reason or ("" if vllm else f"groups of {variant.group_size}")
    return [QWENQ, *readers, *servers(tried, reason), LLAMA_CPP]


def servers(tried: str, reason: str = "") -> list[Loader]:
    """vLLM and SGLang, which cut layers over GPUs."""
    return [
        Loader("vLLM", True, UNTRIED if reason else tried, reason),
        Loader("SGLang", True, reason=reason),
    ]


QWENQ = Loader("qwenq", tried="CPU: in the tests")
LLAMA_CPP = Loader("llama.cpp", reason="GGUF only")


def plain_loaders() -> list[Loader]:
    """Engines for a checkpoint in 16 bit."""
    return [QWENQ, Loader("transformers", tried=CPU_LOGITS), *servers(CPU_LOGITS)]


# ---------------------------------------------------------------------- registry


FORMATS: dict[str, Format] = {}  # by name, in the order of help texts; filled by `formats/__init__.py`


SIZED: dict[str, SizedOnly] = {}  # by `quant_method`; filled likewise


def register(form: Format) -> Format:
    """Make a format known; it then has its place in help texts, dry runs, reports and readers."""
    FORMATS[form.name] = form
    return form


def get_format(name: str) -> Format:
    """The format of that name; UsageError for one that there is not."""
    if name not in FORMATS:
        raise UsageError(f"format is {name!r}, wanted one of {', '.join(FORMATS)}")
    return FORMATS[name]


def mixing() -> list[Format]:
    """Formats that hold several schemes in one checkpoint."""
    return [form for form in FORMATS.values() if form.mixes]


def names_of(forms: Iterable[Format], last: str = "or") -> str:
    """`gptq, awq or compressed-tensors`, for help texts and messages."""
    names = [form.name for form in forms]
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def quantization_config(
    recipe: Recipe, spec: ModelSpec, *, damp_percent: float | None = None, method: str | None = None
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint by `recipe`; how it was solved, if known, goes where there is a place."""
    return get_format(recipe.format).config(recipe, spec, None if method is None else Solved(method, damp_percent))


def read_quantization_config(config: Any, where: str) -> Quantization:
    """Parse a `quantization_config` of any known format; CheckpointError, with what is known, for another.

    UnreadScheme, which is one, for what another tool may have written as it should be but this version does not read.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: quantization_config is {type(config).__name__}, wanted an object")
    form = recognized(config)
    if form is None:
        method = config.get("quant_method")
        known = dict.fromkeys(form.method for form in FORMATS.values())
        raise (UnreadScheme if isinstance(method, str) else CheckpointError)(
            f"{where}: quant_method is {shown(str(method), 40)!r}, wanted one of {', '.join(known)}",
            hint="this version reads 16-bit checkpoints and these",
        )
    return form.read_config(config, where)


def recognized(config: Any) -> Format | None:
    """The format, or the first of a family, that reads a `quantization_config`; None when no format here does."""
    if not isinstance(config, Mapping):
        return None
    return next((form for form in FORMATS.values() if form.recognizes(config)), None)


def stated(config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Bits and group sizes that a `quantization_config` of any method states, believed as far as they are numbers."""
    form = recognized(config)
    if form is not None:
        return form.stated(config)
    sized = SIZED.get(str(config.get("quant_method")))
    return sized.stated(config) if sized is not None else stated_numbers(config)


def stated_numbers(config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Bits and group size under the keys that most methods use."""
    bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    return whole_numbers([bits]), whole_numbers([group])


def method_of(config: Mapping[str, Any]) -> str:
    """The method that a `quantization_config` names; early bitsandbytes checkpoints name none."""
    form = recognized(config)
    return form.method if form is not None else str(config.get("quant_method"))


def whole_numbers(values: Iterable[Any]) -> list[int]:
    """The whole numbers among values of a config, zeros left out."""
    return [value for value in values if type(value) is int and value]


def block_columns(shape: Any) -> list[int]:
    """Columns of the blocks that share a scale, of their [rows, columns] in a config."""
    return whole_numbers(shape[1:2]) if isinstance(shape, list) else []
