"""Gradients of the model's own log likelihood at its last hidden states: what the KL of small changes follows from.

For a small change of the last hidden states, KL(p || p + dp) = 1/2 d' F d with F = E[g g'], g the gradient of
log p(y) for a label y drawn from the model itself (Fisher's information; Martens 2020, section 5). Labels of different
positions are independent, so the square of a sum over positions of g . d has the sum of their d' F d as its mean.
"""

from __future__ import annotations

import torch

from qwenq.head import HeadWeights
from qwenq.stream import Network

_SLICE_ROWS = 4096  # of the vocabulary
_CHUNK_TOKENS = 1024


def sampled_gradients(
    network: Network, head: HeadWeights, h_NTH: torch.Tensor, samples: int, seed: int
) -> torch.Tensor:
    """Gradients of log p(y) with respect to h, float32 [samples, N, T, H]; a label y per position and sample.

    h_NTH: hidden states leaving the last layer. The head is read twice, slice by slice of the vocabulary; labels are
    drawn by the largest of logit + Gumbel noise.
    """
    windows, tokens, hidden = h_NTH.shape
    norm = head.norm
    h_PH = h_NTH.reshape(-1, hidden).float().to(network.device)
    x_PH = network.final_norm(h_PH, norm)
    vocab = head.checkpoint.spec.vocab_size
    generator = torch.Generator().manual_seed(seed)
    log_total_P = torch.full((len(x_PH),), -torch.inf, device=network.device)
    best_SP = torch.full((samples, len(x_PH)), -torch.inf, device=network.device)
    label_SPH = torch.zeros(samples, len(x_PH), hidden, device=network.device)  # head row of the label
    for start in range(0, vocab, _SLICE_ROWS):
        w_VH = head.rows(start, min(start + _SLICE_ROWS, vocab)).to(network.device)
        for part in _chunks(len(x_PH)):
            logits_PV = x_PH[part] @ w_VH.T
            log_total_P[part] = torch.logaddexp(log_total_P[part], logits_PV.logsumexp(1))
            for s in range(samples):
                uniform_PV = torch.rand(logits_PV.shape, generator=generator).clamp_(1e-20, 1 - 1e-7)
                noisy_PV = logits_PV - uniform_PV.to(network.device).log_().neg_().log_()
                value_P, index_P = noisy_PV.max(1)
                won_P = value_P > best_SP[s, part]
                best_SP[s, part] = torch.where(won_P, value_P, best_SP[s, part])
                label_SPH[s, part] = torch.where(won_P[:, None], w_VH[index_P], label_SPH[s, part])
    mean_PH = torch.zeros_like(x_PH)  # of the head's rows under p
    for start in range(0, vocab, _SLICE_ROWS):
        w_VH = head.rows(start, min(start + _SLICE_ROWS, vocab)).to(network.device)
        for part in _chunks(len(x_PH)):
            p_PV = (x_PH[part] @ w_VH.T - log_total_P[part, None]).exp_()
            mean_PH[part] += p_PV @ w_VH
    with torch.enable_grad():
        h_PH.requires_grad_(True)
        x_PH = network.final_norm(h_PH, norm)
        through = [
            torch.autograd.grad(x_PH, h_PH, label_SPH[s] - mean_PH, retain_graph=s + 1 < samples)[0]
            for s in range(samples)
        ]
    return torch.stack(through).reshape(samples, windows, tokens, hidden)


def _chunks(positions: int) -> list[slice]:
    return [slice(k, min(k + _CHUNK_TOKENS, positions)) for k in range(0, positions, _CHUNK_TOKENS)]
