"""Shapes of the model families that the project ships."""

from __future__ import annotations

from qwenq.model.spec import ModelSpec, family_spec


def model(name: str) -> ModelSpec:
    spec = family_spec(name)
    assert spec is not None
    return spec
