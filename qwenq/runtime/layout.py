"""Where torch's 4-bit packers put each code, found out by packing known codes, and the way back.

A packer cuts codes [rows, columns] into tiles and lays each tile out in its own order, which differs between
instruction sets and devices. Packing a tile whose codes spell each position's own number, one hexadecimal digit at a
time, shows that order without knowing it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Packer = Callable[[Tensor], Tensor]  # uint8 codes [rows, columns] -> bytes of any shape and dtype


def nibbles(packed: Tensor, tiles: int) -> Tensor:
    """uint8 [tiles, codes a tile]: all low halves of a tile's bytes, then all high ones."""
    parts = packed.contiguous().view(torch.uint8).view(tiles, -1)
    return torch.cat((parts & 15, parts >> 4), 1)


def tile_order(pack: Packer, rows: int, columns: int, device: torch.device) -> Tensor | None:
    """For a tile [rows, columns], where in `nibbles` the code of each position is; int64 [rows * columns].

    None when the packer does not keep one tile's codes together as 4-bit codes, so nothing can be read back.
    """
    number = torch.arange(rows * columns, device=device)
    at = torch.zeros_like(number)
    for shift in range(0, max(1, (rows * columns - 1).bit_length()), 4):
        digit = ((number >> shift) & 15).to(torch.uint8).view(rows, columns)
        packed = pack(digit)
        if packed.numel() * packed.element_size() * 2 != rows * columns:
            return None
        at += nibbles(packed, 1)[0].long() << shift
    order = torch.argsort(at)
    return order if torch.equal(at[order], number) else None


def is_identity(order: Tensor) -> bool:
    """Whether codes already lie in order."""
    return torch.equal(order, torch.arange(order.numel(), device=order.device))
