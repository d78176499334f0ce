"""Linears to the tensors a format stores, and back to codes, scales and zero points, or to plain weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qwenq.formats.base import Quantization, Recipe, Scheme
from qwenq.formats.gptq import gptq_version
from qwenq.formats.pack_awq import pack_awq, unpack_awq
from qwenq.formats.pack_bnb import dequantize_nf4, unpack_int8
from qwenq.formats.pack_compressed import pack_compressed, unpack_compressed
from qwenq.formats.packing import dequantize_gptq, pack_gptq, unpack_gptq
from qwenq.formats.qtensor import QTensor
from qwenq.model.spec import LinearSpec


def pack_linear(recipe: Recipe, q: QTensor) -> dict[str, Tensor]:
    """Tensors of one linear in the recipe's format (one of layout.GRID_FORMATS), by their names after the linear's."""
    if recipe.format == "awq":
        return pack_awq(q)
    if recipe.format == "compressed-tensors":
        return pack_compressed(q)
    return pack_gptq(q, gptq_version(recipe))


def unpack_linear(
    quantization: Quantization, scheme: Scheme, lin: LinearSpec, tensors: Mapping[str, Tensor]
) -> QTensor | Tensor:
    """One stored linear, still quantized where its codes lie on a grid of scales and zero points.

    Otherwise (GPTQ with groups out of order, NF4) the weight [out, in]: float32, or for NF4 the dtype it came from.
    CheckpointError when the tensors contradict each other.
    """
    if quantization.format == "awq":
        return unpack_awq(tensors, scheme, lin.name)
    if quantization.format == "compressed-tensors":
        return unpack_compressed(tensors, scheme, lin.name)
    if quantization.format == "bnb-int8":
        return unpack_int8(tensors, scheme, lin.name)
    if quantization.format == "bnb-nf4":
        return dequantize_nf4(tensors, (lin.out_features, lin.in_features), lin.name)
    found = unpack_gptq(tensors, scheme, quantization.version, lin.name)
    return dequantize_gptq(tensors, scheme, quantization.version, lin.name) if found is None else found
