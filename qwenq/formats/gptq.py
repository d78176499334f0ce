"""GPTQ v1 as AutoGPTQ, GPTQModel, transformers, vLLM and ExLlama read it: `quantization_config` both ways.

`dynamic` maps a regular expression on module names to an override; `-:regex` leaves the module in 16 bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwenq import __version__
from qwenq.errors import CheckpointError, UnreadScheme
from qwenq.formats.base import Quantization, Recipe, Scheme, read_scheme
from qwenq.formats.patterns import read_pattern
from qwenq.model.architectures import Stage
from qwenq.model.spec import ModelSpec


def gptq_config(
    recipe: Recipe, spec: ModelSpec, *, damp_percent: float | None = None, method: str | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint written by this project. The recipe has a default scheme.

    method None: converted from another format, so that how it was solved is not known here.
    """
    default = recipe.default
    assert default is not None
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": gptq_version(recipe),
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
    if method is not None:
        config["meta"] |= {"damp_percent": damp_percent, "method": method, "true_sequential": True}
    return config


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


def gptq_version(recipe: Recipe) -> str:
    """`gptq`, or `gptq_v2` when a linear is asymmetric.

    Version 1 stores zero points minus one, and its readers add the one to whole words: a zero point of 0 would carry
    into its neighbour. Version 2 stores them as they are.
    """
    schemes = (recipe.default, *(scheme for _, scheme in recipe.overrides))
    return "gptq" if all(scheme is None or scheme.sym for scheme in schemes) else "gptq_v2"


def read_gptq_config(config: Mapping[str, Any], where: str) -> Quantization:
    """Parse a `quantization_config`; raises CheckpointError for what is not 4- or 8-bit GPTQ in int32 words."""
    pack_dtype = config.get("pack_dtype", "int32")
    if pack_dtype != "int32":
        raise _refusal(pack_dtype)(f"{where}: pack_dtype is {pack_dtype!r}, wanted 'int32'")
    checkpoint_format = config.get("checkpoint_format") or "gptq"
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise _refusal(checkpoint_format)(
            f"{where}: checkpoint_format is {checkpoint_format!r}, wanted 'gptq' or 'gptq_v2'"
        )
    default = _scheme(config, Scheme(4), where)
    rules = []
    entries = config.get("dynamic") or {}
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{where}: dynamic is {type(entries).__name__}, wanted an object")
    for key, override in entries.items():
        excluded = key.startswith("-:")
        pattern = read_pattern(key.removeprefix("-:").removeprefix("+:"), f"{where}: dynamic")
        override = {} if excluded or override is None else override
        if not isinstance(override, Mapping):
            raise CheckpointError(f"{where}: dynamic {key!r} is {type(override).__name__}, wanted an object")
        rules.append((pattern, None if excluded else _scheme(override, default, where)))
    return Quantization("gptq", default, tuple(rules), checkpoint_format)


def _refusal(kind: Any) -> type[CheckpointError]:
    return UnreadScheme if isinstance(kind, str) else CheckpointError


def _scheme(config: Mapping[str, Any], default: Scheme, where: str) -> Scheme:
    bits, group_size = config.get("bits", default.bits), config.get("group_size", default.group_size)
    return read_scheme(bits, group_size, config.get("sym", default.sym), where)
