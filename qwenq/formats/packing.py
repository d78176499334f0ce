"""Codes packed into int32, and back: what several formats do along one dimension or the other."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int32(codes_NM: Tensor, bits: int) -> Tensor:
    """int32 [N * bits / 32, M] from uint8 codes [N, M]: entry n holds rows n*p .. n*p + p - 1, the first lowest."""
    if bits == 4:
        codes_NM = codes_NM[0::2] | (codes_NM[1::2] << 4)
    entries, columns = codes_NM.shape[0] // 4, codes_NM.shape[1]
    bytes_NMB = codes_NM.reshape(entries, 4, columns).transpose(1, 2).reshape(-1)
    return bytes_NMB.view(torch.int32).view(entries, columns)  # little-endian, as on every machine torch runs on


def unpack_int32(packed_NM: Tensor, bits: int) -> Tensor:
    """uint8 codes [N * 32 / bits, M] from int32 [N, M]."""
    rows, columns = packed_NM.shape
    codes_NM = packed_NM.reshape(-1).view(torch.uint8).view(rows, columns, 4).transpose(1, 2).reshape(-1, columns)
    if bits == 4:
        codes_NM = torch.stack((codes_NM & 15, codes_NM >> 4), 1).view(-1, columns)
    return codes_NM
