"""A checkpoint, 16-bit or quantized: its config, its audit, and its tensors read one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.contents import (
    PACKED,
    is_unused,
    read_config,
    read_headers,
    refuse_quantized_head,
    refuse_undescribed,
    saved_wrapped,
)
from qwenq.checkpoint.manifest import SourceFiles, Stamp, changed, files_in, stamp
from qwenq.errors import CheckpointError
from qwenq.formats.base import Format, Quantization, Recipe, get_format, read_quantization_config
from qwenq.formats.gguf import dequantize_blocks
from qwenq.io.gguf import is_gguf
from qwenq.io.json import open_regular, shown
from qwenq.io.safetensors import TensorLocation, TensorSpec, sampled_sha256
from qwenq.io.tensors import TORCH_DTYPES, all_finite, raw_bytes
from qwenq.model.metadata import paired_heads
from qwenq.model.spec import LinearSpec, ModelSpec
from qwenq.solver.grid import QTensor
from qwenq.solver.rotation import Rotation

FLOAT_DTYPES = ("F16", "BF16", "F32")
SLICE_ROWS = 4096  # of the vocabulary: rows of the embedding and the head that are read at a time
_WRITTEN_OUT = 1 << 22  # values of a GGUF tensor dequantized at a time
_CHUNK = 1 << 20  # bytes: hashed while they are in the processor's cache
Relay = Callable[[Path, int, int], torch.Tensor]  # file, start, end -> uint8


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; every tensor the model needs is present and of the right shape."""

    directory: Path  # or the GGUF file, of a split the first one
    config: dict[str, Any]
    spec: ModelSpec
    tensors: dict[str, TensorLocation]
    quantized: Quantization | None
    ignored: tuple[str, ...]  # stored tensors that the model does not use
    notes: tuple[str, ...] = ()  # a line for each thing that is read otherwise than config.json says
    opened: Mapping[str, Stamp] = field(default_factory=dict, compare=False)  # files as they were before they were read
    hashed: SourceFiles | None = field(default=None, compare=False)  # files that reads are compared with
    relay: Relay | None = field(default=None, compare=False)  # who reads the files, where that is not this process
    device: str | torch.device = field(default="cpu", compare=False)  # that packed weights are dequantized on
    rotation: Rotation | None = None  # of the hidden states that its weights are read for

    @property
    def recipe(self) -> Recipe:
        return self.quantized.recipe(self.spec) if self.quantized else Recipe(None)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The shard files, sorted by name."""
        return tuple(sorted({location.file for location in self.tensors.values()}))

    @property
    def folder(self) -> Path:
        """The directory that its files are in."""
        return self.directory

    @property
    def own_files(self) -> tuple[str, ...]:
        """Names of the files that hold its tensors, and its config.json."""
        return (*(path.name for path in self.files), "config.json")

    def hash_files(self, others: Iterable[str]) -> Checkpoint:
        """This checkpoint with its files, and `others` beside them, hashed: what is read from now on is compared.

        Raises CheckpointError for a file that changed since it was opened, or is another by the time it is read.
        """
        cuts: dict[Path, set[int]] = {path: set() for path in self.files}
        for name, location in self.tensors.items():
            cuts[location.file] |= {location.start, location.end}
            if name in (self.spec.embedding_tensor, self.spec.head_tensor):
                step = SLICE_ROWS * (location.spec.nbytes // location.spec.shape[0])
                cuts[location.file] |= set(range(location.start, location.end, step))
        names = [*self.own_files, *others]
        hashed = SourceFiles.read(self.folder, names, cuts)
        self.refuse_changed(names)
        return replace(self, hashed=hashed)

    def refuse_changed(self, names: Iterable[str] | None = None) -> None:
        """Raise CheckpointError for the first file that was written to or replaced since the checkpoint was opened.

        names: of the files; without any, its own.
        """
        for name in names or self.own_files:
            path = self.folder / name
            if self.opened and self.opened.get(name) != stamp(path):
                raise changed(path)

    def sampled(self) -> str:
        """SHA-256 over its configuration and the name, dtype, shape and first bytes of each tensor: two that differ
        are other models, or damaged.
        """
        return sampled_sha256(self.tensors, json.dumps(self.config, sort_keys=True).encode())

    def read(self, name: str) -> torch.Tensor:
        """One tensor as stored, a private copy on the CPU; CheckpointError when its bytes are not those hashed."""
        location = self.tensors[name]
        data = self._bytes(location.file, location.start, location.end)
        return self._turned(name, data.view(TORCH_DTYPES[location.spec.dtype]).reshape(location.spec.shape))

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of a stored matrix, as stored."""
        return self._turned(name, self._rows(name, start, stop).view(TORCH_DTYPES[self.tensors[name].spec.dtype]))

    def _turned(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What was read of a tensor; of a rotated checkpoint embedding, last norm and head in float32."""
        spec = self.spec
        if self.rotation is None or name not in (spec.embedding_tensor, spec.norm_tensor, spec.head_tensor):
            return tensor
        if name == spec.norm_tensor:
            return torch.ones(len(tensor))
        norm_H = replace(self, rotation=None).read(spec.norm_tensor).float() if name == spec.head_tensor else None
        return self.rotation.turned(tensor, norm_H)

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Their bytes, uint8 [rows, bytes of a row]."""
        location = self.tensors[name]
        width = location.spec.nbytes // location.spec.shape[0]
        data = self._bytes(location.file, location.start + start * width, location.start + stop * width)
        return data.view(stop - start, width)

    def read_packed(self, name: str) -> torch.Tensor:
        """One tensor of a quantized linear, as its format unpacks it."""
        return self.read(name)

    def _bytes(self, path: Path, start: int, end: int) -> torch.Tensor:
        """Bytes start to end of a file, uint8, copied before they are compared: what is used is what was hashed."""
        return self.relay(path, start, end) if self.relay else self.read_bytes(path, start, end, self.hashed)

    @staticmethod
    def read_bytes(path: Path, start: int, end: int, hashed: SourceFiles | None = None) -> torch.Tensor:
        """The same from the file itself; CheckpointError where they are not those hashed."""
        cuts = hashed.cuts[path] if hashed else None
        first, last = cuts.around(start, end) if cuts else (start, end)
        digest = cuts.state_at(first) if cuts else None
        data = torch.empty(last - first, dtype=torch.uint8)
        view = raw_bytes(data)
        with open_regular(path) as file:
            file.seek(first)
            for at in range(0, len(view), _CHUNK):
                piece = view[at : at + _CHUNK]
                if file.readinto(piece) != len(piece):
                    raise changed(path)
                if digest is not None:
                    digest.update(piece)
        if cuts and digest is not None and digest.digest() != cuts.state_at(last).digest():
            raise changed(path)
        return data[start - first : end - first]

    def linear(self, lin: LinearSpec) -> QTensor | torch.Tensor:
        """One linear as stored: codes and parameters where it is quantized on a grid, else its weight [out, in].

        That comes as stored from a 16-bit linear; else see `Format.unpack`. The bias is read by its name.
        """
        if self.quantized is None or (scheme := self.quantized.scheme_of(lin.name)) is None:
            return self.read(lin.name + ".weight")
        form = get_format(self.quantized.format)
        device = self.device if form.solved else "cpu"  # a library's own functions may not be built for another
        names = self.packed_names(lin)
        packed = {name.removeprefix(lin.name + "."): self.read_packed(name).to(device) for name in names}
        return form.unpack(packed, scheme, lin, self.quantized.version)

    def packed_names(self, lin: LinearSpec) -> list[str]:
        """Stored tensors that hold the weight of a quantized linear."""
        scheme = self.quantized.scheme_of(lin.name) if self.quantized else None
        if self.quantized is None or scheme is None:
            return []
        return [name for name in get_format(self.quantized.format).packed_names(scheme, lin) if name in self.tensors]

    def linear_weight(self, lin: LinearSpec) -> torch.Tensor:
        """Weight [out, in] of one linear: as stored when it is 16-bit, dequantized to float32 when packed."""
        found = self.linear(lin)
        if isinstance(found, QTensor):
            return found.dequantize()
        packed = self.quantized is not None and self.quantized.scheme_of(lin.name) is not None
        return found.float() if packed else found

    def layer_state(self, layer: int) -> dict[str, torch.Tensor]:
        """Parameters of decoder layer `layer`, under names relative to it, packed linears dequantized."""
        prefix = self.spec.layer_prefix(layer)
        linears = {lin.name: lin for lin in self.spec.layer_linears(layer)}
        state = {}
        for tensor in self.spec.layer_tensors(layer):
            module, _, part = tensor.name.rpartition(".")
            is_weight = module in linears and part == "weight"
            value = self.linear_weight(linears[module]) if is_weight else self.read(tensor.name)
            state[tensor.name.removeprefix(prefix)] = _zero_padded(value, tensor.shape)
        if self.rotation is not None:
            self.rotation.turn_layer(state, self.spec.architecture)
        return state

    def finite_layer_state(self, layer: int) -> dict[str, torch.Tensor]:
        """`layer_state`; CheckpointError, naming it, for a tensor that is not finite, and for a weight of zeros."""
        prefix, state = self.spec.layer_prefix(layer), self.layer_state(layer)
        for name, tensor in state.items():
            self.refuse_non_finite(prefix + name, tensor)
            if name.endswith(".weight"):
                self.refuse_blank(prefix + name, tensor)
        return state

    def refuse_non_finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which is what was read of tensor `name`; CheckpointError where it holds a NaN or an infinity."""
        if not all_finite(tensor):
            raise self._damaged(name, "holds a NaN or an infinity")
        return tensor

    def refuse_blank(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, all or the first rows of a weight; CheckpointError where it holds nothing but zeros, as a file
        does that was made at its full size and not filled.
        """
        if not bool(tensor.any()):
            raise self._damaged(name, "holds nothing but zeros")
        return tensor

    def _damaged(self, name: str, what: str) -> CheckpointError:
        where = self.tensors[name].file if name in self.tensors else self.directory
        hint = "the download may be damaged: compare its SHA-256 with the repository's"
        return CheckpointError(f"{where}: {name} {what}", hint=hint)

    def padded(self, intermediate_size: int) -> Checkpoint:
        """The same function with a wider FFN: rows added to gate and up, and columns to down, are zero.

        `layer_state` fills them in; files and `read` are as they were.
        """
        return replace(
            self,
            spec=replace(self.spec, intermediate_size=intermediate_size),
            config=self.config | {"intermediate_size": intermediate_size},
        )

    def rotated(self) -> Checkpoint:
        """The same function of rotated hidden states: `layer_state`, and `read` of what is outside the layers, give
        the weights for it, in float32; files are as they were.
        """
        return replace(self, rotation=Rotation(self.spec.hidden_size))

    def prefetch(self, layer: int) -> None:
        """Ask the system to read a layer's bytes into its page cache meanwhile; nothing where it cannot be asked."""
        if not hasattr(os, "posix_fadvise"):
            return
        prefix = self.spec.layer_prefix(layer)
        ranges = [(t.file, t.start, t.end - t.start) for name, t in self.tensors.items() if name.startswith(prefix)]
        for path in {path for path, _, _ in ranges}:
            with open_regular(path) as file:
                for _, start, size in (each for each in ranges if each[0] == path):
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def dtype_of(self, name: str) -> str:
        return self.tensors[name].spec.dtype


class GGUFCheckpoint(Checkpoint):
    """The same of a GGUF file or a split: rows of q and k are put in order, values of blocks are float32 when read."""

    @property
    def folder(self) -> Path:
        return self.directory.parent

    @property
    def own_files(self) -> tuple[str, ...]:
        return tuple(path.name for path in self.files)

    def hash_files(self, others: Iterable[str]) -> Checkpoint:
        """The same with its files hashed; what lies beside a GGUF file is not its own."""
        return super().hash_files(())

    def refuse_changed(self, names: Iterable[str] | None = None) -> None:
        """Raise CheckpointError for the first of its files that was written to or replaced since it was opened."""
        super().refuse_changed()

    def dtype_of(self, name: str) -> str:
        """Dtype of a tensor; F16 for one stored in blocks, the dtype its values have when not packed."""
        dtype = super().dtype_of(name)
        return dtype if dtype in TORCH_DTYPES else "F16"

    def read(self, name: str) -> torch.Tensor:
        """One tensor: as stored, or float32 of blocks."""
        return self._values(name, self.read_packed(name).to(self.device))

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of embedding or head, like `read`."""
        return self._values(name, self._rows(name, start, stop).to(self.device))

    def read_packed(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, uint8 [rows, bytes of a row]."""
        location = self.tensors[name]
        data = self._bytes(location.file, location.start, location.end)
        heads = paired_heads(self.spec, name)
        if heads:  # rows 2 i and 2 i + 1 of a head are rows i and i + head_dim / 2 of it
            data = data.view(heads, self.spec.head_dim // 2, 2, -1).transpose(1, 2).contiguous()
        return data.view(location.spec.shape[0], -1)

    def linear_weight(self, lin: LinearSpec) -> torch.Tensor:
        """Weight [out, in] of one linear, without the codes of all of it beside."""
        return self.read(lin.name + ".weight")

    def _values(self, name: str, data_RB: torch.Tensor) -> torch.Tensor:
        spec = self.tensors[name].spec
        if spec.dtype in TORCH_DTYPES:
            return data_RB.view(TORCH_DTYPES[spec.dtype]).reshape(len(data_RB), *spec.shape[1:])
        values_RI = torch.empty(len(data_RB), spec.shape[1], device=data_RB.device)
        step = max(1, _WRITTEN_OUT // spec.shape[1])
        for start in range(0, len(data_RB), step):
            values_RI[start : start + step] = dequantize_blocks(spec.dtype, data_RB[start : start + step])
        return values_RI


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read config and headers of a checkpoint and check every needed tensor; raises CheckpointError in one line.

    directory: or a GGUF file, of a split the first one.
    """
    directory = Path(directory)
    opened = _stamps(directory)
    found = read_headers(directory)
    spec, config, stored = found.spec, found.config, found.tensors
    quantized = None
    if config.get("quantization_config"):
        said = directory if is_gguf(directory) else directory / "config.json"
        quantized = read_quantization_config(config["quantization_config"], str(said))
        refuse_quantized_head(spec, stored, str(directory))
    else:
        refuse_undescribed(stored, directory)
    recipe = quantized.recipe(spec) if quantized else Recipe(None)
    recipe.check(spec)
    form, in_order = get_format(recipe.format), quantized is None or not quantized.sorted_columns
    needed = {t.name: t for t in recipe.tensors(spec) if t.name in stored or form.lacks(stored, t.name) or not in_order}
    _audit(directory, needed, stored, form, spec.head_tensor)
    ignored = tuple(sorted(set(stored) - set(needed)))
    for name in ignored:
        if not is_unused(spec, stored[name].spec, quantized=quantized is not None):
            raise CheckpointError(
                f"{stored[name].file.name}: tensor {name} has no place in a {spec.model_type} model",
                hint="the config and the weights are of different models, or this is an unsupported variant",
            )
    kind = GGUFCheckpoint if is_gguf(directory) else Checkpoint
    whole = kind(directory, config, spec, stored, quantized, ignored, found.notes, opened)
    for name in ignored:
        if quantized and name.endswith(".bias") and bool(whole.read(name).any()):
            raise CheckpointError(
                f"{stored[name].file.name}: {name} is stored and not zero; a {spec.model_type} model as config.json "
                "describes it has no such bias",
                hint="other engines would leave it out or add it: take a checkpoint whose config.json says",
            )
    return replace(whole, tensors={name: stored[name] for name in needed})


def row_slices(rows: int) -> list[tuple[int, int]]:
    """Rows of the embedding or the head, SLICE_ROWS at a time: the first of each, and the one behind the last."""
    return [(start, min(start + SLICE_ROWS, rows)) for start in range(0, rows, SLICE_ROWS)]


def joined_slices(slices: Iterable[torch.Tensor], rows: int) -> torch.Tensor:
    """Such slices as one tensor [rows, ...]; beside it there is never more than one of them."""
    whole, start = torch.empty(0), 0
    for piece in slices:
        if start == 0:
            whole = piece.new_empty(rows, *piece.shape[1:])
        whole[start : start + len(piece)] = piece
        start += len(piece)
    return whole


def _stamps(directory: Path) -> dict[str, Stamp]:
    """Every file of a directory, or GGUF file beside that one, as it is now; empty where there is none."""
    alone = is_gguf(directory)
    folder = directory.parent if alone else directory
    if not folder.is_dir():
        return {}
    files = folder.glob("*" + directory.suffix) if alone else files_in(folder)
    found = {path.relative_to(folder).as_posix(): stamp(path) for path in files}
    return {name: file for name, file in found.items() if file is not None}


def open_source(directory: Path) -> Checkpoint:
    """Like `open_checkpoint`, for a source to quantize: a directory, 16- or 32-bit floats only."""
    if is_gguf(Path(directory)):
        raise CheckpointError(
            f"{directory}: a GGUF file", hint="quantize from the original 16-bit checkpoint, a directory or a hub name"
        )
    config = read_config(directory)
    quantization = config.get("quantization_config")
    if not quantization:
        return open_checkpoint(directory)
    read_headers(directory)  # knows where the setting is wrong
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    raise CheckpointError(
        f"{directory}: already quantized ({shown(str(method or 'unknown method'), 40)})",
        hint="quantize from the original 16-bit checkpoint",
    )


def _audit(
    directory: Path, needed: dict[str, TensorSpec], stored: Mapping[str, TensorLocation], form: Format, head: str
) -> None:
    missing = [name for name in needed if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{directory}: tensor {missing[0]}{more} is in no shard",
            hint=_where_it_went(missing, stored, head),
        )
    for name, want in needed.items():
        have = stored[name].spec
        if not form.same_shape(have, want):
            raise CheckpointError(
                f"{stored[name].file.name}: {name} has shape {list(have.shape)}, config.json wants {list(want.shape)}",
                hint="`qwenq inspect` compares config and tensors",
            )
        wanted = FLOAT_DTYPES if want.dtype in FLOAT_DTYPES else (want.dtype,)
        if have.dtype not in wanted:
            raise CheckpointError(
                f"{stored[name].file.name}: {name} has dtype {have.dtype}, wanted {' or '.join(wanted)}",
                hint="FP8 and integer sources are not 16-bit sources",
            )


def _where_it_went(missing: list[str], stored: Mapping[str, TensorLocation], head: str) -> str:
    """Hint for tensors that no shard has."""
    if missing == [head]:
        return (
            "a model saved without its head (an embedding model?) predicts no tokens; if the head is the embedding, "
            "config.json needs tie_word_embeddings true"
        )
    if prefix := saved_wrapped(stored, missing):
        return (
            f"the tensors are there under {shown(prefix, 60)}..., as a wrapper (torch.compile, DDP, FSDP, PEFT) saves "
            "them: save the model inside it"
        )
    module, _, part = missing[0].rpartition(".")
    packed = [f"{module}{ending}" for ending in PACKED if f"{module}{ending}" in stored]
    if packed or (part != "weight" and f"{module}.weight" in stored):
        return (
            f"{(packed or [module + '.weight'])[0]} is there: quantization_config is wrong about which linears are "
            "quantized (dynamic, ignore, modules_to_not_convert)"
        )
    adapted = next((name for name in stored if ".base_layer." in name or ".lora_" in name), None)
    if adapted:
        return f"{shown(adapted, 60)} is of a PEFT adapter: merge it into its base model (merge_and_unload) first"
    return "download the missing shard again"


def _zero_padded(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor` in the corner of zeros of `shape`; itself when that is its shape."""
    if tensor.shape == shape:
        return tensor
    wide = tensor.new_zeros(shape)
    wide[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide
