"""Hidden states of every token stream of a job, spilled, saved and restored.

`calibration` runs through the quantized layers on the calibration tokens, `original` through the 16-bit ones on the
first windows of these.
`reference` runs through the 16-bit layers and `quantized` through the quantized ones, on the evaluation tokens.
`float32` (only when computing in a narrower type) is the reference again in float32, for the noise floor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenq.checkpoint.reader import SLICE_ROWS, Checkpoint
from qwenq.errors import CheckpointError
from qwenq.io.durable import file_sha256
from qwenq.io.safetensors import read_header
from qwenq.io.tensors import read_into, write_shard
from qwenq.pipeline.preflight import NOISE_WINDOWS, SPILL_BYTES, scratch_width

Convert = Callable[[str, torch.Tensor], torch.Tensor]
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Streams:
    """Hidden states entering the next layer, each [windows, tokens, hidden]; `scratch` is flat working space."""

    states: dict[str, torch.Tensor]
    scratch: torch.Tensor

    def without_calibration(self) -> Streams:
        """What the drift is read from, after the last layer: the rest of the memory can go."""
        kept = {name: states for name, states in self.states.items() if name not in ("calibration", "original")}
        return Streams(kept, self.scratch.new_empty(0))

    def save(self, path: Path) -> str:
        """Write all states at `path`; returns the file's SHA-256."""
        return write_shard(path, self.states)

    def restore(self, path: Path, sha256: str) -> bool:
        """Read states that `save` wrote; False, with nothing changed, when the file is missing or damaged."""
        if not path.is_file() or file_sha256(path) != sha256:
            return False
        locations = read_header(path)
        if {n: t.shape for n, t in self.states.items()} != {n: loc.spec.shape for n, loc in locations.items()}:
            return False
        for name, location in locations.items():
            read_into(path, location.start, self.states[name])
        return True


def new_streams(
    source: Checkpoint,
    calibration_NT: torch.Tensor | None,
    evaluation_NT: torch.Tensor,
    *,
    dtype: torch.dtype,
    calibration_dtype: torch.dtype = torch.float32,
    original_windows: int = 0,
    spill_directory: Path,
    spill_bytes: int = SPILL_BYTES,
    convert: Convert = lambda name, tensor: tensor,
) -> Streams:
    """Embed the tokens. Without calibration tokens there is no calibration stream (evaluation of two checkpoints).

    convert: what the writer does to the stored embedding, which the calibration and quantized streams read.
    """
    spec = source.spec
    wanted: dict[str, tuple[torch.Tensor, torch.dtype]] = {}
    if calibration_NT is not None:
        wanted["calibration"] = (calibration_NT, calibration_dtype)
        if original_windows:
            wanted["original"] = (calibration_NT[:original_windows], calibration_dtype)
    wanted["reference"] = (evaluation_NT, dtype)
    wanted["quantized"] = (evaluation_NT, dtype)
    if dtype != torch.float32:
        wanted["float32"] = (evaluation_NT[:NOISE_WINDOWS], torch.float32)
    scratch = 0 if calibration_NT is None else calibration_NT.numel() * scratch_width(spec)
    total = sum(ids.numel() * spec.hidden_size * kind.itemsize for ids, kind in wanted.values())
    spill = total + scratch * calibration_dtype.itemsize > spill_bytes
    states = {
        name: _allocate((*ids.shape, spec.hidden_size), kind, spill_directory / f".qwenq-{name}" if spill else None)
        for name, (ids, kind) in wanted.items()
    }
    pairs = {name: (states[name], ids) for name, (ids, _) in wanted.items()}
    written = [name for name in pairs if name in ("calibration", "quantized")]
    embed(source, {name: pair for name, pair in pairs.items() if name not in written})
    embed(source, {name: pairs[name] for name in written}, convert)
    space = _allocate((scratch,), calibration_dtype, spill_directory / ".qwenq-scratch" if spill else None)
    return Streams(states, space)


def embed(
    source: Checkpoint,
    targets: dict[str, tuple[torch.Tensor, torch.Tensor]],
    convert: Convert = lambda name, tensor: tensor,
) -> None:
    """Fill each (states, ids) pair with the embeddings of its tokens; raises CheckpointError for non-finite rows.

    The table is read by slices of the vocabulary, never held whole.
    """
    vocab = source.tensors[_EMBEDDING].spec.shape[0]
    windows = [pair for states, ids in targets.values() for pair in zip(states, ids, strict=True)]
    for start in range(0, vocab, SLICE_ROWS):
        stop = min(start + SLICE_ROWS, vocab)
        here = [(h_TH, ids_T, (ids_T >= start) & (ids_T < stop)) for h_TH, ids_T in windows]
        here = [each for each in here if bool(each[2].any())]
        table = convert(_EMBEDDING, source.read_slice(_EMBEDDING, start, stop)) if here else None
        for h_TH, ids_T, held_T in here:
            assert table is not None
            h_TH[held_T] = table[ids_T[held_T] - start].to(h_TH.dtype)
    for states, _ in targets.values():
        if not bool(torch.isfinite(states).all()):
            raise CheckpointError(
                f"{source.tensors[_EMBEDDING].file}: {_EMBEDDING} holds a NaN or an infinity",
                hint="the download may be damaged: compare its SHA-256 with the repository's",
            )


def _allocate(shape: Sequence[int], dtype: torch.dtype, spill: Path | None) -> torch.Tensor:
    size = 1
    for dim in shape:
        size *= dim
    if spill is None or size == 0:
        return torch.empty(*shape, dtype=dtype)
    spill.unlink(missing_ok=True)
    with open(spill, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # a full disk is an error here, not a crash later
    return torch.from_file(str(spill), shared=True, size=size, dtype=dtype).view(*shape)
