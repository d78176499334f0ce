"""Names of models: which cannot be meant, and which shipped ones are near a name that is none."""

from __future__ import annotations

import difflib
import re

from qwenq.errors import CheckpointError
from qwenq.headers import shown
from qwenq.spec import family_configs

_EXPERTS = re.compile(r"-A\d+(\.\d+)?B(-|$)|\d+x\d+(\.\d+)?B|(^|/)DeepSeek-(V[23]|R1)(-\d+)?$", re.I)


def refuse_experts(name: str) -> None:
    """CheckpointError for the name of a mixture-of-experts model, such as Qwen3-235B-A22B or Mixtral-8x7B."""
    if _EXPERTS.search(name):
        raise CheckpointError(
            f"{shown(name)}: mixture-of-experts models are not supported",
            hint="dense Qwen2, Qwen2.5, Qwen3 and Llama models are",
        )


def near_names(name: str) -> str:
    """What to write instead of a name that is neither a directory nor shipped."""
    families = {family.lower(): family for family in family_configs()}
    near = difflib.get_close_matches(name.lower().rpartition("/")[2], families, n=3, cutoff=0.75)
    if near:
        return f"near: {', '.join(families[key] for key in near)}"
    return "a shipped name such as Qwen2.5-72B or Llama-3.1-8B, a hub name such as Qwen/Qwen2.5-72B, or a folder"
