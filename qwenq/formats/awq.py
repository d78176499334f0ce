"""AWQ's "gemm" layout as AutoAWQ wrote it, which vLLM (Marlin) and GPTQModel read: `quantization_config` both ways.

The layout always carries zero points. What it holds is 4-bit and uniform; whole linears may stay in 16 bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwenq.errors import CheckpointError, UnreadScheme
from qwenq.formats.base import PACKED_BITS, Quantization, Recipe, read_names, read_scheme


def awq_config(recipe: Recipe) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint written by this project. The recipe has a default scheme."""
    assert recipe.default is not None
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": recipe.default.bits,
        "group_size": recipe.default.group_size,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", *(name for name, scheme in recipe.overrides if scheme is None)],
    }


def read_awq_config(config: Mapping[str, Any], where: str) -> Quantization:
    """Parse a `quantization_config`; raises CheckpointError for what is not 4-bit AWQ in the gemm layout."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnreadScheme(f"{where}: AWQ version is {version!r}, wanted 'gemm'")
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size"))
    if bits != 4:
        raise (UnreadScheme if bits in PACKED_BITS else CheckpointError)(f"{where}: AWQ bits is {bits!r}, wanted 4")
    if config.get("zero_point", True) is not True:
        raise (UnreadScheme if config["zero_point"] is False else CheckpointError)(
            f"{where}: AWQ zero_point is {config.get('zero_point')!r}, wanted true"
        )
    kept = read_names(config.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")
    rules = tuple((re.compile(".*" + re.escape(name)), None) for name in kept)
    return Quantization("awq", read_scheme(bits, group_size, False, where), rules)
