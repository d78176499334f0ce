"""AWQ's "gemm" layout: `qweight` [in, out / 8] and `qzeros` [groups, out / 8] pack eight outputs a word, interleaved.

Nibble n of a word, the lowest first, holds output 8 w + ORDER[n] of word w. Zero points are stored as they are;
`scales` is [groups, out]. Source: AutoAWQ's packing for its gemm kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwenq.errors import CheckpointError
from qwenq.formats.base import Scheme
from qwenq.formats.packing import pack_words, unpack_words
from qwenq.formats.qtensor import QTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = tuple(ORDER.index(k) for k in range(8))  # of output k in its word


def pack_awq(q: QTensor) -> dict[str, Tensor]:
    """qweight, qzeros and scales, contiguous, on the codes' device."""
    return {
        "qweight": _pack(q.codes_OI.T),
        "qzeros": _pack(q.zeros_OG.T),
        "scales": q.scales_OG.T.contiguous(),
    }


def unpack_awq(tensors: Mapping[str, Tensor], scheme: Scheme, name: str = "linear") -> QTensor:
    """The QTensor packed in `tensors`; CheckpointError when their shapes do not fit together."""
    words, zeros, scales_GO = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    columns, rows, groups = words.shape[0], words.shape[1] * 8, scheme.groups(words.shape[0])
    if zeros.shape != (groups, rows // 8) or scales_GO.shape != (groups, rows) or columns % groups:
        shapes = ", ".join(f"{part} {list(tensors[part].shape)}" for part in ("qweight", "qzeros", "scales"))
        raise CheckpointError(f"{name}: shapes do not fit together in groups of {scheme.group_size}: {shapes}")
    return QTensor(_unpack(words).T.contiguous(), scales_GO.T.contiguous(), _unpack(zeros).T.contiguous(), scheme)


def _pack(codes_NO: Tensor) -> Tensor:
    """int32 [N, O / 8] from uint8 codes [N, O]."""
    rows, columns = codes_NO.shape
    ordered = codes_NO.reshape(rows, columns // 8, 8)[:, :, list(ORDER)].reshape(rows, columns)
    return pack_words(ordered.T, 4).T.contiguous()


def _unpack(words_NW: Tensor) -> Tensor:
    """uint8 codes [N, O] from int32 words [N, O / 8]."""
    rows, words = words_NW.shape
    stored = unpack_words(words_NW.T.contiguous(), 4).T.reshape(rows, words, 8)
    return torch.index_select(stored, 2, torch.tensor(_PLACE, device=stored.device)).reshape(rows, words * 8)
