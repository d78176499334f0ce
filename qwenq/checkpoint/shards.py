"""The files of a quantized checkpoint, from shapes alone: which tensors each shard holds, byte for byte. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwenq.formats.base import Recipe
from qwenq.io.safetensors import TensorSpec, encode_header, tensor_bytes
from qwenq.model.spec import ModelSpec


def output_files(spec: ModelSpec, recipe: Recipe, dtype_of: Callable[[str], str]) -> dict[str, list[TensorSpec]]:
    """Shard files of the quantized checkpoint and their tensors: embedding, one a layer, then norm and head.

    dtype_of gives the stored dtype of each tensor that is not quantized.
    """
    total = spec.num_hidden_layers + 2
    outer = list(recipe.outer_tensors(spec, dtype_of))
    layers = (list(recipe.layer_tensors(spec, k, dtype_of)) for k in range(spec.num_hidden_layers))
    parts = [outer[:1], *layers, outer[1:]]
    return {f"model-{k:05d}-of-{total:05d}.safetensors": part for k, part in enumerate(parts, 1)}


def shard_file_bytes(tensors: list[TensorSpec]) -> int:
    """Size of the safetensors file that holds these tensors, as this project writes it."""
    return len(encode_header({t.name: t for t in tensors})[0]) + sum(t.nbytes for t in tensors)


def encode_index(files: Mapping[str, list[TensorSpec]]) -> dict[str, Any]:
    """`model.safetensors.index.json` for shard files and their tensors."""
    total = sum(tensor_bytes(t.dtype, t.shape) for specs in files.values() for t in specs)
    weight_map = {t.name: file for file, specs in files.items() for t in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
