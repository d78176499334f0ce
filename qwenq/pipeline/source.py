"""A MODEL argument as a checkpoint on disk, fetched if need be, or as shapes and dtypes read from headers alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenq.checkpoint.contents import refuse_file
from qwenq.errors import PlanError
from qwenq.io.gguf import ENDING, gguf_model
from qwenq.io.json import shown
from qwenq.model.spec import ModelSpec, family_spec


def model_directory(model: str, listen: Callable[[str], None] = lambda line: None, hint: str = "") -> Path:
    """The local directory, or GGUF file, of `model`, downloaded when it is a hub name; else PlanError, with `hint`.

    listen: is told how far a download is.
    """
    path = Path(model)
    if os.path.isdir(path) or gguf_model(path):
        return gguf_model(path) or path
    from qwenq.io.hub import fetch_model, is_hub_name

    if path.suffix.lower() == ENDING:  # which no repository is called, though owner/name fits
        raise PlanError(f"{shown(model)}: no such file")
    if is_hub_name(model):
        return fetch_model(model, listen=listen)
    raise no_checkpoint(model, hint)


def no_checkpoint(model: str, hint: str = "") -> PlanError:
    """The refusal of what is neither a directory nor a hub name; that of a file is raised."""
    refuse_file(Path(model))
    family = family_spec(model)
    if not hint and family is not None:
        hint = f"{family.name} is a family, for sizes and plans; a checkpoint is Qwen/{family.name} or a directory"
    return PlanError(
        f"{shown(model)}: neither a directory nor a hub name (owner/name)",
        hint=hint or "give the directory that holds config.json, or for instance Qwen/Qwen2.5-7B-Instruct",
    )


@dataclass(frozen=True)
class Shapes:
    """A 16-bit model as its headers describe it, or as shipped with this package: BF16 throughout."""

    spec: ModelSpec
    dtype_of: Callable[[str], str]
    directory: Path | None  # None for what is not on this machine
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json, where there is one
    notes: tuple[str, ...] = ()  # a line for each thing that is read otherwise than config.json says


def source_shapes(model: str) -> Shapes:
    """Shapes of a family, a directory or a hub model, whose headers alone are fetched. QwenqError for anything else."""
    local = os.path.isdir(model) or gguf_model(Path(model)) is not None
    family = None if local else family_spec(model)
    if family is not None:
        return Shapes(family, lambda name: "BF16", None, {})
    from qwenq.io.hub import is_hub_name

    if not local and is_hub_name(model):
        from qwenq.planning.models import load_model, source_dtypes

        found = load_model(model)
        return Shapes(found.spec, source_dtypes(found), None, found.config, found.notes)
    from qwenq.checkpoint.reader import open_source

    hint = "for sizes alone a family name works: qwenq quantize Qwen2.5-72B --bits 4 --dry-run"
    source = open_source(model_directory(model, hint=hint))
    return Shapes(source.spec, source.dtype_of, source.directory, source.config, source.notes)
