"""compressed-tensors, "pack-quantized", as vLLM and transformers read it: `quantization_config` both ways.

Linears of one scheme form a config group. A name in `targets` is a module's own, a pattern after `re:`, or the class
`Linear`; when several match, they count in this order. `ignore` comes before all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwenq import __version__
from qwenq.errors import CheckpointError, UnreadScheme
from qwenq.formats.base import Quantization, Recipe, Scheme, read_names, read_scheme
from qwenq.formats.patterns import read_pattern
from qwenq.model.spec import ModelSpec

_ANY = re.compile("")


def compressed_config(recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint written by this project. The recipe has a default scheme.

    With one scheme its group targets `Linear`; with several each group names its modules, so that no reader's order
    of precedence matters.
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
        "ignore": ["lm_head", *kept],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "producer": {"name": "qwenq", "version": __version__},  # vLLM asks it for its name
    }


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


def read_compressed_config(config: Mapping[str, Any], where: str) -> Quantization:
    """Parse a `quantization_config`; raises CheckpointError for what is not weights of 4 or 8 bits packed in int32."""
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
    rules: list[tuple[re.Pattern[str], Scheme | None]] = []
    for name in read_names(config.get("ignore"), f"{where}: ignore"):
        rules.append((_name_pattern(name, f"{where}: ignore"), None))
    exact: list[tuple[re.Pattern[str], Scheme | None]] = []
    patterns: list[tuple[str, re.Pattern[str], Scheme | None]] = []
    default = None
    for key, group in groups.items():
        here = f"{where}: config_groups {key}"
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{here} is {type(group).__name__}, wanted an object")
        scheme = _scheme(group, here)
        for target in read_names(group.get("targets"), f"{here}: targets"):
            if target == "Linear":
                default = scheme
            elif target.startswith("re:"):
                patterns.append((target, _name_pattern(target, f"{here}: targets"), scheme))
            else:
                exact.append((_name_pattern(target, f"{here}: targets"), scheme))
    patterns.sort(key=lambda entry: entry[0])
    return Quantization(
        "compressed-tensors", default, (*rules, *exact, *((pattern, scheme) for _, pattern, scheme in patterns))
    )


def _name_pattern(name: str, where: str) -> re.Pattern[str]:
    """What `name` of a targets or ignore list matches, from the start of a module's name."""
    if name == "Linear":
        return _ANY
    return read_pattern(name[3:] if name.startswith("re:") else re.escape(name) + "$", where)


def _scheme(group: Mapping[str, Any], where: str) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where}: weights is {type(weights).__name__}, wanted an object")
    if group.get("input_activations") is not None or group.get("output_activations") is not None:
        raise UnreadScheme(f"{where}: quantized activations are not supported")
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if isinstance(group_size, int) and group_size > 0 else "channel"
    if weights.get("type", "int") != "int" or weights.get("dynamic") or strategy not in ("group", "channel"):
        raise UnreadScheme(
            f"{where}: weights are {weights.get('type', 'int')} by {strategy}, wanted static int by group or channel"
        )
    if weights.get("actorder") == "group":
        raise UnreadScheme(f"{where}: actorder is 'group', which stores columns out of order; not supported")
    size = -1 if strategy == "channel" else group_size
    return read_scheme(weights.get("num_bits"), size, weights.get("symmetric", True), where)
