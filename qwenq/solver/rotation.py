"""A rotation of the hidden states, folded into the weights around them: the same function, rounded to better effect.

With norms' weights multiplied into the linears that read them, RMSNorm commutes with an orthogonal Q: hidden states h Q
come of an embedding E Q, readers W Q and writers Q'W (SliceGPT, arXiv 2401.15024, section 3; QuaRot, arXiv 2404.00456,
section 4). Channels that carry massive activations are spread over all, and their weights with them. Nothing is left to
be done when the model runs; a head that is the embedding too would become another matrix.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qwenq.model.architectures import Architecture

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) (C x H), orthogonal [size, size]: random signs, the cosine transform C of the odd part of the
    size, and the Hadamard matrix H of the rest.
    """

    size: int
    seed: int = 0

    @cached_property
    def _signs(self) -> Tensor:
        bits = torch.randint(0, 2, (self.size,), generator=torch.Generator().manual_seed(self.seed))
        return bits.mul_(2).sub_(1).float()

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """C, and two Hadamard matrices whose Kronecker product is H."""
        even = self.size & -self.size
        first = 1 << (even.bit_length() // 2)
        return _cosines(self.size // even), _hadamard(first), _hadamard(even // first)

    def turned(self, x: Tensor) -> Tensor:
        """x Q of vectors [..., size], float32."""
        cosines, first, second = (factor.to(x.device) for factor in self._factors)
        signs, out = self._signs.to(x.device), torch.empty(x.shape, device=x.device)
        rows, found = x.reshape(-1, self.size), out.view(-1, self.size)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = (rows[start : start + _ROWS_AT_ONCE].float() * signs).reshape(-1, len(first), len(second))
            part = (first @ (part @ second)).view(-1, len(cosines), len(first) * len(second))
            found[start : start + len(part)] = (cosines.T @ part).flatten(1)
        return out

    def turn_layer(self, state: MutableMapping[str, Tensor], architecture: Architecture) -> None:
        """Fold it and the norms' weights into a layer's tensors, by their names within it, which become float32."""
        for stage in architecture.stages:
            if stage.norm:
                norm_H = state[f"{stage.norm}.weight"].float()
                state[f"{stage.norm}.weight"] = torch.ones_like(norm_H)
            for name in (f"{path}.weight" for path in stage.paths):
                if stage.norm:
                    state[name] = self.turned(state[name] * norm_H)
                if stage.adds:
                    state[name] = self.turned(state[name].T).T.contiguous()
            for name in (f"{path}.bias" for path in stage.paths if stage.adds):
                if name in state:
                    state[name] = self.turned(state[name])


def _hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, symmetric and orthogonal, float32 [size, size]; a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _cosines(size: int) -> Tensor:
    """The orthogonal cosine transform (DCT-II), float32 [size, size]."""
    angles = torch.arange(size, dtype=torch.float64)[:, None] * (torch.arange(size, dtype=torch.float64) + 0.5)
    matrix = torch.cos(angles * (math.pi / size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
