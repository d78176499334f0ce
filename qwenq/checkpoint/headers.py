"""Config and headers of a checkpoint, whether it is a directory of shards or a GGUF file. No torch, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenq.checkpoint.contents import Contents, read_contents, refuse_adapter
from qwenq.errors import CheckpointError
from qwenq.io.gguf import ENDING, is_gguf
from qwenq.io.json import inside, model_name, read_object
from qwenq.io.safetensors import checkpoint_tensors
from qwenq.model.metadata import open_gguf
from qwenq.model.spec import spec_from_config


def read_headers(path: Path) -> Contents:
    """Config, shapes and tensors of a checkpoint, by Hugging Face's names; CheckpointError for what cannot be read."""
    if is_gguf(path):
        found = open_gguf(path)
        return Contents(found.spec, found.config, dict(found.tensors))
    config = read_config(path)
    spec = spec_from_config(config, where=str(path / "config.json"), name=model_name(path))
    return read_contents(spec, config, checkpoint_tensors(path), str(path))


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint directory, or what says the same in a GGUF file."""
    if is_gguf(path):
        return open_gguf(path).config
    if not path.is_dir():
        hint = f"a GGUF file is named *{ENDING}" if path.is_file() else "give a checkpoint directory or a hub name"
        raise CheckpointError(f"{path}: no such directory", hint=hint)
    refuse_adapter(path)
    return read_object(inside(path, "config.json"))
