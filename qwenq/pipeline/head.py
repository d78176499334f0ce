"""The head of an untied model, solved like a linear of a layer: its inputs are what leaves the last norm.

Formats that leave the head in 16 bit have none of this. A tied head is the embedding, which is written before anything
runs through the layers, and is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from qwenq.checkpoint.reader import SLICE_ROWS
from qwenq.errors import CheckpointError
from qwenq.io.tensors import all_finite
from qwenq.pipeline.block import all_rows
from qwenq.pipeline.evaluate import HeadWeights
from qwenq.pipeline.shares import Share
from qwenq.pipeline.workers import Workers, summed_products
from qwenq.solver.gptq import SolveStats, products_dtype
from qwenq.solver.grid import Grid, QTensor
from qwenq.solver.parallel import cut_rows, solve_rows
from qwenq.solver.triangle import Triangle


def head_hessian(workers: Workers, norm_H: Tensor, h_NTH: Tensor, share: Share) -> Tensor:
    """Sum of x x' over normed states, a Triangle's values on the first worker's device.

    h_NTH: what leaves the last layer, of the rank's windows. CheckpointError where it is not finite.
    """
    hessian = summed_products(workers, h_NTH, share, h_NTH.shape[2], lambda network, h: network.final_norm(h, norm_H))
    if not all_finite(hessian):
        raise CheckpointError(
            "the activations entering the head are not finite",
            hint="compute in bfloat16 or float32 (--calibration-dtype), and check the source's weights",
        )
    return hessian


def solved_slices(
    workers: Workers, head: HeadWeights, hessian: Tensor, grid: Grid, **options: Any
) -> Iterator[tuple[QTensor, SolveStats]]:
    """Rows of the head, SLICE_ROWS at a time, on the first worker's device.

    hessian: of `head_hessian`. options: of `solve_linears`. Each rank solves its share of a slice, and has the whole.
    """
    spec, ranks, devices = head.checkpoint.spec, workers.ranks, workers.devices
    triangle, products = Triangle(spec.hidden_size), products_dtype(spec.vocab_size, devices[0])
    for start in range(0, spec.vocab_size, SLICE_ROWS):
        weights = {"head": head.rows(start, min(start + SLICE_ROWS, spec.vocab_size))}
        shares = cut_rows({"head": len(weights["head"])}, ranks.size * len(devices))
        own = shares[ranks.rank * len(devices) :][: len(devices)]
        square_HH = triangle.square(hessian)  # overwritten
        place = {"head": (start, spec.vocab_size)}
        parts = solve_rows(devices, weights, square_HH, grid, own, parts=place, products=products, **options)
        yield all_rows(ranks, parts, ["head"], grid, devices[0])["head"]
