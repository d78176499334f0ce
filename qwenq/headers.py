"""Safetensors headers: which tensor lies in which bytes of which file. Reads no weights, trusts no byte of the input.

A file is an 8-byte little-endian length n, n bytes of JSON, then tensor data. The JSON maps each name to its dtype,
shape and `data_offsets`, relative to the data; `__metadata__` maps text to text. Format: safetensors' README, "Format".
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import CheckpointError, printable
from qwenq.spec import DTYPE_BYTES, TensorSpec, tensor_bytes

MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit
MAX_DIMENSIONS = 16
_MAX_NAME_BYTES = 255  # what file systems take
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
            f"{shown(str(directory))}: not a directory", hint="give the folder that holds config.json"
        )
    if _exists(directory / SINGLE_NAME):
        return read_header(inside(directory, SINGLE_NAME))
    if _exists(directory / INDEX_NAME):
        return _indexed_tensors(directory)
    files = sorted(p.name for p in directory.iterdir() if p.suffix == ".safetensors")
    if len(files) == 1:
        return read_header(inside(directory, files[0]))
    if files:
        raise CheckpointError(
            f"{shown(str(directory))}: {len(files)} safetensors files but no {INDEX_NAME}",
            hint="the index says which tensor is in which file; download it beside them",
        )
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED_ENDINGS)
    if pickled:
        raise CheckpointError(
            f"{shown(str(directory))}: only pickled weights ({shown(pickled[0])}), which can run code: refused",
            hint="convert them to safetensors on a machine you can lose, or take a repository that has safetensors",
        )
    raise CheckpointError(f"{shown(str(directory))}: no safetensors file", hint=f"wanted {SINGLE_NAME} or {INDEX_NAME}")


def read_header(path: Path) -> dict[str, TensorLocation]:
    """Tensors of one safetensors file by name, in file order; CheckpointError unless every byte is accounted for."""
    path = Path(path)
    size = _regular_size(path)
    where = shown(path.name)
    with open(path, "rb") as file:
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


def read_object(path: Path, limit: int = 10_000_000) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes: no repeated keys, no NaN; CheckpointError otherwise."""
    size = _regular_size(path)
    if size > limit:
        raise CheckpointError(f"{shown(path.name)}: {size} bytes, more than the {limit} such a file can need")
    return parse_object(path.read_bytes(), shown(path.name))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no repeated keys, no NaN or infinity, no absurd nesting."""

    def refuse_constant(token: str) -> Any:
        raise CheckpointError(f"{where}: JSON holds {token}, which is no number of JSON's")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{where}: {shown(key)} appears twice")
            found[key] = value
        return found

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse_constant(shown(number, 40))

    hooks: dict[str, Any] = {"object_pairs_hook": unique, "parse_constant": refuse_constant, "parse_float": finite}
    try:
        value = json.loads(text.decode("utf-8"), **hooks)
    except RecursionError:
        raise CheckpointError(f"{where}: JSON nested too deep") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{where}: not JSON ({error})") from None
    if rb"\ud" in text.lower():  # half of a surrogate pair can be written in JSON, and nowhere else
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{where}: JSON holds half of a surrogate pair, which is no text") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: JSON is a {type(value).__name__}, wanted an object")
    return value


def inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`; CheckpointError if the name, or a link, leads out of it.

    One exception: the hub's cache keeps `<repo>/snapshots/<revision>/name` as a link into `<repo>/blobs`.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"file name {shown(name)} leads out of the checkpoint's directory: refused")
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        raise CheckpointError(f"file name {shown(name)} is too long: refused")
    path, root = directory / name, directory.resolve()
    target = path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if target.parent not in allowed:
        raise CheckpointError(f"{shown(name)} links to a file outside the checkpoint's directory: refused")
    return path


def model_name(directory: Path) -> str:
    """`owner/name` for a snapshot in the hub's cache, else the directory's own name."""
    place = directory.absolute()
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--") and repository.count("--") == 2:
        return repository.removeprefix("models--").replace("--", "/")
    return place.name


def shown(text: str, limit: int = 120) -> str:
    """Text from outside as one printable line of at most `limit` characters."""
    clean = printable(text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def _indexed_tensors(directory: Path) -> dict[str, TensorLocation]:
    index = read_object(inside(directory, INDEX_NAME), limit=MAX_HEADER_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME}: weight_map is missing or empty")
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


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_metadata(metadata: Any, where: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is not an object of text")


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _regular_size(path: Path) -> int:
    try:
        info = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{shown(str(path))}: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{shown(str(path))}: not a regular file")
    return info.st_size
