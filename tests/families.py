"""Shapes of the model families that the project ships."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwenq.model.spec import ModelSpec, family_spec


def model(name: str, **changes: Any) -> ModelSpec:
    spec = family_spec(name)
    assert spec is not None
    return replace(spec, **changes)
