"""Quantize one decoder layer in one pass: each token goes through each linear once, after that linear is quantized.

h -> norm -> [q k v] -> attention -> [o] -> + -> norm -> [gate up] -> act * -> [down] -> +
     collect, solve               collect, solve    collect, solve          collect, solve

The stages, and where channel scales go, are the architecture's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import CheckpointError
from qwenq.formats.base import Recipe, Scheme, get_format
from qwenq.io.tensors import DTYPE_NAMES, TORCH_DTYPES, all_finite
from qwenq.machine import return_freed_memory
from qwenq.model.architectures import Stage
from qwenq.model.layer import Network
from qwenq.model.spec import LinearSpec, ModelSpec
from qwenq.pipeline.activations import MASSIVE, massive_ratio
from qwenq.pipeline.config import SINK_WEIGHT
from qwenq.pipeline.imatrix import InputSquares
from qwenq.pipeline.monitor import StageClock
from qwenq.pipeline.preflight import scratch_width
from qwenq.pipeline.ranks import Ranks
from qwenq.pipeline.shares import Share
from qwenq.pipeline.workers import PartSums, Workers
from qwenq.results import LayerResult
from qwenq.solver.equalize import FoldedLayer
from qwenq.solver.gptq import DAMP_PERCENT, ResidualCovariance, SolveStats, correction_dtype, decibel, solve_linears
from qwenq.solver.grid import Grid, QTensor
from qwenq.solver.parallel import Solved, cut_rows, joined, solve_rows
from qwenq.solver.triangle import Triangle

MOMENT_STRIDE = 16  # of the tokens from which moments behind a linear are estimated: they count by their 16th root


@dataclass(frozen=True)
class SolverOptions:
    """Settings of the solver, the same for every layer."""

    method: str = "gptq"  # gptq, or rtn: round to nearest with absmax scales, the baseline, without calibration
    damp_percent: float = DAMP_PERCENT  # share of the mean Hessian diagonal added to the diagonal
    down_damp_percent: float | None = None  # of the FFN's last linear, where it is another one
    fold: bool = True  # fold channel scales into norms and up_proj (solver/equalize.py)
    error_correction: float = 1.0  # how far o and down are moved towards the 16-bit hidden states before rounding
    sink_weight: float = SINK_WEIGHT  # of tokens with massive states, in Hessians and corrections; others count once

    def damping(self, *, down: bool) -> float:
        """The damping of the FFN's last linear, or of any other."""
        return self.damp_percent if self.down_damp_percent is None or not down else self.down_damp_percent


@dataclass(frozen=True)
class CalibrationStates:
    """Hidden states of a rank's calibration tokens, [windows, tokens, hidden], and flat space of the same dtype.

    `scratch` holds at least windows * tokens * `scratch_width` values.
    """

    quantized_NTH: Tensor  # through quantized layers
    original_NTH: Tensor | None  # the first windows, through 16-bit layers; None without error correction
    scratch: Tensor
    share: Share  # which of the job's windows these are
    corrected: Share  # and those of the first passes, which run through the 16-bit layers too

    def buffer(self, width: int, after: int = 0) -> Tensor:
        """[windows, tokens, width] of the scratch, behind `after` values a token."""
        windows, tokens, _ = self.quantized_NTH.shape
        count = windows * tokens
        return self.scratch[count * after : count * (after + width)].view(windows, tokens, width)


Produce = Callable[[Network, slice], Tensor]  # a part of the windows -> the input of a stage's linears, [B, T, in]


@dataclass
class BlockSolver:
    """Quantizes the layer that `workers` hold, stage by stage; each sees what those before it make of the tokens.

    folded: the layer's tensors with nothing folded yet; afterwards `folded.kept` has what is to be written as it is.
    Hidden states are advanced in place to the output of the layer. Afterwards the workers hold the dequantized weights.
    """

    workers: Workers
    spec: ModelSpec
    layer: int
    recipe: Recipe
    folded: FoldedLayer
    states: CalibrationStates
    options: SolverOptions
    clock: StageClock
    squares: InputSquares | None = None  # takes in the inputs of all linears
    packed: dict[str, Tensor] = field(default_factory=dict)
    results: list[LayerResult] = field(default_factory=list)

    def run(self) -> tuple[dict[str, Tensor], list[LayerResult]]:
        """Packed tensors by full name, and one result a linear."""
        wanted = self._advance_original()
        self._take_kept()
        pending: Stage | None = None  # its outputs are still to be added to the hidden states
        for stage in self.spec.architecture.stages:
            if pending and stage.norm and stage.adds:  # it would overwrite the inputs that are still to be read
                self._add(pending)
                pending = None
            schemes = self._by_scheme(stage)
            if stage.adds and schemes:
                self._solve_adding(stage, self._inputs(stage, pending), wanted.get(stage.name))
            elif schemes:
                self._solve_inner(stage, pending)
            else:
                self._pass(self._inputs(stage, pending), self._squares(stage))
            pending = stage if stage.adds else None if stage.norm else pending
        if pending:
            self._add(pending)
        return self.packed, self.results

    # ------------------------------------------------------------------ hidden states

    @property
    def h_NTH(self) -> Tensor:
        return self.states.quantized_NTH

    def _buffer(self, stage: Stage) -> Tensor:
        """Where the inputs of a stage that adds are kept until its weights are there."""
        return self.states.buffer(self.spec.size(stage.inputs))

    def _advance_original(self) -> dict[str, Tensor]:
        """Send the 16-bit hidden states through the 16-bit layer, in place; what they are after each block, by the
        stage that ends it. Nothing without error correction.
        """
        original_NTH = self.states.original_NTH
        if original_NTH is None:
            return {}
        *inner, last = ends = [stage for stage in self.spec.architecture.stages if stage.adds]
        hidden, width = self.spec.hidden_size, scratch_width(self.spec)
        after = {
            stage.name: self.states.buffer(hidden, after=width - hidden * (len(inner) - k))[: len(original_NTH)]
            for k, stage in enumerate(inner)
        } | {last.name: original_NTH}

        def advance(network: Network, part: slice) -> None:
            h = _on(network, original_NTH[part])
            for stage in ends:
                h = network.add(stage, h, network.within(stage, network.normed(stage, h)))
                after[stage.name][part].copy_(h)

        self._pass(advance, passes=self.states.corrected.passes)
        return after

    def _inputs(
        self, stage: Stage, pending: Stage | None, moments: Mapping[Stage, PartSums] | None = None
    ) -> Produce:
        """Inputs of a stage, for every window once. Outputs of `pending` are added before; inputs of a stage that adds
        are kept. `moments`: sums of squares of the inputs of later stages in the block, added to on the way.
        """
        h_NTH = self.h_NTH

        def produce(network: Network, part: slice) -> Tensor:
            h = _on(network, h_NTH[part])
            if stage.norm and pending:
                h = network.add(pending, h, _on(network, self._buffer(pending)[part]))
                h_NTH[part].copy_(h)
            normed = network.normed(stage, h)
            del h  # while the block runs, its own tensors have the memory
            x = network.within(stage, normed)
            if self.squares is not None:
                self.squares.add(stage, network, x)
            for later, sums in (moments or {}).items():
                sampled = network.within(later, normed[:, ::MOMENT_STRIDE])
                sums.of(network).add_(sampled.float().square().sum((0, 1)))
            if stage.adds:
                self._buffer(stage)[part].copy_(x)
            return x

        return produce

    def _add(self, stage: Stage) -> None:
        """Add the outputs of a stage to the hidden states."""

        def add(network: Network, part: slice) -> None:
            h = network.add(stage, _on(network, self.h_NTH[part]), _on(network, self._buffer(stage)[part]))
            self.h_NTH[part].copy_(h)

        self._pass(add)

    def _pass(
        self,
        function: Callable[[Network, slice], object],
        sums: Sequence[PartSums] = (),
        passes: Sequence[range] | None = None,
    ) -> None:
        """Send the rank's windows through `function`, pass by pass; without `passes` in all of them."""
        with self.clock.time("forward"):
            for windows in self.states.share.passes if passes is None else passes:
                self.workers.each(function, self.states.share, windows, sums)

    def _squares(self, stage: Stage) -> list[PartSums]:
        return [] if self.squares is None else [self.squares.sums[stage.name]]

    def _in_worker(self, stage: str, network: Network) -> AbstractContextManager[None]:
        return self.clock.time_in_worker(stage, of="forward", workers=len(self.workers), device=network.device)

    # ------------------------------------------------------------------ stages

    def _solve_inner(self, stage: Stage, pending: Stage | None) -> None:
        """Solve a stage whose outputs stay within its block: q, k, v or gate, up."""
        triangle = Triangle(self.spec.size(stage.inputs))
        moments = {
            later: PartSums(self.workers, self.spec.size(later.inputs))
            for later in self.spec.architecture.stages
            if later.folds_into in stage.paths and self._folds(later)
        }
        produce = self._inputs(stage, pending, moments)
        hessians = PartSums(self.workers, triangle.size)

        def collect(network: Network, part: slice) -> None:
            x = produce(network, part)
            with self._in_worker("hessian", network):
                root_BT1 = self._sink_roots(_on(network, self.h_NTH[part]))
                triangle.add_products(hessians.of(network), x if root_BT1 is None else (x * root_BT1).to(x.dtype))

        self._pass(collect, [hessians, *moments.values(), *self._squares(stage)])
        hessian = hessians.take()
        with self.clock.time(f"solve {stage.name}"):
            for later, sums in moments.items():  # scales of its rows: needed before they are rounded
                scales_I = self.folded.fold(later, sums.total())
                if self.squares is not None:
                    self.squares.divide(later, scales_I)
            if stage.folds_into == stage.norm and self._folds(stage):
                scales_I = self.folded.fold(stage, triangle.diagonal(hessian))
                triangle.divide(hessian, scales_I)
            self._take_kept()
            hessian = triangle.square(hessian)
            self._solve(stage, hessian)

    def _solve_adding(self, stage: Stage, produce: Produce, wanted_NTH: Tensor | None) -> None:
        """Solve a stage whose outputs are added to the hidden states, o or down.

        Tokens count by the inverse of the mean square of their states after it: what the next norm makes of an error.
        Those with massive states count `sink_weight` times.
        `wanted_NTH` are the states that the first windows should come to: with the Hessian of these windows they give
        the residual cross-covariance, which the weights are corrected by.
        """
        if self._last(stage):  # down has the layer's largest sums: its peak is there
            return_freed_memory()
        (lin,) = self.spec.stage_linears(self.layer, stage)
        self.workers.set_parameter(f"{lin.path}.weight", self.folded.weight(lin.path))
        triangle = Triangle(lin.in_features)
        hessians = PartSums(self.workers, triangle.size)

        def collect(network: Network, part: slice) -> None:
            x = produce(network, part)
            after = network.add(stage, _on(network, self.h_NTH[part]), x)
            with self._in_worker("hessian", network):
                self._add_weighted(hessians.of(network), x, after)

        residual, corrected = None, 0
        if wanted_NTH is not None:
            corrected = len(self.states.corrected.passes)
            residual = self._residual_covariance(lin, produce, wanted_NTH, (hessians, *self._squares(stage)))
        self._pass(collect, [hessians, *self._squares(stage)], self.states.share.passes[corrected:])
        hessian = hessians.take()
        with self.clock.time(f"solve {stage.name}"):
            hessian = triangle.square(hessian)
            self._solve(stage, hessian, None if residual is None else {lin.name: residual})

    def _residual_covariance(
        self, lin: LinearSpec, produce: Produce, wanted_NTH: Tensor, sums: Sequence[PartSums]
    ) -> ResidualCovariance:
        """Cross-covariance of the inputs and what outputs of the unrounded weights lack, over windows of `wanted_NTH`,
        of the outputs that this rank solves.

        Adds these windows to `sums`, of which the first is the Hessian, both halves one after the other.
        """
        hessians, triangle = sums[0], Triangle(lin.in_features)
        wanted_products = PartSums(self.workers, lin.in_features * lin.out_features)  # of x y', y wanted outputs

        def collect(network: Network, part: slice) -> None:
            x, wanted = produce(network, part), _on(network, wanted_NTH[part])
            with self._in_worker("hessian", network):
                x_TI, root_T1 = self._add_weighted(hessians.of(network), x, wanted)
            with self._in_worker("error correction", network):
                missing = wanted.flatten(0, 1).float() - _on(network, self.h_NTH[part]).flatten(0, 1)
                if lin.bias:
                    missing -= self.folded.state[f"{lin.path}.bias"].to(missing)
                products_IO = wanted_products.of(network).view(lin.in_features, lin.out_features)
                products_IO.add_(x_TI.T @ missing.mul_(root_T1).to(x.dtype))

        shares = _own_rows(self.workers, {lin.name: lin.out_features})
        outputs = [rows for share in shares for rows in share.values()]
        own = range(outputs[0].start, outputs[-1].stop) if outputs else range(0)
        found = []
        for windows in self.states.corrected.passes:
            self._pass(collect, [*sums, wanted_products], [windows])
            with self.clock.time("error correction"):
                products_IO = wanted_products.total().view(lin.in_features, lin.out_features)
                lacking_IO = products_IO[:, own.start : own.stop].clone(memory_format=torch.contiguous_format)
                del products_IO
                weight_IO = self.folded.weight(lin.path)[own.start : own.stop].T
                triangle.subtract_product(hessians.total(), weight_IO, lacking_IO)  # Hessian of the same tokens
                found.append(lacking_IO.mul_(self.states.share.count / self.states.corrected.count))
        return ResidualCovariance(whole_IO=found[1], half_IO=found[0], first=own.start)

    def _add_weighted(self, hessian: Tensor, x: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Add inputs x [B, T, in], weighted by what the next norm makes of the states `after` [B, T, hidden], to a
        Hessian (a Triangle's); the weighted inputs [T, in] and the weights' roots [T, 1].
        """
        root_T1 = (after.flatten(0, 1).float().square().mean(-1, keepdim=True) + 1e-8).rsqrt()
        if (sinks_BT1 := self._sink_roots(after)) is not None:
            root_T1 *= sinks_BT1.flatten(0, 1)
        x_TI = (x.flatten(0, 1) * root_T1).to(x.dtype)
        Triangle(x_TI.shape[1]).add_products(hessian, x_TI)
        return x_TI, root_T1

    def _sink_roots(self, h_BTH: Tensor) -> Tensor | None:
        """Roots of the tokens' weights, float32 [B, T, 1], by their states; None where all weigh 1.

        What later tokens attend to when there is nothing to attend to is a token with massive activations, the first of
        a text as a rule: an error of its key or value is in every token's attention.
        """
        if self.options.sink_weight == 1:
            return None
        massive_BT1 = massive_ratio(h_BTH) > MASSIVE
        if not bool(massive_BT1.any()):
            return None
        return torch.where(massive_BT1, math.sqrt(self.options.sink_weight), 1.0)

    def _solve(
        self, stage: Stage, hessian: Tensor, residuals: Mapping[str, ResidualCovariance] | None = None
    ) -> None:
        """Solve the linears of a stage, scheme by scheme; CheckpointError for inputs that are not finite."""
        schemes, options = self._by_scheme(stage), self.options
        for scheme, linears in schemes.items():
            if not all_finite(hessian.diagonal()):
                names = ", ".join(lin.kind for lin in linears)
                raise CheckpointError(
                    f"layer {self.layer}: the activations entering {names} are not finite",
                    hint="compute in bfloat16 or float32 (--calibration-dtype), and check the source's weights",
                )
            weights = {lin.name: self.folded.weight(lin.path) for lin in linears}
            solved = solve_on_ranks(
                self.workers,
                weights,
                hessian if scheme == list(schemes)[-1] else hessian.clone(),
                scheme.grid(),
                residuals=residuals,
                damp_percent=options.damping(down=self._last(stage)),
                method=options.method,
                error_correction=options.error_correction,
                products=correction_dtype(sum(lin.out_features for lin in linears), self.workers.devices[0]),
            )
            for lin in linears:
                qtensor, stats = solved[lin.name]
                self.workers.set_parameter(lin.path + ".weight", qtensor.dequantize())
                self.folded.release(lin.path)
                self.results.append(result_of(lin.name, scheme, stats))
                if self.workers.ranks.first:
                    self.packed |= _packed(self.recipe, lin.name, qtensor)

    def _last(self, stage: Stage) -> bool:
        return stage == self.spec.architecture.stages[-1]

    def _by_scheme(self, stage: Stage) -> dict[Scheme, list[LinearSpec]]:
        return _by_scheme(self.spec.stage_linears(self.layer, stage), self.recipe)

    def _take_kept(self) -> None:
        """Compute with everything that is not quantized as it will be stored."""
        for name, tensor in self.folded.kept.items():
            self.workers.set_parameter(name, tensor)

    def _folds(self, stage: Stage) -> bool:
        """Whether scales are folded into the inputs of a stage: all that they scale has to be rounded afterwards."""
        if not self.options.fold or not stage.scaled:
            return False
        linears = {lin.path: lin for lin in self.spec.layer_linears(self.layer)}
        return all(self.recipe.scheme_of(linears[path]) is not None for path in stage.scaled)


def _on(network: Network, tensor: Tensor) -> Tensor:
    return tensor.to(network.device)


def round_block(
    spec: ModelSpec, layer: int, recipe: Recipe, folded: FoldedLayer
) -> tuple[dict[str, Tensor], list[LayerResult]]:
    """Round a layer's linears to nearest, without calibration; returns what `BlockSolver.run` does."""
    packed: dict[str, Tensor] = {}
    results: list[LayerResult] = []
    for stage in spec.architecture.stages:
        for scheme, linears in _by_scheme(spec.stage_linears(layer, stage), recipe).items():
            weights = {lin.name: folded.weight(lin.path) for lin in linears}
            for name, (qtensor, stats) in solve_linears(weights, None, scheme.grid(), method="rtn").items():
                results.append(result_of(name, scheme, stats, calibrated=False))
                packed |= _packed(recipe, name, qtensor)
    return packed, results


def _by_scheme(linears: Sequence[LinearSpec], recipe: Recipe) -> dict[Scheme, list[LinearSpec]]:
    """Linears grouped by scheme; those that stay in 16 bit are left out."""
    groups: dict[Scheme, list[LinearSpec]] = {}
    for lin in linears:
        scheme = recipe.scheme_of(lin)
        if scheme is not None:
            groups.setdefault(scheme, []).append(lin)
    return groups


def result_of(name: str, scheme: Scheme, stats: SolveStats, *, calibrated: bool = True) -> LayerResult:
    """What became of a linear; without calibration nothing is known of its outputs."""
    error_db = stats.error_db if calibrated else None
    return LayerResult(name, scheme.label, error_db, stats.weight_error_db, stats.damp_percent, stats.fallback)


def _packed(recipe: Recipe, name: str, qtensor: QTensor) -> dict[str, Tensor]:
    """A linear's tensors as the recipe's format stores them, by full name, on the CPU."""
    form = get_format(recipe.format)
    return {f"{name}.{part}": tensor.cpu() for part, tensor in form.pack(qtensor, form.version(recipe)).items()}


def _own_rows(workers: Workers, sizes: Mapping[str, int]) -> list[dict[str, range]]:
    """Rows of weights of so many rows that each device of this rank solves."""
    count, ranks = len(workers.devices), workers.ranks
    return cut_rows(sizes, ranks.size * count)[ranks.rank * count :][:count]


def solve_on_ranks(workers: Workers, weights: Mapping[str, Tensor], h_II: Tensor, grid: Grid, **options: Any) -> Solved:
    """`solve_linears`, its rows shared among the devices of all ranks; the result on each rank's first one."""
    shares = _own_rows(workers, {name: len(w_OI) for name, w_OI in weights.items()})
    parts = solve_rows(workers.devices, weights, h_II, grid, shares, **options)
    return _all_rows(workers.ranks, parts, list(weights), grid, workers.devices[0])


def _all_rows(
    ranks: Ranks, solved: Sequence[Solved], names: Sequence[str], grid: Grid, device: torch.device
) -> Solved:
    """Linears whole, of the rows that each device of each rank has solved, on every rank's `device`.

    solved: of this rank's devices, in the order of their rows.
    """
    own = {name: joined([part[name] for part in solved if name in part], device)
           for name in names if any(name in part for part in solved)}  # fmt: skip
    if ranks.size == 1:
        return own
    found = ranks.gathered({name: _described(*pair) for name, pair in own.items()})
    whole: Solved = {}
    for name in names:
        parts = []
        for rank, described in enumerate(found):
            if name not in described:
                continue
            given = _tensors(*own[name]) if rank == ranks.rank else None
            tensors = []
            for k, (shape, dtype) in enumerate(described[name]["tensors"]):
                tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype]) if given is None else given[k].cpu()
                tensors.append(ranks.broadcast(tensor.contiguous(), rank))
            codes_OI, *parameters = (tensor.to(device) for tensor in tensors[:-4])
            stats = SolveStats(tuple(tensors[-4:]), described[name]["damp"], described[name]["fallback"])
            parts.append((QTensor(codes_OI, tuple(parameters), grid), stats))
        whole[name] = joined(parts, device)
    return whole


def _tensors(qtensor: QTensor, stats: SolveStats) -> list[Tensor]:
    return [qtensor.codes_OI, *qtensor.parameters, *stats.by_row]


def _described(qtensor: QTensor, stats: SolveStats) -> dict[str, Any]:
    """Shapes and dtypes of a linear's tensors, and what is said of it beside."""
    tensors = [[list(t.shape), DTYPE_NAMES[t.dtype]] for t in _tensors(qtensor, stats)]
    return {"tensors": tensors, "damp": stats.damp_percent, "fallback": stats.fallback}


def round_layer(
    spec: ModelSpec, layer: int, recipe: Recipe, state: Mapping[str, torch.Tensor], device: str
) -> tuple[dict[str, torch.Tensor], list[LayerResult]]:
    """Round a layer's linears by a format's own functions: their packed tensors by full name, and one result a linear.

    state: the layer's weights in the dtype they would be stored in, under names relative to the layer: bitsandbytes
    keeps that dtype and computes in it.
    """
    form = get_format(recipe.format)
    packed: dict[str, torch.Tensor] = {}
    results: list[LayerResult] = []
    for lin in spec.layer_linears(layer):
        scheme = recipe.scheme_of(lin)
        if scheme is None:
            continue
        weight = state[lin.path + ".weight"].to(device)
        tensors = form.round(weight, lin)
        found = form.unpack(tensors, scheme, lin)
        dequantized = found.dequantize() if isinstance(found, QTensor) else found.float()
        error = float((weight.float() - dequantized).square().sum(dtype=torch.float64))
        error_db = decibel(error, float(weight.float().square().sum(dtype=torch.float64)))
        results.append(LayerResult(lin.name, scheme.label, None, error_db, 0.0))
        packed |= {f"{lin.name}.{part}": tensor.cpu().contiguous() for part, tensor in tensors.items()}
    return packed, results
