"""Sizes of llama.cpp's GGUF files by type, tensor by tensor: the mixtures of formats/gguf.py, without a file's header.

Checked against published files of Qwen2.5 (tests/planning/test_weights.py).
"""

from __future__ import annotations

from functools import lru_cache

from qwenq.errors import PlanError
from qwenq.formats.base import get_format
from qwenq.model.spec import ModelSpec
from qwenq.planning.weights import Weights, recipe_weights

_FORMAT = "gguf"
ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}  # llama-quantize's own
BITS_TO_TYPE = {4: "Q4_K_M", 8: "Q8_0", 16: "F16"}


def gguf_types() -> tuple[str, ...]:
    """Names of the mixtures, largest first."""
    return get_format(_FORMAT).mixtures


def is_gguf_type(name: str) -> bool:
    """Whether it is the name of a mixture, in any case."""
    return name.upper() in (*gguf_types(), *ALIASES)


@lru_cache(maxsize=64)
def gguf_weights(spec: ModelSpec, file_type: str) -> Weights:
    """Weights of a GGUF of `file_type` (`Q4_K_M`, `Q8_0`, ...), without the file's header."""
    form, name = get_format(_FORMAT), ALIASES.get(file_type.upper(), file_type.upper())
    if name not in form.mixtures:
        raise PlanError(f"unknown GGUF type {file_type!r}", hint=f"one of {', '.join(form.mixtures)}")
    sixteen = name if name in ("F16", "BF16") else "F16"
    return recipe_weights(
        spec,
        form.mixture(name, spec),
        label=f"GGUF {name}",
        dtype=lambda tensor: form.stored_dtype(tensor, sixteen),
        source="llama.cpp's type for each tensor",
    )
