"""Hidden states of a rank's windows of a job: embedded, sent through layers, spilled, saved and restored.

`calibration` run through the quantized layers on the calibration tokens, `original` through the 16-bit ones on the
first windows of these.
`reference` run through the 16-bit layers and `quantized` through the quantized ones, on the evaluation tokens: float32,
whatever the layers compute in, which halves the noise floor of bfloat16 (reports/LOG.md).
`float32` (only when computing in a narrower type) are the reference again in float32, for the noise floor.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.manifest import SCRATCH_PREFIX
from qwenq.checkpoint.reader import Checkpoint, row_slices
from qwenq.errors import JobError
from qwenq.io.durable import file_sha256, write_synced
from qwenq.io.safetensors import TensorSpec, encode_header, read_header
from qwenq.io.tensors import DTYPE_NAMES, raw_bytes, read_into
from qwenq.machine import free_disk
from qwenq.model.layer import Network
from qwenq.pipeline.config import NOISE_WINDOWS, SPILL_BYTES
from qwenq.pipeline.preflight import scratch_width
from qwenq.pipeline.ranks import ALONE, Ranks
from qwenq.pipeline.shares import NO_WINDOWS, Share
from qwenq.pipeline.workers import Workers
from qwenq.units import format_gb

Convert = Callable[[str, torch.Tensor], torch.Tensor]
LayerState = dict[str, torch.Tensor]  # parameters of a layer by relative name
THROUGH_SOURCE = ("float32", "reference", "original")
AS_WRITTEN = ("calibration", "quantized")
MASSIVE = 50.0  # times the median mean square of a window's states: massive activations (Sun et al. 2024)
MASSIVE_WINDOWS, MASSIVE_TOKENS = 2, 128  # that they are looked for in, in the first third of the layers


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states entering the next layer, each [windows, tokens, hidden]; `scratch` is flat working space.

    shares: which of the job's windows these are, by name.
    """

    states: dict[str, torch.Tensor]
    shares: Mapping[str, Share]
    scratch: torch.Tensor

    def without_calibration(self) -> HiddenStates:
        """The states that the divergence is read from, after the last layer; the rest of the memory can go."""
        kept = {name: states for name, states in self.states.items() if name not in ("calibration", "original")}
        return HiddenStates(kept, self.shares, self.scratch.new_empty(0))

    def save(self, path: Path, ranks: Ranks = ALONE) -> str:
        """Have rank 0 write the states of all windows at `path`, in the job's order; the file's SHA-256 there."""
        header, order = encode_header(self._specs)

        def chunks(put: Callable[[Any], None]) -> None:
            put(header)
            for name in order:
                for rank, place in self.shares[name].places:
                    part = self._part(name, rank, place, ranks)
                    ranks.send(part, rank, 0)
                    put(raw_bytes(part.cpu()))

        if ranks.first:
            return write_synced(path, chunks)
        chunks(lambda data: None)
        return ""

    def restore(self, path: Path, sha256: str, ranks: Ranks = ALONE) -> bool:
        """Read states that `save` wrote, on rank 0; False, with nothing changed, when they are missing or damaged."""
        if not ranks.from_first(lambda: self._is_whole(path, sha256)):
            return False
        locations = read_header(path) if ranks.first else {}
        for name in sorted(self.states):
            at = locations[name].start if ranks.first else 0
            for rank, place in self.shares[name].places:
                part = self._part(name, rank, place, ranks)
                if ranks.first:
                    here = part if part.device.type == "cpu" else torch.empty_like(part, device="cpu")
                    read_into(path, at, here)
                    at += part.nbytes
                    if here is not part:
                        part.copy_(here)
                ranks.send(part, 0, rank)
        return True

    @property
    def _specs(self) -> dict[str, TensorSpec]:
        """States of all ranks' windows."""
        shape = {name: (self.shares[name].count, *states.shape[1:]) for name, states in self.states.items()}
        return {name: TensorSpec(name, DTYPE_NAMES[t.dtype], shape[name]) for name, t in self.states.items()}

    def _is_whole(self, path: Path, sha256: str) -> bool:
        if not path.is_file() or file_sha256(path) != sha256:
            return False
        return {name: location.spec for name, location in read_header(path).items()} == self._specs

    def _part(self, name: str, rank: int, place: slice, ranks: Ranks) -> torch.Tensor:
        """A rank's windows at `place` on that rank, room for them on others."""
        states = self.states[name]
        return states[place] if rank == ranks.rank else states.new_empty(place.stop - place.start, *states.shape[1:])


@dataclass(frozen=True)
class LayerRunner:
    """Sends hidden states through a layer, those of each name by their workers; names without workers stay as they are.

    shares: which of the job's windows they are, by name.
    """

    states: Mapping[str, torch.Tensor]
    shares: Mapping[str, Share]
    workers: Mapping[str, Workers]

    def advance(self, state: LayerState, *names: str) -> None:
        """Send hidden states `names`, those there are, through the layer of these parameters, in place."""
        for name in self._present(names):
            workers = self.workers[name]
            workers.fill(state)
            workers.run_layer(self.states[name], self.shares[name])
            workers.release()

    def replay(
        self, layer: int, source: Callable[[int], LayerState], written: Callable[[int], LayerState]
    ) -> None:
        """Send all hidden states through `layer`, of the source or as written; what none run through is not read."""
        for read, names in ((source, THROUGH_SOURCE), (written, AS_WRITTEN)):
            if present := self._present(names):
                self.advance(read(layer), *present)

    def _present(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.states and name in self.workers]


@dataclass(frozen=True)
class TokenSets:
    """Tokens of a job, int64 [windows, tokens], the dtypes of their hidden states, and a rank's share of either."""

    evaluation_NT: torch.Tensor
    dtype: torch.dtype
    evaluation: Share
    calibration_NT: torch.Tensor | None = None  # none where two checkpoints are compared
    calibration_dtype: torch.dtype = torch.float32
    calibration: Share = NO_WINDOWS
    corrected: Share = NO_WINDOWS  # of calibration, what runs through the 16-bit layers too


def embed_tokens(
    source: Checkpoint,
    tokens: TokenSets,
    directory: Path,
    convert: Convert = lambda name, tensor: tensor,
    gpu: torch.device | None = None,
    written: Checkpoint | None = None,
) -> HiddenStates:
    """Hidden states entering the first layer; beyond SPILL_BYTES they lie in `directory`, in files without a name.

    convert: what the writer does to the stored embedding, which calibration and quantized hidden states begin with.
    written: the embedding as it was written, where reading that back is quicker, or the only way.
    gpu: that those of the calibration tokens are kept on, with their scratch.
    Raises JobError where the disk has no room for these files.
    """
    spec, calibration_NT = source.spec, tokens.calibration_NT
    shares: dict[str, Share] = {}
    wanted: dict[str, tuple[torch.Tensor, torch.dtype]] = {}

    def want(name: str, ids_NT: torch.Tensor, share: Share, dtype: torch.dtype) -> None:
        wanted[name], shares[name] = (ids_NT[share.windows], dtype), share

    if calibration_NT is not None:
        want("calibration", calibration_NT, tokens.calibration, tokens.calibration_dtype)
        if tokens.corrected.count:
            want("original", calibration_NT, tokens.corrected, tokens.calibration_dtype)
    want("reference", tokens.evaluation_NT, tokens.evaluation, torch.float32)
    want("quantized", tokens.evaluation_NT, tokens.evaluation, torch.float32)
    if tokens.dtype != torch.float32:
        want("float32", tokens.evaluation_NT, tokens.evaluation.up_to(NOISE_WINDOWS), torch.float32)
    scratch = wanted["calibration"][0].numel() * scratch_width(spec) if "calibration" in wanted else 0
    on_gpu = ("calibration", "original") if gpu else ()
    total = sum(ids.numel() * spec.hidden_size * t.itemsize for name, (ids, t) in wanted.items() if name not in on_gpu)
    needed = total + (0 if gpu else scratch * tokens.calibration_dtype.itemsize)
    spill = directory if needed > SPILL_BYTES else None
    if spill and needed > (free := free_disk(spill)):
        raise JobError(
            f"{spill.absolute()}: hidden states need {format_gb(needed)} of disk, {format_gb(free)} are free",
            hint="free some space, or fewer windows (-n)",
        )

    def allocate(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if gpu and name in (*on_gpu, "scratch"):
            return torch.empty(*shape, dtype=dtype, device=gpu)
        return _allocate(shape, dtype, spill)

    states = {name: allocate(name, (*ids.shape, spec.hidden_size), kind) for name, (ids, kind) in wanted.items()}
    pairs = {name: (states[name], ids) for name, (ids, _) in wanted.items()}
    embed(source, {name: pair for name, pair in pairs.items() if name not in AS_WRITTEN})
    as_written = {name: pair for name, pair in pairs.items() if name in AS_WRITTEN}
    embed(source, as_written, convert) if written is None else embed(written, as_written)
    return HiddenStates(states, shares, allocate("scratch", (scratch,), tokens.calibration_dtype))


def embed(
    source: Checkpoint,
    targets: dict[str, tuple[torch.Tensor, torch.Tensor]],
    convert: Convert = lambda name, tensor: tensor,
) -> None:
    """Fill each (states, ids) pair with the embeddings of its tokens; raises CheckpointError for non-finite rows, and
    where all are zeros.

    The table is read by slices of the vocabulary, never held whole.
    """
    name = source.spec.embedding_tensor
    windows = [pair for states, ids in targets.values() for pair in zip(states, ids, strict=True)]
    for start, stop in row_slices(source.tensors[name].spec.shape[0]):
        here = [(h_TH, ids_T, (ids_T >= start) & (ids_T < stop)) for h_TH, ids_T in windows]
        here = [each for each in here if bool(each[2].any())]
        # of a file that one rank reads for all of them every rank gets every slice
        table = convert(name, source.read_slice(name, start, stop)) if here or source.relay else None
        for h_TH, ids_T, held_T in here:
            assert table is not None
            h_TH[held_T] = table[ids_T[held_T] - start].to(h_TH)
    for states, _ in targets.values():
        source.refuse_non_finite(name, states)
        if len(states):
            source.refuse_blank(name, states)


def massive_ratio(h_BTH: torch.Tensor) -> torch.Tensor:
    """Mean square of each token's hidden states over the median of its window's, float32 [B, T, 1]."""
    power_BT1 = h_BTH.float().square().mean(-1, keepdim=True)
    return power_BT1 / power_BT1.median(1, keepdim=True).values


@torch.inference_mode()
def find_massive(source: Checkpoint, network: Network, ids_NT: torch.Tensor) -> tuple[int, float] | None:
    """The first layer after which a token has massive activations, counted from 1, and its `massive_ratio`; None where
    none has in the first third of the layers.

    ids_NT: tokens, int64 [windows, tokens], the first of which are read.
    """
    ids_NT = ids_NT[:MASSIVE_WINDOWS, :MASSIVE_TOKENS]
    h_NTH = torch.empty(*ids_NT.shape, source.spec.hidden_size)
    embed(source, {"": (h_NTH, ids_NT)})
    h_NTH = h_NTH.to(network.device)
    for layer in range(math.ceil(source.spec.num_hidden_layers / 3)):
        network.fill(source.finite_layer_state(layer))
        h_NTH = network.forward(h_NTH)
        network.release()
        if (most := float(massive_ratio(h_NTH).max())) > MASSIVE:
            return layer + 1, most
    return None


def _allocate(shape: Sequence[int], dtype: torch.dtype, spill: Path | None) -> torch.Tensor:
    """A tensor in memory, or in a file in the directory `spill` that goes with it, however the process ends."""
    size = math.prod(shape)
    if spill is None or size == 0:
        return torch.empty(*shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=spill, prefix=SCRATCH_PREFIX) as file:
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # a full disk is an error here, not a crash later
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(*shape)
