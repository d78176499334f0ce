"""The head, solved like a linear of a layer in formats that quantize it: its inputs are what leaves the last norm.

A head of its own is solved last, on the states of the layers as written. One that is the embedding too is solved first,
since every state begins with it: some windows run through the 16-bit model beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qwenq.checkpoint.reader import joined_slices, row_slices
from qwenq.errors import CheckpointError
from qwenq.formats.base import get_format
from qwenq.io.tensors import all_finite
from qwenq.pipeline.activations import LayerState, embed
from qwenq.pipeline.block import result_of, solve_on_ranks
from qwenq.pipeline.evaluate import HeadWeights
from qwenq.pipeline.job import QuantizeJob
from qwenq.pipeline.shares import Share
from qwenq.pipeline.workers import Workers, summed_products
from qwenq.results import LayerResult
from qwenq.solver.gptq import SolveStats, correction_dtype
from qwenq.solver.grid import Grid, QTensor
from qwenq.solver.parallel import joined_stats
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


def tied_hessian(job: QuantizeJob, workers: Workers, layers: Callable[[int], LayerState]) -> Tensor:
    """`head_hessian` of the 16-bit model's states of the job's first calibration windows, `head_windows` of them.

    layers: the source's.
    """
    source, spec = job.source, job.source.spec
    assert job.calibration is not None
    share = workers.ranks.share(range(job.head_windows))
    ids_NT = job.calibration.ids[share.windows]
    h_NTH = torch.empty(*ids_NT.shape, spec.hidden_size, dtype=workers.dtype)
    embed(source, {"original": (h_NTH, ids_NT)})
    for layer in range(spec.num_hidden_layers):
        workers.fill(layers(layer))
        workers.run_layer(h_NTH, share)
        workers.release()
    return head_hessian(workers, HeadWeights(source, job.convert).norm, h_NTH, share)


def solve_head(job: QuantizeJob, workers: Workers, hessian: Tensor) -> tuple[dict[str, Tensor], LayerResult]:
    """The head as it is written, by its tensor's name, on the CPU; nothing of it on ranks but the first.

    hessian: of `head_hessian`.
    """
    source, name, scheme = job.source, job.source.spec.head_tensor, job.head_scheme
    assert scheme is not None
    head = HeadWeights(source, source.refuse_non_finite)
    options = {"damp_percent": job.options.damp_percent, "method": job.options.method}
    stats: list[SolveStats] = []

    def slices() -> Iterator[QTensor]:
        for qtensor, found in solved_slices(workers, head, hessian, scheme.grid(), **options):
            stats.append(found)
            yield qtensor

    written = {}
    if workers.ranks.first:
        packed = (get_format(job.recipe.format).pack(qtensor)["weight"].cpu() for qtensor in slices())
        written[name] = joined_slices(packed, source.spec.vocab_size)
    else:
        for _ in slices():
            pass
    return written, result_of(name.removesuffix(".weight"), scheme, joined_stats(stats))


def solved_slices(
    workers: Workers, head: HeadWeights, hessian: Tensor, grid: Grid, **options: Any
) -> Iterator[tuple[QTensor, SolveStats]]:
    """Rows of the head, some at a time (see `row_slices`), on the first worker's device.

    hessian: of `head_hessian`. options: of `solve_linears`. Each rank solves its share of a slice, and has the whole.
    """
    spec = head.checkpoint.spec
    triangle, products = Triangle(spec.hidden_size), correction_dtype(spec.vocab_size, workers.devices[0])
    for start, stop in row_slices(spec.vocab_size):
        weights = {"head": head.rows(start, stop)}
        square_HH = triangle.square(hessian)  # overwritten
        place = {"head": (start, spec.vocab_size)}
        yield solve_on_ranks(workers, weights, square_HH, grid, parts=place, products=products, **options)["head"]
