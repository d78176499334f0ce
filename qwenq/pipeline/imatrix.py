"""Importance matrices for `llama-quantize --imatrix`, from the calibration pass that a job makes anyway.

A GGUF file of llama.cpp's form: `general.type` is "imatrix"; of each linear it has `NAME.in_sum2`, float32 [in], the
sum over tokens of its squared inputs, and `NAME.counts`, float32 [1], the tokens. The sums are the diagonal of the
Hessian that GPTQ solves with, before channel scales are folded and tokens weighted. Format: llama.cpp's
tools/imatrix/imatrix.cpp (save_imatrix) and common/imatrix-loader.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenq.checkpoint.manifest import SCRATCH_PREFIX
from qwenq.checkpoint.reader import Checkpoint
from qwenq.errors import CheckpointError, JobError
from qwenq.io.durable import file_sha256, write_synced
from qwenq.io.gguf import GGUFFile, layout
from qwenq.io.safetensors import read_header
from qwenq.io.tensors import raw_bytes, read_into, spec_of, write_shard
from qwenq.model.architectures import Stage
from qwenq.model.layer import Network
from qwenq.model.metadata import gguf_names
from qwenq.model.spec import ModelSpec
from qwenq.pipeline.workers import PartSums, Workers
from qwenq.text.tokens import TokenWindows


class InputSquares:
    """Sums over tokens of the squared inputs of a layer's linears, by stage, as they are without channel scales."""

    def __init__(self, workers: Workers, spec: ModelSpec) -> None:
        self.sums = {s.name: PartSums(workers, spec.size(s.inputs)) for s in spec.architecture.stages}
        self._scales: dict[str, Tensor] = {}

    def add(self, stage: Stage, network: Network, x: Tensor) -> None:
        """Take in inputs [B, T, in] of a stage."""
        self.sums[stage.name].of(network).add_(x.float().square().sum((0, 1)))

    def divide(self, stage: Stage, scales_I: Tensor) -> None:
        """Inputs of a stage will come divided by these scales."""
        self._scales[stage.name] = scales_I

    def totals(self) -> dict[str, Tensor]:
        """float32 [in] by stage."""
        found = {name: sums.total() for name, sums in self.sums.items()}
        return {name: sums_I * self._scales[name].square() if name in self._scales else sums_I
                for name, sums_I in found.items()}  # fmt: skip


def check_imatrix(path: Path, spec: ModelSpec, *, resume: bool) -> None:
    """Raise JobError where no file can be made at `path`, CheckpointError for a model without GGUF names.

    A stopped job that goes on may have made the file already: then an importance matrix may be there, nothing else.
    """
    gguf_names(spec)
    if path.exists() and not (resume and _is_imatrix(path)):
        raise JobError(f"{path}: already exists", hint="choose another --save-imatrix, or delete it")
    if not path.absolute().parent.is_dir():
        raise JobError(f"{path}: no place for a file", hint="choose another --save-imatrix")


def _is_imatrix(path: Path) -> bool:
    try:
        return GGUFFile.open(path).metadata.get("general.type") == "imatrix"
    except CheckpointError:
        return False


def keep_layer(work: Path, layer: int, squares: Mapping[str, Tensor]) -> str:
    """Keep a layer's sums, float32 [in] by stage, in a job's directory until it is done; the file's SHA-256."""
    return write_shard(_kept(work, layer), {stage: sums_I.cpu() for stage, sums_I in squares.items()})


def is_kept(work: Path, layer: int, sha256: Any) -> bool:
    """Whether a layer's sums are in the job's directory, as they were when they had that SHA-256."""
    path = _kept(work, layer)
    return path.is_file() and file_sha256(path) == sha256


def write_imatrix(path: Path, work: Path, source: Checkpoint, calibration: TokenWindows) -> None:
    """Write the importance matrix of a model, the sums of whose layers are kept in `work`."""
    windows, length = calibration.ids.shape
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [calibration.text],
        "imatrix.chunk_count": windows,
        "imatrix.chunk_size": length,
    }
    counts_1 = torch.tensor([windows * length], dtype=torch.float32)
    names, found = gguf_names(source.spec), dict[str, Tensor]()
    for layer in range(source.spec.num_hidden_layers):
        squares = _read_layer(work, layer)
        for stage in source.spec.architecture.stages:
            for linear in stage.linears:
                weight = f"{source.spec.layer_prefix(layer)}{linear.path}.weight"
                name, columns = names[weight], source.tensors[weight].spec.shape[1]  # without those of padding
                found[f"{name}.in_sum2"] = squares[stage.name][:columns]
                found[f"{name}.counts"] = counts_1
    write_gguf(path, metadata, found)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write small tensors as a GGUF file, synced and renamed into place."""
    planned = layout(metadata, [spec_of(name, tensor) for name, tensor in tensors.items()])

    def produce(put: Callable[[Any], None]) -> None:
        put(planned.header)
        end = len(planned.header)
        for name, tensor in tensors.items():
            data = raw_bytes(tensor)
            put(bytes(planned.offsets[name] - end))
            put(data)
            end = planned.offsets[name] + len(data)
        put(bytes(planned.size - end))

    write_synced(path, produce)


def _kept(work: Path, layer: int) -> Path:
    return work / f"{SCRATCH_PREFIX}imatrix-{layer}.safetensors"


def _read_layer(work: Path, layer: int) -> dict[str, Tensor]:
    path, found = _kept(work, layer), {}
    for name, location in read_header(path).items():
        found[name] = torch.empty(location.spec.shape, dtype=torch.float32)
        read_into(path, location.start, found[name])
    return found
