"""GGUF containers: metadata, and which tensor lies in which bytes of which file. No weights, no trust in the input.

A file (version 3, little-endian): `GGUF`, u32 version, u64 tensors, u64 metadata entries; the entries (key, u32 kind,
value; a text is a u64 length and UTF-8); the tensors (name, u32 number of dimensions, u64 sizes from the innermost on,
u32 type, u64 offset); padding to `general.alignment`; then the tensors' data in the same order, each padded likewise.
Offsets count from where the data begins. A split model has its metadata in the first file, and `split.no`,
`split.count` and `split.tensors.count` in each. Format: ggml's docs/gguf.md; what is refused, gguf.cpp refuses too.
"""

from __future__ import annotations

import array
import math
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwenq.errors import CheckpointError
from qwenq.io.json import LFS_POINTER, inside, open_regular, shown
from qwenq.io.safetensors import MAX_NAME_CHARACTERS, MAX_TENSORS, TensorLocation, TensorSpec

ENDING = ".gguf"
ALIGNMENT = 32  # bytes, where `general.alignment` says no other
MAX_HEADER_BYTES = 32_000_000  # the largest vocabularies with their merges have 15 MB
MAX_ENTRIES = 10_000  # of metadata
MAX_ELEMENTS = 2_000_000  # of all arrays: the largest vocabularies with types and merges have 800,000
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
MAX_NUMBERS = 1 << 16  # of a tensor that is read with the metadata
_MAGIC, _VERSIONS = b"GGUF", (2, 3)  # version 2 differs in nothing that a little-endian file has
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


# ---------------------------------------------------------------------- types


class BlockType(NamedTuple):
    """A GGML type: its number in files, and the values and bytes of a block. Rows are whole blocks."""

    name: str
    number: int
    values: int
    n_bytes: int


TYPES = {
    name: BlockType(name, number, values, n_bytes)
    for name, number, values, n_bytes in (
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("BF16", 30, 1, 2), ("F64", 28, 1, 8),
        ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8),
        ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40), ("IQ4_NL", 20, 32, 18), ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18),
        ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
        ("IQ1_S", 19, 256, 50), ("IQ1_M", 29, 256, 56), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74),
        ("IQ2_S", 22, 256, 82), ("IQ3_XXS", 18, 256, 98), ("IQ3_S", 21, 256, 110), ("IQ4_XS", 23, 256, 136),
        ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66),
    )
}  # fmt: skip
_BY_NUMBER = {found.number: found for found in TYPES.values()}


@dataclass(frozen=True)
class BlockTensor(TensorSpec):
    """A tensor of a GGUF file; `dtype` is its GGML type, `shape` has the innermost dimension last, as torch has it."""

    @property
    def nbytes(self) -> int:
        found = TYPES[self.dtype]
        return math.prod(self.shape) // found.values * found.n_bytes


# ---------------------------------------------------------------------- metadata

Value = str | bool | int | float | list[Any]


@dataclass(frozen=True)
class Number:
    """A number to be written as `kind`: u8, i8, u16, i16, u32, i32, u64, i64, f32 or f64."""

    kind: str
    value: int | float


_KINDS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "u64": 10, "i64": 11, "f64": 12}
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}  # struct's


@dataclass(frozen=True)
class GGUFFile:
    """An opened model: metadata of its first file, tensors of all, by their GGUF names. No bytes of weights."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorLocation]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """The model that begins in the file `path`; CheckpointError, naming file and place, for what does not add up.

        Takes 32 MB of headers a file and 2,000,000 elements of metadata at most, however large they say they are.
        """
        path = Path(path)
        first = _read(path)
        count = first.whole("split.count", 1)
        named = _SPLIT_NAME.fullmatch(path.name)
        where = shown(path.name)
        if count == 1:
            return cls(first.metadata, first.tensors)
        if named is None or count != int(named["count"]):
            raise CheckpointError(
                f"{where}: split.count says {count} files, its name does not",
                hint=f"files of a split are named {split_name('NAME', 0, max(1, min(count, 99999)))}",
            )
        if int(named["number"]) != 1 or first.whole("split.no", 0) != 0:
            raise CheckpointError(
                f"{where}: file {first.whole('split.no', 0) + 1} of {count}",
                hint=f"give the first one, {shown(split_name(named['stem'], 0, count))}",
            )
        return cls(first.metadata, _join(path, named["stem"], count, first))

    def numbers(self, name: str) -> list[float]:
        """All values of an F32 tensor; CheckpointError for another type, or more than MAX_NUMBERS values."""
        location = self.tensors[name]
        count = (location.end - location.start) // 4
        if location.spec.dtype != "F32" or count > MAX_NUMBERS:
            raise CheckpointError(
                f"{shown(location.file.name)}: {name} is {location.spec.dtype} {list(location.spec.shape)}, "
                f"wanted F32 and at most {MAX_NUMBERS} values"
            )
        with open_regular(location.file) as file:
            file.seek(location.start)
            data = file.read(4 * count)
        if len(data) != 4 * count:
            raise CheckpointError(f"{shown(location.file.name)}: changed while it was being read")
        return list(struct.unpack(f"<{count}f", data))


def check_file(path: Path) -> None:
    """Raise CheckpointError unless one file, of a split any, has the size that its header says."""
    _read(path)


def is_gguf(path: Path | str) -> bool:
    """Whether a path is that of a GGUF file, by its ending and without opening it."""
    return Path(path).suffix.lower() == ENDING and os.path.isfile(path)


def gguf_model(path: Path) -> Path | None:
    """The GGUF model at a path: that file, or the only one of a directory without a config.json; of a split its first.

    None for anything else; CheckpointError for a directory with several models.
    """
    if is_gguf(path):
        return path
    if not os.path.isdir(path) or (path / "config.json").exists():
        return None
    names = ((each, _SPLIT_NAME.fullmatch(each.name)) for each in path.glob("*" + ENDING))
    found = [each for each, named in names if named is None or int(named["number"]) == 1]
    if len(found) > 1:
        names_found = ", ".join(sorted(each.name for each in found))
        raise CheckpointError(
            f"{shown(str(path))}: {len(found)} GGUF models ({shown(names_found, 200)})", hint="name one of the files"
        )
    return found[0] if found and is_gguf(found[0]) else None


def split_name(stem: str, number: int, count: int) -> str:
    """`NAME-00001-of-00003.gguf` for the first file, `number` 0."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}{ENDING}"


def is_split(path: Path) -> bool:
    """Whether a path is called like a file of a split."""
    return _SPLIT_NAME.fullmatch(path.name) is not None


def split_stem(path: Path) -> str:
    """`NAME` of NAME.gguf and of NAME-00001-of-00003.gguf."""
    named = _SPLIT_NAME.fullmatch(path.name)
    return named["stem"] if named else path.stem


# ---------------------------------------------------------------------- reading


class _Header(NamedTuple):
    where: str
    metadata: dict[str, Value]
    tensors: dict[str, TensorLocation]

    def whole(self, key: str, default: int) -> int:
        value = self.metadata.get(key, default)
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{self.where}: {key} is {shown(repr(value), 40)}, wanted a whole number")
        return value


def _join(path: Path, stem: str, count: int, first: _Header) -> dict[str, TensorLocation]:
    """Tensors of a split whose first file is read."""
    total, tensors = first.whole("split.tensors.count", 0), dict(first.tensors)
    for number in range(1, count):
        name = split_name(stem, number, count)
        other = inside(path.parent, name)
        if not other.exists():
            raise CheckpointError(f"{shown(path.name)}: {shown(name)} is not there", hint="finish the download")
        part = _read(other)
        for key, wanted in (("split.no", number), ("split.count", count), ("split.tensors.count", total)):
            if part.metadata.get(key) != wanted:
                said = shown(repr(part.metadata.get(key)), 40)
                raise CheckpointError(f"{part.where}: {key} is {said}, wanted {wanted}", hint="files from two splits?")
        for tensor in part.tensors:
            if tensor in tensors:
                raise CheckpointError(f"{part.where}: tensor {shown(tensor)} is in an earlier file too")
        tensors |= part.tensors
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{part.where}: more than {MAX_TENSORS} tensors with the files before")
    if len(tensors) != total:
        raise CheckpointError(f"{first.where}: split.tensors.count is {total}, its files hold {len(tensors)}")
    return tensors


def _read(path: Path) -> _Header:
    where = shown(path.name)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, MAX_HEADER_BYTES))
    if data[:4] != _MAGIC:
        hint = "this is a git-lfs pointer, not the weights: run `git lfs pull`" if data.startswith(LFS_POINTER) else ""
        reason = f"it begins with {shown(repr(data[:4]))}" if data else "it is empty"
        raise CheckpointError(f"{where}: not a GGUF file ({reason})", hint=hint)
    at = _Cursor(data, where, size)
    at.position = 4
    version = at.number("I", "version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise CheckpointError(
            f"{where}: GGUF {'of big-endian machines' if swapped else f'version {version}'}, "
            f"wanted little-endian of version {_VERSIONS[-1]}",
            hint="llama.cpp's own converter writes it",
        )
    n_tensors, n_entries = at.number("Q", "tensor count"), at.number("Q", "metadata count")
    if n_tensors > MAX_TENSORS:
        raise CheckpointError(f"{where}: {n_tensors} tensors, more than any model has ({MAX_TENSORS})")
    if n_entries > MAX_ENTRIES:
        raise CheckpointError(f"{where}: {n_entries} metadata entries, more than any model has ({MAX_ENTRIES})")
    metadata = _metadata(at, n_entries)
    return _Header(where, metadata, _tensors(at, n_tensors, path, _alignment(metadata, where)))


class _Cursor:
    """Position in the bytes of a header; CheckpointError for what would go beyond them."""

    def __init__(self, data: bytes, where: str, size: int) -> None:
        self.data, self.where, self.size, self.position = data, where, size, 0
        self.elements = 0  # of arrays so far

    def take(self, count: int, what: str) -> int:
        """The position of the next `count` bytes, which are passed over."""
        start = self.position
        if count > len(self.data) - start:
            if start + count > self.size:
                raise CheckpointError(
                    f"{self.where}: {what} takes {count} bytes from byte {start} on, the file has {self.size}",
                    hint="the download may have stopped early; compare its size with the repository's",
                )
            raise CheckpointError(
                f"{self.where}: {what} ends at byte {start + count}: a header of more than {MAX_HEADER_BYTES:,} bytes "
                "is refused"
            )
        self.position = start + count
        return start

    def number(self, code: str, what: str) -> Any:
        """One number of struct's code, little-endian."""
        start = self.take(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def text(self, what: str) -> str:
        return self.texts(1, what)[0]

    def texts(self, count: int, what: str) -> list[str]:
        """So many texts: a vocabulary has 300,000 with its merges, so nothing is called for each that can be spared."""
        found, data, length_at = [], self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = self.position + 8
            if start > len(data) or start + (length := length_at(data, self.position)[0]) > len(data):
                self.take(self.number("Q", what), what)
            try:
                found.append(data[start : start + length].decode("utf-8"))
            except UnicodeDecodeError:
                raise CheckpointError(f"{self.where}: {what} is not UTF-8 at byte {start}") from None
            self.position = start + length
        return found

    def name(self, what: str) -> str:
        """A key's or a tensor's name."""
        found = self.text(what)
        if not found or len(found) > MAX_NAME_CHARACTERS:
            raise CheckpointError(
                f"{self.where}: {what} has {len(found)} characters, wanted 1 to {MAX_NAME_CHARACTERS}"
            )
        return found


def _metadata(at: _Cursor, count: int) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for number in range(count):
        key = at.name(f"key {number} of the metadata")
        if key in found:
            raise CheckpointError(f"{at.where}: metadata {shown(key)} appears twice")
        found[key] = _value(at, f"metadata {shown(key)}")
    return found


def _value(at: _Cursor, what: str) -> Value:
    kind = at.number("I", what)
    if kind == _TEXT:
        return at.text(what)
    if kind == _ARRAY:
        return _array(at, what)
    if kind not in _CODES:
        raise CheckpointError(f"{at.where}: {what} is of kind {kind}, which is unknown")
    value: int | float = at.number(_CODES[kind], what)
    return _as_bool(value, at, what) if kind == _BOOL else value


def _array(at: _Cursor, what: str) -> list[Any]:
    kind, count = at.number("I", what), at.number("Q", what)
    if kind == _ARRAY:
        raise CheckpointError(f"{at.where}: {what} is an array of arrays: refused")
    if kind != _TEXT and kind not in _CODES:
        raise CheckpointError(f"{at.where}: {what} is an array of kind {kind}, which is unknown")
    if at.elements + count > MAX_ELEMENTS:
        raise CheckpointError(
            f"{at.where}: {what} has {count} elements, more than the {MAX_ELEMENTS:,} of all arrays that a model needs"
        )
    at.elements += count
    if kind == _TEXT:
        return at.texts(count, what)
    start = at.take(count * struct.calcsize("<" + _CODES[kind]), what)
    numbers = array.array(_CODES[kind], at.data[start : at.position])
    if sys.byteorder == "big":
        numbers.byteswap()
    return [_as_bool(value, at, what) for value in numbers] if kind == _BOOL else numbers.tolist()


def _as_bool(value: int | float, at: _Cursor, what: str) -> bool:
    if value not in (0, 1):
        raise CheckpointError(f"{at.where}: {what} is a truth value of {value}, wanted 0 or 1")
    return bool(value)


def _alignment(metadata: Mapping[str, Value], where: str) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if type(found) is not int or not 0 < found <= MAX_ALIGNMENT or found & (found - 1):
        raise CheckpointError(
            f"{where}: general.alignment is {shown(repr(found), 40)}, wanted a power of two up to {MAX_ALIGNMENT}"
        )
    return found


def _tensors(at: _Cursor, count: int, path: Path, alignment: int) -> dict[str, TensorLocation]:
    """Tensors by name, in file order, each where the one before it ends."""
    entries: dict[str, tuple[BlockTensor, int]] = {}
    for number in range(count):
        name = at.name(f"name of tensor {number}")
        if name in entries:
            raise CheckpointError(f"{at.where}: tensor {shown(name)} appears twice")
        entries[name] = _tensor(at, name)
    base = _padded(at.position, alignment)
    found, expected = {}, 0
    for name, (spec, offset) in entries.items():
        here = f"{at.where}: tensor {shown(name)}"
        if offset != expected:
            raise CheckpointError(
                f"{here} starts at data byte {offset}, wanted {expected} (hole, overlap or a wrong alignment)"
            )
        start, end = base + offset, base + offset + spec.nbytes
        if end > at.size:
            raise CheckpointError(
                f"{here} ends at byte {end}, the file at {at.size}", hint="the download may have stopped early"
            )
        expected = _padded(offset + spec.nbytes, alignment)
        found[name] = TensorLocation(spec, path, start, end)
    last = max((location.end for location in found.values()), default=at.position)
    if at.size > max(_padded(last, alignment), base):
        raise CheckpointError(f"{at.where}: {at.size - last} bytes after the last tensor belong to no tensor")
    return found


def _tensor(at: _Cursor, name: str) -> tuple[BlockTensor, int]:
    what = f"tensor {shown(name)}"
    dimensions = at.number("I", what)
    if dimensions > MAX_DIMENSIONS:
        raise CheckpointError(f"{at.where}: {what} has {dimensions} dimensions, wanted at most {MAX_DIMENSIONS}")
    sizes = tuple(at.number("Q", what) for _ in range(dimensions))
    number, offset = at.number("I", what), at.number("Q", what)
    if number not in _BY_NUMBER:
        raise CheckpointError(
            f"{at.where}: {what} is of type {number}, which is unknown", hint=f"know {', '.join(TYPES)}"
        )
    values = 1
    for size in sizes:
        values *= size
        if values >= 1 << 62:
            raise CheckpointError(f"{at.where}: {what} has the shape {list(sizes)}, more values than any file holds")
    spec = BlockTensor(name, _BY_NUMBER[number].name, sizes[::-1])
    block = TYPES[spec.dtype].values
    if (sizes[0] if sizes else 1) % block:
        raise CheckpointError(
            f"{at.where}: {what} has rows of {sizes[0] if sizes else 1} values, {spec.dtype} has blocks of {block}"
        )
    return spec, offset


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


# ---------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Layout:
    """A file to be written: `header`, then each tensor's bytes at its offset, zeros between, up to `size` bytes."""

    header: bytes
    offsets: Mapping[str, int]  # of each tensor, from the beginning of the file, in the order they follow
    size: int


def layout(metadata: Mapping[str, Any], tensors: Sequence[TensorSpec]) -> Layout:
    """The layout of one file with these tensors in this order; `dtype` of each is a GGML type's name.

    Values of metadata: text, truth values, lists of one kind, Number, and plain numbers, which become u32 (i32 below 0
    and in lists, u64 above) and f32.
    """
    blocks = [BlockTensor(t.name, t.dtype, t.shape) for t in tensors]
    parts = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(blocks), len(metadata))]
    for key, value in metadata.items():
        parts += [_encode_text(key), _encode_value(key, value)]
    offset, starts = 0, {}
    for tensor in blocks:
        starts[tensor.name] = offset
        parts.append(_encode_text(tensor.name))
        sizes = tensor.shape[::-1]
        parts.append(struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, TYPES[tensor.dtype].number, offset))
        offset = _padded(offset + tensor.nbytes, ALIGNMENT)
    header = b"".join(parts)
    header += bytes(_padded(len(header), ALIGNMENT) - len(header))
    return Layout(header, {name: len(header) + start for name, start in starts.items()}, len(header) + offset)


def split_layouts(
    stem: str, metadata: Mapping[str, Any], tensors: Sequence[TensorSpec], split_bytes: int | None = None
) -> dict[str, Layout]:
    """Layouts by file name: STEM.gguf, or files whose tensors have at most `split_bytes` bytes, though at least one.

    The metadata is in the first of them, as llama.cpp's own gguf-split has it.
    """
    parts: list[list[TensorSpec]] = [[]]
    used = 0
    for tensor in tensors:
        size = _padded(BlockTensor(tensor.name, tensor.dtype, tensor.shape).nbytes, ALIGNMENT)
        if split_bytes is not None and parts[-1] and used + size > split_bytes:
            parts.append([])
            used = 0
        parts[-1].append(tensor)
        used += size
    if len(parts) == 1:
        return {stem + ENDING: layout(metadata, tensors)}
    files = {}
    for number, part in enumerate(parts):
        split = {
            "split.no": Number("u16", number),
            "split.count": Number("u16", len(parts)),
            "split.tensors.count": Number("i32", len(tensors)),
        }
        files[split_name(stem, number, len(parts))] = layout({**(metadata if number == 0 else {}), **split}, part)
    return files


def _encode_text(text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        raise CheckpointError(f"{shown(text)!r} is no text that a GGUF file can hold") from None
    return struct.pack("<Q", len(data)) + data


def _encode_value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _encode_text(value)
    if isinstance(value, list | tuple):
        return struct.pack("<I", _ARRAY) + b"".join(_encode_array(key, value))
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    number = value if isinstance(value, Number) else _number(key, value)
    kind = _KINDS[number.kind]
    return struct.pack("<I" + _CODES[kind], kind, number.value)


def _encode_array(key: str, values: Sequence[Any]) -> Iterator[bytes]:
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        raise ValueError(f"metadata {key}: a list of {' and '.join(sorted(k.__name__ for k in kinds))}")
    if not values or isinstance(values[0], str):
        yield struct.pack("<IQ", _TEXT, len(values))
        yield from map(_encode_text, values)
        return
    kind = {bool: _BOOL, int: _KINDS["i32"], float: _KINDS["f32"]}[type(values[0])]
    yield struct.pack(f"<IQ{len(values)}{_CODES[kind]}", kind, len(values), *values)


def _number(key: str, value: Any) -> Number:
    if isinstance(value, float):
        return Number("f32", value)
    if type(value) is not int:
        raise ValueError(f"metadata {key}: no value for a {type(value).__name__}")
    return Number("i32" if value < 0 else "u32" if value < 1 << 32 else "u64", value)

