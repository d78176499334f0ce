"""Weights of random codes, which tests of kernels multiply with and tests of formats pack."""

from __future__ import annotations

import torch

from qwenq.formats.base import Scheme
from qwenq.solver.grid import QTensor


def random_q(bits: int, group: int, rows: int, columns: int, sym: bool = True, seed: int = 0) -> QTensor:
    """Codes and zero points over the whole range, scales of both signs."""
    generator = torch.Generator().manual_seed(rows + columns + bits + (seed << 20))
    scheme = Scheme(bits, group, sym)
    groups = scheme.groups(columns)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(rows, groups, generator=generator) * 0.02).half()
    zeros = torch.randint(0, scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    return QTensor(codes, (scales, torch.full_like(zeros, scheme.zero) if sym else zeros), scheme.grid())
