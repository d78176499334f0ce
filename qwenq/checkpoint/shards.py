"""The files of a quantized checkpoint: which tensors each holds, byte for byte, from shapes alone; and their writing.

It is written in parts: the embedding, each layer, then last norm and head. Torch is imported where that happens.
"""

from __future__ import annotations

import hashlib
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.formats.base import Recipe, get_format
from qwenq.io.durable import file_sha256, new_file, sync_directory
from qwenq.io.gguf import BlockTensor, Layout, split_layouts
from qwenq.io.json import open_regular
from qwenq.io.safetensors import TensorLocation, TensorSpec, encode_header
from qwenq.model.metadata import gguf_names, paired_heads
from qwenq.model.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 24  # bytes


class StoredFiles(ABC):
    """A checkpoint's files. Its parts are numbered: 0 is the embedding, then come the layers, then norm and head."""

    parts: Sequence[list[TensorSpec]]
    whole = False  # nothing but the files is needed to run the model: no config.json, no tokenizer's files

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """File names, in order."""

    @property
    def model_file(self) -> str:
        """The file to run the model by, where nothing but the files is needed; empty where the directory is."""
        return self.names[0] if self.whole else ""

    @property
    @abstractmethod
    def file_bytes(self) -> int:
        """Bytes of all files, headers included."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> Iterator[TensorSpec]:
        """All tensors, part by part."""
        return (tensor for part in self.parts for tensor in part)

    @abstractmethod
    def file_of(self, part: int) -> str:
        """The file that a part begins in."""

    @abstractmethod
    def begin(self, work: Path) -> None:
        """Make ready for the first part; what is there already stays."""

    @abstractmethod
    def write(self, work: Path, part: int, tensors: Mapping[str, Tensor]) -> str:
        """Write the tensors of a part durably; returns its SHA-256."""

    @abstractmethod
    def sha256(self, work: Path, part: int) -> str:
        """SHA-256 of a part as it lies there; empty where there is none."""

    @abstractmethod
    def locations(self, work: Path, part: int) -> dict[str, TensorLocation]:
        """Locations of a part's tensors once it is written; nothing is read."""

    @abstractmethod
    def hashes(self, work: Path, parts: Mapping[int, str]) -> dict[str, str]:
        """SHA-256 of every file, of the SHA-256 of parts."""


@dataclass(frozen=True)
class Shards(StoredFiles):
    """Safetensors files, one a part."""

    parts: Sequence[list[TensorSpec]]

    @cached_property
    def names(self) -> list[str]:
        return [f"model-{k:05d}-of-{len(self.parts):05d}.safetensors" for k in range(1, len(self.parts) + 1)]

    @property
    def file_bytes(self) -> int:
        return sum(map(shard_file_bytes, self.parts))

    def file_of(self, part: int) -> str:
        return self.names[part]

    def begin(self, work: Path) -> None:
        pass  # each part makes its file

    def write(self, work: Path, part: int, tensors: Mapping[str, Tensor]) -> str:
        from qwenq.io.tensors import write_shard

        return write_shard(work / self.names[part], tensors)

    def sha256(self, work: Path, part: int) -> str:
        path = work / self.names[part]
        return file_sha256(path) if path.is_file() else ""

    def locations(self, work: Path, part: int) -> dict[str, TensorLocation]:
        path, specs = work / self.names[part], {tensor.name: tensor for tensor in self.parts[part]}
        header, order = encode_header(specs)
        at, found = len(header), {}
        for name in order:
            found[name] = TensorLocation(specs[name], path, at, at + specs[name].nbytes)
            at = found[name].end
        return found

    def hashes(self, work: Path, parts: Mapping[int, str]) -> dict[str, str]:
        return {self.names[part]: sha256 for part, sha256 in parts.items()}

    @property
    def index(self) -> dict[str, Any]:
        """`model.safetensors.index.json`."""
        return encode_index(dict(zip(self.names, self.parts, strict=True)))


@dataclass(frozen=True)
class Beside:
    """Contents of a container besides the recipe's tensors."""

    name: str = "model"  # of the file
    metadata: Mapping[str, Any] = field(default_factory=dict)
    split_bytes: int | None = None
    others: Mapping[str, Sequence[float]] = field(default_factory=dict)  # further float32 tensors, by GGUF name


NOTHING = Beside()


@dataclass(frozen=True)
class GGUFFiles(StoredFiles):
    """One GGUF file, or those of a split: all offsets are known beforehand, and parts are written in their place."""

    parts: Sequence[list[TensorSpec]]  # under Hugging Face's names; dtypes are GGML types
    spec: ModelSpec
    beside: Beside
    whole = True

    @cached_property
    def _theirs(self) -> dict[str, str]:
        """GGUF names by Hugging Face's."""
        return gguf_names(self.spec)

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        named = [replace(tensor, name=self._theirs[tensor.name]) for tensor in self.tensors]
        others = [BlockTensor(name, "F32", (len(values),)) for name, values in self.beside.others.items()]
        return split_layouts(self.beside.name, self.beside.metadata, [*named, *others], self.beside.split_bytes)

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        """File and offset of each tensor, by its GGUF name."""
        return {n: (file, at) for file, made in self._layouts.items() for n, at in made.offsets.items()}

    @property
    def names(self) -> list[str]:
        return list(self._layouts)

    @property
    def file_bytes(self) -> int:
        return sum(made.size for made in self._layouts.values())

    def _place(self, tensor: TensorSpec) -> tuple[str, int]:
        return self._places[self._theirs[tensor.name]]

    def file_of(self, part: int) -> str:
        return self._place(self.parts[part][0])[0]

    def begin(self, work: Path) -> None:
        for name, made in self._layouts.items():
            fixed = {0: made.header}  # what is known beforehand, by offset
            for other, values in self.beside.others.items():
                if other in made.offsets:
                    fixed[made.offsets[other]] = struct.pack(f"<{len(values)}f", *values)
            path = work / name
            if path.is_file() and path.stat().st_size == made.size and _holds(path, fixed):
                continue
            with new_file(path) as file:
                os.posix_fallocate(file.fileno(), 0, made.size)  # a full disk is an error here
                for offset, data in fixed.items():
                    file.seek(offset)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(work)

    def write(self, work: Path, part: int, tensors: Mapping[str, Tensor]) -> str:
        from qwenq.io.tensors import raw_bytes

        digest = hashlib.sha256()
        for name, group in self._by_file(part).items():
            with open(work / name, "r+b", opener=_no_link) as file:
                for tensor in group:
                    data = raw_bytes(in_pairs(self.spec, tensor.name, tensors[tensor.name]))
                    if len(data) != tensor.nbytes:
                        raise ValueError(f"{tensor.name}: {len(data)} bytes, wanted {tensor.nbytes}")
                    file.seek(self._place(tensor)[1])
                    for start in range(0, len(data), _CHUNK):
                        file.write(data[start : start + _CHUNK])
                        digest.update(data[start : start + _CHUNK])
                file.flush()
                os.fsync(file.fileno())
        return digest.hexdigest()

    def sha256(self, work: Path, part: int) -> str:
        digest = hashlib.sha256()
        for name, group in self._by_file(part).items():
            path = work / name
            if not path.is_file():
                return ""
            with open_regular(path) as file:
                for tensor in group:
                    file.seek(self._place(tensor)[1])
                    for start in range(0, tensor.nbytes, _CHUNK):
                        digest.update(file.read(min(_CHUNK, tensor.nbytes - start)))
        return digest.hexdigest()

    def locations(self, work: Path, part: int) -> dict[str, TensorLocation]:
        found = {}
        for tensor in self.parts[part]:
            name, start = self._place(tensor)
            found[tensor.name] = TensorLocation(tensor, work / name, start, start + tensor.nbytes)
        return found

    def hashes(self, work: Path, parts: Mapping[int, str]) -> dict[str, str]:
        return {name: file_sha256(work / name) for name in self.names}

    def _by_file(self, part: int) -> dict[str, list[TensorSpec]]:
        files: dict[str, list[TensorSpec]] = {}
        for tensor in self.parts[part]:
            files.setdefault(self._place(tensor)[0], []).append(tensor)
        return files


def _holds(path: Path, fixed: Mapping[int, bytes]) -> bool:
    """Whether a file has these bytes at these offsets."""
    with open_regular(path) as file:
        return all(file.seek(offset) == offset and file.read(len(data)) == data for offset, data in fixed.items())


def _no_link(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def in_pairs(spec: ModelSpec, name: str, tensor: Tensor) -> Tensor:
    """Rows as a GGUF file has them: some families' halves of a head are interleaved where they are rotated."""
    heads = paired_heads(spec, name)
    if not heads:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def stored_files(
    spec: ModelSpec, recipe: Recipe, dtype_of: Callable[[str], str], beside: Beside = NOTHING
) -> StoredFiles:
    """Files of a checkpoint by `recipe`; dtype_of gives the stored dtype of each tensor that is not quantized."""
    outer = list(recipe.outer_tensors(spec, dtype_of))
    layers = (list(recipe.layer_tensors(spec, k, dtype_of)) for k in range(spec.num_hidden_layers))
    parts = [outer[:1], *layers, outer[1:]]
    if not get_format(recipe.format).whole_file:
        return Shards(parts)
    blocks: list[list[TensorSpec]] = [[BlockTensor(t.name, t.dtype, t.shape) for t in part] for part in parts]
    return GGUFFiles(blocks, spec, beside)


def shard_file_bytes(tensors: list[TensorSpec]) -> int:
    """Size of the safetensors file that holds these tensors, as this project writes it."""
    return len(encode_header({t.name: t for t in tensors})[0]) + sum(t.nbytes for t in tensors)


def encode_index(files: Mapping[str, list[TensorSpec]]) -> dict[str, Any]:
    """`model.safetensors.index.json` for shard files and their tensors."""
    total = sum(t.nbytes for specs in files.values() for t in specs)
    weight_map = {t.name: file for file, specs in files.items() for t in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
