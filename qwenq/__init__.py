"""qwenq: quantize Qwen2.5-72B-class models block by block, and say what it cost.

The Python API is here, see docs/api.md; a name is imported when it is first used, so `import qwenq` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qwenq.api import (
        Answer,
        EvaluateConfig,
        Inspection,
        LoadedModel,
        QuantizeConfig,
        convert,
        dry_run,
        estimate,
        evaluate,
        followed_links,
        inspect,
        load,
        plan,
        quantize,
        recommend,
        sensitivity,
        verify,
    )
    from qwenq.errors import QwenqError

__all__ = [
    "Answer", "EvaluateConfig", "Inspection", "LoadedModel", "QuantizeConfig", "QwenqError", "convert", "dry_run",
    "estimate", "evaluate", "followed_links", "inspect", "load", "plan", "quantize", "recommend", "sensitivity",
    "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qwenq' has no attribute {name!r}")
    import importlib

    home = importlib.import_module("qwenq.errors" if name == "QwenqError" else "qwenq.api")
    globals()[name] = found = getattr(home, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
