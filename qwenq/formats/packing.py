"""Codes of a linear packed into int32 words and back: the words all formats share, and GPTQ's tensors of them.

`qweight` [in * bits / 32, out] holds codes along the input, least significant first; `qzeros` [groups, out * bits /
32] zero points along the output, stored minus one ("gptq") or as they are ("gptq_v2"); `scales` [groups, out];
`g_idx` [in] the group of each input column.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwenq.errors import CheckpointError
from qwenq.formats.base import Scheme
from qwenq.formats.qtensor import QTensor


def pack_words(codes_NM: Tensor, bits: int) -> Tensor:
    """int32 [N * bits / 32, M] from uint8 codes [N, M]: word n holds rows n*p .. n*p + p - 1, the first lowest."""
    if bits == 4:
        codes_NM = codes_NM[0::2] | (codes_NM[1::2] << 4)
    words, columns = codes_NM.shape[0] // 4, codes_NM.shape[1]
    bytes_NMB = codes_NM.reshape(words, 4, columns).transpose(1, 2).reshape(-1)
    return bytes_NMB.view(torch.int32).view(words, columns)  # little-endian, as on every machine torch runs on


def unpack_words(words_NM: Tensor, bits: int) -> Tensor:
    """uint8 codes [N * 32 / bits, M] from int32 words [N, M]."""
    rows, columns = words_NM.shape
    codes_NM = words_NM.reshape(-1).view(torch.uint8).view(rows, columns, 4).transpose(1, 2).reshape(-1, columns)
    if bits == 4:
        codes_NM = torch.stack((codes_NM & 15, codes_NM >> 4), 1).view(-1, columns)
    return codes_NM


def pack_gptq(q: QTensor, checkpoint_format: str = "gptq") -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx, contiguous, on the codes' device."""
    columns = q.codes_OI.shape[1]
    bits, width = q.scheme.bits, q.scheme.group_width(columns)
    # in version 1 a zero point of 0 wraps; not every reader undoes that (see formats.gptq.gptq_version)
    stored_OG = (q.zeros_OG - 1) & (q.scheme.levels - 1) if checkpoint_format == "gptq" else q.zeros_OG
    return {
        "qweight": pack_words(q.codes_OI.T, bits),
        "qzeros": pack_words(stored_OG, bits).T.contiguous(),
        "scales": q.scales_OG.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32, device=q.codes_OI.device) // width,
    }


def _unpack(
    tensors: Mapping[str, Tensor], bits: int, checkpoint_format: str, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 [in, out], scales [groups, out], zeros uint8 [groups, out], g_idx int64 [in]; shapes checked."""
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{name}: checkpoint_format {checkpoint_format!r}, wanted gptq or gptq_v2")
    absent = [part for part in ("qweight", "qzeros", "scales") if part not in tensors]
    if absent:
        raise CheckpointError(f"{name}: no {', '.join(absent)}")
    words, scales_GO = tensors["qweight"], tensors["scales"]
    groups, rows = scales_GO.shape
    columns, per_word = words.shape[0] * 32 // bits, 32 // bits
    if words.shape[1] != rows or tensors["qzeros"].shape != (groups, rows // per_word) or rows % per_word:
        shapes = ", ".join(f"{part} {list(tensors[part].shape)}" for part in ("qweight", "qzeros", "scales"))
        raise CheckpointError(f"{name}: shapes do not fit together at {bits} bits: {shapes}")
    zeros_GO = unpack_words(tensors["qzeros"].T, bits).T
    if checkpoint_format == "gptq":
        zeros_GO = (zeros_GO + 1) & ((1 << bits) - 1)
    if "g_idx" in tensors:
        index_I = tensors["g_idx"].long()
    else:
        index_I = torch.arange(columns, device=words.device) // (columns // groups)
    if index_I.numel() != columns or int(index_I.min()) < 0 or int(index_I.max()) >= groups:
        raise CheckpointError(f"{name}: g_idx does not name one of {groups} groups for each of {columns} columns")
    return unpack_words(words, bits), scales_GO, zeros_GO, index_I


def unpack_gptq(
    tensors: Mapping[str, Tensor], scheme: Scheme, checkpoint_format: str = "gptq", name: str = "linear"
) -> QTensor | None:
    """The QTensor packed in `tensors`, None when groups are not consecutive columns (act-order: `dequantize_gptq`)."""
    codes_IO, scales_GO, zeros_GO, index_I = _unpack(tensors, scheme.bits, checkpoint_format, name)
    trivial_I = torch.arange(index_I.numel(), device=index_I.device) // scheme.group_width(index_I.numel())
    if not torch.equal(index_I, trivial_I):
        return None
    return QTensor(codes_IO.T.contiguous(), scales_GO.T.contiguous(), zeros_GO.T.contiguous(), scheme)


def unpack_sorted(
    tensors: Mapping[str, Tensor], scheme: Scheme, checkpoint_format: str = "gptq", name: str = "linear"
) -> tuple[QTensor, Tensor | None]:
    """The QTensor with its columns sorted by group, and that order, int64 [in] (None when they are sorted already).

    So act-order checkpoints run on kernels that know consecutive groups only: sort the input's columns alike.
    CheckpointError when the groups are not all of one size.
    """
    codes_IO, scales_GO, zeros_GO, index_I = _unpack(tensors, scheme.bits, checkpoint_format, name)
    sizes = torch.bincount(index_I, minlength=scales_GO.shape[0])
    if not bool((sizes == sizes[0]).all()):
        raise CheckpointError(f"{name}: g_idx makes groups of {int(sizes.min())} to {int(sizes.max())} columns")
    order_I: Tensor | None = None
    if not bool((index_I[1:] >= index_I[:-1]).all()):
        order_I = torch.argsort(index_I, stable=True)
        codes_IO = codes_IO[order_I]
    return QTensor(codes_IO.T.contiguous(), scales_GO.T.contiguous(), zeros_GO.T.contiguous(), scheme), order_I


def dequantize_gptq(
    tensors: Mapping[str, Tensor], scheme: Scheme, checkpoint_format: str = "gptq", name: str = "linear"
) -> Tensor:
    """The weight [out, in] in float32, of this project's checkpoints and of others': `g_idx` is honoured."""
    codes_IO, scales_GO, zeros_GO, index_I = _unpack(tensors, scheme.bits, checkpoint_format, name)
    w_IO = codes_IO.float().sub_(zeros_GO[index_I]).mul_(scales_GO.float()[index_I])
    return w_IO.T.contiguous()
