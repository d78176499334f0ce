"""One decoder layer of a job: what is written in the place of its 16-bit tensors."""

from __future__ import annotations

import torch

from qwenq.block import BlockSolver, CalibrationStreams, round_block
from qwenq.bnb import round_bnb_layer
from qwenq.clock import StageClock
from qwenq.job import QuantizeJob
from qwenq.layout import BNB_FORMATS
from qwenq.quant.fold import FoldedLayer
from qwenq.replicas import Replicas
from qwenq.results import LayerResult
from qwenq.streams import Streams


def make_layer(
    job: QuantizeJob,
    calibrator: Replicas,
    layer: int,
    state: dict[str, torch.Tensor],
    streams: Streams,
    clock: StageClock,
) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
    """Quantize a layer as the job says: tensors to be written, by full name, and one result a linear.

    state: the layer's 16-bit tensors by their names within it, emptied on the way. The streams of the calibration
    tokens, if the job reads any, are advanced from entering the layer to leaving it.
    """
    prefix = f"model.layers.{layer}."
    folded = FoldedLayer(state, _kept(job, layer, state), job.devices[0])
    if job.recipe.format in BNB_FORMATS:
        with clock.time("round"):
            stored = {name: job.convert(prefix + name, tensor) for name, tensor in state.items()}
            packed, results = round_bnb_layer(job.source.spec, layer, job.recipe, stored, job.devices[0])
    elif job.calibration is None:
        with clock.time("round"):
            packed, results = round_block(job.source.spec, layer, job.recipe, folded, job.options)
    else:
        calibrator.fill(state)
        state.clear()  # the solver lets go of each weight when it is done
        calibration = CalibrationStreams(streams.states["calibration"], streams.states.get("original"), streams.scratch)
        solver = BlockSolver(calibrator, job.source.spec, layer, job.recipe, folded, calibration, job.options, clock)
        packed, results = solver.run()
        calibrator.release()
    return packed | {prefix + name: tensor.cpu() for name, tensor in folded.kept.items()}, results


def _kept(job: QuantizeJob, layer: int, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is not quantized of a layer, as it is written."""
    prefix = f"model.layers.{layer}."
    quantized = {
        lin.name.removeprefix(prefix) + ".weight"
        for lin in job.source.spec.layer_linears(layer)
        if job.recipe.scheme_of(lin) is not None
    }
    return {name: job.convert(prefix + name, t) for name, t in state.items() if name not in quantized}
