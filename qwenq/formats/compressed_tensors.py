"""compressed-tensors, "pack-quantized", as vLLM and transformers read it.

Codes are packed along the input, zero points along the output. Codes are signed, code - 2**(bits-1), and are packed
after adding 2**(bits-1) again: int32 holds the unsigned ones. `weight_packed` [out, in * bits / 32], `weight_scale`
[out, groups], `weight_zero_point` [out * bits / 32, groups] (asymmetric only), `weight_shape` int64 [2]. Source: the
library's compressors/pack_quantized.

In the config, linears of one scheme form a config group. A name in `targets` is a module's own, a pattern after `re:`,
or the class `Linear`; when several match, they count in this order. `ignore` comes before all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qwenq import __version__
from qwenq.errors import CheckpointError, PlanError, UnreadScheme
from qwenq.escaping import shown
from qwenq.formats.base import (
    ASYMMETRIC,
    CPU_LOGITS,
    PLAIN_8_BIT,
    SYMMETRIC,
    ByTransformers,
    ExactNames,
    Format,
    Loader,
    Matcher,
    NamePattern,
    Quantization,
    Recipe,
    Rule,
    Scheme,
    Solved,
    StoredDtype,
    Variant,
    block_columns,
    integer_engines,
    register,
    whole_numbers,
)
from qwenq.formats.config import as_object, check_count, read_names, read_pattern, read_scheme, refuse_unknown
from qwenq.io.safetensors import TensorSpec
from qwenq.model.spec import LinearSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from qwenq.solver.grid import QTensor

_LINEAR = "Linear"  # a module's class: every linear


# What is read here, and what says nothing of what the stored codes mean.
_KEYS = frozenset({
    "config_groups", "dequantize", "format", "global_compression_ratio", "ignore", "kv_cache_scheme", "producer",
    "provider", "quant_method", "quantization_status", "run_compressed", "use_optimized_inference", "version",
})  # fmt: skip
_GROUP_KEYS = frozenset({"format", "input_activations", "output_activations", "targets", "weights"})
_WEIGHT_KEYS = frozenset({
    "actorder", "block_structure", "dynamic", "group_size", "num_bits", "observer", "observer_kwargs",
    "scale_dtype", "strategy", "symmetric", "type", "zp_dtype",
})  # fmt: skip


class CompressedTensors(Format):
    """4 and 8 bits, mixed too, with or without zero points."""

    name = method = "compressed-tensors"
    tags = ("compressed-tensors",)
    mixes = True
    options = SYMMETRIC + ASYMMETRIC
    descriptions = (".weight_shape",)

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.codes != "int":
            raise PlanError(
                f"format compressed-tensors cannot hold {scheme.label}", hint="NF4 goes into --format bnb-nf4"
            )

    def tensors(self, scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        groups, per_word = scheme.groups(lin.in_features), 32 // scheme.bits
        yield TensorSpec(lin.name + ".weight_packed", "I32", (lin.out_features, lin.in_features // per_word))
        yield TensorSpec(lin.name + ".weight_scale", "F16", (lin.out_features, groups))
        if not scheme.sym:
            yield TensorSpec(lin.name + ".weight_zero_point", "I32", (lin.out_features // per_word, groups))
        yield TensorSpec(lin.name + ".weight_shape", "I64", (2,))

    def config(self, recipe: Recipe, spec: ModelSpec, solved: Solved | None = None) -> dict[str, Any]:
        """With one scheme its group targets `Linear`; with several each group names its modules, so that no reader's
        order of precedence matters.
        """
        members: dict[Scheme, list[str]] = {}
        kept = []
        for lin in spec.linears:
            if (scheme := recipe.scheme_of(lin)) is None:
                kept.append(lin.name)
            else:
                members.setdefault(scheme, []).append(lin.name)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{k}": {
                    "targets": ["Linear"] if len(members) == 1 else names,
                    "weights": _weights(scheme),
                    "input_activations": None,
                    "output_activations": None,
                }
                for k, (scheme, names) in enumerate(members.items())
            },
            "ignore": [spec.architecture.head, *kept],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "producer": {"name": "qwenq", "version": __version__},  # vLLM asks it for its name
        }

    def read_config(self, config: Mapping[str, Any], where: str) -> Quantization:
        sparsity = config.get("sparsity_config")
        dense = not isinstance(sparsity, Mapping) or sparsity.get("format") in (None, "dense")
        refuse_unknown(config, _KEYS | {"sparsity_config"} if dense else _KEYS, where)
        if config.get("format") != "pack-quantized":
            raise (UnreadScheme if isinstance(config.get("format"), str) else CheckpointError)(
                f"{where}: compressed-tensors format is {config.get('format')!r}, wanted 'pack-quantized'",
                hint="other formats also quantize activations, or hold floats",
            )
        if config.get("kv_cache_scheme") is not None:
            raise UnreadScheme(f"{where}: a kv_cache_scheme is not supported")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(f"{where}: config_groups is missing or empty")
        ignored = read_names(config.get("ignore"), f"{where}: ignore")
        rules = [(matcher, None) for matcher in _matchers(ignored, f"{where}: ignore")]
        exact: list[Rule] = []
        patterns: list[Rule] = []
        default = None
        for key, group in groups.items():
            here = f"{where}: config_groups {shown(key, 40)}"
            refuse_unknown(as_object(group, here), _GROUP_KEYS, here)
            scheme = _scheme(group, here)
            targets = read_names(group.get("targets"), f"{here}: targets")
            if _LINEAR in targets:
                default = scheme
            for matcher in _matchers([name for name in targets if name != _LINEAR], f"{here}: targets"):
                (exact if isinstance(matcher, ExactNames) else patterns).append((matcher, scheme))
            check_count(patterns, f"{where}: config_groups")
        patterns.sort(key=lambda rule: _text(rule[0]))
        return Quantization("compressed-tensors", default, (*rules, *exact, *patterns))

    def stated(self, config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Those of all config groups."""
        groups = config.get("config_groups")
        found = [group.get("weights") for group in _objects(groups.values() if isinstance(groups, Mapping) else ())]
        bits = whole_numbers(weights.get("num_bits") for weights in _objects(found))
        sizes = whole_numbers(weights.get("group_size") for weights in _objects(found))
        blocks = (block_columns(weights.get("block_structure")) for weights in _objects(found))
        return bits, [*sizes, *(size for columns in blocks for size in columns)]

    def pack(self, q: QTensor, version: str = "") -> dict[str, Tensor]:
        import torch

        from qwenq.formats.packing import pack_int32

        bits = q.integers.bits
        tensors = {
            "weight_packed": pack_int32(q.codes_OI.T, bits).T.contiguous(),
            "weight_scale": q.scales_OG.contiguous(),
            "weight_shape": torch.tensor(q.codes_OI.shape, dtype=torch.int64),
        }
        if not q.integers.sym:
            tensors["weight_zero_point"] = pack_int32(q.zeros_OG, bits)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = "") -> QTensor:
        import torch

        from qwenq.formats.packing import unpack_int32
        from qwenq.solver.grid import QTensor

        codes_OI = unpack_int32(tensors["weight_packed"].T.contiguous(), scheme.bits).T.contiguous()
        scales_OG = tensors["weight_scale"]
        if tensors["weight_shape"].tolist() != list(codes_OI.shape):
            raise CheckpointError(
                f"{lin.name}: weight_shape says {tensors['weight_shape'].tolist()}, the words hold "
                f"{list(codes_OI.shape)}"
            )
        if scheme.sym:
            zeros_OG = torch.full(scales_OG.shape, scheme.zero, dtype=torch.uint8, device=codes_OI.device)
        else:
            zeros_OG = unpack_int32(tensors["weight_zero_point"], scheme.bits).contiguous()
        return QTensor(codes_OI, (scales_OG.contiguous(), zeros_OG), scheme.grid())

    def loaders(self, variant: Variant) -> list[Loader]:
        readers = [Loader("transformers (compressed-tensors)", tried=CPU_LOGITS)]
        return integer_engines(
            variant, readers, tried=PLAIN_8_BIT if variant.mixed or variant.bits == 8 else CPU_LOGITS
        )

    def by_transformers(self, recipe: Recipe, schemes: set[Scheme]) -> ByTransformers:
        if all(scheme.sym for scheme in schemes):
            return ByTransformers("compressed-tensors")
        if len(schemes) > 1:
            reason = (
                "transformers (5.23, compressed-tensors 0.20.0) does not read mixed bits with zero points; vLLM may."
            )
            return ByTransformers(reason=reason)
        # packed, compressed-tensors 0.20.0 takes zero points only unpacked
        return ByTransformers("compressed-tensors", "CompressedTensorsConfig(dequantize=True)")


def _weights(scheme: Scheme) -> dict[str, Any]:
    grouped = scheme.group_size != -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
    }


def _matchers(names: list[str], where: str) -> list[Matcher]:
    """Matchers for a targets or ignore list: the literal names together, then each pattern."""
    written = [name.removeprefix("re:") for name in names if name.startswith("re:")]
    check_count(written, where)
    if _LINEAR in names:
        written.append("")
    exact = ExactNames(frozenset(name for name in names if not name.startswith("re:")))
    found: list[Matcher] = [exact] if exact.names else []
    return found + [read_pattern(pattern, where) for pattern in written]


def _text(matcher: Matcher) -> str:
    return matcher.expression.pattern if isinstance(matcher, NamePattern) else ""


def _scheme(group: Mapping[str, Any], where: str) -> Scheme:
    weights = as_object(group.get("weights"), f"{where}: weights")
    if group.get("input_activations") is not None or group.get("output_activations") is not None:
        raise UnreadScheme(f"{where}: quantized activations are not supported")
    if group.get("format") not in (None, "pack-quantized"):
        raise UnreadScheme(f"{where}: format is {shown(repr(group['format']), 40)}, wanted 'pack-quantized'")
    refuse_unknown(weights, _WEIGHT_KEYS, f"{where}: weights")
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if isinstance(group_size, int) and group_size > 0 else "channel"
    if weights.get("type", "int") != "int" or weights.get("dynamic") or strategy not in ("group", "channel"):
        raise UnreadScheme(
            f"{where}: weights are {weights.get('type', 'int')} by {strategy}, wanted static int by group or channel"
        )
    if weights.get("actorder") not in (None, False, "weight", "static"):  # `dynamic` and true mean `group`
        order = shown(repr(weights["actorder"]), 40)
        raise UnreadScheme(f"{where}: actorder is {order}, which stores columns out of order; not supported")
    size = -1 if strategy == "channel" else group_size
    return read_scheme(weights.get("num_bits"), size, weights.get("symmetric", True), where)


def _objects(values: Iterable[Any]) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)]


COMPRESSED_TENSORS = register(CompressedTensors())
