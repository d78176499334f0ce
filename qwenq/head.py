"""Final norm and head for two streams at once: chunks of tokens by slices of vocabulary, logits in float32.

The head is read slice by slice from its file, so neither a vocabulary of 152,064 nor an 8,192-wide head is ever held
whole in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qwenq.checkpoint import Checkpoint
from qwenq.errors import CheckpointError
from qwenq.metrics import DriftMeter, compare_logits
from qwenq.results import DriftReport
from qwenq.stream import Network
from qwenq.tokens import TokenWindows

_LOGIT_BYTES = 1 << 28  # of one stream's chunk
_SLICE_BYTES = 1 << 26  # of the head in float32


@dataclass(frozen=True)
class HeadWeights:
    """Where a stream's final norm and head come from; `convert` is what the writer does to stored tensors."""

    checkpoint: Checkpoint
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda t: t

    @property
    def norm(self) -> torch.Tensor:
        return self.convert(self.checkpoint.read("model.norm.weight"))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Head rows start to stop, float32 [rows, hidden]."""
        return self.convert(self.checkpoint.read_slice(self.checkpoint.head_name, start, stop)).float()


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
        parts = compare_streams(network, *pair, evaluation.ids[:few]).parts
        floor = float(torch.cat([p.kl for p in parts]).double().mean())
    meter = compare_streams(
        network, (reference, states["reference"]), (quantized, states["quantized"]), evaluation.ids
    )
    return meter.report(
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
) -> DriftMeter:
    """Drift of `quantized` from `reference`: each stream its head and its last hidden states [windows, tokens, hidden].

    Vocabularies may differ by padding only; the common part is compared.
    """
    vocab = min(reference[0].checkpoint.spec.vocab_size, quantized[0].checkpoint.spec.vocab_size)
    if int(ids_NT.max()) >= vocab:
        raise CheckpointError(f"token id {int(ids_NT.max())} is outside the common vocabulary of {vocab}")
    targets = ids_NT[:, 1:].reshape(-1).to(network.device)
    states = [_predicting(network, weights, h) for weights, h in (reference, quantized)]
    shared = reference[0] == quantized[0]
    chunk = max(16, min(4096, _LOGIT_BYTES // (4 * vocab)))
    step = max(256, _SLICE_BYTES // (4 * network.spec.hidden_size))
    meter = DriftMeter()
    for start in range(0, len(targets), chunk):
        part = slice(start, min(start + chunk, len(targets)))
        logits = [torch.empty(part.stop - start, vocab, dtype=torch.float32, device=network.device) for _ in states]
        for row in range(0, vocab, step):
            end = min(row + step, vocab)
            w_ref = reference[0].rows(row, end).to(network.device)
            w_q = w_ref if shared else quantized[0].rows(row, end).to(network.device)
            for out, x, w_VH in zip(logits, states, (w_ref, w_q), strict=True):
                torch.matmul(x[part], w_VH.T, out=out[:, row:end])
        meter.add(compare_logits(logits[0], logits[1], targets[part]))
    return meter


def _predicting(network: Network, weights: HeadWeights, h_NTH: torch.Tensor) -> torch.Tensor:
    """Normed states of all positions that predict a following token, float32 [windows * (tokens - 1), hidden]."""
    norm = weights.norm
    normed = [network.final_norm(window[None, :-1].to(network.device), norm)[0].float() for window in h_NTH]
    return torch.cat(normed)
