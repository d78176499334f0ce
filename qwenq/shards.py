"""Writing safetensors files: beside the target first, synced, then renamed; bytes in, never a second copy of a tensor.

Layout (safetensors specification): 8-byte little-endian header length, JSON header padded with spaces to a multiple
of 8, tensors back to back. Tensors are ordered by element size, then name, so every tensor is aligned to its elements.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qwenq.headers import encode_header
from qwenq.spec import TensorSpec, tensor_bytes

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_CHUNK = 1 << 24  # bytes


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's own bytes, without a copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write `tensors` as safetensors at `path` and return the file's SHA-256."""
    header, order = encode_header({name: spec_of(name, t) for name, t in tensors.items()})

    def chunks(put: Callable[[Any], None]) -> None:
        put(header)
        for name in order:
            data = raw_bytes(tensors[name])
            for start in range(0, len(data), _CHUNK):
                put(data[start : start + _CHUNK])

    return write_synced(path, chunks)


def write_synced(path: Path, produce: Callable[[Callable[[Any], None]], None]) -> str:
    """Write a file through `produce(put)` beside `path`, sync it, rename it into place; returns its SHA-256."""
    beside = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    try:
        with open(beside, "wb") as file:

            def put(data: Any) -> None:
                file.write(data)
                digest.update(data)

            produce(put)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)  # a full disk is not helped by half a shard
        raise
    os.replace(beside, path)
    sync_directory(path.parent)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> str:
    """Write `data` at `path`, synced and renamed into place; returns its SHA-256."""
    return write_synced(path, lambda put: put(data))


def write_json(path: Path, value: Any) -> str:
    """Write JSON, indented by two, at `path`; returns its SHA-256."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_index(files: Mapping[str, list[TensorSpec]]) -> dict[str, Any]:
    """`model.safetensors.index.json` for shard files and their tensors."""
    total = sum(tensor_bytes(t.dtype, t.shape) for specs in files.values() for t in specs)
    weight_map = {t.name: file for file, specs in files.items() for t in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
