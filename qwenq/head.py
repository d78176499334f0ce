"""Final norm and head for two streams at once: slices of vocabulary by chunks of tokens, logits in float32.

The head is read from its file once, slice by slice: neither a vocabulary of 152,064 nor an 8,192-wide head in float32
makes a spike in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qwenq.checkpoint import Checkpoint
from qwenq.errors import CheckpointError
from qwenq.metrics import LogitComparison, TokenDrift, summarise
from qwenq.results import DriftReport
from qwenq.stream import Network
from qwenq.tokens import TokenWindows

_SLICE_ROWS = 4096  # of the vocabulary
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class HeadWeights:
    """Where a stream's final norm and head come from; `convert` is what the writer does to a stored tensor, by name."""

    checkpoint: Checkpoint
    convert: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor

    @property
    def norm(self) -> torch.Tensor:
        return self.convert("model.norm.weight", self.checkpoint.read("model.norm.weight"))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Head rows start to stop, float32 [rows, hidden]."""
        name = self.checkpoint.head_name
        return self.convert(name, self.checkpoint.read_slice(name, start, stop)).float()


def measure_drift(
    network: Network,
    reference: HeadWeights,
    quantized: HeadWeights,
    states: Mapping[str, torch.Tensor],
    evaluation: TokenWindows,
) -> DriftReport:
    """The drift report of streams `reference` and `quantized`, noise floor from stream `float32` where there is one."""
    floor = 0.0
    if "float32" in states:
        few = states["float32"].shape[0]
        pair = (reference, states["float32"]), (reference, states["reference"][:few])
        floor = float(compare_streams(network, *pair, evaluation.ids[:few]).kl.mean())
    return summarise(
        compare_streams(network, (reference, states["reference"]), (quantized, states["quantized"]), evaluation.ids),
        evaluation.ids.shape[0],
        noise_floor_kl=floor,
        text=evaluation.text,
        text_sha256=evaluation.sha256,
        compute_dtype=str(network.dtype).removeprefix("torch."),
        window_tokens=evaluation.ids.shape[1],
    )


def compare_streams(
    network: Network,
    reference: tuple[HeadWeights, torch.Tensor],
    quantized: tuple[HeadWeights, torch.Tensor],
    ids_NT: torch.Tensor,
) -> TokenDrift:
    """Drift of `quantized` from `reference`: each stream its head and its last hidden states [windows, tokens, hidden].

    Vocabularies may differ by padding only; the common part is compared.
    """
    vocab = min(reference[0].checkpoint.spec.vocab_size, quantized[0].checkpoint.spec.vocab_size)
    if int(ids_NT.max()) >= vocab:
        raise CheckpointError(f"token id {int(ids_NT.max())} is outside the common vocabulary of {vocab}")
    targets = ids_NT[:, 1:].reshape(-1).to(network.device)
    x_ref, x_q = (_predicting(network, weights, h) for weights, h in (reference, quantized))
    shared = reference[0] == quantized[0]
    comparison = LogitComparison(targets)
    for start in range(0, vocab, _SLICE_ROWS):
        end = min(start + _SLICE_ROWS, vocab)
        w_ref = reference[0].rows(start, end).to(network.device)
        w_q = w_ref if shared else quantized[0].rows(start, end).to(network.device)
        for first in range(0, len(targets), _CHUNK_TOKENS):
            part = slice(first, min(first + _CHUNK_TOKENS, len(targets)))
            comparison.add(part, start, x_ref[part] @ w_ref.T, x_q[part] @ w_q.T)
    return comparison.result()


def _predicting(network: Network, weights: HeadWeights, h_NTH: torch.Tensor) -> torch.Tensor:
    """Normed states of all positions that predict a following token, float32 [windows * (tokens - 1), hidden]."""
    norm = weights.norm
    normed = [network.final_norm(window[None, :-1].to(network.device), norm)[0].float() for window in h_NTH]
    return torch.cat(normed)
