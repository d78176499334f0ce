"""GPTQ v1 as AutoGPTQ, GPTQModel, transformers, vLLM and ExLlama read it: `quantization_config` both ways.

`dynamic` maps a regular expression on module names to an override; `-:regex` leaves the module in 16 bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenq import __version__
from qwenq.errors import CheckpointError, PlanError
from qwenq.scheme import Recipe, Scheme
from qwenq.spec import LinearSpec, ModelSpec


def gptq_config(recipe: Recipe, *, damp_percent: float, method: str) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint written by this project. The recipe has a default scheme."""
    default = recipe.default
    assert default is not None
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": default.bits,
        "group_size": default.group_size,
        "desc_act": False,
        "sym": default.sym,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    if recipe.overrides:
        config["dynamic"] = {
            (f"-:^{re.escape(name)}$" if scheme is None else f"+:^{re.escape(name)}$"): (
                {} if scheme is None else {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
            )
            for name, scheme in recipe.overrides
        }
    config["meta"] = {
        "quantizer": [f"qwenq:{__version__}"],
        "damp_percent": damp_percent,
        "method": method,
        "true_sequential": True,
    }
    return config


@dataclass(frozen=True)
class GptqFormat:
    """How a GPTQ checkpoint, ours or another tool's, stores each linear."""

    default: Scheme
    checkpoint_format: str  # gptq (zero points stored minus one) or gptq_v2
    dynamic: tuple[tuple[bool, re.Pattern[str], Scheme], ...]  # (excluded, pattern, scheme)

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of linear `module`, None where it is left in 16 bit; the first matching pattern decides."""
        for excluded, pattern, scheme in self.dynamic:
            if pattern.match(module):
                return None if excluded else scheme
        return self.default

    def recipe(self, spec: ModelSpec) -> Recipe:
        """The same, as a recipe over the model's linears."""
        overrides = [(lin.name, self.scheme_of(lin.name)) for lin in spec.linears]
        return Recipe(self.default, tuple((n, s) for n, s in overrides if s != self.default))

    def tensor_names(self, lin: LinearSpec) -> tuple[str, ...]:
        return tuple(f"{lin.name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))


def read_gptq_config(config: Any, where: str) -> GptqFormat:
    """Parse a `quantization_config`; raises CheckpointError for what is not 4- or 8-bit GPTQ in int32 words."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: quantization_config is {type(config).__name__}, wanted an object")
    if config.get("quant_method") != "gptq":
        raise CheckpointError(
            f"{where}: quant_method is {config.get('quant_method')!r}, wanted 'gptq'",
            hint="this version reads 16-bit and GPTQ checkpoints",
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(f"{where}: pack_dtype is {config.get('pack_dtype')!r}, wanted 'int32'")
    checkpoint_format = config.get("checkpoint_format") or "gptq"
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{where}: checkpoint_format is {checkpoint_format!r}, wanted 'gptq' or 'gptq_v2'")
    default = _scheme(config, Scheme(4), where)
    dynamic = []
    entries = config.get("dynamic") or {}
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{where}: dynamic is {type(entries).__name__}, wanted an object")
    for key, override in entries.items():
        excluded = key.startswith("-:")
        try:
            pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(f"{where}: dynamic has a bad pattern {key!r} ({error})") from None
        override = {} if excluded or override is None else override
        if not isinstance(override, Mapping):
            raise CheckpointError(f"{where}: dynamic {key!r} is {type(override).__name__}, wanted an object")
        dynamic.append((excluded, pattern, _scheme(override, default, where)))
    return GptqFormat(default, checkpoint_format, tuple(dynamic))


def _scheme(config: Mapping[str, Any], default: Scheme, where: str) -> Scheme:
    bits, group_size = config.get("bits", default.bits), config.get("group_size", default.group_size)
    if type(bits) is not int or type(group_size) is not int:
        raise CheckpointError(f"{where}: bits is {bits!r} and group_size {group_size!r}, wanted whole numbers")
    try:
        return Scheme(bits, group_size, bool(config.get("sym", default.sym)))
    except PlanError as error:
        raise CheckpointError(f"{where}: {error.message}") from None
