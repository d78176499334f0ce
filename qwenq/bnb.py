"""Quantize one decoder layer by bitsandbytes' own functions: no calibration, each weight by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwenq.errors import CheckpointError
from qwenq.formats.quantization import Quantization
from qwenq.formats.storage import unpack_linear
from qwenq.quant.bnb import round_int8, round_nf4
from qwenq.quant.gptq import QTensor, decibel
from qwenq.results import LayerResult
from qwenq.scheme import Recipe
from qwenq.spec import ModelSpec


def round_bnb_layer(
    spec: ModelSpec, layer: int, recipe: Recipe, state: Mapping[str, torch.Tensor], device: str
) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
    """Quantize a layer's linears; returns their packed tensors by full name, and one result a linear.

    state: the layer's weights in the dtype they would be stored in, under names relative to the layer: bitsandbytes
    keeps that dtype and computes in it.
    """
    packed: dict[str, torch.Tensor] = {}
    results: list[LayerResult] = []
    prefix = f"model.layers.{layer}."
    for lin in spec.layer_linears(layer):
        scheme = recipe.scheme_of(lin)
        if scheme is None:
            continue
        path = lin.name.removeprefix(prefix) + ".weight"
        weight = state[path].to(device)
        if recipe.format == "bnb-int8" and not bool(torch.isfinite(weight.half()).all()):
            raise CheckpointError(
                f"{lin.name}: a weight of {float(weight.abs().max()):.6g} does not fit float16, which LLM.int8 needs",
                hint="--format bnb-nf4 holds it",
            )
        tensors = round_nf4(weight) if recipe.format == "bnb-nf4" else round_int8(weight)
        found = unpack_linear(Quantization(recipe.format, scheme), scheme, lin, tensors)
        dequantized = found.dequantize() if isinstance(found, QTensor) else found.float()
        error = float((weight.float() - dequantized).square().sum(dtype=torch.float64))
        error_db = decibel(error, float(weight.float().square().sum(dtype=torch.float64)))
        results.append(LayerResult(lin.name, scheme.label, None, error_db, 0.0))
        packed |= {f"{lin.name}.{part}": tensor.cpu().contiguous() for part, tensor in tensors.items()}
    return packed, results
