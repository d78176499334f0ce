"""`quantization_config` of config.json, by format: written from a recipe, read from any tool's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenq.errors import CheckpointError, UnreadScheme
from qwenq.formats.awq import awq_config, read_awq_config
from qwenq.formats.base import Quantization, Recipe
from qwenq.formats.bitsandbytes import bnb_config, read_bnb_config
from qwenq.formats.compressed_tensors import compressed_config, read_compressed_config
from qwenq.formats.gptq import gptq_config, read_gptq_config
from qwenq.model.spec import ModelSpec

_READERS = {
    "gptq": read_gptq_config,
    "awq": read_awq_config,
    "compressed-tensors": read_compressed_config,
    "bitsandbytes": read_bnb_config,
}


def quantization_config(
    recipe: Recipe, spec: ModelSpec, *, damp_percent: float | None = None, method: str | None = None
) -> dict[str, Any]:
    """What config.json says of a checkpoint by `recipe`; how it was solved, if known, goes where there is a place."""
    if recipe.format == "awq":
        return awq_config(recipe)
    if recipe.format == "compressed-tensors":
        return compressed_config(recipe, spec)
    if recipe.format == "gptq":
        return gptq_config(recipe, spec, damp_percent=damp_percent, method=method)
    return bnb_config(recipe)


def read_quantization_config(config: Any, where: str) -> Quantization:
    """Parse a `quantization_config` of any known format; CheckpointError, with what is known, for another.

    UnreadScheme, which is one, for what another tool may have written as it should be but this version does not read.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: quantization_config is {type(config).__name__}, wanted an object")
    if not is_readable(config):
        named = isinstance(config.get("quant_method"), str)
        raise (UnreadScheme if named else CheckpointError)(
            f"{where}: quant_method is {str(method_of(config))[:40]!r}, wanted one of {', '.join(_READERS)}",
            hint="this version reads 16-bit checkpoints and these",
        )
    return _READERS[method_of(config)](config, where)


def is_readable(config: Any) -> bool:
    """Whether a `quantization_config` names a method that this version reads."""
    return isinstance(config, Mapping) and method_of(config) in _READERS


def method_of(config: Mapping[str, Any]) -> str:
    """The method named; early bitsandbytes checkpoints name none."""
    early = "load_in_4bit" in config or "load_in_8bit" in config
    return str(config.get("quant_method", "bitsandbytes" if early else None))
