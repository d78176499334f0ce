"""bitsandbytes as transformers saves it, NF4 and LLM.int8: `quantization_config` both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwenq.errors import CheckpointError, UnreadScheme
from qwenq.formats.base import BNB_FORMATS, INT8_ROWS, NF4, Quantization, Recipe, Scheme, read_names
from qwenq.formats.patterns import read_pattern


def bnb_config(recipe: Recipe) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint written by this project, as transformers' save_pretrained writes it.

    The compute dtype is left to the loader: it is transformers' default, float32, unless the user names another.
    """
    four = recipe.format == "bnb-nf4"
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head", *(name for name, scheme in recipe.overrides if scheme is None)],
        "llm_int8_threshold": 6.0,
    }


def read_bnb_config(config: Mapping[str, Any], where: str) -> Quantization:
    """Parse a `quantization_config`; raises CheckpointError for what is neither NF4 in bytes nor LLM.int8."""
    four = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    if four == bool(config.get("load_in_8bit", config.get("_load_in_8bit"))):
        raise CheckpointError(f"{where}: wanted one of load_in_4bit and load_in_8bit")
    scheme: Scheme = INT8_ROWS
    if four:
        kind, storage = config.get("bnb_4bit_quant_type", "fp4"), config.get("bnb_4bit_quant_storage", "uint8")
        if kind != "nf4" or storage != "uint8":
            raise UnreadScheme(f"{where}: 4-bit type {kind!r} stored as {storage!r}, wanted 'nf4' as 'uint8'")
        scheme = Scheme(4, 64, codes="nf4-nested") if config.get("bnb_4bit_use_double_quant") else NF4
    kept = read_names(config.get("llm_int8_skip_modules"), f"{where}: llm_int8_skip_modules")
    rules = tuple((_skip_pattern(name, f"{where}: llm_int8_skip_modules"), None) for name in kept)
    return Quantization(BNB_FORMATS[0 if four else 1], scheme, rules)


def _skip_pattern(name: str, where: str) -> re.Pattern[str]:
    """transformers' rule: a pattern up to a module boundary from the start, or the end of the name."""
    return read_pattern(rf"(?:{name})(?:(?<=\.)|(?=\.|$))|.*{re.escape(name)}$", where)
