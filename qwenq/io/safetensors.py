"""Safetensors headers: which tensor lies in which bytes of which file. Reads no weights, trusts no byte of the input.

A file is an 8-byte little-endian length n, n bytes of JSON, then tensor data. The JSON maps each name to its dtype,
shape and `data_offsets`, relative to the data; `__metadata__` maps text to text. Format: safetensors' README, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError
from qwenq.io.json import inside, open_regular, parse_object, read_object, shown

MAX_HEADER_BYTES = 32_000_000  # the reference reader takes 100 MB, which no model fills
MAX_TENSORS = 100_000  # of a checkpoint: 1,000 decoder layers of packed linears have 46,000
MAX_NAME_CHARACTERS = 500
MAX_DIMENSIONS = 16
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorLocation:
    """A tensor and its bytes: `file[start:end]`, absolute, so that callers can map it."""

    spec: TensorSpec
    file: Path
    start: int
    end: int


def checkpoint_tensors(directory: Path) -> dict[str, TensorLocation]:
    """Every tensor of a checkpoint directory, by name, from the headers alone.

    Reads `model.safetensors`, else what `model.safetensors.index.json` names (transformers' own order), else the only
    `*.safetensors` file there is. Raises CheckpointError naming file and tensor for anything that does not add up.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{shown(str(directory))}: not a directory", hint="give the directory that holds config.json"
        )
    if os.path.lexists(directory / SINGLE_NAME):
        return read_header(inside(directory, SINGLE_NAME))
    if os.path.lexists(directory / INDEX_NAME):
        return _indexed_tensors(directory)
    files = sorted(p.name for p in directory.iterdir() if p.suffix == ".safetensors")
    if len(files) == 1:
        return read_header(inside(directory, files[0]))
    if files:
        raise CheckpointError(
            f"{shown(str(directory))}: {len(files)} safetensors files but no {INDEX_NAME}",
            hint="the index says which tensor is in which file; download it into the same directory",
        )
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED_ENDINGS)
    if pickled:
        raise CheckpointError(
            f"{shown(str(directory))}: only pickled weights ({shown(pickled[0])}), which can run code: refused",
            hint="convert them to safetensors on a machine you can lose, or use a repository with safetensors",
        )
    raise CheckpointError(f"{shown(str(directory))}: no safetensors file", hint=f"wanted {SINGLE_NAME} or {INDEX_NAME}")


def read_header(path: Path) -> dict[str, TensorLocation]:
    """Tensors of one safetensors file by name, in file order; CheckpointError unless every byte is accounted for."""
    path = Path(path)
    where = shown(path.name)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if len(head) < 8:
            raise CheckpointError(f"{where}: {size} bytes, too short for a safetensors file", hint="download it again")
        length = int.from_bytes(head, "little")
        if length > MAX_HEADER_BYTES or length > size - 8 or length < 2:
            hint = "the download may have stopped early; compare its size with the repository's"
            if head == b"version ":
                hint = "this is a git-lfs pointer, not the weights: run `git lfs pull`"
            raise CheckpointError(
                f"{where}: header length {length} is not possible in a file of {size} bytes "
                f"(at most {MAX_HEADER_BYTES:,})",
                hint=hint,
            )
        text = file.read(length)
    header = parse_object(text, where)
    _check_count(header, where)
    _check_metadata(header.pop("__metadata__", None), where)
    base = 8 + length
    entries = sorted(_entries(header, where), key=lambda entry: entry[1:])
    expected = 0
    locations = {}
    for spec, start, end in entries:
        name = shown(spec.name)
        if start != expected:
            raise CheckpointError(
                f"{where}: tensor {name} starts at data byte {start}, wanted {expected} (hole or overlap)"
            )
        if base + end > size:
            raise CheckpointError(
                f"{where}: tensor {name} ends at byte {base + end}, the file at {size}",
                hint="the download may have stopped early",
            )
        expected = end
        locations[spec.name] = TensorLocation(spec, path, base + start, base + end)
    if base + expected != size:
        raise CheckpointError(f"{where}: {size - base - expected} bytes after the last tensor belong to no tensor")
    return locations


def encode_header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, list[str]]:
    """Header bytes, length field included, and the order in which the tensors' bytes follow.

    Ordered by element size, then name, so that every tensor is aligned to its elements.
    """
    order = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        end = offset + tensors[name].nbytes
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _indexed_tensors(directory: Path) -> dict[str, TensorLocation]:
    index = read_object(inside(directory, INDEX_NAME), limit=MAX_HEADER_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME}: weight_map is missing or empty")
    _check_count(weight_map, INDEX_NAME)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX_NAME}: tensor {shown(name)} is in {shown(str(file))}, wanted a .safetensors file"
            )
    found: dict[str, TensorLocation] = {}
    for file in dict.fromkeys(weight_map.values()):
        path = inside(directory, file)
        if not path.exists():
            raise CheckpointError(
                f"{INDEX_NAME} names {shown(file)}, which is not there", hint="finish the download, then try again"
            )
        for name, location in read_header(path).items():
            if weight_map.get(name) != file:
                placed = weight_map.get(name)
                said = f"puts it in {shown(placed)}" if placed else "does not name it"
                raise CheckpointError(f"{shown(file)}: holds tensor {shown(name)}, but {INDEX_NAME} {said}")
            found[name] = location
    for name, file in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{shown(file)}: tensor {shown(name)} is missing, {INDEX_NAME} puts it there")
    return found


def _entries(header: dict[str, Any], where: str) -> Iterator[tuple[TensorSpec, int, int]]:
    for name, entry in header.items():
        here = f"{where}: tensor {shown(name)}"
        if not name or len(name) > MAX_NAME_CHARACTERS:
            raise CheckpointError(f"{here}: a name of {len(name)} characters, wanted 1 to {MAX_NAME_CHARACTERS}")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{here}: wanted exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{here}: dtype {shown(str(dtype), 40)} is unknown (know {', '.join(DTYPE_BYTES)})")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_natural(n) for n in shape):
            raise CheckpointError(
                f"{here}: shape {shown(str(shape), 40)} is not a list of up to {MAX_DIMENSIONS} sizes"
            )
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
            raise CheckpointError(f"{here}: data_offsets {shown(str(offsets), 40)} is not a pair of sizes")
        start, end = offsets
        wanted = tensor_bytes(dtype, tuple(shape))
        if end - start != wanted:
            raise CheckpointError(f"{here}: {end - start} bytes of data, but {dtype} {shape} takes {wanted}")
        yield TensorSpec(name, dtype, tuple(shape)), start, end


def _check_count(tensors: Mapping[str, Any], where: str) -> None:
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(tensors)} tensors, more than any model has ({MAX_TENSORS})")


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_metadata(metadata: Any, where: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is not an object of text")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a checkpoint stores it: name, safetensors dtype (`F16`, `BF16`, `F32`, `I32`, `U8`, ...), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # as torch and configurations call them
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor of safetensors dtype `dtype`."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


SAMPLE_BYTES = 4096  # of each tensor; a fine-tuned model differs in all of them


def fingerprint(directory: Path) -> str:
    """`sampled_sha256` of a directory's tensors, by which a model is known again."""
    return sampled_sha256(checkpoint_tensors(directory))


def sampled_sha256(tensors: Mapping[str, TensorLocation], before: bytes = b"") -> str:
    """SHA-256 over `before`, and name, dtype, shape and first bytes of each tensor, by name: the same however files are
    cut.
    """
    import hashlib

    digest = hashlib.sha256(before)
    for name in sorted(tensors):
        location = tensors[name]
        digest.update(f"{name} {location.spec.dtype} {list(location.spec.shape)}\n".encode())
        with open_regular(location.file) as file:
            file.seek(location.start)
            digest.update(file.read(min(SAMPLE_BYTES, location.end - location.start)))
    return digest.hexdigest()
