"""compressed-tensors' "pack-quantized" layout: codes packed along the input, zero points along the output.

Its codes are signed, code - 2**(bits-1), and are packed after adding 2**(bits-1) again: the words hold the unsigned
codes. `weight_packed` [out, in * bits / 32], `weight_scale` [out, groups], `weight_zero_point` [out * bits / 32,
groups] (asymmetric only), `weight_shape` int64 [2]. Source: the library's compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwenq.errors import CheckpointError
from qwenq.formats.base import Scheme
from qwenq.formats.packing import pack_words, unpack_words
from qwenq.formats.qtensor import QTensor


def pack_compressed(q: QTensor) -> dict[str, Tensor]:
    """weight_packed, weight_scale, weight_shape and, when asymmetric, weight_zero_point, contiguous."""
    tensors = {
        "weight_packed": pack_words(q.codes_OI.T, q.scheme.bits).T.contiguous(),
        "weight_scale": q.scales_OG.contiguous(),
        "weight_shape": torch.tensor(q.codes_OI.shape, dtype=torch.int64),
    }
    if not q.scheme.sym:
        tensors["weight_zero_point"] = pack_words(q.zeros_OG, q.scheme.bits)
    return tensors


def unpack_compressed(tensors: Mapping[str, Tensor], scheme: Scheme, name: str = "linear") -> QTensor:
    """The QTensor packed in `tensors`; CheckpointError when `weight_shape` says something else."""
    codes_OI = unpack_words(tensors["weight_packed"].T.contiguous(), scheme.bits).T.contiguous()
    scales_OG = tensors["weight_scale"]
    if tensors["weight_shape"].tolist() != list(codes_OI.shape):
        raise CheckpointError(
            f"{name}: weight_shape says {tensors['weight_shape'].tolist()}, the words hold {list(codes_OI.shape)}"
        )
    if scheme.sym:
        zeros_OG = torch.full(scales_OG.shape, scheme.zero, dtype=torch.uint8, device=codes_OI.device)
    else:
        zeros_OG = unpack_words(tensors["weight_zero_point"], scheme.bits).contiguous()
    return QTensor(codes_OI, scales_OG.contiguous(), zeros_OG, scheme)
