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

_AT_ONCE = 1024  # rows, or columns: beside the whole there is little else


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) (C x H), orthogonal [size, size]: random signs, a Hadamard matrix C of the size's odd part times
    the least power of two that has one, and Sylvester's H of the rest. Where Paley's constructions give no such C, it
    is the cosine transform of the odd part.
    """

    size: int
    seed: int = 0

    @cached_property
    def _signs(self) -> Tensor:
        bits = torch.randint(0, 2, (self.size,), generator=torch.Generator().manual_seed(self.seed))
        return bits.mul_(2).sub_(1).float()

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """C, and two of Sylvester's matrices whose Kronecker product is H."""
        two = self.size & -self.size
        odd = self.size // two
        orders = (odd << power for power in range(two.bit_length()))
        core = next((matrix for order in orders if (matrix := _paley(order)) is not None), _cosines(odd))
        rest = self.size // len(core)
        first = 1 << (rest.bit_length() // 2)
        return core, _sylvester(first), _sylvester(rest // first)

    def turned(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """x Q of vectors [..., size], float32; with `scales` [size] of each times these."""
        core, first, second = (factor.to(x.device) for factor in self._factors)
        signs = self._signs.to(x.device) if scales is None else self._signs.to(x.device) * scales
        out = torch.empty(x.shape, device=x.device)
        rows, turned = x.reshape(-1, self.size), out.view(-1, self.size)
        for start in range(0, len(rows), _AT_ONCE):
            part = (rows[start : start + _AT_ONCE].float() * signs).reshape(-1, len(first), len(second))
            part = (first @ (part @ second)).view(-1, len(core), len(first) * len(second))
            turned[start : start + len(part)] = (core.T @ part).flatten(1)
        return out

    def turned_columns(self, w_OI: Tensor) -> Tensor:
        """Q'W of a weight [size, in], float32."""
        core, first, second = (factor.to(w_OI.device) for factor in self._factors)
        signs_O1 = self._signs.to(w_OI.device)[:, None]
        out_OI = torch.empty(w_OI.shape, device=w_OI.device)
        for start in range(0, w_OI.shape[1], _AT_ONCE):
            part = w_OI[:, start : start + _AT_ONCE].float() * signs_O1
            width = part.shape[1]
            part = second @ part.view(-1, len(second), width)
            part = first @ part.view(len(core), len(first), -1)
            out_OI[:, start : start + width] = (core.T @ part.view(len(core), -1)).view(-1, width)
        return out_OI

    def turn_layer(self, state: MutableMapping[str, Tensor], architecture: Architecture) -> None:
        """Fold it and the norms' weights into a layer's tensors, by their names within it, which become float32."""
        for stage in architecture.stages:
            if stage.norm:
                norm_H = state[f"{stage.norm}.weight"].float()
                state[f"{stage.norm}.weight"] = torch.ones_like(norm_H)
            for name in (f"{path}.weight" for path in stage.paths):
                if stage.norm:
                    state[name] = self.turned(state[name], norm_H)
                if stage.adds:
                    state[name] = self.turned_columns(state[name])
            for name in (f"{path}.bias" for path in stage.paths if stage.adds):
                if name in state:
                    state[name] = self.turned(state[name])


def _sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix over its norm, symmetric and orthogonal, float32 [order, order]; a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(order)


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix over its norm, float32 [order, order], where `order` is 1, a prime p = 3 mod 4 and 1 more, or
    twice a prime p = 1 mod 4 and 1 more (Paley 1933: constructions I and II); otherwise None.
    """
    if order == 1:
        return torch.ones(1, 1)
    if order % 4:
        return None
    prime = order - 1 if _is_prime(order - 1) else order // 2 - 1
    if not _is_prime(prime) or prime % 4 != (3 if prime == order - 1 else 1):
        return None
    squares = {x * x % prime for x in range(1, prime)}
    character = torch.tensor([0.0 if x == 0 else 1.0 if x in squares else -1.0 for x in range(prime)])
    bordered = torch.zeros(prime + 1, prime + 1)
    bordered[0, 1:] = 1
    bordered[1:, 0] = 1 if prime % 4 == 1 else -1
    index = torch.arange(prime)
    bordered[1:, 1:] = character[(index[:, None] - index) % prime]
    one = torch.eye(prime + 1)
    if prime == order - 1:
        return (one + bordered) / math.sqrt(order)
    found = torch.kron(bordered, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return (found + torch.kron(one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))) / math.sqrt(order)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _cosines(size: int) -> Tensor:
    """The orthogonal cosine transform (DCT-II), float32 [size, size]."""
    angles = torch.arange(size, dtype=torch.float64)[:, None] * (torch.arange(size, dtype=torch.float64) + 0.5)
    matrix = torch.cos(angles * (math.pi / size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
