"""GPTQ v1 and v2 as AutoGPTQ, GPTQModel, transformers, vLLM and ExLlama read them.

`qweight` int32 [in * bits / 32, out] holds codes along the input, least significant first; `qzeros` [groups, out * bits
/ 32] zero points along the output, stored minus one (version "gptq") or as they are ("gptq_v2"); `scales` [groups,
out]; `g_idx` [in] the group of each input column.

In the config, `dynamic` maps a regular expression on module names to an override; `-:regex` leaves a module in 16 bit.

AutoRound packs the same tensors, mostly without `g_idx`: its `auto_round:auto_gptq` is version 1, `auto_round` and
`auto_round:gptqmodel` are version 2, and `extra_config` has overrides by name (its export.py and inference/backend.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwenq import __version__
from qwenq.errors import CheckpointError, PlanError, UnreadScheme
from qwenq.escaping import shown
from qwenq.formats.base import (
    CPU_LOGITS,
    PLAIN_8_BIT,
    SYMMETRIC,
    ByTransformers,
    ExactNames,
    Format,
    Loader,
    NamePattern,
    Quantization,
    Recipe,
    Rule,
    Scheme,
    Solved,
    StoredDtype,
    Variant,
    integer_engines,
    register,
)
from qwenq.formats.config import MAKING, as_object, check_count, read_names, read_pattern, read_scheme, refuse_unknown
from qwenq.io.safetensors import TensorSpec
from qwenq.model.architectures import Stage
from qwenq.model.spec import LinearSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from qwenq.solver.grid import QTensor

V1, V2 = "gptq", "gptq_v2"  # checkpoint_format
AUTO_ROUND = ("auto-round", "intel/auto-round")  # `quant_method`
_AUTO_ROUND_VERSIONS = {"auto_gptq": V1, "gptq": V1, "": V2, "gptqmodel": V2}  # by what follows `auto_round`
GPTQMODEL = Loader("GPTQModel", tried=CPU_LOGITS)
OPTIMUM = "transformers (optimum, GPTQModel)"


_READ = frozenset({
    "bits", "checkpoint_format", "desc_act", "dynamic", "format", "group_size", "lm_head", "method",
    "modules_in_block_to_quantize", "pack_dtype", "quant_method", "sym",
})  # fmt: skip
_OVERRIDES = MAKING | {"bits", "desc_act", "group_size", "sym"}
_AUTO_ROUND_MAKING = frozenset({
    "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "autoround_version", "backend",
    "batch_size", "damp_percent", "dataset", "enable_minmax_tuning", "enable_norm_bias_tuning",
    "enable_quanted_input", "gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr", "minmax_lr",
    "nsamples", "provider", "scale_dtype", "seed", "seqlen", "static_attention_granularity",
    "static_groups", "static_kv_granularity", "supported_types", "train_bs", "true_sequential", "vllm_backend",
})  # fmt: skip
_AUTO_ROUND_READ = frozenset({
    "act_bits", "bits", "block_name_to_quantize", "data_type", "extra_config", "group_size", "packing_format",
    "quant_block_list", "quant_method", "sym", "to_quant_block_names",
})  # fmt: skip


class Gptq(Format):
    """4 and 8 bits, mixed too; symmetric, which every engine reads, or with zero points, which few do."""

    name = method = "gptq"
    tags = ("gptq",)
    mixes = True
    options = SYMMETRIC  # vLLM reads asymmetric GPTQ for no mixed checkpoint
    published = (("GPTQ-INT4", Scheme(4, 128)), ("GPTQ-INT8", Scheme(8, 128)))
    descriptions = optional = (".g_idx",)

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.codes != "int":
            raise PlanError(f"format gptq cannot hold {scheme.label}", hint="NF4 goes into --format bnb-nf4")

    def tensors(self, scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        groups, per_word = scheme.groups(lin.in_features), 32 // scheme.bits
        yield TensorSpec(lin.name + ".qweight", "I32", (lin.in_features // per_word, lin.out_features))
        yield TensorSpec(lin.name + ".qzeros", "I32", (groups, lin.out_features // per_word))
        yield TensorSpec(lin.name + ".scales", "F16", (groups, lin.out_features))
        yield TensorSpec(lin.name + ".g_idx", "I32", (lin.in_features,))

    def config(self, recipe: Recipe, spec: ModelSpec, solved: Solved | None = None) -> dict[str, Any]:
        default = recipe.default
        assert default is not None
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.version(recipe),
            "bits": default.bits,
            "group_size": default.group_size,
            "desc_act": False,
            "sym": default.sym,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        if recipe.overrides:
            config["dynamic"] = dynamic_overrides(recipe, spec)
        config["meta"] = {"quantizer": [f"qwenq:{__version__}"]}
        if solved is not None:
            config["meta"] |= {"damp_percent": solved.damp_percent, "method": solved.method, "true_sequential": True}
        return config

    def small_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return {"quantize_config.json": config}  # GPTQModel and AutoGPTQ look here first

    def version(self, recipe: Recipe) -> str:
        """`gptq`, or `gptq_v2` when a linear is asymmetric.

        Version 1 stores zero points minus one, and its readers add the one to whole int32: a zero point of 0 would
        carry into its neighbour. Version 2 stores them as they are.
        """
        schemes = (recipe.default, *(scheme for _, scheme in recipe.overrides))
        return V1 if all(scheme is None or scheme.sym for scheme in schemes) else V2

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") in (self.method, *AUTO_ROUND)

    def read_config(self, config: Mapping[str, Any], where: str) -> Quantization:
        if config["quant_method"] in AUTO_ROUND:
            return _auto_round(config, where)
        known = _READ | MAKING
        if config.get("provider") in AUTO_ROUND:  # its export named `auto_gptq`
            known |= _AUTO_ROUND_MAKING | {"act_bits", "data_type"}
            _refuse_values(config, where)
        refuse_unknown(config, known, where)
        pack_dtype = config.get("pack_dtype", "int32")
        if pack_dtype != "int32":
            raise _refusal(pack_dtype)(f"{where}: pack_dtype is {pack_dtype!r}, wanted 'int32'")
        version = config.get("checkpoint_format") or config.get("format") or V1
        if version not in (V1, V2):
            raise _refusal(version)(f"{where}: checkpoint_format is {version!r}, wanted 'gptq' or 'gptq_v2'")
        for key, wanted in (("format", version), ("method", self.method)):
            if config.get(key) not in (None, wanted):
                raise _refusal(config[key])(f"{where}: {key} is {shown(repr(config[key]), 40)}, wanted {wanted!r}")
        default = _scheme(config, Scheme(4), where)
        rules: list[Rule] = []
        entries = as_object(config.get("dynamic") or {}, f"{where}: dynamic")
        check_count(entries, f"{where}: dynamic")
        for key, override in entries.items():
            excluded = key.startswith("-:")
            pattern = read_pattern(key.removeprefix("-:").removeprefix("+:"), f"{where}: dynamic")
            override = as_object({} if excluded or override is None else override, f"{where}: dynamic {key!r}")
            if not excluded:
                refuse_unknown(override, _OVERRIDES, f"{where}: dynamic {shown(key, 60)}")
            rules.append((pattern, None if excluded else _scheme(override, default, where)))
        rules += _left_out(config.get("modules_in_block_to_quantize"), "", f"{where}: modules_in_block_to_quantize")
        return Quantization("gptq", default, tuple(rules), version, sorted_columns=config.get("desc_act") is True)

    def pack(self, q: QTensor, version: str = V1) -> dict[str, Tensor]:
        import torch

        from qwenq.formats.packing import pack_int32

        columns, groups = q.codes_OI.shape[1], q.scales_OG.shape[1]
        bits = q.integers.bits
        # in version 1 a zero point of 0 wraps; not every reader undoes that (see `version`)
        stored_OG = q.zeros_OG if version == V2 else (q.zeros_OG - 1) & ((1 << bits) - 1)
        return {
            "qweight": pack_int32(q.codes_OI.T, bits),
            "qzeros": pack_int32(stored_OG, bits).T.contiguous(),
            "scales": q.scales_OG.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32, device=q.codes_OI.device) // (columns // groups),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = V1
    ) -> QTensor | Tensor:
        """Columns that are out of the order of their groups (act-order) come sorted, with that order.

        A weight where groups are not all of one size.
        """
        import torch

        from qwenq.solver.grid import QTensor

        codes_IO, scales_GO, zeros_GO, index_I = _parts(tensors, scheme.bits, version, lin.name)
        if scheme.sym and not bool((zeros_GO == scheme.zero).all()):  # some engines read them, others do not
            raise CheckpointError(
                f"{lin.name}: the config says symmetric, its zero points are not all {scheme.zero}",
                hint=f"checkpoint_format says {version!r}; {V1!r} stores zero points minus one, {V2!r} as they are",
            )
        if len(set(_group_sizes(index_I, len(scales_GO)))) > 1:
            w_IO = codes_IO.float().sub_(zeros_GO[index_I]).mul_(scales_GO.float()[index_I])
            return w_IO.T.contiguous()
        order_I = None
        if not bool((index_I[1:] >= index_I[:-1]).all()):
            order_I = torch.argsort(index_I, stable=True)
            codes_IO = codes_IO[order_I]
        parameters = scales_GO.T.contiguous(), zeros_GO.T.contiguous()
        return QTensor(codes_IO.T.contiguous(), parameters, scheme.grid(), order_I)

    def unpack_to_run(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = V1
    ) -> QTensor:
        from qwenq.solver.grid import QTensor

        found = self.unpack(tensors, scheme, lin, version)
        if not isinstance(found, QTensor):
            sizes = _group_sizes(tensors["g_idx"].long(), len(tensors["scales"]))
            raise CheckpointError(f"{lin.name}: g_idx makes groups of {min(sizes)} to {max(sizes)} columns")
        return found

    def loaders(self, variant: Variant) -> list[Loader]:
        mixed = "mixed bits" if variant.mixed else ""
        if variant.version == V2:
            readers = [GPTQMODEL, Loader(OPTIMUM, reason=mixed), Loader("AutoGPTQ 0.7.1", reason=V2)]
            return integer_engines(variant, readers, tried="", reason="asymmetric")
        optimum = Loader(OPTIMUM, tried=CPU_LOGITS) if variant.group_size != -1 else Loader(OPTIMUM)
        readers = [
            GPTQMODEL,
            Loader(OPTIMUM, reason=mixed) if mixed else optimum,
            Loader("AutoGPTQ 0.7.1", reason=mixed) if mixed else Loader("AutoGPTQ 0.7.1", tried=CPU_LOGITS),
        ]
        *engines, llama_cpp = integer_engines(
            variant, readers, tried=PLAIN_8_BIT if variant.mixed or variant.bits == 8 else CPU_LOGITS
        )
        exllama = Loader("ExLlamaV2", reason=mixed or ("" if variant.bits == 4 else "4 bits only"))
        return [*engines, exllama, llama_cpp]

    def by_transformers(self, recipe: Recipe, schemes: set[Scheme]) -> ByTransformers:
        if recipe.overrides:
            return ByTransformers(reason="transformers does not read mixed bits in this format; GPTQModel does.")
        return ByTransformers("optimum gptqmodel")


def _parts(tensors: Mapping[str, Tensor], bits: int, version: str, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 [in, out], scales [groups, out], zeros uint8 [groups, out], g_idx int64 [in]; shapes checked."""
    import torch

    from qwenq.formats.packing import unpack_int32

    if version not in (V1, V2):
        raise CheckpointError(f"{name}: checkpoint_format {version!r}, wanted gptq or gptq_v2")
    absent = [part for part in ("qweight", "qzeros", "scales") if part not in tensors]
    if absent:
        raise CheckpointError(f"{name}: no {', '.join(absent)}")
    packed, scales_GO = tensors["qweight"], tensors["scales"]
    groups, rows = scales_GO.shape
    columns, per_word = packed.shape[0] * 32 // bits, 32 // bits
    if packed.shape[1] != rows or tensors["qzeros"].shape != (groups, rows // per_word) or rows % per_word:
        shapes = ", ".join(f"{part} {list(tensors[part].shape)}" for part in ("qweight", "qzeros", "scales"))
        raise CheckpointError(f"{name}: shapes do not fit together at {bits} bits: {shapes}")
    zeros_GO = unpack_int32(tensors["qzeros"].T, bits).T
    if version == V1:
        zeros_GO = (zeros_GO + 1) & ((1 << bits) - 1)
    if "g_idx" in tensors:
        index_I = tensors["g_idx"].long()
    else:
        index_I = torch.arange(columns, device=packed.device) // (columns // groups)
    if index_I.numel() != columns or int(index_I.min()) < 0 or int(index_I.max()) >= groups:
        raise CheckpointError(f"{name}: g_idx does not name one of {groups} groups for each of {columns} columns")
    return unpack_int32(packed, bits), scales_GO, zeros_GO, index_I


def _group_sizes(index_I: Tensor, groups: int) -> list[int]:
    """Columns per group."""
    import torch

    sizes: list[int] = torch.bincount(index_I, minlength=groups).tolist()
    return sizes


def dynamic_overrides(recipe: Recipe, spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """`dynamic` of a mixed checkpoint: one pattern for each scheme of each fused group, with its layers.

    A group whose linears agree is matched under its fused name too (`qkv_proj`, `gate_up_proj`): vLLM and SGLang fuse
    them, and look up only that name.
    """
    schemes = dict(recipe.overrides)
    layers: dict[tuple[str, tuple[str, ...], Scheme | None], list[int]] = {}
    for layer, stage in _stages_named(schemes, spec):
        prefix = spec.layer_prefix(layer)
        found = {schemes.get(prefix + path, recipe.default) for path in stage.paths}
        whole = (*stage.paths, stage.fused) if stage.fused else stage.paths
        for part in [whole] if len(found) == 1 else [(path,) for path in stage.paths]:
            if prefix + part[0] in schemes:
                linears = tuple(path.rpartition(".")[2] for path in part)
                layers.setdefault((stage.block, linears, schemes[prefix + part[0]]), []).append(layer)
    dynamic: dict[str, dict[str, Any]] = {}
    within = re.escape(spec.architecture.layers)
    for (block, linears, scheme), where in layers.items():
        pattern = rf"^{within}\.{_either(where)}\.{re.escape(block)}\.{_either(linears)}$"
        if scheme is None:
            dynamic["-:" + pattern] = {}
        else:
            dynamic["+:" + pattern] = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
    return dynamic


def _stages_named(schemes: Mapping[str, Scheme | None], spec: ModelSpec) -> list[tuple[int, Stage]]:
    """Layer and stage of every fused group that has an override, in order."""
    return [
        (layer, stage)
        for layer in range(spec.num_hidden_layers)
        for stage in spec.architecture.stages
        if any(spec.layer_prefix(layer) + path in schemes for path in stage.paths)
    ]


def _either(words: Sequence[object]) -> str:
    """A pattern for any of some numbers or names."""
    return str(words[0]) if len(words) == 1 else "(?:" + "|".join(map(str, words)) + ")"


def _auto_round(config: Mapping[str, Any], where: str) -> Quantization:
    """AutoRound's config; UnreadScheme for what it packs otherwise: AWQ's layout, floats, quantized activations."""
    refuse_unknown(config, _AUTO_ROUND_READ | _AUTO_ROUND_MAKING, where)
    packing = config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq"
    kind = str(packing).removeprefix("auto_round").removeprefix(":")
    version = _AUTO_ROUND_VERSIONS.get(kind.partition(":")[0] if kind.startswith("gptq:") else kind)
    if version is None or not str(packing).startswith("auto_round"):
        raise _refusal(packing)(
            f"{where}: AutoRound's packing_format is {shown(repr(packing), 40)}, wanted 'auto_round:auto_gptq'"
        )
    _refuse_values(config, where)
    default = _scheme(config, Scheme(4), where)
    extra = as_object(config.get("extra_config") or {}, f"{where}: extra_config")
    check_count(extra, f"{where}: extra_config")
    exact: list[Rule] = []
    patterns: list[Rule] = []
    for name, override in extra.items():
        here = f"{where}: extra_config {shown(name, 60)}"
        refuse_unknown(as_object(override, here), _AUTO_ROUND_READ | _AUTO_ROUND_MAKING, here)
        _refuse_values(override, here)
        scheme = None if override.get("bits") in (16, 32) else _scheme(override, default, here)
        exact.append((ExactNames(frozenset({name})), scheme))
        if re.search(r"[^\w.]", name):  # its own regular expressions begin and end with `.*`
            patterns.append((read_pattern(name, here), scheme))
    names = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")  # by the tool's version
    blocks = next((config[name] for name in names if config.get(name)), None)
    left = _left_out(blocks, "^", f"{where}: block_name_to_quantize")
    return Quantization("gptq", default, (*exact, *patterns, *left), version)


def _refuse_values(config: Mapping[str, Any], where: str) -> None:
    """UnreadScheme for codes that are no integers, and for quantized activations."""
    if config.get("data_type", "int") not in ("int", "int_sym", "int_asym"):
        raise UnreadScheme(f"{where}: data_type is {shown(repr(config['data_type']), 40)}, wanted 'int'")
    if config.get("act_bits") not in (None, 16, 32):
        raise UnreadScheme(f"{where}: quantized activations are not supported (act_bits {config['act_bits']!r})")


def _left_out(names: Any, start: str, where: str) -> list[Rule]:
    """A rule that leaves in 16 bit what a list of blocks or modules does not name; none where there is no list.

    names: texts, or lists of them, or one text with commas. start: `^` where a name is the beginning of a module's.
    """
    if not names:
        return []
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    if isinstance(names, list):
        names = [name for part in names for name in (part if isinstance(part, list) else [part])]
    words = "|".join(re.escape(name) for name in dict.fromkeys(read_names(names, where)))
    expression = rf"(?!(?:{words})(?:\.|$))" if start else rf"(?!.*\.(?:{words})$)"
    return [(NamePattern(re.compile(expression), max(1, len(names))), None)]


def _refusal(kind: Any) -> type[CheckpointError]:
    return UnreadScheme if isinstance(kind, str) else CheckpointError


def _scheme(config: Mapping[str, Any], default: Scheme, where: str) -> Scheme:
    bits, group_size = config.get("bits", default.bits), config.get("group_size", default.group_size)
    return read_scheme(bits, group_size, config.get("sym", default.sym), where)


GPTQ = register(Gptq())
